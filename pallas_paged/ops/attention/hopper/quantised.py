"""Quantised keys and values inside the sm_90a kernels: how tiles of them become 16-bit numbers.

Stored bytes and scales arrive by TMA, so that a quantised cache moves half the bytes. In registers
the bytes turn into the numbers that they stand for before scaling, and these go to a tile in shared
memory, for the tensor core: bfloat16 and float16 hold every float8_e4m3fn and every int8 exactly.
The scales join in float32 where it costs least: those of keys multiply the products, those of
values the weights. Weights times scales may be tiny, and float16 has too few exponents for them:
with it the values are scaled as they are converted, and rounded to float16 once. So are bfloat16
ones where the computing warpgroups have no registers for scaled weights.

One copy brings the scales of a block, or of the part of it that is in a tile. TMA writes at
multiples of 128 bytes, and 16 scales are 64: those of small blocks lie apart, `scale_pitch`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.tiles import WARPS
from pallas_paged.ops.attention.online_softmax import across
from pallas_paged.ops.mosaic_gpu import load

_LANES = 32
_VECTOR = 8  # neighbouring numbers in one thread: 8 bytes are read, 16 written
_ALIGNED_SCALES = 32  # 128 bytes


def scale_pitch(copy_rows: int) -> int:
    """Returns how far the scales of one copy lie behind those of the copy before."""
    return max(copy_rows, _ALIGNED_SCALES)


def scale_slots(tile: int, copy_rows: int) -> int:
    """Returns the size of the buffer of a tile's scales, the gaps included."""
    return tile // copy_rows * scale_pitch(copy_rows)


def scales_values(dtype: Any) -> bool:
    """Whether values are scaled as they are converted to `dtype`; else the weights are scaled."""
    return jnp.dtype(dtype) == jnp.float16


def load_scales(scales: Any, first: Any, count: int, copy_rows: int, layout: Any) -> jax.Array:
    """Returns f32[count], the scales of rows [first, first + count), in a layout of one per row.

    Args:
      scales: f32[scale_slots], shared memory.
      first: a multiple of `copy_rows`, or of `count`, whichever is less.
      count: of rows.
      copy_rows: rows whose scales lie together.
      layout: of the result.
    """

    def read(gaps: Any) -> jax.Array:
        return load(scales.at[pl.ds(first + gaps, count)], layout)

    gap = scale_pitch(copy_rows) - copy_rows
    first_copy = first // copy_rows
    numbers = read(first_copy * gap)
    if gap and count > copy_rows:
        # Each copy is read at a place that is right for its rows: no number changes its thread.
        row = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
        for i in range(1, count // copy_rows):
            is_before = row < i * copy_rows
            numbers = jnp.where(is_before, numbers, read((first_copy + i) * gap))
    return numbers


def masked_scales(
    scales: jax.Array, first: Any, rows: tuple[jax.Array, jax.Array], layout: Any
) -> jax.Array:
    """Returns the scales of rows [first, ...), with 0 for those outside [begin, end) = `rows`.

    There may be NaN, which a weight of 0 does not get rid of.
    """
    return jnp.where(_is_within(scales.shape, first, rows, layout), scales, 0.0)


def _is_within(
    shape: tuple[int, ...], first: Any, rows: tuple[jax.Array, jax.Array], layout: Any
) -> jax.Array:
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + first
    return (row >= rows[0]) & (row < rows[1])


def convert_tile(
    stored: Any,
    numbers: Any,
    *,
    rows: tuple[jax.Array, jax.Array] | None = None,
    scales: Any = None,
    copy_rows: int = 0,
    scaled_rows: tuple[jax.Array, jax.Array] | None = None,
    piece_rows: int = 64,
    unroll: bool = True,
) -> None:
    """Writes the numbers of a tile `stored`, [T, D] bytes in shared memory, to `numbers`.

    By all threads of a warpgroup. `commit_smem` makes them visible to others.

    Args:
      stored: [T, D], neither tiled nor swizzled.
      numbers: [T, at least D] in the dtype to convert to.
      rows: [begin, end): NaN outside these rows becomes 0.
      scales: as for `load_scales`; the numbers are multiplied by them.
      copy_rows: likewise.
      scaled_rows: [begin, end) of those that are.
      piece_rows: rows that are converted at a time, at least 16; fewer take fewer registers.
      unroll: False takes fewer registers.
    """
    tile, head_dim = stored.shape
    width = math.gcd(head_dim, 64)
    layout = _conversion_layout(width)

    def convert(kept: tuple[jax.Array, jax.Array] | None) -> None:
        @_each(tile // piece_rows, unroll)
        def _(part: Any) -> None:
            first = part * piece_rows
            factors = None
            if scales is not None:
                assert scaled_rows is not None
                row_layout = layout.reduce(1)
                factors = load_scales(scales, first, piece_rows, copy_rows, row_layout)
                is_scaled = _is_within(factors.shape, first, scaled_rows, row_layout)
                factors = jnp.where(is_scaled, factors, 1.0)

            @_each(head_dim // width, unroll)
            def _(column: Any) -> None:
                piece = pl.ds(first, piece_rows), pl.ds(column * width, width)
                x = load(stored.at[piece], layout)
                x = _numbers(x, numbers.dtype, factors, layout)
                if kept is not None:
                    is_kept = _is_within(x.shape, first, kept, layout)
                    x = jnp.where(is_kept, x, jnp.zeros_like(x))
                numbers[piece] = x

    if rows is None or not jnp.issubdtype(stored.dtype, jnp.floating):
        convert(None)
    else:
        is_edge = (rows[0] > 0) | (rows[1] < tile)
        pl.when(is_edge)(lambda: convert(rows))
        pl.when(jnp.logical_not(is_edge))(lambda: convert(None))


def _each(count: int, unroll: bool) -> Callable[[Callable[[Any], None]], None]:
    """Returns a decorator that runs a function of 0, 1, ... count - 1, as a loop or in a row."""

    def run(body: Callable[[Any], None]) -> None:
        if unroll:
            for i in range(count):
                body(i)
        else:
            pl.loop(0, count)(body)

    return run


def _numbers(stored: jax.Array, dtype: Any, factors: jax.Array | None, layout: Any) -> jax.Array:
    """Returns `stored`, [rows, width], in `dtype`, times the rows' factors if given.

    In steps that the hardware has: int8 becomes bfloat16 in a few operations on bits, and
    float8_e4m3fn float16, whose way to bfloat16 leads over float32.
    """
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        stored = stored.astype(jnp.bfloat16)
    elif factors is None and dtype == jnp.float16:
        return stored.astype(jnp.float16)
    if factors is None and stored.dtype == dtype:
        return stored
    x = stored.astype(jnp.float32)
    if factors is not None:
        x *= plgpu.layout_cast(across(factors, x.shape), layout)
    return x.astype(dtype)


def _conversion_layout(width: int) -> Any:
    """Returns a layout of [64, width] numbers: a row's lie in neighbouring threads.

    So both the reads of packed rows and the writes of swizzled ones are of whole lines.
    """
    lanes = width // _VECTOR
    rows = _LANES // lanes
    tiling = plgpu.Tiling(((WARPS * rows, width), (rows, width), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)
