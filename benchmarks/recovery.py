"""Recomputation beside swapping, by block size (the paper's Fig. 19).

  python -m benchmarks.recovery --block_sizes=8,16,32,64,128
  python -m benchmarks.recovery --pool_share=0.1 --random_model=100m
  python -m benchmarks.recovery --parts=costs --swap_tokens=512 --random_model=20m

Part "pressure" (19b): requests of several kinds (greedy, sampled with a seed, n samples, beams, a
common prefix) run together through one model: with memory for all of them, and with a pool of
`pool_share` of that, once computing again what was preempted, once swapping it to host memory. All
three give the same tokens, which is checked. Only ratios of one line mean anything.

Part "costs" (19a): the time of one swap of `swap_tokens` tokens out and back in, and that of
computing them again; what `preemption_mode="auto"` does with such a request, and from how many
tokens on it swaps one; and what it measures to decide that. The paper copies each block by itself,
so that small blocks are slow to swap; here all blocks of a request are one copy.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from benchmarks import random_models, tables
from benchmarks.recovery_costs import engine_for, measure_costs
from pallas_paged.engine import LLM, BeamSearchParams, RequestOutput, SamplingParams
from pallas_paged.engine.kv.sharing import blocks_for, worst_case_blocks
from pallas_paged.models import command_line

_MODEL = flags.DEFINE_enum(
    "random_model", "tiny", list(random_models.CONFIGS), "Shape of the model."
)
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["8", "16", "32", "64", "128"], "Block sizes.")
command_line.integers_only("block_sizes", "8")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 24, "Requests.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 60, "Tokens of a prompt.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 100, "Tokens of an output.", lower_bound=1)
_N = flags.DEFINE_integer(
    "n", 2, "Samples, or beams, of those requests that have several.", lower_bound=1
)
_POOL_SHARE = flags.DEFINE_float("pool_share", 0.1, "Pool, as a share of what all need.")
_PREFIX_CACHING = flags.DEFINE_bool("prefix_caching", True, "Whether prefixes are cached.")
_PARTS = flags.DEFINE_list("parts", ["pressure", "costs"], "What to measure: pressure, costs.")
flags.register_validator(
    "parts", lambda parts: bool(parts) and {*parts} <= {"pressure", "costs"}, "has no such part"
)
_SWAP_TOKENS = flags.DEFINE_integer(
    "swap_tokens", 256, "Tokens of the one request that part costs swaps.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


Params = SamplingParams | BeamSearchParams


@dataclasses.dataclass(frozen=True)
class Kind:
    """How requests of a kind are made: their parameters, and how much of a prompt they share."""

    params: Params
    shared_prefix: float = 0.0


def make_kinds(num_samples: int, max_tokens: int) -> dict[str, Kind]:
    """Returns the kinds of requests, by name."""
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    sampled = dataclasses.replace(greedy, temperature=1.0, seed=1)
    return {
        "greedy": Kind(greedy),
        "sampled": Kind(sampled),
        "several": Kind(dataclasses.replace(sampled, n=num_samples)),
        "beams": Kind(BeamSearchParams(num_samples, max_tokens, ignore_eos=True)),
        "prefix": Kind(greedy, shared_prefix=0.75),
    }


def make_requests(
    kinds: Sequence[Kind], num_requests: int, prompt_len: int, vocab_size: int
) -> tuple[list[dict[str, list[int]]], list[Params]]:
    """Returns prompts and parameters, of one kind after the other."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, vocab_size, prompt_len).tolist()
    prompts, params = [], []
    for i in range(num_requests):
        kind = kinds[i % len(kinds)]
        num_shared = int(kind.shared_prefix * prompt_len)
        own = rng.integers(0, vocab_size, prompt_len - num_shared).tolist()
        prompts.append({"prompt_token_ids": common[:num_shared] + own})
        params.append(kind.params)
    return prompts, params


def num_seqs(params: Params) -> int:
    """Returns how many sequences of a request run together."""
    return params.beam_width if isinstance(params, BeamSearchParams) else params.n


def pool_sizes(params: Sequence[Params], prompt_len: int, block_size: int) -> list[int]:
    """Returns the blocks that all requests need together, and that the largest one needs."""
    shapes = [(num_seqs(one), prompt_len + (one.max_tokens or 0)) for one in params]
    needs = [n * blocks_for(length, block_size) for n, length in shapes]
    return [
        sum(needs),
        max(worst_case_blocks(prompt_len, n, length, block_size) for n, length in shapes),
    ]


def run(
    folder: str, block_size: int, mode: str | None
) -> tuple[float, list[RequestOutput], LLM, int]:
    """Runs all requests, with memory for all if `mode` is None.

    Returns the seconds, compilation left out, the outputs, the engine and its pool's blocks.
    """
    kinds = make_kinds(_N.value, _OUTPUT_LEN.value)
    vocab_size = random_models.CONFIGS[_MODEL.value]["vocab_size"]
    prompts, params = make_requests(
        list(kinds.values()), _NUM_REQUESTS.value, _PROMPT_LEN.value, vocab_size
    )
    everything, least = pool_sizes(params, _PROMPT_LEN.value, block_size)
    share = everything if mode is None else max(least, round(_POOL_SHARE.value * everything))
    llm = LLM(
        folder,
        load_format="dummy",
        max_model_len=_PROMPT_LEN.value + _OUTPUT_LEN.value,
        max_num_seqs=max(_N.value, min(32, sum(map(num_seqs, params)))),
        max_num_batched_tokens=128,
        block_size=block_size,
        num_blocks=1 + share,
        enable_prefix_caching=_PREFIX_CACHING.value,
        swap_space=1 if mode == "swap" else 0,
        preemption_mode=mode or "recompute",
        deterministic=True,  # one shape
        compile_ahead=True,
    )
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, outputs, llm, share


def compare(folder: str, block_size: int) -> dict[str, Any]:
    """Returns a line of the table.

    Raises:
      AssertionError: a request got other tokens under pressure.
    """
    seconds, free, llm, _ = run(folder, block_size, None)
    assert llm.kv_stats().num_recomputations == 0, "memory for all, and somebody lost it"
    wanted = [[c.token_ids for c in output.outputs] for output in free]
    num_tokens = sum(len(ids) for completions in wanted for ids in completions)
    row: dict[str, Any] = {"block size": block_size, "unpressured: tokens/s": num_tokens / seconds}
    for mode in ("recompute", "swap"):
        row[mode], outputs, llm, row["pool"] = run(folder, block_size, mode)
        tokens = [[c.token_ids for c in output.outputs] for output in outputs]
        num_equal = sum(a == b for a, b in zip(tokens, wanted, strict=True))
        assert num_equal == len(wanted), f"{mode} kept the tokens of {num_equal} requests only"
        stats = llm.kv_stats()
        row[f"{mode}: preemptions"] = stats.num_recomputations + stats.num_swaps
        row[f"{mode}: swapped"] = stats.num_swaps
        row[f"{mode}: tokens/s"] = num_tokens / row[mode]
    row["recompute / swap, time"] = row.pop("recompute") / row.pop("swap")
    return row | {"requests with equal tokens": f"{len(wanted)} of {len(wanted)}"}


def main() -> None:
    """Prints a table per part with a line per block size; one line of both goes to the file."""
    sizes = [int(size) for size in _BLOCK_SIZES.value]
    rows: list[dict[str, Any]] = [{} for _ in sizes]
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(_MODEL.value, pathlib.Path(folder))
        if "pressure" in _PARTS.value:
            found = [compare(folder, size) for size in sizes]
            kinds = ", ".join(make_kinds(_N.value, _OUTPUT_LEN.value))
            tables.show(
                f"{_NUM_REQUESTS.value} requests ({kinds}), {_PROMPT_LEN.value} + "
                f"{_OUTPUT_LEN.value} tokens, n={_N.value}, pool {_POOL_SHARE.value:.0%} of need",
                found,
            )
            rows = [row | new for row, new in zip(rows, found, strict=True)]
        if "costs" in _PARTS.value:
            found = [
                measure_costs(engine_for(folder, size), _SWAP_TOKENS.value).row() for size in sizes
            ]
            tables.show(f"one request of {_SWAP_TOKENS.value} tokens", found)
            rows = [row | new for row, new in zip(rows, found, strict=True)]
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
