"""What the kernel for CPUs does with rows of numbers, compiled by Numba into vectors.

Rows are those of a tile: query tokens times the query heads of a KV head. `chunk` stands for the
tokens whose keys and values are looked at together.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from pallas_paged.ops.cpu import tile
from pallas_paged.ops.cpu.stored import wide
from pallas_paged.ops.cpu.tile import FEW_COLUMNS
from pallas_paged.ops.cpu.vectors import LANES
from pallas_paged.ops.cpu.xla_call import COMPILED_ONLY, prefetch

F32 = np.float32
LEAST = F32(np.finfo(np.float32).min)

LOOSE = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be made in any order; infinities and NaN stay what they are."""
_INLINE = {**COMPILED_ONLY, "forceinline": True, "fastmath": LOOSE, "error_model": "numpy"}


@numba.njit(**_INLINE)
def copy_rows(stored: Any, scales: Any, copy: Any, distance: int) -> None:
    """Copies a block's rows [S, D] as float32, times the scales [S] if they are int8.

    Asks the memory for what lies `distance` bytes behind what it copies.
    """
    ahead, row_bytes = stored.ctypes.data + distance, stored.strides[0]
    for t in range(stored.shape[0]):
        for offset in range(0, row_bytes, tile.LINE_BYTES):
            prefetch(ahead + t * row_bytes + offset)
        scale = scale_of(stored, scales, t)
        for d in range(stored.shape[1]):
            copy[t, d] = wide(stored[t, d]) * scale


def scale_of(stored: Any, scales: Any, t: int) -> Any:
    """Returns what row t is multiplied by: 1, except where it is int8."""
    raise NotImplementedError("compiled code only")


@overload(scale_of, inline="always", strict=False, jit_options=COMPILED_ONLY)
def _scale_of(stored: Any, scales: Any, t: Any) -> Any:
    if stored.dtype == types.int8:
        return lambda stored, scales, t: scales[t]
    return lambda stored, scales, t: F32(1.0)


def block_rows(stored: Any, scales: Any, copy: Any, distance: int) -> Any:
    """Returns a block's rows [S, D]: themselves, or where they are int8 what `copy_rows` makes."""
    raise NotImplementedError("compiled code only")


@overload(block_rows, inline="always", strict=False, jit_options=COMPILED_ONLY)
def _block_rows(stored: Any, scales: Any, copy: Any, distance: Any) -> Any:
    if stored.dtype != types.int8:
        return lambda stored, scales, copy, distance: stored

    def copied(stored: Any, scales: Any, copy: Any, distance: Any) -> Any:
        copy_rows(stored, scales, copy, distance)
        return copy

    return copied


# --- functions --------------------------------------------------------------------------------


@numba.njit(**_INLINE)
def exp(x: Any) -> Any:
    """Returns e**x for x <= 0, and 0 below e**-87; the polynomial is that of Cephes' expf."""
    y = F32(-87.0) if x < F32(-87.0) else x
    n = np.floor(y * F32(1.44269504) + F32(0.5))
    r = y - n * F32(0.693359375)
    r = r + n * F32(2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + F32(5.0000001201e-1)
    p = p * r * r + r + F32(1.0)
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    return F32(0.0) if x < F32(-87.0) else p * power


@numba.njit(**_INLINE)
def tanh(x: Any) -> Any:
    """Returns the hyperbolic tangent, to within a few units of 2**-24."""
    e = exp(F32(-2.0) * abs(x))
    y = (F32(1.0) - e) / (F32(1.0) + e)
    return -y if x < F32(0.0) else y


# --- products ---------------------------------------------------------------------------------


@numba.njit(**_INLINE)
def score(
    is_bfloat16: int,
    s: Any,
    first: int,
    q: Any,
    row: int,
    num_rows: int,
    keys: Any,
    lines: int,
    distance: int,
) -> None:
    """Sets s[r, first + t] to q[r] . keys[t], for `num_rows` rows r from `row` on.

    If `lines` is not 0, asks the memory for what lies `distance` bytes behind the keys that it
    reads; it is how many lines are read of `FEW_COLUMNS` keys at a time.
    """
    num_keys, head_dim = keys.shape
    if num_keys < FEW_COLUMNS:
        for t in range(num_keys):
            for r in range(row, row + num_rows):
                total = F32(0.0)
                for d in range(head_dim):
                    total += q[r, d] * wide(keys[t, d])
                s[r, first + t] = total
        return
    q_stride, key_stride, s_stride = q.strides[0], keys.strides[0], s.strides[0]
    for column in range(0, num_keys, FEW_COLUMNS):
        t = min(column, num_keys - FEW_COLUMNS)
        for r in range(row, row + num_rows, tile.MAX_ROWS):
            tile.dot_products(
                0,
                is_bfloat16,
                FEW_COLUMNS,
                lines,
                min(tile.MAX_ROWS, row + num_rows - r),
                q.ctypes.data + r * q_stride,
                q_stride,
                keys.ctypes.data + t * key_stride,
                key_stride,
                head_dim,
                s.ctypes.data + r * s_stride + 4 * (first + t),
                s_stride,
                keys.ctypes.data + t * key_stride + distance,
                FEW_COLUMNS * LANES * (4 - 2 * is_bfloat16),
            )


@numba.njit(**_INLINE)
def turn(x: Any, y: Any) -> None:
    """Sets y to the transpose of x; both axes are multiples of `LANES`."""
    for i in range(0, x.shape[0], LANES):
        for j in range(0, x.shape[1], LANES):
            place = x.ctypes.data + i * x.strides[0] + 4 * j
            turned = y.ctypes.data + j * y.strides[0] + 4 * i
            tile.turn(place, x.strides[0], turned, y.strides[0])


@numba.njit(**_INLINE)
def multiply_many(from_zero: int, y: Any, x: Any, first: int, num_rows: int, rows: Any) -> None:
    """Adds the sum over t of x[r, first + t] * rows[t] to y[r], for r < `num_rows`; all float32.

    Or sets y[r] to it, if `from_zero` is 1. Both have as many rows as whole tiles: those behind are
    computed too, from whatever is there, which spares code for tiles of fewer rows.
    """
    for r in range(0, num_rows, tile.MAX_ROWS):
        tile.add_weighted_rows(
            0,
            from_zero,
            0,
            tile.MAX_ROWS,
            x.ctypes.data + r * x.strides[0] + 4 * first,
            x.strides[0],
            rows.ctypes.data,
            rows.strides[0],
            rows.shape[0],
            rows.shape[1],
            y.ctypes.data + r * y.strides[0],
            y.strides[0],
            0,
        )


@numba.njit(**_INLINE)
def weigh(row: Any, first: int, past: int, largest: Any) -> tuple[Any, Any]:
    """Makes weights of scores: e to the power of what they are less than the largest of all.

    Args:
      row: the scores of a chunk's keys, set to the weights.
      first: the first key that counts; the weights before it are 0.
      past: the keys from here on do not count either.
      largest: of the chunks before.

    Returns:
      the largest score now, and the sum of the weights.
    """
    largest = max(largest, tile.mask_row(row.ctypes.data, first, past, len(row)))
    total = F32(0.0)
    for t in range(len(row)):
        row[t] = exp(row[t] - largest)
        total += row[t]
    return largest, total


@numba.njit(**_INLINE)
def add_values(
    is_bfloat16: int,
    sums: Any,
    p: Any,
    first: int,
    row: int,
    num_rows: int,
    values: Any,
    asks: int,
    distance: int,
) -> None:
    """Adds p[r, first + t] * values[t] to sums[r], for every t and `num_rows` rows from `row`.

    If `asks` is 1, asks the memory for what lies `distance` bytes behind the values that it reads.
    """
    p_stride, sums_stride = p.strides[0], sums.strides[0]
    for r in range(row, row + num_rows, tile.MAX_ROWS):
        tile.add_weighted_rows(
            is_bfloat16,
            0,
            asks,
            min(tile.MAX_ROWS, row + num_rows - r),
            p.ctypes.data + r * p_stride + 4 * first,
            p_stride,
            values.ctypes.data,
            values.strides[0],
            values.shape[0],
            values.shape[1],
            sums.ctypes.data + r * sums_stride,
            sums_stride,
            distance,
        )
