"""Other ways to attend, on the same sizes: JAX's deprecated paged attention, dense attention."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.shapes import HEAD_DIM, Shape
from benchmarks.gpu_suite.stage import Context

Length = Callable[[Context, Shape, int], tuple[int, int]]
MAX_DENSE_LAYERS = 16


def jax_paged_us(context: Context, shape: Shape, length: Length) -> float:
    """Returns the microseconds of `jax.experimental.pallas.ops.gpu.paged_attention`, decode only.

    The better of two splits of the sequences; block tables are shuffled.
    """
    if not context.on_gpu:
        raise NotImplementedError("Triton needs a GPU")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    copies = timing.num_copies(shape.kv_bytes, 128)
    num_pages = copies * shape.batch * shape.blocks_per_seq
    ids = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = jnp.asarray(ids.reshape(copies, shape.batch, shape.blocks_per_seq))
    pool = shape.num_kv_heads, num_pages, shape.block_size, HEAD_DIM
    k, v = timing.random(1, pool), timing.random(2, pool)
    q = timing.random(3, (shape.batch, shape.num_q_heads, HEAD_DIM))
    lens = jnp.full(shape.batch, shape.context, jnp.int32)

    def step(splits: int) -> Callable[..., Any]:
        pages = math.gcd(shape.blocks_per_seq // splits, max(1, 128 // shape.block_size))

        def attend(turn: jax.Array, q: jax.Array, *operands: jax.Array) -> jax.Array:
            k, v, tables, lens = operands
            return paged_attention(
                q,
                k,
                v,
                tables[turn % copies],
                lens,
                k_splits=splits,
                pages_per_compute_block=pages,
            )

        return attend

    turns, repeats = length(context, shape, 1)
    chosen = {math.gcd(shape.blocks_per_seq, most) for most in (16, 4)}
    return 1e6 * min(
        timing.seconds_per_turn(step(splits), q, k, v, tables, lens, turns=turns, repeats=repeats)
        for splits in chosen
    )


def dense_us(context: Context, shape: Shape, length: Length) -> float:
    """Returns the microseconds of `jax.nn.dot_product_attention` over contiguous keys and values.

    cuDNN's on a GPU. Up to 16 layers with keys and values of their own take turns; where all of
    them fit the L2 cache, they stay in it, which is to their advantage.
    """
    if 1 < shape.queries < shape.context:
        raise NotImplementedError("its causal mask has no offset, so a chunk needs a whole mask")
    copies = timing.num_copies(shape.kv_bytes, MAX_DENSE_LAYERS)
    dims = shape.batch, shape.context, shape.num_kv_heads, HEAD_DIM
    layers = [(timing.random(2 * i, dims), timing.random(2 * i + 1, dims)) for i in range(copies)]
    q = timing.random(99, (shape.batch, shape.queries, shape.num_q_heads, HEAD_DIM))

    def step(turn: jax.Array, q: jax.Array, layers: Any) -> jax.Array:
        del turn
        for k, v in layers:
            q = jax.nn.dot_product_attention(
                q,
                k,
                v,
                is_causal=shape.queries > 1,
                implementation="cudnn" if context.on_gpu else "xla",
            )
        return q

    turns, repeats = length(context, shape, copies)
    seconds = timing.seconds_per_turn(step, q, layers, turns=turns, repeats=repeats)
    return 1e6 * seconds / copies
