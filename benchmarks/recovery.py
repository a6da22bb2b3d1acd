"""Recomputation beside swapping under memory pressure, by block size (the paper's Fig. 19).

  python -m benchmarks.recovery --block_sizes=8,16,32,64,128
  python -m benchmarks.recovery --pool_share=0.1 --random_model=100m

The same requests, n completions each, run through one model with a pool of `pool_share` of what
they need together: once computing again what was preempted, once swapping it to host memory. Both
give the same tokens, which is checked. Only the ratio of the two columns means anything.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import random_models, tables
from pallas_paged.engine import LLM, RequestOutput, SamplingParams
from pallas_paged.engine.groups import blocks_for, worst_case_blocks

_MODEL = flags.DEFINE_enum(
    "random_model", "tiny", list(random_models.CONFIGS), "Shape of the model."
)
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["8", "16", "32", "64", "128"], "Block sizes.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 24, "Requests.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 60, "Tokens of a prompt.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 60, "Tokens of an output.", lower_bound=1)
_N = flags.DEFINE_integer("n", 2, "Completions of a prompt.", lower_bound=1)
_POOL_SHARE = flags.DEFINE_float("pool_share", 0.1, "Pool, as a share of what all need.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def run(folder: str, block_size: int, mode: str) -> tuple[float, list[RequestOutput], LLM]:
    """Returns the seconds that all requests take, compilation left out, and their outputs."""
    length = _PROMPT_LEN.value + _OUTPUT_LEN.value
    needed = _NUM_REQUESTS.value * _N.value * blocks_for(length, block_size)
    least = worst_case_blocks(_PROMPT_LEN.value, _N.value, length, block_size)
    llm = LLM(
        folder,
        load_format="dummy",
        max_model_len=length,
        max_num_seqs=max(_N.value, min(32, _NUM_REQUESTS.value * _N.value)),
        max_num_batched_tokens=128,
        block_size=block_size,
        num_blocks=1 + max(least, round(_POOL_SHARE.value * needed)),
        enable_prefix_caching=False,
        swap_space=1 if mode == "swap" else 0,
        preemption_mode=mode,
        deterministic=True,  # one program
        compile_ahead=True,
    )
    rng = np.random.default_rng(0)
    vocab_size = llm.model_config.vocab_size
    prompts = [
        {"prompt_token_ids": rng.integers(0, vocab_size, _PROMPT_LEN.value).tolist()}
        for _ in range(_NUM_REQUESTS.value)
    ]
    params = SamplingParams(n=_N.value, max_tokens=_OUTPUT_LEN.value, seed=0, ignore_eos=True)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, outputs, llm


def compare(folder: str, block_size: int) -> dict[str, Any]:
    """Returns a line of the table."""
    seconds: dict[str, float] = {}
    tokens: dict[str, Any] = {}
    row: dict[str, Any] = {"block size": block_size}
    for mode in ("recompute", "swap"):
        seconds[mode], outputs, llm = run(folder, block_size, mode)
        tokens[mode] = [[c.token_ids for c in output.outputs] for output in outputs]
        stats = llm.kv_stats()
        row[f"{mode}: preemptions"] = stats.num_recomputations + stats.num_swaps
        num_tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        row[f"{mode}: tokens/s"] = num_tokens / seconds[mode]
    assert tokens["recompute"] == tokens["swap"], "recovery changed the tokens"
    return row | {"recompute / swap, time": seconds["recompute"] / seconds["swap"]}


def main(argv: Sequence[str]) -> None:
    """Prints a line per block size."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(_MODEL.value, pathlib.Path(folder))
        rows = [compare(folder, int(size)) for size in _BLOCK_SIZES.value]
    tables.show(
        f"{_NUM_REQUESTS.value} requests, n={_N.value}, {_PROMPT_LEN.value} + {_OUTPUT_LEN.value} "
        f"tokens, pool {_POOL_SHARE.value:.0%} of the need",
        rows,
    )
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    app.run(main)
