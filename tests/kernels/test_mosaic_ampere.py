"""Attention for sm_80, sm_86 and sm_89, interpreted, against the reference.

See `interpret_sm80` for how.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec
from benchmarks.attention_cases.specs import DECODE_KERNEL_SPECS, QUANTISED_KERNEL_SPECS
from pallas_paged import attention_implementation
from pallas_paged.dispatch import KERNEL_FAMILIES, interpret_kernels, kernel_family
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.ampere.problem import AmpereProblem
from pallas_paged.ops.attention.ampere.quantised import to_numbers
from pallas_paged.ops.attention.config import DecodeConfig
from tests.kernels.interpret_sm80 import interpret_sm80
from tests.kernels.interpreting import TOLERANCES, build_poisoned, complete
from tests.kernels.one_program import attend
from tests.kernels.prefill_cases import interpret_cases
from tests.kernels.tabled import tabled_but

FEW = DecodeConfig(num_stages=2, ctas_per_sm=1)
MORE = DecodeConfig(num_stages=3, ctas_per_sm=2)
WIDE = DecodeConfig(tile=128, num_stages=2, ctas_per_sm=2, min_tiles=2)
MIXED = AttentionSpec(
    "mixed",
    (20, 30, 9, 3, 40, 0),
    (1, 0, 9, 1, 37, 0),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    dtype="bfloat16",
)
# Copies that overlap, rows of several tokens, and all options over a quantised cache.
FLAT = AttentionSpec(
    "flat",
    (20, 70, 9),
    (1, 5, 9),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=80,
    block_size=16,
    dtype="bfloat16",
    cache_dtype="float8_e4m3fn",
    max_query_len=9,
    sliding_window=30,
    logits_soft_cap=1.5,
    alibi=True,
    sinks=True,
)
# Of an L4, where a tile of this has 32 keys.
SMALL = dataclasses.replace(MIXED, name="small", head_dim=128, sliding_window=25, sinks=True)
PREFILL_SPECS = {case.spec.name: case.spec for case in interpret_cases()}
# Every head_dim, block size, dtype, option and number of rows, and shares that divide items.
CASES = {
    "decode": (DECODE_KERNEL_SPECS[0], FEW),
    "tokens": (DECODE_KERNEL_SPECS[3], WIDE),
    "split": (DECODE_KERNEL_SPECS[4], MORE),
    "prefill": (PREFILL_SPECS["group3"], FEW),
    "blocks": (PREFILL_SPECS["group7"], MORE),
    "mixed": (MIXED, FEW),
    "fp8": (QUANTISED_KERNEL_SPECS[0], FEW),
    "int8": (QUANTISED_KERNEL_SPECS[1], WIDE),
    "shared": (QUANTISED_KERNEL_SPECS[2], FEW),
    "wide": (QUANTISED_KERNEL_SPECS[3], FEW),
    "flat": (FLAT, FEW),
    "small": (SMALL, None),
}
LANDINGS = ("decode-early", "decode-late", "tokens-early", "split-late")
LANDINGS += ("prefill-early", "blocks-late", "mixed-late")
LANDINGS += ("fp8-late", "int8-early", "shared-early", "wide-late", "flat-late", "small-late")
# `make test` runs each option, kind of cache, configuration and way to copy.
MADE = ("decode-early", "split-late", "prefill-early", "mixed-late", "int8-early", "flat-late")
MADE += ("small-late",)


def run(spec, arguments, config, landing):
    """Returns (out, lse) of the interpreted kernels; without `config`, in that of an L4."""
    options = complete(spec, arguments.options)

    def attention(*arrays):
        return mosaic_gpu.paged_attention(*arrays, **options, config=config)

    with interpret_sm80(landing, (8, 9) if config is None else (8, 0)):
        return jax.block_until_ready(jax.jit(attention)(*arguments.arrays))


@pytest.mark.parametrize("name", tabled_but(LANDINGS, MADE))
def test_equals_the_reference(name):
    case, landing = name.split("-")
    spec, config = CASES[case]
    arguments = build_poisoned(spec)
    out, lse = run(spec, arguments, config, landing)
    expected, expected_lse = attend(arguments, "reference")
    tolerance = TOLERANCES[arguments.q.dtype.name]
    expected, out = (np.asarray(array, np.float32) for array in (expected, out))
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("capability", KERNEL_FAMILIES["ampere"])
def test_the_public_function_runs_it(capability):
    """And not the kernels for sm_90a, which need barriers that this chip's copies do not know."""
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.bfloat16)
    with interpret_kernels(compute_capability=capability):
        assert attention_implementation(None, q, cache) == "mosaic_gpu"
        assert kernel_family() == "ampere"


def test_other_chips_are_refused():
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.bfloat16)
    reason = r"needs compute capability 8\.0, 8\.6, 8\.9, 9\.0 or 10\.0, .* has 12\.0"
    with interpret_kernels(compute_capability=(12, 0)):
        with pytest.raises(NotImplementedError, match=reason):
            attention_implementation("mosaic_gpu", q, cache)
        assert attention_implementation(None, q, cache) == "numba"


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_it_is_chosen_for_quantised_caches(cache_dtype):
    shape = jax.ShapeDtypeStruct
    for head_dim, block_size in itertools.product(mosaic_gpu.HEAD_DIMS, mosaic_gpu.BLOCK_SIZES):
        cache = shape((9, 2, block_size, head_dim), jnp.dtype(cache_dtype))
        with interpret_kernels(compute_capability=(8, 0)):
            for dtype, is_chosen in (("bfloat16", True), ("float32", False)):
                q = shape((4, 4, head_dim), jnp.dtype(dtype))
                chosen = attention_implementation(None, q, cache)
                assert (chosen == "mosaic_gpu") == is_chosen


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_every_code_is_converted_exactly(cache_dtype, dtype):
    codes = jnp.arange(-128, 128, dtype=jnp.int8)
    stored = jax.lax.bitcast_convert_type(codes, jnp.dtype(cache_dtype))
    problem = AmpereProblem(4, 2, 64, 16, jnp.dtype(dtype), stored.dtype, 1, 1.0)
    numbers = np.asarray(to_numbers(stored, problem.dtype).astype(jnp.float32))
    exact = np.asarray(stored, np.float32) * problem.unit
    assert numbers.dtype == np.float32
    is_nan = np.isnan(exact)
    assert is_nan.sum() == (2 if cache_dtype == "float8_e4m3fn" else 0)
    assert np.isfinite(numbers).all()
    if (cache_dtype, dtype) == ("float8_e4m3fn", "bfloat16"):
        # On their way they are bfloat16 numbers below the smallest normal one, which CPUs flush.
        is_flushed = np.abs(exact) < 2.0**-6
        assert is_flushed.sum() == 16
        exact = np.where(is_flushed, 0, exact)
    np.testing.assert_array_equal(numbers[~is_nan], exact[~is_nan])
