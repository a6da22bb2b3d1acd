"""The sm_90a kernel of ragged prefill: many query tokens per sequence, keys in blocks.

One thread block computes one tile of one KV head: n consecutive tokens of one sequence and all G
query heads of the group, so that a key is loaded once for all of them. The tile has 128 rows, of
which G * n are in use, head after head (row = head * n + token): each head is one copy of n tokens
of q, from whatever token the tile begins at. Two warpgroups compute 64 rows each; a third one keeps
the queue of keys and values full. The softmax is online (FlashAttention, arXiv 2205.14135), in
float32 and base 2; warp specialisation follows FlashAttention-3 (arXiv 2407.08608).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_load import bring
from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    WARPGROUP_ROWS,
    Barriers,
    Inputs,
    Problem,
    Smem,
    Tile,
    read_tile,
)
from pallas_paged.ops.attention.hopper.prefill_plan import NUM_TOKENS, token_unit
from pallas_paged.ops.attention.hopper.tiles import (
    COLUMN_LAYOUT,
    ROW_LAYOUT,
    TILE_LAYOUT,
    iota,
    product,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import (
    LN2,
    LOG2E,
    LOWEST,
    across,
    capped,
    raised,
)
from pallas_paged.ops.mosaic_gpu import load


def prefill_kernel(
    problem: Problem, inputs: Inputs, lse: Any, *, smem: Smem, barriers: Barriers
) -> None:
    """One thread block: one tile on one KV head, if the plan has so many tiles."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(inputs.tiles[lax.axis_index("tile"), NUM_TOKENS] > 0)
    def _() -> None:
        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(problem.registers[0], action="decrease")
            bring(problem, read_tile(problem, inputs.tiles), inputs, smem, barriers)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(problem.registers[1], action="increase")
            _compute(problem, read_tile(problem, inputs.tiles), inputs, lse, smem, barriers)


class _State(NamedTuple):
    """Like `online_softmax.State`, of one warpgroup's rows, the numerator in one piece."""

    maximum: jax.Array  # f32[64]
    denominator: jax.Array  # f32[64]
    numerator: jax.Array  # f32[64, D]


def _compute(
    problem: Problem,
    tile: Tile,
    inputs: Inputs,
    lse: Any,
    smem: Smem,
    barriers: Barriers,
) -> None:
    """Computes one warpgroup's 64 rows of the tile and writes them."""
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    row = iota((WARPGROUP_ROWS,), 0, ROW_LAYOUT) + warpgroup * WARPGROUP_ROWS
    position = tile.first_position + lax.rem(row, jnp.int32(problem.tokens))  # [64]
    slope = None
    if inputs.slopes is not None:
        slope = load(inputs.slopes.at[tile.kv_head, rows], ROW_LAYOUT)
    state = _empty(problem)
    if inputs.sinks is not None:
        # The sink is a key without a value. Padding tokens, which have no keys, have no sink.
        sink = load(inputs.sinks.at[tile.kv_head, rows], ROW_LAYOUT)
        sink = jnp.maximum(sink * LOG2E, LOWEST)
        has_keys = jnp.where(tile.key_end > 0, 1.0, 0.0)
        state = state._replace(maximum=sink, denominator=state.denominator + has_keys)
    for begin, width in problem.staged_columns:
        plgpu.barrier_wait(barriers.q)
        smem.q[rows, pl.ds(begin, width)] = plgpu.load(smem.staging.at[rows], layout=TILE_LAYOUT)
        plgpu.commit_smem()
        if begin + width < problem.head_dim:
            plgpu.barrier_arrive(barriers.staging_free)

    def step(is_full: bool, step: Any, state: _State) -> _State:
        k_slot = 2 * lax.rem(step - tile.begin, problem.stages)
        v_slot = k_slot + 1
        masks_values = not (is_full or problem.is_quantised)  # the load has masked quantised ones
        if masks_values:
            # Now, because the logits will need the registers that are left.
            plgpu.barrier_wait(barriers.tiles.filled.at[v_slot])
            _mask_values(problem, tile, step, smem.tiles.numbers.at[v_slot], barriers.pair)
        plgpu.barrier_wait(barriers.tiles.filled.at[k_slot])
        keys = smem.tiles.numbers.at[k_slot]
        logits = product(smem.q.at[rows], keys.transpose((1, 0)))
        if problem.is_quantised:
            logits = _times_columns(logits, smem.tiles.scales.at[k_slot])
        else:
            logits = logits * problem.logits_factor
        plgpu.barrier_arrive(barriers.tiles.consumed.at[k_slot])
        distance = step * problem.tuning.tile_keys - position  # of the step's first key
        logits = _finish_logits(problem, logits, distance, slope, is_full)
        state, weights = _update(state, logits)
        if not masks_values:
            plgpu.barrier_wait(barriers.tiles.filled.at[v_slot])
        numerator = _add_values(problem, state.numerator, weights, smem, v_slot)
        plgpu.barrier_arrive(barriers.tiles.consumed.at[v_slot])
        return state._replace(numerator=numerator)

    if problem.sliding_window is not None:
        state = lax.fori_loop(tile.begin, tile.full_begin, functools.partial(step, False), state)
    state = lax.fori_loop(tile.full_begin, tile.full_end, functools.partial(step, True), state)
    state = lax.fori_loop(tile.full_end, tile.end, functools.partial(step, False), state)
    _write(problem, tile, state, inputs.out, lse, smem, barriers)


def _finish_logits(
    problem: Problem,
    logits: jax.Array,  # [64, C]
    distance: jax.Array,  # [64]
    slope: jax.Array | None,  # [64]
    is_full: bool,
) -> jax.Array:
    """Caps, slopes and masks logits times `logits_factor`; returns them in base 2.

    `distance` is that from each row's query to the first of the C keys.
    """
    size = problem.tuning.tile_keys
    cap = problem.logits_soft_cap
    if cap is not None:
        logits = capped(logits, cap, few_registers=True)
    if slope is None and is_full:
        return logits
    # Exact as floats below 2^24 tokens, and half the registers of integers beside floats. A thread
    # has the same columns of every 8: added in this order nothing but those is known before the
    # loop over the steps, and kept in registers meanwhile.
    key = iota((WARPGROUP_ROWS, size), 1)
    within_8 = key & 7
    shape = logits.shape
    distances = within_8.astype(jnp.float32) + across(distance.astype(jnp.float32), shape)
    distances = distances + (key - within_8).astype(jnp.float32)
    if slope is not None:
        logits = logits + across(slope * LOG2E, shape) * distances
    if not is_full:
        visible = distances <= 0
        if problem.sliding_window is not None:
            visible &= distances > -problem.sliding_window
        logits = jnp.where(visible, logits, -jnp.inf)
    return logits


def _empty(problem: Problem) -> _State:
    """Returns the state before the first key."""
    return _State(
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROW_LAYOUT),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW_LAYOUT),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, problem.head_dim), jnp.float32), TILE_LAYOUT),
    )


def _update(state: _State, logits: jax.Array) -> tuple[_State, jax.Array]:
    """Returns the state rescaled to the new maximum, and the weights [64, C] of the new keys."""
    maximum, correction = raised(state.maximum, logits.max(axis=1))
    weights = jnp.exp2(logits - across(maximum, logits.shape))
    denominator = state.denominator * correction + weights.sum(axis=1)
    numerator = state.numerator * across(correction, state.numerator.shape)
    return _State(maximum, denominator, numerator), weights


def _times_columns(matrix: jax.Array, factors: Any) -> jax.Array:
    """Returns `matrix`, [64, C], times C numbers in shared memory."""
    return matrix * spread_columns(load(factors, COLUMN_LAYOUT), matrix.shape)


def _add_values(
    problem: Problem, numerator: jax.Array, weights: jax.Array, smem: Smem, slot: Any
) -> jax.Array:
    """Returns the numerator with the weighted sum of a step's values."""
    if problem.is_quantised and not problem.scales_values:
        weights = _times_columns(weights, smem.tiles.scales.at[slot])
    weights = weights.astype(problem.dtype)
    values = smem.tiles.numbers.at[slot]
    if problem.tuning.in_registers:
        add = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, values))
        return add(plgpu.ACC.init(numerator))
    buffer = smem.weights.at[lax.axis_index("warpgroup")]
    buffer[...] = weights
    plgpu.commit_smem()
    return numerator + product(buffer, values)


def _mask_values(problem: Problem, tile: Tile, step: Any, values: Any, pair: Any) -> None:
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
        _meet(pair)


def _meet(pair: Any) -> None:
    plgpu.barrier_arrive(pair)
    plgpu.barrier_wait(pair)


def _write(
    problem: Problem,
    tile: Tile,
    state: _State,
    out: Any,
    lse: Any,
    smem: Smem,
    barriers: Barriers,
) -> None:
    """Writes the tokens that the tile has, and the lse of all its rows."""
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    factor = 1.0 / jnp.where(state.denominator > 0, state.denominator, 1.0)
    smem.lse[rows] = state.maximum * LN2 + jnp.log(state.denominator)
    for begin, width in problem.staged_columns:
        part = state.numerator[:, begin : begin + width]
        part = part * across(factor, part.shape)
        smem.staging[rows] = part.astype(problem.dtype)
        plgpu.commit_smem()
        _meet(barriers.pair)  # a head's rows may lie in both halves

        @pl.loop(warpgroup, problem.group, step=COMPUTE_WARPGROUPS)
        def _(head: Any, begin: int = begin, width: int = width) -> None:
            target = out.at[:, tile.kv_head * problem.group + head, pl.ds(begin, width)]
            _write_tokens(problem, tile, smem.staging, head, target)

        if begin == 0:

            @pl.when(warpgroup == 0)
            def _() -> None:
                plgpu.copy_smem_to_gmem(smem.lse, lse.at[lax.axis_index("tile"), tile.kv_head])

        plgpu.wait_smem_to_gmem(0)
        if begin + width < problem.head_dim:
            _meet(barriers.pair)


def _write_tokens(problem: Problem, tile: Tile, staging: Any, head: Any, target: Any) -> None:
    """Copies a head's rows of the tokens that the tile has to `target`, [T, width].

    A copy has a fixed size: they leave in pieces of 64, 32, ... tokens, as their number is made up.
    Every piece begins at a multiple of 128 bytes of shared memory, which it has to.
    """
    unit = token_unit(problem.head_dim)

    def copy(token: Any, size: int) -> None:
        plgpu.copy_smem_to_gmem(
            staging.at[pl.ds(head * problem.tokens + token, size)],
            target.at[pl.ds(tile.first_token + token, size)],
        )

    done = jnp.int32(0)
    size = 1 << (problem.tokens.bit_length() - 1)
    while size >= unit:
        pl.when((tile.num_tokens & size) != 0)(functools.partial(copy, done, size))
        done += tile.num_tokens & size
        size //= 2
    for size in range(1, unit):
        pl.when(tile.num_tokens - done == size)(functools.partial(copy, done, size))
