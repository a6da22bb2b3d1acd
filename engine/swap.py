"""Groups whose blocks wait in host memory: how much of it there is, and how they come back."""

import bisect
import dataclasses
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np

from pallas_paged.engine.groups import Branch, Entry, blocks_for, sequences_to_place
from pallas_paged.engine.sequence import Sequence, SequenceGroup


def chunk_sizes(num_blocks: int) -> tuple[int, ...]:
    """Returns how many blocks one copy to or from the host may move: powers of 2 and the most."""
    sizes = []
    size = 8
    while size < num_blocks:
        sizes.append(size)
        size *= 2
    return (*sizes, num_blocks)


@dataclasses.dataclass(eq=False)
class SwappedChunk:
    """A group's blocks in host memory; it goes when nobody refers to it.

    Attributes:
      num_blocks: blocks of host memory that it takes, padding included.
      data: what the device copied; only the runner reads and writes it.
    """

    num_blocks: int
    data: Any = dataclasses.field(default=None, repr=False)


class BlockMove(NamedTuple):
    """Blocks to copy between the pool and a chunk, before a step.

    Attributes:
      chunk: the blocks in host memory.
      block_ids: i32[K], block i of the chunk is this one of the pool; 0 is not to be copied.
    """

    chunk: SwappedChunk
    block_ids: np.ndarray


class HostPool:
    """How much host memory is taken, in blocks; the blocks themselves are the runner's.

    Attributes:
      num_blocks: of host memory.
      num_used: by groups that are swapped out.
      num_swaps: how many groups were swapped out so far.
    """

    def __init__(self, num_blocks: int, num_pool_blocks: int) -> None:
        """`num_pool_blocks` are the most blocks that a group can have."""
        self.num_blocks = num_blocks
        self.num_used = self.num_swaps = 0
        self._sizes = chunk_sizes(num_pool_blocks)

    def take(self, num_blocks: int) -> SwappedChunk | None:
        """Returns room for so many blocks, or None if there is none."""
        size = self._sizes[bisect.bisect_left(self._sizes, num_blocks)]
        if self.num_used + size > self.num_blocks:
            return None
        self.num_used += size
        self.num_swaps += 1
        return SwappedChunk(size)

    def clear(self) -> None:
        """Frees all room, whatever is counted as taken."""
        self.num_used = 0

    def give_back(self, group: SequenceGroup) -> None:
        """Frees the room of a group, if it has any."""
        if group.swapped is not None:
            self.num_used -= group.swapped.num_blocks
            group.swapped = None
            for sequence in group.sequences:
                sequence.num_swapped, sequence.swapped_slots = 0, ()


def swap_out(group: SequenceGroup, tables: np.ndarray, S: int, pool: HostPool) -> BlockMove | None:
    """Gives a running group that is about to lose its blocks room for them in host memory.

    Nothing past the committed tokens is kept, and never the last token: a beam that waits for the
    others computes it once more. Each block is copied once, whoever shares it.

    Returns:
      What to copy, or None where there is no room, or a sequence has nothing to keep.
    """
    rows = [(s, s.row, min(s.num_computed, len(s.token_ids) - 1)) for s in group.placed]
    if any(row is None or not num_kept for _, row, num_kept in rows):
        return None
    slots: dict[int, int] = {}
    for _, row, num_kept in rows:
        for block in tables[row, : blocks_for(num_kept, S)].tolist():
            slots.setdefault(block, len(slots))
    group.swapped = pool.take(len(slots))
    if group.swapped is None:
        return None
    for sequence, row, num_kept in rows:
        blocks = tables[row, : blocks_for(num_kept, S)].tolist()
        sequence.num_swapped = num_kept
        sequence.swapped_slots = tuple(slots[block] for block in blocks)
    return BlockMove(group.swapped, np.array(list(slots), np.int32))


def plan_return(group: SequenceGroup, hits: Seq[Seq[int]], block_size: int) -> Entry:
    """Returns how a swapped group comes back: as it left, but for blocks that are cached.

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
            if index < len(cached):
                blocks.append(cached[index])
            else:
                blocks.append(numbers.setdefault(slot, -len(numbers) - 1))
        branches.append(Branch(tuple(blocks), None, sequence.num_swapped))
        num_needed += blocks_for(len(sequence.token_ids), S) - len(blocks)
    partial = [branch.blocks[-1] for branch in branches if branch.num_shared % S]
    num_copies = len(partial) - len(set(partial))
    return Entry(placed, branches, len(numbers), len(numbers) + num_needed + num_copies)


def swap_in(placed: Seq[Sequence], tables: np.ndarray, hits: Seq[Seq[int]]) -> BlockMove:
    """Returns what to copy into the rows that a swapped group has been given."""
    chunk = placed[0].group.swapped
    assert chunk is not None
    block_ids = np.zeros(chunk.num_blocks, np.int32)
    for sequence, cached in zip(placed, hits, strict=True):
        for index, slot in enumerate(sequence.swapped_slots):
            block = tables[sequence.row, index]
            if index >= len(cached) or block != cached[index]:
                block_ids[slot] = block
    return BlockMove(chunk, block_ids)
