"""Write of keys and values, one token at a time: the oracle of every backend."""

import jax

from pallas_paged.kv_cache import KVCache


def write_kv(k: jax.Array, v: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array) -> KVCache:
    """Returns the cache with k and v written; donates nothing. See `api.write_kv`."""
    for token in range(slot_mapping.shape[0]):
        block, offset = divmod(slot_mapping[token], kv_cache.block_size)
        kv_cache = KVCache(
            kv_cache.k.at[block, :, offset].set(k[token].astype(kv_cache.k.dtype)),
            kv_cache.v.at[block, :, offset].set(v[token].astype(kv_cache.v.dtype)),
        )
    return kv_cache
