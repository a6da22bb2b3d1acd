"""Write of keys and values as one scatter per array, for any platform."""

import functools

import jax

from pallas_paged.kv_cache import KVCache


@functools.partial(jax.jit, donate_argnames="kv_cache")
def write_kv(k: jax.Array, v: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array) -> KVCache:
    """Returns the cache with k and v written, in place. See `api.write_kv`."""
    block, offset = slot_mapping // kv_cache.block_size, slot_mapping % kv_cache.block_size
    return KVCache(
        kv_cache.k.at[block, :, offset].set(k.astype(kv_cache.k.dtype)),
        kv_cache.v.at[block, :, offset].set(v.astype(kv_cache.v.dtype)),
    )
