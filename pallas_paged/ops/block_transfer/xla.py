"""Copies of blocks out of the KV cache and back as gathers and scatters, for any platform."""

import functools

import jax

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.blocks import put, take


@jax.jit
def gather_blocks(kv_cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Returns copies of the blocks. See `api.gather_blocks`."""
    return jax.tree.map(lambda array: take(array, block_ids), kv_cache)


@functools.partial(jax.jit, donate_argnames="kv_cache")
def scatter_blocks(kv_cache: KVCache, block_ids: jax.Array, blocks: KVCache) -> KVCache:
    """Returns the cache with the blocks written, in place. See `api.scatter_blocks`."""
    return jax.tree.map(lambda array, values: put(array, block_ids, values), kv_cache, blocks)
