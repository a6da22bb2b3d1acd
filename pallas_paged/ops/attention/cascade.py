"""Attention to a prefix that many sequences share, read for several of them at a time.

As it is, every sequence's queries read the keys and values of the prefix for themselves. Here the
queries of up to `num_together` tokens are put side by side and taken for one token with so many
times the query heads, which decodes behind the prefix's last token: it sees all of the prefix, and
that is what each of them sees. Then every sequence decodes behind its other blocks alone, and the
two results, each rounded to the dtype of the queries, are added with the weights that their
denominators say (the log-sum-exp). All of it is what the implementations do anyway, with other
shapes.

What it costs beside: a second launch of all that decoding is, and the sum. It pays where the prefix
is long and many have it. Source: Hydragen (Juravsky et al. 2024, arXiv 2402.05099).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata, SharedPrefix

MOST_TOGETHER = 8
"""The most tokens for which the prefix is read at a time, where nothing else limits them."""

Attend = Callable[
    [jax.Array, AttentionMetadata, jax.Array | None, jax.Array | None],
    tuple[jax.Array, jax.Array],
]
"""(q, metadata, alibi_slopes, sinks) -> (out, lse), as `paged_attention` with `return_lse`."""


def attend(
    attend: Attend,
    q: jax.Array,
    metadata: AttentionMetadata,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    cache: tuple[int, ...],
    num_together: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse) of a step with a shared prefix.

    Args:
      attend: attention without one, of any number of query heads per KV head.
      q: `[T, Hq, D]`.
      metadata: with the prefix.
      alibi_slopes, sinks: as in `paged_attention`.
      cache: (Hk, S).
      num_together: for how many tokens at a time the prefix is read.
    """
    prefix = metadata.shared_prefix
    assert prefix is not None
    num_kv_heads, block_size = cache
    num_tokens, num_q_heads, _ = q.shape
    length = prefix.num_blocks * block_size
    sequences = _sequence_of_each(metadata, num_tokens)
    is_real = jnp.arange(num_tokens, dtype=jnp.int32) < metadata.query_start_loc[-1]
    is_shared = prefix.is_shared[sequences] & is_real & (prefix.num_blocks > 0)
    # The sinks are in one of the two parts.
    out, lse = attend(q, _behind(metadata, prefix, block_size), alibi_slopes, sinks)

    places, tokens = _side_by_side(is_shared)
    rows = _grouped(q[tokens], num_kv_heads, num_together)
    slopes = None
    if alibi_slopes is not None:
        heads = jnp.broadcast_to(alibi_slopes, (num_together, num_q_heads))
        slopes = _grouped(heads[..., None], num_kv_heads, num_together).reshape(-1)
    num_shared = jnp.sum(is_shared, dtype=jnp.int32)
    step = _once_for_all(prefix, length, num_shared, rows.shape[0], num_together)
    of_prefix, lse_of_prefix = attend(rows, step, slopes, None)
    shape = (num_kv_heads, num_together)
    of_prefix = _apart(of_prefix, *shape)[places]
    lse_of_prefix = _apart(lse_of_prefix[..., None], *shape)[places, :, 0]
    if alibi_slopes is not None:  # it has been computed as if each token were the prefix's last
        positions = metadata.seq_lens[sequences] - metadata.query_start_loc[sequences + 1]
        positions += jnp.arange(num_tokens, dtype=jnp.int32)
        distances = (length - 1 - positions).astype(jnp.float32)
        lse_of_prefix += distances[:, None] * alibi_slopes[None]
    return _added((out, lse), (of_prefix, lse_of_prefix), is_shared)


def _behind(
    metadata: AttentionMetadata, prefix: SharedPrefix, block_size: int
) -> AttentionMetadata:
    """Returns the metadata without the prefix, whose blocks are no longer in the tables."""
    width = metadata.block_tables.shape[1]
    gone = jnp.where(prefix.is_shared, prefix.num_blocks, 0)
    columns = jnp.arange(width, dtype=jnp.int32)[None] + gone[:, None]
    tables = jnp.take_along_axis(metadata.block_tables, columns, axis=1, mode="clip")
    return dataclasses.replace(
        metadata,
        block_tables=tables,
        seq_lens=metadata.seq_lens - gone * block_size,
        shared_prefix=None,
    )


def _once_for_all(
    prefix: SharedPrefix,
    length: jax.Array,
    num_shared: jax.Array,
    num_rows: int,
    num_together: int,
) -> AttentionMetadata:
    """Returns the metadata of rows that decode behind the prefix, each with one token.

    A row that has none of the `num_shared` tokens sees a single key, and nobody takes its result.
    """
    rows = jnp.arange(num_rows + 1, dtype=jnp.int32)
    has_work = (rows[:-1] * num_together < num_shared) & (length > 0)
    return AttentionMetadata(
        positions=rows[:-1],
        slot_mapping=rows[:-1],
        block_tables=jnp.broadcast_to(prefix.block_table, (num_rows, len(prefix.block_table))),
        seq_lens=jnp.where(has_work, length, 1),
        query_start_loc=rows,
        max_query_len=1,
    )


def _sequence_of_each(metadata: AttentionMetadata, num_tokens: int) -> jax.Array:
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    starts = metadata.query_start_loc[1:-1]
    return jnp.sum(starts[None, :] <= tokens[:, None], axis=1, dtype=jnp.int32)


def _side_by_side(is_shared: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns i32[T] each: the place of each token among those that share, and who has each place.

    Where nobody has it, some token.
    """
    tokens = jnp.arange(is_shared.shape[0], dtype=jnp.int32)
    is_before = tokens[None, :] < tokens[:, None]
    places = jnp.sum(is_before & is_shared[None, :], axis=1, dtype=jnp.int32)
    is_mine = is_shared[None, :] & (places[None, :] == tokens[:, None])
    return places, jnp.sum(jnp.where(is_mine, tokens[None, :], 0), axis=1, dtype=jnp.int32)


def _grouped(heads: jax.Array, num_kv_heads: int, num_together: int) -> jax.Array:
    """Returns [R, Hk * together * group, ...] of [T, Hq, ...]: a KV head's heads of some tokens."""
    padding = -heads.shape[0] % num_together
    heads = jnp.pad(heads, ((0, padding), (0, 0), (0, 0)))
    width = heads.shape[2]
    heads = heads.reshape(-1, num_together, num_kv_heads, heads.shape[1] // num_kv_heads, width)
    heads = jnp.swapaxes(heads, 1, 2)
    return heads.reshape(heads.shape[0], -1, width)


def _apart(heads: jax.Array, num_kv_heads: int, num_together: int) -> jax.Array:
    """Returns [T, Hq, ...], the padding included, of what `_grouped` returns."""
    num_rows, _, width = heads.shape
    heads = jnp.swapaxes(heads.reshape(num_rows, num_kv_heads, num_together, -1, width), 1, 2)
    return heads.reshape(num_rows * num_together, -1, width)


def _added(
    ours: tuple[jax.Array, jax.Array], theirs: tuple[jax.Array, jax.Array], is_shared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the attention to the keys of both parts; to those of `ours` where not shared."""
    (out, lse), (other, other_lse) = ours, theirs
    is_shared = is_shared[:, None]
    weight = jax.nn.sigmoid(lse - other_lse)[..., None]
    added = weight * out.astype(jnp.float32) + (1 - weight) * other.astype(jnp.float32)
    added = jnp.where(is_shared[..., None], added.astype(out.dtype), out)
    return added, jnp.where(is_shared, jnp.logaddexp(lse, other_lse), lse)
