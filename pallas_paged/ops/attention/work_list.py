"""Who computes what in a decode step: equal shares of tiles for every CTA, planned in traced JAX.

The keys that a sequence's queries see are cut into tiles of `tile` tokens. An *item* is one
sequence's attention on one KV head; the items follow each other, sequence after sequence and head
after head, and their tiles form one long line. The line is cut into as many equal shares as there
are CTAs, wherever the cuts fall (stream-K, Osama et al. 2023, arXiv 2301.03598). So one long
sequence occupies the whole chip, 256 short ones do too, and no CTA has more than one tile more to
do than another. An item that a cut divides leaves partial results, which the CTA that began it
names in its record so that they are merged.

A plan depends on the step's metadata and on nothing in a layer: inside one jit the plans of all
layers are the same expressions, and XLA computes them once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_paged.kv_cache import AttentionMetadata


class SequenceField:
    """Columns of `WorkList.sequences`."""

    ROW = 0
    """Row of the block table."""
    NUM_TILES = 1
    """Tiles of one item."""
    FIRST_TILE = 2
    """Index of the first of them, counted from the sequence's first token; a window moves it."""
    LENGTH = 3
    """Tokens of the sequence, the queries included."""
    FIRST_TOKEN = 4
    """The first query token, a row of q."""
    NUM_TOKENS = 5
    """Query tokens."""
    RUN = 6
    """Index of the run; see `QueryRuns`."""
    COUNT = 7


class CtaField:
    """Columns of `WorkList.ctas`."""

    FIRST_ITEM = 0
    """The first item of the share: index into `sequences` times KV heads, plus the head."""
    NUM_ITEMS = 1
    """Items that the share touches; 0 for a CTA without work."""
    FIRST_TILE = 2
    """Where the share begins in its first item; not 0 if another CTA began the item."""
    NUM_TILES = 3
    """Tiles of the share."""
    LAST_PART = 4
    """The last CTA that works on the item which this CTA begins and does not finish; else -1."""
    STEP_TOKENS = 5
    """Query tokens of the step, the same for all; rows of q from there on are padding."""
    COUNT = 6


class QueryRuns(NamedTuple):
    """Runs of query tokens that follow each other in a sequence: what a kernel takes at a time.

    Attributes:
      rows: i32[X], rows of the block table.
      lens: i32[X], tokens of the sequence up to the run's last one.
      first_tokens: i32[X], rows of q.
      num_tokens: i32[X], 0 where there is no run.
    """

    rows: Int32[Array, "X"]
    lens: Int32[Array, "X"]
    first_tokens: Int32[Array, "X"]
    num_tokens: Int32[Array, "X"]


class WorkList(NamedTuple):
    """The plan of one step; see `SequenceField` and `CtaField` for the columns.

    Attributes:
      sequences: i32[X, 7], runs with work, in order, then zeros. Where no sequence is split into
        several runs, these are the sequences.
      ctas: i32[C, 6], each CTA's share.
    """

    sequences: Int32[Array, "B fields"]
    ctas: Int32[Array, "C fields"]


class Parts(NamedTuple):
    """What C CTAs have computed of items that they share, divided by its own denominators.

    The first C are of the item that another CTA began; behind these come those of the item that
    the CTA began and left unfinished.

    Attributes:
      values: f32[2 C, rows, D] or f32[2 C, D, rows], the numerators.
      lse: f32[2 C, rows], to the base 2 and without the sink.

    Arrays, or references to them.
    """

    values: Any
    lse: Any


def make_work_list(
    metadata: AttentionMetadata,
    *,
    num_kv_heads: int,
    num_ctas: int,
    tile: int,
    sliding_window: int | None,
    max_tokens: int,
    min_tiles: int = 1,
) -> WorkList:
    """Returns the shares of `num_ctas` CTAs, with one run for each sequence.

    Args:
      metadata: of the step.
      num_kv_heads: Hk.
      num_ctas: C.
      tile: tokens per tile.
      sliding_window: tiles that lie wholly left of every query's window are no work.
      max_tokens: sequences with more query tokens than this are no work either.
      min_tiles: the fewest tiles of a share, as long as there are any.
    """
    counts = jnp.diff(metadata.query_start_loc)
    runs = QueryRuns(
        rows=jnp.arange(counts.shape[0], dtype=jnp.int32),
        lens=metadata.seq_lens,
        first_tokens=metadata.query_start_loc[:-1],
        num_tokens=jnp.where(counts <= max_tokens, counts, 0),
    )
    return divide(
        runs,
        metadata.query_start_loc[-1:],
        num_kv_heads=num_kv_heads,
        num_ctas=num_ctas,
        tile=tile,
        sliding_window=sliding_window,
        min_tiles=min_tiles,
    )


def divide(
    runs: QueryRuns,
    all_tokens: jax.Array,
    *,
    num_kv_heads: int,
    num_ctas: int,
    tile: int,
    sliding_window: int | None,
    min_tiles: int = 1,
) -> WorkList:
    """Returns the shares of `num_ctas` CTAs in the runs; `all_tokens` i32[1] of the step."""
    num_tokens, lens = runs.num_tokens, runs.lens
    first_key = jnp.zeros_like(lens)
    if sliding_window is not None:
        first_key = jnp.maximum(lens - num_tokens - (sliding_window - 1), 0)
    first_tile = lax.div(first_key, jnp.int32(tile))
    has_work = (num_tokens > 0) & (lens > 0)
    all_tiles = lax.div(lens + (tile - 1), jnp.int32(tile))
    num_tiles = jnp.where(has_work, all_tiles - first_tile, 0)

    # Four launches: running sums over all runs, those without work included; from these the runs
    # with work, side by side; where the shares' ends lie; and what follows from that.
    indices = jnp.arange(lens.shape[0], dtype=jnp.int32)
    ends = _running_sum(num_tiles * num_kv_heads)
    rank = _running_sum(has_work.astype(jnp.int32))
    fields = (runs.rows, num_tiles, first_tile, lens, runs.first_tokens, num_tokens, indices)
    is_here = has_work[None, :] & (rank[None, :] == indices[:, None] + 1)
    sequences = _sum(jnp.where(is_here[:, None, :], jnp.stack(fields)[None], 0))

    total = ends[-1]
    share = jnp.maximum(lax.div(total + (num_ctas - 1), jnp.int32(num_ctas)), min_tiles)
    ctas = jnp.arange(num_ctas, dtype=jnp.int32)
    begin = jnp.minimum(ctas * share, total)
    end = jnp.minimum(begin + share, total)
    size = end - begin
    first_item, offset, _ = _find(begin, ends, has_work, num_kv_heads)
    last_item, last_offset, last_tiles = _find(end - 1, ends, has_work, num_kv_heads)
    last_begin = end - 1 - last_offset
    last_end = last_begin + last_tiles
    is_begun_here = (size > 0) & (last_begin >= begin) & (last_end > end)
    cta_fields = (
        first_item,
        jnp.where(size > 0, last_item - first_item + 1, 0),
        offset,
        size,
        jnp.where(is_begun_here, lax.div(last_end - 1, share), -1),
        jnp.broadcast_to(all_tokens, ctas.shape),
    )
    return WorkList(sequences, jnp.stack(cta_fields, axis=1))


def split_queries(metadata: AttentionMetadata, *, num_tokens: int, size: int) -> QueryRuns:
    """Returns the runs of at most `size` tokens that the sequences' queries are cut into.

    Args:
      metadata: of the step.
      num_tokens: T, the padding included.
      size: tokens per run; every run but a sequence's last one has so many.
    """
    starts, lens = metadata.query_start_loc, metadata.seq_lens
    counts = jnp.diff(starts)
    if metadata.max_query_len <= size:
        rows = jnp.arange(counts.shape[0], dtype=jnp.int32)
        return QueryRuns(rows, lens, starts[:-1], counts)
    ends = _running_sum(_num_runs(counts, size))
    num_runs = min(num_tokens, (num_tokens + counts.shape[0] * (size - 1)) // size)
    runs = jnp.arange(num_runs, dtype=jnp.int32)
    rows = jnp.minimum(_sum(ends[None, :] <= runs[:, None]), ends.shape[0] - 1)
    offsets = (runs - ends[rows] + _num_runs(counts, size)[rows]) * size
    tokens = jnp.clip(counts[rows] - offsets, 0, size)
    lens = lens[rows] - counts[rows] + offsets + tokens
    return QueryRuns(rows, lens, starts[rows] + offsets, tokens)


def find_tokens(
    metadata: AttentionMetadata, *, num_tokens: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns for every token its run, as `split_queries` makes them, and its place there.

    Padding tokens get some run and place that exist.
    """
    starts = metadata.query_start_loc
    tokens = jnp.minimum(jnp.arange(num_tokens, dtype=jnp.int32), starts[-1] - 1)
    sequences = _sum(starts[None, 1:-1] <= tokens[:, None])
    offsets = jnp.maximum(tokens - starts[sequences], 0)
    if metadata.max_query_len <= size:
        return sequences, offsets
    runs = _num_runs(jnp.diff(starts), size)
    begins = _running_sum(runs) - runs
    return begins[sequences] + offsets // size, offsets % size


def _num_runs(counts: jax.Array, size: int) -> jax.Array:
    return (counts + (size - 1)) // size


def _running_sum(values: jax.Array) -> jax.Array:
    """Returns the inclusive prefix sums, in one reduction: B is small, a scan is many launches."""
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)
    return _sum(jnp.where(rows[None, :] <= rows[:, None], values[None, :], 0))


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=-1, dtype=jnp.int32)


def _find(
    position: jax.Array, ends: jax.Array, has_work: jax.Array, num_kv_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns, for places i32[C] in the line of tiles, (item, tile within the item, its tiles).

    What is asked of the runs are sums and the like over the same [C, X], which XLA computes in one
    launch.
    """
    is_before = ends[None, :] <= position[:, None]
    sequence = jnp.minimum(_sum(is_before & has_work[None, :]), ends.shape[0] - 1)
    begin = jnp.max(jnp.where(is_before, ends[None, :], 0), axis=1)
    end = jnp.min(jnp.where(is_before, jnp.iinfo(jnp.int32).max, ends[None, :]), axis=1)
    # Without any work there is no item; 1 keeps the division defined.
    num_tiles = jnp.maximum(lax.div(end - begin, jnp.int32(num_kv_heads)), 1)
    head = lax.div(position - begin, num_tiles)
    return sequence * num_kv_heads + head, lax.rem(position - begin, num_tiles), num_tiles
