"""A prefix that is read for several sequences at a time: the results of one for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import SharedPrefix, paged_attention
from tests.kernels.interpreting import build_poisoned
from tests.kernels.one_program import attend
from tests.kernels.test_attention import assert_close

DECODE = AttentionSpec(
    "decode", (33, 25, 5, 70, 24 + 1, 40, 31, 26, 60, 50, 49), num_shared_blocks=3
)
MIXED = AttentionSpec("mixed", (60, 33, 7, 70, 30), (20, 1, 7, 0, 6), num_shared_blocks=3)


def with_prefix(arguments, num_blocks, is_shared, width=None):
    """Returns arguments that say which blocks some sequences begin with."""
    tables = np.asarray(arguments.metadata.block_tables)
    row = int(np.flatnonzero(is_shared)[0]) if np.any(is_shared) else 0
    flags = np.zeros(len(tables), bool)
    flags[: len(is_shared)] = is_shared
    prefix = SharedPrefix(
        jnp.asarray(tables[row, :width]), jnp.int32(num_blocks), jnp.asarray(flags)
    )
    metadata = dataclasses.replace(arguments.metadata, shared_prefix=prefix)
    return arguments._replace(metadata=metadata)


def sharing(spec):
    """Returns which sequences begin with the shared blocks and have no query inside of them."""
    least = spec.num_shared_blocks * spec.block_size
    pairs = zip(spec.seq_lens, spec.lens_of_queries, strict=True)
    return [length - queries >= least for length, queries in pairs]


def check(arguments, implementation, num_blocks, is_shared, tolerance, lse_tolerance=1e-5):
    expected, expected_lse = attend(arguments, "reference")
    out, lse = attend(with_prefix(arguments, num_blocks, is_shared), implementation)
    assert out.dtype == expected.dtype
    assert np.isfinite(np.asarray(expected, np.float32)).all()
    assert_close(out, expected, tolerance)
    assert_close(lse, expected_lse, lse_tolerance)


ALL = {"logits_soft_cap": 2.0, "alibi": True, "sinks": True, "scale": 0.4}


@pytest.mark.parametrize("implementation", ["reference", "xla", "numba"])
@pytest.mark.parametrize(
    "spec",
    [
        DECODE,
        dataclasses.replace(DECODE, name="all options", num_q_heads=6, **ALL),
        dataclasses.replace(DECODE, name="int8", cache_dtype="int8", head_dim=32),
        MIXED,
        dataclasses.replace(MIXED, name="mixed, all options", **ALL),
    ],
    ids=lambda spec: spec.name,
)
def test_equals_the_reference(implementation, spec):
    check(build(spec), implementation, spec.num_shared_blocks, sharing(spec), 1e-5)


def test_sequences_that_do_not_share_get_the_same_bits():
    arguments = build(DECODE)
    is_shared = [row % 2 == 0 and share for row, share in enumerate(sharing(DECODE))]
    check(arguments, "xla", 3, is_shared, 1e-5)
    others = ~np.array(is_shared)
    plain, cascaded = (
        paged_attention(*some.arrays, **some.options, implementation="xla")[: len(others)][others]
        for some in (arguments, with_prefix(arguments, 3, is_shared))
    )
    np.testing.assert_array_equal(plain, cascaded)


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_a_part_of_what_they_share(num_blocks):
    arguments = build(DECODE)
    check(arguments, "xla", num_blocks, sharing(DECODE), 1e-5)
    narrow = with_prefix(arguments, num_blocks, sharing(DECODE), width=3)
    wide = with_prefix(arguments, num_blocks, sharing(DECODE))
    found = [paged_attention(*some.arrays, implementation="xla") for some in (narrow, wide)]
    np.testing.assert_array_equal(*found)


def test_nobody_shares():
    arguments = build(DECODE)
    check(arguments, "xla", 3, [False] * len(DECODE.seq_lens), 1e-5)


def test_the_prefix_is_read_from_its_own_table():
    """And not from the sequences' tables, where nothing of it has to be."""
    arguments = with_prefix(build(DECODE), 3, sharing(DECODE))
    tables = np.array(arguments.metadata.block_tables)
    tables[: len(DECODE.seq_lens)][sharing(DECODE), :3] = 0  # NaN
    gone = dataclasses.replace(arguments.metadata, block_tables=jnp.asarray(tables))
    for implementation in ("xla", "numba"):
        found = [
            paged_attention(
                *arguments._replace(metadata=metadata).arrays, implementation=implementation
            )
            for metadata in (arguments.metadata, gone)
        ]
        np.testing.assert_array_equal(*found)


def test_a_window_leaves_it_to_the_block_tables():
    spec = dataclasses.replace(DECODE, sliding_window=9)
    arguments = build_poisoned(spec)
    plain, cascaded = (
        paged_attention(*some.arrays, **arguments.options, implementation="xla")
        for some in (arguments, with_prefix(arguments, 3, sharing(spec)))
    )
    np.testing.assert_array_equal(plain, cascaded)


def test_wrong_numbers_harm_nobody_else():
    """Of a sequence too short for the prefix, and blocks outside of the cache."""
    arguments = build(DECODE)
    everyone = [True] * len(DECODE.seq_lens)  # one has 5 tokens, and the prefix 24
    found = paged_attention(*with_prefix(arguments, 3, everyone).arrays, implementation="xla")
    expected = paged_attention(*arguments.arrays, implementation="reference")
    assert_close(found, expected, 1e-5)
    metadata = with_prefix(arguments, 99, sharing(DECODE)).metadata
    prefix = metadata.shared_prefix
    wild = prefix._replace(block_table=prefix.block_table.at[1:].set(10**6))
    wild_metadata = dataclasses.replace(metadata, shared_prefix=wild)
    found = paged_attention(*arguments._replace(metadata=wild_metadata).arrays)
    assert np.isfinite(found[2]).all()
    assert_close(found[2], expected[2], 1e-5)


def test_how_many_share_is_no_shape():
    arguments = build(DECODE)
    run = jax.jit(lambda *arrays: paged_attention(*arrays, implementation="xla"))
    for num_blocks, count in ((3, 11), (2, 4), (1, 0)):
        is_shared = [share and row < count for row, share in enumerate(sharing(DECODE))]
        some = with_prefix(arguments, num_blocks, is_shared)
        assert_close(run(*some.arrays), paged_attention(*arguments.arrays), 1e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_table": jnp.zeros((1, 4), jnp.int32)}, r"block_table.shape=\(1, 4\)"),
        ({"num_blocks": jnp.zeros(1, jnp.int32)}, r"num_blocks.shape=\(1,\)"),
        ({"is_shared": jnp.zeros(3, bool)}, r"is_shared.shape=\(3,\)"),
        ({"is_shared": jnp.zeros(16, jnp.int32)}, "is_shared.dtype=int32 must be bool"),
        ({"block_table": jnp.zeros(4, jnp.uint32)}, "block_table.dtype=uint32 must be int32"),
    ],
)
def test_refusals(fields, message):
    arguments = with_prefix(build(DECODE), 3, sharing(DECODE))
    prefix = arguments.metadata.shared_prefix._replace(**fields)
    metadata = dataclasses.replace(arguments.metadata, shared_prefix=prefix)
    with pytest.raises(ValueError, match=message):
        paged_attention(*arguments._replace(metadata=metadata).arrays)


def test_refused_where_results_may_depend_on_nobody_else():
    arguments = with_prefix(build(DECODE), 3, sharing(DECODE))
    with pytest.raises(ValueError, match="deterministic=True"):
        paged_attention(*arguments.arrays, deterministic=True)
