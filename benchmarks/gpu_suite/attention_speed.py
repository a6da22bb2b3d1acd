"""How fast decode and prefill are, beside the device's ceilings and other ways to attend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import peers, timing
from benchmarks.gpu_suite.shapes import (
    HEAD_DIM,
    MAX_STEP_TOKENS,
    Shape,
    decode_shapes,
    prefill_shapes,
)
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, failure
from pallas_paged import AttentionMetadata, paged_attention

LAYERS = 4
"""Layers in one turn of the loop: what is computed once per step is shared by them."""
MAX_COPIES = 128
GUESS_BYTES_PER_S, GUESS_FLOPS = 3e12, 5e14
"""Only to choose how long to time."""


def paged_us(context: Context, shape: Shape, implementation: str, shuffled: bool = True) -> float:
    """Returns the microseconds per layer of `paged_attention`.

    Every layer attends over blocks of its own, of one pool that is larger than the L2 cache.
    """
    copies = timing.num_copies(shape.kv_bytes, MAX_COPIES)
    layers = LAYERS if copies >= LAYERS else copies
    copies = copies // layers * layers
    num_blocks = 1 + copies * shape.batch * shape.blocks_per_seq
    ids = 1 + np.arange(num_blocks - 1, dtype=np.int32)
    if shuffled:
        np.random.default_rng(0).shuffle(ids)
    tables = jnp.asarray(ids.reshape(copies, shape.batch, shape.blocks_per_seq))
    pool = num_blocks, shape.num_kv_heads, shape.block_size, HEAD_DIM
    k, v = timing.random(1, pool), timing.random(2, pool)
    num_tokens = shape.batch * shape.queries
    q = timing.random(3, (num_tokens, shape.num_q_heads, HEAD_DIM))
    lens = jnp.full(shape.batch, shape.context, jnp.int32)
    starts = jnp.arange(shape.batch + 1, dtype=jnp.int32) * shape.queries
    zeros = jnp.zeros(num_tokens, jnp.int32)  # neither positions nor slots are read

    def step(turn: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        tables, lens, starts = rest
        for layer in range(layers):
            metadata = AttentionMetadata(
                positions=zeros,
                slot_mapping=zeros,
                block_tables=tables[(turn * layers + layer) % copies],
                seq_lens=lens,
                query_start_loc=starts,
                max_query_len=shape.queries,
            )
            q = paged_attention(q, k, v, metadata, implementation=implementation)
        return q

    turns, repeats = length(context, shape, layers)
    operands = (k, v, tables, lens, starts)
    return 1e6 * timing.seconds_per_turn(step, q, *operands, turns=turns, repeats=repeats) / layers


def length(context: Context, shape: Shape, layers: int) -> tuple[int, int]:
    """Returns turns and repeats for a layer of this shape."""
    if not context.on_gpu:
        return 2, 1
    guess = max(shape.moved_bytes / GUESS_BYTES_PER_S, shape.operations / GUESS_FLOPS, 5e-6)
    return timing.num_turns(guess * layers), 5


def timed(measure: Callable[[], float]) -> tuple[float | None, str | None]:
    """Returns microseconds, or why there are none."""
    try:
        return measure(), None
    except NotImplementedError as error:
        return None, f"unsupported: {error}"
    except Exception as error:
        return None, failure(error)["reason"]


def run(shape: Shape, context: Context) -> Row:
    """Times a shape in every way there is; only our kernel's failure is the case's."""
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    us = paged_us(context, shape, ours)
    seconds = us / 1e6
    row: Row = {"us": us, "implementation": ours}
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = shape.moved_bytes / seconds / bandwidth
    if context.on_gpu and (rate := context.ceiling("matmul rate")):
        row["matmul_share"] = shape.operations / seconds / rate
    others: dict[str, Callable[[], float]] = {
        "in_order": functools.partial(paged_us, context, shape, ours, shuffled=False),
        "dense": functools.partial(peers.dense_us, context, shape, length),
        "xla": functools.partial(paged_us, context, shape, "xla"),
    }
    if shape.queries == 1:
        others["jax_paged"] = functools.partial(peers.jax_paged_us, context, shape, length)
    for name, measure in others.items():
        other, reason = timed(measure)
        row |= {f"{name}_us": other, f"{name}/ours": other / us if other else None}
        if reason is not None:
            row[f"{name}_reason"] = reason[:300]
    return row


def why_not(context: Context, shape: Shape) -> str | None:
    """Returns why a shape is not timed at all."""
    if shape.batch * shape.queries > MAX_STEP_TOKENS:
        return f"{shape.batch * shape.queries} tokens in one step, more than {MAX_STEP_TOKENS}"
    limit = jax.devices()[0].memory_stats() if context.on_gpu else None
    needed = shape.kv_bytes * 1.02 + 8 * shape.moved_bytes - 8 * shape.kv_bytes
    if limit is not None and needed > limit["bytes_limit"]:
        return f"{needed / 2**30:.0f} GiB needed, {limit['bytes_limit'] / 2**30:.0f} GiB there"
    return None


def _cases(shapes: list[Shape], toys: list[Shape], context: Context) -> list[Case]:
    return [
        Case(shape.name, functools.partial(run, shape), why_not(context, shape))
        for shape in (shapes if context.on_gpu else toys)
    ]


_TOYS = [Shape(2, 40, "4/2", 16), Shape(1, 64, "2/2", 32)]
_RATIOS = ("in_order/ours", "dense/ours", "xla/ours")
DECODE = Stage(
    "decode",
    170,
    60,
    functools.partial(_cases, decode_shapes(), _TOYS),
    ("us", "bandwidth_share", *_RATIOS, "jax_paged/ours"),
)
PREFILL = Stage(
    "prefill",
    80,
    60,
    functools.partial(_cases, prefill_shapes(), [Shape(2, 32, "4/2", 16, 32)]),
    ("us", "matmul_share", *_RATIOS),
)
