"""How a waiting group comes into the block tables: its rows, and what they share from the start."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.kv.host_pool import DROPPED
from pallas_paged.engine.kv.sharing import GIVEN_BACK, Branch, blocks_for, plan_tree


def repeated_blocks(
    placed: Sequence[TokenSequence], tables: np.ndarray, is_cached: np.ndarray, block_size: int
) -> dict[int, int]:
    """Returns which full blocks of a group's rows repeat another one, and that one: {old: kept}.

    Blocks are equal that hold the same tokens behind equal blocks. Those before the first that is
    new since the memory was told (`num_remembered`) differ already. One that `is_cached`, bool[N],
    is kept rather than another. A block behind one that its row has given back is taken to differ.
    """
    S = block_size
    num_full = [sequence.progress.num_computed // S for sequence in placed]
    num_told = [sequence.progress.num_remembered for sequence in placed]
    new = [told for told, end in zip(num_told, num_full, strict=True) if told < end]
    kept: dict[int, int] = {}
    if not new or len(placed) == 1:
        return kept
    owners: dict[tuple[int, tuple[int, ...]], int] = {}
    for place in range(min(new), max(num_full)):
        having = [s for s, end in zip(placed, num_full, strict=True) if place < end]
        for sequence in sorted(having, key=lambda s: not is_cached[tables[s.row, place]]):
            before = int(tables[sequence.row, place - 1]) if place else 0
            block = int(tables[sequence.row, place])
            if block == GIVEN_BACK or (place and before == GIVEN_BACK):
                continue
            key = kept.get(before, before), tuple(sequence.token_ids[place * S : (place + 1) * S])
            owner = owners.setdefault(key, block)
            if owner != block:
                kept[block] = owner
    return kept


def part_from(leader: TokenSequence, columns: RowColumns) -> None:
    """Lets those who would have read what a sequence has not computed compute it themselves.

    Before it gives up its row, because it alone of its group has ended.
    """
    if leader.row is None:
        return
    num_told, num_entered = columns.num_remembered[leader.row], columns.num_entered[leader.row]
    done = int(columns.num_dispatched[leader.row])
    for other in leader.group.live:
        if other.leader is leader and other.num_shared > done:
            columns.num_dispatched[other.row] = other.num_shared = done
            columns.num_remembered[other.row] = min(num_told, columns.num_remembered[other.row])
            columns.num_entered[other.row] = min(num_entered, columns.num_entered[other.row])
            other.leader = leader.leader


class Entry(NamedTuple):
    """How a waiting group comes into the block tables.

    Attributes:
      placed: the sequences that get a row now: all live ones, or before the first token only one.
      branches: one for each of them.
      num_new: blocks to allocate.
      num_needed: blocks that should be free: those, and what forked rows will copy on write.
    """

    placed: list[TokenSequence]
    branches: list[Branch]
    num_new: int
    num_needed: int


def sequences_to_place(group: SequenceGroup) -> list[TokenSequence]:
    """Returns the live sequences of a waiting group that need a row; before any output, one."""
    live = group.live
    return live if any(sequence.num_output_tokens for sequence in live) else live[:1]


def plan_entry(group: SequenceGroup, hits: Sequence[Sequence[int]], block_size: int) -> Entry:
    """Returns how a group starts, or starts again with all tokens it knows; changes nothing.

    `hits` are the cached blocks for each of `sequences_to_place`.
    """
    placed = sequences_to_place(group)
    branches = plan_tree([sequence.token_ids for sequence in placed], hits, block_size)
    num_new = -min(min(branch.blocks) for branch in branches)
    num_spares = 0
    if group.num_prompt_tokens % block_size:
        num_spares = group.num_rows - len(placed)
    return Entry(placed, branches, num_new, num_new + num_spares)


def plan_return(group: SequenceGroup, hits: Sequence[Sequence[int]], block_size: int) -> Entry:
    """Returns how a swapped group comes back: as it left, with cached blocks where there are any.

    What a sequence had given back before stays given back.

    Each row begins with the tokens that were kept and has to grow for the rest.
    """
    S = block_size
    placed = sequences_to_place(group)
    numbers: dict[int, int] = {}
    branches: list[Branch] = []
    num_needed = 0
    for sequence, cached in zip(placed, hits, strict=True):
        blocks = []
        for index, slot in enumerate(sequence.swapped_slots):
            if slot == DROPPED:
                blocks.append(GIVEN_BACK)
            elif index < len(cached):
                blocks.append(cached[index])
            else:
                blocks.append(numbers.setdefault(slot, -len(numbers) - 1))
        branches.append(Branch(tuple(blocks), None, sequence.num_swapped))
        num_needed += blocks_for(len(sequence.token_ids), S) - len(blocks)
    partial = [branch.blocks[-1] for branch in branches if branch.num_shared % S]
    num_copies = len(partial) - len(set(partial))
    return Entry(placed, branches, len(numbers), len(numbers) + num_needed + num_copies)
