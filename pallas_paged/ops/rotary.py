"""Rotation of queries and keys by their tokens' positions (Su et al., 2021)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rotate(
    x: Float[Array, "T H D"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float[Array, "T H D"]:
    """Returns `x` turned: dimension i is paired with i + D/2, as in Hugging Face's weights.

    Args:
      x: heads of T tokens.
      cos: of the angle by which each token's pair i turns.
      sin: of the same.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = turn(first, second, cos[:, None, :], sin[:, None, :])
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def turn(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Returns both halves of float32 rows, turned."""
    return first * cos - second * sin, second * cos + first * sin
