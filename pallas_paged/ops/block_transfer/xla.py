"""Copies of blocks out of the KV cache and back as gathers and scatters, for any platform."""

import functools

import jax

from pallas_paged.kv_cache import KVCache


@jax.jit
def gather_blocks(kv_cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Returns copies of the blocks. See `api.gather_blocks`."""
    return KVCache(kv_cache.k[block_ids], kv_cache.v[block_ids])


@functools.partial(jax.jit, donate_argnames="kv_cache")
def scatter_blocks(kv_cache: KVCache, block_ids: jax.Array, blocks: KVCache) -> KVCache:
    """Returns the cache with the blocks written, in place. See `api.scatter_blocks`."""
    return KVCache(kv_cache.k.at[block_ids].set(blocks.k), kv_cache.v.at[block_ids].set(blocks.v))
