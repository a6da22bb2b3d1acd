"""Quantised keys and values inside the sm_80 kernel: how tiles of them become 16-bit numbers.

Stored bytes arrive by cp.async, so that a quantised cache moves half the bytes. In registers they
turn into numbers, and these go to a tile in shared memory, from where the tensor cores take them
like those of any other cache. These chips do not convert int8 to 16 bits at a useful rate, and
float8_e4m3fn only from sm_89 on, so integer operations put the bits where they belong. What comes
out is exact, and what is stored times `unit`: float16 then needs no further operation, and the
scales absorb it.

No code of a byte becomes NaN or infinite: what is not used is harmless as soon as its weight is 0.
NaN in what is used has an infinite scale (`quantisation.py`).

The scales join in float32: those of keys multiply the products, those of values the weights, before
these are rounded. With float16 such a product must neither vanish nor overflow. `1 / unit` makes it
at most 0.51 (int8) or 0.58 (float8_e4m3fn) of the largest magnitude of the value's row, which is a
float16 number if scales are those of `quantise`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.problem import StepProblem
from pallas_paged.ops.mosaic_gpu import load

_PIECE_ROWS = 64


def convert_tile(problem: StepProblem, stored: Any, numbers: Any) -> None:
    """Writes the numbers of a tile `stored` [T, D], times `problem.unit`, to `numbers` [T, D].

    Both are in shared memory. In the layout of copies to the latter, which writes whole lines.
    """
    tile_rows = stored.shape[0]
    rows = min(_PIECE_ROWS, tile_rows)
    for first in range(0, tile_rows, rows):
        for chunk in problem.chunks:
            piece = pl.ds(first, rows), chunk
            layout = plgpu.Layout.SMEM_GMEM_COPY(
                (rows, chunk.size), jnp.dtype(problem.dtype), problem.number_swizzle
            )
            x = load(stored.at[piece], layout)
            numbers[piece] = to_numbers(x, problem.dtype)


def to_numbers(stored: jax.Array, dtype: Any) -> jax.Array:
    """Returns `stored`, int8 or float8_e4m3fn, times `unit` of the two dtypes, in `dtype`."""
    is_half = jnp.dtype(dtype) == jnp.float16
    if stored.dtype == jnp.int8:
        bits = stored.astype(jnp.int16)
        if is_half:
            # Above 16 a unit in the last place is 2^-6; 128 of them keep the byte positive.
            raised = (bits & _bits(0xFF)) ^ _bits(0x4C80)
            return lax.bitcast_convert_type(raised, jnp.float16) - jnp.float16(18)
        # Above 128 a unit is 1, and the next power of two stands one bit further: 128 or 256.
        low = lax.bitcast_convert_type((bits & _bits(0x7F)) | _bits(0x4300), jnp.bfloat16)
        high = lax.bitcast_convert_type((bits & _bits(0x80)) | _bits(0x4300), jnp.bfloat16)
        return low - high
    # The sign, which the extension repeats, and 4 bits of exponent in a field of 5 or of 8.
    bits = lax.bitcast_convert_type(stored, jnp.int8).astype(jnp.int16)
    if is_half:
        moved = (bits * jnp.int16(1 << 7)) & _bits(0xBFFF)
        return lax.bitcast_convert_type(moved, jnp.float16)
    moved = (bits * jnp.int16(1 << 4)) & _bits(0x87F0)
    return lax.bitcast_convert_type(moved, jnp.bfloat16) * jnp.bfloat16(2.0**120)


def load_scales(problem: StepProblem, scales: Any, first: Any) -> jax.Array:
    """Returns the scales of a piece's keys, one for each column of a product.

    Args:
      problem: the problem.
      scales: f32[S], those of a block and head, in global memory.
      first: the piece's first key in the block.
    """
    return load(scales.at[pl.ds(first, problem.piece_keys)], problem.layout("ACC").reduce(0))


def value_factors(
    problem: StepProblem, scales: jax.Array, first: Any, valid: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Returns what to multiply the weights of a piece's values by, one number for each column.

    0 for keys outside of `valid`: there may be NaN, which a weight of 0 does not get rid of.

    Args:
      problem: the problem.
      scales: of the values.
      first: the first key's place in the tile.
      valid: begin and end of what a tile has.
    """
    columns = problem.layout("ACC").reduce(0)
    keys = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=columns) + first
    is_valid = (keys >= valid[0]) & (keys < valid[1])
    return jnp.where(is_valid, scales * (1.0 / problem.unit), 0.0)


def _bits(pattern: int) -> jax.Array:
    return jnp.int16(pattern - ((pattern & 0x8000) << 1))
