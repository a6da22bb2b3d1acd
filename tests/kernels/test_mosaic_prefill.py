"""The sm_90a prefill kernel, interpreted with race detection, against the reference.

Interpret mode knows no products with an operand in registers, so the kernel runs with
`in_registers=False` here; what the compiled kernel does otherwise is in `_add` and
`_add_and_weigh` alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import paged_attention
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.hopper import prefill as kernel
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_plan import NUM_TOKENS, plan_prefill
from tests.kernels.interpreting import TOLERANCES, build_poisoned, complete, interpreted
from tests.kernels.one_program import attend
from tests.kernels.prefill_cases import interpret_cases
from tests.kernels.tabled import tabled_but

# The rows of a tile without a token hold whatever shared memory held, NaN here.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def run(spec, tuning, into=None, sinks=None, num_sms=2, **plan_options):
    """Returns (out, lse) of the interpreted kernel and of the reference.

    Records of the plan that are of no tile are replaced: who reads one writes a wrong first row.
    """
    arguments = build_poisoned(spec)
    options = complete(spec, arguments.options)
    if sinks is not None:
        options["sinks"] = sinks
    expected = attend(arguments, "reference", sinks=options["sinks"])
    scales = options.pop("k_scale"), options.pop("v_scale")

    @jax.jit
    def prefill(q, k_cache, v_cache, metadata, into):
        plan = plan_prefill(
            metadata,
            num_tokens=q.shape[0],
            group=spec.num_q_heads // spec.num_kv_heads,
            head_dim=spec.head_dim,
            sliding_window=spec.sliding_window,
            **plan_options,
        )
        is_tile = jnp.arange(plan.tiles.shape[0]) < plan.num_tiles
        other = jnp.array([0, 1, 0, 0, 0, 1], jnp.int32)
        plan = plan._replace(tiles=jnp.where(is_tile[:, None], plan.tiles, other))
        cache, tables = KVCache(k_cache, v_cache, *scales), metadata.block_tables
        return kernel.prefill(
            q, cache, tables, plan, tuning=tuning, num_sms=num_sms, into=into, **options
        )

    with interpreted():
        actual = jax.block_until_ready(prefill(*arguments.arrays, into))
    return actual, expected


CASES = {case.spec.name: case for case in interpret_cases()}
# `make test` runs each option and kind of cache, and what is special about steps and blocks.
FEW = ("chunked", "group1", "wide", "group7", "fp8", "int8-cap")


@pytest.mark.parametrize("name", tabled_but(CASES, FEW))
def test_equals_reference(name):
    (out, lse), (expected, expected_lse) = run(*CASES[name])
    assert out.dtype == expected.dtype
    tolerance = TOLERANCES[CASES[name].spec.dtype]
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_of_others_stay():
    """Sequences with one query token and the padding belong to the decode kernel, say."""
    spec = AttentionSpec(
        "mixed",
        (20, 9, 3, 40),
        (1, 7, 1, 5),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype="bfloat16",
    )
    theirs = jnp.full((16, 4, 64), 7, jnp.bfloat16), jnp.full((16, 4), 3, jnp.float32)
    is_ours = np.repeat([False, True, False, True, False], [1, 7, 1, 5, 2])
    tuning = PrefillTuning(64, 2, in_registers=False)
    actual, expected = run(spec, tuning, theirs, min_query_len=2, with_padding=False)
    for array, other, right in zip(actual, theirs, expected, strict=True):
        array, other, right = (np.asarray(x, np.float32) for x in (array, other, right))
        np.testing.assert_array_equal(array[~is_ours], other[~is_ours])
        np.testing.assert_allclose(array[is_ours], right[is_ours], rtol=2e-2, atol=2e-2)


def test_a_sink_of_minus_infinity_is_none():
    """The last tokens see no key of the first step: nothing but the sink is known of them then."""
    spec = AttentionSpec(
        "late",
        (80,),
        (40,),
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=64,
        block_size=64,
        dtype="bfloat16",
        num_rows=1,
        num_tokens=40,
        sliding_window=5,
    )
    tuning = PrefillTuning(64, 2, in_registers=False)
    (out, lse), (expected, expected_lse) = run(spec, tuning, sinks=jnp.full(1, -jnp.inf))
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


SEVERAL = {
    "numbers": (64, "bfloat16", {}),
    "three-stages": (64, "bfloat16", {"stages": 3, "turns": False, "ahead": False}),
    "pieces": (192, "bfloat16", {}),
    "quantised": (64, "int8", {"stages": 3}),
    "quantised-apart": (64, "float8_e4m3fn", {"converters": 2, "converted": 2}),
    "quantised-pieces": (192, "int8", {"converters": 2}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_thread_block_has_several_tiles(name):
    """Of one to three steps each, so that they begin at any place of the ring.

    The plan has room for more tiles than there are.
    """
    head_dim, cache_dtype, tuning = SEVERAL[name]
    spec = AttentionSpec(
        "several",
        (5, 150, 1, 100, 0, 64),
        (5, 9, 1, 40, 0, 3),
        num_q_heads=8,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=64,
        dtype="bfloat16",
        cache_dtype=cache_dtype,
        sliding_window=120,
    )
    tuning = PrefillTuning(64, in_registers=False, **tuning)
    (out, lse), (expected, expected_lse) = run(spec, tuning, num_sms=1)
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_plan_counts_its_tiles():
    """Padding has tiles of its own, of 32 tokens each; behind them nothing is a tile."""
    starts = jnp.array([0, 40, 40, 41, 41], jnp.int32)
    lens = jnp.array([50, 0, 7, 0], jnp.int32)
    unread = jnp.zeros(100, jnp.int32)
    metadata = AttentionMetadata(unread, unread, jnp.zeros((4, 4), jnp.int32), lens, starts, 40)
    for with_padding, num_tiles in ((True, 5), (False, 3)):
        plan = plan_prefill(
            metadata,
            num_tokens=100,
            group=4,
            head_dim=64,
            sliding_window=None,
            with_padding=with_padding,
        )
        assert plan.num_tiles.tolist() == [num_tiles]
        has_tokens = np.asarray(plan.tiles[:, NUM_TOKENS]) > 0
        assert has_tokens.tolist() == [i < num_tiles for i in range(len(has_tokens))]
        assert len(has_tokens) > num_tiles


@pytest.mark.parametrize("scale", [4.0, 0.0, -4.0])
def test_scales(scale):
    """Logits far apart, and in the other order than the products of queries and keys.

    With a factor above 0 they are multiplied only after the largest has been found.
    """
    spec = AttentionSpec(
        "scaled",
        (70,),
        (9,),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=64,
        block_size=64,
        dtype="float16",
        num_rows=1,
        num_tokens=9,
        scale=scale,
    )
    (out, lse), (expected, expected_lse) = run(spec, PrefillTuning(64, 2, in_registers=False))
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=3e-3, atol=3e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_tuning_is_checked():
    with pytest.raises(ValueError, match="tile_keys=48 must be a positive multiple of 64"):
        PrefillTuning(tile_keys=48)
    with pytest.raises(ValueError, match="stages=1 must be at least 2"):
        PrefillTuning(stages=1)
    with pytest.raises(ValueError, match="converters=3 must be 1 or 2"):
        PrefillTuning(converters=3)


def test_a_mixed_step_of_the_public_function():
    """Decode and prefill rows, a sequence without queries, and padding in one call."""
    spec = AttentionSpec(
        "mixed",
        (20, 30, 9, 3, 40),
        (1, 0, 9, 1, 12),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype="bfloat16",
    )
    arguments = build(spec)
    with interpreted():
        out, lse = jax.block_until_ready(
            jax.jit(lambda *arrays: paged_attention(*arrays, return_lse=True))(*arguments.arrays)
        )
    expected, expected_lse = attend(arguments, "reference")
    expected, out = (np.asarray(array, np.float32) for array in (expected, out))
    np.testing.assert_allclose(out, expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
