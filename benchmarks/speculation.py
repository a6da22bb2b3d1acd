"""What guessing tokens gains on text: with and without, in turns, outputs compared.

  python -m benchmarks.speculation                                   # the demo model, some minutes
  python -m benchmarks.speculation --model=FOLDER --draft_model=FOLDER --files=A.txt,B.txt

Each request continues the beginning of a file, greedily: by default of modules of Python's standard
library, which is what the demo model has learned. `none` is the engine without speculation, `ngram`
guesses what followed the last time, `draft` lets --draft_model guess. For each number of sequences
that run at once: tokens per second, its ratio to `none` of the same round (medians), the share of
the guesses that were right, tokens per sequence and program, and the share of the outputs that are
token by token those of `none`. On a CPU `none` makes several steps in a program (see
`EngineConfig.num_scheduler_steps`), so that fewer programs alone are no gain.
"""

import json
import pathlib
import statistics
import sysconfig
import time
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from benchmarks import tables
from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a checkpoint.")
_DRAFT_MODEL = flags.DEFINE_string("draft_model", None, "Folder of a small model that guesses.")
_NUM_SPECULATIVE_TOKENS = flags.DEFINE_integer(
    "num_speculative_tokens", 4, "Guesses per step.", lower_bound=1
)
_RUNNING = flags.DEFINE_list("running", ["1", "4", "16"], "Sequences at once.")
command_line.integers_only("running", "16")
_FILES = flags.DEFINE_list("files", [], "Texts to continue; without it Python's own modules.")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 200, "Tokens of each text.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 100, "Tokens to generate.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of everything.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


class Run(NamedTuple):
    """What one engine did with some requests.

    Attributes:
      seconds: from the first step to the last.
      tokens: of each request.
      num_drafts: guesses that were computed.
      num_accepted: of them, those that were right.
      num_programs: of the engine's steps.
    """

    seconds: float
    tokens: list[list[int]]
    num_drafts: int
    num_accepted: int
    num_programs: int


def make_llms(most_running: int) -> dict[str, LLM]:
    """Returns the engines that are compared, by name."""
    count = {"num_speculative_tokens": _NUM_SPECULATIVE_TOKENS.value}
    ways: dict[str, dict[str, Any] | None] = {"none": None, "ngram": {"method": "ngram"} | count}
    if _DRAFT_MODEL.value:
        ways["draft"] = {"method": "draft_model", "model": _DRAFT_MODEL.value} | count
    return {
        name: LLM(
            _MODEL.value,
            max_num_seqs=most_running,
            max_model_len=_PROMPT_LEN.value + _OUTPUT_LEN.value,
            enable_prefix_caching=False,
            speculative_config=way,
        )
        for name, way in ways.items()
    }


def make_prompts(llm: LLM, count: int) -> list[list[int]]:
    """Returns the first tokens of as many files.

    Raises:
      ValueError: not so many files are long enough.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [pathlib.Path(name) for name in _FILES.value] or sorted(library.glob("*.py"))
    tokenizer, prompts = llm.get_tokenizer(), []
    for file in files:
        token_ids = tokenizer.encode(file.read_text(encoding="utf-8"))
        if len(token_ids) >= _PROMPT_LEN.value:
            prompts.append(token_ids[: _PROMPT_LEN.value])
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"{len(prompts)} of {len(files)} files have {_PROMPT_LEN.value} tokens, --running wants "
        f"{count}; lower one of the two, or name more --files"
    )


def run(llm: LLM, prompts: list[list[int]]) -> Run:
    """Continues all prompts at once."""
    core, proposer = llm.engine.core, llm.engine.core.scheduler.proposer
    params = SamplingParams(temperature=0, max_tokens=_OUTPUT_LEN.value, ignore_eos=True)

    def counts() -> tuple[int, int, int]:
        drafts = (proposer.num_drafts, proposer.num_accepted) if proposer else (0, 0)
        return *drafts, core.num_steps

    before, begin = counts(), time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": token_ids} for token_ids in prompts], params, use_tqdm=False
    )
    seconds = time.perf_counter() - begin
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Run(seconds, tokens, *(now - then for now, then in zip(counts(), before, strict=True)))


def figures(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Returns what an engine's rounds show beside those of `none`."""
    mine, others, last = runs[name], runs["none"], runs[name][-1]
    num_tokens = sum(map(len, last.tokens))
    equal = [a == b for a, b in zip(last.tokens, others[-1].tokens, strict=True)]
    return {
        "guesses": name,
        "running": len(last.tokens),
        "tokens/s": statistics.median(num_tokens / one.seconds for one in mine),
        "ratio": statistics.median(
            b.seconds / a.seconds for a, b in zip(mine, others, strict=True)
        ),
        "right": last.num_accepted / last.num_drafts if last.num_drafts else None,
        "tokens/program": num_tokens / len(last.tokens) / last.num_programs,
        "equal": sum(equal) / len(equal),
    }


def main() -> None:
    """Prints the table."""
    counts = list(map(int, _RUNNING.value))
    llms = make_llms(max(counts))
    prompts = make_prompts(llms["none"], max(counts))
    rows = []
    for count in counts:
        runs: dict[str, list[Run]] = {name: [] for name in llms}
        for llm in llms.values():  # compiles
            run(llm, prompts[:count])
            llm.runner.programs.wait_for_background()
        for _ in tqdm(range(_ROUNDS.value), f"{count} running", disable=None):
            for name, llm in llms.items():
                runs[name].append(run(llm, prompts[:count]))
        rows += [figures(name, runs) for name in llms]
    tables.show(
        f"continuing {_PROMPT_LEN.value} tokens by {_OUTPUT_LEN.value}, "
        f"{_NUM_SPECULATIVE_TOKENS.value} guesses, {_ROUNDS.value} rounds",
        rows,
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
