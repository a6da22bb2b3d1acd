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
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, why_none
from pallas_paged import AttentionMetadata, paged_attention

LAYERS = 4
"""Layers in one turn of the loop: what is computed once per step is shared by them."""
MAX_COPIES = 128


def paged(
    context: Context, shape: Shape, implementation: str, shuffled: bool = True
) -> timing.Loop:
    """Returns layers of `paged_attention`.

    Every layer attends over blocks of its own, of one pool that is larger than the L2 cache.
    """
    copies = timing.num_copies(shape.kv_bytes, MAX_COPIES) if context.on_gpu else 2
    layers = min(LAYERS, copies)
    copies = copies // layers * layers
    num_blocks = 1 + copies * shape.batch * shape.blocks_per_seq
    num_tokens = shape.batch * shape.queries

    def make() -> tuple[Any, ...]:
        ids = 1 + np.arange(num_blocks - 1, dtype=np.int32)
        if shuffled:
            np.random.default_rng(0).shuffle(ids)
        pool = num_blocks, shape.num_kv_heads, shape.block_size, HEAD_DIM
        return (
            timing.random(3, (num_tokens, shape.num_q_heads, HEAD_DIM)),
            timing.random(1, pool),
            timing.random(2, pool),
            jnp.asarray(ids.reshape(copies, shape.batch, shape.blocks_per_seq)),
            jnp.full(shape.batch, shape.context, jnp.int32),
            jnp.arange(shape.batch + 1, dtype=jnp.int32) * shape.queries,
        )

    def step(turn: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        tables, lens, starts = rest
        unread = jnp.zeros(num_tokens, jnp.int32)
        for layer in range(layers):
            metadata = AttentionMetadata(
                positions=unread,
                slot_mapping=unread,
                block_tables=tables[(turn * layers + layer) % copies],
                seq_lens=lens,
                query_start_loc=starts,
                max_query_len=shape.queries,
            )
            q = paged_attention(q, k, v, metadata, implementation=implementation)
        return q

    return timing.Loop(step, make, *peers.length(context, shape, layers), calls=layers)


def run(shape: Shape, context: Context) -> Row:
    """Times a shape in every way there is; only our own failure is the case's."""
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    loops: dict[str, Callable[[], timing.Loop]] = {
        "ours": functools.partial(paged, context, shape, ours),
        "in_order": functools.partial(paged, context, shape, ours, shuffled=False),
        "dense": functools.partial(peers.dense, context, shape),
        "xla": functools.partial(paged, context, shape, "xla"),
    }
    if shape.queries == 1:
        loops["jax_paged"] = functools.partial(peers.jax_paged, context, shape, 16)
        loops["jax_paged_few_splits"] = functools.partial(peers.jax_paged, context, shape, 4)
    results = timing.microseconds(loops, same_program={"in_order": "ours"})
    us = results.pop("ours")
    if isinstance(us, Exception):
        raise us
    row: Row = {"us": us, "implementation": ours}
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = shape.moved_bytes / (us / 1e6) / bandwidth
    if context.on_gpu and (rate := context.ceiling("matmul rate")):
        row["matmul_share"] = shape.operations / (us / 1e6) / rate
    for name, other in results.items():
        if isinstance(other, Exception):
            row |= {f"{name}_us": None, f"{name}_reason": why_none(other)}
        else:
            row |= {f"{name}_us": other, f"{name}/ours": other / us}
    return row


def why_not(context: Context, shape: Shape) -> str | None:
    """Returns why a shape is not timed at all."""
    if shape.batch * shape.queries > MAX_STEP_TOKENS:
        return f"{shape.batch * shape.queries} tokens in one step, more than {MAX_STEP_TOKENS}"
    limit = jax.devices()[0].memory_stats() if context.on_gpu else None
    needed = shape.kv_bytes * 1.02 + 8 * (shape.moved_bytes - shape.kv_bytes)
    if limit is not None and needed > limit["bytes_limit"]:
        return f"{needed / 2**30:.0f} GiB needed, {limit['bytes_limit'] / 2**30:.0f} GiB there"
    return None


def _cases(shapes: list[Shape], toys: list[Shape], context: Context) -> list[Case]:
    return [
        Case(shape.name, functools.partial(run, shape), functools.partial(why_not, context, shape))
        for shape in (shapes if context.on_gpu else toys)
    ]


_RATIOS = ("in_order/ours", "dense/ours", "xla/ours")
DECODE = Stage(
    "decode",
    160,
    60,
    functools.partial(_cases, decode_shapes(), [Shape(2, 40, "4/2", 16)]),
    ("us", "bandwidth_share", *_RATIOS, "jax_paged/ours", "jax_paged_few_splits/ours"),
)
PREFILL = Stage(
    "prefill",
    75,
    60,
    functools.partial(_cases, prefill_shapes(), [Shape(2, 32, "4/2", 16, 32)]),
    ("us", "matmul_share", *_RATIOS),
)
