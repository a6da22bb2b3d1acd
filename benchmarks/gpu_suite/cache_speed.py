"""How fast keys and values are written, and blocks copied, gathered and scattered."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.attention_speed import timed
from benchmarks.gpu_suite.shapes import DTYPE_BYTES, HEAD_DIM
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage
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


def _work(job: Job, implementation: str, ids: jax.Array) -> Callable[..., Any]:
    """Returns the work of one turn: state is the cache, or what was gathered from it."""
    many = len(ids)

    def work(turn: jax.Array, state: Any, *operands: Any) -> Any:
        now = ids[turn % many]
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


def job_us(context: Context, job: Job, implementation: str) -> float:
    """Returns the microseconds of one call, the cache updated in place inside a loop."""
    per_turn = job.amount * (2 if job.operation == "copy_blocks" else 1)
    size = job.block_size
    needed = -(-job.amount // size) if job.operation == "write_kv" else per_turn
    rotate = timing.num_copies(job.moved_bytes, 32)
    num_blocks = 1 + max(needed * rotate, 64)
    cache_shape = num_blocks, NUM_KV_HEADS, size, HEAD_DIM
    rng = np.random.default_rng(0)
    if job.operation == "write_kv":
        places = size + rng.permutation((num_blocks - 1) * size)
    else:
        places = 1 + rng.permutation(num_blocks - 1)
    ids = jnp.asarray(places[: rotate * per_turn].reshape(rotate, per_turn), jnp.int32)
    cache = KVCache(timing.random(0, cache_shape), timing.random(1, cache_shape))
    state: Any = cache
    operands: tuple[Any, ...] = ()
    if job.operation == "write_kv":
        rows = job.amount, NUM_KV_HEADS, HEAD_DIM
        operands = timing.random(2, rows), timing.random(3, rows)
    elif job.operation != "copy_blocks":
        blocks = KVCache(*(x[: job.amount] for x in cache[:2]))
        is_gather = job.operation == "gather_blocks"
        state, operands = (blocks, (cache,)) if is_gather else (cache, (blocks,))
    bandwidth = context.ceiling("copy bandwidth") or 3e12
    turns = timing.num_turns(max(job.moved_bytes / bandwidth, 4e-6)) if context.on_gpu else 2
    repeats = 5 if context.on_gpu else 1
    work = _work(job, implementation, ids)
    return 1e6 * timing.seconds_per_turn(work, state, *operands, turns=turns, repeats=repeats)


def run(job: Job, context: Context) -> Row:
    """Times our kernel, and XLA's way beside it."""
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    us = job_us(context, job, ours)
    row: Row = {"us": us, "implementation": ours, "bytes": job.moved_bytes}
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = job.moved_bytes / (us / 1e6) / bandwidth
    other, reason = timed(functools.partial(job_us, context, job, "xla"))
    row |= {"xla_us": other, "xla/ours": other / us if other else None}
    return row if reason is None else row | {"xla_reason": reason[:300]}


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
