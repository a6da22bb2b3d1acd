"""What the sm_90a decode kernel computes of one tile: two products, and the softmax between them.

How they are arranged is written in `decode_kernel.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.decode_parts import Cta, Item
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem
from pallas_paged.ops.attention.hopper.quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scales_values,
)
from pallas_paged.ops.attention.hopper.tiles import (
    ROW_LAYOUT,
    TILE_LAYOUT,
    as_column,
    iota,
    product,
    spread_columns,
    spread_rows,
)
from pallas_paged.ops.attention.online_softmax import LOG2E, State, capped, logits_factor, raised
from pallas_paged.ops.attention.smem import zero_rows


class Tile(NamedTuple):
    """A tile in shared memory."""

    step: jax.Array  # of the share
    slot: jax.Array
    position: jax.Array  # of its first key
    first_key: jax.Array  # the first that some query sees, a position
    length: jax.Array  # the position behind the last one

    @property
    def rows(self) -> tuple[jax.Array, jax.Array]:
        """Returns [begin, end) of the tile's rows that some query sees, as if it had any number."""
        return self.first_key - self.position, self.length - self.position


def tile_of(cta: Cta, item: Item, tile: jax.Array, step: jax.Array) -> Tile:
    """Returns the tile number `tile` of an item, which is the share's number `step`."""
    window = cta.problem.sliding_window
    position = (item.first_tile + tile) * cta.config.tile
    first_key: Any = 0
    if window is not None:
        first_key = jnp.maximum(item.first_position - (window - 1), 0)
    return Tile(step, cta.slot(step), position, first_key, item.length)


def add_tile(
    cta: Cta, item: Item, tile: Tile, queries: Any, slopes: jax.Array | None, state: State
) -> State:
    """Returns the state with a tile's keys and values.

    Args:
      cta: the CTA.
      item: that the tile is of.
      tile: the tile, whose copies may still be in flight.
      queries: [N, D] in shared memory.
      slopes: f32[N], or None.
      state: of the keys before.
    """
    problem = cta.problem
    products = _multiply_keys(cta, tile, queries)
    logits = _finish_logits(problem, products, item, tile, slopes)
    maximum, correction = raised(state.maximum, logits.max(axis=0), as_column)  # [N]
    weights = jnp.exp2(logits - spread_columns(maximum, logits.shape))  # [T, N]
    denominator = state.denominator * correction + weights.sum(axis=0)
    # Every warp has been through the reductions since the last product read the weights.
    if not problem.is_quantised:
        _write_weights(cta, weights)
        plgpu.barrier_wait(cta.barriers.v.at[tile.slot])
        _zero_values(cta, tile)
    else:
        if not cta.converts_ahead:
            _convert_values(cta, tile)
        _write_weights(cta, _scaled(cta, tile, weights))
    plgpu.commit_smem()  # weights and values, before the tensor core reads them
    return State(_add_values(cta, tile, state.numerator, correction), maximum, denominator)


def _multiply_keys(cta: Cta, tile: Tile, queries: Any) -> jax.Array:
    """Returns S^T [T, N], the products of keys and queries, the keys' scales included."""
    smem, config = cta.smem, cta.config
    queries = queries.transpose((1, 0))
    if not cta.problem.is_quantised:
        plgpu.barrier_wait(cta.barriers.k.at[tile.slot])
        return product(smem.k.numbers.at[tile.slot], queries)
    if cta.converts_ahead:
        products = product(smem.k.numbers.at[0], queries, lambda: _convert_values(cta, tile))
    else:
        convert_keys(cta, tile.step)
        products = product(smem.k.numbers.at[0], queries)
    _, copy_rows = cta.problem.copies(config.tile)
    scales = load_scales(smem.k.scales.at[tile.slot], 0, config.tile, copy_rows, ROW_LAYOUT)
    return products * spread_rows(scales, products.shape)


def _finish_logits(
    problem: DecodeProblem, products: jax.Array, item: Item, tile: Tile, slopes: jax.Array | None
) -> jax.Array:
    """Scales, caps, slopes and masks; returns the logits times log2(e)."""
    window, cap = problem.sliding_window, problem.logits_soft_cap
    keys = iota(products.shape, 0) + tile.position
    positions = _query_positions(problem, products.shape, item)
    distance = keys - positions
    logits = products * logits_factor(problem.scale, cap)
    if cap is not None:
        logits = capped(logits, cap)
    if slopes is not None:
        bias = distance.astype(jnp.float32) * LOG2E
        logits += spread_columns(slopes, logits.shape) * bias
    visible = keys <= positions
    if window is not None:
        visible &= keys > positions - window
    return jnp.where(visible, logits, -jnp.inf)


def _query_positions(problem: DecodeProblem, shape: tuple[int, ...], item: Item) -> jax.Array:
    """Returns the position of each column's query token; the last one for tokens not there."""
    if problem.max_tokens == 1:
        return item.first_position
    token = lax.div(iota(shape, 1), jnp.int32(problem.group))
    return jnp.minimum(token + item.first_position, item.length - 1)


def _unroll(cta: Cta) -> bool:
    return cta.problem.columns <= 16  # many columns leave few registers for conversion


def convert_keys(cta: Cta, step: jax.Array) -> None:
    """Waits for the keys of the share's tile number `step`, and converts them."""
    slot = cta.slot(step)
    plgpu.barrier_wait(cta.barriers.k.at[slot])
    convert_tile(cta.smem.k.stored.at[slot], cta.smem.k.numbers.at[0], unroll=_unroll(cta))
    plgpu.commit_smem()  # converted keys


def _convert_next_keys(cta: Cta, tile: Tile, turn: int) -> None:
    """Converts the keys of the share's next tile, in the first turn."""
    if cta.converts_ahead and turn == 0:
        step = tile.step + 1
        pl.when(step < cta.num_tiles)(lambda: convert_keys(cta, step))


def _convert_values(cta: Cta, tile: Tile) -> None:
    """Waits for values, and converts them; rows that no query sees become 0, whatever they hold."""
    plgpu.barrier_wait(cta.barriers.v.at[tile.slot])
    stored, numbers = cta.smem.v.stored.at[tile.slot], cta.smem.v.numbers.at[0]
    if scales_values(cta.problem.dtype):
        _, copy_rows = cta.problem.copies(cta.config.tile)
        convert_tile(
            stored,
            numbers,
            rows=tile.rows,
            scales=cta.smem.v.scales.at[tile.slot],
            copy_rows=copy_rows,
            scaled_rows=tile.rows,
            unroll=_unroll(cta),
        )
    else:
        convert_tile(stored, numbers, rows=tile.rows, unroll=_unroll(cta))


def _scaled(cta: Cta, tile: Tile, weights: jax.Array) -> jax.Array:
    """Returns the weights times the values' scales, if the values have been converted without."""
    if scales_values(cta.problem.dtype):
        return weights
    _, copy_rows = cta.problem.copies(cta.config.tile)
    scales = cta.smem.v.scales.at[tile.slot]
    scales = load_scales(scales, 0, cta.config.tile, copy_rows, ROW_LAYOUT)
    scales = masked_scales(scales, 0, tile.rows, ROW_LAYOUT)
    return weights * spread_rows(scales, weights.shape)


def _write_weights(cta: Cta, weights: jax.Array) -> None:
    transposed = plgpu.layout_cast(weights.astype(cta.problem.dtype), TILE_LAYOUT)
    cta.smem.weights.transpose((1, 0))[...] = transposed


def _zero_values(cta: Cta, tile: Tile) -> None:
    """Zeroes the rows that no query sees: there may be NaN."""
    position = tile.position

    # Not by way of `rows`: the compiler would keep these, and many registers with them.
    @pl.when((position + cta.config.tile > tile.length) | (position < tile.first_key))
    def _() -> None:
        columns = [pl.ds(column, 64) for column in range(0, cta.problem.value_rows, 64)]
        values = cta.smem.v.numbers.at[tile.slot]
        zero_rows(values, *tile.rows, columns, lambda shape: TILE_LAYOUT)


def _add_values(
    cta: Cta, tile: Tile, numerator: tuple[jax.Array, ...], correction: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the corrected numerator with the weighted sum of a tile's values."""
    tile_slot = 0 if cta.problem.is_quantised else tile.slot
    weights = cta.smem.weights.transpose((1, 0))
    sums = []
    for i, some in enumerate(numerator):
        others = functools.partial(_convert_next_keys, cta, tile, i)
        values = cta.smem.v.numbers.at[tile_slot, :, pl.ds(i * cta.chunk, cta.chunk)]
        added = product(values.transpose((1, 0)), weights, others)  # [D, N]
        corrected = some * spread_columns(correction, some.shape)
        sums.append(corrected + added)
    return tuple(sums)
