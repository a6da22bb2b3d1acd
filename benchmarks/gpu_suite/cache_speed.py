"""How fast keys and values are written, and blocks copied, gathered and scattered."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.shapes import DTYPE_BYTES, HEAD_DIM
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, why_none
from pallas_paged import copy_blocks, gather_blocks, rotate_and_write, scatter_blocks, write_kv
from pallas_paged.ops.rotary import rotate

NUM_KV_HEADS, GROUP = 8, 4
APART = "rotated by XLA"
"""The implementation in which the kernel only writes, and XLA rotates before."""


class Job(NamedTuple):
    """One operation on `amount` tokens or blocks."""

    operation: str
    amount: int
    block_size: int

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.operation} {self.amount}, block {self.block_size}"

    @property
    def writes(self) -> bool:
        """Whether it is about tokens, else about blocks."""
        return self.operation in ("write_kv", "rotate_and_write")

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        tokens = self.amount * (1 if self.writes else self.block_size)
        rows = 2 + (GROUP if self.operation == "rotate_and_write" else 0)
        return 2 * rows * tokens * NUM_KV_HEADS * HEAD_DIM * DTYPE_BYTES


def _work(job: Job, implementation: str) -> Callable[..., Any]:
    """Returns the work of one turn: state is the cache, or what was gathered from it."""

    def work(turn: jax.Array, state: Any, ids: jax.Array, *operands: Any) -> Any:
        now = ids[turn % len(ids)]
        if job.operation == "write_kv":
            k, v = operands
            return write_kv(k, v, state, now, implementation=implementation)
        if job.operation == "rotate_and_write":
            return _rotated_and_written(state, operands, now, implementation)
        if job.operation == "copy_blocks":
            src, dst = jnp.split(now, 2)
            return copy_blocks(state, src, dst, implementation=implementation)
        if job.operation == "gather_blocks":
            # So that each turn needs the one before it.
            now = now + jnp.isnan(state.k[0, 0, 0, 0]).astype(jnp.int32)
            return gather_blocks(operands[0], now, implementation=implementation)
        return scatter_blocks(state, now, operands[0], implementation=implementation)

    return work


def _rotated_and_written(
    state: Any, operands: tuple[Any, ...], slots: jax.Array, implementation: str
) -> Any:
    """Returns the cache and the rotated queries, as `state` has them."""
    rows, cos, sin = operands
    parts = jnp.split(rows, [GROUP, GROUP + 1], axis=2)  # as a merged projection leaves them
    q, k, v = (part.reshape(rows.shape[0], -1, HEAD_DIM) for part in parts)
    cache, _ = state
    if implementation == APART:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return write_kv(k, v, cache, slots, implementation="mosaic_gpu"), q
    q, cache = rotate_and_write(q, k, v, cos, sin, cache, slots, implementation=implementation)
    return cache, q


def loop(job: Job, implementation: str, on_gpu: bool) -> timing.Loop:
    """Returns calls that take turns over a pool larger than the L2 cache, updated in place.

    Each of its places is written at least once, and always with the same: what is in the pool in
    the end does not depend on the number of calls.
    """
    size, is_write = job.block_size, job.writes
    per_turn = job.amount * (2 if job.operation == "copy_blocks" else 1)
    num_sets = timing.num_copies(job.moved_bytes, 256) if on_gpu else 2
    block_bytes = 2 * NUM_KV_HEADS * size * HEAD_DIM * DTYPE_BYTES
    needed = num_sets * per_turn // (size if is_write else 1)
    num_blocks = 1 + max(needed, timing.num_copies(block_bytes, 1 << 30) if on_gpu else 9)
    pool = num_blocks, NUM_KV_HEADS, size, HEAD_DIM
    per_block = size if is_write else 1
    places = timing.Host(
        functools.partial(_places, per_block, (num_blocks - 1) * per_block, num_sets, per_turn),
        (num_sets, per_turn),
    )
    cache = timing.normal_cache(0, pool)
    rows = (job.amount, NUM_KV_HEADS, HEAD_DIM) if is_write else (job.amount, *pool[1:])
    new = timing.normal_cache(2, rows)
    # No product of a rotation is rounded: all ways of computing it give the same bits.
    turned = job.amount, NUM_KV_HEADS, GROUP + 2, HEAD_DIM
    angles = job.amount, HEAD_DIM // 2
    operands: dict[str, tuple[Any, ...]] = {
        "write_kv": (cache, places, new.k, new.v),
        "rotate_and_write": (
            (cache, timing.Normal(4, (job.amount, NUM_KV_HEADS * GROUP, HEAD_DIM))),
            places,
            _quarters(0, 32, turned, "bfloat16"),
            *(_quarters(seed, 4, angles, "float32") for seed in (1, 2)),
        ),
        "copy_blocks": (cache, places),
        "gather_blocks": (new, places, cache),
        "scatter_blocks": (cache, places, new),
    }
    turns = 2
    if on_gpu:
        turns = max(num_sets, timing.num_turns(max(job.moved_bytes / 3e12, 4e-6)))
    return timing.Loop(
        f"{job.name}, {implementation}",
        _work(job, implementation),
        operands[job.operation],
        turns,
        in_place=True,
    )


def _quarters(seed: int, most: int, shape: tuple[int, ...], dtype: str) -> timing.Host:
    """Returns random quarters of integers up to `most`."""

    def make() -> np.ndarray:
        return np.random.default_rng(seed).integers(-most, most + 1, shape) / np.float32(4)

    return timing.Host(make, shape, dtype)


def _places(first: int, count: int, num_sets: int, per_turn: int) -> np.ndarray:
    """Returns [num_sets, per_turn] of `count` blocks or slots from `first` on, none twice."""
    order = np.random.default_rng(0).permutation(count)[: num_sets * per_turn]
    return first + order.reshape(num_sets, per_turn)


def run(job: Job, context: Context) -> Row:
    """Times our kernel, and XLA's way beside it; both must come to the same, bit for bit."""
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    row, result = _timed(loop(job, ours, context.on_gpu), context)
    row |= {"implementation": ours, "bytes": job.moved_bytes}
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = job.moved_bytes / (row["us"] / 1e6) / bandwidth
    try:
        other, expected = _timed(loop(job, "xla", context.on_gpu), context)
    except Exception as error:
        return row | {"xla_us": None, "xla_reason": why_none(error)}
    if number := timing.differing(result, expected):
        raise ValueError(f"{number} bytes differ from XLA's result")
    row |= {"xla_us": other["us"], "xla_noise": other["noise"]}
    row["xla/ours"] = other["us"] / row["us"]
    if job.operation == "rotate_and_write" and context.on_gpu:
        other, expected = _timed(loop(job, APART, context.on_gpu), context)
        if number := timing.differing(result, expected):
            raise ValueError(f"{number} bytes differ from those that XLA rotates")
        row |= {"apart_us": other["us"], "apart/ours": other["us"] / row["us"]}
    return row


def _timed(loop: timing.Loop, context: Context) -> tuple[Row, list[np.ndarray]]:
    timed = timing.run([loop], timing.make(loop.operands, context), context)
    ((first, last),) = timed.results
    if number := timing.differing(first, last):
        raise ValueError(f"{number} bytes changed though all calls write the same")
    return timing.figures(timed.seconds[0]), first


def _jobs(on_gpu: bool) -> list[Job]:
    tokens = {"write_kv": (64, 8192), "rotate_and_write": (64, 8192), "copy_blocks": (16384,)}
    tokens |= {"gather_blocks": (32768,), "scatter_blocks": (32768,)}
    jobs = []
    for size in (64, 16):
        for operation, counts in tokens.items():
            for count in counts:
                writes = Job(operation, count, size).writes
                amount = count if writes else count // size
                jobs.append(Job(operation, amount if on_gpu else 3, size))
    if on_gpu:  # rotation is the same for all block sizes
        return [job for job in jobs if job.operation != "rotate_and_write" or job.block_size == 16]
    return [job for job in dict.fromkeys(jobs) if job.block_size == 16]


def _cases(context: Context) -> list[Case]:
    cases = []
    for job in _jobs(context.on_gpu):
        names = ["mosaic_gpu", "xla"] if context.on_gpu else ["xla"]
        if context.on_gpu and job.operation == "rotate_and_write":
            names.append(APART)
        loops = [loop(job, name, context.on_gpu) for name in names]
        every = [*(each.program for each in loops), *timing.drawn_by(loops[0].operands)]
        programs = functools.partial(timing.unique, tuple(every))
        cases.append(Case(job.name, functools.partial(run, job), programs=programs, run_s=1.5))
    return cases


_COLUMNS = ("us", "noise", "bandwidth_share", "xla/ours", "apart/ours")
STAGE = Stage("cache", 15, _cases, _COLUMNS)
