"""The Mosaic GPU decode kernel, interpreted, against the reference; its work list; its refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from benchmarks.attention_cases.arguments import AttentionSpec, build
from benchmarks.attention_cases.decode import make_case
from benchmarks.attention_cases.specs import DECODE_KERNEL_SPECS, QUANTISED_KERNEL_SPECS
from pallas_paged import AttentionMetadata, attention_implementation, paged_attention
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.decode_merge import merge
from pallas_paged.ops.attention.hopper.decode_parts import Outputs
from pallas_paged.ops.attention.work_list import Parts, make_work_list
from tests.kernels.interpreting import TOLERANCES, interpreted
from tests.kernels.one_program import attend
from tests.kernels.tabled import tabled_but

SPECS = DECODE_KERNEL_SPECS + QUANTISED_KERNEL_SPECS
# Two CTAs in flight, so that shares begin and end within items; or as many as there is work for.
CONFIGS = (
    DecodeConfig(num_stages=2, ctas_per_sm=1),
    DecodeConfig(num_stages=3, ctas_per_sm=2, converts_ahead=False),
    DecodeConfig(tile=128, num_stages=2, ctas_per_sm=2, min_tiles=2),
)


def run(arguments, config, detect_races=True):
    """Returns (out, lse) of the interpreted kernel; fails if its threads race."""
    options = dict(arguments.options)
    if options["scale"] is None:
        options["scale"] = arguments.q.shape[2] ** -0.5
    options = {"alibi_slopes": None, "sinks": None} | options

    def attention(*arrays):
        return mosaic_gpu.paged_attention(*arrays, **options, config=config)

    try:
        with interpret_kernels(detect_races):
            results = jax.block_until_ready(jax.jit(attention)(*arguments.arrays))
        if detect_races:
            assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
    return results


def assert_close(results, arguments):
    out, lse = (np.asarray(result, np.float32) for result in results)
    expected = attend(arguments, "reference")
    tolerance = TOLERANCES[arguments.q.dtype.name]
    np.testing.assert_allclose(out, np.asarray(expected[0], np.float32), atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5, rtol=1e-5)


# `make test` runs each option, kind of cache and configuration, an own scale and equal heads.
@pytest.mark.parametrize("index", tabled_but(range(len(SPECS)), (0, 5, 7, 8, 9, 11)), ids=str)
def test_equals_the_reference(index):
    spec = SPECS[index]
    arguments = build(spec)
    assert_close(run(arguments, CONFIGS[index % len(CONFIGS)]), arguments)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_merge_of_many_parts(head_dim):
    """Of more than are loaded at a time, of fewer and of two; all other parts are NaN."""
    lens, num_ctas = (19 * 64, 64, 9 * 64, 2 * 64), 31  # a tile for each CTA
    problem = make_case(4, head_dim, 16, has_sinks=True).problem
    problem = dataclasses.replace(problem, num_q_heads=4, num_kv_heads=1)
    metadata = AttentionMetadata.for_decode(jnp.zeros((4, 80), jnp.int32), jnp.array(lens), 16)
    work = make_work_list(
        metadata, num_kv_heads=1, num_ctas=num_ctas, tile=64, sliding_window=None, max_tokens=1
    )
    rng = np.random.default_rng(0)
    values = np.full((2 * num_ctas, problem.value_rows, problem.columns), np.nan, np.float32)
    lse = np.full((2 * num_ctas, problem.columns), np.nan, np.float32)
    sinks = rng.standard_normal(4).astype(np.float32)
    out = rng.standard_normal((4 * 4, head_dim)).astype(jnp.bfloat16)
    # The second sequence is not divided.
    expected, expected_lse = [out[4:8].astype(np.float32)], [np.zeros(4)]
    for first, last in ((0, 18), (20, 28), (29, 30)):
        parts = [num_ctas + first, *range(first + 1, last + 1)]
        values[parts] = rng.standard_normal((len(parts), *values.shape[1:]))
        lse[parts] = rng.standard_normal((len(parts), lse.shape[1]))
        lse[parts] += np.arange(len(parts))[:, None]  # so that maxima rise in every turn
        weights = np.exp2(lse[parts, :4])
        sums = np.einsum("pn,pdn->nd", weights, values[parts, :head_dim, :4])
        denominator = weights.sum(axis=0) + np.exp(sinks)
        expected.append(sums / denominator[:, None])
        expected_lse.append(np.log(denominator))
    with interpreted():
        outputs = Outputs(jnp.asarray(out), jnp.zeros((4, 1, problem.columns)))
        results = merge(outputs, Parts(values, lse), work, jnp.asarray(sinks), problem)
        actual, actual_lse = np.asarray(results.out, np.float32), np.asarray(results.lse)
    in_order = [1, 0, 2, 3]
    expected = np.concatenate([expected[i] for i in in_order])
    np.testing.assert_allclose(actual, expected, atol=2e-2, rtol=0)
    expected_lse = [expected_lse[i] for i in in_order]
    np.testing.assert_allclose(actual_lse[:, 0, :4], expected_lse, atol=1e-5, rtol=1e-5)


def test_padding_only():
    arguments = build(DECODE_KERNEL_SPECS[0])
    none = {
        name: jnp.zeros_like(value)
        for name, value in vars(arguments.metadata).items()
        if isinstance(value, jax.Array)
    }
    metadata = AttentionMetadata(**none, max_query_len=1)
    out, lse = run(arguments._replace(metadata=metadata), CONFIGS[0])
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_blocks_left_of_the_window_may_be_gone():
    spec = AttentionSpec(
        "gone", (90, 41), sliding_window=10, head_dim=64, block_size=16, dtype="bfloat16"
    )
    arguments = build(spec)
    tables = np.array(arguments.metadata.block_tables)
    tables[0, : (90 - 10) // 16] = 0
    tables[1, : (41 - 10) // 16] = 0
    metadata = dataclasses.replace(arguments.metadata, block_tables=jnp.asarray(tables))
    assert_close(run(arguments._replace(metadata=metadata), CONFIGS[0]), arguments)


def test_the_public_function_runs_it_and_says_so():
    arguments = build(AttentionSpec("one", (3,), head_dim=64, block_size=16, dtype="bfloat16"))
    with interpret_kernels():
        names = [
            attention_implementation(implementation, arguments.q, arguments.k_cache)
            for implementation in (None, "mosaic_gpu")
        ]
        out = jax.jit(lambda *arrays: paged_attention(*arrays))(*arguments.arrays)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert names == ["mosaic_gpu", "mosaic_gpu"]
    expected = paged_attention(*arguments.arrays, implementation="reference")
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2
    )


def shapes(dtype="bfloat16", num_q_heads=8, head_dim=64, block_size=16, cache_dtype=None):
    q = jax.ShapeDtypeStruct((4, num_q_heads, head_dim), dtype)
    return q, jax.ShapeDtypeStruct((9, 2, block_size, head_dim), cache_dtype or dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (shapes("float32"), {}, "q is float32 and the cache float32"),
        (shapes(cache_dtype="float16"), {}, "q is bfloat16 and the cache float16"),
        (shapes("float32", cache_dtype="int8"), {}, "q is float32 and the cache int8; q must be"),
        (shapes(head_dim=72), {}, "head_dim=72 must be among 64, 80"),
        (shapes(block_size=8), {}, "block_size=8 must be among 16, 32"),
        (shapes(num_q_heads=64), {}, "32 query heads per KV head are more than 16"),
        (shapes(), {"deterministic": True}, "deterministic=True, and the work is divided"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(arguments, options, reason):
    with interpret_kernels():
        with pytest.raises(NotImplementedError, match=reason):
            attention_implementation("mosaic_gpu", *arguments, **options)
        assert attention_implementation(None, *arguments, **options) in ("numba", "xla")


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "int8"])
def test_quantised_caches_are_taken(cache_dtype):
    with interpret_kernels():
        assert attention_implementation(None, *shapes(cache_dtype=cache_dtype)) == "mosaic_gpu"


def test_other_devices_are_refused():
    with pytest.raises(
        NotImplementedError, match=r"needs an NVIDIA GPU of compute capability 8\.0, "
    ):
        attention_implementation("mosaic_gpu", *shapes())
