"""The warpgroup of the sm_90a prefill kernel that brings queries, keys and values.

It keeps a queue of steps full that the computing warpgroups read. Of a quantised cache it keeps
two: bytes that arrive, and the numbers that it makes of them.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.mosaic_gpu_prefill_parts import (
    Barriers,
    Inputs,
    Problem,
    Smem,
    Tile,
    Tiles,
)
from pallas_paged.ops.attention.mosaic_gpu_quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scale_pitch,
)

_WARPS = 4
_ROW = plgpu.Layout.WGMMA.reduce(1)


def load(problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers) -> None:
    """Fills shared memory with q, and stage after stage with keys and values."""
    _load_queries(problem, tile, inputs, smem, barriers)
    if problem.is_quantised:
        _load_and_convert(problem, tile, inputs, smem, barriers)
    else:
        _load_numbers(problem, tile, inputs, smem, barriers)

    @pl.loop(jnp.maximum(tile.begin, tile.end - problem.stages), tile.end)
    def _(step: Any) -> None:
        """Hears all that the others say, so that no barrier is left in the middle of a phase."""
        slot = lax.rem(step - tile.begin, problem.stages)
        plgpu.barrier_wait(barriers.k.consumed.at[slot])
        plgpu.barrier_wait(barriers.v.consumed.at[slot])


def _load_queries(
    problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers
) -> None:
    tokens = problem.tokens
    for begin, width in problem.staged_columns:
        if begin > 0:
            plgpu.barrier_wait(barriers.staging_free)

        @pl.loop(0, problem.group + jnp.minimum(tile.key_end, 0))
        def _(head: Any, begin: int = begin, width: int = width) -> None:
            q = inputs.q.at[:, tile.kv_head * problem.group + head, pl.ds(begin, width)]
            plgpu.copy_gmem_to_smem(
                q.at[pl.ds(tile.first_token, tokens)],
                smem.staging.at[pl.ds(head * tokens, tokens)],
                barriers.q,
            )


def _load_numbers(
    problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers
) -> None:
    rows = problem.block_rows

    @pl.loop(tile.begin, tile.end)
    def _(step: Any) -> None:
        slot = lax.rem(step - tile.begin, problem.stages)
        for cache, tiles, said in (
            (inputs.cache.k, smem.k, barriers.k),
            (inputs.cache.v, smem.v, barriers.v),
        ):
            _wait_until_consumed(problem, tile, step, said.consumed)
            copies = ((cache, tiles.numbers.at[slot], rows),)
            _copy_blocks(problem, tile, inputs, step, copies, said.filled.at[slot])


def _load_and_convert(
    problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers
) -> None:
    size, rows, stages = problem.tuning.tile_keys, problem.block_rows, problem.tuning.stages
    cache = inputs.cache
    queues = (
        (cache.k, cache.k_scale, smem.k, barriers.k),
        (cache.v, cache.v_scale, smem.v, barriers.v),
    )

    def request(step: Any, stored: Any, scales: Any, tiles: Tiles, arrived: Any) -> None:
        slot = lax.rem(step - tile.begin, stages)
        copies = (
            (stored, tiles.stored.at[slot], rows),
            (scales, tiles.stored_scales.at[slot], scale_pitch(rows)),
        )
        _copy_blocks(problem, tile, inputs, step, copies, arrived.at[slot])

    @pl.loop(tile.begin, jnp.minimum(tile.begin + stages, tile.end))
    def _(step: Any) -> None:
        for stored, scales, tiles, said in queues:
            request(step, stored, scales, tiles, said.arrived)

    @pl.loop(tile.begin, tile.end)
    def _(step: Any) -> None:
        stored_slot = lax.rem(step - tile.begin, stages)
        slot = lax.rem(step - tile.begin, problem.stages)
        first_key = step * size
        ours = tile.key_begin - first_key, tile.key_end - first_key
        for (stored, scales, tiles, said), wanted in zip(queues, (None, ours), strict=True):
            plgpu.barrier_wait(said.arrived.at[stored_slot])
            _wait_until_consumed(problem, tile, step, said.consumed)
            _convert(problem, tiles, stored_slot, slot, wanted)
            plgpu.commit_smem()
            plgpu.barrier_arrive(said.filled.at[slot])

            @pl.when(step + stages < tile.end)
            def _(
                stored: Any = stored, scales: Any = scales, tiles: Tiles = tiles, said: Any = said
            ) -> None:
                request(step + stages, stored, scales, tiles, said.arrived)


def _convert(
    problem: Problem, tiles: Tiles, stored_slot: Any, slot: Any, rows: tuple[Any, Any] | None
) -> None:
    """Makes the numbers and the scales of a step that are multiplied.

    Those of values outside [begin, end) = `rows` become 0. Of keys, None, nothing does: what comes
    of a key that no token sees is masked.
    """
    stored, scales = tiles.stored.at[stored_slot], tiles.stored_scales.at[stored_slot]
    numbers, copy_rows = tiles.numbers.at[slot], problem.block_rows
    if tiles.scales is None:
        convert_tile(stored, numbers, rows=rows, scales=scales, copy_rows=copy_rows, unroll=False)
        return
    convert_tile(stored, numbers, rows=rows, unroll=False)
    factors = load_scales(scales, 0, problem.tuning.tile_keys, copy_rows, _ROW)
    tiles.scales[slot] = factors if rows is None else masked_scales(factors, 0, rows, _ROW)


def _wait_until_consumed(problem: Problem, tile: Tile, step: Any, consumed: Any) -> None:
    """Waits for the step that had the slot of `step` before."""

    @pl.when(step - tile.begin >= problem.stages)
    def _() -> None:
        plgpu.barrier_wait(consumed.at[lax.rem(step - tile.begin, problem.stages)])


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
    last_block = (tile.key_end - 1) // problem.block_size

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

        for round_begin in range(0, num_pieces, _WARPS):
            is_whole = round_begin + _WARPS <= num_pieces
            once = functools.partial(copy, round_begin + warp)
            once() if is_whole else pl.when(round_begin + warp < num_pieces)(once)
