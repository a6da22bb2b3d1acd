"""Paged attention in float32, one query token at a time: slow, and the oracle of every backend."""

import functools

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.quantisation import dequantise


@functools.partial(
    jax.jit, static_argnames=("scale", "sliding_window", "logits_soft_cap", "deterministic")
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
    deterministic: bool = True,  # always: every token is computed alone
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); see `api.paged_attention`."""
    num_tokens, num_q_heads, _ = q.shape
    group = num_q_heads // k_cache.shape[1]
    starts = metadata.query_start_loc

    def rows_of(cache: jax.Array, scales: jax.Array | None, blocks: jax.Array) -> jax.Array:
        """A sequence's keys or values in order, for each query head: [Hq, M * S, D or Dv]."""
        rows = dequantise(cache[blocks], None if scales is None else scales[blocks])
        rows = jnp.moveaxis(rows, 1, 0)
        return jnp.repeat(rows.reshape(rows.shape[0], -1, cache.shape[3]), group, axis=0)

    def one_token(token: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_real = token < starts[-1]
        sequence = jnp.sum(token >= starts[1:-1])
        position = metadata.seq_lens[sequence] - starts[sequence + 1] + token
        keys = rows_of(k_cache, k_scale, metadata.block_tables[sequence])
        values = rows_of(v_cache, v_scale, metadata.block_tables[sequence])
        key_positions = jnp.arange(keys.shape[1], dtype=jnp.int32)

        logits = scale * jnp.sum(q[token].astype(jnp.float32)[:, None, :] * keys, axis=2)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        if alibi_slopes is not None:
            distance = (key_positions - position).astype(jnp.float32)
            logits = logits + alibi_slopes[:, None] * distance[None, :]
        visible = is_real & (key_positions <= position)
        if sliding_window is not None:
            visible &= key_positions > position - sliding_window
        logits = jnp.where(visible[None, :], logits, -jnp.inf)
        values = jnp.where(visible[None, :, None], values, 0.0)

        with_sink = logits if sinks is None else jnp.concatenate([logits, sinks[:, None]], axis=1)
        lse = jax.nn.logsumexp(with_sink, axis=1)
        weights = jnp.exp(logits - lse[:, None])
        out = jnp.sum(weights[:, :, None] * values, axis=1)
        return jnp.where(is_real, out, 0.0), jnp.where(is_real, lse, -jnp.inf)

    out, lse = jax.lax.map(one_token, jnp.arange(num_tokens, dtype=jnp.int32))
    return out.astype(q.dtype), lse
