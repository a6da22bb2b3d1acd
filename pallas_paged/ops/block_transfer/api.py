"""Copies of blocks out of the KV cache and back: the public functions and their checks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_paged.dispatch import Implementation, choose_implementation
from pallas_paged.kv_cache import KVCache, check_cache
from pallas_paged.ops.block_transfer import mosaic_gpu, reference, xla
from pallas_paged.ops.blocks import inside_or_null

_GATHER = {
    "mosaic_gpu": Implementation(mosaic_gpu.gather_blocks, mosaic_gpu.unsupported),
    "xla": Implementation(xla.gather_blocks),
    "reference": Implementation(reference.gather_blocks),
}
_SCATTER = {
    "mosaic_gpu": Implementation(mosaic_gpu.scatter_blocks, mosaic_gpu.unsupported),
    "xla": Implementation(xla.scatter_blocks),
    "reference": Implementation(reference.scatter_blocks),
}


def gather_blocks(
    kv_cache: KVCache,
    block_ids: Int32[Array, "P"],
    *,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> KVCache:
    """Returns copies of P blocks, `[P, ...]` of each of the cache's arrays, in the order of ids.

    Args:
      kv_cache: not modified.
      block_ids: i32[P], which may repeat; unused entries are 0 (the null block). An id that the
        cache does not have, below 0 or from N on, counts as 0: what its copy holds is unspecified.
      implementation: "mosaic_gpu" (NVIDIA GPUs), "xla" (any platform), "reference", or None
        to choose.
      promise_in_bounds: the caller's word that the cache has all of them, so that nothing looks:
        a launch less on a GPU. What happens if it is not true is undefined.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist or cannot do this here.
    """
    check_cache(kv_cache)
    _check_ids(block_ids)
    name = choose_implementation("gather_blocks", _GATHER, implementation, kv_cache)
    if not promise_in_bounds:
        block_ids = inside_or_null(block_ids, kv_cache.k.shape[0])
    return _GATHER[name].run(kv_cache, block_ids)


def scatter_blocks(
    kv_cache: KVCache,
    block_ids: Int32[Array, "P"],
    blocks: KVCache,
    *,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> KVCache:
    """Writes P blocks into the cache: block `block_ids[i]` becomes `blocks[i]`.

    Args:
      kv_cache: donated: it must not be used afterwards. Inside a caller's own `jax.jit` it is
        updated in place if the caller donates it there.
      block_ids: i32[P], all different, but for unused entries, which are 0 (the null block). An id
        that the cache does not have, below 0 or from N on, counts as 0: its block is dropped.
      blocks: what `gather_blocks` returned, `[P, Hk, S, D]` in the cache's dtype, and the scales
        if it is quantised.
      implementation: "mosaic_gpu" (NVIDIA GPUs), "xla" (any platform), "reference", or None
        to choose.
      promise_in_bounds: the caller's word that the cache has all of them, so that nothing looks:
        a launch less on a GPU. What happens if it is not true is undefined.

    Returns:
      The cache with the blocks written.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist or cannot do this here.
    """
    check_cache(kv_cache)
    _check_ids(block_ids)
    for field in KVCache._fields:
        _check_blocks(getattr(kv_cache, field), block_ids, getattr(blocks, field), field)
    name = choose_implementation("scatter_blocks", _SCATTER, implementation, kv_cache)
    if not promise_in_bounds:
        block_ids = inside_or_null(block_ids, kv_cache.k.shape[0])
    return _SCATTER[name].run(kv_cache, block_ids, blocks)


def _check_ids(block_ids: jax.Array) -> None:
    if block_ids.ndim != 1 or block_ids.dtype != jnp.int32:
        raise ValueError(f"block_ids is {block_ids.dtype}{list(block_ids.shape)}, must be int32[P]")


def _check_blocks(
    cache: jax.Array | None, block_ids: jax.Array, blocks: jax.Array | None, name: str
) -> None:
    if cache is None or blocks is None:
        if cache is not blocks:
            raise ValueError(
                f"blocks.{name} must be given if, and only if, the cache is quantised: blocks go "
                "back into a cache of the dtype that they were gathered from"
            )
        return
    expected = (*block_ids.shape, *cache.shape[1:])
    if blocks.shape != expected or blocks.dtype != cache.dtype:
        raise ValueError(
            f"blocks.{name} is {blocks.dtype}{list(blocks.shape)}, must be "
            f"{cache.dtype}{list(expected)} for {block_ids.shape[0]} blocks of this cache"
        )
