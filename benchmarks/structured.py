"""What it costs to follow a grammar: decoding with and without a JSON schema, in turns.

  python -m benchmarks.structured                                   # the demo model, a minute
  python -m benchmarks.structured --model=FOLDER --running=1,8,64 --schema=FILE

Each request continues the same text by --output_len tokens. `none` is the engine without a grammar.
`bias` has a bias for one token: its steps are those that change logits, as under a grammar, but
they wait for nothing. In `grammar` every request follows the schema, in `half` every second one
does. For each number of sequences that run at once: tokens per second and its ratio to `none` of
the same round (medians), and milliseconds per step. On a CPU `none` makes several steps in a
program (see `EngineConfig.num_scheduler_steps`), the others do not.

A grammar's mask follows from the last token, so no step under it begins before the host knows the
one before; the others run in each step meanwhile. By default the schema is an array of records that
is longer than the output. A second table has what the host does: compiling a schema that is new,
finding the masks of all sequences that run, per sequence, and taking in a token.
"""

import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from benchmarks import tables
from pallas_paged.engine import LLM, SamplingParams, StructuredOutputsParams
from pallas_paged.engine.text.grammars import Grammars
from pallas_paged.engine.text.tokenizer import load_tokenizer
from pallas_paged.models import command_line, load_config, load_eos_token_ids
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a checkpoint.")
_SCHEMA = flags.DEFINE_string("schema", None, "File with a JSON schema of long outputs.")
_RUNNING = flags.DEFINE_list("running", ["1", "4", "16"], "Sequences at once.")
command_line.integers_only("running", "16")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of the text.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 100, "Tokens to generate.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of everything.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

RECORDS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "city": {"enum": ["Berlin", "Köln", "Paris", "Zürich"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
            "score": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["name", "age", "city", "tags", "score"],
        "additionalProperties": False,
    },
}


class Run(NamedTuple):
    """What the engine did with some requests.

    Attributes:
      seconds: from the first step to the last.
      tokens: of each request.
      num_steps: of the engine.
    """

    seconds: float
    tokens: list[tuple[int, ...]]
    num_steps: int


def make_params(schema: dict[str, Any], count: int) -> dict[str, list[SamplingParams]]:
    """Returns what the requests ask for, by the name of the way."""
    wanted = StructuredOutputsParams(json=schema, disable_any_whitespace=True)

    def of(seed: int, **fields: Any) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=_OUTPUT_LEN.value, detokenize=False, **fields)

    none = [of(seed, ignore_eos=True) for seed in range(count)]
    grammar = [of(seed, structured_outputs=wanted) for seed in range(count)]
    return {
        "none": none,
        "bias": [of(seed, ignore_eos=True, logit_bias={0: -1.0}) for seed in range(count)],
        **({"half": [(none, grammar)[i % 2][i] for i in range(count)]} if count > 1 else {}),
        "grammar": grammar,
    }


def run(llm: LLM, prompt: list[int], params: list[SamplingParams]) -> Run:
    """Continues the prompt once for each of the parameters, all at once."""
    core = llm.engine.core
    before, begin = core.num_steps, time.perf_counter()
    prompts = [{"prompt_token_ids": prompt}] * len(params)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    tokens = [output.outputs[0].token_ids for output in outputs]
    return Run(seconds, tokens, core.num_steps - before)


def figures(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Returns what the rounds of a way show beside those of `none`."""
    speeds = {
        way: [sum(map(len, one.tokens)) / one.seconds for one in runs[way]]
        for way in (name, "none")
    }
    pairs = zip(*speeds.values(), strict=True) if name != "none" else [(1.0, 1.0)]
    return {
        "outputs": name,
        "running": len(runs[name][-1].tokens),
        "tokens/s": statistics.median(speeds[name]),
        "ratio": statistics.median(mine / other for mine, other in pairs),
        "ms/step": statistics.median(1e3 * one.seconds / one.num_steps for one in runs[name]),
    }


def time_host(schema: dict[str, Any], tokens: list[tuple[int, ...]]) -> dict[str, Any]:
    """Returns how long the host needs for outputs under a schema, all of them at once."""
    shape = load_config(_MODEL.value)
    grammars = Grammars(
        load_tokenizer(_MODEL.value), shape.vocab_size, load_eos_token_ids(_MODEL.value)
    )
    grammars.compile(StructuredOutputsParams(choice=["a"]))  # reads the tokenizer
    compile_s: list[float] = []
    for number in range(9):
        new = StructuredOutputsParams(json=schema | {"$comment": number})
        begin = time.perf_counter()
        grammars.compile(new)
        compile_s.append(time.perf_counter() - begin)
    compact = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    grammar = grammars.compile(compact)
    assert grammar is not None
    matchers = [grammar.start() for _ in tokens]
    mask_s: list[float] = []
    take_s: list[float] = []
    for place in range(min(map(len, tokens)) - 1):
        begin = time.perf_counter()
        grammars.find_masks(matchers)
        middle = time.perf_counter()
        for matcher, mine in zip(matchers, tokens, strict=True):
            matcher.take(mine[place : place + 1])
        mask_s.append((middle - begin) / len(tokens))
        take_s.append((time.perf_counter() - middle) / len(tokens))
    return {
        "running": len(tokens),
        "vocabulary": shape.vocab_size,
        "compile ms": 1e3 * statistics.median(compile_s),
        "mask us": 1e6 * statistics.median(mask_s),
        "mask us, most": 1e6 * max(mask_s),
        "take us": 1e6 * statistics.median(take_s),
    }


def main() -> None:
    """Prints the tables."""
    counts = list(map(int, _RUNNING.value))
    schema = json.loads(pathlib.Path(_SCHEMA.value).read_text()) if _SCHEMA.value else RECORDS
    llm = LLM(
        _MODEL.value,
        max_num_seqs=max(counts),
        max_model_len=_PROMPT_LEN.value + _OUTPUT_LEN.value,
    )
    text = pathlib.Path(json.__file__).read_text(encoding="utf-8")
    prompt = llm.get_tokenizer().encode(text[: 4 * _PROMPT_LEN.value])[: _PROMPT_LEN.value]
    rows, of_host = [], []
    for count in counts:
        ways = make_params(schema, count)
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for params in ways.values():  # compiles
            run(llm, prompt, params)
            llm.runner.programs.wait_for_background()
        for _ in tqdm(range(_ROUNDS.value), f"{count} running", disable=None):
            for name, params in ways.items():
                runs[name].append(run(llm, prompt, params))
        rows += [figures(name, runs) for name in ways]
        of_host.append(time_host(schema, runs["grammar"][-1].tokens))
    tables.show(
        f"continuing {_PROMPT_LEN.value} tokens by {_OUTPUT_LEN.value}, {_ROUNDS.value} rounds",
        rows,
    )
    tables.show("on the host, per sequence", of_host)
    if _JSON.value:
        found = {"decoding": rows, "host": of_host}
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
