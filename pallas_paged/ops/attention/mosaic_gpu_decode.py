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

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.mosaic_gpu_quantised import (
    convert_tile,
    load_scales,
    masked_scales,
    scale_pitch,
    scale_slots,
    scales_values,
)
from pallas_paged.ops.attention.work_list import CtaField, SequenceField, WorkList
from pallas_paged.quantisation import is_quantised

_WARPS = 4
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# Below any logit and finite: exp2(-inf - _LOWEST) is 0 where exp2(-inf + inf) would be NaN.
_LOWEST = -1e30
_MERGE_UNROLL = 4
_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True)

_TILE_LAYOUT = plgpu.Layout.WGMMA  # [64 * m, N]: what the tensor core leaves in registers
_COLUMN_LAYOUT = _TILE_LAYOUT.reduce(0)  # [N]
_ROW_LAYOUT = _TILE_LAYOUT.reduce(1)  # [T]


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """What the kernel is specialised for.

    Attributes:
      num_q_heads, num_kv_heads, head_dim, block_size: Hq, Hk, D, S.
      dtype: of queries and the output.
      cache_dtype: of keys and values: the same, or a quantised one, and then they have scales.
      max_tokens: the most query tokens of a sequence that the kernel takes.
      scale, sliding_window, logits_soft_cap: options of `paged_attention`.
      has_alibi, has_sinks: whether slopes and sinks are given.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: Any
    cache_dtype: Any
    max_tokens: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """N: the query rows of a KV head, padded to what the tensor core multiplies."""
        return -(-self.group * self.max_tokens // 8) * 8

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values have scales, and have to be converted."""
        return is_quantised(self.cache_dtype)

    @property
    def query_row(self) -> int:
        """The column of `WorkList.sequences` that says where a sequence's packed queries are."""
        return SequenceField.FIRST_TOKEN if self.max_tokens == 1 else SequenceField.ROW

    @property
    def value_rows(self) -> int:
        """Rows of O^T: head_dim, padded to whole tiles of 64. Those behind head_dim are garbage."""
        return -(-self.head_dim // 64) * 64

    @property
    def swizzle(self) -> int:
        """Bytes of the swizzle in shared memory: the largest that divides a row of queries."""
        row_bytes = self.head_dim * jnp.dtype(self.dtype).itemsize
        return next(swizzle for swizzle in (128, 64, 32) if row_bytes % swizzle == 0)

    def copies(self, tile: int) -> tuple[int, int]:
        """Returns (copies per tile, rows of each) of the keys: one per block or part of one."""
        rows = min(tile, self.block_size)
        return tile // rows, rows

    def value_copy_rows(self, tile: int) -> int:
        """Returns the rows of one copy of values.

        TMA writes what is contiguous in shared memory. Where head_dim fills only a part of a row,
        that is a row of swizzle tiles: 8 rows. Quantised values come as they are.
        """
        is_contiguous = self.is_quantised or self.value_rows == self.head_dim
        return self.copies(tile)[1] if is_contiguous else 8


def scratch_types(problem: DecodeProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the shared memory and the barriers of one CTA, by the kernel's parameter names."""
    columns, stages, tile = problem.columns, config.num_stages, config.tile
    num_copies, copy_rows = problem.copies(tile)
    swizzle_elements = problem.swizzle // jnp.dtype(problem.dtype).itemsize

    def operand(*shape: int) -> Any:
        tiling: Any = plgpu.TilingTransform  # mypy takes these two for abstract
        swizzle: Any = plgpu.SwizzleTransform
        transforms = (tiling((8, swizzle_elements)), swizzle(problem.swizzle))
        return plgpu.SMEM(shape, problem.dtype, transforms=transforms)

    # Quantised tiles are in flight as bytes; the one that is computed is converted.
    tiles = 1 if problem.is_quantised else stages
    scratch = {
        # Each of the tiles in flight may begin an item, besides the one that is computed.
        "q_smem": operand(stages + 1, columns, problem.head_dim),
        "k_smem": operand(tiles, tile, problem.head_dim),
        "v_smem": operand(tiles, tile, problem.value_rows),
        "p_smem": operand(columns, tile),
        **_output_scratch(problem),
        "q_barriers": plgpu.Barrier(num_arrivals=1, num_barriers=stages + 1),
    }
    num_scale_copies = num_copies if problem.is_quantised else 0
    for name, num_value_copies in (
        ("k", num_copies),
        ("v", tile // problem.value_copy_rows(tile)),
    ):
        scratch[f"{name}_barriers"] = plgpu.Barrier(
            num_arrivals=num_value_copies + num_scale_copies, num_barriers=stages
        )
        if problem.is_quantised:
            bytes_shape = (stages, tile, problem.head_dim)
            scratch[f"{name}_stored"] = plgpu.SMEM(bytes_shape, problem.cache_dtype)
            scales_shape = (stages, scale_slots(tile, copy_rows))
            scratch[f"{name}_scales"] = plgpu.SMEM(scales_shape, jnp.float32)
    return scratch


def _output_scratch(problem: DecodeProblem) -> dict[str, Any]:
    return {
        "out_smem": plgpu.SMEM((problem.columns, problem.value_rows), problem.dtype),
        "lse_smem": plgpu.SMEM((problem.columns,), jnp.float32),
    }


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
    out, lse = _merge(*parts, work, sinks, problem)
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
        compiler_params=_COMPILER_PARAMS,
        kernel_name="paged_decode",
    )(packed, *jax.tree.leaves(cache), metadata.block_tables, *work, *per_head)


def _merge(
    out: jax.Array,
    lse: jax.Array,
    parts: jax.Array,
    part_lses: jax.Array,
    work: WorkList,
    sinks: jax.Array | None,
    problem: DecodeProblem,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse), written in place where an item was divided."""
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        functools.partial(_merge_kernel, problem),
        out_type=(),
        scratch_types=_output_scratch(problem),
        grid=(work.ctas.shape[0],),
        grid_names=("cta",),
        compiler_params=_COMPILER_PARAMS,
        kernel_name="paged_decode_merge",
    )(
        parts,
        part_lses,
        work.sequences,
        work.ctas,
        *([] if sinks is None else [sinks]),
        out_ref,
        lse_ref,
    )
    return out_ref[...], lse_ref[...]


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
        sequence, head = _sequence_and_head(problem, item)
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
        sequence, head = _sequence_and_head(problem, first_item + index)
        first_index = sequences_ref[sequence, SequenceField.FIRST_TILE]
        length = sequences_ref[sequence, SequenceField.LENGTH]
        query_tokens = sequences_ref[sequence, SequenceField.NUM_TOKENS]
        item_tiles = sequences_ref[sequence, SequenceField.NUM_TILES]
        begin = jnp.where(index == 0, first_tile, 0)
        end = jnp.minimum(item_tiles, begin + num_tiles - item_step)
        first_position = length - query_tokens  # of the first query token
        first_key = 0 if window is None else jnp.maximum(first_position - (window - 1), 0)
        slopes = None if slopes_ref is None else _per_column(problem, slopes_ref, head)
        q_slot = lax.rem(index, jnp.int32(stages + 1))
        plgpu.barrier_wait(q_barriers.at[q_slot])

        def write_weights(weights: jax.Array) -> None:
            p_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                weights.astype(problem.dtype), _TILE_LAYOUT
            )

        def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            accumulators, maximum, denominator, step, *place = carry
            slot = lax.rem(step, jnp.int32(stages))
            position = (first_index + tile) * tile_size  # of the tile's first key

            plgpu.barrier_wait(k_barriers.at[slot])
            tile_slot: Any = slot
            if problem.is_quantised:
                tile_slot = 0
                convert_tile(k_tiles.at[slot], k_smem.at[0])
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

            new_maximum = _as_column(jnp.maximum(maximum, logits.max(axis=0)))  # [N]
            correction = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(logits - _spread(new_maximum, logits.shape))  # [T, N]
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
                    )
                else:
                    convert_tile(v_tiles.at[slot], v_smem.at[0], rows=rows)
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
                corrected = accumulator * _spread(correction, accumulator.shape)
                new_accumulators.append(corrected + product)

            place = lax.cond(
                step + stages < num_tiles,
                lambda: load(step + stages, *place),
                lambda: tuple(place),
            )
            return tuple(new_accumulators), new_maximum, denominator, step + 1, *place

        state = _empty(value_rows, chunk, columns)
        accumulators, maximum, denominator, step, *place = lax.fori_loop(
            begin, end, one_tile, (*state, item_step, *place)
        )

        is_whole = (begin == 0) & (end == item_tiles)

        @pl.when(is_whole)
        def _() -> None:
            _write(
                problem,
                _finish(problem, accumulators, maximum, denominator, sinks_ref, head),
                sequence,
                head,
                sequences_ref,
                (out_ref, lse_ref, out_smem, lse_smem),
            )

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            part = cta + jnp.where(begin == 0, num_ctas, 0)
            values, lse = _finish(problem, accumulators, maximum, denominator, None, head)
            for i, value in enumerate(values):
                _store(parts_ref.at[part, pl.ds(i * chunk, chunk)], value)
            _store(part_lses_ref.at[part], lse)

        return step, *place

    lax.fori_loop(0, num_items, one_item, (jnp.int32(0), *place))
    _write_padding(problem, num_tokens_ref[0], out_smem, out_ref)
    plgpu.wait_smem_to_gmem(0)


def _merge_kernel(problem: DecodeProblem, *refs: Any, **scratch: Any) -> None:
    """One CTA: the item that the decode kernel's CTA of that number began and did not finish."""
    parts_ref, part_lses_ref, sequences_ref, ctas_ref, *refs_left = refs
    sinks_ref = refs_left.pop(0) if problem.has_sinks else None
    out_ref, lse_ref = refs_left
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    last_part = ctas_ref[cta, CtaField.LAST_PART]

    @pl.when(last_part >= 0)
    def _() -> None:
        item = ctas_ref[cta, CtaField.FIRST_ITEM] + ctas_ref[cta, CtaField.NUM_ITEMS] - 1
        sequence, head = _sequence_and_head(problem, item)
        num_parts = last_part - cta + 1

        def some_parts(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            (accumulator,), maximum, denominator = carry
            # Loads that do not wait for each other; what is too much is the last part, weightless.
            for i in range(_MERGE_UNROLL):
                index = turn * _MERGE_UNROLL + i
                part = jnp.where(index == 0, num_ctas + cta, jnp.minimum(cta + index, last_part))
                values = _load(parts_ref.at[part], _TILE_LAYOUT)  # [D, N]
                lse = _load(part_lses_ref.at[part], _COLUMN_LAYOUT)  # [N]
                lse += jnp.where(index < num_parts, 0.0, -jnp.inf)
                new_maximum = jnp.maximum(maximum, lse)
                correction = jnp.exp2(maximum - new_maximum)
                weight = jnp.exp2(lse - new_maximum)
                denominator = denominator * correction + weight
                accumulator = accumulator * _spread(correction, values.shape)
                accumulator += values * _spread(weight, values.shape)
                maximum = new_maximum
            return (accumulator,), maximum, denominator

        turns = lax.div(num_parts + (_MERGE_UNROLL - 1), jnp.int32(_MERGE_UNROLL))
        state = _empty(problem.value_rows, problem.value_rows, problem.columns)
        accumulators, maximum, denominator = lax.fori_loop(0, turns, some_parts, state)
        _write(
            problem,
            _finish(problem, accumulators, maximum, denominator, sinks_ref, head),
            sequence,
            head,
            sequences_ref,
            (out_ref, lse_ref, scratch["out_smem"], scratch["lse_smem"]),
        )
        plgpu.wait_smem_to_gmem(0)


def _sequence_and_head(problem: DecodeProblem, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    heads = jnp.int32(problem.num_kv_heads)
    return lax.div(item, heads), lax.rem(item, heads)


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
        logits = products * (problem.scale * _LOG2E)
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh has 11 bits.
        power = jnp.exp2(products * (2 * _LOG2E * problem.scale / cap))
        logits = cap * _LOG2E - (2 * cap * _LOG2E) / (power + 1.0)
    if slopes is not None:
        bias = distance.astype(jnp.float32) * _LOG2E
        logits += _spread(slopes, logits.shape) * bias
    return logits


def _zero_values(values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows of a tile of values outside [begin, end): 0 * NaN would be NaN.

    In pieces that need few registers.
    """
    for row in range(0, values.shape[0], 64):
        for column in range(0, values.shape[1], 64):
            piece = values.at[pl.ds(row, 64), pl.ds(column, 64)]
            old = plgpu.layout_cast(piece[...], _TILE_LAYOUT)
            rows = _iota(old.shape, 0) + row
            keep = (rows >= begin) & (rows < end)
            piece[...] = jnp.where(keep, old, jnp.zeros_like(old))


def _per_column(problem: DecodeProblem, per_head: Any, kv_head: jax.Array) -> jax.Array:
    """Returns f32[N]: the number of each column's query head."""
    head = lax.rem(_column_iota(problem.columns), jnp.int32(problem.group))
    numbers = _as_column(jnp.zeros((problem.columns,), jnp.float32))
    for i in range(problem.group):
        numbers = jnp.where(head == i, per_head[kv_head * problem.group + i], numbers)
    return numbers


def _empty(
    value_rows: int, chunk: int, columns: int
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Returns (accumulators, maximum, denominator) before the first key."""
    zeros = plgpu.layout_cast(jnp.zeros((chunk, columns), jnp.float32), _TILE_LAYOUT)
    maximum = _as_column(jnp.full((columns,), _LOWEST, jnp.float32))
    denominator = _as_column(jnp.zeros((columns,), jnp.float32))
    return (zeros,) * (value_rows // chunk), maximum, denominator


def _finish(
    problem: DecodeProblem,
    accumulators: tuple[jax.Array, ...],
    maximum: jax.Array,
    denominator: jax.Array,
    sinks_ref: Any,
    head: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns (O^T divided by the denominator, lse to the base 2), the sink included if given.

    Without any visible key they are 0 and -inf.
    """
    factor: Any = 1.0
    if sinks_ref is not None:
        sink = _per_column(problem, sinks_ref, head) * _LOG2E
        new_maximum = jnp.maximum(maximum, sink)
        factor = jnp.exp2(maximum - new_maximum)
        denominator = denominator * factor + jnp.exp2(sink - new_maximum)
        maximum = new_maximum
    is_seen = denominator > 0
    factor = _as_column(jnp.where(is_seen, factor / denominator, 0.0))
    lse = _as_column(jnp.where(is_seen, maximum + jnp.log2(denominator), -jnp.inf))
    return tuple(a * _spread(factor, a.shape) for a in accumulators), lse


def _write(
    problem: DecodeProblem,
    result: tuple[tuple[jax.Array, ...], jax.Array],
    sequence: jax.Array,
    head: jax.Array,
    sequences_ref: Any,
    refs: tuple[Any, Any, Any, Any],
) -> None:
    """Writes an item's O and lse by way of shared memory; the copies may still be in flight."""
    values, lse = result
    out_ref, lse_ref, out_smem, lse_smem = refs
    first_token = sequences_ref[sequence, SequenceField.FIRST_TOKEN]
    num_tokens = sequences_ref[sequence, SequenceField.NUM_TOKENS]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there before has been sent
    chunk = problem.value_rows // len(values)
    for i, value in enumerate(values):
        staged = out_smem.at[:, pl.ds(i * chunk, chunk)].transpose((1, 0))
        _store(staged, plgpu.layout_cast(value.astype(problem.dtype), _TILE_LAYOUT))
    _store(lse_smem, _as_column(lse * _LN2))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[sequences_ref[sequence, problem.query_row], head])
    for token in range(problem.max_tokens):
        send = functools.partial(
            _send, problem, token, first_token + token, head, out_smem, out_ref
        )
        pl.when(token < num_tokens)(send)


def _send(
    problem: DecodeProblem, token: int, row: jax.Array, head: jax.Array, out_smem: Any, out_ref: Any
) -> None:
    """Starts the copies of the staged token number `token` to its place in the output."""
    first = token * problem.group
    out_row = row * problem.num_q_heads + head * problem.group
    if problem.value_rows == problem.head_dim:
        plgpu.copy_smem_to_gmem(
            out_smem.at[pl.ds(first, problem.group)], out_ref.at[pl.ds(out_row, problem.group)]
        )
    else:  # only whole rows of shared memory can be sent together
        for i in range(problem.group):
            plgpu.copy_smem_to_gmem(
                out_smem.at[first + i, pl.ds(0, problem.head_dim)], out_ref.at[out_row + i]
            )


def _write_padding(
    problem: DecodeProblem, num_tokens: jax.Array, out_smem: Any, out_ref: Any
) -> None:
    """Writes zeros for the tokens from `num_tokens` on; the CTAs take them in turn."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first = num_tokens + cta
    all_tokens = out_ref.shape[0] // problem.num_q_heads
    turns = lax.div(jnp.maximum(all_tokens - first + num_ctas - 1, 0), num_ctas)

    @pl.when(turns > 0)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        zeros = jnp.zeros((problem.value_rows, problem.columns), problem.dtype)
        _store(out_smem.transpose((1, 0)), plgpu.layout_cast(zeros, _TILE_LAYOUT))
        plgpu.commit_smem()

        @pl.loop(0, turns)
        def _(turn: jax.Array) -> None:
            @pl.loop(0, problem.num_kv_heads)
            def _(head: jax.Array) -> None:
                _send(problem, 0, first + turn * num_ctas, head, out_smem, out_ref)


def _iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=_TILE_LAYOUT)


def _column_iota(columns: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=_COLUMN_LAYOUT)


def _as_column(vector: jax.Array) -> jax.Array:
    return plgpu.layout_cast(vector, _COLUMN_LAYOUT)


def _spread(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [N] as [rows, N]. Stating layouts here keeps the compiler's search for them short."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [1]), _TILE_LAYOUT)


def _spread_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [T] as [T, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), _TILE_LAYOUT)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _store(ref: Any, value: jax.Array) -> None:
    """Stores registers in an order that no 128-byte lines come out of; rare enough to be cheap."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11 has nothing else
        ref[...] = value
