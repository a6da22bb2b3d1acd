"""What the block tables on the device hold, and which of their entries a step needs written first.

The device keeps a copy of the block tables from step to step. A decode step changes few entries of
them, one for each sequence that begins a block; the tables themselves may take many megabytes.
"""

import numpy as np

from pallas_paged.engine.kv.interface import Memory

NUM_ENTRIES = 1024
"""Entries of an edit that comes before a step."""


class TableEdits:
    """Follows what the device's block tables hold, and says what a step needs written first.

    An edit is i32[2, K]: places, row * M + column, and the blocks to write there. Padding writes
    the null block into the row behind the last one, which stands for no sequence.
    """

    def __init__(self, memory: Memory) -> None:
        """Takes blocks from the tables of `memory`; nothing is known of the device's."""
        self._memory = memory
        self._sent = np.full_like(memory.tables, -1)
        self._versions = np.full(len(memory.tables), -1, np.int64)

    def next_edits(self, rows: np.ndarray, size: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns the entries in which these rows, no row twice, differ from the device's.

        Steps come in the order of their dispatch, each of them once. What lies behind the last
        block of a row does not count.

        Returns:
          edits of `NUM_ENTRIES` entries, none as long as one of `size` entries holds all; the edit
          of `size` entries that comes after them.
        """
        entries = self._changed(rows)
        num_first = max(0, entries.shape[1] - size)
        starts = range(0, num_first, NUM_ENTRIES)
        edits = [
            self._padded(entries[:, start : min(start + NUM_ENTRIES, num_first)], NUM_ENTRIES)
            for start in starts
        ]
        return edits, self._padded(entries[:, num_first:], size)

    def _changed(self, rows: np.ndarray) -> np.ndarray:
        """Returns the entries in which rows differ, and takes note that they are sent."""
        memory, M = self._memory, self._sent.shape[1]
        rows = rows[memory.versions[rows] != self._versions[rows]]
        self._versions[rows] = memory.versions[rows]
        if not len(rows):
            return np.zeros((2, 0), np.int32)
        counts = memory.num_blocks[rows]
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) + np.repeat(rows * M - (ends - counts), counts)
        blocks, sent = memory.tables.reshape(-1)[places], self._sent.reshape(-1)
        differ = blocks != sent[places]
        places, blocks = places[differ], blocks[differ]
        sent[places] = blocks
        return np.array([places, blocks], np.int32)

    def _padded(self, entries: np.ndarray, size: int) -> np.ndarray:
        edit = np.zeros((2, size), np.int32)
        edit[0] = self._sent.size
        edit[:, : entries.shape[1]] = entries
        return edit
