"""How a group loses its blocks, and what these are copied from and to if they are swapped."""

from collections.abc import Sequence

import numpy as np

from pallas_paged.engine.core.queues import Queues
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.kv.host_pool import DROPPED, BlockMove, HostPool
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.sharing import GIVEN_BACK, blocks_for


def lose_blocks(group: SequenceGroup, memory: Memory, pool: HostPool | None) -> BlockMove | None:
    """Takes a running group's rows and blocks, so that it waits; the caller moves it to the queue.

    Returns what to copy to the host pool; None if it has no room, or there is none, so that the
    group is computed again.
    """
    move = None
    if pool is not None:
        move = swap_out(group, memory.tables, memory.block_size, pool)
    memory.free([sequence.row for sequence in group.placed if sequence.row is not None])
    for sequence in group.sequences:
        sequence.give_up_blocks()
    group.status = SequenceStatus.WAITING if move is None else SequenceStatus.SWAPPED
    group.is_forked = False
    group.stats = group.stats._replace(num_preemptions=group.num_preemptions + 1)
    return move


def lose_everything(queues: Queues, memory: Memory, pool: HostPool) -> None:
    """Lets every request wait and begin anew, on the host and in the pool; nothing stays cached."""
    for group in list(queues.running):
        queues.stop(group)
        lose_blocks(group, memory, None)
        queues.wait(group)
    for group in queues.waiting:
        if group.swapped is not None:
            pool.give_back(group.swapped, is_read=False)
            group.forget_swapped()
            group.status = SequenceStatus.WAITING
        for sequence in group.sequences:
            sequence.hits.clear()
    memory.free_all()


def swap_out(group: SequenceGroup, tables: np.ndarray, S: int, pool: HostPool) -> BlockMove | None:
    """Gives a running group that is about to lose its blocks room for them in host memory.

    Nothing past the committed tokens is kept, and never the last token: a beam that waits for the
    others computes it once more. Each block is copied once, whoever shares it.

    Returns:
      What to copy, or None where there is no room, or a sequence has nothing to keep.
    """
    rows = _kept(group)
    if any(row is None or not num_kept for _, row, num_kept in rows):
        return None
    slots = _slots(rows, tables, S)
    group.swapped = pool.take(len(slots) - 1)
    if group.swapped is None:
        return None
    for sequence, row, num_kept in rows:
        blocks = tables[row, : blocks_for(num_kept, S)].tolist()
        sequence.num_swapped = num_kept
        sequence.swapped_slots = tuple(slots[block] for block in blocks)
    return BlockMove(group.swapped, np.array(list(slots)[1:], np.int32))


def num_blocks_to_swap(group: SequenceGroup, tables: np.ndarray, S: int) -> int:
    """Returns how many blocks `swap_out` would copy of a running group."""
    return len(_slots(_kept(group), tables, S)) - 1


def _kept(group: SequenceGroup) -> list[tuple[TokenSequence, int | None, int]]:
    """Returns the sequences that have a row, with it and the tokens that a swap keeps."""
    return [(s, s.row, min(s.progress.num_computed, len(s.token_ids) - 1)) for s in group.placed]


def _slots(
    rows: Sequence[tuple[TokenSequence, int | None, int]], tables: np.ndarray, S: int
) -> dict[int, int]:
    """Returns the place in a chunk of each block that is kept, and `GIVEN_BACK` beside them."""
    slots = {GIVEN_BACK: DROPPED}
    for _, row, num_kept in rows:
        for block in [] if row is None else tables[row, : blocks_for(num_kept, S)].tolist():
            slots.setdefault(block, len(slots) - 1)
    return slots


def swap_in(
    placed: Sequence[TokenSequence], tables: np.ndarray, hits: Sequence[Sequence[int]]
) -> BlockMove:
    """Returns what to copy into the rows that a swapped group has been given."""
    chunk = placed[0].group.swapped
    assert chunk is not None
    block_ids = np.zeros(chunk.num_blocks, np.int32)
    for sequence, cached in zip(placed, hits, strict=True):
        for index, slot in enumerate(sequence.swapped_slots):
            block = tables[sequence.row, index]
            if slot == DROPPED:
                continue
            if index >= len(cached) or block != cached[index]:
                block_ids[slot] = block
    return BlockMove(chunk, block_ids)
