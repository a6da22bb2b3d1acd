"""How much host memory swapped blocks take, and which chunk of it holds whose."""

import bisect
import itertools
from typing import NamedTuple

import numpy as np

DROPPED = -1
"""In `Sequence.swapped_slots`: a block that the sequence gave back before it was swapped out."""


def chunk_sizes(num_blocks: int) -> tuple[int, ...]:
    """Returns how many blocks one copy to or from the host may move: powers of 2 and the most."""
    sizes = []
    size = 8
    while size < num_blocks:
        sizes.append(size)
        size *= 2
    return (*sizes, num_blocks)


class SwappedChunk(NamedTuple):
    """Room for a group's blocks in host memory.

    Attributes:
      number: tells it from all other chunks of an engine; the device keeps the bytes under it.
      num_blocks: blocks of host memory that it takes, padding included.
    """

    number: int
    num_blocks: int


class BlockMove(NamedTuple):
    """Blocks to copy between the pool and a chunk, before a step.

    Attributes:
      chunk: the blocks in host memory.
      block_ids: i32[K], block i of the chunk is this one of the pool; 0 is not to be copied.
    """

    chunk: SwappedChunk
    block_ids: np.ndarray


class HostPool:
    """Counts the host memory that is taken, in blocks, and numbers its chunks.

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
        self._numbers = itertools.count()
        self._dropped: list[int] = []

    def padded(self, num_blocks: int) -> int:
        """Returns the blocks of the chunk for so many: all of them are copied."""
        return self._sizes[bisect.bisect_left(self._sizes, num_blocks)]

    def take(self, num_blocks: int) -> SwappedChunk | None:
        """Returns room for so many blocks, or None if there is none."""
        size = self.padded(num_blocks)
        if self.num_used + size > self.num_blocks:
            return None
        self.num_used += size
        self.num_swaps += 1
        return SwappedChunk(next(self._numbers), size)

    def give_back(self, chunk: SwappedChunk, *, is_read: bool) -> None:
        """Frees a chunk's room; unless its blocks `is_read` back, the device is told to drop it."""
        self.num_used -= chunk.num_blocks
        if not is_read:
            self._dropped.append(chunk.number)

    def take_dropped(self) -> tuple[int, ...]:
        """Returns the chunks that the device is to drop, each of them once."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped

    def clear(self) -> None:
        """Frees all room, whatever is counted as taken; the device has dropped all chunks."""
        self.num_used = 0
        self._dropped = []
