"""Attention for sm_100a in Pallas Mosaic GPU: decode, ragged prefill and both, in one launch.

The queries of a step are cut into runs of consecutive tokens of one sequence, as for sm_80. The
tokens of a run and the G query heads of a KV head are rows of one product, of which there are
always 128: those behind the M that a run may have hold anything, and nobody reads what becomes of
them. With tiles of T keys and head_dim D:

    S[128, T] = Q[128, D] K^T[D, T]          tcgen05.mma, float32 sums
    P[128, T] = softmax over T, online, float32 and base 2
    O[128, D] = O * correction + P[128, T] V[T, D]

S, P and O are in tensor memory. One warpgroup is a CTA; two of them share an SM where tensor memory
has room for both, so that one's products run while the other computes weights. Each CTA walks along
its share of the work list (`work_list.py`), an item being a run on one KV head; a ring of
`num_stages` tiles is loaded ahead of it by TMA, one copy per block of the paged cache and across
the borders of items. A result is written where it belongs if the CTA has seen all of the item's
keys, else as a partial result that a second kernel combines. Both go by way of shared memory, from
where M rows are copied.

A product of P and V is waited for when the next tile's weights are about to be written; then its
keys and values have been read, and the slot that they were in is loaded again.

A quantised cache is in flight as it is stored. Before each product its tile is converted into one
more tile in shared memory, as for sm_80 (`ampere/quantised.py`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.ampere.parts import Item, finish_logits, read_item
from pallas_paged.ops.attention.ampere.quantised import convert_tile, load_scales, value_factors
from pallas_paged.ops.attention.blackwell.parts import copy_rows, empty, finished_rows
from pallas_paged.ops.attention.blackwell.problem import (
    LAYOUT,
    ROW_LAYOUT,
    Barriers,
    BlackwellProblem,
    Smem,
    Tmem,
)
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.online_softmax import LN2, across, along, raised
from pallas_paged.ops.attention.smem import zero_rows
from pallas_paged.ops.attention.work_list import CtaField, Parts
from pallas_paged.ops.mosaic_gpu import load, store

_WARPS = 4


class Inputs(NamedTuple):
    """What the kernel reads, in global memory."""

    queries: Any  # [R, Hk, M, D]
    k_cache: Any  # [N, Hk, S, D]
    v_cache: Any  # likewise
    block_tables: Any  # i32[B, M]
    tokens: Any  # i32[128], of each row in its run, so that nobody has to divide by the group
    scales: Any  # of keys and of values, f32[N, Hk, S] each; None unless quantised
    sequences: Any  # of the work list
    ctas: Any  # of the work list
    slopes: Any  # f32[Hk, 128], or None
    sinks: Any  # f32[Hk, 128], or None


def attend_kernel(
    problem: BlackwellProblem,
    config: DecodeConfig,
    inputs: Inputs,
    out: Any,
    lse: Any,
    parts: Parts,
    *,
    smem: Smem,
    tmem: Tmem,
    barriers: Barriers,
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    sequences, ctas = inputs.sequences, inputs.ctas
    stages, tile_size, window = config.num_stages, config.tile, problem.sliding_window
    num_copies, rows_of_copy = problem.copies(tile_size)
    all_k_scales, all_v_scales = inputs.scales if problem.is_quantised else (None, None)
    pieces = [pl.ds(p, problem.piece_keys) for p in range(0, tile_size, problem.piece_keys)]
    queries, part_rows = smem.rows
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first_item = ctas[cta, CtaField.FIRST_ITEM]
    first_tile = ctas[cta, CtaField.FIRST_TILE]
    num_tiles = ctas[cta, CtaField.NUM_TILES]

    def find_blocks(item: Item, position: jax.Array) -> tuple[Callable[[Any], jax.Array], Any]:
        """Returns the blocks of the tile that begins at `position`, and where in the first."""
        first_block = lax.div(position, jnp.int32(problem.block_size))
        last_block = lax.div(item.length - 1, jnp.int32(problem.block_size))
        begin = lax.rem(position, jnp.int32(problem.block_size)) if num_copies == 1 else 0

        def block(i: Any) -> jax.Array:
            # Behind the last block the same one again: masked, but never out of bounds.
            return inputs.block_tables[item.row, jnp.minimum(first_block + i, last_block)]

        return block, begin

    def start_copies(step: jax.Array, index: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
        """Starts the copies of the share's tile number `step`; returns the place after it."""
        slot = lax.rem(step, jnp.int32(stages))
        item = read_item(problem, sequences, index)
        block, begin = find_blocks(item, (item.first_tile + tile) * tile_size)
        if num_copies == 1:  # `begin` is a number of whole copies, which TMA wants to see
            begin = lax.div(begin, jnp.int32(rows_of_copy)) * rows_of_copy

        # The warpgroup meets at the beginning: all of it has read what the slot held before.
        @plgpu.warp_map
        def _(warp: jax.Array) -> None:
            for round_ in range(-(-num_copies // _WARPS)):
                i = round_ * _WARPS + warp

                @pl.when(i < num_copies)
                def _(i: jax.Array = i) -> None:
                    place = block(i), item.head, pl.ds(begin, rows_of_copy)
                    rows = pl.ds(i * rows_of_copy, rows_of_copy)
                    for cache, buffer, arrived in (
                        (inputs.k_cache, smem.k, barriers.k),
                        (inputs.v_cache, smem.v, barriers.v),
                    ):
                        plgpu.copy_gmem_to_smem(
                            cache.at[place], buffer.at[slot, rows], arrived.at[slot]
                        )

        is_last = tile + 1 == item.num_tiles
        return jnp.where(is_last, index + 1, index), jnp.where(is_last, 0, tile + 1)

    place = lax.fori_loop(
        0,
        jnp.minimum(num_tiles, stages),
        lambda step, place: start_copies(step, *place),
        (first_item, first_tile),
    )

    def refill(step: jax.Array, place: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Loads the slot of the tile before `step` again, if there is something to load."""
        return lax.cond(
            step - 1 + stages < num_tiles,
            lambda: start_copies(step - 1 + stages, *place),
            lambda: place,
        )

    def tile_scales(scales: Any, item: Item, position: jax.Array) -> list[Any]:
        """Returns the scales of each piece of the tile that begins at `position`, or Nones."""
        if scales is None:
            return [None] * len(pieces)
        block, begin = find_blocks(item, position)
        places = [(block(p.start // rows_of_copy), begin + p.start % rows_of_copy) for p in pieces]
        return [load_scales(problem, scales.at[some, item.head], first) for some, first in places]

    def one_item(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        item_step, *place = carry
        item = read_item(problem, sequences, first_item + number)
        begin = jnp.where(number == 0, first_tile, 0)
        end = jnp.minimum(item.num_tiles, begin + num_tiles - item_step)
        first_position = item.length - item.num_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        plgpu.copy_gmem_to_smem(
            inputs.queries.at[item.run, item.head],
            queries.at[pl.ds(0, problem.rows)],
            barriers.q,
        )
        # Of each row's token; the last one's where the run has no such token.
        query_position = load(inputs.tokens, ROW_LAYOUT) + first_position
        query_position = jnp.minimum(query_position, item.length - 1)
        slope, sink = (
            None if numbers is None else load(numbers.at[item.head], ROW_LAYOUT)
            for numbers in (inputs.slopes, inputs.sinks)
        )
        plgpu.barrier_wait(barriers.q)

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            maximum, denominator, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (item.first_tile + tile) * tile_size  # of the tile's first key
            valid = first_key - position, item.length - position
            k_scales = tile_scales(all_k_scales, item, position)

            plgpu.barrier_wait(barriers.k.at[slot])
            keys = smem.k.at[slot]
            if problem.is_quantised:
                convert_tile(problem, keys, smem.k_numbers)
                plgpu.commit_smem()
                keys = smem.k_numbers
            keys_transposed = keys.transpose((1, 0))
            plgpu.tcgen05_mma(
                tmem.logits, queries, keys_transposed, barriers.logits, accumulate=False
            )
            v_scales = tile_scales(all_v_scales, item, position)
            plgpu.barrier_wait(barriers.logits)
            logits = []
            for piece, some_scales in zip(pieces, k_scales, strict=True):
                products = plgpu.async_load_tmem(tmem.logits.at[:, piece], layout=LAYOUT)
                last_key = query_position - (position + piece.start)
                logits.append(finish_logits(problem, products, some_scales, last_key, slope))
            plgpu.wait_load_tmem()
            largest = functools.reduce(jnp.maximum, logits).max(axis=1)
            maximum, correction = raised(maximum, largest)
            weights = [jnp.exp2(some - across(maximum, some.shape)) for some in logits]
            total = functools.reduce(jnp.add, weights).sum(axis=1)

            # The product before, which reads the weights before.
            pl.when(tile > begin)(lambda: plgpu.barrier_wait(barriers.sums))
            for piece, some_weights, some_scales in zip(pieces, weights, v_scales, strict=True):
                if some_scales is not None:
                    factors = value_factors(problem, some_scales, piece.start, valid)
                    some_weights *= along(factors, some_weights.shape)
                plgpu.async_store_tmem(
                    tmem.weights.at[:, piece], some_weights.astype(problem.dtype)
                )

            def go_on(place: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                correct(correction)
                return refill(step, place)

            place = lax.cond(tile > begin, go_on, lambda place: place, tuple(place))
            plgpu.commit_tmem()

            plgpu.barrier_wait(barriers.v.at[slot])
            values = smem.v.at[slot]
            if problem.is_quantised:
                convert_tile(problem, values, smem.v_numbers)
                plgpu.commit_smem()
                values = smem.v_numbers
            else:
                is_edge = (position + tile_size > item.length) | (position < first_key)

                @pl.when(is_edge)
                def _() -> None:
                    _zero_values(problem, values, *valid)
                    plgpu.commit_smem()

            plgpu.tcgen05_mma(
                tmem.sums, tmem.weights, values, barriers.sums, accumulate=tile > begin
            )
            return maximum, denominator * correction + total, step + 1, *place

        def correct(correction: jax.Array) -> None:
            for chunk in problem.chunks:
                sums = plgpu.async_load_tmem(tmem.sums.at[:, chunk], layout=LAYOUT)
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(
                    tmem.sums.at[:, chunk], sums * across(correction, sums.shape)
                )

        state = *empty(), item_step, *place
        maximum, denominator, step, *place = lax.fori_loop(begin, end, one_tile, state)
        plgpu.barrier_wait(barriers.sums)
        next_place = refill(step, tuple(place))
        is_whole = (begin == 0) & (end == item.num_tiles)

        @pl.when(is_whole)
        def _() -> None:
            factor, item_lse = finished_rows(maximum, denominator, sink)
            store(lse.at[item.run, item.head], item_lse * LN2)
            for chunk in problem.chunks:
                sums = plgpu.async_load_tmem(tmem.sums.at[:, chunk], layout=LAYOUT)
                queries[:, chunk] = (sums * across(factor, sums.shape)).astype(problem.dtype)
            copy_rows(problem, queries, out.at[item.run, item.head])

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            factor, part_lse = finished_rows(maximum, denominator, None)
            store(parts.lse.at[part], part_lse)
            rows = parts.values.at[pl.ds(part * problem.rows, problem.rows)]
            half, width = problem.head_dim // 2, problem.part_width
            for first in (0, half):
                for column in range(0, half, width):
                    at = pl.ds(first + column, width)
                    sums = plgpu.async_load_tmem(tmem.sums.at[:, at], layout=LAYOUT)
                    part_rows[:, pl.ds(column, width)] = sums * across(factor, sums.shape)
                copy_rows(problem, part_rows, rows.at[:, pl.ds(first, half)])

        plgpu.wait_load_tmem()
        return step, *next_place

    lax.fori_loop(0, ctas[cta, CtaField.NUM_ITEMS], one_item, (jnp.int32(0), *place))


def _zero_values(problem: BlackwellProblem, values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows outside [begin, end)."""
    layout_of = functools.partial(
        plgpu.Layout.SMEM_GMEM_COPY,
        dtype=jnp.dtype(problem.dtype),
        swizzle=problem.number_swizzle,
    )
    zero_rows(values, begin, end, problem.chunks, layout_of)
