"""Other ways to attend, on the same sizes: JAX's deprecated paged attention, dense attention."""

import functools
import math
import warnings
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.layers import Layers, num_caches, rotations
from benchmarks.gpu_suite.shapes import HEAD_DIM, Shape
from pallas_paged import KVCache


def jax_paged(shape: Shape, on_gpu: bool, most_splits: int) -> Layers:
    """Returns `jax.experimental.pallas.ops.gpu.paged_attention` over shuffled pages; decode only.

    `most_splits` is the most pieces that a sequence is split into.
    """
    if not on_gpu:
        raise NotImplementedError("Triton needs a GPU")
    rotated = rotations(shape, on_gpu)
    turns_of = max(2, rotated)
    num_pages = rotated * shape.batch * shape.blocks_per_seq
    splits = math.gcd(shape.blocks_per_seq, most_splits)
    pages = math.gcd(shape.blocks_per_seq // splits, max(1, 128 // shape.block_size))
    pool = shape.num_kv_heads, num_pages, shape.block_size, HEAD_DIM
    caches = [
        timing.normal_cache(2 * i, pool, shape.value_scale)
        for i in range(num_caches(shape, on_gpu))
    ]
    rows = shape.batch, shape.num_q_heads, HEAD_DIM
    tables = turns_of, shape.batch, shape.blocks_per_seq
    host = {
        "tables": timing.block_tables(tables, rotated, first=0),
        "lens": timing.Host(functools.partial(np.full, tables[:2], shape.context), tables[:2]),
    }

    def begin(turn: jax.Array, previous: jax.Array, queries: jax.Array, host: Any) -> Any:
        now = turn % turns_of
        step = host["tables"][now], host["lens"][now]
        return timing.next_input(queries[now], previous), step

    def attend(q: jax.Array, cache: KVCache, step: Any) -> jax.Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        return paged_attention(
            q, cache.k, cache.v, *step, k_splits=splits, pages_per_compute_block=pages
        )

    operands = timing.zeros(rows), caches, timing.Normal(99, (turns_of, *rows)), host
    name = f"JAX's paged attention {shape.name}, {splits} splits"
    return Layers.of(name, shape, on_gpu, begin, attend, operands)


def dense(shape: Shape, on_gpu: bool) -> Layers:
    """Returns layers of `jax.nn.dot_product_attention` over contiguous keys and values.

    cuDNN's on a GPU. Each layer has keys and values of its own, the same ones in every turn; where
    those of all fit the L2 cache, they stay in it, which is to their advantage.
    """
    if 1 < shape.queries < shape.context:
        raise NotImplementedError("its causal mask has no offset, so a chunk needs a whole mask")
    kv = shape.batch, shape.context, shape.num_kv_heads, HEAD_DIM
    caches = [
        timing.normal_cache(2 * i, kv, shape.value_scale) for i in range(num_caches(shape, on_gpu))
    ]
    rows = shape.batch, shape.queries, shape.num_q_heads, HEAD_DIM

    def begin(turn: jax.Array, previous: jax.Array, queries: jax.Array) -> Any:
        return timing.next_input(queries[turn % 2], previous), None

    def attend(q: jax.Array, cache: KVCache, step: None) -> jax.Array:
        del step
        with jax.numpy_dtype_promotion("standard"):  # it relies on implicit promotion
            return jax.nn.dot_product_attention(
                q,
                cache.k,
                cache.v,
                is_causal=shape.queries > 1,
                implementation="cudnn" if on_gpu else "xla",
            )

    operands = timing.zeros(rows), caches, timing.Normal(99, (2, *rows))
    name = f"dense attention {shape.name}, {'cudnn' if on_gpu else 'xla'}"
    return Layers.of(name, shape, on_gpu, begin, attend, operands)
