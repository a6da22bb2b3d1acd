"""Products as XLA makes them, in the form that it makes best on the platform that compiles."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

MAX_ROWS_OF_LEFT_WEIGHTS = 64
"""Up to so many rows, on a CPU, a float32 product has the weight on its left."""


def product(
    x: jax.Array,
    weight: jax.Array,
    dtype: jax.typing.DTypeLike,
    num_rows: jax.Array | None = None,
) -> jax.Array:
    """Returns `x @ weight.T`, of all rows however few are in use; see `api.product`."""
    return lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_product_on_cpu, dtype=dtype),
        default=functools.partial(_product, dtype=dtype),
    )


def _product(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.einsum("nk,ok->no", x, weight, preferred_element_type=dtype)


def _product_on_cpu(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    if x.dtype == jnp.float32 and 1 < len(x) <= MAX_ROWS_OF_LEFT_WEIGHTS:
        y = jnp.einsum("ok,nk->on", weight, x, preferred_element_type=dtype)
        # XLA would see that the transpose of this product is the other one.
        return lax.optimization_barrier(y).T
    if x.dtype != jnp.float32 and len(x) == 1:
        # One row is a sum in float32 to XLA, and the weight converted for it; two are a product.
        return _product(jnp.pad(x, ((0, 1), (0, 0))), weight, dtype)[:1]
    return _product(x, weight, dtype)
