"""What paged attention refuses, which implementation it chooses, what its programs hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import (
    AttentionMetadata,
    KVCache,
    attention_implementation,
    paged_attention,
    write_kv,
)
from pallas_paged.deviceless import target_device


def compile_step(spec, cache=None):
    """Compiles write and attention as one program that donates the cache."""
    arguments = build(spec)
    fields = dict(vars(arguments.metadata))
    lens = {name: fields.pop(name) for name in ("max_query_len", "min_query_len")}

    def step(cache, q, k, fields):
        metadata = AttentionMetadata(**fields, **lens)
        cache = write_kv(k, k, cache, metadata.slot_mapping)
        return cache, paged_attention(q, cache.k, cache.v, metadata)

    cache = cache or KVCache(arguments.k_cache, arguments.v_cache)
    k = arguments.q[:, : spec.num_kv_heads]
    return jax.jit(step, donate_argnums=0).lower(cache, arguments.q, k, fields).compile()


@pytest.mark.parametrize("queries", [None, (1, 8, 1, 8)], ids=["decode", "mixed"])
def test_temporaries_do_not_depend_on_the_table_width(queries):
    narrow, wide = (
        compile_step(AttentionSpec("width", (64,) * 4, queries, max_blocks=width))
        .memory_analysis()
        .temp_size_in_bytes
        for width in (16, 2048)
    )
    assert wide - narrow <= 4 * (2048 - 16) * 4  # bytes of the tables themselves


@pytest.mark.parametrize("queries", [None, (1, 8, 1, 8)], ids=["decode", "mixed"])
def test_step_holds_no_copy_of_the_cache(queries):
    cache = KVCache.zeros(4096, 2, 8, 16, jnp.float32)
    analysis = compile_step(AttentionSpec("step", (64,) * 4, queries), cache).memory_analysis()
    assert analysis.alias_size_in_bytes >= 2 * cache.k.nbytes
    assert analysis.temp_size_in_bytes < cache.k.nbytes


def _with(**changes):
    def change(arguments, options):
        fields = dict(vars(arguments.metadata))
        for name, value in changes.items():
            if name in fields:
                fields[name] = value
            elif name in arguments._fields:
                arguments = arguments._replace(**{name: value})
            else:
                options[name] = value
        return arguments._replace(metadata=AttentionMetadata(**fields)), options

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(q=jnp.ones((2, 16))), r"q.shape=\(2, 16\)"),
        (_with(q=jnp.ones((2, 4, 8))), "head_dim=8 of q must equal the cache's 16"),
        (_with(q=jnp.ones((2, 3, 16))), "num_q_heads=3 must be divisible by num_kv_heads=2"),
        (_with(q=jnp.ones((2, 4, 16), jnp.int32)), "q.dtype=int32"),
        (_with(k_cache=jnp.ones((9, 2, 8))), r"k_cache.shape=\(9, 2, 8\)"),
        (_with(v_cache=jnp.ones((9, 2, 4, 16))), r"v_cache.shape=\(9, 2, 4, 16\)"),
        (_with(seq_lens=jnp.ones(3, jnp.int32)), r"seq_lens.shape=\(3,\)"),
        (_with(query_start_loc=jnp.ones(2, jnp.int32)), r"query_start_loc.shape=\(2,\)"),
        (_with(block_tables=jnp.ones((2, 2))), "metadata.block_tables.dtype=float32"),
        (_with(max_query_len=0), "metadata.max_query_len=0"),
        (_with(min_query_len=0), "metadata.min_query_len=0 must be from 1 to max_query_len=1"),
        (_with(min_query_len=2), "metadata.min_query_len=2 must be from 1 to max_query_len=1"),
        (_with(scale=float("nan")), "scale=nan"),
        (_with(sliding_window=0), "sliding_window=0"),
        (_with(logits_soft_cap=-1.0), "logits_soft_cap=-1.0"),
        (_with(alibi_slopes=jnp.ones(2)), r"alibi_slopes is float32\[2\].*float32\[4\]"),
        (_with(sinks=jnp.ones(4, jnp.bfloat16)), r"sinks is bfloat16\[4\]"),
        (
            _with(implementation="cuda"),
            "'cuda' is unknown; use None or one of 'mosaic_gpu', 'numba', 'xla'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments(change, message):
    arguments = build(AttentionSpec("valid", (5, 3)))
    arguments, options = change(arguments, {})
    with pytest.raises(ValueError, match=message):
        paged_attention(*arguments.arrays, **options)


def test_the_kernels_refuse_values_of_another_width_than_the_keys():
    q = jax.ShapeDtypeStruct((1, 4, 128), jnp.bfloat16)
    k_cache, v_cache = (jax.ShapeDtypeStruct((9, 2, 16, n), jnp.bfloat16) for n in (128, 64))
    with jax.default_device(target_device("h100")):
        assert attention_implementation(None, q, k_cache) == "mosaic_gpu"
        assert attention_implementation(None, q, k_cache, v_cache) == "xla"
        with pytest.raises(
            NotImplementedError, match="head_dim=128 of the keys is not the values' 64"
        ):
            attention_implementation("mosaic_gpu", q, k_cache, v_cache)


@pytest.mark.usefixtures("unchecked_types")
def test_caches_of_two_dtypes():
    arguments = build(AttentionSpec("valid", (5, 3)))
    arguments = arguments._replace(v_cache=arguments.v_cache.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"k_cache.dtype=float32 must equal v_cache.dtype=bfloat1"):
        paged_attention(*arguments.arrays)


def test_deterministic_does_not_depend_on_what_else_is_in_the_call() -> None:
    """A token's result is the same, bit for bit, in a long chunk, a short one, and as a decode."""
    T, S, num_blocks = 64, 8, 40
    rng = np.random.default_rng(0)
    length = 41
    q_all = rng.standard_normal((length, 6, 64), np.float32)
    k_cache, v_cache = rng.standard_normal((2, num_blocks, 2, S, 64), np.float32)
    tables = rng.permutation(np.arange(1, 37)).reshape(3, 12).astype(np.int32)

    def last_row(new: int, first: int, others: tuple[int, ...]) -> np.ndarray:
        """The result of the sequence's last token, `new` of whose tokens are in the call."""
        query_lens = np.array([first, new, *others], np.int32)
        starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        q = rng.standard_normal((T, 6, 64), np.float32)
        q[starts[1] : starts[2]] = q_all[length - new :]
        seq_lens = np.array([max(first, 50), length, *(max(n, 7) for n in others)], np.int32)
        metadata = AttentionMetadata(
            positions=jnp.zeros(T, jnp.int32),
            slot_mapping=jnp.zeros(T, jnp.int32),
            block_tables=jnp.asarray(tables),
            seq_lens=jnp.asarray(np.where(query_lens > 0, seq_lens, 0).astype(np.int32)),
            query_start_loc=jnp.asarray(starts),
            max_query_len=T,
        )
        out = paged_attention(
            jnp.asarray(q), jnp.asarray(k_cache), jnp.asarray(v_cache), metadata, deterministic=True
        )
        return np.asarray(out)[starts[2] - 1]

    whole = last_row(length, 0, (0,))
    for new, first, others in [(1, 0, (0,)), (1, 30, (1,)), (2, 1, (9,)), (17, 20, (20,))]:
        np.testing.assert_array_equal(last_row(new, first, others), whole)


def test_metadata_of_a_decode_step():
    """What `build` makes step by step, padding rows included."""
    expected = build(AttentionSpec("decode", (5, 8, 1, 17), num_rows=6, num_tokens=6)).metadata
    made = AttentionMetadata.for_decode(expected.block_tables, expected.seq_lens, 8)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(made, name), value, err_msg=name)
