"""Kernels for sm_90a and sm_100a fence what they write to shared memory: no other test can see it.

`fences` says what is owed; that it sees what is missing is tried on small kernels here, and on the
kernels themselves by `mutate_decode` and its like.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.attention_cases.decode import make_case
from pallas_paged.deviceless import kernel_ptx
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from tests.kernels.ampere_cases import CompileCase
from tests.kernels.fences import missing_fences
from tests.kernels.test_mosaic_cache_ops import operations, shapes

DECODE = {
    "numbers": make_case(4, 128, 16, 8, sliding_window=300),
    "quantised": make_case(4, 80, 128, cache_dtype="int8"),
    "quantised-scaled": make_case(4, 96, 32, dtype="float16", cache_dtype="float8_e4m3fn"),
    "quantised-behind": make_case(
        4, 128, 16, cache_dtype="float8_e4m3fn", config=DecodeConfig(converts_ahead=False)
    ),
}
PREFILL: dict[str, dict[str, Any]] = {
    "pieces": {"head_dim": 256, "window": 300},  # of the queries and of the result
    "quantised": {"head_dim": 128, "cache_dtype": "float8_e4m3fn"},
    "quantised-scaled": {"head_dim": 192, "cache_dtype": "int8", "dtype": "float16"},
    "weights": {"head_dim": 64, "tuning": PrefillTuning(in_registers=False)},
    "apart": {
        "head_dim": 64,
        "tuning": PrefillTuning(in_registers=False, turns=False, ahead=False),
    },
    "one-by-one": {"head_dim": 128, "tuning": PrefillTuning(persistent=False)},
}


@pytest.mark.parametrize("name", DECODE)
def test_decode(name):
    case = DECODE[name]
    assert missing_fences(case.function, *case.arguments()) == {
        "paged_decode": set(),
        "paged_decode_merge": set(),
    }


@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
def test_whole_steps(cache_dtype):
    case = CompileCase(4, 80, 16, 256, cache_dtype=cache_dtype, target="b200", sliding_window=300)
    assert missing_fences(case.function, *case.arguments(), target="b200") == {
        "paged_attention_sm100": set(),
        "paged_attention_sm100_merge": set(),
    }


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name):
    assert missing_fences(*mixed_step(**PREFILL[name])) == {
        "paged_decode": set(),
        "paged_decode_merge": set(),
        "paged_prefill": set(),
    }


def mixed_step(head_dim, dtype="bfloat16", cache_dtype=None, window=None, tuning=None):
    """Returns the attention of a step with many queries, and its arguments."""
    num_tokens, rows, heads, kv_heads = 64, 4, 8, 2

    def attention(q, cache, tables, lens, starts):
        unread = jnp.zeros(num_tokens, jnp.int32)
        return mosaic_gpu.paged_attention(
            q,
            cache.k,
            cache.v,
            AttentionMetadata(unread, unread, tables, lens, starts, num_tokens),
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=0.1,
            sliding_window=window,
            logits_soft_cap=None,
            alibi_slopes=None,
            sinks=None,
            tuning=tuning,
        )

    cache = jax.eval_shape(
        lambda: KVCache.zeros(50, kv_heads, 16, head_dim, dtype=cache_dtype or dtype)
    )
    q = jax.ShapeDtypeStruct((num_tokens, heads, head_dim), dtype)
    step = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 8), (rows,), (rows + 1,))]
    return attention, q, cache, *step


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_operations_on_the_cache(dtype):
    cache = (8, 16, 128, dtype)
    for operation, arguments in operations(cache).values():
        missing = missing_fences(operation, shapes(50, *cache), *arguments)
        assert missing
        assert not any(missing.values())


def kernel(body, *scratch_shapes):
    """Returns a function that runs `body(source, destination, *shared memory, barrier)`."""
    scratch = [plgpu.SMEM(shape, jnp.bfloat16) for shape in scratch_shapes]
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=1)],
        grid=(1,),
        grid_names=("cta",),
        kernel_name="small",
    )


def missing_in(body, *scratch_shapes):
    source = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return {
        what.partition(": ")[2]
        for what in missing_fences(kernel(body, *scratch_shapes), source)["small"]
    }


SQUARE = (64, 64)


def fill(memory):
    memory[...] = jnp.zeros(SQUARE, jnp.bfloat16)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_copies_out(commits, waits):
    def body(source, destination, memory, barrier):
        @pl.loop(0, 3)
        def _(i):
            fill(memory)
            if commits:
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory, destination)
            if waits:
                plgpu.wait_smem_to_gmem(0)

    missing = set()
    if not commits:
        missing |= {"commit_smem before a copy out of it"}
    if not waits:
        missing |= {"wait_smem_to_gmem before it is written again", "wait_smem_to_gmem at the end"}
    assert missing_in(body, SQUARE) == missing


def test_a_wait_for_reading_is_enough_to_write_again_and_not_at_the_end():
    def body(source, destination, memory, barrier):
        for _ in range(2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fill(memory)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory, destination)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    assert missing_in(body, SQUARE) == {"wait_smem_to_gmem at the end"}


@pytest.mark.parametrize("operand", [0, 1])
def test_products(operand):
    def body(source, destination, left, right, barrier):
        @pl.when(source[0, 0] > 0)
        def _():
            fill((left, right)[operand])

        def multiply(accumulator):
            plgpu.wgmma(accumulator, left, right)
            return accumulator[...]

        destination[...] = pl.run_scoped(multiply, plgpu.ACC(SQUARE, jnp.float32)).astype(
            jnp.bfloat16
        )

    assert missing_in(body, SQUARE, SQUARE) == {"commit_smem before a product"}


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("copies", [True, False])
def test_what_a_product_is_of_stays_until_its_end(waits, copies):
    def body(source, destination, left, right, barrier):
        def write():
            if copies:
                plgpu.copy_gmem_to_smem(source, left, barrier)
                plgpu.barrier_wait(barrier)
            else:
                fill(left)

        def multiply(accumulator):
            plgpu.wgmma(accumulator, left, right)
            if waits:
                plgpu.wgmma_wait(0)
            write()
            return accumulator[...]

        sums = pl.run_scoped(multiply, plgpu.ACC(SQUARE, jnp.float32))
        destination[...] = sums.astype(jnp.bfloat16)

    what = "a copy into it" if copies else "it is written again"
    missing = set() if waits else {f"the product's end before {what}"}
    assert missing_in(body, SQUARE, SQUARE) == missing


def test_copies_in():
    def body(source, destination, memory, barrier):
        fill(memory)
        plgpu.copy_gmem_to_smem(source, memory, barrier)
        plgpu.barrier_wait(barrier)

    assert missing_in(body, SQUARE) == {"commit_smem before a copy into it"}


def test_what_others_are_told_about():
    def body(source, destination, memory, barrier):
        fill(memory)
        plgpu.barrier_arrive(barrier)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, destination)
        plgpu.wait_smem_to_gmem(0)

    assert missing_in(body, SQUARE) == {"commit_smem before others are told"}


def test_a_commit_is_a_fence_and_a_barrier_of_the_warpgroup():
    def body(source, destination, memory, barrier):
        plgpu.copy_gmem_to_smem(source, memory, barrier)
        plgpu.barrier_wait(barrier)
        memory[...] = memory[...] * 2
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, destination)
        plgpu.wait_smem_to_gmem(0)

    source = jax.ShapeDtypeStruct(SQUARE, jnp.bfloat16)
    program = kernel_ptx("h100", kernel(body, SQUARE), source)
    behind = program.rpartition("st.shared")[2]
    between = re.split(r"cp\.async\.bulk\S*\.global\.shared", behind)[0]
    assert len(between) < len(behind)
    assert re.search(r"fence\.proxy\.async\.shared::cta;.*bar\.sync", between, re.DOTALL)
