"""Decode for sm_90a: packs queries, runs the kernel and the merge of what it has divided.

How the kernel computes is written in `decode_kernel.py`.

The merge is launched when the kernel has ended. Programmatic dependent launch, which Mosaic GPU has
for Hopper (`plgpu.griddepcontrol_wait`), would begin it earlier, but not in an engine's step: of a
command buffer XLA makes a CUDA graph in which each custom call is a graph of its own, traced alone,
and between such graphs there are plain edges only.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.decode_kernel import decode_kernel
from pallas_paged.ops.attention.hopper.decode_merge import merge
from pallas_paged.ops.attention.hopper.decode_parts import Inputs, Outputs
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem, scratch_types
from pallas_paged.ops.attention.online_softmax import COMPILER_PARAMS
from pallas_paged.ops.attention.packing import pack, unpack
from pallas_paged.ops.attention.work_list import Parts, WorkList


def decode(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    work: WorkList,
    *,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    problem: DecodeProblem,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the sequences in the work list.

    Padding tokens get 0 and -inf; rows of sequences that the work list leaves out are undefined.
    """
    outputs, parts = partial_results(
        q, cache, metadata, work, alibi_slopes, sinks, problem=problem, config=config
    )
    out, lse = merge(outputs, parts, work, sinks, problem)
    places = _places(metadata, q.shape[0], problem)
    is_real = jnp.arange(q.shape[0], dtype=jnp.int32) < metadata.query_start_loc[-1]
    heads = jnp.arange(problem.num_kv_heads, dtype=jnp.int32)
    first = problem.first_column(heads) + jnp.zeros_like(heads)
    columns = first[:, None] + jnp.arange(problem.columns, dtype=jnp.int32)[None]
    lse = jnp.take_along_axis(lse, columns[None], axis=2, mode="clip")  # each head's own in front
    return out.reshape(q.shape), unpack(lse, places, is_real, -jnp.inf, problem)


def partial_results(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    work: WorkList,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    problem: DecodeProblem,
    config: DecodeConfig,
) -> tuple[Outputs, Parts]:
    """Runs the decode kernel alone.

    Returns:
      The results, undefined where an item was divided, and there the parts.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_ctas = work.ctas.shape[0]
    if problem.shares_rows:
        rows, num_runs = q.reshape(-1, problem.columns, head_dim), num_tokens
    else:
        packed = pack(q, metadata.query_start_loc[:-1], problem, problem.columns)
        rows, num_runs = packed.reshape(-1, *packed.shape[2:]), packed.shape[0]
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return plgpu.kernel(
        functools.partial(decode_kernel, problem, config),
        out_type=(
            Outputs(
                jax.ShapeDtypeStruct((num_tokens * num_q_heads, head_dim), q.dtype),
                float32((num_runs, problem.num_kv_heads, problem.columns)),
            ),
            Parts(
                float32((2 * num_ctas, problem.value_rows, problem.columns)),
                float32((2 * num_ctas, problem.columns)),
            ),
        ),
        scratch_types=scratch_types(problem, config),
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_decode",
    )(Inputs(rows, cache, metadata.block_tables, work, alibi_slopes, sinks))


def _places(
    metadata: AttentionMetadata, num_tokens: int, problem: DecodeProblem
) -> tuple[jax.Array, jax.Array]:
    """Returns i32[T] each: every token's sequence, and its place there as far as there are some."""
    starts = metadata.query_start_loc
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.sum(starts[None, 1:-1] <= tokens[:, None], axis=1, dtype=jnp.int32)
    return sequence, jnp.minimum(tokens - starts[sequence], problem.max_tokens - 1)
