"""`BlockTableMemory`: rows and blocks as the scheduler takes and frees them."""

import numpy as np
import pytest

from pallas_paged.engine.memory import BlockTableMemory


def make_memory(num_blocks: int = 9, max_num_seqs: int = 3) -> BlockTableMemory:
    return BlockTableMemory(
        num_blocks=num_blocks, block_size=4, max_num_seqs=max_num_seqs, max_model_len=30
    )


def test_sizes() -> None:
    memory = make_memory()
    assert memory.num_usable_blocks == memory.num_free_blocks == 8  # the null block is not usable
    assert memory.state.tables.shape == (3, 8)
    assert [memory.blocks_for(n) for n in (0, 1, 4, 5, 30)] == [0, 1, 1, 2, 8]


def test_admit_gives_the_lowest_empty_rows() -> None:
    memory = make_memory()
    assert memory.admit([5, 4]) == [0, 1]
    assert memory.num_free_blocks == 5
    memory.free([0])
    assert memory.admit([1, 1]) == [0, 2]
    memory.check_invariants({0: 1, 1: 4, 2: 1})


def test_append_takes_a_block_where_the_last_one_is_full() -> None:
    memory = make_memory()
    rows = memory.admit([3, 4])
    assert memory.append(rows, [1, 1])
    assert memory.num_free_blocks == 5
    memory.check_invariants({0: 4, 1: 5})


def test_append_is_all_or_nothing() -> None:
    memory = make_memory(num_blocks=4)
    rows = memory.admit([4, 4])
    before = memory.state
    assert not memory.append(rows, [1, 1])
    assert memory.state.tables.tolist() == before.tables.tolist()
    memory.check_invariants({0: 4, 1: 4})
    assert memory.append(rows[:1], [1])
    memory.check_invariants({0: 5, 1: 4})


def test_free_gives_everything_back() -> None:
    memory = make_memory()
    memory.free(memory.admit([9, 1, 4]))
    assert memory.num_free_blocks == memory.num_usable_blocks
    memory.check_invariants({})


def test_a_row_is_freed_once() -> None:
    memory = make_memory()
    memory.admit([9])
    memory.free([0])
    with pytest.raises(ValueError, match="free a row once"):
        memory.free([0])


def test_a_state_never_changes_after_it_was_handed_out() -> None:
    memory = make_memory()
    memory.admit([5])
    state = memory.state
    tables, seq_lens = state.tables.copy(), state.seq_lens.copy()
    memory.append([0], [9])
    memory.admit([3])
    memory.free([0])
    np.testing.assert_array_equal(state.tables, tables)
    np.testing.assert_array_equal(state.seq_lens, seq_lens)


def test_admitting_more_than_fits_is_our_error() -> None:
    memory = make_memory(num_blocks=3)
    with pytest.raises(AssertionError, match="2 free blocks are too few"):
        memory.admit([9])
    with pytest.raises(AssertionError, match="no row for 1 sequences"):
        memory.admit([1, 1, 1, 1])


def test_invariants_notice_a_forgotten_row() -> None:
    memory = make_memory()
    memory.admit([5])
    with pytest.raises(AssertionError):
        memory.check_invariants({})
