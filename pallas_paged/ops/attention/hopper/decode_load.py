"""How the sm_90a decode kernel brings tiles: one copy per block of the paged cache, by TMA.

A ring of `num_stages` tiles is loaded ahead, across the borders of items.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.decode_parts import Cta, read_item
from pallas_paged.ops.attention.hopper.quantised import scale_pitch
from pallas_paged.ops.attention.hopper.tiles import WARPS


class Place(NamedTuple):
    """A tile in the line of tiles: the next one to load."""

    item: jax.Array
    tile: jax.Array  # within the item


def load_first(cta: Cta) -> Place:
    """Starts the copies of as many tiles as fit; returns the place after them."""
    return lax.fori_loop(
        0,
        jnp.minimum(cta.num_tiles, cta.config.num_stages),
        lambda step, place: load_tile(cta, step, place),
        Place(cta.first_item, cta.first_tile),
    )


def load_tile(cta: Cta, step: jax.Array, place: Place) -> Place:
    """Starts the copies of the share's tile number `step`; returns the place after it."""
    problem, tile_size = cta.problem, cta.config.tile
    num_copies, copy_rows = problem.copies(tile_size)
    item = read_item(problem, cta.inputs.work.sequences, place.item)
    tile_index = item.first_tile + place.tile
    first_block = lax.div(tile_index * tile_size, jnp.int32(problem.block_size))
    last_block = lax.div(item.length - 1, jnp.int32(problem.block_size))
    # A block larger than a tile is read in parts. The compiler has to see that each begins at a
    # multiple of the swizzle tile's rows: an index times a constant.
    tiles_per_block = max(problem.block_size // tile_size, 1)
    begin = lax.rem(tile_index, jnp.int32(tiles_per_block)) * copy_rows
    is_first = (step == 0) | (place.tile == 0)
    slot, q_slot = cta.slot(step), cta.q_slot(place.item - cta.first_item)

    # Four warps issue the copies of four blocks, one arrival each. The warpgroup meets at the
    # beginning: what the slot held before has been read by all of it.
    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for round_ in range(-(-num_copies // WARPS)):
            i = round_ * WARPS + warp

            @pl.when(i < num_copies)
            def _(i: jax.Array = i) -> None:
                # Behind the last block the same one again: masked, but never out of bounds.
                index = jnp.minimum(first_block + i, last_block)
                block = cta.inputs.block_tables[item.row, index]
                _copy_block(cta, slot, i, block, item.head, begin)

        @pl.when(is_first & (warp == WARPS - 1))
        def _() -> None:
            plgpu.copy_gmem_to_smem(
                cta.inputs.q.at[problem.query_rows(item.query_row, item.head)],
                cta.smem.q.at[q_slot],
                cta.barriers.q.at[q_slot],
            )

    is_last = place.tile + 1 == item.num_tiles
    return Place(
        jnp.where(is_last, place.item + 1, place.item), jnp.where(is_last, 0, place.tile + 1)
    )


def _copy_block(
    cta: Cta, slot: jax.Array, i: jax.Array, block: jax.Array, head: jax.Array, begin: jax.Array
) -> None:
    """Starts the copies of a block's rows from `begin` on, the `i`-th ones of a slot's tile."""
    problem, smem, barriers = cta.problem, cta.smem, cta.barriers
    cache: Any = cta.inputs.cache
    _, copy_rows = problem.copies(cta.config.tile)
    plgpu.copy_gmem_to_smem(
        cache.k.at[block, head, pl.ds(begin, copy_rows)],
        smem.k.arriving.at[slot, pl.ds(i * copy_rows, copy_rows)],
        barriers.k.at[slot],
    )
    rows = problem.value_copy_rows(cta.config.tile)
    for first in range(0, copy_rows, rows):
        columns = pl.ds(0, problem.head_dim)
        plgpu.copy_gmem_to_smem(
            cache.v.at[block, head, pl.ds(begin + first, rows)],
            smem.v.arriving.at[slot, pl.ds(i * copy_rows + first, rows), columns],
            barriers.v.at[slot],
        )
    if problem.is_quantised:
        scales_at = pl.ds(i * scale_pitch(copy_rows), copy_rows)
        plgpu.copy_gmem_to_smem(
            cache.k_scale.at[block, head, pl.ds(begin, copy_rows)],
            smem.k.scales.at[slot, scales_at],
            barriers.k.at[slot],
        )
        plgpu.copy_gmem_to_smem(
            cache.v_scale.at[block, head, pl.ds(begin, copy_rows)],
            smem.v.scales.at[slot, scales_at],
            barriers.v.at[slot],
        )
