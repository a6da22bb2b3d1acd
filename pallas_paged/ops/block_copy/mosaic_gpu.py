"""Copy of blocks as one Mosaic GPU kernel over all pairs and arrays."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import NULL_BLOCK, KVCache
from pallas_paged.ops.mosaic_gpu import Ref, flat, move_block, num_pieces, unflat, unsupported_cache


def unsupported(kv_cache: KVCache) -> str | None:
    """Returns why the kernel cannot copy blocks of this cache here, or None if it can."""
    return unsupported_cache(kv_cache)


@functools.partial(jax.jit, donate_argnames="kv_cache")
def copy_blocks(kv_cache: KVCache, src: jax.Array, dst: jax.Array) -> KVCache:
    """Returns the cache with the copies made, in place. See `api.copy_blocks`.

    Pairs are copied in any order: that no destination is a source is part of the contract. The
    null block is never written.
    """
    if not len(src):
        return kv_cache
    arrays = flat(kv_cache)
    grid = (num_pieces(arrays[0]), len(src))  # the last axis alone may exceed 65,535
    refs = [jax.new_ref(array) for array in arrays]

    def copy_pair(src_ref: Ref, dst_ref: Ref, *refs: Ref) -> None:
        pair = jax.lax.axis_index("pair")
        source, destination = src_ref[pair], dst_ref[pair]

        @pl.when(destination != NULL_BLOCK)
        def _() -> None:
            for ref in refs:
                move_block(ref, source, ref, destination)

    plgpu.kernel(copy_pair, grid=grid, grid_names=("piece", "pair"))(src, dst, *refs)
    return unflat([jax.freeze(ref) for ref in refs], kv_cache)
