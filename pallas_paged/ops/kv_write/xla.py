"""Write of keys and values as one scatter per array, for any platform."""

import functools

import jax

from pallas_paged.kv_cache import KVCache, StaticScales, to_stored
from pallas_paged.ops.blocks import put


@functools.partial(jax.jit, donate_argnames="kv_cache")
def write_kv(
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    slot_mapping: jax.Array,
    static_scales: StaticScales | None,
) -> KVCache:
    """Returns the cache with k and v written, in place. See `api.write_kv`."""
    block, offset = slot_mapping // kv_cache.block_size, slot_mapping % kv_cache.block_size
    return jax.tree.map(
        lambda array, new: put(array, (block, slice(None), offset), new),
        kv_cache,
        to_stored(k, v, kv_cache, static_scales),
    )
