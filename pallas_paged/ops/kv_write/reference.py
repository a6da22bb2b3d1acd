"""Write of keys and values, one token at a time: the oracle of every backend."""

import jax

from pallas_paged.kv_cache import KVCache, StaticScales, to_stored


def write_kv(
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    slot_mapping: jax.Array,
    static_scales: StaticScales | None,
) -> KVCache:
    """Returns the cache with k and v written; donates nothing. See `api.write_kv`."""
    for token in range(slot_mapping.shape[0]):
        block, offset = divmod(slot_mapping[token], kv_cache.block_size)
        kv_cache = jax.tree.map(
            lambda array, new: array.at[block, :, offset].set(new),  # noqa: B023
            kv_cache,
            to_stored(k[token], v[token], kv_cache, static_scales),
        )
    return kv_cache
