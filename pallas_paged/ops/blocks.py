"""Reads and writes of single blocks and slots in XLA, for every dtype of a cache; their ids.

8-bit floats are moved as integers of the same bits. XLA's CPU backend has no 8-bit floats: it would
turn the operands of a gather or scatter, the whole cache, into 16-bit ones at every call. A read is
then as cheap there as of any other dtype. A write still copies the array once on a CPU, where the
change of type is not free; on a GPU it is in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged._namespaces import inside


@functools.partial(jax.jit, static_argnames="size")
def inside_or_null(ids: jax.Array, size: int) -> jax.Array:
    """Returns the ids of blocks or slots, 0 for those outside of a pool of `size`.

    `mode="drop"` alone would not do: a negative index counts from the end before it is looked at.
    """
    return jnp.where(inside(ids, size), ids, 0)


def take(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns `array[indices]`; all indices must lie inside the first axis."""
    if array.dtype != jnp.float8_e4m3fn:
        return array.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    # Without the barrier a loop around this would change the whole array's type ahead of its turns.
    array, indices = jax.lax.optimization_barrier((array, indices))
    return _from_bits(take(_to_bits(array), indices))


def put(array: jax.Array, where: Any, values: jax.Array) -> jax.Array:
    """Returns `array` with `array[where] = values`, in place if the array is donated."""
    if array.dtype != jnp.float8_e4m3fn:
        return array.at[where].set(values)
    return _from_bits(_to_bits(array).at[where].set(_to_bits(values)))


def _to_bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint8)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
