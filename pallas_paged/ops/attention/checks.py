"""What `paged_attention` asks of its arguments, and metadata that leads nowhere outside."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata, SharedPrefix, check_shapes
from pallas_paged.ops.blocks import inside_or_null
from pallas_paged.quantisation import LARGEST

_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
_CACHE_DTYPES = (*_DTYPES, *LARGEST)


def check_arrays(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array) -> None:
    """Raises `ValueError` unless queries and caches fit each other."""
    if q.ndim != 3:
        raise ValueError(f"q.shape={q.shape} must be [tokens, query heads, head_dim]")
    check_shapes(k_cache, v_cache, "k_cache", "v_cache")
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, cache_head_dim = k_cache.shape
    if head_dim != cache_head_dim:
        raise ValueError(f"head_dim={head_dim} of q must equal the cache's {cache_head_dim}")
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads={num_q_heads} must be divisible by num_kv_heads={num_kv_heads}"
        )
    for name, array, dtypes in (("q", q, _DTYPES), ("k_cache", k_cache, _CACHE_DTYPES)):
        if array.dtype not in dtypes:
            raise ValueError(
                f"{name}.dtype={array.dtype} must be among {', '.join(map(str, dtypes))}"
            )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"k_cache.dtype={k_cache.dtype} must equal v_cache.dtype={v_cache.dtype}")


def check_metadata(metadata: AttentionMetadata, deterministic: bool) -> None:
    """Raises `ValueError` unless the metadata fits itself and `deterministic`."""
    tables, lens = metadata.block_tables.shape, metadata.seq_lens.shape
    starts = metadata.query_start_loc.shape
    if len(tables) != 2 or lens != tables[:1] or starts != (tables[0] + 1,):
        raise ValueError(
            f"block_tables.shape={tables}, seq_lens.shape={lens} and query_start_loc.shape="
            f"{starts} must be [B, M], [B] and [B + 1]"
        )
    for name in ("block_tables", "seq_lens", "query_start_loc"):
        dtype = getattr(metadata, name).dtype
        if dtype != jnp.int32:
            raise ValueError(f"metadata.{name}.dtype={dtype} must be int32")
    least, most = metadata.min_query_len, metadata.max_query_len
    if most < 1:
        raise ValueError(f"metadata.max_query_len={most} must be at least 1")
    if not 1 <= least <= most:
        raise ValueError(f"metadata.min_query_len={least} must be from 1 to max_query_len={most}")
    _check_shared_prefix(metadata, deterministic)


def _check_shared_prefix(metadata: AttentionMetadata, deterministic: bool) -> None:
    """Raises `ValueError` unless a shared prefix, if there is one, fits the rest."""
    prefix = metadata.shared_prefix
    if prefix is None:
        return
    if deterministic:
        raise ValueError(
            "metadata.shared_prefix must be None with deterministic=True: who shares the prefix "
            "decides how its sums are rounded"
        )
    shapes = (prefix.block_table.ndim, prefix.num_blocks.shape, prefix.is_shared.shape)
    if shapes != (1, (), metadata.seq_lens.shape):
        raise ValueError(
            f"shared_prefix.block_table.shape={prefix.block_table.shape}, num_blocks.shape="
            f"{prefix.num_blocks.shape} and is_shared.shape={prefix.is_shared.shape} must be [M'], "
            f"[] and [B], here {list(metadata.seq_lens.shape)}"
        )
    for name, dtype in (("block_table", "int32"), ("num_blocks", "int32"), ("is_shared", "bool")):
        found = getattr(prefix, name).dtype
        if found != dtype:
            raise ValueError(f"shared_prefix.{name}.dtype={found} must be {dtype}")


def check_options(
    num_q_heads: int,
    scale: float | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: Any,
    sinks: Any,
) -> None:
    """Raises `ValueError` unless the options have values that are allowed."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window={sliding_window} must be at least 1, or None for no limit"
        )
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(
            f"logits_soft_cap={logits_soft_cap} must be positive and finite, or None for no cap"
        )
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None and (value.shape != (num_q_heads,) or value.dtype != jnp.float32):
            raise ValueError(
                f"{name} is {value.dtype}{list(value.shape)}, must be float32[{num_q_heads}]: "
                "one number per query head"
            )


@functools.partial(jax.jit, static_argnames=("num_tokens", "num_blocks", "block_size"))
def inside(
    metadata: AttentionMetadata, num_tokens: int, num_blocks: int, block_size: int
) -> AttentionMetadata:
    """Returns the metadata with nothing that leads outside of its tables, the cache or q."""
    starts = jnp.clip(metadata.query_start_loc, 0, num_tokens)
    max_len = metadata.block_tables.shape[1] * block_size
    lens = jnp.clip(metadata.seq_lens, jnp.diff(starts), max_len)
    return dataclasses.replace(
        metadata,
        block_tables=inside_or_null(metadata.block_tables, num_blocks),
        seq_lens=lens,
        query_start_loc=starts,
        shared_prefix=_prefix_inside(metadata.shared_prefix, lens, starts, num_blocks, block_size),
    )


def _prefix_inside(
    prefix: SharedPrefix | None,
    seq_lens: jax.Array,
    starts: jax.Array,
    num_blocks: int,
    block_size: int,
) -> SharedPrefix | None:
    """Returns the prefix with nothing that leads outside of the cache or behind a query.

    Args:
      prefix: the prefix, or None.
      seq_lens: i32[B], inside.
      starts: i32[B + 1], `query_start_loc`, inside.
      num_blocks: N.
      block_size: S.
    """
    if prefix is None:
        return None
    count = jnp.clip(prefix.num_blocks, 0, len(prefix.block_table))
    has_room = seq_lens - jnp.diff(starts) >= count * block_size
    return SharedPrefix(
        inside_or_null(prefix.block_table, num_blocks), count, prefix.is_shared & has_room
    )
