"""Copy of blocks inside the KV cache (copy on write): the public function and its checks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_paged._namespaces import inside
from pallas_paged.dispatch import Implementation, choose_implementation
from pallas_paged.kv_cache import NULL_BLOCK, KVCache, check_cache
from pallas_paged.ops.block_copy import mosaic_gpu, reference, xla

_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.copy_blocks, mosaic_gpu.unsupported),
    "xla": Implementation(xla.copy_blocks),
    "reference": Implementation(reference.copy_blocks),
}


def copy_blocks(
    kv_cache: KVCache,
    src: Int32[Array, "P"],
    dst: Int32[Array, "P"],
    *,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> KVCache:
    """Copies P blocks of keys and values: block `dst[i]` becomes `src[i]`'s content.

    Unused pairs are (0, 0), the null block onto itself, and so is every pair with a block that the
    cache does not have, below 0 or from N on: nothing is copied. Apart from them the destinations
    differ from each other and from all sources, as free blocks differ from shared ones; what a
    block that is both holds afterwards is unspecified.

    Args:
      kv_cache: with its scales, if it is quantised. Donated: it must not be used afterwards. Inside
        a caller's own `jax.jit` it is updated in place if the caller donates it there.
      src: i32[P], blocks to read.
      dst: i32[P], blocks to overwrite.
      implementation: "mosaic_gpu" (NVIDIA GPUs), "xla" (any platform), "reference", or None
        to choose.
      promise_in_bounds: the caller's word that the cache has all of them, so that nothing looks:
        a launch less on a GPU. What happens if it is not true is undefined.

    Returns:
      The cache with the copies made.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist or cannot do this here.

    Source: copy-on-write at block granularity, PagedAttention (Kwon et al. 2023), section 4.4.
    """
    check_cache(kv_cache)
    for name, blocks in (("src", src), ("dst", dst)):
        if blocks.shape != src.shape or blocks.ndim != 1 or blocks.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {blocks.dtype}{list(blocks.shape)}; src and dst must be int32[P] of "
                f"the same length (src has {list(src.shape)})"
            )
    name = choose_implementation("copy_blocks", _IMPLEMENTATIONS, implementation, kv_cache)
    if not promise_in_bounds:
        src, dst = _pairs_inside(src, dst, kv_cache.k.shape[0])
    return _IMPLEMENTATIONS[name].run(kv_cache, src, dst)


@functools.partial(jax.jit, static_argnames="num_blocks")
def _pairs_inside(src: jax.Array, dst: jax.Array, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Returns the pairs, those with a block outside of the cache as (0, 0)."""
    real = inside(src, num_blocks) & inside(dst, num_blocks)
    return jnp.where(real, src, NULL_BLOCK), jnp.where(real, dst, NULL_BLOCK)
