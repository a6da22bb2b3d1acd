"""Rotary position embedding (RoPE; Su et al., 2021) of queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rotate(
    x: Float[Array, "T H D"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float[Array, "T H D"]:
    """Returns `x` rotated: dimensions i and i + D/2 are a pair, as in Hugging Face's weights.

    Others call that layout half-split, or NeoX style.

    Args:
      x: queries or keys of T tokens.
      cos: for each token and pair the cosine of the angle.
      sin: the sine of the same angle.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = rotated_halves(first, second, cos[:, None, :], sin[:, None, :])
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)


def rotated_halves(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Returns both halves of rotated float32 rows, from theirs."""
    return first * cos - second * sin, second * cos + first * sin
