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
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.ampere_problem import PIECE_KEYS, AmpereProblem, swizzle_bytes
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.work_list import CtaField, SequenceField
from pallas_paged.ops.mosaic_gpu import load, store

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# Below any logit and finite: exp2(-inf - _LOWEST) is 0 where exp2(-inf + inf) would be NaN.
_LOWEST = -1e30


class _State(NamedTuple):
    """Online softmax over the keys so far; logits are to the base 2."""

    numerator: tuple[jax.Array, ...]  # chunks of f32[M, D]
    maximum: jax.Array  # f32[M]
    denominator: jax.Array  # f32[M]


class _Item(NamedTuple):
    """A run on one KV head: a record of the work list, read."""

    run: jax.Array  # of the packed queries
    head: jax.Array
    row: jax.Array  # of the block table
    num_tiles: jax.Array
    first_tile: jax.Array
    length: jax.Array
    num_tokens: jax.Array


def _read_item(problem: AmpereProblem, sequences: Any, item: jax.Array) -> _Item:
    heads = jnp.int32(problem.num_kv_heads)
    index = lax.div(item, heads)
    return _Item(
        run=sequences[index, problem.query_field],
        head=lax.rem(item, heads),
        row=sequences[index, SequenceField.ROW],
        num_tiles=sequences[index, SequenceField.NUM_TILES],
        first_tile=sequences[index, SequenceField.FIRST_TILE],
        length=sequences[index, SequenceField.LENGTH],
        num_tokens=sequences[index, SequenceField.NUM_TOKENS],
    )


def attend_kernel(
    problem: AmpereProblem,
    config: DecodeConfig,
    arrays: tuple[Any, ...],
    sequences: Any,
    ctas: Any,
    slopes: Any,
    sinks: Any,
    out: Any,
    lse: Any,
    parts: Any,
    part_lses: Any,
    *,
    p_smem: Any,
    k_smem: Any,
    v_smem: Any,
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    queries, k_cache, v_cache, tables, tokens = arrays
    stages, tile_size, window = config.num_stages, config.tile, problem.sliding_window
    num_copies, copy_rows = problem.copies(tile_size)
    pieces = [pl.ds(begin, PIECE_KEYS) for begin in range(0, tile_size, PIECE_KEYS)]
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first_item = ctas[cta, CtaField.FIRST_ITEM]
    first_tile = ctas[cta, CtaField.FIRST_TILE]
    num_tiles = ctas[cta, CtaField.NUM_TILES]

    def start_copies(step: jax.Array, index: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
        """Starts the copies of the share's tile number `step`; returns the place after it."""
        slot = lax.rem(step, jnp.int32(stages))
        item = _read_item(problem, sequences, index)
        position = (item.first_tile + tile) * tile_size
        first_block = lax.div(position, jnp.int32(problem.block_size))
        last_block = lax.div(item.length - 1, jnp.int32(problem.block_size))
        begin = lax.rem(position, jnp.int32(problem.block_size)) if num_copies == 1 else 0
        for cache, buffer in ((k_cache, k_smem), (v_cache, v_smem)):
            for i in range(num_copies):
                # Behind the last block the same one again: masked, but never out of bounds.
                block = tables[item.row, jnp.minimum(first_block + i, last_block)]
                plgpu.copy_gmem_to_smem(
                    cache.at[block, item.head, pl.ds(begin, copy_rows)],
                    buffer.at[slot, pl.ds(i * copy_rows, copy_rows)],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )
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
        started_since += (stages - 1) * 2 * num_copies
        are_started = step + (stages - 1) < num_tiles
        pl.when(are_started)(lambda: plgpu.wait_gmem_to_smem(started_since))
        pl.when(jnp.logical_not(are_started))(lambda: plgpu.wait_gmem_to_smem(0))

    def one_item(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        item_step, *place = carry
        item = _read_item(problem, sequences, first_item + number)
        begin = jnp.where(number == 0, first_tile, 0)
        end = jnp.minimum(item.num_tiles, begin + num_tiles - item_step)
        first_position = item.length - item.num_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        q = tuple(
            load(queries.at[item.run, item.head, :, chunk], problem.layout("LHS"))
            for chunk in problem.chunks
        )
        # Of each row's token; the last one's where the run has no such token.
        query_position = load(tokens, problem.row_layout) + first_position
        query_position = jnp.minimum(query_position, item.length - 1)
        slope, sink = (
            None if numbers is None else load(numbers.at[item.head], problem.row_layout)
            for numbers in (slopes, sinks)
        )

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (item.first_tile + tile) * tile_size  # of the tile's first key

            wait(step, num_copies)
            logits = []
            for piece in pieces:
                products = _zeros(problem, PIECE_KEYS)
                for some_q, chunk in zip(q, problem.chunks, strict=True):
                    keys = k_smem.at[slot, piece, chunk].transpose((1, 0))
                    products = _add_product(problem, products, some_q, keys)
                last_key = query_position - (position + piece.start)
                logits.append(_finish_logits(problem, products, last_key, slope))
            state, weights = _update(state, logits)
            for piece, some_weights in zip(pieces, weights, strict=True):
                p_smem[:, piece] = some_weights.astype(problem.dtype)

            wait(step, 0)

            @pl.when((position + tile_size > item.length) | (position < first_key))
            def _() -> None:
                begin, end = first_key - position, item.length - position
                _zero_values(problem, v_smem.at[slot], begin, end)

            numerator = list(state.numerator)
            for piece in pieces:
                p = plgpu.load(p_smem.at[:, piece], layout=problem.layout("LHS"))
                for i, chunk in enumerate(problem.chunks):
                    values = v_smem.at[slot, piece, chunk]
                    numerator[i] = _add_product(problem, numerator[i], p, values)
            place = lax.cond(
                step + stages < num_tiles,
                lambda: start_copies(step + stages, *place),
                lambda: tuple(place),
            )
            return state._replace(numerator=tuple(numerator)), step + 1, *place

        state, step, *place = lax.fori_loop(
            begin, end, one_tile, (_empty(problem), item_step, *place)
        )
        is_whole = (begin == 0) & (end == item.num_tiles)

        @pl.when(is_whole)
        def _() -> None:
            _write(problem, state, sink, item, out, lse)

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            values, part_lse = _finish(state, None)
            for some, chunk in zip(values, problem.chunks, strict=True):
                store(parts.at[part, :, chunk], some)
            store(part_lses.at[part], part_lse)

        return step, *place

    lax.fori_loop(0, ctas[cta, CtaField.NUM_ITEMS], one_item, (jnp.int32(0), *place))


def merge_kernel(
    problem: AmpereProblem,
    parts: Any,
    part_lses: Any,
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
        item = _read_item(problem, sequences, index)

        def one_part(part: jax.Array, state: _State) -> _State:
            place = jnp.where(part == cta, num_ctas + cta, part)
            part_lse = load(part_lses.at[place], problem.row_layout)
            maximum = jnp.maximum(state.maximum, part_lse)
            correction = jnp.exp2(state.maximum - maximum)
            weight = jnp.exp2(part_lse - maximum)
            numerator = []
            for some, chunk in zip(state.numerator, problem.chunks, strict=True):
                values = load(parts.at[place, :, chunk], problem.layout("ACC"))
                some = some * _across(correction, some.shape)
                numerator.append(some + values * _across(weight, values.shape))
            return _State(tuple(numerator), maximum, state.denominator * correction + weight)

        state = lax.fori_loop(cta, last_part + 1, one_part, _empty(problem))
        sink = None if sinks is None else load(sinks.at[item.head], problem.row_layout)
        _write(problem, state, sink, item, out, lse)


def _add_product(problem: AmpereProblem, sums: jax.Array, left: jax.Array, right: Any) -> jax.Array:
    """Returns sums + left @ right, `right` in shared memory."""
    return plgpu.mma(sums, left, plgpu.load(right, layout=problem.layout("RHS")))


def _finish_logits(
    problem: AmpereProblem, products: jax.Array, last_key: jax.Array, slope: jax.Array | None
) -> jax.Array:
    """Scales, caps, slopes and masks; returns the logits of a tile times log2(e).

    `last_key` is each row's own position, counted from the tile's first key.
    """
    shape = products.shape
    cap = problem.logits_soft_cap
    if cap is None:
        logits = products * (problem.scale * _LOG2E)
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh has 11 bits.
        power = jnp.exp2(products * (2 * _LOG2E * problem.scale / cap))
        logits = cap * _LOG2E - (2 * cap * _LOG2E) / (power + 1.0)
    # A vector first: the compiler keeps these numbers in registers.
    columns = problem.layout("ACC").reduce(0)
    keys = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=columns)
    distances = lax.broadcast_in_dim(keys, shape, (1,)) - _across(last_key, shape)
    if slope is not None:
        logits += _across(slope * _LOG2E, shape) * distances.astype(jnp.float32)
    visible = distances <= 0
    if problem.sliding_window is not None:
        visible &= distances > -problem.sliding_window
    return jnp.where(visible, logits, -jnp.inf)


def _update(state: _State, logits: list[jax.Array]) -> tuple[_State, list[jax.Array]]:
    """Returns the state rescaled to the new maximum, and the weights [M, T] of the new keys.

    Logits and weights are in pieces of some keys.
    """
    largest = functools.reduce(jnp.maximum, logits).max(axis=1)
    maximum = jnp.maximum(state.maximum, largest)
    correction = jnp.exp2(state.maximum - maximum)
    weights = [jnp.exp2(some - _across(maximum, some.shape)) for some in logits]
    total = functools.reduce(jnp.add, weights).sum(axis=1)
    numerator = tuple(some * _across(correction, some.shape) for some in state.numerator)
    return _State(numerator, maximum, state.denominator * correction + total), weights


def _zero_values(problem: AmpereProblem, values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows of a tile of values outside [begin, end): 0 * NaN would be NaN.

    In the layout of the copies, whose addresses are there already.
    """
    swizzle = swizzle_bytes(problem, problem.copies(values.shape[0])[1])
    for row in range(0, values.shape[0], 64):
        for chunk in problem.chunks:
            piece = values.at[pl.ds(row, 64), chunk]
            layout = plgpu.Layout.SMEM_GMEM_COPY(piece.shape, jnp.dtype(problem.dtype), swizzle)
            old = plgpu.load(piece, layout=layout)
            rows = plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=layout) + row
            piece[...] = jnp.where((rows >= begin) & (rows < end), old, jnp.zeros_like(old))


def _zeros(problem: AmpereProblem, width: int) -> jax.Array:
    zeros = jnp.zeros((problem.rows, width), jnp.float32)
    return plgpu.layout_cast(zeros, problem.layout("ACC"))


def _empty(problem: AmpereProblem) -> _State:
    """Returns the state before the first key."""
    maximum = jnp.full((problem.rows,), _LOWEST, jnp.float32)
    denominator = jnp.zeros((problem.rows,), jnp.float32)
    return _State(
        tuple(_zeros(problem, chunk.size) for chunk in problem.chunks),
        plgpu.layout_cast(maximum, problem.row_layout),
        plgpu.layout_cast(denominator, problem.row_layout),
    )


def _finish(state: _State, sink: jax.Array | None) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns (O divided by the denominator, in chunks, lse to the base 2), the sink included.

    Without any visible key they are 0 and -inf.
    """
    numerator, maximum, denominator = state
    factor: Any = 1.0
    if sink is not None:
        new_maximum = jnp.maximum(maximum, sink * _LOG2E)
        factor = jnp.exp2(maximum - new_maximum)
        denominator = denominator * factor + jnp.exp2(sink * _LOG2E - new_maximum)
        maximum = new_maximum
    is_seen = denominator > 0
    factor = jnp.where(is_seen, factor / denominator, 0.0)
    lse = jnp.where(is_seen, maximum + jnp.log2(denominator), -jnp.inf)
    return tuple(some * _across(factor, some.shape) for some in numerator), lse


def _write(
    problem: AmpereProblem, state: _State, sink: jax.Array | None, item: _Item, out: Any, lse: Any
) -> None:
    values, item_lse = _finish(state, sink)
    for some, chunk in zip(values, problem.chunks, strict=True):
        store(out.at[item.run, item.head, :, chunk], some.astype(problem.dtype))
    store(lse.at[item.run, item.head], item_lse * _LN2)


def _across(per_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [M] as [M, width]."""
    return lax.broadcast_in_dim(per_row, shape, (0,))
