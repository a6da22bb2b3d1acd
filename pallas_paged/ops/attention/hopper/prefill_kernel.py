"""The sm_90a kernel of ragged prefill: many query tokens per sequence, keys in blocks.

A thread block computes tiles, each of one KV head: n consecutive tokens of one sequence and all G
query heads of the group, so that a key is loaded once for all of them. The tile has 128 rows, of
which G * n are in use, head after head (row = head * n + token): each head is one copy of n tokens
of q, from whatever token the tile begins at. Two warpgroups compute 64 rows each; a third one keeps
the queue of keys and values full, across the borders of tiles (`prefill_walk.py`). The softmax is
online (FlashAttention, arXiv 2205.14135), in float32 and base 2.

Tensor cores multiply while others take exponents, as in FlashAttention-3 (arXiv 2407.08608), in two
ways that `PrefillTuning` has. With `turns` one warpgroup begins its products while the other one is
at its softmax, and tells it when they are begun. With `ahead` a warpgroup begins the product of a
step's keys together with that of the values of the step before, whose weights wait in registers,
and takes the softmax of the first under the second.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_load import bring
from pallas_paged.ops.attention.hopper.prefill_mask import mask_values
from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    WARPGROUP_ROWS,
    Barriers,
    Inputs,
    Problem,
    Smem,
)
from pallas_paged.ops.attention.hopper.prefill_softmax import (
    Softened,
    State,
    empty,
    finish_logits,
    soften,
)
from pallas_paged.ops.attention.hopper.prefill_walk import (
    Tile,
    num_own_tiles,
    over_own_tiles,
    read_tile,
)
from pallas_paged.ops.attention.hopper.prefill_write import write
from pallas_paged.ops.attention.hopper.tiles import (
    COLUMN_LAYOUT,
    ROW_LAYOUT,
    TILE_LAYOUT,
    iota,
    product,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import LOG2E, LOWEST, across
from pallas_paged.ops.mosaic_gpu import load


def prefill_kernel(
    problem: Problem, inputs: Inputs, lse: Any, *, smem: Smem, barriers: Barriers
) -> None:
    """One thread block: its tiles one after the other, if it has any."""

    def load_and_convert() -> None:
        plgpu.set_max_registers(problem.registers[0], action="decrease")
        bring(problem, inputs, smem, barriers)

    def compute() -> None:
        plgpu.set_max_registers(problem.registers[1], action="increase")
        _compute(problem, inputs, lse, smem, barriers)

    @pl.when(num_own_tiles(problem, inputs) > 0)
    def _() -> None:
        # One or the other: of two conditions the compiler would take it that both may hold, and
        # keep in the registers of those that load what those that compute need.
        lax.cond(lax.axis_index("warpgroup") < COMPUTE_WARPGROUPS, compute, load_and_convert)


class _Rows(NamedTuple):
    """What one warpgroup needs for its 64 rows of the tile."""

    problem: Problem
    tile: Tile
    smem: Smem
    barriers: Barriers
    position: jax.Array  # i32[64]
    slope: jax.Array | None  # f32[64]

    @property
    def queries(self) -> Any:
        """[64, D] in shared memory."""
        return self.smem.q.at[_own_rows()]

    def slots(self, step: Any) -> tuple[Any, Any]:
        """Returns the places of a step's keys and values."""
        k_slot = 2 * lax.rem(self.tile.in_line(step), self.problem.stages)
        return k_slot, k_slot + 1

    def take_turn(self) -> None:
        """Waits until the other warpgroup has begun its products, if they take turns."""
        _take_turn(self.problem, self.barriers)

    def pass_turn(self) -> None:
        """Tells the other warpgroup that it may begin its products."""
        _pass_turn(self.problem, self.barriers)


def _take_turn(problem: Problem, barriers: Barriers) -> None:
    if problem.tuning.turns:
        plgpu.barrier_wait(barriers.turns.at[lax.axis_index("warpgroup")])


def _pass_turn(problem: Problem, barriers: Barriers) -> None:
    if problem.tuning.turns:
        other = COMPUTE_WARPGROUPS - 1 - lax.axis_index("warpgroup")
        plgpu.barrier_arrive(barriers.turns.at[other])


def _own_rows() -> Any:
    return pl.ds(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _compute(problem: Problem, inputs: Inputs, lse: Any, smem: Smem, barriers: Barriers) -> None:
    """Computes one warpgroup's 64 rows of each tile and writes them.

    The queries of the next tile arrive meanwhile where the result will be staged, and are taken
    before that.
    """
    is_first = lax.axis_index("warpgroup") == 0
    take_queries = functools.partial(_take_queries, problem, smem, barriers)

    def one_tile(tile: Tile, carried: None) -> None:
        def unless_last(do: Callable[[], None]) -> None:
            if problem.tuning.persistent:
                pl.when(tile.number + 1 < num_own_tiles(problem, inputs))(do)

        unless_last(lambda: plgpu.barrier_arrive(barriers.staging_free))
        state = _attend(problem, tile, inputs, smem, barriers)
        unless_last(take_queries)
        again = read_tile(problem, inputs, tile.number)  # fewer registers until then
        write(problem, again, state, inputs.out, lse, smem, barriers)

    take_queries()
    pl.when(jnp.logical_not(is_first))(lambda: _pass_turn(problem, barriers))
    over_own_tiles(problem, inputs, one_tile)
    # Hears the last, so that no barrier is left within a phase.
    pl.when(is_first)(lambda: _take_turn(problem, barriers))
    plgpu.wait_smem_to_gmem(0)


def _take_queries(problem: Problem, smem: Smem, barriers: Barriers) -> None:
    """Moves one warpgroup's queries to where they are multiplied, part after part."""
    rows = _own_rows()
    for begin, width in problem.staged_columns:
        plgpu.barrier_wait(barriers.q)
        smem.q[rows, pl.ds(begin, width)] = plgpu.load(smem.staging.at[rows], layout=TILE_LAYOUT)
        plgpu.commit_smem()
        if begin + width < problem.head_dim:
            plgpu.barrier_arrive(barriers.staging_free)


def _attend(problem: Problem, tile: Tile, inputs: Inputs, smem: Smem, barriers: Barriers) -> State:
    """Returns the state of one warpgroup's rows of the tile after all its steps."""
    row = iota((WARPGROUP_ROWS,), 0, ROW_LAYOUT) + lax.axis_index("warpgroup") * WARPGROUP_ROWS
    position = tile.first_position + lax.rem(row, jnp.int32(problem.tokens))
    slope = None
    if inputs.slopes is not None:
        slope = load(inputs.slopes.at[tile.kv_head, _own_rows()], ROW_LAYOUT)
    state = empty(problem.head_dim)
    if inputs.sinks is not None:
        # The sink is a key without a value. Padding tokens, which have no keys, have no sink.
        sink = load(inputs.sinks.at[tile.kv_head, _own_rows()], ROW_LAYOUT)
        sink = jnp.maximum(sink * LOG2E, LOWEST)
        has_keys = jnp.where(tile.key_end > 0, 1.0, 0.0)
        state = state._replace(maximum=sink, denominator=state.denominator + has_keys)
    rows = _Rows(problem, tile, smem, barriers, position, slope)
    rows.take_turn()
    if problem.tuning.ahead:
        carried = _weigh(rows, False, tile.begin, state)
        carried = _over_steps(
            rows, tile.begin + 1, functools.partial(_add_and_weigh, rows), carried
        )
        state = _add(rows, tile.end - 1, carried)
    else:

        def weigh_and_add(is_full: bool, step: Any, state: State) -> State:
            return _add(rows, step, _weigh(rows, is_full, step, state))

        state = _over_steps(rows, tile.begin, weigh_and_add, state)
    rows.pass_turn()
    return state


def _over_steps(rows: _Rows, begin: Any, body: Callable[..., Any], carried: Any) -> Any:
    """Runs `body(is_full, step, carried)` for each step from `begin`, the first one or the next."""
    tile = rows.tile
    if rows.problem.sliding_window is not None:
        part = functools.partial(body, False)
        carried = lax.fori_loop(begin, tile.full_begin, part, carried)
        begin = jnp.maximum(begin, tile.full_begin)
    carried = lax.fori_loop(begin, tile.full_end, functools.partial(body, True), carried)
    begin = jnp.maximum(begin, tile.full_end)
    return lax.fori_loop(begin, tile.end, functools.partial(body, False), carried)


class _Weighed(NamedTuple):
    """A state to which the values of a step are still to be added."""

    state: State
    weights: Any  # [64, C] in registers; None: in shared memory


def _weigh(rows: _Rows, is_full: bool, step: Any, state: State) -> _Weighed:
    """Multiplies the keys of a step; it is this warpgroup's turn."""
    k_slot, _ = rows.slots(step)
    plgpu.barrier_wait(rows.barriers.tiles.filled.at[k_slot])

    def multiply(logits: Any) -> jax.Array:
        plgpu.wgmma(logits, rows.queries, rows.smem.tiles.numbers.at[k_slot].transpose((1, 0)))
        rows.pass_turn()
        return logits[...]

    logits = pl.run_scoped(multiply, _logits_type(rows))
    softened = _soften(rows, is_full, step, state, logits)
    return _settle(rows, is_full, step, softened, state.numerator)


def _add(rows: _Rows, step: Any, weighed: _Weighed) -> State:
    """Multiplies the values of a step, when it is this warpgroup's turn."""
    state, weights = weighed
    _, v_slot = rows.slots(step)
    values = rows.smem.tiles.numbers.at[v_slot]
    rows.take_turn()
    if rows.problem.tuning.in_registers:
        add = pl.run_state(lambda numerator: plgpu.wgmma(numerator, weights, values))
        numerator = add(plgpu.ACC.init(state.numerator))
    else:
        numerator = state.numerator + product(_weights_in_memory(rows), values)
    plgpu.barrier_arrive(rows.barriers.tiles.consumed.at[v_slot])
    return state._replace(numerator=numerator)


def _add_and_weigh(rows: _Rows, is_full: bool, step: Any, weighed: _Weighed) -> _Weighed:
    """Multiplies the keys of a step and the values of the one before, both at once."""
    state, weights = weighed
    k_slot, (_, v_slot) = rows.slots(step)[0], rows.slots(step - 1)
    keys, values = (rows.smem.tiles.numbers.at[slot] for slot in (k_slot, v_slot))
    plgpu.barrier_wait(rows.barriers.tiles.filled.at[k_slot])
    rows.take_turn()

    def multiply(logits: Any, numerator: Any, weights: Any) -> Softened:
        plgpu.wgmma(logits, rows.queries, keys.transpose((1, 0)))
        plgpu.wgmma(numerator, weights, values)
        rows.pass_turn()
        finished = plgpu.wgmma_accumulator_load(logits, wait_n=1)
        softened = _soften(rows, is_full, step, state, finished)
        # Nothing of this is to be left for when the values have been multiplied.
        return Softened(*lax.optimization_barrier(tuple(softened)))

    if rows.problem.tuning.in_registers:

        def run(numerator: Any, softened: Softened) -> None:
            result = pl.run_scoped(
                lambda logits: multiply(logits, numerator, weights), _logits_type(rows)
            )
            for ref, value in zip(softened, result, strict=True):
                ref[...] = value

        nothing = jnp.zeros((WARPGROUP_ROWS, rows.problem.tuning.tile_keys), jnp.float32)
        before = Softened(
            state.maximum,
            state.denominator,
            state.denominator,
            plgpu.layout_cast(nothing, TILE_LAYOUT),
        )
        numerator, softened = pl.run_state(lambda refs: run(*refs))(
            (plgpu.ACC.init(state.numerator), before)
        )
    else:

        def run_apart(logits: Any, added: Any) -> tuple[Softened, jax.Array]:
            softened = multiply(logits, added, _weights_in_memory(rows))
            return softened, state.numerator + added[...]

        added = plgpu.ACC((WARPGROUP_ROWS, rows.problem.head_dim), jnp.float32)
        softened, numerator = pl.run_scoped(run_apart, _logits_type(rows), added)
    plgpu.barrier_arrive(rows.barriers.tiles.consumed.at[v_slot])
    return _settle(rows, is_full, step, softened, numerator)


def _logits_type(rows: _Rows) -> Any:
    return plgpu.ACC((WARPGROUP_ROWS, rows.problem.tuning.tile_keys), jnp.float32)


def _weights_in_memory(rows: _Rows) -> Any:
    return rows.smem.weights.at[lax.axis_index("warpgroup")]


def _soften(rows: _Rows, is_full: bool, step: Any, state: State, logits: jax.Array) -> Softened:
    """Returns the softmax of a step's products of queries and keys, which are read no more."""
    problem, (k_slot, _) = rows.problem, rows.slots(step)
    factor = None
    if problem.is_quantised:
        logits = _times_columns(logits, rows.smem.tiles.scales.at[k_slot])
    elif problem.folds_scale and rows.slope is None:
        factor = problem.logits_factor
    else:
        logits = logits * problem.logits_factor
    plgpu.barrier_arrive(rows.barriers.tiles.consumed.at[k_slot])
    distance = step * problem.tuning.tile_keys - rows.position  # of the step's first key
    logits = finish_logits(problem, logits, distance, rows.slope, is_full)
    return soften(state.maximum, state.denominator, logits, factor)


def _settle(
    rows: _Rows, is_full: bool, step: Any, softened: Softened, numerator: jax.Array
) -> _Weighed:
    """Brings the numerator to the new maximum, and makes weights and values ready for a product."""
    problem, (_, v_slot) = rows.problem, rows.slots(step)
    maximum, denominator, correction, weights = softened
    state = State(maximum, denominator, numerator * across(correction, numerator.shape))
    plgpu.barrier_wait(rows.barriers.tiles.filled.at[v_slot])
    if problem.is_quantised and not problem.scales_values:
        weights = _times_columns(weights, rows.smem.tiles.scales.at[v_slot])
    weights = weights.astype(problem.dtype)
    if not (is_full or problem.is_quantised):  # the load has masked quantised ones
        values = rows.smem.tiles.numbers.at[v_slot]
        mask_values(problem, rows.tile, step, values, rows.barriers.pair)
    if problem.tuning.in_registers:
        return _Weighed(state, weights)
    _weights_in_memory(rows)[...] = weights
    plgpu.commit_smem()
    return _Weighed(state, None)


def _times_columns(matrix: jax.Array, factors: Any) -> jax.Array:
    """Returns `matrix`, [64, C], times C numbers in shared memory."""
    return matrix * spread_columns(load(factors, COLUMN_LAYOUT), matrix.shape)
