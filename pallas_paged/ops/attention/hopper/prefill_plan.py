"""Which thread block of the prefill kernel computes what: traced, of fixed shape, once per step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata

TILE_ROWS = 128
"""Rows of a tile: pairs of a token and a query head of one KV head."""

FIRST_TOKEN, NUM_TOKENS, FIRST_POSITION, SEQUENCE, KEY_BEGIN, KEY_END = range(6)
"""Columns of `PrefillPlan.tiles`."""


class PrefillPlan(NamedTuple):
    """The tiles of one step.

    Attributes:
      tiles: i32[X, 6], for each tile its first token in q, how many tokens it has (0: no tile), the
        position of the first in its sequence, the row of the block table, and the keys
        [begin, end) that its tokens can see. Tiles with the most keys come first. A tile without
        keys holds padding tokens, or none.
      num_tiles: i32[1], how many tiles there are: the first ones.
      token_tiles: i32[T], the tile of each token, -1 for tokens in no tile.
      token_offsets: i32[T], the token's place in its tile.
    """

    tiles: jax.Array
    num_tiles: jax.Array
    token_tiles: jax.Array
    token_offsets: jax.Array


def token_unit(head_dim: int) -> int:
    """Returns how many rows of `head_dim` 16-bit numbers fill whole pieces of 128 bytes."""
    return 64 // math.gcd(64, head_dim)


def tile_tokens(group: int, head_dim: int) -> int:
    """Returns the tokens of a tile, which has a row for each of `group` query heads of a token."""
    unit = token_unit(head_dim)
    return TILE_ROWS // group // unit * unit


def plan_prefill(
    metadata: AttentionMetadata,
    *,
    num_tokens: int,
    group: int,
    head_dim: int,
    sliding_window: int | None,
    min_query_len: int = 1,
    with_padding: bool = True,
) -> PrefillPlan:
    """Returns the tiles of all sequences with at least `min_query_len` query tokens.

    Args:
      metadata: of the step; may be traced.
      num_tokens: T.
      group: query heads per KV head.
      head_dim: D.
      sliding_window: as in `paged_attention`.
      min_query_len: sequences with fewer query tokens are somebody else's.
      with_padding: whether the padding tokens have tiles too, so that somebody writes them.
    """
    size = tile_tokens(group, head_dim)
    starts = metadata.query_start_loc
    num_rows = starts.shape[0]  # one more than sequences: the padding tokens are the last row
    starts = jnp.append(starts, jnp.int32(num_tokens))
    query_lens = jnp.diff(starts)
    seq_lens = jnp.append(metadata.seq_lens, jnp.int32(0))
    is_padding = jnp.arange(num_rows, dtype=jnp.int32) == num_rows - 1
    is_ours = jnp.where(is_padding, with_padding, query_lens >= min_query_len)
    counts = jnp.where(is_ours, (query_lens + size - 1) // size, 0)
    before = jnp.cumulative_sum(counts, dtype=jnp.int32, include_initial=True)

    num_tiles = min(num_tokens, (num_tokens + num_rows * (size - 1)) // size)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.sum(tile[:, None] >= before[None, 1:-1], axis=1, dtype=jnp.int32)
    offset = (tile - before[row]) * size
    exists = tile < before[-1]
    tokens = jnp.where(exists, jnp.minimum(query_lens[row] - offset, size), 0)
    position = seq_lens[row] - query_lens[row] + offset
    key_end = jnp.where(exists & ~is_padding[row], position + tokens, 0)
    key_begin = jnp.zeros_like(key_end)
    if sliding_window is not None:
        key_begin = jnp.clip(position - sliding_window + 1, 0, key_end)
    sequence = jnp.minimum(row, num_rows - 2)
    order = jnp.argsort(key_begin - key_end, stable=True)  # those that are none stay behind
    columns = (starts[row] + offset, tokens, position, sequence, key_begin, key_end)
    tiles = jnp.stack(columns, axis=1)[order]

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_row = jnp.sum(token[:, None] >= starts[None, 1:-1], axis=1, dtype=jnp.int32)
    in_row = token - starts[token_row]
    places = jnp.zeros_like(order).at[order].set(tile)
    token_tiles = places.at[before[token_row] + in_row // size].get(mode="clip")
    token_tiles = jnp.where(is_ours[token_row], token_tiles, -1)
    existing = jnp.minimum(before[-1:], num_tiles)
    return PrefillPlan(tiles, existing, token_tiles, in_row % size)
