"""The prefill kernels compiled for GPUs that are not here: registers, spills, shared memory."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import paged_attention
from pallas_paged.deviceless import compile_for, kernel_resources
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.hopper import prefill
from pallas_paged.ops.attention.hopper.prefill_plan import plan_prefill
from tests.kernels.prefill_cases import CompileCase, compile_cases

SMEM_BYTES = 227 * 1024
CASES = {case.name: case for case in compile_cases()}
# The table of `make kernels-full` has these and all others, for a chip that shares their code.
FEW = ("dim128-group4-block32-float16", "dim96-int8-bfloat16-everything")


def program(case: CompileCase) -> tuple[Any, ...]:
    """Returns the kernel of `case` and its planning, as a function and what it is called with."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    num_kv_heads, num_tokens, rows, num_blocks = 2, 256, 8, 500
    heads = case.group * num_kv_heads
    q = array(num_tokens, heads, case.head_dim, dtype=case.dtype)
    cache = jax.eval_shape(
        lambda: KVCache.zeros(
            num_blocks,
            num_kv_heads,
            case.block_size,
            case.head_dim,
            case.cache_dtype or case.dtype,
        )
    )
    per_head = array(heads, dtype=jnp.float32)
    slopes, sinks = per_head if case.alibi else None, per_head if case.sinks else None

    def function(q, cache, tables, lens, starts, slopes, sinks):
        unread = jnp.zeros(num_tokens, jnp.int32)
        metadata = AttentionMetadata(unread, unread, tables, lens, starts, num_tokens)
        plan = plan_prefill(
            metadata,
            num_tokens=num_tokens,
            group=case.group,
            head_dim=case.head_dim,
            sliding_window=case.sliding_window,
        )
        return prefill.prefill(
            q,
            cache,
            tables,
            plan,
            scale=0.1,
            sliding_window=case.sliding_window,
            logits_soft_cap=case.logits_soft_cap,
            alibi_slopes=slopes,
            sinks=sinks,
            tuning=case.tuning,
        )

    step = (array(rows, 64), array(rows), array(rows + 1))
    return function, q, cache, *step, slopes, sinks


@pytest.mark.parametrize("name", FEW)
def test_no_spills_and_enough_shared_memory(name):
    (kernel,) = kernel_resources("h200", *program(CASES[name]))
    assert kernel.spill_bytes == 0
    assert kernel.smem_bytes <= SMEM_BYTES
    assert kernel.warnings == ()


def mixed_step(num_layers: int):
    """Returns the compiled attention of a mixed step, layer after layer."""
    num_tokens, rows, heads, kv_heads = 1024, 64, 32, 8

    def layers(q, caches, tables, lens, starts):
        unread = jnp.zeros(num_tokens, jnp.int32)
        metadata = AttentionMetadata(unread, unread, tables, lens, starts, num_tokens)
        for k, v in caches:
            q = paged_attention(q, k, v, metadata, implementation="mosaic_gpu")
        return q

    cache = jax.ShapeDtypeStruct((2000, kv_heads, 16, 128), jnp.bfloat16)
    step = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 64), (rows,), (rows + 1,))]
    q = jax.ShapeDtypeStruct((num_tokens, heads, 128), jnp.bfloat16)
    return compile_for("h200", layers, q, [(cache, cache)] * num_layers, *step)


def test_a_mixed_step_is_planned_once_and_copies_nothing():
    texts = [mixed_step(num_layers).as_text() for num_layers in (1, 2)]
    sorts = [text.count(" sort(") for text in texts]
    assert sorts[0] == sorts[1] > 0
    copies = [line for line in texts[1].splitlines() if " copy(" in line]
    assert not [line for line in copies if "bf16[1024,32,128]" in line or "bf16[2000," in line]
