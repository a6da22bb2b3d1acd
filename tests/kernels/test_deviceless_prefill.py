"""The prefill kernels compiled for GPUs that are not here: registers, spills, shared memory."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import paged_attention
from pallas_paged.deviceless import compile_for, kernel_ptx, kernel_resources
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.hopper import prefill
from pallas_paged.ops.attention.hopper.prefill_plan import TILE_ROWS, plan_prefill
from tests.kernels.prefill_cases import CompileCase, compile_cases

SMEM_BYTES = 227 * 1024
CASES = {case.name: case for case in compile_cases()}
# The table of `make kernels-full` has these and all others, for a chip that shares their code.
FEW = ("dim128-group4-block32-float16", "dim96-int8-bfloat16-everything")


def program(case: CompileCase, num_tokens: int = 256, num_blocks: int = 500) -> tuple[Any, ...]:
    """Returns the kernel of `case` and its planning, as a function and what it is called with."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    num_kv_heads, rows = 2, 8
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
            num_sms=132,
        )

    step = (array(rows, 64), array(rows), array(rows + 1))
    return function, q, cache, *step, slopes, sinks


@pytest.mark.parametrize("name", FEW)
def test_no_spills_and_enough_shared_memory(name):
    (kernel,) = kernel_resources("h200", *program(CASES[name]))
    assert kernel.spill_bytes == 0
    assert kernel.smem_bytes <= SMEM_BYTES
    assert kernel.warnings == ()


@pytest.mark.parametrize("name", ["dim256-group16-block128-float16", "dim128-int8-bfloat16"])
def test_arrays_of_more_than_2_to_the_31_numbers(name):
    """TMA takes the number of a row, or of a block and head, in each dimension, and no offset.

    Threads themselves read nothing but 32-bit numbers of tables; the log-sum-exps leave by their
    address, whose offset is made in 64 bits from the numbers of the tile and of the head.
    """
    case = CASES[name]
    num_tokens = 2**31 // (2 * case.group * case.head_dim) + 8
    num_blocks = 2**31 // (2 * case.block_size * case.head_dim) + 8
    ptx = kernel_ptx("h200", *program(case, num_tokens, num_blocks))
    assert "st.global" not in ptx
    loads = re.findall(r"ld\.global\.(\S+)", ptx)
    assert loads
    assert all(re.fullmatch(r"(v\d\.)?[bsu]32", load) for load in loads)
    (address,) = re.findall(r"cp\.async\.bulk\.global\S+ \[(%rd\d+)\]", ptx)
    factors = factors_behind(ptx, address)
    assert factors
    assert min(factors) >= 4 * TILE_ROWS, "more than a tile's or a head's number is of 32 bits"


def factors_behind(ptx: str, register: str, factor: int = 1) -> list[int]:
    """Returns by what the 32-bit numbers in a 64-bit address are multiplied in 64 bits."""
    (made,) = re.findall(rf"^\t(\S+)\s+{register}, (.*);$", ptx, re.MULTILINE)
    operation, operands = made[0], made[1].split(", ")
    if operation.startswith("ld.param"):
        return []
    if operation == "add.s64":
        both = (factors_behind(ptx, operand, factor) for operand in operands)
        return [each for some in both for each in some]
    if operation.startswith("cvt."):
        return [factor]
    number = int(operands[1])
    if operation.startswith("mul.wide."):
        return [factor * number]
    assert operation == "shl.b64", operation
    return factors_behind(ptx, operands[0], factor << number)


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
