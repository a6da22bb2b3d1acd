"""Paged attention: XLA against the reference, and the reference against dense softmax."""

import jax
import numpy as np
import pytest

from pallas_paged import paged_attention
from pallas_paged.ops.attention import arg_specs

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("spec", arg_specs.SPECS, ids=lambda spec: spec.name)
def test_xla_equals_reference(spec):
    arguments = arg_specs.build(spec)
    tolerance = max(TOLERANCES[spec.dtype], TOLERANCES["float32"])
    with jax.default_matmul_precision("highest"):
        out, lse = paged_attention(
            *arguments.arrays, **arguments.options, return_lse=True, implementation="xla"
        )
    expected, expected_lse = paged_attention(
        *arguments.arrays, **arguments.options, return_lse=True, implementation="reference"
    )
    assert out.dtype == arguments.q.dtype
    assert np.isfinite(np.asarray(expected, np.float32)).all()
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), tolerance, tolerance
    )
    np.testing.assert_allclose(lse, expected_lse, 1e-5, 1e-5)
