"""Quantised keys and values: how a row of numbers is stored in 8 bits with one scale.

A token's key (or value) of one KV head, D numbers, has one float32 scale: number = stored * scale.
The scale maps the row's largest magnitude onto the largest number of the stored dtype (`amax / 448`
for float8_e4m3fn, `amax / 127` for int8), so that nothing overflows; or a checkpoint brings it, one
for each KV head, and what lies beyond the dtype's numbers becomes the last of them. With the row's
own scale the error of a number x is at most

  float8_e4m3fn:  max(2^-4 |x|, 2^-10 amax / 448)   (3 bits of mantissa; below, subnormal steps)
  int8:           amax / 254                        (half a step)

plus the rounding of float32. In any case a row that holds NaN or an infinity gets an infinite scale
and reads as NaN and infinities: what is wrong does not become finite.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

LARGEST = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}
"""The stored dtypes, and the largest number of each."""
_LOWEST = {jnp.dtype(jnp.float8_e4m3fn): -448.0, jnp.dtype(jnp.int8): -128.0}
"""Their lowest numbers; a row's own scale leads to none below minus the largest."""

SMALLEST_AMAX = 2.0**-100
"""Rows whose magnitudes are all below this are stored as zeros: their scale would be subnormal."""


def is_quantised(dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether keys and values of this dtype come with scales."""
    return jnp.dtype(dtype) in LARGEST


def quantise(
    x: jax.Array, dtype: jax.typing.DTypeLike, given: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns `x` [..., D] stored in `dtype` [..., D] and its scales, f32[...], all positive.

    They are the rows' own, or those `given`, f32[...], for finite rows.
    """
    (stored,), scale = quantise_parts([x], dtype, given)
    return stored, scale


def quantise_parts(
    parts: Sequence[jax.Array], dtype: jax.typing.DTypeLike, given: jax.Array | None = None
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the same for rows in parts [..., D / n], which share their scales."""
    lowest, largest = (of[jnp.dtype(dtype)] for of in (_LOWEST, LARGEST))
    parts = [x.astype(jnp.float32) for x in parts]
    # A maximum may leave out a NaN, and an integer has none: an infinite scale stands for it.
    amaxes = [jnp.max(jnp.where(x != x, jnp.inf, jnp.abs(x)), axis=-1) for x in parts]
    amax = functools.reduce(jnp.maximum, amaxes)
    if given is None:
        scale = jnp.maximum(amax, SMALLEST_AMAX) / largest
    else:
        scale = jnp.where(amax < jnp.inf, given, jnp.inf)

    def store(x: jax.Array) -> jax.Array:
        scales = jax.lax.broadcast_in_dim(scale, x.shape, tuple(range(scale.ndim)))
        # Saturated: by a rounding of the quotient, a cast beyond the largest number would give NaN.
        stored = jnp.clip(x / scales, lowest, largest)
        return (jnp.round(stored) if jnp.issubdtype(dtype, jnp.integer) else stored).astype(dtype)

    return [store(x) for x in parts], scale


def dequantise(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Returns float32 numbers of `stored` [..., D], with the scales f32[...] if it has any."""
    x = stored.astype(jnp.float32)
    return x if scale is None else x * scale[..., None]
