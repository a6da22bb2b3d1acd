"""Prefill for sm_90a: runs the kernel and puts its log-sum-exps where they belong.

How the kernel computes is written in `prefill_kernel.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_kernel import prefill_kernel
from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    Inputs,
    Problem,
    scratch_types,
)
from pallas_paged.ops.attention.hopper.prefill_plan import TILE_ROWS, PrefillPlan
from pallas_paged.ops.attention.online_softmax import COMPILER_PARAMS
from pallas_paged.ops.attention.packing import per_row


def prefill(
    q: jax.Array,
    cache: KVCache,
    block_tables: jax.Array,
    plan: PrefillPlan,
    *,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    tuning: PrefillTuning,
    num_sms: int,
    into: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, Hq, D], lse f32[T, Hq]) of the tokens that the plan has.

    The other tokens' rows are those of `into`, which is overwritten if nobody else uses it; without
    it they are undefined in out and -inf in lse. `num_sms` is how many thread blocks the GPU holds
    at once: one on each multiprocessor.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.k.shape
    problem = Problem(
        num_kv_heads,
        num_q_heads // num_kv_heads,
        head_dim,
        block_size,
        q.dtype,
        cache.k.dtype,
        scale,
        sliding_window,
        logits_soft_cap,
        tuning,
    )
    # A copy may not be longer than the array; beyond the array's end it reads zeros.
    missing = max(problem.tokens - num_tokens, 0)
    q, *others = (
        jnp.pad(array, ((0, missing), (0, 0), (0, 0))) if missing else array
        for array in (q, *([] if into is None else [into[0]]))
    )
    out_ref = jax.new_ref(others[0] if others else lax.empty(q.shape, q.dtype))
    slopes, sinks = (
        per_row(numbers, num_kv_heads, problem.tokens, TILE_ROWS, heads_first=True)
        for numbers in (alibi_slopes, sinks)
    )
    inputs = Inputs(q, cache, block_tables, plan.tiles, plan.num_tiles, slopes, sinks, out_ref)
    num_pairs = plan.tiles.shape[0] * num_kv_heads
    tile_lse = plgpu.kernel(
        functools.partial(prefill_kernel, problem),
        out_type=jax.ShapeDtypeStruct((plan.tiles.shape[0], num_kv_heads, TILE_ROWS), jnp.float32),
        scratch_types=scratch_types(problem),
        grid=(min(num_pairs, num_sms) if tuning.persistent else num_pairs,),
        grid_names=("cta",),
        num_threads=COMPUTE_WARPGROUPS + problem.loaders,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_prefill",
    )(inputs)
    # What follows XLA leaves out of the program if the caller drops lse.
    kv_heads, heads = jnp.divmod(jnp.arange(num_q_heads, dtype=jnp.int32), problem.group)
    offsets = heads[None, :] * problem.tokens + plan.token_offsets[:, None]
    lse = tile_lse[plan.token_tiles[:, None], kv_heads[None, :], offsets]
    other_lse = -jnp.inf if into is None else into[1]
    lse = jnp.where(plan.token_tiles[:, None] >= 0, lse, other_lse)
    return out_ref[...][:num_tokens], lse
