"""The attentions a model can run with: see `pallas_paged.models.interface.Attend`."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_paged.kv_cache import AttentionMetadata, KVCache, StaticScales
from pallas_paged.models.interface import Rotary
from pallas_paged.ops.attention.api import paged_attention
from pallas_paged.ops.kv_write import api as kv_write
from pallas_paged.ops.rotary import rotate


def paged_attend(
    q: Float[Array, "L Hq D"],
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk Dv"],
    kv_cache: KVCache,
    metadata: AttentionMetadata,
    *,
    rotary: Rotary | None = None,
    static_scales: StaticScales | None = None,
    write_implementation: str | None = None,
    promise_in_bounds: bool = False,
    queries: AttentionMetadata | None = None,
    **options: Any,
) -> tuple[Float[Array, "L Hq Dv"], KVCache]:
    """Writes keys and values into the paged cache, then attends to all of each sequence's.

    Args:
      q: queries; of all T tokens unless `queries` tells of which.
      k: the tokens' keys.
      v: their values, as wide as the cache's.
      kv_cache: the layer's cache; donated by `write_kv`.
      metadata: where the tokens stand.
      rotary: cosines and sines by which the T tokens' queries and keys are still to be rotated, see
        `pallas_paged.ops.rotary.rotate`; None if they are rotated, or are not to be.
      static_scales: by which keys and values are quantised; None for each row's own scale.
      write_implementation: of `write_kv`; a kernel that writes also rotates, where there is one for
        such heads.
      promise_in_bounds: of both.
      queries: metadata of a step with the tokens of `q` alone, which are rotated already; None if
        these are all.
      **options: of `paged_attention`, such as `scale`, `sliding_window` or `implementation`.

    Returns:
      The attention's output and the updated cache.
    """
    if rotary is not None and queries is not None:
        raise ValueError("with `queries`, q and k must be rotated already: pass no `rotary`")
    slots = metadata.slot_mapping
    written: dict[str, Any] = {
        "static_scales": static_scales,
        "promise_in_bounds": promise_in_bounds,
    }
    if rotary is not None and kv_write.rotates_as_it_writes(
        write_implementation, q, k, v, kv_cache
    ):
        cos, sin = rotary
        q, kv_cache = kv_write.rotate_and_write(q, k, v, cos, sin, kv_cache, slots, **written)
    else:
        if rotary is not None:
            cos, sin = rotary
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = _computed_at_once(q, k, v)
        kv_cache = kv_write.write_kv(
            k, v, kv_cache, slots, implementation=write_implementation, **written
        )
    out: Any = paged_attention(
        q,
        kv_cache.k,
        kv_cache.v,
        metadata if queries is None else queries,
        k_scale=kv_cache.k_scale,
        v_scale=kv_cache.v_scale,
        promise_in_bounds=promise_in_bounds,
        **options,
    )
    return out, kv_cache


def _computed_at_once(*heads: Float[Array, "_ _ _"]) -> list[Float[Array, "_ _ _"]]:
    """Returns the arrays as parts of one, so that XLA computes them all in one launch.

    Without the barrier it would see through the concatenation; with it, the parts, which are one
    after the other, are operands of the kernels where they lie.
    """
    width = math.gcd(*(x.shape[-1] for x in heads))
    rows = jnp.concatenate([x.reshape(-1, width) for x in heads])
    ends = list(itertools.accumulate(x.size // width for x in heads))
    parts = jnp.split(jax.lax.optimization_barrier(rows), ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, heads, strict=True)]


def dense_attend(
    q: Float[Array, "T Hq D"],
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk D"],
    kv_cache: KVCache | None,
    metadata: AttentionMetadata,
    *,
    rotary: Rotary | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "T Hq D"], None]:
    """Causal attention over whole sequences of equal length, without a cache: for training.

    The T tokens are `T / max_query_len` sequences of `metadata.max_query_len` tokens each, one
    after the other; nothing else in the metadata is read (see `dense_metadata`). Differentiable.
    `rotary` is as in `paged_attend`.

    Raises:
      ValueError: a cache was given, or T is not a multiple of `metadata.max_query_len`.
    """
    num_tokens, length = q.shape[0], metadata.max_query_len
    if kv_cache is not None:
        raise ValueError("dense_attend keeps no cache: pass kv_caches=(None,) * num_layers")
    if num_tokens % length:
        raise ValueError(
            f"num_tokens={num_tokens} must be a multiple of max_query_len={length}: dense_attend "
            "takes sequences of equal length"
        )
    if rotary is not None:
        cos, sin = rotary
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k, v = (x.reshape(-1, length, *x.shape[1:]) for x in (q, k, v))
    window = None if sliding_window is None else (sliding_window - 1, 0)
    # JAX's own function relies on implicit promotion where the dtype has 16 bits.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale, local_window_size=window
        )
    return out.reshape(num_tokens, *out.shape[2:]), None


def dense_metadata(num_seqs: int, length: int) -> AttentionMetadata:
    """Returns the metadata of `num_seqs` whole sequences of `length` tokens for `dense_attend`."""
    num_tokens = num_seqs * length
    return AttentionMetadata(
        positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), num_seqs),
        slot_mapping=jnp.zeros(num_tokens, jnp.int32),
        block_tables=jnp.zeros((num_seqs, 0), jnp.int32),
        seq_lens=jnp.full(num_seqs, length, jnp.int32),
        query_start_loc=jnp.arange(num_seqs + 1, dtype=jnp.int32) * length,
        max_query_len=length,
    )
