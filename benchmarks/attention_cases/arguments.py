"""Arguments of paged attention, made from a specification.

Whatever a call may not read is NaN: free blocks, the null block, the tails of last blocks and the
padding rows of q; of quantised caches, the scales there, and what is stored if its dtype has NaN.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_paged.kv_cache import NULL_BLOCK, AttentionMetadata, KVCache, to_stored
from pallas_paged.quantisation import is_quantised


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One set of arguments; `build` makes the arrays.

    Attributes:
      name: how test ids and tables call it.
      seq_lens: tokens of each sequence, the queries included.
      query_lens: query tokens of each sequence; None is a decode step, one each. A sequence may
        have none; one of length 0 must.
      num_q_heads, num_kv_heads, head_dim, block_size: sizes of the heads and of the cache.
      dtype: of q; `cache_dtype` None is the same. Quantised dtypes bring scales among the options.
      num_rows, num_tokens, max_blocks: B, T and M; None rounds what is needed up to a power of
        two, so that there is padding, as in an engine, and that programs are shared.
      max_query_len: of the metadata; None is 1 in a decode step, else T.
      min_query_len: of the metadata.
      num_shared_blocks: leading blocks that all sequences long enough have in common.
      scale, sliding_window, logits_soft_cap, alibi, sinks: options; the last two switch on
        random slopes and sinks.
    """

    name: str
    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    dtype: str = "float32"
    cache_dtype: str | None = None
    num_rows: int | None = None
    num_tokens: int | None = None
    max_blocks: int | None = None
    max_query_len: int | None = None
    min_query_len: int = 1
    num_shared_blocks: int = 0
    scale: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False

    @property
    def lens_of_queries(self) -> tuple[int, ...]:
        """The query tokens of each sequence."""
        if self.query_lens is None:
            return tuple(min(length, 1) for length in self.seq_lens)
        return self.query_lens


class AttentionArguments(NamedTuple):
    """Arguments of `paged_attention`: `paged_attention(*arguments.arrays, **arguments.options)`."""

    q: Array
    k_cache: Array
    v_cache: Array
    metadata: AttentionMetadata
    options: dict[str, Any]

    @property
    def arrays(self) -> tuple[Array, Array, Array, AttentionMetadata]:
        """The positional arguments."""
        return self.q, self.k_cache, self.v_cache, self.metadata


def build(spec: AttentionSpec, seed: int = 0) -> AttentionArguments:
    """Returns standard-normal arguments for `spec`; the same seed gives the same numbers."""
    rng = np.random.default_rng(seed)
    metadata, num_blocks = _metadata(spec, rng)
    num_tokens = sum(spec.lens_of_queries)
    q = rng.standard_normal(
        (metadata.positions.shape[0], spec.num_q_heads, spec.head_dim), np.float32
    )
    q[num_tokens:] = np.nan
    shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    is_used = _used_slots(spec, np.asarray(metadata.block_tables), num_blocks)
    k, v = (
        np.where(is_used[:, None, :, None], rng.standard_normal(shape, np.float32), np.nan)
        for _ in range(2)
    )
    options: dict[str, Any] = {
        "scale": spec.scale,
        "sliding_window": spec.sliding_window,
        "logits_soft_cap": spec.logits_soft_cap,
    }
    if spec.alibi:
        options["alibi_slopes"] = jnp.asarray(rng.uniform(0.05, 0.5, spec.num_q_heads), jnp.float32)
    if spec.sinks:
        options["sinks"] = jnp.asarray(rng.standard_normal(spec.num_q_heads), jnp.float32)
    cache_dtype = spec.cache_dtype or spec.dtype
    cache = to_stored(jnp.asarray(k), jnp.asarray(v), KVCache.zeros(*shape, dtype=cache_dtype))
    if is_quantised(cache_dtype):
        for name in ("k_scale", "v_scale"):
            # Rows of NaN have an infinite scale.
            options[name] = jnp.where(is_used[:, None], getattr(cache, name), jnp.nan)
    return AttentionArguments(jnp.asarray(q, spec.dtype), cache.k, cache.v, metadata, options)


def _bucket(needed: int, chosen: int | None) -> int:
    return 1 << (needed - 1).bit_length() if chosen is None else chosen


def _metadata(spec: AttentionSpec, rng: np.random.Generator) -> tuple[AttentionMetadata, int]:
    """Returns the metadata and the number of blocks, some of which no sequence uses."""
    num_rows = _bucket(len(spec.seq_lens), spec.num_rows)
    padded_rows = (0,) * (num_rows - len(spec.seq_lens))
    lens = np.array(spec.seq_lens + padded_rows, np.int32)
    query_lens = np.array(spec.lens_of_queries + padded_rows, np.int32)
    num_tokens = _bucket(int(query_lens.sum()), spec.num_tokens)
    counts = -(-lens // spec.block_size)
    tables = np.full((num_rows, _bucket(int(counts.max()), spec.max_blocks)), NULL_BLOCK, np.int32)
    num_blocks = _bucket(int(counts.sum()) + 3, None)
    free = list(rng.permutation(np.arange(NULL_BLOCK + 1, num_blocks)))
    shared = [free.pop() for _ in range(spec.num_shared_blocks)]
    for row, count in enumerate(counts):
        common = shared if lens[row] >= len(shared) * spec.block_size else []
        tables[row, :count] = common + [free.pop() for _ in range(count - len(common))]
    tokens = [
        (row, position)
        for row, (length, queries) in enumerate(zip(lens, query_lens, strict=True))
        for position in range(length - queries, length)
    ]
    rows, positions = (np.array(column, np.int32) for column in zip(*tokens, strict=True))
    slots = tables[rows, positions // spec.block_size] * spec.block_size
    padding = (0, num_tokens - len(tokens))
    max_query_len = 1 if query_lens.max() <= 1 else num_tokens
    metadata = AttentionMetadata(
        positions=jnp.asarray(np.pad(positions, padding)),
        slot_mapping=jnp.asarray(np.pad(slots + positions % spec.block_size, padding)),
        block_tables=jnp.asarray(tables),
        seq_lens=jnp.asarray(lens),
        query_start_loc=jnp.asarray(np.append(0, np.cumsum(query_lens)), jnp.int32),
        max_query_len=spec.max_query_len or max_query_len,
        min_query_len=spec.min_query_len,
    )
    return metadata, num_blocks


def _used_slots(spec: AttentionSpec, tables: np.ndarray, num_blocks: int) -> np.ndarray:
    """Returns bool[N, S]: the slots that hold a token of some sequence."""
    is_used = np.zeros((num_blocks, spec.block_size), bool)
    for table, length in zip(tables, spec.seq_lens, strict=False):
        position = np.arange(length)
        is_used[table[position // spec.block_size], position % spec.block_size] = True
    return is_used
