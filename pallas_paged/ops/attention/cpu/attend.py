"""Paged attention on CPUs, as a call of a kernel that Numba compiled."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.dispatch import target_device
from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.ops.cpu.xla_header import unknown_interface

_DTYPES = {"float32": np.float32, "bfloat16": np.uint16}
_CACHE_DTYPES = {**_DTYPES, "int8": np.int8}
_NO_WINDOW = 2**30


def unsupported(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    *,
    deterministic: bool = False,
) -> str | None:
    """Returns why the kernel cannot compute this on the target device, or None if it can.

    Args:
      q: the queries, or their shape and dtype.
      k_cache: the keys, or their shape and dtype.
      deterministic: as in `paged_attention`.
    """
    if target_device().platform != "cpu":
        return f"it is for CPUs, not {target_device().device_kind}"
    if deterministic:
        return "deterministic=True, and few query tokens are computed in another way than many"
    if q.dtype.name not in _DTYPES or k_cache.dtype.name not in _CACHE_DTYPES:
        return (
            f"q is {q.dtype} and the cache {k_cache.dtype}; q must be one of "
            f"{', '.join(_DTYPES)}, the cache one of {', '.join(_CACHE_DTYPES)}"
        )
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    return unknown_interface()


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
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); see `api.paged_attention`."""
    from pallas_paged.ops.attention.cpu import kernel

    window = _NO_WINDOW if sliding_window is None else sliding_window
    given = [int(x is not None) for x in (logits_soft_cap, alibi_slopes, sinks)]
    nothing = jnp.zeros(1, jnp.float32)
    operands = kernel.Operands(
        q,
        k_cache,
        v_cache,
        metadata.block_tables,
        metadata.seq_lens,
        metadata.query_start_loc,
        jnp.array([window, *given], jnp.int32),
        jnp.array([scale, logits_soft_cap or 0.0], jnp.float32),
        *(nothing if x is None else x for x in (k_scale, v_scale, alibi_slopes, sinks)),
    )
    results = (
        jax.ShapeDtypeStruct((*q.shape[:2], v_cache.shape[3]), q.dtype),
        jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
    )
    target = register(q, k_cache, v_cache)
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    out, lse = call(*operands)
    return out, lse


def register(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    v_cache: jax.Array | jax.ShapeDtypeStruct,
) -> str:
    """Makes XLA know the kernel for such arrays, and returns its name there.

    A program that calls it must not be loaded before.
    """
    from pallas_paged.ops.attention.cpu import kernel

    dtypes = _DTYPES[q.dtype.name], _CACHE_DTYPES[k_cache.dtype.name]
    kind = kernel.Kind.of(*dtypes, q.shape[2], v_cache.shape[3], k_cache.shape[2])
    return kernel.load_kernel(kind)
