"""Steps without a sequence with a single query token: what they leave out on sm_90a."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import AttentionMetadata, paged_attention
from pallas_paged.deviceless import lower_for
from pallas_paged.ops.attention import reference
from tests.kernels.interpreting import TOLERANCES, build_poisoned, complete, interpreted

# The rows of a tile without a token hold whatever shared memory held, NaN here.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

PROMPTS = AttentionSpec(
    "prompts-only",
    (20, 9, 40, 17),
    (2, 7, 0, 5),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    dtype="bfloat16",
    num_rows=6,
    num_tokens=20,
    min_query_len=2,
)


def test_equals_the_reference_padding_included():
    arguments = build_poisoned(PROMPTS)
    options = complete(PROMPTS, arguments.options)
    expected, expected_lse = reference.paged_attention(*arguments.arrays, **options)
    with interpreted():
        out, lse = jax.block_until_ready(
            paged_attention(*arguments.arrays, implementation="mosaic_gpu", return_lse=True)
        )
    tolerance = TOLERANCES["bfloat16"]
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("min_query_len", "num_kernels"), [(2, 1), (1, 3)])
def test_nothing_of_decode_is_launched(min_query_len, num_kernels):
    """One kernel of prefill; else that, and decode and its merge before."""
    arguments = build(dataclasses.replace(PROMPTS, min_query_len=min_query_len))
    fields = dict(vars(arguments.metadata))
    lens = {name: fields.pop(name) for name in ("max_query_len", "min_query_len")}

    def attend(q, k_cache, v_cache, fields):
        return paged_attention(q, k_cache, v_cache, AttentionMetadata(**fields, **lens))

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (arguments.q, arguments.k_cache, arguments.v_cache, fields),
    )
    text = lower_for("h100", attend, *shapes).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == num_kernels
    assert arguments.q.dtype == jnp.bfloat16
