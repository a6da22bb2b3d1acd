"""The sm_90a decode kernel: one to eight query tokens per sequence, keys in blocks.

The tensor cores multiply tiles of 64 rows, and a decode step has a few query rows per KV head. So
the operands change sides: keys and values give the rows, which fill 64 anyway, and queries the
columns. With N query columns (the heads of the group, token after token, padded to 8), a tile of T
keys and head_dim D:

    S^T[T, N] = K[T, D] Q^T[D, N]        one product per tile
    P^T[T, N] = softmax over T, online, float32 and base 2
    O^T[D, N] = O^T * correction + V^T[D, T] P^T[T, N]

One warpgroup is a CTA, and a few CTAs share an SM: while one waits for its reduction another one
multiplies. Each CTA walks along its share of the work list (`work_list.py`); a ring of
`num_stages` tiles is loaded ahead of it by TMA, one copy per block of the paged cache and across
the borders of items, so that short sequences stream like long ones. A result is written where it
belongs if the CTA has seen all of the item's keys, else as a partial result that another kernel
combines (`decode_merge.py`).

What the interpreter cannot see (it takes a warpgroup for one thread) is noted where it matters:
`commit_smem` between writes to shared memory and the tensor core or TMA that reads them, and the
barriers of the warpgroup before a tile that all four warps have read is loaded anew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.decode_parts import (
    Outputs,
    empty,
    finish,
    per_column,
    sequence_and_head,
    write,
    write_padding,
)
from pallas_paged.ops.attention.hopper.decode_problem import Barriers, DecodeProblem, Smem
from pallas_paged.ops.attention.hopper.quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scale_pitch,
    scales_values,
)
from pallas_paged.ops.attention.hopper.tiles import (
    ROW_LAYOUT,
    TILE_LAYOUT,
    WARPS,
    as_column,
    iota,
    product,
    spread_columns,
    spread_rows,
)
from pallas_paged.ops.attention.online_softmax import LOG2E, State, capped, logits_factor, raised
from pallas_paged.ops.attention.smem import zero_rows
from pallas_paged.ops.attention.work_list import CtaField, Parts, SequenceField, WorkList
from pallas_paged.ops.mosaic_gpu import store


class Inputs(NamedTuple):
    """What the kernel reads, in global memory."""

    q: Any  # [R, Hk, N, D]
    cache: KVCache
    block_tables: Any  # i32[B, M]
    work: WorkList
    slopes: Any  # f32[Hq], or None
    sinks: Any  # f32[Hq], or None


def decode_kernel(
    problem: DecodeProblem,
    config: DecodeConfig,
    inputs: Inputs,
    outputs: Outputs,
    parts: Parts,
    *,
    smem: Smem,
    barriers: Barriers,
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    cache: Any = inputs.cache  # of references
    sequences, ctas, num_tokens = inputs.work
    stages, tile_size, columns = config.num_stages, config.tile, problem.columns
    value_rows, window = problem.value_rows, problem.sliding_window
    # Rows of O^T per product: all of them, as long as they leave registers for the rest.
    chunk = value_rows if value_rows * columns <= 4096 else 64
    unroll = columns <= 16  # many columns leave few registers for conversion
    num_copies, copy_rows = problem.copies(tile_size)
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first_item, num_items, first_tile, num_tiles = (
        ctas[cta, field]
        for field in (
            CtaField.FIRST_ITEM,
            CtaField.NUM_ITEMS,
            CtaField.FIRST_TILE,
            CtaField.NUM_TILES,
        )
    )

    def load(step: jax.Array, item: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Starts the copies of the share's tile number `step`; returns the place after it."""
        slot = lax.rem(step, jnp.int32(stages))
        sequence, head = sequence_and_head(problem, item)
        row = sequences[sequence, SequenceField.ROW]
        tile_index = sequences[sequence, SequenceField.FIRST_TILE] + tile
        first_block = lax.div(tile_index * tile_size, jnp.int32(problem.block_size))
        length = sequences[sequence, SequenceField.LENGTH]
        last_block = lax.div(length - 1, jnp.int32(problem.block_size))
        # A block larger than a tile is read in parts. The compiler has to see that each begins at a
        # multiple of the swizzle tile's rows: an index times a constant.
        tiles_per_block = max(problem.block_size // tile_size, 1)
        part = lax.rem(tile_index, jnp.int32(tiles_per_block))
        is_first = (step == 0) | (tile == 0)
        q_slot = lax.rem(item - first_item, jnp.int32(stages + 1))

        # Four warps issue the copies of four blocks, one arrival each. The warpgroup meets at the
        # beginning: what the slot held before has been read by all of it.
        @plgpu.warp_map
        def _(warp: jax.Array) -> None:
            for round_ in range(-(-num_copies // WARPS)):
                i = round_ * WARPS + warp

                @pl.when(i < num_copies)
                def _(i: jax.Array = i) -> None:
                    # Behind the last block the same one again: masked, but never out of bounds.
                    block = inputs.block_tables[row, jnp.minimum(first_block + i, last_block)]
                    begin = part * copy_rows
                    plgpu.copy_gmem_to_smem(
                        cache.k.at[block, head, pl.ds(begin, copy_rows)],
                        smem.k.arriving.at[slot, pl.ds(i * copy_rows, copy_rows)],
                        barriers.k.at[slot],
                    )
                    rows = problem.value_copy_rows(tile_size)
                    for first in range(0, copy_rows, rows):
                        columns_read = pl.ds(0, problem.head_dim)
                        plgpu.copy_gmem_to_smem(
                            cache.v.at[block, head, pl.ds(begin + first, rows)],
                            smem.v.arriving.at[
                                slot, pl.ds(i * copy_rows + first, rows), columns_read
                            ],
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

            @pl.when(is_first & (warp == WARPS - 1))
            def _() -> None:
                plgpu.copy_gmem_to_smem(
                    inputs.q.at[sequences[sequence, problem.query_row], head],
                    smem.q.at[q_slot],
                    barriers.q.at[q_slot],
                )

        is_last = tile + 1 == sequences[sequence, SequenceField.NUM_TILES]
        return jnp.where(is_last, item + 1, item), jnp.where(is_last, 0, tile + 1)

    place = lax.fori_loop(
        0,
        jnp.minimum(num_tiles, stages),
        lambda step, place: load(step, *place),
        (first_item, first_tile),
    )

    def one_item(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        item_step, *place = carry
        sequence, head = sequence_and_head(problem, first_item + index)
        first_index = sequences[sequence, SequenceField.FIRST_TILE]
        length = sequences[sequence, SequenceField.LENGTH]
        query_tokens = sequences[sequence, SequenceField.NUM_TOKENS]
        item_tiles = sequences[sequence, SequenceField.NUM_TILES]
        begin = jnp.where(index == 0, first_tile, 0)
        end = jnp.minimum(item_tiles, begin + num_tiles - item_step)
        first_position = length - query_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        slopes = None
        if inputs.slopes is not None:
            slopes = per_column(problem, inputs.slopes, head)
        q_slot = lax.rem(index, jnp.int32(stages + 1))
        plgpu.barrier_wait(barriers.q.at[q_slot])

        def write_weights(weights: jax.Array) -> None:
            smem.weights.transpose((1, 0))[...] = plgpu.layout_cast(
                weights.astype(problem.dtype), TILE_LAYOUT
            )

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (first_index + tile) * tile_size  # of the tile's first key

            plgpu.barrier_wait(barriers.k.at[slot])
            tile_slot: Any = slot
            if problem.is_quantised:
                tile_slot = 0
                convert_tile(smem.k.stored.at[slot], smem.k.numbers.at[0], unroll=unroll)
                plgpu.commit_smem()
            queries = smem.q.at[q_slot].transpose((1, 0))
            logits = product(smem.k.numbers.at[tile_slot], queries)  # [T, N]
            if problem.is_quantised:
                scales = smem.k.scales.at[slot]
                scales = load_scales(scales, 0, tile_size, copy_rows, ROW_LAYOUT)
                logits *= spread_rows(scales, logits.shape)
            keys = iota(logits.shape, 0) + position
            positions = _query_positions(problem, logits.shape, first_position, length)
            logits = _transform(problem, logits, keys - positions, slopes)
            visible = keys <= positions
            if window is not None:
                visible &= keys > positions - window
            logits = jnp.where(visible, logits, -jnp.inf)

            maximum, correction = raised(state.maximum, logits.max(axis=0), as_column)  # [N]
            weights = jnp.exp2(logits - spread_columns(maximum, logits.shape))  # [T, N]
            denominator = state.denominator * correction + weights.sum(axis=0)
            # Every warp has been through the reductions since the last product read the weights.
            if not problem.is_quantised:
                write_weights(weights)
            plgpu.barrier_wait(barriers.v.at[slot])
            if problem.is_quantised:
                rows = first_key - position, length - position  # those that hold values of ours
                scales = smem.v.scales.at[slot]
                if scales_values(problem.dtype):
                    convert_tile(
                        smem.v.stored.at[slot],
                        smem.v.numbers.at[0],
                        rows=rows,
                        scales=scales,
                        copy_rows=copy_rows,
                        scaled_rows=rows,
                        unroll=unroll,
                    )
                else:
                    numbers = smem.v.numbers.at[0]
                    convert_tile(smem.v.stored.at[slot], numbers, rows=rows, unroll=unroll)
                    scales = load_scales(scales, 0, tile_size, copy_rows, ROW_LAYOUT)
                    scales = masked_scales(scales, 0, rows, ROW_LAYOUT)
                    weights *= spread_rows(scales, weights.shape)
                write_weights(weights)
            else:

                @pl.when((position + tile_size > length) | (position < first_key))
                def _() -> None:
                    values = smem.v.numbers.at[slot]
                    zero_rows(
                        values,
                        first_key - position,
                        length - position,
                        [pl.ds(column, 64) for column in range(0, value_rows, 64)],
                        lambda shape: TILE_LAYOUT,
                    )

            plgpu.commit_smem()  # weights and values, before the tensor core reads them
            numerator = []
            for i, some in enumerate(state.numerator):
                values = smem.v.numbers.at[tile_slot, :, pl.ds(i * chunk, chunk)]
                values = values.transpose((1, 0))
                added = product(values, smem.weights.transpose((1, 0)))  # [D, N]
                corrected = some * spread_columns(correction, some.shape)
                numerator.append(corrected + added)

            place = lax.cond(
                step + stages < num_tiles,
                lambda: load(step + stages, *place),
                lambda: tuple(place),
            )
            return State(tuple(numerator), maximum, denominator), step + 1, *place

        state = empty(value_rows, chunk, columns)
        state, step, *place = lax.fori_loop(begin, end, one_tile, (state, item_step, *place))
        is_whole = (begin == 0) & (end == item_tiles)

        @pl.when(is_whole)
        def _() -> None:
            write(
                problem,
                finish(problem, state, inputs.sinks, head),
                sequence,
                head,
                sequences,
                outputs,
                smem.results,
            )

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            values, lse = finish(problem, state, None, head)
            for i, value in enumerate(values):
                store(parts.values.at[part, pl.ds(i * chunk, chunk)], value)
            store(parts.lse.at[part], lse)

        return step, *place

    lax.fori_loop(0, num_items, one_item, (jnp.int32(0), *place))
    write_padding(problem, num_tokens[0], smem.results, outputs)
    plgpu.wait_smem_to_gmem(0)


def _query_positions(
    problem: DecodeProblem, shape: tuple[int, ...], first: jax.Array, length: jax.Array
) -> jax.Array:
    """Returns the position of each column's query token; the last one for tokens not there."""
    if problem.max_tokens == 1:
        return first
    token = lax.div(iota(shape, 1), jnp.int32(problem.group))
    return jnp.minimum(token + first, length - 1)


def _transform(
    problem: DecodeProblem, products: jax.Array, distance: jax.Array, slopes: jax.Array | None
) -> jax.Array:
    """Returns the logits, times log2(e), from the products of keys and queries."""
    cap = problem.logits_soft_cap
    logits = products * logits_factor(problem.scale, cap)
    if cap is not None:
        logits = capped(logits, cap)
    if slopes is not None:
        bias = distance.astype(jnp.float32) * LOG2E
        logits += spread_columns(slopes, logits.shape) * bias
    return logits
