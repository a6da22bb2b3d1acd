"""How long this device takes to compute preempted requests again, and to swap them: measured.

What runs here is harmless: steps read what lies in any block, write to the null block and sample
into the row of padding; swaps bring blocks back to where they were.
"""

import bisect
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.planner import NO_TARGETS, fill_drafts
from pallas_paged.engine.core.policies import RecoveryCosts
from pallas_paged.engine.core.step_inputs import packed_size, views
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.kv.host_pool import BlockMove, SwappedChunk, chunk_sizes
from pallas_paged.engine.kv.sharing import NO_COPIES

logger = logging.getLogger(__name__)

_REPEATS, _ENOUGH_S = 5, 0.1
"""Of one measurement: repeats at most, and the time after which none begins."""
_MAX_CHUNK_BYTES = 64 * 2**20
"""Of the larger one of the two chunks that are measured, unless the two smallest have more."""


class _Span(NamedTuple):
    """Tokens of a prompt in a step: positions `start` to `end`, which is not one of them."""

    start: int
    end: int


def measured_costs(runner: ModelRunner, num_host_blocks: int) -> RecoveryCosts:
    """Times a step of prompts, and swaps of a small and a large chunk; logs what it found.

    A token of a prompt costs its share of the largest step that the scheduler makes of prompts
    alone (`Buckets.worth_while`): a larger bucket runs only beside many sequences that decode, and
    would have to be compiled for this. The cost of a swap is a straight line through both sizes; it
    has no negative part.

    What any block but the null block holds, the rows but that of padding, and the row state stay.
    No other step may be under way. Compiles the bucket's program and those of both chunks, where
    there are none yet; each time is the median of up to five, after one that does not count.

    Args:
      runner: the device.
      num_host_blocks: of host memory for swapped blocks.

    Raises:
      ValueError: host memory does not hold the smallest of `chunk_sizes`.
    """
    plan = _step_of_prompts(runner)
    num_tokens = int(views(plan.inputs, plan.bucket).query_start_loc[-1])
    token_s = _median_s(lambda: _run(runner, [plan])) / num_tokens
    sizes = _sizes_to_measure(runner, num_host_blocks)
    costs = RecoveryCosts(token_s, *_line([(size, swap_s(runner, size)) for size in sizes]))
    logger.info("preemption: %s (measured)", costs)
    return costs


def recompute_s(runner: ModelRunner, num_tokens: int) -> float:
    """Returns the seconds to compute a prompt of so many tokens, in steps as the scheduler cuts it.

    As harmless as `measured_costs`. A prompt has at most `longest_prompt` tokens. A single token
    that is left for its last step counts as one of a step with prompts.
    """
    plans = _steps_of_prompt(runner, num_tokens)
    return _median_s(lambda: _run(runner, plans))


def swap_s(runner: ModelRunner, num_blocks: int) -> float:
    """Returns the seconds to copy so many blocks out to the host and back in, padding included.

    As harmless as `measured_costs`. The pool has to have so many blocks beside the null block.
    """
    sizes = chunk_sizes(_num_usable_blocks(runner))
    size = sizes[bisect.bisect_left(sizes, num_blocks)]
    block_ids = np.zeros(size, np.int32)
    block_ids[:num_blocks] = np.arange(1, num_blocks + 1)
    move = BlockMove(SwappedChunk(0, size), block_ids)

    def run() -> None:
        chunk = jax.block_until_ready(runner.block_programs.swap_out(runner.kv_caches, move))
        runner.kv_caches = runner.block_programs.swap_in(runner.kv_caches, move, chunk)
        runner.block_until_ready()

    return _median_s(run)


def longest_prompt(runner: ModelRunner) -> int:
    """Returns the most tokens of a sequence: what its table holds, and the model was made for."""
    num_slots = runner.buckets.table_widths[-1] * _block_size(runner)
    return min(num_slots, runner.programs.model.config.max_model_len)


def _sizes_to_measure(runner: ModelRunner, num_host_blocks: int) -> list[int]:
    """Returns the smallest chunk, and that of the longest sequence or the largest within limits.

    The smallest alone if the host has room for no other.
    """
    sizes = [n for n in chunk_sizes(_num_usable_blocks(runner)) if n <= num_host_blocks]
    if not sizes:
        raise ValueError(
            f"{num_host_blocks} blocks of host memory hold no chunk: nothing is swapped"
        )
    block_bytes = num_bytes(runner.kv_caches) // runner.kv_caches[0].k.shape[0]
    longest = bisect.bisect_left(sizes, runner.buckets.table_widths[-1])
    within = sum(size * block_bytes <= _MAX_CHUNK_BYTES for size in sizes) - 1
    large = min(max(1, min(longest, within)), len(sizes) - 1)
    return sorted({sizes[0], sizes[large]})


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Returns seconds per block one way, and per swap, of a line through (blocks, seconds).

    Where it would begin below zero, that through zero and the last point; where it would fall, a
    level one. One point says nothing of another size: all of it is per block.
    """
    (first, first_s), (last, last_s) = points[0], points[-1]
    if last_s <= first_s and last > first:
        return 0.0, last_s
    slope = (last_s - first_s) / (last - first) if last > first else last_s / last
    slope = min(slope, last_s / last)
    return slope / 2, max(0.0, last_s - slope * last)


def _step_of_prompts(runner: ModelRunner) -> StepPlan:
    """Returns a step full of prompts, as long as can be, or of as many as there are rows."""
    buckets, longest = runner.buckets, longest_prompt(runner)
    num_tokens = buckets.worth_while(buckets.mixed_tokens[-1], 0)
    lengths = [min(longest, num_tokens - start) for start in range(0, num_tokens, longest)]
    return _plan(runner, [_Span(0, length) for length in lengths[: buckets.mixed_seqs[-1]]])


def _steps_of_prompt(runner: ModelRunner, num_tokens: int) -> list[StepPlan]:
    """Returns the steps of one prompt, each with as many tokens as are worth while."""
    most, plans, start = runner.buckets.mixed_tokens[-1], [], 0
    while start < num_tokens:
        end = start + runner.buckets.worth_while(min(most, num_tokens - start), 0)
        plans.append(_plan(runner, [_Span(start, end)]))
        start = end
    return plans


def _plan(runner: ModelRunner, spans: Sequence[_Span]) -> StepPlan:
    """Returns a step of these prompts, one in each row: it writes nothing but what padding does."""
    buckets, programs, S = runner.buckets, runner.programs, _block_size(runner)
    starts, ends = np.array(spans, np.int32).T
    counts = ends - starts
    B, T, pasts = len(spans), int(counts.sum()), np.cumsum(counts, dtype=np.int32)
    bucket = buckets.pick(
        T,
        B,
        -(-int(ends.max()) // S),
        is_decode=False,
        has_drafts=buckets.proposes,
        has_decodes=bool((counts == 1).any()),
    )
    inputs = np.zeros(packed_size(bucket), np.int32)
    x = views(inputs, bucket)
    padding = programs.max_num_seqs  # the row of padding, whose table is null blocks
    x.input_ids[:T] = np.arange(T) % programs.model.config.vocab_size
    x.positions[:T] = np.concatenate([np.arange(*span) for span in spans])
    x.slot_mapping[:T] = x.positions[:T] % S
    x.seq_lens[:B] = ends
    x.query_start_loc[1 : B + 1], x.query_start_loc[B + 1 :] = pasts, T
    x.rows[:], x.sample_rows[:] = padding, padding
    x.rows[:B] = np.arange(B)  # as many logits are computed as there are rows
    x.table_places[:] = padding * programs.max_blocks_per_seq
    x.logits_indices[:B] = pasts - 1
    x.sample_positions[:B] = ends
    if x.drafts is not None:
        fill_drafts(x.drafts, pasts - 1, np.zeros(B, np.int32))
    return StepPlan(0, bucket, (), (), (), NO_COPIES, (), (), (), inputs, False, NO_TARGETS)


def _run(runner: ModelRunner, plans: Sequence[StepPlan]) -> None:
    for plan in plans:
        runner.dispatch(plan)
    runner.block_until_ready()


def _median_s(run: Callable[[], None]) -> float:
    """Returns the median of what a few calls take, after a first one that may compile."""
    run()
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH_S:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _block_size(runner: ModelRunner) -> int:
    return runner.kv_caches[0].k.shape[2]


def _num_usable_blocks(runner: ModelRunner) -> int:
    return runner.kv_caches[0].k.shape[0] - 1
