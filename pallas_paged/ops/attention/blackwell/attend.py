"""Attention for sm_100a: packs a step's queries into rows, runs the kernels, unpacks the results.

How the kernels compute is written in `kernel.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.blackwell.kernel import Inputs, attend_kernel
from pallas_paged.ops.attention.blackwell.merge import merge_kernel
from pallas_paged.ops.attention.blackwell.problem import (
    LANES,
    BlackwellProblem,
    rows_scratch,
    scratch_types,
)
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
    problem: BlackwellProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the step; padding tokens get 0 and -inf."""
    num_ctas = work.ctas.shape[0]
    packed = pack(q, runs.first_tokens, problem, problem.rows)
    slopes, sinks = (
        per_row(numbers, problem.num_kv_heads, problem.max_tokens, LANES)
        for numbers in (alibi_slopes, sinks)
    )
    inputs = Inputs(
        packed,
        cache.k,
        cache.v,
        metadata.block_tables,
        tokens=jnp.arange(LANES, dtype=jnp.int32) // problem.group,
        scales=(cache.k_scale, cache.v_scale) if problem.is_quantised else None,
        sequences=work.sequences,
        ctas=work.ctas,
        slopes=slopes,
        sinks=sinks,
    )
    kernel = functools.partial(
        plgpu.kernel, grid=(num_ctas,), grid_names=("cta",), compiler_params=COMPILER_PARAMS
    )
    part_rows = 2 * num_ctas * problem.rows + LANES  # some are read with any part
    out, lse, parts = kernel(
        functools.partial(attend_kernel, problem, config),
        out_type=(
            jax.ShapeDtypeStruct(packed.shape, q.dtype),
            jax.ShapeDtypeStruct((*packed.shape[:2], LANES), jnp.float32),
            Parts(
                jax.ShapeDtypeStruct((part_rows, problem.head_dim), jnp.float32),
                jax.ShapeDtypeStruct((2 * num_ctas, LANES), jnp.float32),
            ),
        ),
        scratch_types=scratch_types(problem, config),
        kernel_name="paged_attention_sm100",
    )(inputs)
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel(
        functools.partial(merge_kernel, problem),
        out_type=(),
        scratch_types={"rows": rows_scratch(problem)},
        kernel_name="paged_attention_sm100_merge",
    )(parts, work.sequences, work.ctas, sinks, out_ref, lse_ref)
    num_tokens = q.shape[0]
    out, lse = out_ref[...], lse_ref[...]
    is_real = jnp.arange(num_tokens, dtype=jnp.int32) < metadata.query_start_loc[-1]
    places = find_tokens(metadata, num_tokens=num_tokens, size=problem.max_tokens)
    return (
        unpack(out, places, is_real, 0.0, problem),
        unpack(lse, places, is_real, -jnp.inf, problem),
    )
