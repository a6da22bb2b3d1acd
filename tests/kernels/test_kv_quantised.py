"""Quantised keys and values: bounds of the error, scales where they belong, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import KVCache, StaticScales, paged_attention, write_kv
from pallas_paged.quantisation import LARGEST, dequantise, quantise
from tests.kernels.in_place import assert_donated, assert_updates_in_place

DTYPES = pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])


def error_bound(x, dtype):
    """The bound that `pallas_paged.quantisation` states, with room for float32."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    if dtype == "int8":
        return np.broadcast_to(amax / 254, x.shape) * (1 + 1e-5)
    return np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * amax / 448) * (1 + 1e-5)


def rows_of_all_sizes():
    """Standard-normal rows from 1e-30 to 1e30, some with one outlier, and rows of a few numbers."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((600, 64)).astype(np.float32)
    rows[::3, 5] *= 1000
    rows[1::3] *= rng.random((200, 64)) < 0.1
    return rows * np.logspace(-30, 30, 600, dtype=np.float32)[rng.permutation(600), None]


@DTYPES
def test_error_of_the_round_trip_is_bounded(dtype):
    x = rows_of_all_sizes()
    stored, scale = jax.jit(quantise, static_argnums=1)(x, dtype)
    assert (stored.dtype, scale.dtype, scale.shape) == (dtype, jnp.float32, (600,))
    assert (np.asarray(scale) > 0).all()
    back = np.asarray(dequantise(stored, scale))
    assert (np.abs(back - x) <= error_bound(x, dtype)).all()
    # The bound is not slack: some number comes near it.
    assert (np.abs(back - x) / np.maximum(error_bound(x, dtype), 1e-38)).max() > 0.9


@DTYPES
def test_nothing_overflows_and_zeros_stay_zeros(dtype):
    largest = LARGEST[jnp.dtype(dtype)]
    amax = np.geomspace(1e-44, 3e38, 20000, dtype=np.float32)
    x = np.stack([amax, -amax, 0 * amax], axis=1)
    stored, scale = quantise(jnp.asarray(x), dtype)
    numbers = np.asarray(stored, np.float32)
    assert np.isfinite(numbers).all()
    assert np.isfinite(np.asarray(scale)).all()
    assert np.abs(numbers).max() == largest
    np.testing.assert_array_equal(numbers[:, 0], -numbers[:, 1])
    np.testing.assert_array_equal(numbers[:, 2], 0)
    assert (np.abs(dequantise(stored, scale) - x) <= np.maximum(x[:, :1] * 1e-6, 2.0**-100)).all()


@DTYPES
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given", [None, 0.25])
def test_what_is_wrong_does_not_become_finite(dtype, wrong, given):
    x = np.ones((2, 8), np.float32)
    x[1, 3] = wrong
    given = None if given is None else jnp.full(2, given, jnp.float32)
    back = np.asarray(dequantise(*quantise(jnp.asarray(x), dtype, given)))
    np.testing.assert_allclose(back[0], 1)
    assert not np.isfinite(back[1, 3])


@DTYPES
def test_given_scales_are_used_and_what_does_not_fit_is_the_last_number(dtype):
    largest = LARGEST[jnp.dtype(dtype)]
    lowest = -128 if dtype == "int8" else -448
    x = jnp.array([[1.0, -0.5, 0.0], [2 * largest, -3 * largest, 1.0]])
    stored, scale = quantise(x, dtype, jnp.array([0.5, 1.0]))
    np.testing.assert_array_equal(scale, [0.5, 1.0])
    expected = [[2, -1, 0], [largest, lowest, 1]]
    np.testing.assert_array_equal(np.asarray(stored, np.float32), expected)


@DTYPES
@IMPLEMENTATIONS
def test_each_head_is_written_with_its_static_scale(dtype, implementation):
    k, v = jnp.ones((2, 3, 32)), jnp.full((2, 3, 32), 3.0)
    static = StaticScales(jnp.array([1.0, 0.5, 0.25]), jnp.array([3.0, 1.5, 0.75]))
    cache, slots = KVCache.zeros(2, 3, 8, 32, dtype), jnp.array([9, 10], jnp.int32)
    cache = write_kv(k, v, cache, slots, implementation=implementation, static_scales=static)
    for stored, scales, given in zip(cache[:2], cache[2:], static, strict=True):
        numbers = np.asarray(stored[1, :, 1:3], np.float32)
        np.testing.assert_array_equal(numbers, np.broadcast_to([[[1]], [[2]], [[4]]], (3, 2, 32)))
        np.testing.assert_array_equal(scales[1, :, 1:3], np.stack([given] * 2, axis=1))
        assert not np.asarray(scales)[:, :, [0, 3, 7]].any()


@pytest.mark.usefixtures("unchecked_types")
def test_static_scales_that_do_not_fit_are_refused():
    k, slots = jnp.ones((2, 3, 32)), jnp.array([9, 10], jnp.int32)
    one, three = jnp.ones(1), jnp.ones(3)
    per_head = r"static_scales.v is float32\[1\], must be float32\[3\]: one number per KV head"
    for dtype, wrong, message in (
        ("int8", (three, one), per_head),
        ("int8", (three.astype(jnp.bfloat16), three), r"static_scales.k is bfloat16\[3\], must be"),
        ("bfloat16", (three, three), "for quantised caches, not for bfloat16"),
    ):
        cache = KVCache.zeros(2, 3, 8, 32, dtype)
        with pytest.raises(ValueError, match=message):
            write_kv(k, k, cache, slots, static_scales=StaticScales(*wrong))


def written(dtype, implementation, input_dtype="float32"):
    """Tokens for shuffled slots of a poisoned cache; padding tokens are NaN."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 16, 3, 64)).astype(np.float32) * [[[[1.0]]], [[[7.0]]]]
    k[13:] = v[13:] = np.nan
    slots = np.append(rng.permutation(np.arange(8, 40))[:13], [0, 1, 0]).astype(np.int32)
    k, v = jnp.asarray(k, input_dtype), jnp.asarray(v, input_dtype)
    cache = jax.tree.map(
        lambda array: jnp.full_like(array, 77 if array.dtype == jnp.int8 else jnp.nan),
        KVCache.zeros(6, 3, 8, 64, dtype),
    )
    return k, v, slots, write_kv(k, v, cache, jnp.asarray(slots), implementation=implementation)


@DTYPES
@IMPLEMENTATIONS
@pytest.mark.parametrize("input_dtype", ["float32", "bfloat16"])
def test_each_token_lands_in_its_slot_with_its_scale(dtype, implementation, input_dtype):
    k, v, slots, cache = written(dtype, implementation, input_dtype)
    is_written = np.isin(np.arange(48), slots)
    for x, stored, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        assert stored.dtype == dtype
        x = np.asarray(x, np.float32)[:13]
        back = np.asarray(dequantise(stored, scale)).swapaxes(1, 2).reshape(48, 3, 64)
        assert (np.abs(back[slots[:13]] - x) <= error_bound(x, dtype)).all()
        amax = np.abs(x).max(axis=-1)
        scales = np.asarray(scale).swapaxes(1, 2).reshape(48, 3)
        np.testing.assert_allclose(scales[slots[:13]], amax / LARGEST[jnp.dtype(dtype)], rtol=1e-6)
        assert np.isnan(back[~is_written]).all()


def test_int8_cache_is_updated_in_place():
    cache = KVCache.zeros(300, 2, 8, 16, jnp.int8)
    k = jnp.ones((5, 2, 16))
    slots = jnp.arange(8, 13, dtype=jnp.int32)
    assert_updates_in_place(lambda c, *args: write_kv(*args[:2], c, args[2]), cache, k, k, slots)
    assert_donated(cache, write_kv(k, k, cache, slots))


def dequantised(arguments):
    """The same arguments with a float32 cache of what the quantised one stands for."""
    options = dict(arguments.options)
    scales = options.pop("k_scale"), options.pop("v_scale")
    k, v = (
        dequantise(cache, scale) for cache, scale in zip(arguments.arrays[1:3], scales, strict=True)
    )
    return arguments._replace(k_cache=k, v_cache=v, options=options)


@DTYPES
@IMPLEMENTATIONS
def test_attention_output_stays_near_float32(dtype, implementation):
    """Against the same keys and values in float32, standard-normal.

    A logit scale * q . k is off by scale * sum |q_i| |dk_i|, independent roundings: about
    2^-4 / sqrt(3) / 1.4 (e4m3, uniform within its relative bound, on average over a binade) of
    its standard deviation 1, so 0.03; the output by as much of the values that it averages, 0.1 at
    most.
    """
    plain = AttentionSpec("near", (33, 1, 24), (1, 1, 24), head_dim=128)
    quantised = dataclasses.replace(plain, cache_dtype=dtype)
    options = {"return_lse": True, "implementation": implementation}
    expected = build(plain)
    actual = build(quantised)
    assert np.isnan(np.asarray(actual.options["k_scale"])).any()
    out, lse = paged_attention(*actual.arrays, **actual.options, **options)
    wanted, wanted_lse = paged_attention(*expected.arrays, **expected.options, **options)
    used = sum(plain.lens_of_queries)
    error = np.abs(np.asarray(out - wanted))[:used]
    limit, rms_limit = {"float8_e4m3fn": (0.15, 0.02), "int8": (0.04, 0.005)}[dtype]
    assert error.max() < limit
    assert np.sqrt(np.mean(error**2)) < rms_limit
    assert np.abs(np.asarray(lse - wanted_lse))[:used].max() < limit

    same = dequantised(actual)
    wanted, wanted_lse = paged_attention(*same.arrays, **same.options, **options)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@DTYPES
@IMPLEMENTATIONS
def test_scales_of_unused_slots_reach_no_result(dtype, implementation):
    spec = AttentionSpec("poison", (33, 1, 24, 16, 0), (1, 1, 24, 5, 0), cache_dtype=dtype)
    arguments = build(spec)
    other = dict(arguments.options)
    for name in ("k_scale", "v_scale"):
        poisoned = np.isnan(np.asarray(other[name]))
        assert poisoned[0].all()
        assert (poisoned.any(axis=(1, 2)) & ~poisoned.all(axis=(1, 2))).any()  # tails
        other[name] = jnp.where(poisoned, 1e4, other[name])
    options = {"return_lse": True, "implementation": implementation}
    results = paged_attention(*arguments.arrays, **arguments.options, **options)
    used = sum(spec.lens_of_queries)
    assert np.isfinite(np.asarray(results[0])).all()
    assert np.isfinite(np.asarray(results[1])[:used]).all()
    others = paged_attention(*arguments.arrays, **other, **options)
    for result, expected in zip(results, others, strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments():
    arguments = build(AttentionSpec("valid", (5, 3), cache_dtype="int8"))
    k_scale, v_scale = arguments.options["k_scale"], arguments.options["v_scale"]
    with pytest.raises(ValueError, match=r"v_scale=None: a cache of int8 is quantised and needs"):
        paged_attention(*arguments.arrays, k_scale=k_scale)
    with pytest.raises(ValueError, match=r"k_scale is float32\[8, 2\], must be float32\[8, 2, 8\]"):
        paged_attention(*arguments.arrays, k_scale=k_scale[:, :, 0], v_scale=v_scale)
    plain = build(AttentionSpec("valid", (5, 3)))
    with pytest.raises(ValueError, match=r"k_scale is for quantised caches; leave it None for fl"):
        paged_attention(*plain.arrays, k_scale=k_scale, v_scale=v_scale)
    cache = KVCache(arguments.k_cache, arguments.v_cache, k_scale)
    k, slots = jnp.ones((1, 2, 16)), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match=r"kv_cache.v_scale=None"):
        write_kv(k, k, cache, slots)
