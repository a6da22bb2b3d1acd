"""Paged attention: XLA and Numba against the reference, that against dense softmax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from benchmarks.attention_cases.specs import SPECS
from pallas_paged import AttentionMetadata, KVCache, paged_attention, write_kv
from pallas_paged.ops.attention import xla
from pallas_paged.ops.attention.cpu.attend import unsupported
from tests.kernels.one_program import attend

# The inputs are standard-normal, so these bound the error of one rounding and of the sums.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
MIXED = AttentionSpec("mixed", (33, 1, 70, 16, 0, 100), (1, 1, 64, 5, 0, 1), num_q_heads=6)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def build_with_expected(spec):
    """Returns the arguments and what the reference gives, once for all implementations."""
    arguments = build(spec)
    return arguments, attend(arguments, "reference")


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(array, np.float32) for array in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Every kind of step over the blocks of two sizes, over others decode and parts of prompts: a size
# is in the gathering of keys alone, which all kinds share.
LEFT_OUT = {f"{kind}-block{size}" for kind in ("prefill", "mixed") for size in (8, 32)}
FEWER_SPECS = [spec for spec in SPECS if spec.name not in LEFT_OUT]


def cpu_unsupported(spec):
    """Returns why Numba's kernel does not serve a spec, or None."""
    q = jax.ShapeDtypeStruct((1, spec.num_q_heads, spec.head_dim), jnp.dtype(spec.dtype))
    cache = (2, spec.num_kv_heads, spec.block_size, spec.head_dim)
    dtype = jnp.dtype(spec.cache_dtype or spec.dtype)
    return unsupported(q, jax.ShapeDtypeStruct(cache, dtype))


@pytest.mark.parametrize(
    ("implementation", "spec"),
    [("xla", spec) for spec in FEWER_SPECS]
    + [("numba", spec) for spec in SPECS if cpu_unsupported(spec) is None],
    ids=lambda value: getattr(value, "name", value),
)
def test_equals_reference(implementation, spec):
    arguments, (expected, expected_lse) = build_with_expected(spec)
    out, lse = attend(arguments, implementation)
    assert out.dtype == expected.dtype == arguments.q.dtype
    assert np.isfinite(np.asarray(expected, np.float32)).all()
    assert_close(out, expected, TOLERANCES[spec.dtype])
    assert_close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize(
    "tuning",
    [
        xla.Tuning(decode_rows=3, decode_chunk=8, prefill_tile=5, prefill_chunk=8),
        xla.Tuning(decode_chunk=24, decode_bytes=1, prefill_tile=1000, prefill_chunk=1000),
    ],
)
def test_tuning_changes_no_result(tuning):
    arguments = build(MIXED)
    window = {"sliding_window": 20}
    options = {
        "k_scale": None,
        "v_scale": None,
        "scale": 0.3,
        "logits_soft_cap": None,
        "alibi_slopes": None,
        "sinks": None,
    }
    out, lse = xla.paged_attention(*arguments.arrays, **options | window, tuning=tuning)
    expected, expected_lse = attend(arguments, "reference", scale=0.3, **window)
    assert_close(out, expected, 1e-5)
    assert_close(lse, expected_lse, 1e-5)


def dense_attention(spec, arguments):
    """Softmax in float64 over each sequence's keys, gathered token by token."""
    q, k_cache, v_cache = (np.asarray(array, np.float64) for array in arguments.arrays[:3])
    metadata, options = arguments.metadata, arguments.options
    group = spec.num_q_heads // spec.num_kv_heads
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    token = 0
    for row, (length, queries) in enumerate(zip(spec.seq_lens, spec.lens_of_queries, strict=True)):
        table = np.asarray(metadata.block_tables)[row]
        places = [(table[j // spec.block_size], j % spec.block_size) for j in range(length)]
        for position in range(length - queries, length):
            first = max(0, position + 1 - (spec.sliding_window or length))
            for head in range(spec.num_q_heads):
                keys = np.array([k_cache[b, head // group, o] for b, o in places[: position + 1]])
                values = np.array([v_cache[b, head // group, o] for b, o in places[: position + 1]])
                x = keys @ q[token, head] * (spec.scale or spec.head_dim**-0.5)
                if spec.logits_soft_cap:
                    x = spec.logits_soft_cap * np.tanh(x / spec.logits_soft_cap)
                if spec.alibi:
                    slope = float(options["alibi_slopes"][head])
                    x = x + slope * (np.arange(position + 1) - position)
                weights = np.exp(x[first:])
                sink = np.exp(float(options["sinks"][head])) if spec.sinks else 0.0
                total = weights.sum() + sink
                out[token, head] = weights @ values[first:] / total
                lse[token, head] = np.log(total)
            token += 1
    return out, lse


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 3, "sinks": True},
        {"scale": 0.9, "logits_soft_cap": 1.2, "alibi": True},
    ],
    ids=["plain", "window-sinks", "scale-cap-alibi"],
)
@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_equals_dense_softmax(implementation, options):
    lens, queries = (13, 1, 24, 0, 8), (1, 1, 5, 0, 8)
    spec = AttentionSpec("dense", lens, queries, num_q_heads=6, block_size=4, **options)
    arguments = build(spec)
    out, lse = attend(arguments, implementation)
    expected, expected_lse = dense_attention(spec, arguments)
    assert_close(out, expected, 1e-5)
    assert_close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_reference_equals_jax_attention_on_contiguous_keys(window):
    length, heads, kv_heads, dim, size = 32, 6, 2, 16, 8
    q, k, v = (
        jax.random.normal(jax.random.key(i), (length, h, dim), jnp.float32)
        for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    cache = KVCache.zeros(1 + length // size, kv_heads, size, dim, jnp.float32)
    slots = size + jnp.arange(length, dtype=jnp.int32)
    cache = write_kv(k, v, cache, slots)
    metadata = AttentionMetadata(
        positions=jnp.arange(length, dtype=jnp.int32),
        slot_mapping=slots,
        block_tables=1 + jnp.arange(length // size, dtype=jnp.int32)[None],
        seq_lens=jnp.array([length], jnp.int32),
        query_start_loc=jnp.array([0, length], jnp.int32),
        max_query_len=length,
    )
    out = paged_attention(
        q, cache.k, cache.v, metadata, sliding_window=window, implementation="reference"
    )
    expected = jax.nn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )
    assert_close(out, expected[0], 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_example_by_hand(implementation):
    """Keys 0 and ln 3 with query 1: weights 1 and 3; a sink of ln 4 adds 4 to their sum."""
    k_cache = jnp.array([0.0, 0.0, 0.0, np.log(3.0)], jnp.float32).reshape(2, 1, 2, 1)
    v_cache = jnp.array([0.0, 0.0, 8.0, 16.0], jnp.float32).reshape(2, 1, 2, 1)
    metadata = AttentionMetadata(
        positions=jnp.array([1], jnp.int32),
        slot_mapping=jnp.array([3], jnp.int32),
        block_tables=jnp.array([[1]], jnp.int32),
        seq_lens=jnp.array([2], jnp.int32),
        query_start_loc=jnp.array([0, 1], jnp.int32),
        max_query_len=1,
    )
    q = jnp.ones((1, 1, 1), jnp.float32)
    out, lse = paged_attention(
        q,
        k_cache,
        v_cache,
        metadata,
        sinks=jnp.log(jnp.array([4.0], jnp.float32)),
        return_lse=True,
        implementation=implementation,
    )
    assert_close(out, [[[(8 + 3 * 16) / 8]]], 1e-6)
    assert_close(lse, [[np.log(8)]], 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_unused_memory_reaches_no_result(implementation):
    arguments = build(MIXED)
    poison = [np.isnan(np.asarray(array)) for array in arguments.arrays[:3]]
    assert poison[1][0].all()  # the null block
    assert poison[0].any()  # padding tokens
    tails = poison[1].any(axis=(1, 2, 3)) & ~poison[1].all(axis=(1, 2, 3))
    assert tails.any()
    replaced = [
        jnp.where(is_poison, 1e4, array)
        for is_poison, array in zip(poison, arguments.arrays[:3], strict=True)
    ]
    results = attend(arguments, implementation)
    others = attend(
        arguments._replace(q=replaced[0], k_cache=replaced[1], v_cache=replaced[2]), implementation
    )
    for result, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_blocks_left_of_the_window_may_be_gone(implementation):
    """An engine may free them and leave null entries in the table."""
    arguments = build(AttentionSpec("gone", (70, 41), (1, 9), sliding_window=10, block_size=8))
    tables = np.array(arguments.metadata.block_tables)
    tables[0, : (70 - 10) // 8] = 0
    tables[1, : (41 - 9 - 9) // 8] = 0
    fields = dict(vars(arguments.metadata), block_tables=jnp.asarray(tables))
    gone = arguments._replace(metadata=AttentionMetadata(**fields))
    for result, expected in zip(
        attend(gone, implementation), attend(arguments, "reference"), strict=True
    ):
        assert_close(result, expected, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_nan_left_of_the_window_reaches_no_result(implementation):
    """In a block that the window reaches into, too."""
    length, window, size = 43, 10, 8
    arguments = build(
        AttentionSpec("left", (length,), (1,), sliding_window=window, block_size=size)
    )
    expected = attend(arguments, "reference")
    block, count = divmod(length - window, size)
    assert count > 0
    place = arguments.metadata.block_tables[0, block], slice(None), slice(0, count)
    poisoned = {
        name: getattr(arguments, name).at[place].set(jnp.nan) for name in ("k_cache", "v_cache")
    }
    for result, other in zip(
        attend(arguments._replace(**poisoned), implementation), expected, strict=True
    ):
        assert_close(result, other, 1e-5)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_values_of_another_width_than_the_keys(implementation, cache_dtype):
    """Each column of the values gives one of the output: the result is part of a wider one's."""
    arguments = build(dataclasses.replace(MIXED, cache_dtype=cache_dtype, sinks=True))
    expected, expected_lse = attend(arguments, "reference")
    narrow = arguments._replace(v_cache=arguments.v_cache[..., 3:11])
    out, lse = attend(narrow, implementation)
    assert_close(out, expected[..., 3:11], 1e-5)
    assert_close(lse, expected_lse, 1e-5)
    wide = arguments._replace(v_cache=jnp.concatenate([arguments.v_cache] * 2, axis=3))
    out, lse = attend(wide, implementation)
    assert_close(out, jnp.concatenate([expected] * 2, axis=2), 1e-5)
    assert_close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
def test_padding_gets_zeros_and_minus_infinity(implementation):
    arguments = build(MIXED)
    used = sum(MIXED.lens_of_queries)
    sinks = jnp.ones(MIXED.num_q_heads, jnp.float32)
    out, lse = attend(arguments, implementation, sinks=sinks)
    assert out.shape[0] > used
    np.testing.assert_array_equal(out[used:], 0)
    np.testing.assert_array_equal(lse[used:], -np.inf)
    assert np.isfinite(lse[:used]).all()


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("implementation", ["xla", "numba"])
def test_sequence_alone_gets_the_same_bits(implementation, row):
    """Within one bucket a sequence's result depends on nothing but the sequence."""
    arguments = build(MIXED)
    metadata = arguments.metadata
    starts = np.asarray(metadata.query_start_loc)
    first, count = starts[row], starts[row + 1] - starts[row]
    is_row = np.arange(len(metadata.seq_lens)) == row
    alone = dict(
        vars(metadata),
        seq_lens=jnp.where(is_row, metadata.seq_lens, 0),
        query_start_loc=jnp.asarray(np.append(0, np.cumsum(is_row * count)), jnp.int32),
    )
    q = jnp.roll(arguments.q, -first, axis=0)
    results = attend(arguments._replace(q=q, metadata=AttentionMetadata(**alone)), implementation)
    for result, expected in zip(results, attend(arguments, implementation), strict=True):
        np.testing.assert_array_equal(result[:count], expected[first : first + count])


@pytest.mark.parametrize("max_query_len", [1, 4])
@pytest.mark.parametrize("implementation", ["xla", "numba"])
def test_step_of_padding_only(implementation, max_query_len):
    arguments = build(MIXED)
    fields = {
        name: jnp.zeros_like(value)
        for name, value in vars(arguments.metadata).items()
        if isinstance(value, jax.Array)
    }
    metadata = AttentionMetadata(**fields, max_query_len=max_query_len)
    out, lse = attend(arguments._replace(metadata=metadata), implementation)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_decode_loop_equals_prefill():
    """Under jit, in a scan: each step writes one token per sequence and attends."""
    lens, size, heads, kv_heads, dim = (19, 5, 33), 8, 4, 2, 16
    prefill = build(AttentionSpec("prefill", lens, lens, heads, kv_heads, dim, size, num_rows=3))
    expected = attend(prefill, "reference")[0]
    starts = np.asarray(prefill.metadata.query_start_loc)
    longest = max(lens)
    token = jnp.asarray(np.minimum(starts[:-1, None] + np.arange(longest), starts[1:, None] - 1).T)
    slots = prefill.metadata.slot_mapping[token]
    tables = prefill.metadata.block_tables
    k, v = (
        jnp.swapaxes(cache, 1, 2).reshape(-1, kv_heads, dim)[slots]
        for cache in (prefill.k_cache, prefill.v_cache)
    )

    @jax.jit
    def decode(cache, q, k, v, slots):
        def step(cache, inputs):
            position, q, k, v, slots = inputs
            metadata = AttentionMetadata(
                positions=jnp.broadcast_to(position, 3),
                slot_mapping=slots,
                block_tables=tables,
                seq_lens=jnp.broadcast_to(position + 1, 3),
                query_start_loc=jnp.arange(4, dtype=jnp.int32),
                max_query_len=1,
            )
            cache = write_kv(k, v, cache, slots)
            return cache, paged_attention(q, cache.k, cache.v, metadata)

        positions = jnp.arange(longest, dtype=jnp.int32)
        return jax.lax.scan(step, cache, (positions, q, k, v, slots))[1]

    cache = KVCache(*(jnp.full_like(array, jnp.nan) for array in prefill.arrays[1:3]))
    out = decode(cache, prefill.q[token], k, v, slots)
    for row, length in enumerate(lens):
        assert_close(out[:length, row], expected[starts[row] : starts[row + 1]], 1e-5)


def test_partial_results_merge():
    """lse weighs results over disjoint keys; the sink is given to one part only."""
    spec = AttentionSpec("merge", (64, 40), block_size=8, num_rows=2, num_tokens=2)
    arguments = build(spec)
    sinks = jnp.ones(spec.num_q_heads, jnp.float32)
    expected, expected_lse = attend(arguments, "reference", sinks=sinks)
    lens = jnp.array([16, 16], jnp.int32)
    first = arguments._replace(
        metadata=AttentionMetadata(**dict(vars(arguments.metadata), seq_lens=lens))
    )
    rest = AttentionMetadata(
        **dict(
            vars(arguments.metadata),
            seq_lens=arguments.metadata.seq_lens - 16,
            block_tables=jnp.roll(arguments.metadata.block_tables, -2, axis=1),
        )
    )
    parts = attend(first, "numba", sinks=sinks), attend(arguments._replace(metadata=rest), "xla")
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * jnp.exp(part_lse - lse)[..., None] for part, part_lse in parts)
    assert_close(out, expected, 1e-5)
    assert_close(lse, expected_lse, 1e-5)
