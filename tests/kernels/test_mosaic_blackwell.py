"""Attention for sm_100a, interpreted with race detection, against the reference.

The arguments are those of the kernel for sm_80, which takes the same steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import attention_implementation
from pallas_paged.dispatch import interpret_kernels, kernel_family
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.blackwell import problem as blackwell_problem
from pallas_paged.ops.attention.blackwell.problem import SM100, shared_types
from pallas_paged.ops.attention.config import DecodeConfig, fits
from tests.kernels.ampere_cases import blackwell_cases
from tests.kernels.interpreting import TOLERANCES, build_poisoned, complete, interpreted
from tests.kernels.one_program import attend
from tests.kernels.tabled import tabled_but
from tests.kernels.test_mosaic_ampere import CASES as AMPERE_CASES

FEW = DecodeConfig(num_stages=2, ctas_per_sm=1)
MORE = DecodeConfig(num_stages=3, ctas_per_sm=2)
# Every head_dim, block size, dtype, option and number of rows, and shares that divide items.
CASES = {
    name: (spec, MORE if config is not None and config.ctas_per_sm == 2 else FEW)
    for name, (spec, config) in AMPERE_CASES.items()
} | {"chosen": (AMPERE_CASES["mixed"][0], None)}
# `make test` runs each option, kind of cache, configuration and way to copy.
MADE = ("decode", "split", "mixed", "int8", "chosen")


def run(spec, arguments, config):
    """Returns (out, lse) of the interpreted kernels."""
    options = complete(spec, arguments.options)

    def attention(*arrays):
        return mosaic_gpu.paged_attention(*arrays, **options, config=config)

    with interpreted((10, 0)):
        return jax.block_until_ready(jax.jit(attention)(*arguments.arrays))


@pytest.mark.parametrize("name", tabled_but(CASES, MADE))
def test_equals_the_reference(name):
    spec, config = CASES[name]
    arguments = build_poisoned(spec)
    out, lse = run(spec, arguments, config)
    expected, expected_lse = attend(arguments, "reference")
    tolerance = TOLERANCES[arguments.q.dtype.name]
    expected, out = (np.asarray(array, np.float32) for array in (expected, out))
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_the_public_function_runs_it():
    shape = jax.ShapeDtypeStruct
    q, cache = shape((4, 4, 64), jnp.bfloat16), shape((9, 2, 16, 64), jnp.bfloat16)
    with interpret_kernels(compute_capability=(10, 0)):
        assert attention_implementation(None, q, cache) == "mosaic_gpu"
        assert kernel_family() == "blackwell"


def test_the_rule_finds_one_for_every_case():
    """Two CTAs per SM where their tensor memory has room for 64 keys and 128 numbers."""
    for case in blackwell_cases():
        config = case.chosen_config
        assert config == blackwell_problem.chosen_config(case.problem)
        assert fits(config, shared_types(case.problem, config), SM100)
        assert config.ctas_per_sm == (2 if case.head_dim <= 128 else 1), case.name
