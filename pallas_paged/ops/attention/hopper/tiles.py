"""Matrices of 64 rows in the sm_90a kernels: their layouts in registers, and their products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.online_softmax import across, along

WARPS = 4
"""Of a warpgroup."""

TILE_LAYOUT = plgpu.Layout.WGMMA
"""Of [64 * m, N]: what the tensor cores leave in registers."""
ROW_LAYOUT = TILE_LAYOUT.reduce(1)
"""Of [64 * m], one number per row."""
COLUMN_LAYOUT = TILE_LAYOUT.reduce(0)
"""Of [N], one number per column."""


def product(left: Any, right: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """Returns the float32 product of two matrices in shared memory, after waiting for it.

    `meanwhile` runs before the wait, and must not write to the two.
    """

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        meanwhile()
        return accumulator[...]

    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def as_column(vector: jax.Array) -> jax.Array:
    """Returns [N] in the layout of one number per column."""
    return plgpu.layout_cast(vector, COLUMN_LAYOUT)


def spread_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns one number per row, [M], as [M, N], and states the layout: see `spread_columns`."""
    return plgpu.layout_cast(across(vector, shape), TILE_LAYOUT)


def spread_columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [N] as [M, N]. Stating layouts here keeps the compiler's search for them short."""
    return plgpu.layout_cast(along(vector, shape), TILE_LAYOUT)


def iota(shape: tuple[int, ...], dimension: int, layout: Any = TILE_LAYOUT) -> jax.Array:
    """Returns 0, 1, 2, ... along a dimension, of i32 in a layout."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)
