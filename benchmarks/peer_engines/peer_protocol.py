"""What a driver reads and answers; the standard library only, of Python 3.11.

A driver is started with the name of a JSON file, a `Job`. It loads the model, writes the line
`{"ready": true}` to standard output, and then answers every line of standard input with one line:

- `run` serves the workload once: `{"seconds": 1.5, "tokens": [[3, 1], ...]}`, what each request
  generated;
- `reference`, which only transformers' driver knows, adds `"margins"`: by how much the first of the
  logits was above the second one at each of these tokens.

Started with a second argument, `convert`, it writes the model in its engine's own form into
`Job.converted`, and ends. What libraries print goes to standard error.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to serve.

    Attributes:
      model: a Hugging Face folder, float32, without a tokenizer.
      converted: a folder for the model in the engine's own form.
      max_num_seqs: most requests that run at once.
      max_model_len: tokens of the longest request, prompt and output, a little more.
      num_threads: as many as there are cores.
      kv_cache_gib: memory for keys and values, for engines that want to know.
      prompts: tokens of each request's prompt.
      num_output_tokens: how many each request generates, EOS or not.
    """

    model: str
    converted: str
    max_num_seqs: int
    max_model_len: int
    num_threads: int
    kv_cache_gib: int
    prompts: list[list[int]]
    num_output_tokens: list[int]

    def config(self) -> dict[str, Any]:
        """Returns what the model's `config.json` holds."""
        text = pathlib.Path(self.model, "config.json").read_text(encoding="utf-8")
        return dict(json.loads(text))


def main(
    load: Callable[[Job], dict[str, Callable[[], Answer]]],
    convert: Callable[[Job], None] | None = None,
) -> None:
    """Is a driver: `load` returns what to do for each line, all but the seconds."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        job = Job(**json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
        if sys.argv[2:] == ["convert"]:
            if convert is not None:
                convert(job)
            return
        commands = load(job)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            begin = time.perf_counter()
            answer = commands[line.strip()]()
            seconds = time.perf_counter() - begin
            print(json.dumps({"seconds": seconds, **answer}), file=answers, flush=True)
