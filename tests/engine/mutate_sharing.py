"""Breaks the sharing of blocks, and what happens when they run out, on purpose.

python -m tests.engine.mutate_sharing            # all of them, about half a minute each
python -m tests.engine.mutate_sharing root ...   # some, by name
"""

import sys

from tests.mutations import Mutation, run

_TABLES = "pallas_paged/block_tables.py"
_ADMISSION, _CACHE, _CORE, _GROUPS, _MEMORY, _POLICIES, _RUNNER, _SCHEDULER, _STATS, _SWAP = (
    f"pallas_paged/engine/{name}.py"
    for name in (
        "admission",
        "prefix_cache",
        "core",
        "groups",
        "memory",
        "policies",
        "runner",
        "scheduler",
        "kv_stats",
        "swap",
    )
)
_UNIT = (
    "tests/engine/test_memory.py tests/engine/test_scheduler.py "
    "tests/engine/test_sharing.py::TestEqualBlocks"
)
_INTERRUPTS = "tests/engine/test_interrupts.py"
_RECOVERY = "tests/engine/test_recovery.py"
_LIVES = "tests/engine/test_scheduler_stateful.py"
_HITS, _PINS, _EVICTION = (
    f"tests/engine/test_prefix_caching.py::Test{name}" for name in ("Hits", "Pins", "Eviction")
)

MUTATIONS = {
    "no copy on write": Mutation(
        _TABLES,
        "copies = shared & ~(leaving & (keeper[last_block] == rows))",
        "copies = shared & ~shared",
        _UNIT,
    ),
    "a fork without references": Mutation(
        _TABLES,
        'ref_counts=scatter(state.ref_counts, blocks, 1, referenced, "add"),',
        "ref_counts=state.ref_counts,",
        _UNIT,
    ),
    "free blocks freed again": Mutation(
        _TABLES,
        "freed = select((state.ref_counts > 0) & (ref_counts == 0))",
        "freed = select(ref_counts == 0)",
        _UNIT,
    ),
    "the block in another's place without references": Mutation(
        _TABLES, 'ref_counts = scatter(ref_counts, tables, 1, changed, "add")', "pass", _UNIT
    ),
    "blocks remembered before they are computed": Mutation(
        _SCHEDULER,
        "row, end = sequence.group, sequence.row, sequence.num_computed // S",
        "row, end = sequence.group, sequence.row, sequence.num_dispatched // S",
        f"{_HITS} {_LIVES}",
    ),
    "the root evicted before its leaves": Mutation(
        _CACHE,
        "leaves = np.flatnonzero(candidates & (self._num_children == 0)).tolist()",
        "leaves = np.flatnonzero(candidates).tolist()",
        _EVICTION,
    ),
    "the last used evicted first": Mutation(
        _CACHE,
        "queue = [(int(self._last_used[block]), block) for block in leaves]",
        "queue = [(-int(self._last_used[block]), block) for block in leaves]",
        _EVICTION,
    ),
    "blocks in use evicted": Mutation(
        _CACHE,
        "return self.is_cached & (ref_counts == 1)",
        "return self.is_cached & (ref_counts >= 1)",
        _EVICTION,
    ),
    "a pin without references": Mutation(
        _MEMORY,
        "self.state = block_tables.hold(self.state, np.array(blocks, np.int32))\n",
        "pass\n",
        _PINS,
    ),
    "a salt ignored": Mutation(
        _CACHE,
        "parent: Parent = known[-1].block if known else salt",
        "parent: Parent = known[-1].block if known else None",
        _HITS,
    ),
    "one block matched too many": Mutation(
        _CACHE,
        "return blocks_for(num_tokens, block_size) - 1",
        "return num_tokens // block_size",
        _HITS,
    ),
    "hits evicted to make room": Mutation(
        _MEMORY, "keep=existing)", "keep=())", f"{_UNIT} {_LIVES}"
    ),
    "hits counted as free": Mutation(
        _ADMISSION,
        "needed += self.memory.num_unreferenced(list(itertools.chain(*hits)), places.freed_rows)",
        "needed += 0",
        f"{_UNIT} {_LIVES}",
    ),
    "the wrong slots in host memory": Mutation(
        _SWAP,
        "sequence.swapped_slots = tuple(slots[block] for block in blocks)",
        "sequence.swapped_slots = tuple(range(len(blocks)))",
        f"{_UNIT} {_LIVES}",
    ),
    "blocks swapped in the wrong order": Mutation(
        _SWAP,
        "block = tables[sequence.row, index]",
        "block = tables[sequence.row, len(sequence.swapped_slots) - 1 - index]",
        f"{_UNIT} {_LIVES}",
    ),
    "hits past what was swapped out": Mutation(
        _ADMISSION,
        "return hits[: sequence.num_swapped // self.memory.block_size]",
        "return hits",
        f"{_UNIT} {_LIVES}",
    ),
    "host memory without bounds": Mutation(
        _SWAP, "if self.num_used + size > self.num_blocks:", "if False:", _UNIT
    ),
    "host memory kept after an abort": Mutation(
        _SCHEDULER,
        "self._waiting.remove(group)\n        self.host_pool.give_back(group)",
        "self._waiting.remove(group)",
        _UNIT,
    ),
    "blocks swapped in before others are swapped out": Mutation(
        _RUNNER,
        "        for move in step.swap_outs:\n"
        "            self.block_programs.swap_out(self.kv_caches, move)\n"
        "        for move in step.swap_ins:\n"
        "            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move)\n",
        "        for move in step.swap_ins:\n"
        "            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move)\n"
        "        for move in step.swap_outs:\n"
        "            self.block_programs.swap_out(self.kv_caches, move)\n",
        _RECOVERY,
    ),
    "blocks copied before they are swapped in": Mutation(
        _RUNNER,
        "        for move in step.swap_ins:\n"
        "            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move)\n"
        "        if len(step.copies.src):\n"
        "            self.kv_caches = self.block_programs.copy(self.kv_caches, step.copies)\n",
        "        if len(step.copies.src):\n"
        "            self.kv_caches = self.block_programs.copy(self.kv_caches, step.copies)\n"
        "        for move in step.swap_ins:\n"
        "            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move)\n",
        _RECOVERY,
    ),
    "no watermark": Mutation(
        _SCHEDULER,
        "num_blocks - (self.watermark_blocks if groups else 0),",
        "num_blocks,",
        _UNIT,
    ),
    "the first preempted, not the last": Mutation(
        _POLICIES, "return running[-1]", "return running[0]", _UNIT
    ),
    "equals displaced": Mutation(
        _POLICIES,
        "return waiting.priority < running.priority",
        "return waiting.priority <= running.priority",
        f"{_UNIT} {_LIVES}",
    ),
    "preempted though the head will not fit": Mutation(
        _SCHEDULER,
        "if not fits(len(victims)):\n            return []",
        "pass",
        _UNIT,
    ),
    "preempted though the others grow into it": Mutation(
        _SCHEDULER,
        "self.memory.num_free_after(freed_rows, rows, list(growth.values()))",
        "self.memory.num_free_after(freed_rows, (), ())",
        _UNIT,
    ),
    "preempted though the head gets no token": Mutation(
        _SCHEDULER,
        "if sum(count for _, count in planned) == self.max_num_batched_tokens:",
        "if False:",
        _UNIT,
    ),
    "the head's blocks counted as the victims'": Mutation(
        _MEMORY,
        "ref_counts = np.asarray(self._without(freed_rows).ref_counts)",
        "ref_counts = self._ref_counts",
        _UNIT,
    ),
    "hits of before that are gone": Mutation(
        _CACHE,
        "while known and self._keys.get(known[-1].block) is not known[-1].key:",
        "while False:",
        f"{_EVICTION} {_LIVES}",
    ),
    "an entry planned for other hits": Mutation(
        _ADMISSION,
        "basis = group.swapped, group.num_rows, lengths, hits",
        "basis = group.swapped, group.num_rows, lengths",
        _LIVES,
    ),
    "a block left to an interrupted verb": Mutation(
        _MEMORY,
        "self.pins, self._pinned = collections.Counter(), collections.Counter()\n",
        "pass\n",
        _INTERRUPTS,
    ),
    "an interrupted recovery forgotten": Mutation(
        _CORE,
        "if self._failure is not None:\n            self._fail_all(self._failure)",
        "pass",
        _INTERRUPTS,
    ),
    "tokens given out before they are taken in": Mutation(
        _CORE,
        "if group.beams is not None or completion.num_tokens < sequence.num_output_tokens:",
        "if group.beams is not None:",
        _INTERRUPTS,
    ),
    "back before its earlier life is over": Mutation(
        _SCHEDULER,
        "if _is_in_flight(group):\n                break",
        "if False:\n                break",
        f"{_UNIT} {_LIVES}",
    ),
    "no check of the worst case": Mutation(
        _ADMISSION,
        "if num_blocks + others > self.memory.num_usable_blocks:",
        "if False:",
        _UNIT,
    ),
    "the worst case of one sequence": Mutation(
        _GROUPS,
        "return common + num_seqs * (blocks_for(max_len, block_size) - common)",
        "return common + (blocks_for(max_len, block_size) - common)",
        f"{_UNIT} {_LIVES}",
    ),
    "pins forgotten in the worst case": Mutation(
        _ADMISSION,
        "num_blocks, others = self._worst_case(group), self._pinned_for_others(group)",
        "num_blocks, others = self._worst_case(group), 0",
        _PINS,
    ),
    "a part of a group admitted": Mutation(
        _ADMISSION,
        "if group.num_rows > places.num_rows:\n            return None",
        "pass",
        f"{_UNIT} {_LIVES}",
    ),
    "admitted though the blocks are too few": Mutation(
        _ADMISSION,
        "return Arrival(group, entry, hits, needed) if needed <= places.num_blocks else None",
        "return Arrival(group, entry, hits, needed)",
        _UNIT,
    ),
    "no blocks kept free for copies": Mutation(
        _GROUPS, "num_spares = group.num_rows - len(placed)", "num_spares = 0", _UNIT
    ),
    "cached tokens counted wrong": Mutation(
        _ADMISSION,
        "group.num_cached_tokens = entry.branches[0].num_shared",
        "group.num_cached_tokens = group.num_prompt_tokens",
        _HITS,
    ),
    "cached tokens counted again after a preemption": Mutation(
        _ADMISSION,
        "if group.num_preemptions == 0 and group.reads_cache:",
        "if group.reads_cache:",
        f"{_UNIT} {_HITS}",
    ),
    "equal blocks of a request left apart": Mutation(
        _SCHEDULER, "self.memory.replace(repeated)", "pass", _UNIT
    ),
    "equal blocks of two requests left apart": Mutation(
        _SCHEDULER,
        "group.cache_salt, group.reads_cache))",
        "group.cache_salt, False))",
        _UNIT,
    ),
    "blocks given to a request that reads none": Mutation(
        _SCHEDULER,
        "group.cache_salt, group.reads_cache))",
        "group.cache_salt, True))",
        _UNIT,
    ),
    "a new block kept instead of the cached one": Mutation(
        _GROUPS, "key=lambda index: not is_told[index]", "key=lambda index: is_told[index]", _UNIT
    ),
    "shared blocks counted wrong": Mutation(
        _STATS, "np.count_nonzero(users > 1)", "np.count_nonzero(users > 0)", _UNIT
    ),
    "table entries counted once": Mutation(
        _STATS, "num_table_entries=int(users.sum())", "num_table_entries=num_allocated", _UNIT
    ),
    "tokens of shared blocks counted twice": Mutation(
        _STATS, "np.maximum.at(tokens, tables, filled)", "np.add.at(tokens, tables, filled)", _UNIT
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
