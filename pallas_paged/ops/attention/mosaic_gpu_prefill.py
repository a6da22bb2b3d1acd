"""Ragged prefill for sm_90a in Pallas Mosaic GPU: many query tokens per sequence, keys in blocks.

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

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.attention.mosaic_gpu_prefill_load import load
from pallas_paged.ops.attention.mosaic_gpu_prefill_parts import (
    COMPUTE_WARPGROUPS,
    LOG2E,
    WARPGROUP_ROWS,
    Barriers,
    Inputs,
    Problem,
    Smem,
    Tile,
    read_tile,
    scratch_types,
)
from pallas_paged.ops.attention.prefill_config import PrefillTuning
from pallas_paged.ops.attention.prefill_plan import NUM_TOKENS, TILE_ROWS, PrefillPlan, token_unit

_LOWEST = -1e30  # below any logit, yet -inf minus this is -inf and never NaN


def prefill(
    q: jax.Array,
    cache: KVCache,
    block_tables: jax.Array,
    plan: PrefillPlan,
    *,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    tuning: PrefillTuning,
    into: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the tokens that the plan has.

    The other tokens' rows are those of `into`, which is overwritten if nobody else uses it; without
    it they are undefined in out and -inf in lse.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.k.shape
    problem = Problem(
        num_kv_heads,
        num_q_heads // num_kv_heads,
        head_dim,
        block_size,
        q.dtype,
        cache.k.dtype,
        scale,
        sliding_window,
        logits_soft_cap,
        tuning,
    )
    # A copy may not be longer than the array; beyond the array's end it reads zeros.
    missing = max(problem.tokens - num_tokens, 0)
    q, *others = (
        jnp.pad(array, ((0, missing), (0, 0), (0, 0))) if missing else array
        for array in (q, *([] if into is None else [into[0]]))
    )
    out_ref = jax.new_ref(others[0] if others else lax.empty(q.shape, q.dtype))
    rows = functools.partial(_per_row, problem=problem)
    inputs = Inputs(q, cache, block_tables, plan.tiles, rows(alibi_slopes), rows(sinks), out_ref)
    tile_lse = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=jax.ShapeDtypeStruct((plan.tiles.shape[0], num_kv_heads, TILE_ROWS), jnp.float32),
        scratch_types=scratch_types(problem),
        grid=(plan.tiles.shape[0], num_kv_heads),
        grid_names=("tile", "kv_head"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )(inputs)
    # What follows XLA leaves out of the program if the caller drops lse.
    kv_heads, heads = jnp.divmod(jnp.arange(num_q_heads, dtype=jnp.int32), problem.group)
    offsets = heads[None, :] * problem.tokens + plan.token_offsets[:, None]
    lse = tile_lse[plan.token_tiles[:, None], kv_heads[None, :], offsets]
    other_lse = -jnp.inf if into is None else into[1]
    lse = jnp.where(plan.token_tiles[:, None] >= 0, lse, other_lse)
    return out_ref[...][:num_tokens], lse


def _per_row(per_head: jax.Array | None, problem: Problem) -> jax.Array | None:
    """Returns numbers per query head as f32[Hk, 128], one for each of a tile's rows."""
    if per_head is None:
        return None
    rows = jnp.repeat(per_head, problem.tokens).reshape(problem.num_kv_heads, -1)
    return jnp.pad(rows, ((0, 0), (0, TILE_ROWS - rows.shape[1])))


def _kernel(problem: Problem, inputs: Inputs, lse: Any, *, smem: Smem, barriers: Barriers) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(inputs.tiles[lax.axis_index("tile"), NUM_TOKENS] > 0)
    def _() -> None:
        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(problem.registers[0], action="decrease")
            load(problem, read_tile(problem, inputs.tiles), inputs, smem, barriers)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(problem.registers[1], action="increase")
            _compute(problem, read_tile(problem, inputs.tiles), inputs, lse, smem, barriers)


class _State(NamedTuple):
    """Online softmax over the keys so far, of one warpgroup's rows; logits are in base 2."""

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
    row = _iota((WARPGROUP_ROWS,), 0) + warpgroup * WARPGROUP_ROWS
    position = tile.first_position + lax.rem(row, jnp.int32(problem.tokens))  # [64]
    per_row = functools.partial(plgpu.load, layout=_ROW, optimized=False)  # from global memory
    slope = None if inputs.slopes is None else per_row(inputs.slopes.at[tile.kv_head, rows])
    state = _State(
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), _LOWEST, jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, problem.head_dim), jnp.float32), _MATRIX),
    )
    if inputs.sinks is not None:
        # The sink is a key without a value. Padding tokens, which have no keys, have no sink.
        sink = jnp.maximum(per_row(inputs.sinks.at[tile.kv_head, rows]) * LOG2E, _LOWEST)
        has_keys = jnp.where(tile.key_end > 0, 1.0, 0.0)
        state = state._replace(maximum=sink, denominator=state.denominator + has_keys)
    for begin, width in problem.staged_columns:
        plgpu.barrier_wait(barriers.q)
        smem.q[rows, pl.ds(begin, width)] = plgpu.load(smem.staging.at[rows], layout=_MATRIX)
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
        logits = _product(
            lambda: (smem.q.at[rows], keys.transpose((1, 0))), problem.tuning.tile_keys
        )
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


_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # a number per row of a matrix
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a number per column


def _iota(shape: tuple[int, ...], axis: int, layout: Any = _ROW) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def _down(row: jax.Array, width: int) -> jax.Array:
    """Returns one number per row, [64], as [64, width]."""
    return lax.broadcast_in_dim(row, (WARPGROUP_ROWS, width), (0,))


def _times_columns(matrix: jax.Array, factors: Any) -> jax.Array:
    """Returns `matrix`, [64, C], times C numbers in shared memory."""
    factors = plgpu.load(factors, layout=_COLUMN, optimized=False)
    return matrix * plgpu.layout_cast(lax.broadcast_in_dim(factors, matrix.shape, (1,)), _MATRIX)


def _product(operands: Any, width: int) -> jax.Array:
    """Returns the product of two operands of the tensor cores, f32[64, width]."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, *operands())
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32))


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
        # cap * tanh(x / cap), by way of exp2: the hardware's tanh has 11 bits only. A root's
        # reciprocal is one instruction, that of a number some, with registers of their own.
        root = lax.rsqrt(jnp.exp2(logits) + 1.0)
        logits = cap * LOG2E - (2 * cap * LOG2E) * (root * root)
    if slope is None and is_full:
        return logits
    # Exact as floats below 2^24 tokens, and half the registers of integers beside floats. A thread
    # has the same columns of every 8: added in this order nothing but those is known before the
    # loop over the steps, and kept in registers meanwhile.
    key = _iota((WARPGROUP_ROWS, size), 1, _MATRIX)
    within_8 = key & 7
    distances = within_8.astype(jnp.float32) + _down(distance.astype(jnp.float32), size)
    distances = distances + (key - within_8).astype(jnp.float32)
    if slope is not None:
        logits = logits + _down(slope * LOG2E, size) * distances
    if not is_full:
        visible = distances <= 0
        if problem.sliding_window is not None:
            visible &= distances > -problem.sliding_window
        logits = jnp.where(visible, logits, -jnp.inf)
    return logits


def _update(state: _State, logits: jax.Array) -> tuple[_State, jax.Array]:
    """Returns the state rescaled to the new maximum, and the weights [64, C] of the new keys."""
    size = logits.shape[1]
    maximum = jnp.maximum(state.maximum, logits.max(axis=1))
    correction = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(logits - _down(maximum, size))
    denominator = state.denominator * correction + weights.sum(axis=1)
    numerator = state.numerator * _down(correction, state.numerator.shape[1])
    return _State(maximum, denominator, numerator), weights


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
    return numerator + _product(lambda: (buffer, values), problem.head_dim)


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
                key = _iota((WARPGROUP_ROWS,), 0) + (begin + part * WARPGROUP_ROWS)
                is_ours = (key >= tile.key_begin) & (key < tile.key_end)
                for column, width in problem.staged_columns:  # few registers are left
                    some = values.at[rows, pl.ds(column, width)]
                    old = plgpu.load(some, layout=_MATRIX)
                    some[...] = jnp.where(_down(is_ours, width), old, jnp.zeros_like(old))

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
    smem.lse[rows] = state.maximum * (1 / LOG2E) + jnp.log(state.denominator)
    for begin, width in problem.staged_columns:
        part = state.numerator[:, begin : begin + width] * _down(factor, width)
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
