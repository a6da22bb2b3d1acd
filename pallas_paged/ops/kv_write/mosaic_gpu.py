"""Write of keys and values as one Mosaic GPU kernel: a thread block per token.

The cast or quantisation happens in registers, with each KV head's row in one warp, so that a row's
largest magnitude is a few shuffles away.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.dispatch import unsupported_target
from pallas_paged.kv_cache import NULL_BLOCK, KVCache
from pallas_paged.ops.mosaic_gpu import Ref, layout_of_rows, load, store, unsupported_cast
from pallas_paged.quantisation import is_quantised, quantise


def unsupported(k: jax.Array | jax.ShapeDtypeStruct, kv_cache: KVCache) -> str | None:
    """Returns why the kernel cannot write such keys into this cache here, or None if it can."""
    num_kv_heads, head_dim = k.shape[1:]
    is_strided = num_kv_heads * head_dim % 128 == 0 and not is_quantised(kv_cache.k.dtype)
    if head_dim % 32 and not is_strided:
        return f"head_dim={head_dim} of {kv_cache.k.dtype} is not a multiple of 32"
    reason = unsupported_target()
    return unsupported_cast(kv_cache.k.dtype) if reason is None else reason


@functools.partial(jax.jit, donate_argnames="kv_cache")
def write_kv(k: jax.Array, v: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array) -> KVCache:
    """Returns the cache with k and v written, in place. See `api.write_kv`.

    The null block is never written.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return kv_cache
    block_size, dtype = kv_cache.block_size, kv_cache.k.dtype

    def write_heads(row: Ref, cache: Ref, scales: Ref | None, layout: Any) -> None:
        """Writes the rows of some heads into those heads' slots."""
        x = load(row, layout)
        if scales is None:
            # By way of float32: not every pair of dtypes has a cast of its own.
            store(cache, x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype))
        else:
            stored, scale = quantise(x, dtype)
            store(cache, stored)
            store(scales, scale)

    def write_token(k_ref: Ref, v_ref: Ref, slots: Ref, *refs: Ref) -> None:
        token = jax.lax.axis_index("token")
        block, offset = slots[token] // block_size, slots[token] % block_size
        k_cache, v_cache, *scales = refs
        parts = zip((k_ref, v_ref), (k_cache, v_cache), scales or (None, None), strict=True)

        @pl.when(block != NULL_BLOCK)
        def _() -> None:
            for x, cache, scale in parts:
                write_one(x.at[token], cache, scale, block, offset)

    def write_one(
        x: Ref, cache: Ref, scale: Ref | None, block: jax.Array, offset: jax.Array
    ) -> None:
        if head_dim % 32:
            write_heads(x, cache.at[block, :, offset], None, None)
        elif num_kv_heads % 4 == 0:
            scales = None if scale is None else scale.at[block, :, offset]
            layout = layout_of_rows(num_kv_heads, head_dim)
            write_heads(x, cache.at[block, :, offset], scales, layout)
        else:

            @pl.loop(0, num_kv_heads)
            def _(head: jax.Array) -> None:
                scales = None if scale is None else scale.at[block, head, offset]
                layout = layout_of_rows(1, head_dim)
                write_heads(x.at[head], cache.at[block, head, offset], scales, layout)

    refs = jax.tree.map(jax.new_ref, kv_cache)
    kernel = plgpu.kernel(write_token, grid=(num_tokens,), grid_names=("token",))
    kernel(k, v, slot_mapping, *jax.tree.leaves(refs))
    return jax.tree.map(jax.freeze, refs)
