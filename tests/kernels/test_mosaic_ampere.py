"""Attention for sm_80, interpreted, against the reference; see `interpret_sm80` for how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import attention_implementation, paged_attention
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.arg_specs import DECODE_KERNEL_SPECS, AttentionSpec
from pallas_paged.ops.attention.config import DecodeConfig
from tests.kernels.interpret_sm80 import interpret_sm80
from tests.kernels.interpreting import TOLERANCES, build_poisoned
from tests.kernels.prefill_cases import interpret_cases

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
PREFILL_SPECS = [case.spec for case in interpret_cases()]
# Every head_dim, block size, dtype, option and number of rows, and shares that divide items.
CASES = {
    "decode": (DECODE_KERNEL_SPECS[0], FEW),
    "tokens": (DECODE_KERNEL_SPECS[3], WIDE),
    "split": (DECODE_KERNEL_SPECS[4], MORE),
    "prefill": (PREFILL_SPECS[1], FEW),
    "blocks": (PREFILL_SPECS[5], MORE),
    "mixed": (MIXED, FEW),
}
LANDINGS = ("decode-early", "decode-late", "tokens-early", "split-late")
LANDINGS += ("prefill-early", "blocks-late", "mixed-late")


def run(arguments, config, landing):
    """Returns (out, lse) of the interpreted kernels."""
    options = {"alibi_slopes": None, "sinks": None} | arguments.options
    if options["scale"] is None:
        options["scale"] = arguments.q.shape[2] ** -0.5

    def attention(*arrays):
        return mosaic_gpu.paged_attention(*arrays, **options, config=config)

    with interpret_sm80(landing):
        return jax.block_until_ready(jax.jit(attention)(*arguments.arrays))


@pytest.mark.parametrize("name", LANDINGS)
def test_equals_the_reference(name):
    case, landing = name.split("-")
    spec, config = CASES[case]
    arguments = build_poisoned(spec)
    out, lse = run(arguments, config, landing)
    expected, expected_lse = paged_attention(
        *arguments.arrays, **arguments.options, return_lse=True, implementation="reference"
    )
    tolerance = TOLERANCES[arguments.q.dtype.name]
    expected, out = (np.asarray(array, np.float32) for array in (expected, out))
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_the_public_function_runs_it():
    """And not the kernels for sm_90a, which need barriers that this chip's copies do not know."""
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.bfloat16)
    with interpret_kernels(compute_capability=(8, 0)):
        assert attention_implementation(None, q, cache) == "mosaic_gpu"


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (10, 0)])
def test_other_chips_are_refused(capability):
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.bfloat16)
    reason = rf"needs compute capability 8\.0 or 9\.0, .* has {capability[0]}\.{capability[1]}"
    with interpret_kernels(compute_capability=capability):
        with pytest.raises(NotImplementedError, match=reason):
            attention_implementation("mosaic_gpu", q, cache)
        assert attention_implementation(None, q, cache) == "xla"


def test_quantised_caches_are_refused():
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.int8)
    with interpret_kernels(compute_capability=(8, 0)):
        with pytest.raises(NotImplementedError, match="int8, for which compute capability 8"):
            attention_implementation("mosaic_gpu", q, cache)
        assert attention_implementation(None, q, cache) == "xla"
    with interpret_kernels(compute_capability=(9, 0)):
        assert attention_implementation(None, q, cache) == "mosaic_gpu"
