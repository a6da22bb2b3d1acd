"""Prefixes that requests have in common which run at the same time: found from the dispatch on.

The device runs steps in order, and each writes its keys and values before it reads any. So a block
may be read as soon as the step that fills it is dispatched, by every later one, whatever becomes of
the sequence that owned it: copies, swaps and whoever takes the block come with later steps, too.
"""

from collections.abc import Sequence

import numpy as np

from pallas_paged.engine.core.entries import sequences_to_place
from pallas_paged.engine.core.queues import Queues
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.core.scheduled import Batch
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.prefix_cache import First, Key, Parent, num_matchable
from pallas_paged.engine.kv.sharing import FullBlocks, blocks_for


def enter_dispatched(memory: Memory, columns: RowColumns, batch: Batch) -> None:
    """Enters the blocks in the prefix cache that known tokens of a dispatched step fill.

    Those behind a token that is sampled on the device follow when the step is committed, as do
    those of a row that repeats cached ones: it takes these in place of its own then, and not now,
    because the step has still to write into its own.
    """
    if not memory.caches_prefixes or batch.input_on_device.all():
        return
    rows, S = batch.rows, memory.block_size
    ends = np.minimum(columns.num_dispatched[rows], columns.num_known[rows]) // S
    is_filled = ~batch.input_on_device & (ends > columns.num_entered[rows])
    full: list[FullBlocks] = []
    for b in np.flatnonzero(is_filled).tolist():
        sequence, row = batch.sequences[b], int(rows[b])
        group, first = sequence.group, int(columns.num_entered[row])
        if group.writes_cache:
            root, ids = group.cache_root, sequence.token_ids
            full.append(FullBlocks(row, ids, first, int(ends[b]), root, merges=False))
    memory.remember(full)
    for row, _, first, end, *_ in full:
        is_cached = memory.is_cached[memory.tables[row, first:end]]
        columns.num_entered[row] = first + np.count_nonzero(is_cached)


class ComingPrefixes:
    """What running groups, and those that enter in one attempt, will fill blocks with next.

    A group that would compute the same waits for it, if that saves more than a step costs.
    """

    def __init__(self, memory: Memory, columns: RowColumns, queues: Queues, step_cost: int) -> None:
        """For one attempt to schedule; looks at nothing yet. See `Scheduler` for `step_cost`."""
        self._memory, self._columns, self._queues = memory, columns, queues
        self._num_blocks = blocks_for(step_cost, memory.block_size)
        self._is_on = step_cost > 0 and memory.caches_prefixes
        self._owners: dict[Key, SequenceGroup] | None = None

    def holds_back(self, group: SequenceGroup, hits: Sequence[int]) -> bool:
        """Whether a waiting group should wait for blocks that one before it in the order fills.

        `hits` are the cached blocks that its first sequence begins with. Who has the same block
        before those that it fills next has had the same tokens up to there, so that one look for
        the tokens of as many blocks as are worth a step tells.
        """
        if not self._is_on or not group.reads_cache or group.swapped is not None:
            return False
        token_ids, S = group.live[0].token_ids, self._memory.block_size
        if num_matchable(len(token_ids), S) - len(hits) < self._num_blocks:
            return False
        parent = hits[-1] if hits else First(group.cache_root)
        owner = self._all_owners().get(self._key(parent, token_ids, len(hits)))
        key = self._queues.order.key
        return owner is not None and key(owner) < key(group)

    def add(self, group: SequenceGroup, hits: Sequence[Sequence[int]]) -> None:
        """Counts on a group that enters, with these cached blocks for each of its sequences."""
        if not self._is_on or not group.writes_cache or group.swapped is not None:
            return
        for sequence, cached in zip(sequences_to_place(group), hits, strict=True):
            num_left = len(sequence.token_ids) // self._memory.block_size - len(cached)
            if sequence.leader is None and num_left >= self._num_blocks:
                parent = cached[-1] if cached else First(group.cache_root)
                key = self._key(parent, sequence.token_ids, len(cached))
                self._all_owners()[key] = group

    def _all_owners(self) -> dict[Key, SequenceGroup]:
        """Returns who fills which blocks next; of several the first, if they run already."""
        if self._owners is None:
            self._owners = {}
            columns, rows = self._columns, self._queues.placed_rows
            firsts = columns.num_dispatched[rows] // self._memory.block_size
            ends = columns.num_known[rows] // self._memory.block_size
            for place in np.flatnonzero(ends - firsts >= self._num_blocks).tolist():
                sequence, first = self._queues.placed[place], int(firsts[place])
                group = sequence.group
                parent: Parent = First(group.cache_root)
                if group.writes_cache:
                    if first:
                        parent = int(self._memory.tables[rows[place], first - 1])
                    key = self._key(parent, sequence.token_ids, first)
                    self._owners.setdefault(key, group)
        return self._owners

    def _key(self, parent: Parent, token_ids: Sequence[int], first: int) -> Key:
        S = self._memory.block_size
        return parent, tuple(token_ids[first * S : (first + self._num_blocks) * S])
