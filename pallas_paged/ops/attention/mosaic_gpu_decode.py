"""Decode for sm_90a in Pallas Mosaic GPU: one to eight query tokens per sequence, keys in blocks.

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
belongs if the CTA has seen all of the item's keys, else as a partial result that `_merge` combines.

What the interpreter cannot see (it takes a warpgroup for one thread) is noted where it matters:
`commit_smem` between writes to shared memory and the tensor core or TMA that reads them, and the
barriers of the warpgroup before a tile that all four warps have read is loaded anew.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.decode_problem import DecodeProblem, scratch_types
from pallas_paged.ops.attention.mosaic_gpu_decode_merge import merge
from pallas_paged.ops.attention.mosaic_gpu_decode_parts import (
    COMPILER_PARAMS,
    LOG2E,
    TILE_LAYOUT,
    as_column,
    empty,
    finish,
    per_column,
    sequence_and_head,
    spread,
    store,
    write,
    write_padding,
)
from pallas_paged.ops.attention.mosaic_gpu_quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scale_pitch,
    scales_values,
)
from pallas_paged.ops.attention.work_list import CtaField, SequenceField, WorkList

_WARPS = 4
_ROW_LAYOUT = TILE_LAYOUT.reduce(1)  # [T]


def decode(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    work: WorkList,
    *,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    problem: DecodeProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the sequences in the work list.

    Padding tokens get 0 and -inf; rows of sequences that the work list leaves out are undefined.
    """
    parts = partial_results(
        q, cache, metadata, work, alibi_slopes, sinks, problem=problem, config=config
    )
    out, lse = merge(*parts, work, sinks, problem)
    return out.reshape(q.shape), _unpack(lse, q.shape[0], metadata, problem)


def partial_results(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    work: WorkList,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    problem: DecodeProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs the decode kernel alone; returns (out, lse, parts, their lse).

    out [T * Hq, D] and lse [R, Hk, N] are undefined where an item was divided. Then parts
    f32[2 C, D, N] hold, divided by their own denominators, what each of the C CTAs computed of the
    item that another CTA began, and behind these what it computed of the item that it began and
    left unfinished; their lse f32[2 C, N] is to the base 2 and without the sink.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_ctas = work.ctas.shape[0]
    packed = _pack(q, metadata, problem)
    per_head = [array for array in (alibi_slopes, sinks) if array is not None]
    return plgpu.kernel(
        functools.partial(_decode_kernel, problem, config),
        out_type=(
            jax.ShapeDtypeStruct((num_tokens * num_q_heads, head_dim), q.dtype),
            jax.ShapeDtypeStruct(packed.shape[:3], jnp.float32),
            jax.ShapeDtypeStruct((2 * num_ctas, problem.value_rows, problem.columns), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_ctas, problem.columns), jnp.float32),
        ),
        scratch_types=scratch_types(problem, config),
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_decode",
    )(packed, *jax.tree.leaves(cache), metadata.block_tables, *work, *per_head)


def _pack(q: jax.Array, metadata: AttentionMetadata, problem: DecodeProblem) -> jax.Array:
    """Returns [R, Hk, N, D]: the query rows that share a KV head, token after token.

    R counts tokens where a sequence has one of them, and then this is no more than padding, which
    XLA fuses into what computes q; otherwise sequences. Tokens that a sequence does not have are
    somebody else's: computed and not written.
    """
    num_tokens, _, head_dim = q.shape
    rows = q.reshape(num_tokens, problem.num_kv_heads, problem.group, head_dim)
    if problem.max_tokens > 1:
        tokens = jnp.arange(problem.max_tokens, dtype=jnp.int32)
        tokens = metadata.query_start_loc[:-1, None] + tokens[None, :]
        rows = jnp.swapaxes(rows.at[tokens].get(mode="clip"), 1, 2)  # [B, Hk, tokens, G, D]
        rows = rows.reshape(*rows.shape[:2], -1, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, problem.columns - rows.shape[2]), (0, 0)))


def _unpack(
    lse: jax.Array, num_tokens: int, metadata: AttentionMetadata, problem: DecodeProblem
) -> jax.Array:
    """Returns f32[T, Hq] from f32[R, Hk, N]; if nobody asks for it, XLA leaves it out."""
    starts = metadata.query_start_loc
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    if problem.max_tokens > 1:
        used = problem.group * problem.max_tokens
        lse = lse[:, :, :used].reshape(*lse.shape[:2], problem.max_tokens, problem.group)
        sequence = jnp.sum(starts[None, 1:-1] <= tokens[:, None], axis=1, dtype=jnp.int32)
        offset = jnp.minimum(tokens - starts[sequence], problem.max_tokens - 1)
        lse = lse[sequence, :, offset]
    else:
        lse = lse[:, :, : problem.group]
    is_real = (tokens < starts[-1])[:, None]
    return jnp.where(is_real, lse.reshape(num_tokens, -1), -jnp.inf)


def _decode_kernel(
    problem: DecodeProblem, config: DecodeConfig, *refs: Any, **scratch: Any
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    num_cache_refs = 4 if problem.is_quantised else 2
    q_ref = refs[0]
    cache: Any = KVCache(*refs[1 : 1 + num_cache_refs])  # of references
    tables_ref, sequences_ref, ctas_ref, num_tokens_ref, *refs_left = refs[1 + num_cache_refs :]
    slopes_ref = refs_left.pop(0) if problem.has_alibi else None
    sinks_ref = refs_left.pop(0) if problem.has_sinks else None
    out_ref, lse_ref, parts_ref, part_lses_ref = refs_left
    q_smem, k_smem, v_smem, p_smem = (scratch[f"{name}_smem"] for name in "qkvp")
    q_barriers, k_barriers, v_barriers = (scratch[f"{name}_barriers"] for name in "qkv")
    # Where TMA writes: the tiles themselves, or what they are converted from.
    k_tiles = scratch["k_stored"] if problem.is_quantised else k_smem
    v_tiles = scratch["v_stored"] if problem.is_quantised else v_smem
    out_smem, lse_smem = scratch["out_smem"], scratch["lse_smem"]

    stages, tile_size, columns = config.num_stages, config.tile, problem.columns
    value_rows, window = problem.value_rows, problem.sliding_window
    # Rows of O^T per product: all of them, as long as they leave registers for the rest.
    chunk = value_rows if value_rows * columns <= 4096 else 64
    unroll = columns <= 16  # many columns leave few registers for conversion
    num_copies, copy_rows = problem.copies(tile_size)
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first_item, num_items, first_tile, num_tiles = (
        ctas_ref[cta, field]
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
        row = sequences_ref[sequence, SequenceField.ROW]
        tile_index = sequences_ref[sequence, SequenceField.FIRST_TILE] + tile
        first_block = lax.div(tile_index * tile_size, jnp.int32(problem.block_size))
        length = sequences_ref[sequence, SequenceField.LENGTH]
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
            for round_ in range(-(-num_copies // _WARPS)):
                i = round_ * _WARPS + warp

                @pl.when(i < num_copies)
                def _(i: jax.Array = i) -> None:
                    # Behind the last block the same one again: masked, but never out of bounds.
                    block = tables_ref[row, jnp.minimum(first_block + i, last_block)]
                    begin = part * copy_rows
                    plgpu.copy_gmem_to_smem(
                        cache.k.at[block, head, pl.ds(begin, copy_rows)],
                        k_tiles.at[slot, pl.ds(i * copy_rows, copy_rows)],
                        k_barriers.at[slot],
                    )
                    rows = problem.value_copy_rows(tile_size)
                    for first in range(0, copy_rows, rows):
                        columns_read = pl.ds(0, problem.head_dim)
                        plgpu.copy_gmem_to_smem(
                            cache.v.at[block, head, pl.ds(begin + first, rows)],
                            v_tiles.at[slot, pl.ds(i * copy_rows + first, rows), columns_read],
                            v_barriers.at[slot],
                        )
                    if problem.is_quantised:
                        scales_at = pl.ds(i * scale_pitch(copy_rows), copy_rows)
                        plgpu.copy_gmem_to_smem(
                            cache.k_scale.at[block, head, pl.ds(begin, copy_rows)],
                            scratch["k_scales"].at[slot, scales_at],
                            k_barriers.at[slot],
                        )
                        plgpu.copy_gmem_to_smem(
                            cache.v_scale.at[block, head, pl.ds(begin, copy_rows)],
                            scratch["v_scales"].at[slot, scales_at],
                            v_barriers.at[slot],
                        )

            @pl.when(is_first & (warp == _WARPS - 1))
            def _() -> None:
                plgpu.copy_gmem_to_smem(
                    q_ref.at[sequences_ref[sequence, problem.query_row], head],
                    q_smem.at[q_slot],
                    q_barriers.at[q_slot],
                )

        is_last = tile + 1 == sequences_ref[sequence, SequenceField.NUM_TILES]
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
        first_index = sequences_ref[sequence, SequenceField.FIRST_TILE]
        length = sequences_ref[sequence, SequenceField.LENGTH]
        query_tokens = sequences_ref[sequence, SequenceField.NUM_TOKENS]
        item_tiles = sequences_ref[sequence, SequenceField.NUM_TILES]
        begin = jnp.where(index == 0, first_tile, 0)
        end = jnp.minimum(item_tiles, begin + num_tiles - item_step)
        first_position = length - query_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        slopes = None if slopes_ref is None else per_column(problem, slopes_ref, head)
        q_slot = lax.rem(index, jnp.int32(stages + 1))
        plgpu.barrier_wait(q_barriers.at[q_slot])

        def write_weights(weights: jax.Array) -> None:
            p_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                weights.astype(problem.dtype), TILE_LAYOUT
            )

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            accumulators, maximum, denominator, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (first_index + tile) * tile_size  # of the tile's first key

            plgpu.barrier_wait(k_barriers.at[slot])
            tile_slot: Any = slot
            if problem.is_quantised:
                tile_slot = 0
                convert_tile(k_tiles.at[slot], k_smem.at[0], unroll=unroll)
                plgpu.commit_smem()
            queries = q_smem.at[q_slot].transpose((1, 0))
            logits = _product(k_smem.at[tile_slot], queries)  # [T, N]
            if problem.is_quantised:
                scales = scratch["k_scales"].at[slot]
                scales = load_scales(scales, 0, tile_size, copy_rows, _ROW_LAYOUT)
                logits *= _spread_rows(scales, logits.shape)
            keys = _iota(logits.shape, 0) + position
            positions = _query_positions(problem, logits.shape, first_position, length)
            logits = _transform(problem, logits, keys - positions, slopes)
            visible = keys <= positions
            if window is not None:
                visible &= keys > positions - window
            logits = jnp.where(visible, logits, -jnp.inf)

            new_maximum = as_column(jnp.maximum(maximum, logits.max(axis=0)))  # [N]
            correction = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(logits - spread(new_maximum, logits.shape))  # [T, N]
            denominator = denominator * correction + weights.sum(axis=0)
            # Every warp has been through the reductions since the last product read p_smem.
            if not problem.is_quantised:
                write_weights(weights)
            plgpu.barrier_wait(v_barriers.at[slot])
            if problem.is_quantised:
                rows = first_key - position, length - position  # those that hold values of ours
                scales = scratch["v_scales"].at[slot]
                if scales_values(problem.dtype):
                    convert_tile(
                        v_tiles.at[slot],
                        v_smem.at[0],
                        rows=rows,
                        scales=scales,
                        copy_rows=copy_rows,
                        scaled_rows=rows,
                        unroll=unroll,
                    )
                else:
                    convert_tile(v_tiles.at[slot], v_smem.at[0], rows=rows, unroll=unroll)
                    scales = load_scales(scales, 0, tile_size, copy_rows, _ROW_LAYOUT)
                    scales = masked_scales(scales, 0, rows, _ROW_LAYOUT)
                    weights *= _spread_rows(scales, weights.shape)
                write_weights(weights)
            else:

                @pl.when((position + tile_size > length) | (position < first_key))
                def _() -> None:
                    _zero_values(v_smem.at[slot], first_key - position, length - position)

            plgpu.commit_smem()  # weights and values, before the tensor core reads them
            new_accumulators = []
            for i, accumulator in enumerate(accumulators):
                values = v_smem.at[tile_slot, :, pl.ds(i * chunk, chunk)].transpose((1, 0))
                product = _product(values, p_smem.transpose((1, 0)))  # [D, N]
                corrected = accumulator * spread(correction, accumulator.shape)
                new_accumulators.append(corrected + product)

            place = lax.cond(
                step + stages < num_tiles,
                lambda: load(step + stages, *place),
                lambda: tuple(place),
            )
            return tuple(new_accumulators), new_maximum, denominator, step + 1, *place

        state = empty(value_rows, chunk, columns)
        accumulators, maximum, denominator, step, *place = lax.fori_loop(
            begin, end, one_tile, (*state, item_step, *place)
        )

        is_whole = (begin == 0) & (end == item_tiles)

        @pl.when(is_whole)
        def _() -> None:
            write(
                problem,
                finish(problem, accumulators, maximum, denominator, sinks_ref, head),
                sequence,
                head,
                sequences_ref,
                (out_ref, lse_ref, out_smem, lse_smem),
            )

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            values, lse = finish(problem, accumulators, maximum, denominator, None, head)
            for i, value in enumerate(values):
                store(parts_ref.at[part, pl.ds(i * chunk, chunk)], value)
            store(part_lses_ref.at[part], lse)

        return step, *place

    lax.fori_loop(0, num_items, one_item, (jnp.int32(0), *place))
    write_padding(problem, num_tokens_ref[0], out_smem, out_ref)
    plgpu.wait_smem_to_gmem(0)


def _product(left: Any, right: Any) -> jax.Array:
    """Returns the float32 product of two matrices in shared memory, after waiting for it."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _query_positions(
    problem: DecodeProblem, shape: tuple[int, ...], first: jax.Array, length: jax.Array
) -> jax.Array:
    """Returns the position of each column's query token; the last one for tokens not there."""
    if problem.max_tokens == 1:
        return first
    token = lax.div(_iota(shape, 1), jnp.int32(problem.group))
    return jnp.minimum(token + first, length - 1)


def _transform(
    problem: DecodeProblem, products: jax.Array, distance: jax.Array, slopes: jax.Array | None
) -> jax.Array:
    """Returns the logits, times log2(e), from the products of keys and queries."""
    cap = problem.logits_soft_cap
    if cap is None:
        logits = products * (problem.scale * LOG2E)
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh has 11 bits.
        power = jnp.exp2(products * (2 * LOG2E * problem.scale / cap))
        logits = cap * LOG2E - (2 * cap * LOG2E) / (power + 1.0)
    if slopes is not None:
        bias = distance.astype(jnp.float32) * LOG2E
        logits += spread(slopes, logits.shape) * bias
    return logits


def _zero_values(values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows of a tile of values outside [begin, end): 0 * NaN would be NaN.

    In pieces that need few registers.
    """
    for row in range(0, values.shape[0], 64):
        for column in range(0, values.shape[1], 64):
            piece = values.at[pl.ds(row, 64), pl.ds(column, 64)]
            old = plgpu.layout_cast(piece[...], TILE_LAYOUT)
            rows = _iota(old.shape, 0) + row
            keep = (rows >= begin) & (rows < end)
            piece[...] = jnp.where(keep, old, jnp.zeros_like(old))


def _iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=TILE_LAYOUT)


def _spread_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [T] as [T, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), TILE_LAYOUT)
