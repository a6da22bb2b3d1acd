"""Which blocks many of a step's sequences begin with: they are read for several at once."""

from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.buckets import MIN_SHARING
from pallas_paged.engine.core.scheduled import Batch
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.sharing import GIVEN_BACK

MIN_BLOCKS = 8
"""The shortest prefix."""

MIN_SAVED = 256
"""The fewest blocks that need not be read: what that takes of a layer's time is what the launches
cost that it is done by. An estimate for 8 KV heads of 128, that of `benchmarks.cascade`."""

_PIECE = 64


class FoundPrefix(NamedTuple):
    """Blocks that sequences of a step begin with.

    Attributes:
      row: a row of the block tables that begins with them.
      num_blocks: how many.
      is_shared: bool[B], the sequences.
    """

    row: int
    num_blocks: int
    is_shared: np.ndarray


class PrefixFinder:
    """Finds the prefix of which the most blocks need not be read again, step after step.

    While the same sequences run, nothing is searched: only rows that have changed are looked at.
    """

    def __init__(self, memory: Memory) -> None:
        """Takes blocks from the tables of `memory`."""
        self._memory = memory
        self._numbers = self._rows = np.zeros(0, np.int64)
        self._versions = np.zeros(0, np.int64)
        self._found: FoundPrefix | None = None

    def find(self, batch: Batch) -> FoundPrefix | None:
        """Returns the prefix of a decode step's sequences, if enough have one that is long enough.

        All of its blocks are in front of the token that each of them computes.
        """
        rows, whole = batch.rows, batch.starts // self._memory.block_size
        versions = self._memory.versions[rows]
        are_same = np.array_equal(batch.numbers, self._numbers) and np.array_equal(rows, self._rows)
        if not (are_same and self._still_holds(rows[versions != self._versions], rows)):
            self._found = find_prefix(self._memory.tables, rows, whole)
            self._numbers, self._rows = batch.numbers.copy(), rows.copy()
        self._versions = versions
        return self._found

    def _still_holds(self, changed: np.ndarray, rows: np.ndarray) -> bool:
        """Whether the rows that have changed still begin with what was found."""
        if self._found is None or not len(changed):
            return not len(changed)
        sharing = np.intersect1d(changed, rows[self._found.is_shared])
        tables, count = self._memory.tables, self._found.num_blocks
        return bool((tables[sharing, :count] == tables[self._found.row, :count]).all())


def find_prefix(tables: np.ndarray, rows: np.ndarray, whole: np.ndarray) -> FoundPrefix | None:
    """Returns the prefix by which most is saved, of those that are tried; None if none is enough.

    Tried are those of the sequences that have the same block at one of the places 8, 16, 32, ...

    Args:
      tables: i32[R, M], all block tables.
      rows: i32[B], the sequences' rows.
      whole: i32[B], how many of each one's first blocks may be in a prefix.
    """
    best, most = None, 0
    place = MIN_BLOCKS
    while np.count_nonzero(whole >= place) >= MIN_SHARING:
        blocks = np.where(whole >= place, tables[rows, place - 1], GIVEN_BACK)
        names, counts = np.unique(blocks[blocks != GIVEN_BACK], return_counts=True)
        if not len(names) or counts.max() < MIN_SHARING:
            break
        is_shared = blocks == names[counts.argmax()]
        count = _num_common(tables, rows[is_shared], int(whole[is_shared].min()))
        saved = count * int(counts.max() - 1)
        if count >= MIN_BLOCKS and saved >= MIN_SAVED and saved > most:
            best, most = FoundPrefix(int(rows[is_shared][0]), count, is_shared), saved
        place *= 2
        while place <= count:  # there they are the same
            place *= 2
    return best


def _num_common(tables: np.ndarray, rows: np.ndarray, most: int) -> int:
    """Returns with how many of the same blocks, none of them given back, the rows begin."""
    for begin in range(0, most, _PIECE):
        piece = tables[rows, begin : min(begin + _PIECE, most)]
        is_common = (piece == piece[0]).all(axis=0) & (piece[0] != GIVEN_BACK)
        if not is_common.all():
            return begin + int(is_common.argmin())
    return most
