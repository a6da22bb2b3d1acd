"""What sharing should come to, worked out from the sequences' tokens and not from their blocks."""

import itertools
from collections.abc import Iterable

import numpy as np

from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.sharing import blocks_for, worst_case_blocks
from pallas_paged.engine.kv.stats import kv_stats


def check_sharing(scheduler: Scheduler, groups: Iterable[SequenceGroup]) -> int:
    """Checks the blocks of all running groups and what `kv_stats` says of them.

    A block is full when a committed step has computed its last token. Then:

    - no two full blocks of a group hold the same tokens behind the same tokens;
    - nor do two of different groups that read and write the prefix cache under one salt, from the
      commit on in which the memory was told of them;
    - equal blocks are one, and different ones are not: as many blocks are in use as there are
      different prefixes and blocks not full yet, each of which belongs to one group, and to one
      sequence once that has written to it.

    Returns how many blocks sharing saves.
    """
    memory = scheduler.memory
    assert isinstance(memory, BlockTableMemory)
    running = [g for g in groups if any(s.row is not None for s in g.live)]
    full: dict[tuple, int] = {}
    for group in running:
        full |= _full_blocks(group, memory, full)
    owned = set(full.values())
    assert len(owned) == len(full), "one block for two prefixes"
    num_partial = sum(_num_partial(group, memory, owned) for group in running)

    placed = [sequence for group in running for sequence in group.placed]
    num_entries = sum(
        blocks_for(sequence.progress.num_reserved, memory.block_size) for sequence in placed
    )
    num_blocks = len(full) + num_partial
    _check_stats(scheduler, memory, placed, num_entries, num_blocks)
    return num_entries - num_blocks


def _full_blocks(
    group: SequenceGroup, memory: BlockTableMemory, known: dict[tuple, int]
) -> dict[tuple, int]:
    """Returns the group's full blocks that the memory knows, by what should make them one."""
    S, cache = memory.block_size, memory.prefix_cache
    merges = cache is not None and group.reads_cache and group.writes_cache
    within: dict[tuple[int, ...], int] = {}
    found: dict[tuple, int] = {}
    for sequence in group.placed:
        blocks = memory.tables[sequence.row].tolist()
        for index in range(sequence.progress.num_computed // S):
            prefix, block = tuple(sequence.token_ids[: (index + 1) * S]), blocks[index]
            assert within.setdefault(prefix, block) == block, f"{prefix} is there twice"
            if index < sequence.progress.num_remembered:
                # A request that opts out shares what it found, and what others found of it.
                is_public = merges or (cache is not None and bool(cache.is_cached[block]))
                scope = ("salt", group.cache_salt) if is_public else ("group", group.request_id)
                key = (scope, prefix)
                assert found.setdefault(key, block) == known.get(key, block) == block, key
    return found


def _num_partial(group: SequenceGroup, memory: BlockTableMemory, full: set[int]) -> int:
    """Returns how many blocks the group has beside those that are full and known."""
    S = memory.block_size
    rows = [sequence.row for sequence in group.placed]
    length = min(group.num_prompt_tokens + group.max_tokens, memory.tables.shape[1] * S)
    most = worst_case_blocks(group.num_prompt_tokens, group.num_seqs, length, S)
    assert np.count_nonzero(np.unique(memory.tables[rows])) <= most
    users: dict[tuple[int, int], list[TokenSequence]] = {}
    for sequence in group.placed:
        for index, block in enumerate(memory.tables[sequence.row].tolist()):
            if block and block not in full:
                users.setdefault((index, block), []).append(sequence)
    assert len({block for _, block in users}) == len(users), "a block in two places"
    for (index, _), sequences in users.items():
        for a, b in itertools.pairwise(sequences):
            known = min(a.progress.num_dispatched, b.progress.num_dispatched, (index + 1) * S)
            known = min(len(a.token_ids), len(b.token_ids), known)
            assert a.token_ids[:known] == b.token_ids[:known], "a block of two contents"
        if group.beams is not None:
            continue  # beams inherit blocks that others have written, and copy them to go on
        # Whoever writes behind what it began with is alone, but for those that begin behind it.
        end = (index + 1) * S
        writers = [
            s
            for s in sequences
            if _first_written(s, index * S) < min(s.progress.num_dispatched, end)
        ]
        readers = [s for s in sequences if s.num_shared >= end]
        assert not writers or len(writers) + len(readers) == len(sequences), "written and shared"
        assert len(writers) <= 1, "written by several"
    if group.beams is None and not group.num_preemptions:
        _check_lineage(group, S, users, full, memory)
    return len(users)


def _first_written(sequence: TokenSequence, start: int) -> int:
    return max(start, sequence.num_prompt_tokens, sequence.num_shared)


def _check_lineage(
    group: SequenceGroup,
    S: int,
    users: dict[tuple[int, int], list[TokenSequence]],
    full: set[int],
    memory: BlockTableMemory,
) -> None:
    """Checks the count for a group in its first life: forks share the prompt, and nothing else."""
    lineage = set()
    for sequence in group.placed:
        blocks = memory.tables[sequence.row].tolist()
        for index in range(blocks_for(sequence.progress.num_reserved, S)):
            if blocks[index] not in full:
                is_prompt = (index + 1) * S <= group.num_prompt_tokens
                untouched = sequence.progress.num_reserved == group.num_prompt_tokens
                lineage.add((index, None if is_prompt or untouched else sequence.index))
    assert len(users) == len(lineage), f"{users} instead of {lineage}"


def _check_stats(
    scheduler: Scheduler,
    memory: BlockTableMemory,
    placed: list[TokenSequence],
    num_entries: int,
    num_blocks: int,
) -> None:
    """Compares `kv_stats` with counts taken one block after the other."""
    S, stats = memory.block_size, kv_stats(memory, scheduler)
    tokens: dict[int, int] = {}
    users: dict[int, int] = {}
    for sequence in placed:
        for index in range(blocks_for(sequence.progress.num_reserved, S)):
            block = int(memory.tables[sequence.row, index])
            users[block] = users.get(block, 0) + 1
            filled = min(S, max(0, sequence.progress.num_dispatched - index * S))
            tokens[block] = max(tokens.get(block, 0), filled)
    assert stats.num_table_entries == num_entries
    assert stats.num_allocated_blocks == num_blocks == len(users)
    assert stats.num_shared_blocks == sum(count > 1 for count in users.values())
    assert stats.num_token_slots == sum(tokens.values())
    assert stats.num_wasted_slots == num_blocks * S - sum(tokens.values())
    slots = num_blocks * S
    assert stats.token_share == (sum(tokens.values()) / slots if slots else 1)
    asked = stats.num_queried_tokens
    assert stats.hit_rate == (stats.num_hit_tokens / asked if asked else 0)
    assert 0 <= stats.hit_rate <= 1
    assert stats.saved_share == (1 - num_blocks / num_entries if num_entries else 0)
    assert stats.num_free_blocks == np.count_nonzero(memory.state.ref_counts[1:] == 0)
    cached = () if memory.prefix_cache is None else np.flatnonzero(memory.prefix_cache.is_cached)
    assert stats.num_cached_blocks == len({int(block) for block in cached} - users.keys())
    assert stats.num_pinned_blocks == len(set(memory.pins))
    total = stats.num_allocated_blocks + stats.num_cached_blocks + stats.num_free_blocks
    assert total == stats.num_blocks == memory.num_usable_blocks
    assert stats.num_swaps + stats.num_recomputations == scheduler.num_preemptions
    assert stats.num_swapped_blocks == scheduler.host_pool.num_used
