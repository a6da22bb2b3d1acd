"""Copies of blocks out of the KV cache and back, one at a time: the oracle of every backend."""

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import KVCache


def gather_blocks(kv_cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Returns copies of the blocks. See `api.gather_blocks`."""
    return jax.tree.map(lambda array: jnp.stack([array[block] for block in block_ids]), kv_cache)


def scatter_blocks(kv_cache: KVCache, block_ids: jax.Array, blocks: KVCache) -> KVCache:
    """Returns the cache with the blocks written; donates nothing. See `api.scatter_blocks`."""
    for i, block in enumerate(block_ids):
        kv_cache = jax.tree.map(
            lambda array, values: array.at[block].set(values[i]),  # noqa: B023
            kv_cache,
            blocks,
        )
    return kv_cache
