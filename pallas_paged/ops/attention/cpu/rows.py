"""What the kernel for CPUs does with rows of numbers, compiled by Numba into vectors.

Rows are those of a tile: query tokens times the query heads of a KV head. `chunk` stands for the
tokens whose keys and values are looked at together.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from pallas_paged.ops.attention.cpu.xla_call import prefetch

F32 = np.float32
LINE_BYTES = 64
"""Of a line of a CPU's caches."""

LOOSE = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be made in any order; infinities and NaN stay what they are."""
_INLINE = {"forceinline": True, "fastmath": LOOSE, "error_model": "numpy"}


# --- stored numbers ---------------------------------------------------------------------------
# bfloat16 goes by the name of uint16, for Numba does not know it.


def wide(x: Any) -> Any:
    """Returns a stored number as float32."""
    raise NotImplementedError("compiled code only")


@overload(wide, strict=False)
def _wide(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: np.float32(x)


def narrow(x: Any, like: Any) -> Any:
    """Returns a float32 as it is stored beside the number `like`, rounded to the nearest."""
    raise NotImplementedError("compiled code only")


@overload(narrow, strict=False)
def _narrow(x: Any, like: Any) -> Any:
    if like == types.float32:
        return lambda x, like: x

    def to_bfloat16(x: Any, like: Any) -> Any:
        bits = np.float32(x).view(np.uint32)
        if np.isnan(x):
            return np.uint16(0x7FC0)
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    return to_bfloat16


def block_rows(stored: Any, copy: Any) -> Any:
    """Returns a block's rows [S, D] as float32: themselves, or in `copy`."""
    raise NotImplementedError("compiled code only")


@overload(block_rows, inline="always", strict=False)
def _block_rows(stored: Any, copy: Any) -> Any:
    if stored.dtype == types.float32:
        return lambda stored, copy: stored

    def widened(stored: Any, copy: Any) -> Any:
        for t in range(stored.shape[0]):
            for d in range(stored.shape[1]):
                copy[t, d] = wide(stored[t, d])
        return copy

    return widened


@numba.njit(**_INLINE)
def prefetch_rows(rows: Any) -> None:
    """Asks the memory for rows that lie one after the other."""
    address = rows.ctypes.data
    for offset in range(0, rows.nbytes, LINE_BYTES):
        prefetch(address + offset)


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
# Four rows and four summands at a time: what is loaded is used four times.


@numba.njit(**_INLINE)
def dot_products(s: Any, first: int, q: Any, row: int, num_rows: int, keys: Any) -> None:
    """Sets s[r, first + t] to q[r] . keys[t], for `num_rows` rows r from `row` on."""
    for t in range(keys.shape[0]):
        for r in range(row, row + num_rows):
            total = F32(0.0)
            for d in range(keys.shape[1]):
                total += q[r, d] * keys[t, d]
            s[r, first + t] = total


@numba.njit(**_INLINE)
def products(s: Any, q: Any, num_rows: int, turned: Any) -> None:
    """Sets s[r] to the sum over d of q[r, d] * turned[d].

    There are four times as many d as a whole number, and s and q have so many rows.
    """
    for r in range(0, num_rows, 4):
        s[r : r + 4] = F32(0.0)
        for d in range(0, turned.shape[0], 4):
            a0, a1, a2, a3 = q[r, d], q[r, d + 1], q[r, d + 2], q[r, d + 3]
            b0, b1, b2, b3 = q[r + 1, d], q[r + 1, d + 1], q[r + 1, d + 2], q[r + 1, d + 3]
            c0, c1, c2, c3 = q[r + 2, d], q[r + 2, d + 1], q[r + 2, d + 2], q[r + 2, d + 3]
            d0, d1, d2, d3 = q[r + 3, d], q[r + 3, d + 1], q[r + 3, d + 2], q[r + 3, d + 3]
            for t in range(turned.shape[1]):
                k0, k1, k2, k3 = turned[d, t], turned[d + 1, t], turned[d + 2, t], turned[d + 3, t]
                s[r, t] += a0 * k0 + a1 * k1 + a2 * k2 + a3 * k3
                s[r + 1, t] += b0 * k0 + b1 * k1 + b2 * k2 + b3 * k3
                s[r + 2, t] += c0 * k0 + c1 * k1 + c2 * k2 + c3 * k3
                s[r + 3, t] += d0 * k0 + d1 * k1 + d2 * k2 + d3 * k3


@numba.njit(**_INLINE)
def add_values(sums: Any, p: Any, first: int, row: int, num_rows: int, values: Any) -> None:
    """Adds p[r, first + t] * values[t] to sums[r], for every t and `num_rows` rows from `row`."""
    fours, row_fours, end = values.shape[0] // 4 * 4, row + num_rows // 4 * 4, row + num_rows
    for r in range(row, row_fours, 4):
        for t in range(0, fours, 4):
            i = first + t
            a0, a1, a2, a3 = p[r, i], p[r, i + 1], p[r, i + 2], p[r, i + 3]
            b0, b1, b2, b3 = p[r + 1, i], p[r + 1, i + 1], p[r + 1, i + 2], p[r + 1, i + 3]
            c0, c1, c2, c3 = p[r + 2, i], p[r + 2, i + 1], p[r + 2, i + 2], p[r + 2, i + 3]
            d0, d1, d2, d3 = p[r + 3, i], p[r + 3, i + 1], p[r + 3, i + 2], p[r + 3, i + 3]
            for d in range(values.shape[1]):
                v0, v1, v2, v3 = values[t, d], values[t + 1, d], values[t + 2, d], values[t + 3, d]
                sums[r, d] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                sums[r + 1, d] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                sums[r + 2, d] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                sums[r + 3, d] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
    for r in range(row_fours, end):
        for t in range(0, fours, 4):
            i = first + t
            a0, a1, a2, a3 = p[r, i], p[r, i + 1], p[r, i + 2], p[r, i + 3]
            for d in range(values.shape[1]):
                v0, v1, v2, v3 = values[t, d], values[t + 1, d], values[t + 2, d], values[t + 3, d]
                sums[r, d] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
    for t in range(fours, values.shape[0]):
        for r in range(row, end):
            for d in range(values.shape[1]):
                sums[r, d] += p[r, first + t] * values[t, d]
