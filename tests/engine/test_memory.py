"""`BlockTableMemory`: rows and blocks as the scheduler takes and frees them."""

import numpy as np
import pytest

from pallas_paged.engine.groups import RowPlan
from pallas_paged.engine.memory import BlockTableMemory


def admit(memory: BlockTableMemory, num_tokens: list[int]) -> list[int]:
    """Admits rows that share nothing."""
    plans, num_new = [], 0
    for count in num_tokens:
        blocks = tuple(range(-num_new - 1, -num_new - 1 - memory_blocks(count), -1))
        plans.append(RowPlan(count, blocks))
        num_new += len(blocks)
    return memory.admit(plans)


def memory_blocks(num_tokens: int) -> int:
    return -(-num_tokens // 4)


def make_memory(num_blocks: int = 9, max_num_seqs: int = 3) -> BlockTableMemory:
    return BlockTableMemory(
        num_blocks=num_blocks, block_size=4, max_num_seqs=max_num_seqs, max_model_len=30
    )


def test_sizes() -> None:
    memory = make_memory()
    assert memory.num_usable_blocks == memory.num_free_blocks == 8  # the null block is not usable
    assert memory.state.tables.shape == (3, 8)


def test_admit_gives_the_lowest_empty_rows() -> None:
    memory = make_memory()
    assert admit(memory, [5, 4]) == [0, 1]
    assert memory.num_free_blocks == 5
    memory.free([0])
    assert admit(memory, [1, 1]) == [0, 2]
    memory.check_invariants({0: 1, 1: 4, 2: 1})


def test_append_takes_a_block_where_the_last_one_is_full() -> None:
    memory = make_memory()
    rows = admit(memory, [3, 4])
    assert memory.append(rows, [1, 1]) is not None
    assert memory.num_free_blocks == 5
    memory.check_invariants({0: 4, 1: 5})


def test_append_is_all_or_nothing() -> None:
    memory = make_memory(num_blocks=4)
    rows = admit(memory, [4, 4])
    before = memory.state
    assert memory.append(rows, [1, 1]) is None
    assert memory.state.tables.tolist() == before.tables.tolist()
    memory.check_invariants({0: 4, 1: 4})
    assert memory.append(rows[:1], [1]) is not None
    memory.check_invariants({0: 5, 1: 4})


def test_free_gives_everything_back() -> None:
    memory = make_memory()
    memory.free(admit(memory, [9, 1, 4]))
    assert memory.num_free_blocks == memory.num_usable_blocks
    memory.check_invariants({})


def test_a_row_is_freed_once() -> None:
    memory = make_memory()
    admit(memory, [9])
    memory.free([0])
    with pytest.raises(ValueError, match="free a row once"):
        memory.free([0])


def test_a_state_never_changes_after_it_was_handed_out() -> None:
    memory = make_memory()
    admit(memory, [5])
    state = memory.state
    tables, seq_lens = state.tables.copy(), state.seq_lens.copy()
    memory.append([0], [9])
    admit(memory, [3])
    memory.free([0])
    np.testing.assert_array_equal(state.tables, tables)
    np.testing.assert_array_equal(state.seq_lens, seq_lens)


def test_admitting_more_than_fits_is_our_error() -> None:
    memory = make_memory(num_blocks=3)
    with pytest.raises(AssertionError, match="2 free blocks are too few"):
        admit(memory, [9])
    with pytest.raises(AssertionError, match="no row for 1 sequences"):
        admit(memory, [1, 1, 1, 1])


def test_invariants_notice_a_forgotten_row() -> None:
    memory = make_memory()
    admit(memory, [5])
    with pytest.raises(AssertionError):
        memory.check_invariants({})


def test_admitted_rows_share_the_blocks_that_are_named_alike() -> None:
    memory = make_memory()
    (first,) = admit(memory, [8])
    existing = memory.state.tables[first, 0].item()
    rows = memory.admit(
        [
            RowPlan(9, (existing, -1, -2)),
            RowPlan(10, (existing, -1, -3)),
        ]
    )
    a, b = memory.state.tables[rows, :3].tolist()
    assert a[:2] == b[:2]
    assert a[0] == existing
    assert a[2] != b[2]
    assert memory.num_free_blocks == 8 - 5
    memory.check_invariants({first: 8, rows[0]: 9, rows[1]: 10})
    memory.free([first, *rows])
    memory.check_invariants({})
    assert memory.num_free_blocks == 8


def test_forked_rows_copy_the_last_block_when_they_grow() -> None:
    memory = make_memory(max_num_seqs=4)
    (parent,) = admit(memory, [6])
    children = memory.fork([parent, parent])
    assert memory.num_free_blocks == 6
    copies = memory.append([parent, *children], [1, 1, 1])
    assert copies is not None
    source = memory.state.tables[children[1], 1]  # the last one keeps it
    assert copies.src.tolist() == [source, source]
    assert copies.dst.tolist() == [memory.state.tables[row, 1] for row in (parent, children[0])]
    memory.check_invariants(dict.fromkeys([parent, *children], 7))
