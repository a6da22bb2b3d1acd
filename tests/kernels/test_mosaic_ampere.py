"""Attention for sm_80, interpreted, against the reference; see `interpret_sm80` for how."""

import jax
import numpy as np
import pytest

from pallas_paged import paged_attention
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.arg_specs import DECODE_KERNEL_SPECS, AttentionSpec
from pallas_paged.ops.attention.config import DecodeConfig
from tests.kernels.interpret_sm80 import interpret_sm80
from tests.kernels.prefill_cases import interpret_cases
from tests.kernels.test_mosaic_prefill import build_poisoned

# Weights and results are rounded to the dtype, whose units at 1 are 2^-7 and 2^-10.
TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3}
CONFIGS = (
    DecodeConfig(num_stages=2, ctas_per_sm=1),
    DecodeConfig(num_stages=3, ctas_per_sm=2),
    DecodeConfig(tile=128, num_stages=2, ctas_per_sm=2, min_tiles=2),
)


def run(arguments, config, landing):
    """Returns (out, lse) of the interpreted kernels."""
    options = {"alibi_slopes": None, "sinks": None} | arguments.options
    if options["scale"] is None:
        options["scale"] = arguments.q.shape[2] ** -0.5

    def attention(*arrays):
        return mosaic_gpu.paged_attention(*arrays, **options, config=config)

    with interpret_sm80(landing):
        return jax.block_until_ready(jax.jit(attention)(*arguments.arrays))


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
SPECS = (*DECODE_KERNEL_SPECS, *(case.spec for case in interpret_cases()), MIXED)


@pytest.mark.parametrize("landing", ["early", "late"])
@pytest.mark.parametrize("index", range(len(SPECS)), ids=str)
def test_equals_the_reference(index, landing):
    arguments = build_poisoned(SPECS[index])
    out, lse = run(arguments, CONFIGS[index % len(CONFIGS)], landing)
    expected, expected_lse = paged_attention(
        *arguments.arrays, **arguments.options, return_lse=True, implementation="reference"
    )
    tolerance = TOLERANCES[arguments.q.dtype.name]
    expected, out = (np.asarray(array, np.float32) for array in (expected, out))
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)
