"""Ragged paged attention: the public function, its checks and its dispatch."""

import dataclasses
import functools
from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float, Float32

from pallas_paged.dispatch import Implementation, choose_implementation
from pallas_paged.kv_cache import AttentionMetadata, CacheArray, ValueArray, check_scales
from pallas_paged.ops.attention import cascade, mosaic_gpu, reference, xla
from pallas_paged.ops.attention.checks import (
    check_arrays,
    check_metadata,
    check_options,
    inside,
)
from pallas_paged.ops.attention.cpu import attend as cpu


def _kernels_unsupported(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    *,
    v_cache: jax.Array | jax.ShapeDtypeStruct,
    deterministic: bool,
) -> str | None:
    """Returns why the kernels cannot compute this, or None if they can."""
    if k_cache.shape[3] != v_cache.shape[3]:
        return f"head_dim={k_cache.shape[3]} of the keys is not the values' {v_cache.shape[3]}"
    return mosaic_gpu.unsupported(q, k_cache, deterministic=deterministic)


def _cpu_unsupported(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    *,
    deterministic: bool,
    **others: Any,
) -> str | None:
    """Returns why the kernel for CPUs cannot compute this, or None if it can."""
    return cpu.unsupported(q, k_cache, deterministic=deterministic)


_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.paged_attention, _kernels_unsupported),
    "numba": Implementation(cpu.paged_attention, _cpu_unsupported),
    "xla": Implementation(xla.paged_attention),
    "reference": Implementation(reference.paged_attention),
}


@overload
def paged_attention(
    q: Float[Array, "T Hq D"],
    k_cache: CacheArray,
    v_cache: ValueArray,
    metadata: AttentionMetadata,
    *,
    k_scale: Float32[Array, "N Hk S"] | None = None,
    v_scale: Float32[Array, "N Hk S"] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float32[Array, "Hq"] | None = None,
    sinks: Float32[Array, "Hq"] | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> Float[Array, "T Hq Dv"]: ...


@overload
def paged_attention(
    q: Float[Array, "T Hq D"],
    k_cache: CacheArray,
    v_cache: ValueArray,
    metadata: AttentionMetadata,
    *,
    k_scale: Float32[Array, "N Hk S"] | None = None,
    v_scale: Float32[Array, "N Hk S"] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float32[Array, "Hq"] | None = None,
    sinks: Float32[Array, "Hq"] | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> tuple[Float[Array, "T Hq Dv"], Float32[Array, "T Hq"]]: ...


def paged_attention(
    q: Float[Array, "T Hq D"],
    k_cache: CacheArray,
    v_cache: ValueArray,
    metadata: AttentionMetadata,
    *,
    k_scale: Float32[Array, "N Hk S"] | None = None,
    v_scale: Float32[Array, "N Hk S"] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float32[Array, "Hq"] | None = None,
    sinks: Float32[Array, "Hq"] | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
    promise_in_bounds: bool = False,
) -> Float[Array, "T Hq Dv"] | tuple[Float[Array, "T Hq Dv"], Float32[Array, "T Hq"]]:
    r"""Causal attention of a step's ragged queries over keys and values in blocks.

    One call serves decode (one query token per sequence), prefill, chunked prefill and any mix of
    them. Query head h reads KV head `h // (Hq // Hk)`. Query token i of sequence b stands at
    `p = seq_lens[b] - query_len[b] + i` and attends to the keys at positions j <= p:

      x_j = scale * q . k_j;  x_j = cap * tanh(x_j / cap);  x_j = x_j + slope * (j - p)
      out = sum_j exp(x_j) v_j / (exp(sink) + sum_j exp(x_j)),  lse = log(the denominator)

    where the cap, the slope and the sink enter only if given. The new tokens' keys and values must
    have been written before (`write_kv`). What the cache holds elsewhere (free blocks, the null
    block, the tail of a last block, positions left of the window), NaN included, never reaches a
    result. Sums are float32 whatever the dtypes; the precision of float32 products follows
    `jax.default_matmul_precision`.

    Args:
      q: queries, float32, bfloat16 or float16; rows from `query_start_loc[B]` on are padding.
      k_cache: keys in blocks, one of the same dtypes, or quantised: float8_e4m3fn or int8. Not
        modified.
      v_cache: values in blocks, dtype as `k_cache`; Dv may differ from D. Not modified.
      metadata: where the tokens stand; `positions` and `slot_mapping` are not read. May be traced.
        Entries of `block_tables` that are no block of the cache (-1, say, for padding) count as 0;
        `query_start_loc` is clipped to 0..T, and each of `seq_lens` to what its queries need at
        least and the table holds at most. So a sequence with wrong numbers gets results that mean
        nothing, and no other sequence's change. A `shared_prefix` is computed by itself (see
        `cascade.py`); with a `sliding_window` it is left to the block tables.
      k_scale: f32 `[N, Hk, S]`, the scales of quantised keys, as `write_kv` made them: a key is
        stored number * scale. None for caches that are not quantised.
      v_scale: likewise, of the values.
      scale: factor of the dot products; None means `D ** -0.5`.
      sliding_window: number of tokens that a query sees, itself included; None sees all.
      logits_soft_cap: the cap in the formula above.
      alibi_slopes: f32[Hq], the slopes in the formula above.
      sinks: f32[Hq], a logit per query head that joins the denominator and has no value.
      return_lse: whether to return lse too. It counts the sink: to merge partial results over
        disjoint keys, give the sink to one part only.
      deterministic: treat decode and prefill alike, so that a token's result does not depend, bit
        for bit, on the sequences and tokens beside it in a call of the same shapes. Decoding costs
        more then.
      implementation: "mosaic_gpu" (GPUs of compute capability 8.0, 8.6, 8.9, 9.0 or 10.0),
        "numba" (CPUs), "xla" (any platform), "reference" (slow, any platform), or None for the
        first that can do it.
      promise_in_bounds: the caller's word that the metadata leads nowhere outside, so that nothing
        looks: a launch or two less on a GPU. What happens if it is not true is undefined.

    Returns:
      out, `[T, Hq, Dv]` in q's dtype; with `return_lse` (out, lse), lse f32 `[T, Hq]`, natural log.
      Padding tokens get 0 and -inf.

    Raises:
      ValueError: shapes, dtypes or options that do not fit; the message names and shows them.
      NotImplementedError: the named implementation does not exist or cannot do this here.

    Sources: PagedAttention (Kwon et al. 2023, arXiv 2309.06180); online softmax as in
    FlashAttention (Dao et al. 2022, arXiv 2205.14135); ALiBi (Press et al. 2021, arXiv 2108.12409).
    """
    check_arrays(q, k_cache, v_cache)
    check_scales(k_cache, k_scale, "k_scale")
    check_scales(v_cache, v_scale, "v_scale")
    check_metadata(metadata, deterministic)
    check_options(q.shape[1], scale, sliding_window, logits_soft_cap, alibi_slopes, sinks)
    name = attention_implementation(
        implementation,
        q,
        k_cache,
        v_cache,
        deterministic=deterministic,
    )
    if not promise_in_bounds:
        metadata = inside(metadata, q.shape[0], k_cache.shape[0], k_cache.shape[2])

    def attend(
        q: jax.Array, metadata: AttentionMetadata, slopes: jax.Array | None, sinks: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return _IMPLEMENTATIONS[name].run(
            q,
            k_cache,
            v_cache,
            metadata,
            k_scale=k_scale,
            v_scale=v_scale,
            scale=q.shape[2] ** -0.5 if scale is None else float(scale),
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            alibi_slopes=slopes,
            sinks=sinks,
            deterministic=deterministic,
        )

    if metadata.shared_prefix is None or sliding_window is not None:
        metadata = dataclasses.replace(metadata, shared_prefix=None)
        out, lse = attend(q, metadata, alibi_slopes, sinks)
    else:
        count, cache = num_together(name, q, k_cache), k_cache.shape[1:3]
        out, lse = cascade.attend(attend, q, metadata, alibi_slopes, sinks, cache, count)
    return (out, lse) if return_lse else out


def num_together(
    name: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
) -> int:
    """Returns for how many tokens at a time an implementation reads a shared prefix."""
    most = cascade.MOST_TOGETHER
    if name != "mosaic_gpu":
        return most
    group, head_dim = q.shape[1] // k_cache.shape[1], q.shape[2]
    sizes = (most >> shift for shift in range(most.bit_length()))
    # As many query rows as the decode kernel takes of a sequence with so many query tokens.
    fit = functools.partial(mosaic_gpu.tokens_at_a_time, group, head_dim)
    return next(size for size in sizes if fit(size, k_cache.dtype) == size)


def attention_implementation(
    implementation: str | None,
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    v_cache: jax.Array | jax.ShapeDtypeStruct | None = None,
    *,
    deterministic: bool = False,
) -> str:
    """Returns the name of the implementation that `paged_attention` runs for such arguments.

    Args:
      implementation, q, k_cache, v_cache, deterministic: as there, shapes and dtypes are enough.
        Without `v_cache`, for values as wide as the keys.

    Raises:
      ValueError: `implementation` is no implementation's name.
      NotImplementedError: there is no such implementation of attention, or it cannot do this here.
    """
    return choose_implementation(
        "paged_attention",
        _IMPLEMENTATIONS,
        implementation,
        q,
        k_cache,
        v_cache=k_cache if v_cache is None else v_cache,
        deterministic=deterministic,
    )


def register_for_loading(
    implementation: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    v_cache: jax.Array | jax.ShapeDtypeStruct,
) -> None:
    """Makes XLA know what compiled programs with such an attention call.

    Tracing does so by itself; a process that loads programs and traces none has to ask. Mosaic GPU
    kernels are in the programs, and what starts them is known from the first import on.
    """
    if implementation == "numba":
        cpu.register(q, k_cache, v_cache)
