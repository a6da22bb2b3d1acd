"""Gather and scatter of blocks (swapping): one Mosaic GPU kernel each, for all arrays."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import NULL_BLOCK, KVCache
from pallas_paged.ops.mosaic_gpu import Ref, flat, move_block, num_pieces, unflat, unsupported_cache


def unsupported(kv_cache: KVCache) -> str | None:
    """Returns why the kernels cannot move blocks of this cache here, or None if they can."""
    return unsupported_cache(kv_cache)


@jax.jit
def gather_blocks(kv_cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Returns copies of the blocks. See `api.gather_blocks`."""
    num_blocks, arrays = len(block_ids), flat(kv_cache)
    shapes = [jax.ShapeDtypeStruct((num_blocks, a.shape[1]), a.dtype) for a in arrays]
    if not num_blocks:
        return unflat([jnp.zeros(shape.shape, shape.dtype) for shape in shapes], kv_cache)

    def gather_block(ids_ref: Ref, *refs: Ref) -> None:
        i = jax.lax.axis_index("block")
        for source, destination in zip(refs[: len(arrays)], refs[len(arrays) :], strict=True):
            move_block(source, ids_ref[i], destination, i)

    grid = (num_pieces(arrays[0]), num_blocks)  # the last axis alone may exceed 65,535
    kernel = plgpu.kernel(gather_block, out_type=shapes, grid=grid, grid_names=("piece", "block"))
    return unflat(kernel(block_ids, *arrays), kv_cache)


@functools.partial(jax.jit, donate_argnames="kv_cache")
def scatter_blocks(kv_cache: KVCache, block_ids: jax.Array, blocks: KVCache) -> KVCache:
    """Returns the cache with the blocks written, in place. See `api.scatter_blocks`.

    The null block is never written.
    """
    if not len(block_ids):
        return kv_cache
    destinations = [jax.new_ref(array) for array in flat(kv_cache)]
    sources = flat(blocks)

    def scatter_block(ids_ref: Ref, *refs: Ref) -> None:
        i = jax.lax.axis_index("block")
        block = ids_ref[i]

        @pl.when(block != NULL_BLOCK)
        def _() -> None:
            for source, destination in zip(refs[: len(sources)], refs[len(sources) :], strict=True):
                move_block(source, i, destination, block)

    grid = (num_pieces(sources[0]), len(block_ids))
    kernel = plgpu.kernel(scatter_block, grid=grid, grid_names=("piece", "block"))
    kernel(block_ids, *sources, *destinations)
    return unflat([jax.freeze(ref) for ref in destinations], kv_cache)
