"""Attention for sm_80 in Pallas Mosaic GPU: decode, ragged prefill and both of them in one launch.

The queries of a step are cut into runs of consecutive tokens of one sequence. The tokens of a run
and the G query heads of a KV head give the rows of one product: M of them, token after token,
padded to 16, 32 or 64. So a decode step has runs of one token and a mixed step runs of many, and
the code does not know which. With tiles of T keys and head_dim D:

    S[M, T] = Q[M, D] K^T[D, T]          mma.sync, float32 sums
    P[M, T] = softmax over T, online, float32 and base 2
    O[M, D] = O * correction + P[M, T] V[T, D]

One warpgroup is a CTA. Each CTA walks along its share of the work list (`work_list.py`), an item
being a run on one KV head; a ring of `num_stages` tiles is loaded ahead of it by cp.async, one copy
per block of the paged cache and across the borders of items. A result is written where it belongs
if the CTA has seen all of the item's keys, else as a partial result that a second kernel combines.

Copies complete in the order in which they were started, and the hardware counts those that may
still be in flight: `wait` says how many, and the number is a constant of the program. Waiting for
copies is also a barrier of the CTA's warps; so is each write to shared memory, before and after,
and the start of each copy. Mosaic GPU puts them there (`auto_barriers`).

A quantised cache is in flight as it is stored. Before each product its tile is converted into one
more tile in shared memory, that of keys and then that of values (`quantised.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.ampere.parts import (
    Item,
    empty,
    finish_logits,
    read_item,
    update,
    write,
    zeros,
)
from pallas_paged.ops.attention.ampere.problem import FLAT_ROW, AmpereProblem, Smem, swizzle_bytes
from pallas_paged.ops.attention.ampere.quantised import (
    convert_tile,
    load_scales,
    value_factors,
)
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.online_softmax import State, across, along, finished, raised
from pallas_paged.ops.attention.smem import zero_rows
from pallas_paged.ops.attention.work_list import CtaField, Parts
from pallas_paged.ops.mosaic_gpu import load, store


class Inputs(NamedTuple):
    """What the kernel reads, in global memory."""

    queries: Any  # [R, Hk, M, D]
    k_cache: Any  # [N, Hk, S, D], or in rows of `FLAT_ROW` bytes
    v_cache: Any  # likewise
    block_tables: Any  # i32[B, M]
    tokens: Any  # i32[M], of each row in its run, so that nobody has to divide by the group
    scales: Any  # of keys and of values, f32[N, Hk, S] each; None unless quantised
    sequences: Any  # of the work list
    ctas: Any  # of the work list
    slopes: Any  # f32[Hk, M], or None
    sinks: Any  # f32[Hk, M], or None


def attend_kernel(
    problem: AmpereProblem,
    config: DecodeConfig,
    inputs: Inputs,
    out: Any,
    lse: Any,
    parts: Parts,
    *,
    smem: Smem,
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    sequences, ctas = inputs.sequences, inputs.ctas
    stages, tile_size, window = config.num_stages, config.tile, problem.sliding_window
    num_copies, copy_rows = problem.copies(tile_size)
    all_k_scales, all_v_scales = inputs.scales if problem.is_quantised else (None, None)
    has_registers = problem.rows <= 32
    piece_keys = problem.piece_keys
    pieces = [pl.ds(begin, piece_keys) for begin in range(0, tile_size, piece_keys)]
    copies_of_tile = num_copies * (2 if problem.is_flat else 1)  # of keys, and as many of values
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first_item = ctas[cta, CtaField.FIRST_ITEM]
    first_tile = ctas[cta, CtaField.FIRST_TILE]
    num_tiles = ctas[cta, CtaField.NUM_TILES]

    def find_blocks(item: Item, position: jax.Array) -> tuple[list[jax.Array], Any]:
        """Returns the blocks of the tile that begins at `position`, and where in the first."""
        first_block = lax.div(position, jnp.int32(problem.block_size))
        last_block = lax.div(item.length - 1, jnp.int32(problem.block_size))
        begin = lax.rem(position, jnp.int32(problem.block_size)) if num_copies == 1 else 0
        # Behind the last block the same one again: masked, but never out of bounds.
        blocks = [
            inputs.block_tables[item.row, jnp.minimum(first_block + i, last_block)]
            for i in range(num_copies)
        ]
        return blocks, begin

    def start_copies(step: jax.Array, index: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
        """Starts the copies of the share's tile number `step`; returns the place after it."""
        slot = lax.rem(step, jnp.int32(stages))
        item = read_item(problem, sequences, index)
        blocks, begin = find_blocks(item, (item.first_tile + tile) * tile_size)
        for cache, buffer in ((inputs.k_cache, smem.k), (inputs.v_cache, smem.v)):
            for i, block in enumerate(blocks):
                rows = i * copy_rows, copy_rows
                _start_copy(problem, cache.at[block, item.head], begin, buffer.at[slot], rows)
        is_last = tile + 1 == item.num_tiles
        return jnp.where(is_last, index + 1, index), jnp.where(is_last, 0, tile + 1)

    place = lax.fori_loop(
        0,
        jnp.minimum(num_tiles, stages),
        lambda step, place: start_copies(step, *place),
        (first_item, first_tile),
    )

    def wait(step: jax.Array, started_since: int) -> None:
        """Waits for copies of tile `step`; `started_since` of it and `stages - 1` tiles may fly.

        Near the end of the share fewer tiles have been started since, and all must have landed.
        """
        started_since += (stages - 1) * 2 * copies_of_tile
        are_started = step + (stages - 1) < num_tiles
        pl.when(are_started)(lambda: plgpu.wait_gmem_to_smem(started_since))
        pl.when(jnp.logical_not(are_started))(lambda: plgpu.wait_gmem_to_smem(0))

    def tile_scales(scales: Any, item: Item, position: jax.Array) -> list[Any]:
        """Returns the scales of each piece of the tile that begins at `position`, or Nones."""
        if scales is None:
            return [None] * len(pieces)
        blocks, begin = find_blocks(item, position)
        places = [(blocks[p.start // copy_rows], begin + p.start % copy_rows) for p in pieces]
        return [load_scales(problem, scales.at[block, item.head], first) for block, first in places]

    def one_item(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        item_step, *place = carry
        item = read_item(problem, sequences, first_item + number)
        begin = jnp.where(number == 0, first_tile, 0)
        end = jnp.minimum(item.num_tiles, begin + num_tiles - item_step)
        first_position = item.length - item.num_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        q = tuple(
            load(inputs.queries.at[item.run, item.head, :, chunk], problem.layout("LHS"))
            for chunk in problem.chunks
        )
        # Of each row's token; the last one's where the run has no such token.
        query_position = load(inputs.tokens, problem.row_layout) + first_position
        query_position = jnp.minimum(query_position, item.length - 1)
        slope, sink = (
            None if numbers is None else load(numbers.at[item.head], problem.row_layout)
            for numbers in (inputs.slopes, inputs.sinks)
        )

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (item.first_tile + tile) * tile_size  # of the tile's first key

            valid = first_key - position, item.length - position
            # The loads are under way while the copies are, if registers suffice.
            k_scales = tile_scales(all_k_scales, item, position) if has_registers else []
            v_scales = tile_scales(all_v_scales, item, position) if has_registers else []
            keys, values = (
                buffer.at[slot] if smem.numbers is None else smem.numbers
                for buffer in (smem.k, smem.v)
            )

            wait(step, copies_of_tile)
            if smem.numbers is not None:
                convert_tile(problem, smem.k.at[slot], smem.numbers)
            k_scales = k_scales or tile_scales(all_k_scales, item, position)
            logits = []
            for piece, some_scales in zip(pieces, k_scales, strict=True):
                products = zeros(problem, piece_keys)
                for some_q, chunk in zip(q, problem.chunks, strict=True):
                    some_keys = keys.at[piece, chunk].transpose((1, 0))
                    products = _add_product(problem, products, some_q, some_keys)
                last_key = query_position - (position + piece.start)
                logits.append(finish_logits(problem, products, some_scales, last_key, slope))
            v_scales = v_scales or tile_scales(all_v_scales, item, position)
            state, weights = update(state, logits)
            for piece, some_weights, some_scales in zip(pieces, weights, v_scales, strict=True):
                if some_scales is not None:
                    factors = value_factors(problem, some_scales, piece.start, valid)
                    some_weights *= along(factors, some_weights.shape)
                smem.weights[:, piece] = some_weights.astype(problem.dtype)

            wait(step, 0)
            if smem.numbers is not None:
                convert_tile(problem, smem.v.at[slot], smem.numbers)
            else:
                is_edge = (position + tile_size > item.length) | (position < first_key)
                pl.when(is_edge)(lambda: _zero_values(problem, values, *valid))

            numerator = list(state.numerator)
            for piece in pieces:
                p = plgpu.load(smem.weights.at[:, piece], layout=problem.layout("LHS"))
                for i, chunk in enumerate(problem.chunks):
                    some_values = values.at[piece, chunk]
                    numerator[i] = _add_product(problem, numerator[i], p, some_values)
            place = lax.cond(
                step + stages < num_tiles,
                lambda: start_copies(step + stages, *place),
                lambda: tuple(place),
            )
            return state._replace(numerator=tuple(numerator)), step + 1, *place

        state, step, *place = lax.fori_loop(
            begin, end, one_tile, (empty(problem), item_step, *place)
        )
        is_whole = (begin == 0) & (end == item.num_tiles)

        @pl.when(is_whole)
        def _() -> None:
            write(problem, state, sink, item, out, lse)

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            values, part_lse = finished(state, None, across)
            for some, chunk in zip(values, problem.chunks, strict=True):
                store(parts.values.at[part, :, chunk], some)
            store(parts.lse.at[part], part_lse)

        return step, *place

    lax.fori_loop(0, ctas[cta, CtaField.NUM_ITEMS], one_item, (jnp.int32(0), *place))


def merge_kernel(
    problem: AmpereProblem,
    parts: Parts,
    sequences: Any,
    ctas: Any,
    sinks: Any,
    out: Any,
    lse: Any,
) -> None:
    """One CTA: the item that the other kernel's CTA of that number began and did not finish."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    last_part = ctas[cta, CtaField.LAST_PART]

    @pl.when(last_part >= 0)
    def _() -> None:
        index = ctas[cta, CtaField.FIRST_ITEM] + ctas[cta, CtaField.NUM_ITEMS] - 1
        item = read_item(problem, sequences, index)

        def one_part(part: jax.Array, state: State) -> State:
            place = jnp.where(part == cta, num_ctas + cta, part)
            part_lse = load(parts.lse.at[place], problem.row_layout)
            maximum, correction = raised(state.maximum, part_lse)
            weight = jnp.exp2(part_lse - maximum)
            numerator = []
            for some, chunk in zip(state.numerator, problem.chunks, strict=True):
                values = load(parts.values.at[place, :, chunk], problem.layout("ACC"))
                some = some * across(correction, some.shape)
                numerator.append(some + values * across(weight, values.shape))
            return State(tuple(numerator), maximum, state.denominator * correction + weight)

        state = lax.fori_loop(cta, last_part + 1, one_part, empty(problem))
        sink = None if sinks is None else load(sinks.at[item.head], problem.row_layout)
        write(problem, state, sink, item, out, lse)


def _start_copy(
    problem: AmpereProblem, source: Any, begin: Any, tile: Any, rows: tuple[int, int]
) -> None:
    """Starts to copy what begins at row `begin` of a block to (first, number of) rows of a tile."""
    first, count = rows
    if not problem.is_flat:
        places = [(source.at[pl.ds(begin, count)], tile.at[pl.ds(first, count)])]
    else:
        first, count = (n * problem.head_dim // FLAT_ROW for n in rows)
        flat = tile.reshape(-1, FLAT_ROW)
        places = [
            (source.at[pl.ds(i, count - 1)], flat.at[pl.ds(first + i, count - 1)]) for i in (0, 1)
        ]
    for place in places:
        plgpu.copy_gmem_to_smem(*place, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def _add_product(problem: AmpereProblem, sums: jax.Array, left: jax.Array, right: Any) -> jax.Array:
    """Returns sums + left @ right, `right` in shared memory."""
    return plgpu.mma(sums, left, plgpu.load(right, layout=problem.layout("RHS")))


def _zero_values(problem: AmpereProblem, values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows outside [begin, end) in the layout of the copies: its addresses are there."""
    swizzle = swizzle_bytes(problem, problem.copies(values.shape[0])[1])
    layout_of = functools.partial(
        plgpu.Layout.SMEM_GMEM_COPY, dtype=jnp.dtype(problem.dtype), swizzle=swizzle
    )
    zero_rows(values, begin, end, problem.chunks, layout_of)
