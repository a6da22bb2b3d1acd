"""Products on CPUs, as a call of a kernel that Numba compiled."""

import importlib.util

import jax
import jax.numpy as jnp

from pallas_paged.dispatch import target_device
from pallas_paged.ops.cpu.xla_header import unknown_interface
from pallas_paged.ops.product import xla

MAX_ROWS = 256
"""Up to so many rows a product is as fast as XLA's or faster."""
MAX_ROWS_BESIDE_AMX = 16
"""The same for bfloat16 where the CPU has instructions for whole matrices, which XLA uses."""

_DTYPES = ("float32", "bfloat16")
_MIN_FEATURES = 6  # of a tile


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct, weight: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
    """Returns why the kernel cannot compute `x @ weight.T` on the target device, or None."""
    if target_device().platform != "cpu":
        return f"it is for CPUs, not {target_device().device_kind}"
    if x.dtype != weight.dtype or x.dtype.name not in _DTYPES:
        return f"x is {x.dtype} and the weight {weight.dtype}; both must be one of {_DTYPES}"
    if weight.shape[0] < _MIN_FEATURES:
        return f"the weight has {weight.shape[0]} output features, fewer than {_MIN_FEATURES}"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    most = _max_rows(x.dtype)
    if x.shape[0] > most:
        return f"x has {x.shape[0]} rows, more than {most}"
    return unknown_interface()


def _max_rows(dtype: jax.typing.DTypeLike) -> int:
    from pallas_paged.ops.cpu import vectors

    return MAX_ROWS_BESIDE_AMX if dtype == jnp.bfloat16 and vectors.HAS_AMX else MAX_ROWS


def product(
    x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike, num_rows: jax.Array
) -> jax.Array:
    """Returns `x @ weight.T`; see `api.product`. Its derivatives are XLA's."""
    return _product(x, weight, num_rows).astype(dtype)


@jax.custom_jvp
def _product(x: jax.Array, weight: jax.Array, num_rows: jax.Array) -> jax.Array:
    from pallas_paged.ops.cpu import vectors

    target = register(weight)
    left = x if vectors.MULTIPLIES_BFLOAT16 else x.astype(jnp.float32)
    y = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target, y, vmap_method="sequential")(left, weight, num_rows[None])


@_product.defjvp
def _product_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, weight, num_rows), (dx, dweight, _) = primals, tangents
    change = xla.product(dx, weight, jnp.float32) + xla.product(x, dweight, jnp.float32)
    return _product(x, weight, num_rows), change


def register(weight: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Makes XLA know the kernel for such a weight, and returns its name there.

    A program that calls it must not be loaded before.
    """
    from pallas_paged.ops.product.cpu import kernel

    return kernel.load_kernel(weight.dtype == jnp.bfloat16)
