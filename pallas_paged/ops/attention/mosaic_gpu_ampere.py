"""Attention for sm_80: packs a step's queries into rows, runs the kernels, unpacks the results.

How the kernels compute is written in `mosaic_gpu_ampere_kernel.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.ampere_problem import FLAT_ROW, AmpereProblem, scratch_types
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.mosaic_gpu_ampere_kernel import attend_kernel, merge_kernel
from pallas_paged.ops.attention.work_list import QueryRuns, WorkList, find_tokens

_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True)


def attend(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    runs: QueryRuns,
    work: WorkList,
    *,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    problem: AmpereProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the step; padding tokens get 0 and -inf."""
    num_ctas = work.ctas.shape[0]
    packed = _pack(q, runs, problem)
    slopes, sinks = (_per_row(numbers, problem) for numbers in (alibi_slopes, sinks))
    # The token of each row, so that no kernel has to divide by the group.
    tokens = jnp.arange(problem.rows, dtype=jnp.int32) // problem.group
    arrays = (packed, *_stored(cache, problem), metadata.block_tables, tokens)
    scales = (cache.k_scale, cache.v_scale) if problem.is_quantised else None
    kernel = functools.partial(
        plgpu.kernel, grid=(num_ctas,), grid_names=("cta",), compiler_params=_COMPILER_PARAMS
    )
    out, lse, parts, part_lses = kernel(
        functools.partial(attend_kernel, problem, config),
        out_type=(
            jax.ShapeDtypeStruct(packed.shape, q.dtype),
            jax.ShapeDtypeStruct(packed.shape[:3], jnp.float32),
            jax.ShapeDtypeStruct((2 * num_ctas, problem.rows, problem.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_ctas, problem.rows), jnp.float32),
        ),
        scratch_types=scratch_types(problem, config),
        kernel_name="paged_attention_sm80",
    )(arrays, scales, work.sequences, work.ctas, slopes, sinks)
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel(
        functools.partial(merge_kernel, problem),
        out_type=(),
        kernel_name="paged_attention_sm80_merge",
    )(parts, part_lses, work.sequences, work.ctas, sinks, out_ref, lse_ref)
    return _unpack(out_ref[...], lse_ref[...], q, metadata, problem)


def _stored(cache: KVCache, problem: AmpereProblem) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values as they are copied."""
    if not problem.is_flat:
        return cache.k, cache.v
    flat_shape = (*cache.k.shape[:2], -1, FLAT_ROW)
    return cache.k.reshape(flat_shape), cache.v.reshape(flat_shape)


def _pack(q: jax.Array, runs: QueryRuns, problem: AmpereProblem) -> jax.Array:
    """Returns [R, Hk, M, D]: the query rows that share a KV head, token after token.

    R counts tokens where a run has one of them, and then this is no more than padding, which XLA
    fuses into what computes q; otherwise runs. Tokens that a run does not have are somebody else's:
    computed and not read.
    """
    num_tokens, _, head_dim = q.shape
    rows = q.reshape(num_tokens, problem.num_kv_heads, problem.group, head_dim)
    if problem.max_tokens > 1:
        tokens = jnp.arange(problem.max_tokens, dtype=jnp.int32)
        tokens = runs.first_tokens[:, None] + tokens[None, :]
        rows = jnp.swapaxes(rows.at[tokens].get(mode="clip"), 1, 2)  # [R, Hk, tokens, G, D]
        rows = rows.reshape(*rows.shape[:2], -1, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, problem.rows - rows.shape[2]), (0, 0)))


def _unpack(
    out: jax.Array,
    lse: jax.Array,
    q: jax.Array,
    metadata: AttentionMetadata,
    problem: AmpereProblem,
) -> tuple[jax.Array, jax.Array]:
    """Returns [T, Hq, D] and f32[T, Hq] from [R, Hk, M, D] and f32[R, Hk, M]."""
    num_tokens, num_q_heads, _ = q.shape
    is_real = jnp.arange(num_tokens, dtype=jnp.int32) < metadata.query_start_loc[-1]
    run, place = find_tokens(metadata, num_tokens=num_tokens, size=problem.max_tokens)

    def unpack(rows: jax.Array, padding: float) -> jax.Array:
        used = rows[:, :, : problem.group * problem.max_tokens]
        if problem.max_tokens > 1:
            used = used.reshape(*used.shape[:2], -1, problem.group, *used.shape[3:])
            used = used[run, :, place]
        heads = used.reshape(num_tokens, num_q_heads, *used.shape[3:])
        mask = is_real.reshape(-1, *[1] * (heads.ndim - 1))
        return jnp.where(mask, heads, jnp.asarray(padding, heads.dtype))

    return unpack(out, 0.0), unpack(lse, -jnp.inf)


def _per_row(per_head: jax.Array | None, problem: AmpereProblem) -> jax.Array | None:
    """Returns numbers per query head as f32[Hk, M], one for each row."""
    if per_head is None:
        return None
    rows = jnp.tile(per_head.reshape(problem.num_kv_heads, -1), (1, problem.max_tokens))
    return jnp.pad(rows, ((0, 0), (0, problem.rows - rows.shape[1])))
