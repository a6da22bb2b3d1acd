"""What each function of `block_tables` does, one small case at a time, in both namespaces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import block_tables as bt

S = 4
_SHARED = (
    "admit",
    "append",
    "drop_front",
    "fork",
    "free",
    "share",
    "hold",
    "release",
    "replace",
    "truncate",
    "slot_mapping",
)


class _Namespace:
    """The functions under test with Python lists for arguments, eager in NumPy, jitted in jax."""

    def __init__(self, xp):
        self.xp = xp
        self._functions = {
            name: getattr(bt, name) if xp is np else jax.jit(getattr(bt, name))
            for name in (*_SHARED, "num_blocks_needed")
        }

    def create(self, num_blocks=10, max_num_seqs=3, max_blocks_per_seq=4, block_size=S):
        return bt.create(num_blocks, max_num_seqs, max_blocks_per_seq, block_size, self.xp)

    def __getattr__(self, name):
        def call(state, *args):
            args = (np.asarray(arg) for arg in args)
            args = (arg if arg.dtype == bool else arg.astype(np.int32) for arg in args)
            return self._functions[name](state, *map(self.xp.asarray, args))

        return call


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"])
def tables(request):
    return _Namespace(request.param)


def _equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


def test_a_new_state_has_all_blocks_free_but_the_null_block(tables):
    state = tables.create(num_blocks=10)
    assert state.num_free == 9
    assert bt.blocks_in_use(state) == 0
    bt.check_invariants(state)
    assert all(
        isinstance(leaf, tables.create().tables.__class__) for leaf in jax.tree.leaves(state)
    )


def test_append_takes_a_block_where_the_last_one_is_full(tables):
    state, result = tables.append(tables.create(), [S + 1, 0, S])
    assert result.ok
    np.testing.assert_array_equal(state.tables, [[1, 2, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]])
    np.testing.assert_array_equal(state.seq_lens, [S + 1, 0, S])
    state, _ = tables.append(state, [S - 1, 0, 1])
    np.testing.assert_array_equal(state.tables, [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 0, 0]])
    assert bt.blocks_in_use(state) == 4
    bt.check_invariants(state)


def test_append_is_all_or_nothing(tables):
    state, _ = tables.append(tables.create(num_blocks=4), [S, S, 0])
    for num_new in ([1, 1, 0], [3 * S + 1, 0, 0], [0, 0, 2**31 - 1]):
        unchanged, result = tables.append(state, num_new)
        assert not result.ok
        assert _equal(unchanged, state)
        assert not np.any(result.copy_src)
        assert not np.any(result.copy_dst)
    state, result = tables.append(state, [0, 1, 0])
    assert result.ok
    assert state.num_free == 0
    state, result = tables.append(state, [0, S - 1, 0])  # fits the last block
    assert result.ok
    bt.check_invariants(state)


def test_num_blocks_needed_counts_new_blocks_and_copies(tables):
    state, _ = tables.append(tables.create(), [S + 1, 0, 0])
    assert tables.num_blocks_needed(state, [1, 0, 0]) == 0
    assert tables.num_blocks_needed(state, [S, 2 * S + 1, 0]) == 1 + 3
    state = tables.fork(state, [0], [1])
    assert tables.num_blocks_needed(state, [1, 0, 0]) == 1
    assert tables.num_blocks_needed(state, [S, 0, 0]) == 2


def test_forked_rows_share_blocks_until_one_of_them_writes(tables):
    state, _ = tables.append(tables.create(), [S + 1, 0, 0])
    state = tables.fork(state, [0, 0], [1, 2])
    np.testing.assert_array_equal(state.tables, [[1, 2, 0, 0]] * 3)
    np.testing.assert_array_equal(state.seq_lens, [S + 1] * 3)
    assert state.ref_counts[1] == state.ref_counts[2] == 3
    assert bt.blocks_in_use(state) == 2

    state, result = tables.append(state, [0, 1, 0])
    np.testing.assert_array_equal(state.tables, [[1, 2, 0, 0], [1, 3, 0, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(result.copy_src, [0, 2, 0])
    np.testing.assert_array_equal(result.copy_dst, [0, 3, 0])
    bt.check_invariants(state)


def test_the_last_of_all_rows_that_append_to_a_block_writes_in_place(tables):
    state, _ = tables.append(tables.create(), [S + 1, 0, 0])
    state = tables.fork(state, [0, 0], [1, 2])
    state, result = tables.append(state, [1, S, 1])
    np.testing.assert_array_equal(result.copy_src, [2, 2, 0])
    np.testing.assert_array_equal(result.copy_dst, [3, 4, 0])
    np.testing.assert_array_equal(state.tables, [[1, 3, 0, 0], [1, 4, 5, 0], [1, 2, 0, 0]])
    bt.check_invariants(state)


def test_every_row_copies_a_block_that_is_held(tables):
    state, _ = tables.append(tables.create(), [1, 0, 0])
    state = tables.fork(tables.hold(state, [1]), [0], [1])
    state, result = tables.append(state, [1, 1, 0])
    np.testing.assert_array_equal(result.copy_src, [1, 1, 0])
    assert state.ref_counts[1] == 1
    bt.check_invariants(state, held=[1])


def test_a_full_shared_block_is_never_copied(tables):
    state, _ = tables.append(tables.create(), [S, 0, 0])
    state, result = tables.append(tables.fork(state, [0], [1]), [1, 1, 0])
    assert not np.any(result.copy_dst)
    np.testing.assert_array_equal(state.tables[:, :2], [[1, 2], [1, 3], [0, 0]])


def test_replaced_blocks_are_free_unless_they_are_held(tables):
    state, _ = tables.append(tables.create(), [2 * S, S, 2 * S + 1])  # 1 2, 3, 4 5 6
    state = tables.hold(state, [3])
    replaced = tables.replace(state, [3, 4, 0], [1, 1, 0])
    np.testing.assert_array_equal(replaced.tables, [[1, 2, 0, 0], [1, 0, 0, 0], [1, 5, 6, 0]])
    np.testing.assert_array_equal(replaced.ref_counts[1:5], [3, 1, 1, 0])
    assert replaced.num_free == state.num_free + 1
    np.testing.assert_array_equal(replaced.seq_lens, state.seq_lens)
    bt.check_invariants(replaced, held=[3])
    assert _equal(tables.replace(state, [0, 0], [0, 0]), state)
    replaced = tables.replace(tables.fork(replaced, [1], [1]), [1], [5])  # all rows at once
    assert replaced.ref_counts[1] == 0


def test_fork_ignores_pairs_of_a_row_with_itself(tables):
    state, _ = tables.append(tables.create(), [0, 1, 0])
    padded = tables.fork(state, [1, 0, 1, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(padded.seq_lens, [1, 1, 0])
    assert padded.ref_counts[1] == 2
    bt.check_invariants(padded)


def test_free_returns_blocks_that_nobody_else_has(tables):
    state, _ = tables.append(tables.create(), [S + 1, 0, S])
    state = tables.fork(state, [0], [1])
    state = tables.free(state, [True, False, True])
    np.testing.assert_array_equal(state.tables, [[0] * 4, [1, 2, 0, 0], [0] * 4])
    np.testing.assert_array_equal(state.seq_lens, [0, S + 1, 0])
    assert bt.blocks_in_use(state) == 2
    state = tables.free(state, [False, True, False])
    assert bt.blocks_in_use(state) == 0
    bt.check_invariants(state)


def test_truncate_gives_up_the_blocks_past_the_new_length(tables):
    state, _ = tables.append(tables.create(), [2 * S + 1, S, 0])
    state = tables.truncate(state, [S, 1, 0])
    np.testing.assert_array_equal(state.tables[:, :3], [[1, 0, 0], [4, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(state.seq_lens, [S, 1, 0])
    assert state.num_free == 7
    bt.check_invariants(state)


def test_appending_after_truncating_into_a_shared_block_copies_it(tables):
    state, _ = tables.append(tables.create(), [S, 0, 0])
    state = tables.truncate(tables.fork(state, [0], [1]), [S, 1, 0])
    state, result = tables.append(state, [0, 1, 0])
    np.testing.assert_array_equal(result.copy_src, [0, 1, 0])
    np.testing.assert_array_equal(state.tables[:2, :1], [[1], [2]])
    bt.check_invariants(state)


def test_dropped_blocks_become_free_and_the_others_keep_their_places(tables):
    state, _ = tables.append(tables.create(), [2 * S + 1, 0, 0])  # blocks 1, 2, 3
    state = tables.fork(state, [0], [1])
    state = tables.drop_front(state, [1, 0, 0])
    np.testing.assert_array_equal(state.tables[:2], [[0, 2, 3, 0], [1, 2, 3, 0]])
    assert state.num_free == 6  # the fork has block 1 still
    state = tables.drop_front(state, [2, 2, 0])
    np.testing.assert_array_equal(state.tables[:2], [[0, 0, 3, 0]] * 2)
    np.testing.assert_array_equal(state.seq_lens, [2 * S + 1, 2 * S + 1, 0])
    assert bt.blocks_in_use(state) == 1
    bt.check_invariants(state)

    state, result = tables.append(state, [S, 1, 0])
    assert result.ok
    np.testing.assert_array_equal(state.tables[:2], [[0, 0, 2, 1], [0, 0, 3, 0]])
    np.testing.assert_array_equal(result.copy_src, [3, 0, 0])
    state = tables.fork(state, [0], [2])
    np.testing.assert_array_equal(state.tables[2], [0, 0, 2, 1])
    state = tables.truncate(state, [2 * S + 1, 2 * S, 3 * S])  # row 1 ends where nothing is left
    np.testing.assert_array_equal(state.tables, [[0, 0, 2, 0], [0] * 4, [0, 0, 2, 0]])
    bt.check_invariants(state)
    state = tables.free(state, [True, True, True])
    assert bt.blocks_in_use(state) == 0


def test_a_row_begins_where_another_one_has_dropped_blocks(tables):
    state, _ = tables.append(tables.create(), [3 * S, 0, 0])
    state = tables.share(state, [2], [[0, 0, 3]])
    np.testing.assert_array_equal(state.tables[2], [0, 0, 3, 0])
    assert state.seq_lens[2] == 3 * S
    bt.check_invariants(state)


def test_a_dropped_block_is_a_full_one():
    state, _ = bt.append(bt.create(10, 3, 4, S), np.array([S + 1, 0, 0]))
    wrong = dataclasses.replace(state, tables=np.zeros_like(state.tables))
    with pytest.raises(AssertionError, match=r"rows \[0\]"):
        bt.check_invariants(wrong)


def test_held_blocks_outlive_their_sequence_and_begin_another(tables):
    state, _ = tables.append(tables.create(), [2 * S + 1, 0, 0])
    state = tables.hold(state, [1, 2, 0, 0])
    state = tables.free(state, [True, False, False])
    assert bt.blocks_in_use(state) == 2
    bt.check_invariants(state, held=[1, 2])

    state = tables.share(state, [2, 1, 0], [[1, 2, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(state.tables, [[0] * 4, [1, 0, 0, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(state.seq_lens, [0, S, 2 * S])
    bt.check_invariants(state, held=[1, 2])

    state = tables.release(state, [0, 1, 2])
    assert bt.blocks_in_use(state) == 2
    state = tables.free(state, [False, True, True])
    assert bt.blocks_in_use(state) == 0
    bt.check_invariants(state)


def test_slots_follow_the_table_and_padding_lies_in_the_null_block(tables):
    state, _ = tables.append(tables.create(), [S, S + 2, 0])  # blocks 1; 2, 3
    slots = tables.slot_mapping(state, [0, 1, 1, 2, 1], [3, S - 1, S + 1, 2, 2 * S])
    np.testing.assert_array_equal(slots, [1 * S + 3, 2 * S + 3, 3 * S + 1, 2, 0])


def test_numpy_takes_any_integer_type_and_states_stay_int32():
    state, result = bt.append(bt.create(10, 3, 4, S), np.array([5, 0, 0]))
    state = bt.fork(state, np.array([0]), np.array([1]))
    state = bt.share(bt.hold(state, np.array([1])), np.array([2]), np.array([[1]]))
    state = bt.truncate(bt.release(state, np.array([1])), np.array([4, 5, 4]))
    state = bt.free(state, np.array([True, False, False]))
    bt.check_invariants(state)  # looks at the dtypes
    assert result.copy_src.dtype == result.copy_dst.dtype == np.int32
    assert bt.slot_mapping(state, np.array([1]), np.array([4])).dtype == np.int32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: bt.append(s, np.array([0, -1, 0])), r"num_new\[1\]=-1 must be 0 or more"),
        (lambda s: bt.append(s, np.array([1])), r"num_new has shape \(1,\)"),
        (lambda s: bt.truncate(s, np.array([6, 0, 0])), r"new_lens\[0\]=6 must be between 0 and"),
        (lambda s: bt.free(s, np.array([True, False, True])), r"rows\[2\]=True is an empty row"),
        (lambda s: bt.fork(s, np.array([0]), np.array([1])), r"children\[0\]=1 is not empty"),
        (lambda s: bt.fork(s, np.array([2]), np.array([1])), r"children\[0\]=1 is not empty"),
        (lambda s: bt.fork(s, np.array([2]), np.array([3])), r"children\[0\]=3 must be between"),
        (
            lambda s: bt.fork(s, np.array([0, 1]), np.array([2, 2])),
            r"children repeat \[2\]; name each",
        ),
        (lambda s: bt.share(s, np.array([0]), np.array([[1]])), r"rows\[0\]=0 is not empty"),
        (lambda s: bt.share(s, np.array([2]), np.array([[9]])), r"blocks\[\[0, 0\]\]=9 has no ref"),
        (
            lambda s: bt.share(s, np.array([2]), np.array([[1, 0, 2]])),
            r"blocks\[\[0, 1\]\]=0 stands between blocks",
        ),
        (
            lambda s: bt.drop_front(s, np.array([2, 0, 0])),
            r"num_blocks\[0\]=2 must be between 0 and the row's full blocks",
        ),
        (lambda s: bt.drop_front(s, np.array([-1, 0, 0])), r"num_blocks\[0\]=-1 must be between"),
        (
            lambda s: bt.truncate(bt.drop_front(s, np.array([1, 0, 0])), np.array([3, 1, 0])),
            r"new_lens\[0\]=3 ends inside a block that the row has dropped",
        ),
        (
            lambda s: bt.share(s, np.array([2, 2]), np.array([[1], [2]])),
            r"rows repeat \[2\]; name each",
        ),
        (lambda s: bt.share(s, np.array([2]), np.ones((1, 5), int)), r"blocks has 5 columns"),
        (
            lambda s: bt.share(s, np.array([2]), np.array([[1, 1]])),
            r"blocks repeat \[1\]; name each",
        ),
        (lambda s: bt.hold(s, np.array([0, 7])), r"blocks\[1\]=7 has no references"),
        (lambda s: bt.hold(s, np.array([10])), r"blocks\[0\]=10 must be between 0 and 9"),
        (lambda s: bt.release(s, np.array([1, 1])), r"blocks\[0\]=1, blocks\[1\]=1 is released"),
        (lambda s: bt.replace(s, np.array([1]), np.array([7])), r"new\[0\]=7 has no references"),
        (lambda s: bt.replace(s, np.array([1, 2]), np.array([2, 3])), r"new\[0\]=2 is replaced"),
        (lambda s: bt.replace(s, np.array([1, 1]), np.array([3, 3])), r"old repeat \[1\]"),
    ],
)
def test_mistakes_raise_with_the_values_in_numpy(call, message):
    state, _ = bt.append(bt.create(10, 3, 4, S), np.array([5, 1, 0]))
    with pytest.raises(ValueError, match=message):
        call(state)


@pytest.mark.parametrize("sizes", [(1, 3, 4, S), (10, 0, 4, S), (10, 3, 0, S), (10, 3, 4, 0)])
def test_create_refuses_sizes_without_room(sizes):
    with pytest.raises(ValueError, match=r"=[01] must be at least"):
        bt.create(*sizes)


def test_create_refuses_slots_past_int32():
    with pytest.raises(ValueError, match="int32 cannot number"):
        bt.create(2**27, 1, 1, 16)


def test_under_jit_mistakes_leave_the_rows_as_they_are():
    tables = _Namespace(jnp)
    state, _ = tables.append(tables.create(), [5, 1, 0])
    unchanged, result = tables.append(state, [1, -1, 0])
    assert not result.ok
    assert _equal(unchanged, state)
    assert _equal(tables.fork(state, [0], [1]), state)
    assert _equal(tables.share(state, [0], [[3]]), state)
    assert _equal(tables.share(state, [2], [[9]]), state)
    assert _equal(tables.free(state, [False, False, True]), state)
    assert _equal(tables.truncate(state, [6, 9, 1]), state)
    dropped = tables.drop_front(state, [9, 1, -1])  # clipped: one full block of row 0
    np.testing.assert_array_equal(dropped.tables, [[0, 2, 0, 0], [3, 0, 0, 0], [0] * 4])
    assert _equal(tables.truncate(dropped, [3, 1, 0]), dropped)


def test_a_jitted_scan_decodes_through_its_own_block_tables():
    """Each step reads its sequences back from a fake cache and writes one more token to each."""
    num_blocks, R, M, steps = 12, 3, 4, 9
    prompt_lens = jnp.array([3, 0, 4], jnp.int32)  # row 1 is padding
    rows = jnp.arange(R, dtype=jnp.int32)
    every_row, every_position = (x.reshape(-1) for x in jnp.indices((R, M * S), jnp.int32))

    def token(rows, positions):
        return 100 * (rows + 1) + positions

    def read(state, cache):
        slots = bt.slot_mapping(state, every_row, every_position)
        return jnp.where(every_position < state.seq_lens[every_row], cache[slots], 0)

    def step(carry, _):
        state, cache = carry
        state, result = bt.append(state, jnp.minimum(state.seq_lens, 1))
        positions = jnp.maximum(state.seq_lens - 1, 0)
        slots = bt.slot_mapping(state, rows, positions)
        cache = cache.at[slots].set(token(rows, positions))
        return (state, cache), (result.ok, read(state, cache))

    @jax.jit
    def decode(prompt_lens):
        state = bt.create(num_blocks, R, M, S, jnp)
        state, _ = bt.append(state, prompt_lens)
        slots = bt.slot_mapping(state, every_row, every_position)  # past the prompt: null block
        in_prompt = every_position < prompt_lens[every_row]
        prompts = jnp.where(in_prompt, token(every_row, every_position), -1)
        cache = jnp.zeros(num_blocks * S, jnp.int32).at[slots].set(prompts)
        return jax.lax.scan(step, (state, cache), length=steps)

    (state, _), (ok, tokens) = decode(prompt_lens)
    bt.check_invariants(state)
    assert ok.all()
    for i in range(steps):
        for row, prompt_len in enumerate(prompt_lens.tolist()):
            length = prompt_len + i + 1 if prompt_len else 0
            expected = [100 * (row + 1) + p if p < length else 0 for p in range(M * S)]
            assert tokens[i].reshape(R, M * S)[row].tolist() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_free": {(): 5}}, r"num_free=5 \+ num_referenced=3 \+ null != 10"),
        ({"ref_counts": {1: 2}}, r"blocks \[1\]"),
        ({"ref_counts": {9: 1}}, r"blocks \[9\]"),
        ({"tables": {(0, 2): 5}}, r"rows \[0\]"),
        ({"tables": {(0, 1): 0}}, r"rows \[0\]"),
        ({"tables": {(0, 1): 1}}, r"rows \[0\] repeat a block"),
        ({"tables": {(0, 1): 3}}, r"blocks \[3\] are written by several rows"),
        ({"tables": {(0, 0): 3}}, r"blocks \[1 3\]"),
        ({"tables": {(0, 0): 10}}, r"table entries outside 0..9"),
        ({"free_blocks": {0: 1}}, r"blocks \[1\] are free and referenced"),
        ({"free_blocks": {0: 8}}, "a block is free twice"),
        ({"free_blocks": {0: 0}}, "the null block is free"),
    ],
)
def test_check_invariants_finds_a_damaged_state(changes, message):
    state, _ = bt.append(bt.create(10, 3, 4, S), np.array([5, 1, 0]))
    arrays = {name: np.array(getattr(state, name)) for name in changes}
    for name, change in changes.items():
        for index, value in change.items():
            arrays[name][index] = value
    with pytest.raises(AssertionError, match=message):
        bt.check_invariants(dataclasses.replace(state, **arrays))


def test_check_invariants_finds_a_holder_that_has_no_reference():
    state, _ = bt.append(bt.create(10, 3, 4, S), np.array([5, 1, 0]))
    with pytest.raises(AssertionError, match=r"blocks \[3\]: ref_counts\[wrong\]=array\(\[1\]"):
        bt.check_invariants(state, held=[3])
    with pytest.raises(AssertionError, match=r"holders outside 0..9: \[10\]"):
        bt.check_invariants(state, held=[10])


def test_rows_begin_with_given_and_new_blocks(tables):
    """A block to take is the same one wherever its number comes, in both namespaces."""
    state, _ = tables.append(tables.create(), [9, 0, 0])  # blocks 1, 2, 3
    state, ok = tables.admit(state, [2, 1], [10, 6], [[1, -1, -2, 0], [0, -1, 0, 0]])
    assert bool(ok)
    assert np.asarray(state.tables).tolist() == [[1, 2, 3, 0], [0, 4, 0, 0], [1, 4, 5, 0]]
    assert np.asarray(state.seq_lens).tolist() == [9, 6, 10]
    assert np.asarray(state.ref_counts)[1:6].tolist() == [2, 1, 1, 2, 1]
    assert int(state.num_free) == 4
    bt.check_invariants(tables.free(state, [True, False, True]))


def test_too_few_free_blocks_begin_nothing(tables):
    state, _ = tables.append(tables.create(), [13, 13, 0])  # 8 of 9 blocks
    after, ok = tables.admit(state, [2], [8], [[-1, -2]])
    assert not bool(ok)
    assert _equal(after, state)


@pytest.mark.parametrize(
    ("rows", "num_tokens", "blocks", "message"),
    [
        ([0], [4], [[-1]], "is not empty"),
        ([3], [4], [[-1]], "rows"),
        ([1, 1], [4, 4], [[-1], [-2]], "repeat"),
        ([1], [5], [[-1]], "does not fit"),
        ([1], [8], [[-1, -1]], "repeat"),
        ([1], [4], [[9]], "has no references"),
        ([1], [12], [[-1, 0, -2]], "stands between"),
    ],
)
def test_what_cannot_begin_is_refused(rows, num_tokens, blocks, message):
    numpy = _Namespace(np)
    state, _ = numpy.append(numpy.create(), [9, 0, 0])
    with pytest.raises(ValueError, match=message):
        numpy.admit(state, rows, num_tokens, blocks)


def test_what_cannot_begin_does_nothing_in_jax():
    jax_ = _Namespace(jnp)
    state, _ = jax_.append(jax_.create(), [9, 0, 0])
    after, ok = jax_.admit(state, [0, 7, 1], [4, 4, 4], [[1], [1], [9]])
    assert bool(ok)
    assert _equal(after, state)
