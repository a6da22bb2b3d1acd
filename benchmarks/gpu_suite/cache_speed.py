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
from pallas_paged import KVCache, copy_blocks, gather_blocks, scatter_blocks, write_kv

NUM_KV_HEADS = 8


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
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        tokens = self.amount * (1 if self.operation == "write_kv" else self.block_size)
        return 2 * 2 * tokens * NUM_KV_HEADS * HEAD_DIM * DTYPE_BYTES


def _work(job: Job, implementation: str) -> Callable[..., Any]:
    """Returns the work of one turn: state is the cache, or what was gathered from it."""

    def work(turn: jax.Array, state: Any, ids: jax.Array, *operands: Any) -> Any:
        now = ids[turn % len(ids)]
        if job.operation == "write_kv":
            k, v = operands
            return write_kv(k, v, state, now, implementation=implementation)
        if job.operation == "copy_blocks":
            src, dst = jnp.split(now, 2)
            return copy_blocks(state, src, dst, implementation=implementation)
        if job.operation == "gather_blocks":
            return gather_blocks(operands[0], now, implementation=implementation)
        return scatter_blocks(state, now, operands[0], implementation=implementation)

    return work


def loop(context: Context, job: Job, implementation: str) -> timing.Loop:
    """Returns calls that take turns over a pool larger than the L2 cache, updated in place."""
    size, is_write = job.block_size, job.operation == "write_kv"
    per_turn = job.amount * (2 if job.operation == "copy_blocks" else 1)
    rotate = timing.num_copies(job.moved_bytes, 256) if context.on_gpu else 2
    block_bytes = 2 * NUM_KV_HEADS * size * HEAD_DIM * DTYPE_BYTES
    needed = rotate * per_turn // (size if is_write else 1)
    num_blocks = 1 + max(needed, timing.num_copies(block_bytes, 1 << 30) if context.on_gpu else 9)
    pool = num_blocks, NUM_KV_HEADS, size, HEAD_DIM
    places = np.random.default_rng(0).permutation((num_blocks - 1) * (size if is_write else 1))
    places = (size if is_write else 1) + places[: rotate * per_turn].reshape(rotate, per_turn)

    def make() -> tuple[Any, ...]:
        cache = KVCache(timing.random(0, pool), timing.random(1, pool))
        ids = jnp.asarray(places, jnp.int32)
        if job.operation == "copy_blocks":
            return cache, ids
        rows = (job.amount, NUM_KV_HEADS, HEAD_DIM) if is_write else (job.amount, *pool[1:])
        new = timing.random(2, rows), timing.random(3, rows)
        if is_write:
            return cache, ids, *new
        blocks = KVCache(*new)
        is_gather = job.operation == "gather_blocks"
        return (blocks, ids, cache) if is_gather else (cache, ids, blocks)

    bandwidth = context.ceiling("copy bandwidth") or 3e12
    turns = timing.num_turns(max(job.moved_bytes / bandwidth, 4e-6)) if context.on_gpu else 2
    work = _work(job, implementation)
    return timing.Loop(work, make, turns, 5 if context.on_gpu else 1)


def run(job: Job, context: Context) -> Row:
    """Times our kernel, and XLA's way beside it."""
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    results = timing.microseconds(
        {
            "ours": functools.partial(loop, context, job, ours),
            "xla": functools.partial(loop, context, job, "xla"),
        }
    )
    us, other = results["ours"], results["xla"]
    if isinstance(us, Exception):
        raise us
    row: Row = {"us": us, "implementation": ours, "bytes": job.moved_bytes}
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = job.moved_bytes / (us / 1e6) / bandwidth
    if isinstance(other, Exception):
        return row | {"xla_us": None, "xla_reason": why_none(other)}
    return row | {"xla_us": other, "xla/ours": other / us}


def _cases(context: Context) -> list[Case]:
    counts = {
        "write_kv": (64, 8192),
        "copy_blocks": (64, 1024),
        "gather_blocks": (256, 2048),
        "scatter_blocks": (256, 2048),
    }
    jobs = [
        Job(operation, count if context.on_gpu else 3, size)
        for size in (16, 64)
        for operation, both in counts.items()
        for count in (both if context.on_gpu else both[:1])
    ]
    return [Case(job.name, functools.partial(run, job)) for job in jobs]


STAGE = Stage("cache", 45, 30, _cases, ("us", "bandwidth_share", "xla/ours"))
