"""Write of a step's keys and values into the KV cache: the public functions and their checks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_paged.dispatch import Implementation, choose_implementation
from pallas_paged.kv_cache import KVCache, StaticScales, check_cache, check_static_scales
from pallas_paged.ops.blocks import inside_or_null
from pallas_paged.ops.kv_write import mosaic_gpu, reference, xla
from pallas_paged.ops.rotary import rotate

_Shape = jax.Array | jax.ShapeDtypeStruct


def _differs(kv_cache: KVCache) -> str | None:
    """Returns why no kernel writes into this cache, or None if its arrays are equally wide."""
    widths = kv_cache.k.shape[3], kv_cache.v.shape[3]
    if widths[0] != widths[1]:
        return f"head_dim={widths[0]} of the keys is not the values' {widths[1]}"
    return None


def _kernel_unsupported(k: _Shape, kv_cache: KVCache) -> str | None:
    """Returns why the kernel cannot write such keys into this cache here, or None if it can."""
    return _differs(kv_cache) or mosaic_gpu.unsupported(k, kv_cache)


def _rotation_unsupported(q: _Shape, k: _Shape, kv_cache: KVCache) -> str | None:
    """Returns why the kernel cannot rotate such queries and keys too, or None if it can."""
    return _differs(kv_cache) or mosaic_gpu.unsupported_rotation(q, k, kv_cache)


_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.write_kv, _kernel_unsupported),
    "xla": Implementation(xla.write_kv),
    "reference": Implementation(reference.write_kv),
}


def _first_rotated(
    write: Callable[..., KVCache],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *rest: Any,
) -> tuple[jax.Array, KVCache]:
    return rotate(q, cos, sin), write(rotate(k, cos, sin), v, *rest)


_ROTATING = {
    "mosaic_gpu": Implementation(mosaic_gpu.rotate_and_write, _rotation_unsupported),
    "xla": Implementation(functools.partial(_first_rotated, xla.write_kv)),
    "reference": Implementation(functools.partial(_first_rotated, reference.write_kv)),
}


def write_kv(
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk Dv"],
    kv_cache: KVCache,
    slot_mapping: Int32[Array, "T"],
    *,
    static_scales: StaticScales | None = None,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> KVCache:
    """Writes the keys and values of T tokens into their slots.

    Args:
      k: keys, cast to the cache's dtype, or quantised if that is float8_e4m3fn or int8: then their
        scales are written too (see `pallas_paged.quantisation` for the error).
      v: values, likewise; as wide as the cache's, which need not be as wide as its keys.
      kv_cache: donated: it must not be used afterwards. Inside a caller's own `jax.jit` it is
        updated in place if the caller donates it there.
      slot_mapping: i32[T], `block * S + offset` of each token. Padding tokens name slots of the
        null block, which may repeat; what ends up there is unspecified. So it is for all slots that
        the cache does not have: a token with -1, or one of N * S and more, is written to no block
        but the null block. Other slots differ.
      static_scales: with which a quantised cache's rows are stored, instead of each row's own: what
        does not fit is stored as the dtype's largest or lowest number.
      implementation: "mosaic_gpu" (NVIDIA GPUs), "xla" (any platform), "reference", or None
        to choose.
      promise_in_bounds: the caller's word that the cache has all of them, so that nothing looks:
        a launch less on a GPU. What happens if it is not true is undefined.

    Returns:
      The cache with k and v written.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist or cannot do this here.
    """
    _check(k, v, kv_cache, slot_mapping, static_scales)
    name = write_implementation(implementation, k, kv_cache)
    if not promise_in_bounds:
        slot_mapping = inside_or_null(slot_mapping, kv_cache.k.shape[0] * kv_cache.block_size)
    return _IMPLEMENTATIONS[name].run(k, v, kv_cache, slot_mapping, static_scales)


def rotate_and_write(
    q: Float[Array, "T Hq D"],
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk Dv"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    kv_cache: KVCache,
    slot_mapping: Int32[Array, "T"],
    *,
    static_scales: StaticScales | None = None,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> tuple[Float[Array, "T Hq D"], KVCache]:
    """Rotates queries and keys (RoPE), and writes keys and values into their slots.

    On a GPU that is one launch, and none before it if `q`, `k` and `v` are slices of one array
    `[T, Hk, (Hq / Hk + 2) * D]` that has for each KV head its queries, its keys and its values.

    Args:
      q: queries, Hq a multiple of Hk. Queries, keys and values have one dtype.
      k: keys; rotated they are written as `write_kv` would write them.
      v: values.
      cos: for each token and pair the cosine of the angle. Dimensions `i` and `i + D / 2` are pair
        `i` (half-split, or NeoX style); see `pallas_paged.ops.rotary`.
      sin: the sine of the same angle.
      kv_cache: donated, as `write_kv` has it.
      slot_mapping: likewise.
      static_scales: likewise.
      implementation: "mosaic_gpu" (NVIDIA GPUs; D a multiple of 64, at most 16 query heads per KV
        head; not differentiable), "xla" (any platform), "reference", or None to choose.
      promise_in_bounds: as `write_kv` has it.

    Returns:
      The rotated queries, those of padding tokens too, and the cache with keys and values written.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist or cannot do this here.
    """
    _check(k, v, kv_cache, slot_mapping, static_scales)
    _check_rotation(q, k, v, cos, sin)
    name = rotating_implementation(implementation, q, k, kv_cache)
    if not promise_in_bounds:
        slot_mapping = inside_or_null(slot_mapping, kv_cache.k.shape[0] * kv_cache.block_size)
    return _ROTATING[name].run(q, k, v, cos, sin, kv_cache, slot_mapping, static_scales)


def rotating_implementation(requested: str | None, q: _Shape, k: _Shape, kv_cache: KVCache) -> str:
    """Returns which implementation `rotate_and_write` runs for such arrays, or their shapes.

    Raises:
      ValueError, NotImplementedError: as `rotate_and_write`.
    """
    return choose_implementation("rotate_and_write", _ROTATING, requested, q, k, kv_cache)


def write_implementation(
    requested: str | None, k: jax.Array | jax.ShapeDtypeStruct, kv_cache: KVCache
) -> str:
    """Returns which implementation `write_kv` runs for such keys and caches, or their shapes.

    Raises:
      ValueError, NotImplementedError: as `write_kv`.
    """
    return choose_implementation("write_kv", _IMPLEMENTATIONS, requested, k, kv_cache)


def rotates_as_it_writes(
    requested: str | None, q: _Shape, k: _Shape, v: _Shape, kv_cache: KVCache
) -> bool:
    """Whether what `write_kv` runs is a kernel, and there is one that rotates such heads, too.

    Then the rotation is best left to `rotate_and_write`.

    Raises:
      ValueError, NotImplementedError: as `write_kv`.
    """
    if write_implementation(requested, k, kv_cache) != "mosaic_gpu":
        return False
    if not q.dtype == k.dtype == v.dtype:
        return False
    return rotating_implementation(None, q, k, kv_cache) == "mosaic_gpu"


def _check(
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    slot_mapping: jax.Array,
    static_scales: StaticScales | None,
) -> None:
    check_cache(kv_cache)
    check_static_scales(static_scales, kv_cache)
    for name, new, cache in (("k", k, kv_cache.k), ("v", v, kv_cache.v)):
        expected = (*slot_mapping.shape[:1], cache.shape[1], cache.shape[3])
        if new.shape != expected:
            raise ValueError(
                f"{name}.shape={new.shape} must be {expected}: [slots, kv heads, head_dim] for "
                f"slot_mapping.shape={slot_mapping.shape} and kv_cache.{name}.shape={cache.shape}"
            )
    if slot_mapping.dtype != jnp.int32:
        raise ValueError(f"slot_mapping.dtype={slot_mapping.dtype} must be int32")


def _check_rotation(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: pairs are rotated")
    num_q_heads = q.shape[1] if q.ndim == 3 and q.shape[::2] == k.shape[::2] else 0
    if not num_q_heads or num_q_heads % num_kv_heads:
        raise ValueError(
            f"q.shape={q.shape} must be [{num_tokens}, Hq, {head_dim}], Hq a multiple of "
            f"{num_kv_heads}, the heads of k.shape={k.shape}"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k and v must have one dtype of floats, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (num_tokens, head_dim // 2) or angle.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be f32[{num_tokens}, {head_dim // 2}]: a token's pairs of "
                f"dimensions, not {angle.dtype}{list(angle.shape)}"
            )
