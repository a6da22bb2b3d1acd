"""What differs between NumPy and jax in code that is written once for both.

NumPy computes exactly the items that are selected. A jitted function has fixed shapes: it computes
all items that could be, with a mask. `Selected` is either, and `scatter` takes the mask.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def namespace(array: Array) -> Any:
    """Returns `numpy` or `jax.numpy`, whichever `array` belongs to."""
    return np if isinstance(array, np.ndarray) else jnp


def inside(ids: Array, size: int) -> Array:
    """Returns which ids lie in 0..size - 1. In indexing, negative ones would count from the end."""
    return (ids >= 0) & (ids < size)


def scatter(
    array: Array,
    index: Array,
    values: Array | int,
    where: Array,
    how: Literal["set", "add", "max"] = "set",
    *,
    in_place: bool = False,
) -> Array:
    """Returns `array` with `values` set, added or compared at `index` of its first axis.

    Only where the mask `where`, of the shape of `index`, is True; no index there is outside (see
    `ids_inside`). Values that are set must not meet at one index. With `in_place`, for NumPy
    alone, it is `array` itself that changes.
    """
    if not isinstance(array, np.ndarray):
        index = jnp.where(where, index, len(array))
        return getattr(array.at[index], how)(values, mode="drop")
    if not where.any():
        return array
    result = array if in_place else array.copy()
    # A Python int would be an int64 to `ufunc.at`, which is 30 times slower when it has to cast.
    values = array.dtype.type(values) if isinstance(values, int) else values[where]
    if how == "set":
        result[index[where]] = values
    else:
        {"add": np.add, "max": np.maximum}[how].at(result, index[where], values)
    return result


class Selected(NamedTuple):
    """Items selected from an array: just these in NumPy, all of them and a mask in jax.

    Attributes:
      places: i32[E], where the item is in the (flattened) array.
      rank: i32[E], how many items are selected before it.
      valid: bool[E], whether it is selected.
    """

    places: Array
    rank: Array
    valid: Array


def select(mask: Array) -> Selected:
    """Returns the items where `mask`, bool[N], is True."""
    if isinstance(mask, np.ndarray):
        return _all_of(np.flatnonzero(mask).astype(np.int32))
    places = jnp.arange(len(mask), dtype=jnp.int32)
    return Selected(places, jnp.cumsum(mask, dtype=jnp.int32) - 1, mask)


def select_ranges(first: Array, counts: Array, width: int) -> Selected:
    """Returns, of an array [R, `width`], `counts[r]` items of each row r from column `first[r]`."""
    xp = namespace(counts)
    start = xp.cumsum(counts, dtype=xp.int32) - counts
    row = xp.arange(len(counts), dtype=xp.int32)
    if xp is np:
        owner = np.repeat(row, counts)
        rank = np.arange(len(owner), dtype=np.int32)
        return _all_of((row * width + first - start)[owner] + rank)
    nth = jnp.arange(width, dtype=jnp.int32)[None, :] - first[:, None]
    valid = (nth >= 0) & (nth < counts[:, None])
    places = jnp.arange(valid.size, dtype=jnp.int32)
    return Selected(places, (start[:, None] + nth).reshape(-1), valid.reshape(-1))


def _all_of(places: np.ndarray) -> Selected:
    num_places = len(places)
    return Selected(places, np.arange(num_places, dtype=np.int32), np.ones(num_places, bool))


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


def ids_inside(xp: Any, values: Any, name: str, size: int) -> tuple[Array, Array]:
    """Returns ids as i32, and which of them are an index of `size` items.

    Others raise `ValueError` in NumPy and are 0 in jax. They are looked at before they are cast:
    2**32 + 1 is not 1.
    """
    values = xp.asarray(values)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} is {values.dtype}{list(values.shape)}, must be integers")
    if values.dtype.itemsize < 4:
        values = values.astype(np.int32)  # so that it can be compared with any size
    real = inside(values, size)
    refuse(~real, name, values, f"must be between 0 and {size - 1}")
    if xp is not np:  # in NumPy all are real
        values = jnp.where(real, values, 0)
    return values.astype(np.int32), real


def to_int32(xp: Any, values: Any, name: str) -> Array:
    """Returns integers as i32; those that are too large for it become its largest or smallest."""
    values = xp.asarray(values)
    if values.dtype == np.int32:
        return values
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} is {values.dtype}{list(values.shape)}, must be integers")
    given, wanted = np.iinfo(values.dtype), np.iinfo(np.int32)
    low, high = max(given.min, wanted.min), min(given.max, wanted.max)
    return xp.clip(values, low, high).astype(np.int32)


def refuse_repeated(real: Array, name: str, ids: Array) -> None:
    """Raises `ValueError` in NumPy if an id comes twice along the last axis, where `real`."""
    if isinstance(ids, np.ndarray):
        distinct = np.arange(-ids.shape[-1], 0)  # in place of padding
        ordered = np.sort(np.where(real, ids, distinct))
        repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if repeated.size:
            raise ValueError(f"{name} repeat {repeated.tolist()}; name each one once")
