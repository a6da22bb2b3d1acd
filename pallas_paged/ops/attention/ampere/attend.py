"""Attention for sm_80: packs a step's queries into rows, runs the kernels, unpacks the results.

How the kernels compute is written in `kernel.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.ampere.kernel import Inputs, attend_kernel, merge_kernel
from pallas_paged.ops.attention.ampere.problem import FLAT_ROW, AmpereProblem, scratch_types
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.online_softmax import COMPILER_PARAMS
from pallas_paged.ops.attention.packing import pack, per_row, unpack
from pallas_paged.ops.attention.work_list import Parts, QueryRuns, WorkList, find_tokens


def attend(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    runs: QueryRuns,
    work: WorkList,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    problem: AmpereProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the step; padding tokens get 0 and -inf."""
    num_ctas = work.ctas.shape[0]
    packed = pack(q, runs.first_tokens, problem, problem.rows)
    slopes, sinks = (
        per_row(numbers, problem.num_kv_heads, problem.max_tokens, problem.rows)
        for numbers in (alibi_slopes, sinks)
    )
    inputs = Inputs(
        packed,
        *_stored(cache, problem),
        metadata.block_tables,
        tokens=jnp.arange(problem.rows, dtype=jnp.int32) // problem.group,
        scales=(cache.k_scale, cache.v_scale) if problem.is_quantised else None,
        sequences=work.sequences,
        ctas=work.ctas,
        slopes=slopes,
        sinks=sinks,
    )
    kernel = functools.partial(
        plgpu.kernel, grid=(num_ctas,), grid_names=("cta",), compiler_params=COMPILER_PARAMS
    )
    out, lse, parts = kernel(
        functools.partial(attend_kernel, problem, config),
        out_type=(
            jax.ShapeDtypeStruct(packed.shape, q.dtype),
            jax.ShapeDtypeStruct(packed.shape[:3], jnp.float32),
            Parts(
                jax.ShapeDtypeStruct((2 * num_ctas, problem.rows, problem.head_dim), jnp.float32),
                jax.ShapeDtypeStruct((2 * num_ctas, problem.rows), jnp.float32),
            ),
        ),
        scratch_types=scratch_types(problem, config),
        kernel_name="paged_attention_sm80",
    )(inputs)
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel(
        functools.partial(merge_kernel, problem),
        out_type=(),
        kernel_name="paged_attention_sm80_merge",
    )(parts, work.sequences, work.ctas, sinks, out_ref, lse_ref)
    num_tokens = q.shape[0]
    out, lse = out_ref[...], lse_ref[...]
    is_real = jnp.arange(num_tokens, dtype=jnp.int32) < metadata.query_start_loc[-1]
    places = find_tokens(metadata, num_tokens=num_tokens, size=problem.max_tokens)
    return (
        unpack(out, places, is_real, 0.0, problem),
        unpack(lse, places, is_real, -jnp.inf, problem),
    )


def _stored(cache: KVCache, problem: AmpereProblem) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values as they are copied."""
    if not problem.is_flat:
        return cache.k, cache.v
    flat_shape = (*cache.k.shape[:2], -1, FLAT_ROW)
    return cache.k.reshape(flat_shape), cache.v.reshape(flat_shape)
