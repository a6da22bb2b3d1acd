"""Shared memory of the attention kernels: matrices that tensor cores read, and rows put to zero."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_SWIZZLES = (128, 64, 32)
_ZEROED_ROWS = 64


def widest_swizzle(width: int, dtype: Any) -> int:
    """Returns the bytes of the largest swizzle that divides a row of `width` numbers."""
    row_bytes = width * jnp.dtype(dtype).itemsize
    return next(swizzle for swizzle in _SWIZZLES if row_bytes % swizzle == 0)


def swizzled(shape: tuple[int, ...], dtype: Any, swizzle_bytes: int | None = None) -> Any:
    """Returns shared memory that tensor cores read without conflicts, in tiles of 8 rows.

    Args:
      shape: of matrices, in the last two dimensions.
      dtype: of their numbers.
      swizzle_bytes: of a row of a tile; None takes the widest. With 16 there is nothing to swizzle.
    """
    if swizzle_bytes is None:
        swizzle_bytes = widest_swizzle(shape[-1], dtype)
    tiling: Any = plgpu.TilingTransform  # mypy takes these two for abstract
    swizzle: Any = plgpu.SwizzleTransform
    transforms: tuple[Any, ...] = (tiling((8, swizzle_bytes // jnp.dtype(dtype).itemsize)),)
    if swizzle_bytes > 16:
        transforms += (swizzle(swizzle_bytes),)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zero_rows(
    tile: Any,
    begin: jax.Array,
    end: jax.Array,
    columns: Iterable[Any],
    layout_of: Callable[[tuple[int, ...]], Any],
) -> None:
    """Zeroes the rows of a tile of values outside [begin, end): 0 * NaN would be NaN.

    In pieces that need few registers.

    Args:
      tile: [T, D] in shared memory.
      begin, end: the rows that stay.
      columns: slices of D, one piece each.
      layout_of: the layout in registers of a piece of some shape.
    """
    size = min(_ZEROED_ROWS, tile.shape[0])
    for row in range(0, tile.shape[0], size):
        for some in columns:
            piece = tile.at[pl.ds(row, size), some]
            layout = layout_of(piece.shape)
            old = plgpu.load(piece, layout=layout)
            rows = plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=layout) + row
            piece[...] = jnp.where((rows >= begin) & (rows < end), old, jnp.zeros_like(old))
