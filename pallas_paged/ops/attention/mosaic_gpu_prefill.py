"""Ragged prefill for sm_90a in Pallas Mosaic GPU: many query tokens per sequence, keys in blocks.

One thread block computes one tile of one KV head: n consecutive tokens of one sequence and all G
query heads of the group, so that a key is loaded once for all of them. The tile has 128 rows, of
which G * n are in use, head after head (row = head * n + token): each head is one copy of n tokens
of q, from whatever token the tile begins at. Two warpgroups compute 64 rows each; a third one keeps
the queue of keys and values full. The softmax is online (FlashAttention, arXiv 2205.14135), in
float32 and base 2; warp specialisation follows FlashAttention-3 (arXiv 2407.08608).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.prefill_config import PrefillTuning
from pallas_paged.ops.attention.prefill_plan import (
    FIRST_POSITION,
    FIRST_TOKEN,
    KEY_BEGIN,
    KEY_END,
    NUM_TOKENS,
    SEQUENCE,
    TILE_ROWS,
    PrefillPlan,
    tile_tokens,
    token_unit,
)

_WARPGROUP_ROWS = 64
_COMPUTE_WARPGROUPS = 2
_WARPS = 4
_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # below any logit, yet -inf minus this is -inf and never NaN


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the kernel is specialised for."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: Any
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    tuning: PrefillTuning

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return tile_tokens(self.group, self.head_dim)

    @property
    def block_rows(self) -> int:
        """Keys that one copy brings: a block, or the part of it that fits into a step."""
        return min(self.block_size, self.tuning.tile_keys)

    @property
    def staged_columns(self) -> tuple[tuple[int, int], ...]:
        """(begin, width) of the parts of head_dim that lie in the staging buffer one by one."""
        width = self.head_dim if self.head_dim <= 128 else 64
        return tuple((begin, width) for begin in range(0, self.head_dim, width))


class _Inputs(NamedTuple):
    """The kernel's arguments in global memory, the result among them."""

    q: Any  # [T, Hq, D]
    k_cache: Any  # [N, Hk, S, D]
    v_cache: Any  # [N, Hk, S, D]
    block_tables: Any  # i32[B, M]
    tiles: Any  # i32[X, 6]
    slopes: Any  # f32[Hk, 128], or None
    sinks: Any  # f32[Hk, 128], or None
    out: Any  # [T, Hq, D], written


class _Smem(NamedTuple):
    """Shared memory; C keys per step, G stages of them."""

    q: Any  # [128, D]
    k: Any  # [G, C, D]
    v: Any  # [G, C, D]
    weights: Any  # [2, 64, C], or None
    staging: Any  # [128, width], a part of q's columns, at the end of the result's; not swizzled,
    # so that a copy may begin at any token
    lse: Any  # f32[128]


class _Barriers(NamedTuple):
    """`k`, `v`: a stage is full; `k_consumed`, `v_consumed`: both warpgroups are done with it.

    `pair` holds the two computing warpgroups together.
    """

    q: Any
    staging_free: Any
    k: Any
    v: Any
    k_consumed: Any
    v_consumed: Any
    pair: Any


def prefill(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
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
    _, num_kv_heads, block_size, _ = k_cache.shape
    problem = _Problem(
        num_kv_heads,
        num_q_heads // num_kv_heads,
        head_dim,
        block_size,
        k_cache.dtype,
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
    inputs = _Inputs(
        q, k_cache, v_cache, block_tables, plan.tiles, rows(alibi_slopes), rows(sinks), out_ref
    )
    tile_lse = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=jax.ShapeDtypeStruct((plan.tiles.shape[0], num_kv_heads, TILE_ROWS), jnp.float32),
        scratch_types=_scratch(problem),
        grid=(plan.tiles.shape[0], num_kv_heads),
        grid_names=("tile", "kv_head"),
        num_threads=_COMPUTE_WARPGROUPS + 1,
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


def _per_row(per_head: jax.Array | None, problem: _Problem) -> jax.Array | None:
    """Returns numbers per query head as f32[Hk, 128], one for each of a tile's rows."""
    if per_head is None:
        return None
    rows = jnp.repeat(per_head, problem.tokens).reshape(problem.num_kv_heads, -1)
    return jnp.pad(rows, ((0, 0), (0, TILE_ROWS - rows.shape[1])))


def _swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory whose rows of the last dimension the tensor cores can read."""
    row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(swizzle for swizzle in (128, 64, 32) if row_bytes % swizzle == 0)
    tile: Any = plgpu.TilingTransform  # mypy takes these two for abstract
    swizzled: Any = plgpu.SwizzleTransform
    transforms = (tile((8, swizzle // jnp.dtype(dtype).itemsize)), swizzled(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _scratch(problem: _Problem) -> dict[str, Any]:
    tuning, dim, dtype = problem.tuning, problem.head_dim, problem.dtype
    copies = tuning.tile_keys // problem.block_rows
    weights = None
    if not tuning.in_registers:
        weights = _swizzled((_COMPUTE_WARPGROUPS, _WARPGROUP_ROWS, tuning.tile_keys), dtype)
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=tuning.stages)
    consumed = plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS, num_barriers=tuning.stages)
    return {
        "smem": _Smem(
            q=_swizzled((TILE_ROWS, dim), dtype),
            k=_swizzled((tuning.stages, tuning.tile_keys, dim), dtype),
            v=_swizzled((tuning.stages, tuning.tile_keys, dim), dtype),
            weights=weights,
            staging=plgpu.SMEM((TILE_ROWS, problem.staged_columns[0][1]), dtype),
            lse=plgpu.SMEM((TILE_ROWS,), jnp.float32),
        ),
        "barriers": _Barriers(
            q=plgpu.Barrier(num_arrivals=problem.group),
            staging_free=plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS),
            k=filled,
            v=filled,
            k_consumed=consumed,
            v_consumed=consumed,
            pair=plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS),
        ),
    }


class _Tile(NamedTuple):
    """A record of the plan, and the steps that follow from it.

    Steps [begin, full_begin) and [full_end, end) have keys that some token cannot see.
    """

    kv_head: Any
    first_token: Any
    num_tokens: Any
    first_position: Any
    sequence: Any
    key_begin: Any
    key_end: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


def _read_tile(problem: _Problem, tiles: Any) -> _Tile:
    tile = lax.axis_index("tile")
    size = problem.tuning.tile_keys
    key_begin, key_end = tiles[tile, KEY_BEGIN], tiles[tile, KEY_END]
    first_position = tiles[tile, FIRST_POSITION]
    begin, end = key_begin // size, pl.cdiv(key_end, size)
    full_begin = begin
    if problem.sliding_window is not None:
        full_begin = pl.cdiv(jnp.maximum(key_end - problem.sliding_window, 0), size)
        full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip((first_position + 1) // size, full_begin, end)
    return _Tile(
        lax.axis_index("kv_head"),
        tiles[tile, FIRST_TOKEN],
        tiles[tile, NUM_TOKENS],
        first_position,
        tiles[tile, SEQUENCE],
        key_begin,
        key_end,
        begin,
        full_begin,
        full_end,
        end,
    )


def _kernel(
    problem: _Problem, inputs: _Inputs, lse: Any, *, smem: _Smem, barriers: _Barriers
) -> None:
    tile = _read_tile(problem, inputs.tiles)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(tile.num_tokens > 0)
    def _() -> None:
        @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            _load(problem, tile, inputs, smem, barriers)

        @pl.when(warpgroup < _COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            _compute(problem, tile, inputs, lse, smem, barriers)


def _load(
    problem: _Problem, tile: _Tile, inputs: _Inputs, smem: _Smem, barriers: _Barriers
) -> None:
    """Fills shared memory with q, and stage after stage with keys and values."""
    tuning, rows, tokens = problem.tuning, problem.block_rows, problem.tokens
    copies = tuning.tile_keys // rows
    copies_per_block = problem.block_size // rows
    last_block = (tile.key_end - 1) // problem.block_size
    for begin, width in problem.staged_columns:
        if begin > 0:
            plgpu.barrier_wait(barriers.staging_free)

        @pl.loop(0, problem.group)
        def _(head: Any, begin: int = begin, width: int = width) -> None:
            q = inputs.q.at[:, tile.kv_head * problem.group + head, pl.ds(begin, width)]
            plgpu.copy_gmem_to_smem(
                q.at[pl.ds(tile.first_token, tokens)],
                smem.staging.at[pl.ds(head * tokens, tokens)],
                barriers.q,
            )

    @pl.loop(tile.begin, tile.end)
    def _(step: Any) -> None:
        slot = lax.rem(step - tile.begin, tuning.stages)
        for cache, buffer, filled, consumed in (
            (inputs.k_cache, smem.k, barriers.k, barriers.k_consumed),
            (inputs.v_cache, smem.v, barriers.v, barriers.v_consumed),
        ):

            @pl.when(step - tile.begin >= tuning.stages)
            def _(slot: Any = slot, consumed: Any = consumed) -> None:
                plgpu.barrier_wait(consumed.at[slot])

            @plgpu.warp_map
            def _(
                warp: Any, cache: Any = cache, buffer: Any = buffer, filled: Any = filled
            ) -> None:
                def copy(i: Any) -> None:
                    # Behind the last block the table may end: bring that one again. All keys
                    # outside [key_begin, key_end) are masked.
                    piece = step * copies + i
                    block = jnp.minimum(piece // copies_per_block, last_block)
                    page = inputs.block_tables[tile.sequence, block]
                    begin = lax.rem(piece, copies_per_block) * rows
                    plgpu.copy_gmem_to_smem(
                        cache.at[page, tile.kv_head, pl.ds(begin, rows)],
                        buffer.at[slot, pl.ds(i * rows, rows)],
                        filled.at[slot],
                    )

                for round_begin in range(0, copies, _WARPS):
                    is_whole = round_begin + _WARPS <= copies
                    once = functools.partial(copy, round_begin + warp)
                    once() if is_whole else pl.when(round_begin + warp < copies)(once)

    @pl.loop(jnp.maximum(tile.begin, tile.end - tuning.stages), tile.end)
    def _(step: Any) -> None:
        """Hears all that the others say, so that no barrier is left in the middle of a phase."""
        slot = lax.rem(step - tile.begin, tuning.stages)
        plgpu.barrier_wait(barriers.k_consumed.at[slot])
        plgpu.barrier_wait(barriers.v_consumed.at[slot])


class _State(NamedTuple):
    """Online softmax over the keys so far, of one warpgroup's rows; logits are in base 2."""

    maximum: jax.Array  # f32[64]
    denominator: jax.Array  # f32[64]
    numerator: jax.Array  # f32[64, D]


def _compute(
    problem: _Problem,
    tile: _Tile,
    inputs: _Inputs,
    lse: Any,
    smem: _Smem,
    barriers: _Barriers,
) -> None:
    """Computes one warpgroup's 64 rows of the tile and writes them."""
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
    row = _iota((_WARPGROUP_ROWS,), 0) + warpgroup * _WARPGROUP_ROWS
    position = tile.first_position + lax.rem(row, jnp.int32(problem.tokens))  # [64]
    per_row = functools.partial(plgpu.load, layout=_ROW, optimized=False)  # from global memory
    slope = None if inputs.slopes is None else per_row(inputs.slopes.at[tile.kv_head, rows])
    state = _State(
        plgpu.layout_cast(jnp.full((_WARPGROUP_ROWS,), _LOWEST, jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS,), jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS, problem.head_dim), jnp.float32), _MATRIX),
    )
    if inputs.sinks is not None:
        # The sink is a key without a value. Padding tokens, which have no keys, have no sink.
        sink = per_row(inputs.sinks.at[tile.kv_head, rows]) * _LOG2E
        has_keys = jnp.where(tile.key_end > 0, 1.0, 0.0)
        state = state._replace(maximum=sink, denominator=state.denominator + has_keys)
    for begin, width in problem.staged_columns:
        plgpu.barrier_wait(barriers.q)
        smem.q[rows, pl.ds(begin, width)] = plgpu.load(smem.staging.at[rows], layout=_MATRIX)
        plgpu.commit_smem()
        if begin + width < problem.head_dim:
            plgpu.barrier_arrive(barriers.staging_free)

    def step(is_full: bool, step: Any, state: _State) -> _State:
        slot = lax.rem(step - tile.begin, problem.tuning.stages)
        if not is_full:
            # Now, because the logits will need the registers that are left.
            plgpu.barrier_wait(barriers.v.at[slot])
            _mask_values(problem, tile, step, smem.v.at[slot], barriers.pair)
        plgpu.barrier_wait(barriers.k.at[slot])
        logits = _product(
            lambda: (smem.q.at[rows], smem.k.at[slot].transpose((1, 0))), problem.tuning.tile_keys
        )
        plgpu.barrier_arrive(barriers.k_consumed.at[slot])
        distance = step * problem.tuning.tile_keys - position  # of the step's first key
        logits = _finish_logits(problem, logits, distance, slope, is_full)
        state, weights = _update(state, logits)
        if is_full:
            plgpu.barrier_wait(barriers.v.at[slot])
        numerator = _add_values(problem, state.numerator, weights, smem, slot)
        plgpu.barrier_arrive(barriers.v_consumed.at[slot])
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
    return lax.broadcast_in_dim(row, (_WARPGROUP_ROWS, width), (0,))


def _product(operands: Any, width: int) -> jax.Array:
    """Returns the product of two operands of the tensor cores, f32[64, width]."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, *operands())
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((_WARPGROUP_ROWS, width), jnp.float32))


def _finish_logits(
    problem: _Problem,
    logits: jax.Array,  # [64, C]
    distance: jax.Array,  # [64]
    slope: jax.Array | None,  # [64]
    is_full: bool,
) -> jax.Array:
    """Scales, caps, slopes and masks; returns the logits in base 2.

    `distance` is that from each row's query to the first of the C keys.
    """
    size = problem.tuning.tile_keys
    cap = problem.logits_soft_cap
    if cap is None:
        logits = logits * (problem.scale * _LOG2E)
    else:
        # cap * tanh(x / cap), by way of exp2: the hardware's tanh has 11 bits only
        power = jnp.exp2(logits * (problem.scale * 2 * _LOG2E / cap))
        logits = cap * _LOG2E - (2 * cap * _LOG2E) / (power + 1.0)
    if slope is None and is_full:
        return logits
    # Exact as floats below 2^24 tokens, and half the registers of integers beside floats.
    key = _iota((_WARPGROUP_ROWS, size), 1, _MATRIX).astype(jnp.float32)
    distances = key + _down(distance.astype(jnp.float32), size)
    if slope is not None:
        logits = logits + _down(slope * _LOG2E, size) * distances
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
    problem: _Problem, numerator: jax.Array, weights: jax.Array, smem: _Smem, slot: Any
) -> jax.Array:
    """Returns the numerator with the weighted sum of a step's values."""
    weights = weights.astype(problem.dtype)
    values = smem.v.at[slot]
    if problem.tuning.in_registers:
        add = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, values))
        return add(plgpu.ACC.init(numerator))
    buffer = smem.weights.at[lax.axis_index("warpgroup")]
    buffer[...] = weights
    plgpu.commit_smem()
    return numerator + _product(lambda: (buffer, values), problem.head_dim)


def _mask_values(problem: _Problem, tile: _Tile, step: Any, values: Any, pair: Any) -> None:
    """Puts 0 where `values`, [C, D] in shared memory, has no value of this tile's.

    There may be NaN, and the weight 0 does not get rid of that.
    """
    size = problem.tuning.tile_keys
    begin = step * size
    is_edge = (begin < tile.key_begin) | (begin + size > tile.key_end)

    @pl.when(is_edge)
    def _() -> None:
        warpgroup = lax.axis_index("warpgroup")
        for part in range(size // _WARPGROUP_ROWS):

            @pl.when(warpgroup == part % _COMPUTE_WARPGROUPS)
            def _(part: int = part) -> None:
                rows = pl.ds(part * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
                key = _iota((_WARPGROUP_ROWS,), 0) + (begin + part * _WARPGROUP_ROWS)
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
    problem: _Problem,
    tile: _Tile,
    state: _State,
    out: Any,
    lse: Any,
    smem: _Smem,
    barriers: _Barriers,
) -> None:
    """Writes the tokens that the tile has, and the lse of all its rows."""
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
    denominator = jnp.where(state.denominator > 0, state.denominator, 1.0)
    smem.lse[rows] = state.maximum * (1 / _LOG2E) + jnp.log(state.denominator)
    for begin, width in problem.staged_columns:
        part = state.numerator[:, begin : begin + width] / _down(denominator, width)
        smem.staging[rows] = part.astype(problem.dtype)
        plgpu.commit_smem()
        _meet(barriers.pair)  # a head's rows may lie in both halves

        @pl.loop(warpgroup, problem.group, step=_COMPUTE_WARPGROUPS)
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


def _write_tokens(problem: _Problem, tile: _Tile, staging: Any, head: Any, target: Any) -> None:
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
