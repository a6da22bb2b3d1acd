"""Paged attention in plain XLA, for any platform.

A step's work is done in two parts. Sequences with one query token (decode) are sorted by length
and processed some rows at a time; the query tokens of all others (prefill) are cut into tiles of
one sequence each. Either part walks over the keys in chunks of a few blocks with online softmax,
in loops whose trip counts come from the sequences' lengths: neither time nor temporaries depend on
the width M of the block tables.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.ops.blocks import take
from pallas_paged.quantisation import dequantise

_MAX_VECTOR_PRODUCTS = 8


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of the pieces of work; `benchmarks/attention.py --parts=tune` times others.

    Attributes:
      decode_rows: the most sequences that are processed together in the decode part. More rows
        save turns of the loop; fewer waste less on rows shorter than their group's longest.
      decode_chunk: tokens of each of them per turn of its inner loop, rounded to whole blocks.
      decode_bytes: float32 bytes of keys per turn beyond which fewer rows are taken: what a turn
        gathers should still be in the core's cache when the products read it.
      prefill_tile: query tokens in a tile.
      prefill_chunk: tokens per turn of a tile's inner loop, rounded to whole blocks.
    """

    decode_rows: int = 8
    decode_chunk: int = 64
    decode_bytes: int = 1 << 18
    prefill_tile: int = 64
    prefill_chunk: int = 128


class _Problem(NamedTuple):
    """The arguments of `paged_attention`, as its parts pass them on."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    metadata: AttentionMetadata
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None


class _Queries(NamedTuple):
    """R rows of work; the W query vectors that share a KV head lie side by side.

    Attributes:
      q: f32[R, Hk, W, D], scaled.
      positions: i32[R, W], -1 for a query that does not exist.
      slopes: f32[Hk, W] or None.
      sinks: f32[Hk, W] or None.
      sequences: i32[R], the row of the block table.
      begin: i32[R], the first key position that matters, a multiple of S.
      end: i32[R], the key position after the last; `end <= begin` for a row without work.
    """

    q: jax.Array
    positions: jax.Array
    slopes: jax.Array | None
    sinks: jax.Array | None
    sequences: jax.Array
    begin: jax.Array
    end: jax.Array


class _Partial(NamedTuple):
    """Online softmax over the keys so far: maximum, denominator and numerator, all f32.

    The maximum is finite from the start, so that exp(-inf - maximum) is 0 and never NaN.
    """

    maximum: jax.Array  # [R, Hk, W]
    denominator: jax.Array  # [R, Hk, W]
    numerator: jax.Array  # [R, Hk, W, Dv]


@functools.partial(
    jax.jit,
    static_argnames=("scale", "sliding_window", "logits_soft_cap", "deterministic", "tuning"),
)
def paged_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    metadata: AttentionMetadata,
    *,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    deterministic: bool = False,
    tuning: Tuning = Tuning(),
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); see `api.paged_attention`."""
    options = (k_scale, v_scale, scale, sliding_window, logits_soft_cap, alibi_slopes, sinks)
    problem = _Problem(q, k_cache, v_cache, metadata, *options)
    if deterministic:
        return _prefill(problem, tuning, min_query_len=1)
    if metadata.max_query_len > 1:
        results = _prefill(problem, tuning, min_query_len=2)
    else:
        results = (
            jnp.zeros((*q.shape[:2], v_cache.shape[3]), q.dtype),
            jnp.full(q.shape[:2], -jnp.inf, jnp.float32),
        )
    return _decode(problem, tuning, results)


def _decode(
    problem: _Problem, tuning: Tuning, results: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Writes the results of all sequences with one query token into `results`."""
    q, metadata = problem.q, problem.metadata
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = problem.k_cache.shape[1]
    row_bytes = tuning.decode_chunk * num_kv_heads * head_dim * 4
    num_rows = min(tuning.decode_rows, tuning.decode_bytes // row_bytes, len(metadata.seq_lens))
    num_rows = max(num_rows, 1)

    end = jnp.where(jnp.diff(metadata.query_start_loc) == 1, metadata.seq_lens, 0)
    end = jnp.pad(end, (0, -end.shape[0] % num_rows))
    begin = _first_key(problem, end - 1)
    rows = jnp.arange(len(end), dtype=jnp.int32)
    # The longest first; rows without work last.
    _, order = jax.lax.sort((begin - end, rows), num_keys=1)
    first_tokens = metadata.query_start_loc.at[order].get(mode="clip")
    sorted_rows = (order, first_tokens, begin[order], end[order])
    num_groups = (jnp.sum(end > 0, dtype=jnp.int32) + num_rows - 1) // num_rows
    slopes = _per_kv_head(problem.alibi_slopes, num_kv_heads)
    sinks = _per_kv_head(problem.sinks, num_kv_heads)

    def group(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sequences, tokens, begin, end = (
            jax.lax.dynamic_slice_in_dim(array, i * num_rows, num_rows) for array in sorted_rows
        )
        group_q = q.at[tokens].get(mode="clip").reshape(num_rows, num_kv_heads, -1, head_dim)
        scaled_q = group_q.astype(jnp.float32) * problem.scale
        positions = end[:, None] - 1
        queries = _Queries(scaled_q, positions, slopes, sinks, sequences, begin, end)
        out, lse = _attend(problem, queries, tuning.decode_chunk)
        # A row without work belongs to a sequence of the prefill part or to nobody.
        tokens = jnp.where(end > 0, tokens, num_tokens)
        out = out.reshape(num_rows, num_q_heads, -1).astype(q.dtype)
        lse = lse.reshape(num_rows, num_q_heads)
        return (
            results[0].at[tokens].set(out, mode="drop"),
            results[1].at[tokens].set(lse, mode="drop"),
        )

    return jax.lax.fori_loop(0, num_groups, group, results)


def _prefill(problem: _Problem, tuning: Tuning, min_query_len: int) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse) of all sequences with `min_query_len` query tokens, else 0 and -inf."""
    q, metadata = problem.q, problem.metadata
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = problem.k_cache.shape[1]
    group = num_q_heads // num_kv_heads
    size = min(tuning.prefill_tile, metadata.max_query_len, num_tokens)

    starts = metadata.query_start_loc
    query_lens = jnp.diff(starts)
    tiles = jnp.where(query_lens >= min_query_len, (query_lens + size - 1) // size, 0)
    tiles_before = jnp.cumulative_sum(tiles, dtype=jnp.int32, include_initial=True)
    slopes = _per_kv_head(problem.alibi_slopes, num_kv_heads, size)
    sinks = _per_kv_head(problem.sinks, num_kv_heads, size)
    # A tile is read and written whole: its tail may lie behind the last token.
    padded_q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))

    def tile(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sequence = jnp.sum(i >= tiles_before[1:-1], dtype=jnp.int32)
        first = starts[sequence] + (i - tiles_before[sequence]) * size
        is_real = jnp.arange(size, dtype=jnp.int32) < starts[sequence + 1] - first
        first_position = metadata.seq_lens[sequence] - starts[sequence + 1] + first
        positions = first_position + jnp.arange(size, dtype=jnp.int32)
        last_position = jnp.minimum(first_position + size, metadata.seq_lens[sequence])
        tile_q = jax.lax.dynamic_slice_in_dim(padded_q, first, size)
        tile_q = tile_q.reshape(size, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        queries = _Queries(
            (tile_q.astype(jnp.float32) * problem.scale).reshape(1, num_kv_heads, -1, head_dim),
            jnp.tile(jnp.where(is_real, positions, -1), group)[None],
            slopes,
            sinks,
            sequence[None],
            _first_key(problem, first_position)[None],
            last_position[None],
        )
        out, lse = _attend(problem, queries, tuning.prefill_chunk)
        out = out.reshape(num_q_heads, size, -1).transpose(1, 0, 2).astype(q.dtype)
        lse = lse.reshape(num_q_heads, size).T
        # The tail behind the sequence holds zeros. Its tokens are padding, or they belong to later
        # tiles or to the decode part, which write after this.
        return (
            jax.lax.dynamic_update_slice_in_dim(results[0], out, first, axis=0),
            jax.lax.dynamic_update_slice_in_dim(results[1], lse, first, axis=0),
        )

    empty = (
        jnp.zeros((*padded_q.shape[:2], problem.v_cache.shape[3]), q.dtype),
        jnp.full((num_tokens + size, num_q_heads), -jnp.inf, jnp.float32),
    )
    out, lse = jax.lax.fori_loop(0, tiles_before[-1], tile, empty)
    return out[:num_tokens], lse[:num_tokens]


def _attend(problem: _Problem, queries: _Queries, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (out f32[R, Hk, W, Dv], lse f32[R, Hk, W]) of the queries, over all their keys."""
    block_size = problem.k_cache.shape[2]
    num_blocks = max(1, chunk // block_size)
    tables = problem.metadata.block_tables

    def chunk_step(i: jax.Array, partial: _Partial) -> _Partial:
        first_block = queries.begin // block_size + i * num_blocks
        blocks = first_block[:, None] + jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
        blocks = tables.at[queries.sequences[:, None], blocks].get(mode="clip")
        offsets = jnp.arange(num_blocks * block_size, dtype=jnp.int32)
        key_positions = first_block[:, None] * block_size + offsets[None, :]
        keys = _read_blocks(problem.k_cache, problem.k_scale, blocks)
        values = _read_blocks(problem.v_cache, problem.v_scale, blocks)
        # NaN may lie behind the end, and in front of what a query sees: 0 * NaN is NaN.
        is_key = key_positions < queries.end[:, None]
        if problem.sliding_window is not None:
            positions = jnp.where(queries.positions >= 0, queries.positions, queries.end[:, None])
            first = jnp.min(positions, axis=1) - problem.sliding_window + 1
            is_key &= key_positions >= first[:, None]
        values = jnp.where(is_key[:, None, :, None], values, 0.0)
        return _accumulate(partial, _logits(problem, queries, keys, key_positions), values)

    length = jnp.max(queries.end - queries.begin)
    tokens = num_blocks * block_size
    partial = jax.lax.fori_loop(
        0, (length + tokens - 1) // tokens, chunk_step, _start(problem, queries)
    )
    exists = (queries.positions >= 0)[:, None, :]
    denominator = jnp.where(exists, partial.denominator, 1.0)
    out = partial.numerator / denominator[..., None]
    lse = jnp.where(exists, partial.maximum + jnp.log(denominator), -jnp.inf)
    return out, lse


def _read_blocks(cache: jax.Array, scales: jax.Array | None, blocks: jax.Array) -> jax.Array:
    """Returns the keys or values in `blocks` i32[R, C / S] as f32[R, Hk, C, D or Dv].

    One gather of [S, D] slices puts the head before the token, so that nothing is transposed.
    """
    _, num_kv_heads, block_size, head_dim = cache.shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    indices = blocks[:, None, :] * num_kv_heads + heads[None, :, None]
    # Fused into the gather, this arithmetic would be done again for every element.
    indices = jax.lax.optimization_barrier(indices)
    stored = take(cache.reshape(-1, block_size, head_dim), indices)
    if scales is not None:
        scales = take(scales.reshape(-1, block_size), indices)
    rows = dequantise(stored, scales)
    return rows.reshape(blocks.shape[0], num_kv_heads, -1, head_dim)


def _logits(
    problem: _Problem, queries: _Queries, keys: jax.Array, key_positions: jax.Array
) -> jax.Array:
    """Returns the logits f32[R, Hk, W, C] of the keys f32[R, Hk, C, D]; -inf where not visible."""
    logits = _einsum_with_chunk("rhwd,rhcd->rhwc", queries.q, keys)
    if problem.logits_soft_cap is not None:
        logits = problem.logits_soft_cap * jnp.tanh(logits / problem.logits_soft_cap)
    distance = key_positions[:, None, :] - queries.positions[:, :, None]
    if queries.slopes is not None:
        distances = distance.astype(jnp.float32)[:, None]
        logits = logits + queries.slopes[None, :, :, None] * distances
    visible = distance <= 0
    if problem.sliding_window is not None:
        visible &= distance > -problem.sliding_window
    return jnp.where(visible[:, None], logits, -jnp.inf)


def _start(problem: _Problem, queries: _Queries) -> _Partial:
    """Returns the state before the first key: empty, or the sink alone."""
    shape = queries.q.shape[:-1]
    maximum = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
    denominator = jnp.zeros(shape, jnp.float32)
    if queries.sinks is not None:
        maximum = jnp.maximum(maximum, queries.sinks[None])
        denominator = jnp.exp(queries.sinks[None] - maximum)
    numerator = jnp.zeros((*shape, problem.v_cache.shape[3]), jnp.float32)
    return _Partial(maximum, denominator, numerator)


def _accumulate(partial: _Partial, logits: jax.Array, values: jax.Array) -> _Partial:
    """Returns the state with one more chunk of keys."""
    maximum = jnp.maximum(partial.maximum, jnp.max(logits, axis=-1))
    correction = jnp.exp(partial.maximum - maximum)
    weights = jnp.exp(logits - maximum[..., None])
    return _Partial(
        maximum,
        partial.denominator * correction + jnp.sum(weights, axis=-1),
        partial.numerator * correction[..., None]
        + _einsum_with_chunk("rhwc,rhcd->rhwd", weights, values),
    )


def _einsum_with_chunk(equation: str, rows: jax.Array, chunk: jax.Array) -> jax.Array:
    """Returns an einsum of rows [R, Hk, W, ...] with a chunk's keys or values [R, Hk, C, ...].

    A few rows are multiplied one by one: XLA's CPU products of matrix and vector stream the chunk,
    while those of two matrices first rearrange it.
    """
    num_rows = rows.shape[2]
    if num_rows > _MAX_VECTOR_PRODUCTS:
        return jnp.einsum(equation, rows, chunk)
    one_row = equation.replace("w", "")
    products = [jnp.einsum(one_row, rows[:, :, w], chunk) for w in range(num_rows)]
    return jnp.stack(products, axis=2)


def _first_key(problem: _Problem, positions: jax.Array) -> jax.Array:
    """Returns the first key position that queries from `positions` on can see, in whole blocks."""
    if problem.sliding_window is None:
        return jnp.zeros_like(positions)
    block_size = problem.k_cache.shape[2]
    first = jnp.maximum(positions - problem.sliding_window + 1, 0)
    return first // block_size * block_size


def _per_kv_head(
    per_head: jax.Array | None, num_kv_heads: int, repeats: int = 1
) -> jax.Array | None:
    """Returns numbers per query head as [Hk, Hq / Hk * repeats], each one `repeats` times."""
    if per_head is None:
        return None
    return jnp.repeat(per_head, repeats).reshape(num_kv_heads, -1)
