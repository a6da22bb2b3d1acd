"""Copy of blocks, one pair at a time: the oracle of every backend."""

import jax

from pallas_paged.kv_cache import KVCache


def copy_blocks(kv_cache: KVCache, src: jax.Array, dst: jax.Array) -> KVCache:
    """Returns the cache with the copies made; donates nothing. See `api.copy_blocks`."""
    copied = kv_cache
    for source, destination in zip(src, dst, strict=True):
        copied = KVCache(
            copied.k.at[destination].set(kv_cache.k[source]),
            copied.v.at[destination].set(kv_cache.v[source]),
        )
    return copied
