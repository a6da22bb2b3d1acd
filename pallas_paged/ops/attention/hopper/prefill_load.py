"""The warpgroups of the sm_90a prefill kernel that bring queries, keys and values.

One keeps a queue of steps full that the computing warpgroups read. Of a quantised cache it keeps
two: bytes that arrive, and the numbers that it makes of them. That takes a warpgroup longer than
the products take; there may be a second one then, for the values, and the first has the keys.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    Barriers,
    Inputs,
    Problem,
    Smem,
    Tiles,
    TilesBarriers,
)
from pallas_paged.ops.attention.hopper.prefill_walk import (
    Tile,
    num_own_tiles,
    over_own_tiles,
    read_tile,
)
from pallas_paged.ops.attention.hopper.quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scale_pitch,
)
from pallas_paged.ops.attention.hopper.tiles import ROW_LAYOUT, WARPS


def bring(problem: Problem, inputs: Inputs, smem: Smem, barriers: Barriers) -> None:
    """Fills shared memory with q, and stage after stage with keys and values, or one of them."""
    loader = lax.axis_index("warpgroup") - COMPUTE_WARPGROUPS
    if problem.is_quantised:
        num_steps = _load_and_convert(problem, loader, inputs, smem, barriers)
    else:
        num_steps = _load_numbers(problem, inputs, smem, barriers)

    turns = 2 * num_steps
    first = jnp.maximum(turns - 2 * problem.stages, 0)

    @pl.loop(first + loader, turns, step=problem.loaders)
    def _(turn: Any) -> None:
        """Hears all that the others say, so that no barrier is left in the middle of a phase."""
        plgpu.barrier_wait(barriers.tiles.consumed.at[lax.rem(turn, 2 * problem.stages)])


def _load_queries(
    problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers, part: int
) -> None:
    """Starts the copies of a part of the columns, when there is room for it."""
    tokens, (begin, width) = problem.tokens, problem.staged_columns[part]

    def wait() -> None:
        plgpu.barrier_wait(barriers.staging_free)

    wait() if part > 0 else pl.when(tile.number > 0)(wait)

    @pl.loop(0, problem.group + jnp.minimum(tile.key_end, 0))
    def _(head: Any) -> None:
        q = inputs.q.at[:, tile.kv_head * problem.group + head, pl.ds(begin, width)]
        plgpu.copy_gmem_to_smem(
            q.at[pl.ds(tile.first_token, tokens)],
            smem.staging.at[pl.ds(head * tokens, tokens)],
            barriers.q,
        )


def _load_other_queries(
    problem: Problem, tile: Tile, turn: Any, inputs: Inputs, smem: Smem, barriers: Barriers
) -> None:
    """Loads what `_load_queries` has left, after a turn of the tile behind which it would wait.

    The computing warpgroups take these parts at the end of the tile before. Until then the first
    keys and values are on their way, as many as there are places for.
    """
    if len(problem.staged_columns) == 1:
        return
    last = 2 * jnp.minimum(tile.num_steps, problem.stages) - problem.loaders

    @pl.when(turn == last)
    def _() -> None:
        for part in range(1, len(problem.staged_columns)):
            _load_queries(problem, tile, inputs, smem, barriers, part)


def _load_numbers(problem: Problem, inputs: Inputs, smem: Smem, barriers: Barriers) -> Any:
    """Returns how many steps it has loaded."""
    tiles, rows = smem.tiles, problem.block_rows

    def load_tile(tile: Tile, carried: None) -> None:
        _load_queries(problem, tile, inputs, smem, barriers, 0)

        @pl.loop(tile.begin, tile.end)
        def _(step: Any) -> None:
            for what, cache in enumerate((inputs.cache.k, inputs.cache.v)):
                turn = 2 * tile.in_line(step) + what
                slot = lax.rem(turn, 2 * problem.stages)
                _wait_until_consumed(problem, turn, barriers.tiles)
                copies = ((cache, tiles.numbers.at[slot], rows),)
                filled = barriers.tiles.filled.at[slot]
                _copy_blocks(problem, tile, inputs, step, copies, filled)
            turn = 2 * (step - tile.begin) + 1
            _load_other_queries(problem, tile, turn, inputs, smem, barriers)

    return over_own_tiles(problem, inputs, load_tile)[0]


class _Place(NamedTuple):
    """What is to be requested next of a quantised cache."""

    number: Any  # of the thread block's tile
    turn: Any  # within the tile


def _load_and_convert(
    problem: Problem, loader: Any, inputs: Inputs, smem: Smem, barriers: Barriers
) -> Any:
    """One loop takes keys and values in turn: two sets of addresses are too many registers.

    Of two loaders each takes every second turn, and so the places of one kind. What is converted is
    requested as many turns ahead as there are places, across the borders of tiles. Returns how many
    steps all tiles have.
    """
    slots, num_tiles = 2 * problem.tuning.stages, num_own_tiles(problem, inputs)

    def request(turn: Any, place: _Place) -> _Place:
        return lax.cond(
            place.number < num_tiles,
            lambda: _request(problem, place, lax.rem(turn, slots), inputs, smem, barriers),
            lambda: place,
        )

    def convert_tile_of(tile: Tile, place: _Place) -> _Place:
        if problem.loaders > 1:
            pl.when(loader == 0)(lambda: _load_queries(problem, tile, inputs, smem, barriers, 0))
        else:
            _load_queries(problem, tile, inputs, smem, barriers, 0)

        def one_turn(i: Any, place: _Place) -> _Place:
            in_tile = i * problem.loaders + loader
            turn = 2 * tile.in_line(tile.begin) + in_tile
            plgpu.barrier_wait(barriers.tiles.arrived.at[lax.rem(turn, slots)])
            _wait_until_consumed(problem, turn, barriers.tiles)
            _convert(problem, tile, smem.tiles, turn)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers.tiles.filled.at[lax.rem(turn, 2 * problem.stages)])
            place = request(turn + slots, place)
            _load_other_queries(problem, tile, in_tile, inputs, smem, barriers)
            return place

        return lax.fori_loop(0, tile.turns // problem.loaders, one_turn, place)

    def first_request(i: Any, place: _Place) -> _Place:
        return request(i * problem.loaders + loader, place)

    place = _Place(jnp.int32(0), loader)
    place = lax.fori_loop(0, slots // problem.loaders, first_request, place)
    num_steps, _ = over_own_tiles(problem, inputs, convert_tile_of, place)
    return num_steps


def _request(
    problem: Problem, place: _Place, slot: Any, inputs: Inputs, smem: Smem, barriers: Barriers
) -> _Place:
    """Starts the copies of stored keys or values; returns the place after it."""
    rows, cache, tiles = problem.block_rows, inputs.cache, smem.tiles
    tile = read_tile(problem, inputs, place.number)
    for what, (stored, scales) in enumerate(((cache.k, cache.k_scale), (cache.v, cache.v_scale))):
        copies = (
            (stored, tiles.stored.at[slot], rows),
            (scales, tiles.stored_scales.at[slot], scale_pitch(rows)),
        )
        pl.when(lax.rem(place.turn, 2) == what)(
            functools.partial(
                _copy_blocks,
                problem,
                tile,
                inputs,
                tile.begin + place.turn // 2,
                copies,
                barriers.tiles.arrived.at[slot],
            )
        )
    turn = place.turn + problem.loaders
    is_last = turn >= tile.turns
    return _Place(
        jnp.where(is_last, place.number + 1, place.number),
        jnp.where(is_last, turn - tile.turns, turn),
    )


def _convert(problem: Problem, tile: Tile, tiles: Tiles, turn: Any) -> None:
    """Makes the numbers and the scales of a turn that are multiplied.

    Those of values that are not the tile's become 0. Of keys nothing does: what comes of a key that
    no token sees is masked.
    """
    slot, stored_slot = lax.rem(turn, 2 * problem.stages), lax.rem(turn, 2 * problem.tuning.stages)
    stored, scales = tiles.stored.at[stored_slot], tiles.stored_scales.at[stored_slot]
    numbers, copy_rows, size = tiles.numbers.at[slot], problem.block_rows, problem.tuning.tile_keys
    first_key = (turn // 2 - tile.offset) * size
    is_key = lax.rem(turn, 2) == 0
    rows = (
        jnp.where(is_key, 0, tile.key_begin - first_key),
        jnp.where(is_key, size, tile.key_end - first_key),
    )
    convert_tile(
        stored,
        numbers,
        rows=rows,
        scales=scales if problem.scales_values else None,
        copy_rows=copy_rows,
        scaled_rows=(rows[0], jnp.where(is_key, 0, rows[1])),
        piece_rows=problem.piece_rows,
        unroll=False,
    )
    factors = load_scales(scales, 0, size, copy_rows, ROW_LAYOUT)
    factors *= jnp.where(is_key, problem.logits_factor, 1.0)
    tiles.scales[slot] = masked_scales(factors, 0, rows, ROW_LAYOUT)


def _wait_until_consumed(problem: Problem, turn: Any, barriers: TilesBarriers) -> None:
    """Waits for the turn that had the slot of `turn` before."""
    slots = 2 * problem.stages

    @pl.when(turn >= slots)
    def _() -> None:
        plgpu.barrier_wait(barriers.consumed.at[lax.rem(turn, slots)])


def _copy_blocks(
    problem: Problem,
    tile: Tile,
    inputs: Inputs,
    step: Any,
    copies: tuple[tuple[Any, Any, int], ...],
    arrived: Any,
) -> None:
    """Starts the copies of a step's blocks; begins when all of the warpgroup is here.

    Args:
      problem, tile, inputs: of the kernel.
      step: number of the step.
      copies: (an array of the cache, the buffer, how far the blocks lie apart there).
      arrived: the barrier, one arrival per copy of a block.
    """
    rows = problem.block_rows
    num_pieces = problem.tuning.tile_keys // rows
    pieces_per_block = problem.block_size // rows
    last_block = jnp.maximum(tile.key_end - 1, 0) // problem.block_size

    @plgpu.warp_map
    def _(warp: Any) -> None:
        def copy(i: Any) -> None:
            # Behind the last block the table may end: bring that one again. All keys outside
            # [key_begin, key_end) are masked.
            piece = step * num_pieces + i
            block = jnp.minimum(piece // pieces_per_block, last_block)
            page = inputs.block_tables[tile.sequence, block]
            begin = lax.rem(piece, pieces_per_block) * rows
            for cache, buffer, pitch in copies:
                plgpu.copy_gmem_to_smem(
                    cache.at[page, tile.kv_head, pl.ds(begin, rows)],
                    buffer.at[pl.ds(i * pitch, rows)],
                    arrived,
                )

        for round_begin in range(0, num_pieces, WARPS):
            is_whole = round_begin + WARPS <= num_pieces
            once = functools.partial(copy, round_begin + warp)
            once() if is_whole else pl.when(round_begin + warp < num_pieces)(once)
