"""A prefix that is read for several sequences at a time, by each chip's kernels, interpreted."""

import dataclasses

import jax
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import paged_attention
from pallas_paged.ops.attention import cascade
from tests.kernels.interpret_sm80 import interpret_sm80
from tests.kernels.interpreting import TOLERANCES, interpreted
from tests.kernels.one_program import attend
from tests.kernels.test_attention import assert_close
from tests.kernels.test_cascade import sharing, with_prefix

# What is computed of places that no token has is whatever shared memory held, NaN here.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

KERNELS = AttentionSpec(
    "kernels",
    (40, 64, 20, 49),
    num_shared_blocks=2,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("interpret", "spec"),
    [
        (interpreted, KERNELS),
        (lambda: interpreted((10, 0)), dataclasses.replace(KERNELS, num_kv_heads=4)),
        (lambda: interpret_sm80("late"), dataclasses.replace(KERNELS, num_kv_heads=4)),
    ],
    ids=["sm_90", "sm_100", "sm_80"],
)
def test_kernels(interpret, spec, monkeypatch):
    monkeypatch.setattr(cascade, "MOST_TOGETHER", 2)  # so that three tokens are two rows
    arguments = build(spec)
    expected = attend(arguments, "reference")[0]
    with interpret():
        out = jax.block_until_ready(
            paged_attention(
                *with_prefix(arguments, 2, sharing(spec)).arrays,
                **arguments.options,
                implementation="mosaic_gpu",
            )
        )
    assert_close(out, expected, TOLERANCES["bfloat16"])
