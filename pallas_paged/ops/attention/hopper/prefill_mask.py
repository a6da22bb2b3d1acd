"""Values of the sm_90a prefill kernel that no token of the tile may see: they become 0."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    WARPGROUP_ROWS,
    Problem,
    meet,
)
from pallas_paged.ops.attention.hopper.prefill_walk import Tile
from pallas_paged.ops.attention.hopper.tiles import ROW_LAYOUT, TILE_LAYOUT, iota
from pallas_paged.ops.attention.online_softmax import across


def mask_values(problem: Problem, tile: Tile, step: Any, values: Any, pair: Any) -> None:
    """Puts 0 where `values`, [C, D] in shared memory, has no value of this tile's.

    There may be NaN, and the weight 0 does not get rid of that.
    """
    size = problem.tuning.tile_keys
    begin = step * size
    is_edge = (begin < tile.key_begin) | (begin + size > tile.key_end)

    @pl.when(is_edge)
    def _() -> None:
        warpgroup = lax.axis_index("warpgroup")
        for part in range(size // WARPGROUP_ROWS):

            @pl.when(warpgroup == part % COMPUTE_WARPGROUPS)
            def _(part: int = part) -> None:
                rows = pl.ds(part * WARPGROUP_ROWS, WARPGROUP_ROWS)
                key = iota((WARPGROUP_ROWS,), 0, ROW_LAYOUT) + (begin + part * WARPGROUP_ROWS)
                is_ours = (key >= tile.key_begin) & (key < tile.key_end)
                for column, width in problem.staged_columns:  # few registers are left
                    some = values.at[rows, pl.ds(column, width)]
                    old = plgpu.load(some, layout=TILE_LAYOUT)
                    some[...] = jnp.where(across(is_ours, old.shape), old, jnp.zeros_like(old))

        plgpu.commit_smem()
        meet(pair)
