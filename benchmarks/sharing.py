"""How full the blocks of the KV pool are, and what sharing them saves.

  python -m benchmarks.sharing
  python -m benchmarks.sharing --wall_time --random_model=20m
  python -m benchmarks.sharing --timeline=pool.json --plot=pool.png     # the latter: matplotlib

The real scheduler and block tables run requests whose tokens are drawn at random, one step of
which is always in flight: lengths, blocks and batches are those of an engine, times are not. Only
beams need a model, and have the engine and the demo model (`beam_runs`). The questions, each beside
the paper's figures (Kwon et al. 2023):

- fill: under a full pool, which share of the slots that sequences hold has a token in it (Fig. 2);
- parallel: which share of the blocks do n samples save by sharing the prompt's (Fig. 15);
- beams: which share of the blocks do the beams of a search save (Fig. 15);
- prefix: how many tokens are computed for requests that share a prefix (Fig. 16).

`--wall_time` answers the last one with a whole engine and a model with random weights: tokens and
seconds with the prefix cache and without it, in one run.
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

from benchmarks import beam_runs, pictures, random_models, tables, workloads
from pallas_paged.engine import LLM, RequestOutput, SamplingParams
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.scheduler import ScheduledStep, Scheduler
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.engine.kv.stats import KVStats, kv_stats
from pallas_paged.models import command_line

_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 400, "Requests of each run.", lower_bound=1)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
_NUM_SLOTS = flags.DEFINE_integer(
    "num_slots", 15_700, "Slots of the pool (the paper's OPT-13B).", lower_bound=1
)
_MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", 256, "Sequences that run at once.", lower_bound=1
)
_BEAM_REQUESTS = flags.DEFINE_integer(
    "beam_requests", 32, "Beam searches of each width; at most 48 beams run at once.", lower_bound=1
)
_PREFIX_LEN = flags.DEFINE_integer("prefix_len", 341, "Tokens of the shared prefix.", lower_bound=1)
_PREFIX_REQUESTS = flags.DEFINE_integer(
    "prefix_requests", 64, "Requests that share it.", lower_bound=1
)
_WALL_TIME = flags.DEFINE_bool("wall_time", False, "Time the shared prefix with a model.")
_MODEL = flags.DEFINE_enum(
    "random_model", "20m", list(random_models.CONFIGS), "Its shape, for --wall_time."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and tokens.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_TIMELINE = flags.DEFINE_string("timeline", None, "Write the pool's use in every step of `fill`.")
_PLOT = flags.DEFINE_string("plot", None, "Draw that to this file; needs matplotlib.")

VOCAB_SIZE = 32_000
MAX_MODEL_LEN = 2048
MAX_NUM_BATCHED_TOKENS = 2048
STEP_COST = 256
"""As of an engine on a GPU."""
NUM_OWN = NUM_OUTPUT = 40
PAPER_FILL = 0.963
PAPER_PARALLEL = "6.1-9.8 %"
PAPER_BEAMS = "37.6-55.2 %"


@dataclasses.dataclass
class Run:
    """What a run of requests showed: the pool in every step, and the tokens computed."""

    pool: list[KVStats] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0


def run(groups: Sequence[SequenceGroup], *, enable_prefix_caching: bool = False) -> Run:
    """Runs the groups, all there at the start, to their ends."""
    memory = BlockTableMemory(
        num_blocks=_NUM_SLOTS.value // _BLOCK_SIZE.value + 1,
        block_size=_BLOCK_SIZE.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=enable_prefix_caching,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=_MAX_NUM_SEQS.value,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        step_cost=STEP_COST,
    )
    for group in groups:
        scheduler.add(group)
    rng = np.random.default_rng(_SEED.value)
    result = Run()
    in_flight: ScheduledStep | None = None
    while scheduler.has_unfinished or in_flight is not None:
        step = scheduler.schedule()
        if step is not None:
            result.num_computed_tokens += step.num_tokens
        if in_flight is not None:
            tokens = rng.integers(0, VOCAB_SIZE, len(in_flight.batch.rows)).tolist()
            scheduler.commit(in_flight, tokens)
        in_flight = step
        result.pool.append(kv_stats(memory, scheduler))
    scheduler.check_invariants()
    return result


def make_groups(name: str, num_requests: int, num_seqs: int) -> list[SequenceGroup]:
    """Returns requests of `num_seqs` sequences with the lengths of a data set."""
    workload = workloads.draw(
        name,
        num_requests,
        scale=1.0,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        seed=_SEED.value,
    )
    print(f"{name}, {num_seqs} per prompt: {workload.source}")
    return [
        SequenceGroup(
            str(i), request.prompt_token_ids, request.num_output_tokens, num_seqs=num_seqs
        )
        for i, request in enumerate(workload.requests)
    ]


def measure_fill() -> tuple[dict[str, Any], list[KVStats]]:
    """Returns the share of slots with a token, over the steps in which the pool was full."""
    pool = run(make_groups("sharegpt", _NUM_REQUESTS.value, 1)).pool
    full = [s for s in pool if s.num_allocated_blocks >= 0.9 * s.num_blocks] or pool
    slots = sum(s.num_allocated_blocks * s.block_size for s in full)
    tokens = sum(s.num_token_slots for s in full)
    figures = {
        "steps": len(pool),
        "steps with 90 % of the blocks in use": len(full),
        "share of held slots with a token": tokens / slots,
        "the paper's": PAPER_FILL,
    }
    return figures, pool


def measure_parallel() -> list[dict[str, Any]]:
    """Returns the blocks that sharing saves, of those needed without, over all steps."""
    rows = []
    for num_seqs in (2, 4, 6):
        pool = run(make_groups("alpaca", _NUM_REQUESTS.value, num_seqs)).pool
        saved = saved_share(pool)
        rows.append({"samples": num_seqs, "blocks saved": saved, "the paper's": PAPER_PARALLEL})
    return rows


def measure_beams() -> list[dict[str, Any]]:
    """Returns the blocks that beams save, of those needed without, over all steps."""
    llm = beam_runs.make_llm(_BLOCK_SIZE.value, min(48, _MAX_NUM_SEQS.value))
    workload = workloads.draw(
        "alpaca",
        _BEAM_REQUESTS.value,
        scale=1.0,
        max_model_len=beam_runs.MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        seed=_SEED.value,
    )
    print(f"beams: {workload.source}; {beam_runs.SOURCE}")
    rows = []
    for width in (2, 4, 6):
        pool = beam_runs.run(llm, workload.requests, width, _SEED.value)
        rows.append(
            {
                "beams": width,
                "blocks saved": saved_share(pool),
                "the paper's": PAPER_BEAMS,
                "most blocks at once": max(s.num_allocated_blocks for s in pool),
                "without sharing": max(s.num_table_entries for s in pool),
            }
        )
    return rows


def saved_share(pool: Sequence[KVStats]) -> float:
    """Returns the share of blocks that sharing saves, of those needed without, over all steps."""
    entries = sum(s.num_table_entries for s in pool)
    return 1 - sum(s.num_allocated_blocks for s in pool) / entries


def measure_prefix() -> list[dict[str, Any]]:
    """Returns the tokens computed with and without the prefix cache."""
    prompts = prefixed_prompts(_SEED.value, VOCAB_SIZE)
    rows = []
    for enabled in (False, True):
        groups = [SequenceGroup(str(i), ids, NUM_OUTPUT) for i, ids in enumerate(prompts)]
        result = run(groups, enable_prefix_caching=enabled)
        cached = sum(group.num_cached_tokens for group in groups)
        rows.append(
            {
                "prefix caching": "on" if enabled else "off",
                "prompt tokens": sum(map(len, prompts)),
                "found in the cache": cached,
                "computed tokens": result.num_computed_tokens,
            }
        )
    return rows


def prefixed_prompts(seed: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Returns prompts that begin with the same tokens, and have some of their own."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocab_size, _PREFIX_LEN.value).tolist()
    return [
        (*prefix, *rng.integers(0, vocab_size, NUM_OWN).tolist())
        for _ in range(_PREFIX_REQUESTS.value)
    ]


def measure_wall_time() -> list[dict[str, Any]]:
    """Returns tokens and seconds of requests with a common prefix: not cached, cached, pinned.

    With the cache the first request computes the prefix, and the others wait until the step that
    does is dispatched, unless what is left of it costs less than a step (`Buckets.step_cost`); one
    that was pinned before is found by all. Each engine runs as many requests of other tokens first,
    which compile what it needs.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(_MODEL.value, pathlib.Path(folder))
        for caching in ("off", "on", "pinned"):
            llm = make_llm(folder, caching != "off")
            for seed in (_SEED.value + 1, _SEED.value):
                if caching == "pinned":
                    prefix = prefixed_prompts(seed, llm.model_config.vocab_size)[0]
                    llm.pin_prefix({"prompt_token_ids": prefix[: _PREFIX_LEN.value]})
                begin = time.perf_counter()
                outputs = generate(llm, seed)
                seconds = time.perf_counter() - begin
            cached = sum(output.num_cached_tokens for output in outputs)
            prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
            row: dict[str, Any] = {
                "prefix caching": caching,
                "prompt tokens": prompt_tokens,
                "found in the cache": cached,
                "computed tokens": prompt_tokens - cached + len(outputs) * (NUM_OUTPUT - 1),
                "seconds": seconds,
            }
            first = rows[0] if rows else row
            row["tokens, off / this"] = first["computed tokens"] / row["computed tokens"]
            row["seconds, off / this"] = first["seconds"] / row["seconds"]
            rows.append(row)
    return rows


def make_llm(folder: str, enable_prefix_caching: bool) -> LLM:
    """Returns an engine with room for all requests at once."""
    length = _PREFIX_LEN.value + NUM_OWN + NUM_OUTPUT
    return LLM(
        folder,
        load_format="dummy",
        max_model_len=length,
        max_num_seqs=_PREFIX_REQUESTS.value,
        max_num_batched_tokens=max(512, _PREFIX_REQUESTS.value),
        block_size=_BLOCK_SIZE.value,
        num_blocks=1 + (_PREFIX_REQUESTS.value + 2) * blocks_for(length, _BLOCK_SIZE.value),
        enable_prefix_caching=enable_prefix_caching,
    )


def generate(llm: LLM, seed: int) -> list[RequestOutput]:
    """Runs requests whose tokens are drawn from `seed`."""
    prompts = prefixed_prompts(seed, llm.model_config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def draw(figure: "pictures.Figure", pool: Sequence[KVStats]) -> None:
    """Draws the pool's blocks, by what they hold, over the steps."""
    axes = figure.subplots()
    parts = {
        "shared": [s.num_shared_blocks for s in pool],
        "held by one sequence": [s.num_allocated_blocks - s.num_shared_blocks for s in pool],
        "cached": [s.num_cached_blocks for s in pool],
        "free": [s.num_free_blocks for s in pool],
    }
    axes.stackplot(range(len(pool)), *parts.values(), labels=parts.keys())
    axes.set(xlabel="step", ylabel="blocks", xlim=(0, max(1, len(pool) - 1)))
    axes.legend(loc="upper right")


def main() -> None:
    """Prints the tables."""
    if _WALL_TIME.value:
        show_wall_time()
        return
    figure = pictures.new_figure(9, 4) if _PLOT.value else None
    fill, pool = measure_fill()
    parallel, prefix = measure_parallel(), measure_prefix()
    beams = measure_beams()
    tables.show(f"fill: ShareGPT's lengths, block size {_BLOCK_SIZE.value}", [fill])
    tables.show("parallel sampling: Alpaca's lengths", parallel)
    tables.show("beam search: Alpaca's lengths, the demo model through the engine", beams)
    tables.show(f"a prefix of {_PREFIX_LEN.value} tokens", prefix)
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            figures = {"fill": fill, "parallel": parallel, "beams": beams, "prefix": prefix}
            json.dump(figures, file, indent=2)
    if _TIMELINE.value:
        with open(_TIMELINE.value, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(stats) for stats in pool], file)
    if figure and _PLOT.value:
        draw(figure, pool)
        pictures.save(figure, _PLOT.value)


def show_wall_time() -> None:
    """Prints what `--wall_time` asks for."""
    rows = measure_wall_time()
    tables.show(
        f"{_PREFIX_REQUESTS.value} requests with a prefix of {_PREFIX_LEN.value} tokens, model "
        f"{_MODEL.value}",
        rows,
    )
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump({"wall_time": rows}, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
