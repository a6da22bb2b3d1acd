"""`BlockTableMemory`: rows and blocks as the scheduler takes and frees them."""

from collections.abc import Hashable

import numpy as np
import pytest

from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.interface import Need
from pallas_paged.engine.kv.sharing import FullBlocks, RowPlan


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


def make_memory(
    num_blocks: int = 9, max_num_seqs: int = 3, enable_prefix_caching: bool = False
) -> BlockTableMemory:
    return BlockTableMemory(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_model_len=30,
        enable_prefix_caching=enable_prefix_caching,
    )


def remember(memory: BlockTableMemory, row: int, tokens: range, root: Hashable = None) -> None:
    """Tells the memory that these tokens of a row are computed."""
    memory.remember([FullBlocks(row, tokens, 0, len(tokens) // 4, root, True)])


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


def test_rows_give_back_their_first_blocks_and_go_on() -> None:
    memory = make_memory()
    rows = admit(memory, [9, 12])
    (child,) = memory.fork(rows[:1])
    memory.drop_front({0: 2, 1: 1})
    memory.check_invariants({0: 9, 1: 12, child: 9})
    assert memory.num_free_blocks == 8 - 6 + 1  # the child has those of row 0 still
    memory.drop_front({child: 2})
    assert memory.num_free_blocks == 8 - 3
    assert (memory.tables[:, :2] > 0).tolist() == [[False, False], [False, True], [False, False]]
    copies = memory.append([0, 1], [1, 1])
    assert copies is not None
    assert copies.dst.tolist() == [memory.tables[0, 2]]
    memory.free([0, 1, child])
    memory.check_invariants({})


def test_a_row_comes_back_without_its_first_blocks() -> None:
    memory = make_memory()
    assert memory.admit([RowPlan(10, (0, -1, -2)), RowPlan(12, (0, -1, -3))]) == [0, 1]
    assert memory.num_free_blocks == 8 - 3
    assert memory.tables[0, 1] == memory.tables[1, 1] > 0
    assert memory.tables[:2, 0].tolist() == [0, 0]
    memory.check_invariants({0: 10, 1: 12})


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


def test_no_verb_copies_the_tables() -> None:
    """They may have tens of megabytes, and a step has several verbs."""
    memory = make_memory()
    tables = memory.tables
    admit(memory, [5])
    memory.append([0], [9])
    admit(memory, [3])
    assert memory.space([0], [1], [2]).take(Need(memory.num_free_blocks + 1, 1, 1, 1), 0)
    memory.fork([1])
    memory.free([0])
    assert memory.tables is tables or np.shares_memory(memory.tables, tables)
    memory.check_invariants({1: 3, 2: 3})


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


def test_rows_are_shortened_and_give_back_what_is_past_their_end() -> None:
    memory = make_memory()
    rows = admit(memory, [9, 12, 3])
    kept = memory.tables[:, :2].tolist()
    memory.truncate(rows[:2], [4, 5])
    assert memory.num_free_blocks == 8 - 4
    assert memory.tables[0].tolist() == [kept[0][0]] + [0] * 7
    assert memory.tables[1].tolist() == kept[1] + [0] * 6
    memory.check_invariants({0: 4, 1: 5, 2: 3})
    assert memory.append(rows, [1, 1, 1]) is not None
    memory.check_invariants({0: 5, 1: 6, 2: 4})
    with pytest.raises(ValueError, match="must be between 0 and the row's length"):
        memory.truncate([0], [6])
    with pytest.raises(AssertionError, match="free"):
        memory.truncate([0], [0])


def test_a_fork_keeps_what_its_parent_gives_back() -> None:
    memory = make_memory()
    (parent,) = admit(memory, [12])
    (child,) = memory.fork([parent])
    blocks = memory.tables[child, :3].tolist()
    memory.truncate([parent], [6])
    assert memory.num_free_blocks == 8 - 3
    assert memory.tables[child, :3].tolist() == blocks
    copies = memory.append([parent], [1])  # into a block that is the child's too
    assert copies is not None
    assert copies.src.tolist() == [blocks[1]]
    assert copies.dst.tolist() == [memory.tables[parent, 1]] != [blocks[1]]
    memory.check_invariants({parent: 7, child: 12})


def test_a_cached_block_stays_as_it_is_when_a_row_is_shortened_into_it() -> None:
    memory = make_memory(enable_prefix_caching=True)
    tokens = range(12)
    (row,) = admit(memory, [12])
    blocks = memory.tables[row, :3].tolist()
    remember(memory, row, tokens)
    memory.truncate([row], [6])
    assert memory.num_free_blocks == 8 - 2  # the third may be evicted
    assert memory.match([*tokens, 0], None) == blocks
    copies = memory.append([row], [1])
    assert copies is not None
    assert copies.src.tolist() == [blocks[1]]
    memory.check_invariants({row: 7})
    memory.free([row])
    assert memory.match([*tokens, 0], None) == blocks
    assert memory.num_free_blocks == memory.num_usable_blocks


ROOTS = [None, "a", 1, ("adapter", 1), ("adapter", 2), ("adapter", 1, b"image")]


def test_blocks_are_shared_under_equal_roots_only() -> None:
    """Whatever may be hashed is a root; one that is a block's number is not taken for the block."""
    memory = make_memory(num_blocks=20, max_num_seqs=8, enable_prefix_caching=True)
    tokens = range(8)
    rows = admit(memory, [8] * len(ROOTS))
    for row, root in zip(rows, ROOTS, strict=True):
        remember(memory, row, tokens, root)
        assert not memory.match(range(4, 9), root)
    assert 1 in memory.tables[:, 0]
    found = [memory.match([*tokens, 0], root) for root in ROOTS]
    assert found == memory.tables[rows, :2].tolist()
    assert len({*map(tuple, found)}) == len(ROOTS)
    (again,) = admit(memory, [8])
    remember(memory, again, tokens, ("adapter", int("2")))
    assert memory.tables[again, :2].tolist() == found[4]
    assert not memory.pin(tokens, ("adapter", 3))
    assert memory.pin(tokens, ("adapter", 2))
    assert sorted(memory.pins) == sorted(found[4])
    assert not memory.unpin(tokens, ("adapter", 1))
    assert memory.unpin(tokens, ("adapter", 2))
    memory.check_invariants(dict.fromkeys([*rows, again], 8))
