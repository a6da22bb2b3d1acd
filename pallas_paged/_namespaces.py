"""What differs between NumPy and jax in code that is written once for both.

NumPy knows how many items there are; a jitted function has a fixed number of places for them. So
the functions here return exactly the items in NumPy and pad in jax; `scatter` drops the padding.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def namespace(array: Array) -> Any:
    """Returns `numpy` or `jax.numpy`, whichever `array` belongs to."""
    return np if isinstance(array, np.ndarray) else jnp


def scatter(
    array: Array, index: Array, values: Array | int, how: Literal["set", "add", "max"] = "set"
) -> Array:
    """Returns `array` with `values` set, added or compared at `index` along its first axis.

    An index of `len(array)` is padding and dropped. Values that are set must not meet at one index.
    """
    if not isinstance(array, np.ndarray):
        return getattr(array.at[index], how)(values, mode="drop")
    kept = index < len(array)
    if not kept.any():
        return array
    result = array.copy()
    values = values if isinstance(values, int) else values[kept]
    if how == "set":
        result[index[kept]] = values
    else:
        {"add": np.add, "max": np.maximum}[how].at(result, index[kept], values)
    return result


def repeat(values: Array, counts: Array, limit: int) -> Array:
    """Returns each of `values` as often as `counts` says; in jax padded to `limit` items."""
    if isinstance(values, np.ndarray):
        return np.repeat(values, counts)
    return jnp.repeat(values, counts, total_repeat_length=limit)


def compact(mask: Array) -> tuple[Array, Array]:
    """Returns i32[E], where `mask` is True, and bool[E], which of these are not padding.

    E is their number in NumPy, and the size of the mask in jax.
    """
    if isinstance(mask, np.ndarray):
        found = np.flatnonzero(mask).astype(np.int32)
        return found, np.ones_like(found, bool)
    (size,) = mask.shape
    places = jnp.flatnonzero(mask, size=size, fill_value=size)
    return places, places < size


def total(counts: Array) -> Array:
    """Returns the sum as i32[]: an array in NumPy too, where sums are wider and scalars."""
    xp = namespace(counts)
    return xp.asarray(xp.sum(counts, dtype=np.int32))


def refuse(bad: Array, name: str, values: Array, reason: str) -> None:
    """Raises `ValueError` with the values where `bad` is True; in jax none can be looked at."""
    if isinstance(bad, np.ndarray) and bad.any():
        places = [place[0] if len(place) == 1 else place for place in np.argwhere(bad).tolist()]
        culprits = ", ".join(f"{name}[{p}]={v}" for p, v in zip(places, values[bad], strict=True))
        raise ValueError(f"{culprits} {reason}")


def refuse_outside(values: Array, name: str, size: int) -> None:
    """Raises `ValueError` in NumPy for values that are no index of `size` items."""
    refuse((values < 0) | (values >= size), name, values, f"must be between 0 and {size - 1}")


def refuse_repeated(real: Array, name: str, ids: Array) -> None:
    """Raises `ValueError` in NumPy if an id comes twice along the last axis, where `real`."""
    if isinstance(ids, np.ndarray):
        distinct = np.arange(-ids.shape[-1], 0)  # in place of padding
        ordered = np.sort(np.where(real, ids, distinct))
        repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if repeated.size:
            raise ValueError(f"{name} repeat {repeated.tolist()}; name each one once")
