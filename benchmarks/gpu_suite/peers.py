"""Other ways to attend, on the same sizes: JAX's deprecated paged attention, dense attention."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.shapes import HEAD_DIM, Shape
from benchmarks.gpu_suite.stage import Context

MAX_DENSE_LAYERS = 16
GUESS_BYTES_PER_S, GUESS_FLOPS, GUESS_LAUNCH_S = 3e12, 5e14, 5e-6
"""Only to choose how long to time."""


def length(context: Context, shape: Shape, layers: int) -> tuple[int, int]:
    """Returns turns and repeats of a loop with so many layers of this shape in a turn."""
    if not context.on_gpu:
        return 2, 1
    moving, computing = shape.moved_bytes / GUESS_BYTES_PER_S, shape.operations / GUESS_FLOPS
    return timing.num_turns(max(moving, computing, GUESS_LAUNCH_S) * layers), 5


def jax_paged(context: Context, shape: Shape, most_splits: int) -> timing.Loop:
    """Returns `jax.experimental.pallas.ops.gpu.paged_attention` over shuffled pages; decode only.

    `most_splits` is the most pieces that a sequence is split into.
    """
    if not context.on_gpu:
        raise NotImplementedError("Triton needs a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    copies = timing.num_copies(shape.kv_bytes, 128)
    num_pages = copies * shape.batch * shape.blocks_per_seq
    splits = math.gcd(shape.blocks_per_seq, most_splits)
    pages = math.gcd(shape.blocks_per_seq // splits, max(1, 128 // shape.block_size))

    def make() -> tuple[Any, ...]:
        ids = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        pool = shape.num_kv_heads, num_pages, shape.block_size, HEAD_DIM
        return (
            timing.random(3, (shape.batch, shape.num_q_heads, HEAD_DIM)),
            timing.random(1, pool),
            timing.random(2, pool),
            jnp.asarray(ids.reshape(copies, shape.batch, shape.blocks_per_seq)),
            jnp.full(shape.batch, shape.context, jnp.int32),
        )

    def step(turn: jax.Array, q: jax.Array, *operands: jax.Array) -> jax.Array:
        k, v, tables, lens = operands
        now = tables[turn % copies]
        return paged_attention(q, k, v, now, lens, k_splits=splits, pages_per_compute_block=pages)

    return timing.Loop(step, make, *length(context, shape, 1))


def dense(context: Context, shape: Shape) -> timing.Loop:
    """Returns layers of `jax.nn.dot_product_attention` over contiguous keys and values.

    cuDNN's on a GPU. Up to 16 layers with keys and values of their own take turns; where all of
    them fit the L2 cache, they stay in it, which is to their advantage.
    """
    if 1 < shape.queries < shape.context:
        raise NotImplementedError("its causal mask has no offset, so a chunk needs a whole mask")
    copies = timing.num_copies(shape.kv_bytes, MAX_DENSE_LAYERS) if context.on_gpu else 2

    def make() -> tuple[Any, ...]:
        kv = shape.batch, shape.context, shape.num_kv_heads, HEAD_DIM
        layers = [(timing.random(2 * i, kv), timing.random(2 * i + 1, kv)) for i in range(copies)]
        q = timing.random(99, (shape.batch, shape.queries, shape.num_q_heads, HEAD_DIM))
        return q, layers

    def step(turn: jax.Array, q: jax.Array, layers: Any) -> jax.Array:
        del turn
        attend = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=shape.queries > 1,
            implementation="cudnn" if context.on_gpu else "xla",
        )
        with jax.numpy_dtype_promotion("standard"):  # it relies on implicit promotion
            for k, v in layers:
                q = attend(q, k, v)
        return q

    return timing.Loop(step, make, *length(context, shape, copies), calls=copies)
