"""Numbers of blocks, slots and rows that do not exist: negative ones never count from the end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import (
    AttentionMetadata,
    KVCache,
    copy_blocks,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)
from pallas_paged import block_tables as bt
from pallas_paged.dispatch import interpret_kernels

N, S, HK, D = 6, 16, 2, 64
OUTSIDE = (-1, -N, N, 2**31 - 1, -(2**31))
SLOTS_OUTSIDE = (-1, -N * S, N * S, 2**31 - 1, -(2**31))


@pytest.fixture(params=["reference", "xla", "mosaic_gpu"])
def implementation(request):
    """Names an implementation; kernels are interpreted."""
    if request.param != "mosaic_gpu":
        yield request.param
        return
    with interpret_kernels():
        yield request.param
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def ints(*values):
    return jnp.array(values, jnp.int32)


def make_cache():
    rng = np.random.default_rng(0)
    return KVCache(*(jnp.asarray(rng.standard_normal((N, HK, S, D), np.float32)) for _ in range(2)))


def assert_blocks(cache, expected):
    """Whatever the null block holds."""
    for array, other in zip(jax.tree.leaves(cache), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(array)[1:], other[1:])


def test_a_token_without_a_slot_is_dropped(implementation):
    slots = ints(S, *SLOTS_OUTSIDE, S + 1)
    k, v = np.random.default_rng(1).standard_normal((2, len(slots), HK, D), np.float32)
    expected = [np.array(array) for array in make_cache()[:2]]
    for array, new in zip(expected, (k, v), strict=True):
        array[1, :, :2] = new[[0, -1]].swapaxes(0, 1)
    arrays = jnp.asarray(k), jnp.asarray(v), make_cache(), slots
    assert_blocks(write_kv(*arrays, implementation=implementation), expected)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_blocks_that_do_not_exist_are_not_copied(outside):
    expected = [np.array(array) for array in make_cache()[:2]]
    for array in expected:
        array[3] = array[2]
    src, dst = ints(2, 1, outside), ints(3, outside, 4)
    for implementation in ("reference", "xla"):
        copied = copy_blocks(make_cache(), src, dst, implementation=implementation)
        assert_blocks(copied, expected)


def test_blocks_that_do_not_exist_are_null_blocks_to_every_copy(implementation):
    cache = make_cache()
    expected = [np.array(array) for array in cache[:2]]
    ids = ints(2, *OUTSIDE)
    blocks = gather_blocks(cache, ids, implementation=implementation)
    for array, other in zip(blocks[:2], expected, strict=True):
        np.testing.assert_array_equal(array, other[[2] + [0] * len(OUTSIDE)])
    doubled = jax.tree.map(lambda array: 2 * array, blocks)
    for array in expected:
        array[2] *= 2
    cache = scatter_blocks(cache, ids, doubled, implementation=implementation)
    assert_blocks(cache, expected)
    for array in expected:
        array[3] = array[1]
    src, dst = ints(1, 1, -1, N), ints(3, -1, 4, 4)
    assert_blocks(copy_blocks(cache, src, dst, implementation=implementation), expected)


DECODE = AttentionSpec(
    "decode", (20, 33, 17), num_q_heads=4, head_dim=D, block_size=S, dtype="bfloat16"
)
MIXED = dataclasses.replace(DECODE, name="mixed", query_lens=(1, 9, 3))


compiled = jax.jit(paged_attention, static_argnames=("implementation", "return_lse"))


def attend(arguments, implementation, **changes):
    arrays = (arguments.q, arguments.k_cache, arguments.v_cache)
    changes = {name: jnp.asarray(value, jnp.int32) for name, value in changes.items()}
    metadata = dataclasses.replace(arguments.metadata, **changes)
    out, lse = compiled(*arrays, metadata, return_lse=True, implementation=implementation)
    return np.asarray(out, np.float32), np.asarray(lse)


@pytest.mark.parametrize("outside", [-1, 10**6, -(2**31)])
@pytest.mark.parametrize("spec", [DECODE, MIXED], ids=["decode", "mixed"])
def test_table_entries_that_are_no_block_are_the_null_block(spec, outside):
    arguments = build(spec)
    caches = {name: getattr(arguments, name).at[0].set(0.5) for name in ("k_cache", "v_cache")}
    arguments = arguments._replace(**caches)
    tables = np.array(arguments.metadata.block_tables)
    tables[0, 0] = 0  # in the sequence
    wrong = np.where(tables == 0, outside, tables)
    for implementation in ("reference", "xla", "numba"):
        expected = attend(arguments, implementation, block_tables=tables)
        found = attend(arguments, implementation, block_tables=wrong)
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("length", [-1, 0, 10**6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("spec", [DECODE, MIXED], ids=["decode", "mixed"])
def test_a_wrong_length_is_its_own_sequence_s_loss(spec, length):
    arguments = build(spec)
    lens = np.array(arguments.metadata.seq_lens)
    lens[1] = length
    first, last = np.array(arguments.metadata.query_start_loc)[1:3]
    for implementation in ("reference", "xla", "numba"):
        expected = attend(arguments, implementation)
        found = attend(arguments, implementation, seq_lens=lens)
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array[:first], other[:first])
            np.testing.assert_array_equal(array[last:], other[last:])


def test_queries_behind_the_last_token_do_not_exist():
    arguments = build(MIXED)
    starts = np.array(arguments.metadata.query_start_loc)
    for implementation in ("reference", "xla", "numba"):
        expected = attend(arguments, implementation)
        found = attend(arguments, implementation, query_start_loc=[*starts[:3], 10**6, 10**6])
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array[: starts[2]], other[: starts[2]])
        below = attend(arguments, implementation, query_start_loc=[-5, *starts[1:]])
        for array, other in zip(below, expected, strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_decode_step_s_token_without_a_place_has_no_slot():
    tables = ints([2, 3], [-1, 4], [2**28 + 1, 0], [5, -1], [5, 1])
    made = AttentionMetadata.for_decode(tables, ints(17, 1, 1, 33, 2**31 - 1), S)
    np.testing.assert_array_equal(made.slot_mapping, [3 * S, 0, 0, 0, 0])


@pytest.mark.usefixtures("unchecked_types")
def test_a_decode_step_of_block_tables_on_the_host():
    state, _ = bt.append(bt.create(10, 3, 4, S), np.array([17, 1, 0], np.int32))
    made = AttentionMetadata.for_decode(state.tables, state.seq_lens, S)
    np.testing.assert_array_equal(made.slot_mapping, [2 * S, 3 * S, 0])


# ---- block tables ------------------------------------------------------------------------------

WRONG_ROWS, WRONG_BLOCKS = (-1, -3, 3, 2**31 - 1), (-1, -9, 10, 2**31 - 1)


def used_tables(xp):
    """Three rows: two full blocks and one token, one full block, nothing; block 1 is held."""
    state = bt.create(10, 3, 4, 4, xp)
    state, _ = bt.append(state, xp.array([9, 4, 0], np.int32))
    return bt.hold(state, xp.array([1], np.int32))


def calls(row, block):
    """By verb the arguments that name such a row or block, beside some that exist."""
    return [
        ("fork", ([row], [2])),
        ("fork", ([0], [row])),
        ("share", ([row], [[1, 2]])),
        ("share", ([2], [[1, block]])),
        ("hold", ([block],)),
        ("release", ([block],)),
        ("replace", ([block], [1])),
        ("replace", ([4], [block])),
    ]


@pytest.mark.parametrize("index", range(4))
def test_rows_and_blocks_that_do_not_exist(index):
    """Refused by value in NumPy, padding in jax."""
    row, block = WRONG_ROWS[index], WRONG_BLOCKS[index]
    for verb, args in calls(row, block):
        for wide in (np.int32, np.int64):
            with pytest.raises(ValueError, match=rf"\]=({row}|{block}) must be between 0 and"):
                getattr(bt, verb)(used_tables(np), *(np.array(arg, wide) for arg in args))
        state = used_tables(jnp)
        found = jax.jit(getattr(bt, verb))(state, *(jnp.array(arg, jnp.int32) for arg in args))
        bt.check_invariants(found, held=[1])
        for name in ("tables", "seq_lens", "ref_counts", "num_free"):
            np.testing.assert_array_equal(
                getattr(found, name), getattr(state, name), err_msg=f"{verb}{args}: {name}"
            )


def test_what_exists_beside_them_is_done():
    state = used_tables(jnp)
    forked = jax.jit(bt.fork)(state, ints(-1, 1), ints(2, 2))
    np.testing.assert_array_equal(forked.seq_lens, [9, 4, 4])
    held = jax.jit(bt.hold)(state, ints(-1, 4, 10))
    np.testing.assert_array_equal(held.ref_counts - state.ref_counts, np.eye(10, dtype=int)[4])
    released = jax.jit(bt.release)(held, ints(-9, 4, 2**31 - 1))
    np.testing.assert_array_equal(released.ref_counts, state.ref_counts)
    replaced = jax.jit(bt.replace)(state, ints(4, -1), ints(1, 1))
    np.testing.assert_array_equal(replaced.tables[1], [1, 0, 0, 0])
    bt.check_invariants(replaced, held=[1])


def test_slots_of_rows_and_positions_that_do_not_exist():
    state = used_tables(np)
    for rows, positions in (([-1], [0]), ([3], [0]), ([0], [-1]), ([0], [16])):
        with pytest.raises(ValueError, match=r"(rows|positions)\[0\]=(-1|3|16) must be between"):
            bt.slot_mapping(state, np.array(rows), np.array(positions))
    slots = jax.jit(bt.slot_mapping)(used_tables(jnp), ints(-1, 3, 0, 0, 0), ints(0, 0, -1, 16, 5))
    np.testing.assert_array_equal(slots, [0, 0, 0, 0, 2 * 4 + 1])


def test_numbers_too_large_for_int32_are_looked_at_before_they_are_cast():
    state = used_tables(np)
    with pytest.raises(ValueError, match=r"blocks\[0\]=4294967297 must be between 0 and 9"):
        bt.hold(state, np.array([2**32 + 1]))
    _, result = bt.append(state, np.array([0, 0, 2**32 + 1]))
    assert not result.ok
    with pytest.raises(ValueError, match=r"num_new\[0\]=-2147483648 must be 0 or more"):
        bt.append(state, np.array([-(2**32), 0, 0]))
    with pytest.raises(ValueError, match=r"new_lens\[0\]=2147483647 must be between 0 and"):
        bt.truncate(state, np.array([2**32 + 9, 4, 0]))
    needed = jax.jit(bt.num_blocks_needed)(used_tables(jnp), ints(-9, 1, 0))
    assert needed == 1


@pytest.mark.usefixtures("unchecked_types")
def test_masks_are_no_numbers_and_numbers_no_masks():
    for xp in (np, jnp):
        state = used_tables(xp)
        with pytest.raises(ValueError, match=r"rows is int32; it needs bool, a mask of all rows"):
            bt.free(state, xp.array([0, 1, 2], np.int32))
        with pytest.raises(ValueError, match=r"blocks is bool\[2\], must be integers"):
            bt.hold(state, xp.array([True, False]))
        with pytest.raises(ValueError, match=r"num_new is float32\[3\], must be integers"):
            bt.append(state, xp.array([1, 0, 0], np.float32))
