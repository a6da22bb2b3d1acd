"""Breaks the sharing of blocks, and what happens when they run out, on purpose.

python -m tests.engine.mutate_sharing            # all of them, about half a minute each
python -m tests.engine.mutate_sharing root ...   # some, by name
"""

import sys

from tests.mutations import Mutation, run

_TABLES = "pallas_paged/block_tables.py"
_DISPLACING = "pallas_paged/engine/core/displacing.py"
(
    _ADMISSION,
    _CACHE,
    _COMMITTER,
    _ENGINE,
    _ENTRIES,
    _MEMORY,
    _OUTPUTS,
    _POLICIES,
    _POOL,
    _RUNNER,
    _SCHEDULER,
    _SHARING,
    _STATS,
    _SWAPPING,
    _PLANNER,
    _EDITS,
    _QUEUES,
    _LOOP,
    _SEQUENCE,
    _COLUMNS,
    _PREFIXES,
) = (
    f"pallas_paged/engine/{name}.py"
    for name in (
        "core/admission",
        "kv/prefix_cache",
        "core/committer",
        "engine",
        "core/entries",
        "kv/block_memory",
        "text/output_processor",
        "core/policies",
        "kv/host_pool",
        "device/runner",
        "core/scheduler",
        "kv/sharing",
        "kv/stats",
        "core/swapping",
        "core/planner",
        "core/table_edits",
        "core/queues",
        "core/engine_core",
        "core/request",
        "core/row_columns",
        "core/common_prefixes",
    )
)
_BUILD, _RECOVERY = (
    f"pallas_paged/engine/{name}.py" for name in ("build", "device/recovery_costs")
)
_COSTS = "tests/engine/test_recovery_costs.py"
_UNIT = (
    "tests/engine/test_memory.py tests/engine/test_scheduler.py "
    "tests/engine/test_sharing.py::TestEqualBlocks"
)
_INTERRUPTS = "tests/engine/test_interrupts.py"
_MOVES = "tests/engine/test_cache_specs.py"
_PLANS = "tests/engine/test_plan.py"
_PROCESSOR = "tests/engine/test_output_processor.py"
_DELTAS = "tests/engine/test_core.py::test_each_delta_has_the_metrics_of_its_moment"
_LIVES = "tests/engine/test_scheduler_stateful.py"
_SENT = "tests/engine/test_table_edits.py"
_TOGETHER = "tests/engine/test_common_prefixes.py"
_WINDOW = "tests/engine/test_sliding_window.py"
_HITS, _PINS, _EVICTION = (
    f"tests/engine/test_prefix_caching.py::Test{name}" for name in ("Hits", "Pins", "Eviction")
)
_OUT, _IN, _COPY = (
    "        for move in plan.swap_outs:\n"
    "            chunk = self.block_programs.swap_out(self.kv_caches, move)\n"
    "            self._chunks[move.chunk.number] = chunk\n",
    "        for move in plan.swap_ins:\n"
    "            chunk = self._chunks.pop(move.chunk.number)\n"
    "            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move, chunk)\n",
    "        if len(plan.copies.src):\n"
    "            self.kv_caches = self.block_programs.copy(self.kv_caches, plan.copies)\n",
)

_GROWN, _COPIED = "(self.num_blocks > num_before)", "(np.asarray(result.copy_dst) > 0)"

MUTATIONS = {
    "a new row not sent to the device": Mutation(
        _MEMORY, "        self._versions[rows] += 1\n", "", _SENT
    ),
    "an appended block not sent": Mutation(_MEMORY, f"{_GROWN} | {_COPIED}", _COPIED, _SENT),
    "a copied block not sent": Mutation(_MEMORY, f"{_GROWN} | {_COPIED}", _GROWN, _SENT),
    "a fork's blocks not sent": Mutation(
        _MEMORY, "        self._versions[children] += 1\n", "", _SENT
    ),
    "a block that was given back left on the device": Mutation(
        _MEMORY, "        self._versions += counts > 0\n", "", _SENT
    ),
    "a block in another's place not sent": Mutation(
        _MEMORY, "        self._versions += 1  # it is rare", "        pass  # it is rare", _SENT
    ),
    "what is sent forgotten": Mutation(_EDITS, "        sent[places] = blocks\n", "", _SENT),
    "null blocks taken as known": Mutation(
        _EDITS, "np.full_like(memory.tables, -1)", "np.zeros_like(memory.tables)", _SENT
    ),
    "padding in the first row": Mutation(_EDITS, "edit[0] = self._sent.size", "pass", _SENT),
    "tables taken as known after a reset": Mutation(
        _PLANNER,
        "        self._table_edits = TableEdits(self._memory)\n",
        "        self.__dict__.setdefault('_table_edits', TableEdits(self._memory))\n",
        "tests/engine/test_core.py",
    ),
    "edits before a step left out": Mutation(
        _RUNNER,
        "self.rows = self.programs.edit_tables(self.rows, self._placement.put_inputs(edit))",
        "pass",
        _PLANS,
    ),
    "rows that a failed step took": Mutation(
        _RUNNER,
        "        self.row_state = None\n        self.rows = self._fresh_rows()\n",
        "        self.row_state = None\n",
        "tests/engine/test_step.py",
    ),
    "no copy on write": Mutation(
        _TABLES,
        "copies = shared & ~(leaving & (keeper[last_block] == rows))",
        "copies = shared & ~shared",
        _UNIT,
    ),
    "a fork without references": Mutation(
        _TABLES,
        'ref_counts=write(state.ref_counts, blocks, 1, referenced, "add"),',
        "ref_counts=state.ref_counts,",
        _UNIT,
    ),
    "free blocks freed again": Mutation(
        _TABLES,
        "freed = select(was_referenced & (ref_counts == 0))",
        "freed = select(ref_counts == 0)",
        _UNIT,
    ),
    "the block in another's place without references": Mutation(
        _TABLES, 'ref_counts = scatter(ref_counts, tables, 1, changed, "add")', "pass", _UNIT
    ),
    "blocks remembered before they are computed": Mutation(
        _COMMITTER,
        "row, end = sequence.group, sequence.row, sequence.progress.num_computed // S",
        "row, end = sequence.group, sequence.row, sequence.progress.num_dispatched // S",
        f"{_HITS} {_LIVES}",
    ),
    "blocks not found before they are committed": Mutation(
        _SCHEDULER,
        "        enter_dispatched(self.memory, self._columns, step.batch)\n",
        "",
        _TOGETHER,
    ),
    "blocks of tokens that are not known entered": Mutation(
        _PREFIXES,
        "np.minimum(columns.num_dispatched[rows], columns.num_known[rows])",
        "columns.num_dispatched[rows]",
        f"tests/engine/test_scheduler_steps.py {_LIVES}",
    ),
    "blocks replaced that a step is about to write": Mutation(
        _PREFIXES, "merges=False", "merges=group.reads_cache", _UNIT
    ),
    "nobody waits for another's blocks": Mutation(
        _SCHEDULER,
        "if not displaces and coming.holds_back(group, arrival.hits[0]):",
        "if False:",
        _TOGETHER,
    ),
    "who enters in the same step not waited for": Mutation(
        _SCHEDULER, "            coming.add(group, arrival.hits)\n", "", _TOGETHER
    ),
    "the urgent wait for others": Mutation(
        _PREFIXES,
        "return owner is not None and key(owner) < key(group)",
        "return owner is not None",
        _TOGETHER,
    ),
    "waiting for what is never entered": Mutation(
        _PREFIXES,
        "if not self._is_on or not group.writes_cache or group.swapped is not None:",
        "if not self._is_on or group.swapped is not None:",
        _TOGETHER,
    ),
    "waiting for what is not read": Mutation(
        _PREFIXES,
        "if not self._is_on or not group.reads_cache or group.swapped is not None:",
        "if not self._is_on or group.swapped is not None:",
        _TOGETHER,
    ),
    "preempted though the head waits for another's blocks": Mutation(
        _DISPLACING,
        "if coming.holds_back(head, admission.hits(head)[0]):",
        "if False:",
        _TOGETHER,
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
    "a root ignored": Mutation(
        _CACHE,
        "parent: Parent = known[-1].block if known else First(root)",
        "parent: Parent = known[-1].block if known else First(None)",
        _HITS,
    ),
    "one block matched too many": Mutation(
        _CACHE,
        "return blocks_for(num_tokens, block_size) - 1",
        "return num_tokens // block_size",
        _HITS,
    ),
    "hits evicted to make room": Mutation(
        _MEMORY, "keep=set(blocks[blocks > 0].tolist())", "keep=()", f"{_UNIT} {_LIVES}"
    ),
    "hits counted as free": Mutation(
        _ADMISSION,
        "needed += self.memory.num_unreferenced(list(itertools.chain(*hits)), room.freed_rows)",
        "needed += 0",
        f"{_UNIT} {_LIVES}",
    ),
    "the wrong slots in host memory": Mutation(
        _SWAPPING,
        "sequence.swapped_slots = tuple(slots[block] for block in blocks)",
        "sequence.swapped_slots = tuple(range(len(blocks)))",
        f"{_UNIT} {_LIVES}",
    ),
    "blocks swapped in the wrong order": Mutation(
        _SWAPPING,
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
        _POOL, "if self.num_used + size > self.num_blocks:", "if False:", _UNIT
    ),
    "host memory kept after an abort": Mutation(
        _COMMITTER,
        "self._host_pool.give_back(group.swapped, is_read=False)\n",
        "pass\n",
        _UNIT,
    ),
    "bytes kept on the device after an abort": Mutation(
        _RUNNER, "self._chunks.pop(number, None)", "pass", _PLANS
    ),
    "blocks swapped in before others are swapped out": Mutation(
        _RUNNER,
        f"{_OUT}{_IN}",
        f"{_IN}{_OUT}",
        _MOVES,
    ),
    "blocks copied before they are swapped in": Mutation(
        _RUNNER,
        f"{_IN}{_COPY}",
        f"{_COPY}{_IN}",
        _MOVES,
    ),
    "no watermark": Mutation(
        _SCHEDULER,
        "spared = self.watermark_blocks if self.queues.running or arrivals else 0",
        "spared = 0",
        _UNIT,
    ),
    "no watermark beside those that stay": Mutation(
        _DISPLACING,
        "watermark_blocks if staying else 0,",
        "0,",
        _UNIT,
    ),
    "the first preempted, not the last": Mutation(
        _POLICIES, "return running[-1]", "return running[0]", _UNIT
    ),
    "the dearer recovery": Mutation(
        _POLICIES,
        "faster = self.swap_s(num_blocks) <",
        "faster = self.swap_s(num_blocks) >",
        _COSTS,
    ),
    "the padding of a swap not counted": Mutation(
        _BUILD,
        "return host_pool.padded(num_blocks_to_swap(group, memory.tables, config.block_size))",
        "return num_blocks_to_swap(group, memory.tables, config.block_size)",
        _COSTS,
    ),
    "measured although it was not asked for": Mutation(
        _BUILD,
        'if config.preemption_mode == "swap":\n',
        'measured_costs(runner, 99)\n    if config.preemption_mode == "swap":\n',
        _COSTS,
    ),
    "a measured step writes into a block": Mutation(
        _RECOVERY, "= x.positions[:T] % S", "= x.positions[:T] % S + S", _COSTS
    ),
    "a measured step samples into a row": Mutation(
        _RECOVERY, "x.rows[:], x.sample_rows[:] = padding, padding", "x.rows[:] = padding", _COSTS
    ),
    "a measured swap brings blocks back elsewhere": Mutation(
        _RECOVERY,
        "swap_in(runner.kv_caches, move, chunk)",
        "swap_in(runner.kv_caches, move._replace(block_ids=np.roll(block_ids, 1)), chunk)",
        _COSTS,
    ),
    "a measured prompt in steps as large as can be": Mutation(
        _RECOVERY,
        "start + runner.buckets.worth_while(min(most, num_tokens - start), 0)",
        "start + min(most, num_tokens - start)",
        _COSTS,
    ),
    "equals displaced": Mutation(
        _POLICIES,
        "return waiting.priority < running.priority",
        "return waiting.priority <= running.priority",
        f"{_UNIT} {_LIVES}",
    ),
    "preempted though the head will not fit": Mutation(
        _DISPLACING,
        "if not fits(len(victims)):\n        return []",
        "pass",
        _UNIT,
    ),
    "preempted though the others grow into it": Mutation(
        _DISPLACING,
        "admission.memory.space(freed_rows, *growth)",
        "admission.memory.space(freed_rows, (), ())",
        _UNIT,
    ),
    "preempted though the head gets no token": Mutation(
        _DISPLACING,
        "if size.left_beside(admission.columns, planned) <= 0:",
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
        "self.pins, self.pinned = collections.Counter(), collections.Counter()\n",
        "pass\n",
        _INTERRUPTS,
    ),
    "an interrupted recovery forgotten": Mutation(
        _ENGINE,
        "if self._failure is not None:\n            self._fail_all(self._failure)",
        "pass",
        _INTERRUPTS,
    ),
    "what an output has held given out once more": Mutation(
        _OUTPUTS, "request.is_given = True", "pass", _PROCESSOR
    ),
    "a stop string not looked for in a token alone": Mutation(
        _OUTPUTS, "            and not params.stop\n", "", _PROCESSOR
    ),
    "a preemption not told with the next token": Mutation(
        _SEQUENCE, "columns.has_told[row] = False", "pass", _DELTAS
    ),
    "nothing counts as computed": Mutation(
        _COMMITTER, "columns.num_computed[rows[here]] = ends[here]", "pass", _UNIT
    ),
    "counts written for who has the row now": Mutation(
        _COMMITTER,
        "columns.num_computed[rows[here]] = ends[here]",
        "columns.num_computed[rows] = ends",
        _LIVES,
    ),
    "a row that is never empty": Mutation(_COLUMNS, "self.numbers[row] = -1", "pass", _UNIT),
    "a late token that stays on its way": Mutation(
        _COMMITTER, "sequence.num_late = max(0, sequence.num_late - num_steps)", "pass", _UNIT
    ),
    "a late step waited for in vain": Mutation(
        _COMMITTER, "sequence.group.is_in_flight = False", "pass", _UNIT
    ),
    "a late step not waited for": Mutation(
        _SCHEDULER, "group.is_in_flight = any(", "group.is_in_flight = False and any(", _UNIT
    ),
    "several tokens told as one": Mutation(
        _COMMITTER, "columns.has_told[row] &= columns.is_held[row]", "pass", _UNIT
    ),
    "tokens of held groups told": Mutation(
        _COMMITTER, "is_told & ~columns.is_held[rows]", "is_told", "tests/engine/test_core.py"
    ),
    "sequences that never fork": Mutation(
        _QUEUES,
        "self._num_rows = self._are_forked = None\n\n    def add",
        "self._num_rows = None\n\n    def add",
        _UNIT,
    ),
    "back before its earlier life is over": Mutation(
        _SCHEDULER,
        "if budget <= 0 or group.is_in_flight:",
        "if budget <= 0:",
        f"{_UNIT} {_LIVES}",
    ),
    "no check of the worst case": Mutation(
        _ADMISSION,
        "if num_blocks + others > self.memory.num_usable_blocks:",
        "if False:",
        _UNIT,
    ),
    "the worst case of one sequence": Mutation(
        _SHARING,
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
        "if group.num_rows > room.num_rows:\n            return None",
        "pass",
        f"{_UNIT} {_LIVES}",
    ),
    "admitted though the blocks are too few": Mutation(
        _ADMISSION,
        "return Arrival(group, entry, hits) if fits else None",
        "return Arrival(group, entry, hits)",
        _UNIT,
    ),
    "no blocks kept free for copies": Mutation(
        _ENTRIES, "num_spares = group.num_rows - len(placed)", "num_spares = 0", _UNIT
    ),
    "cached tokens counted wrong": Mutation(
        _ADMISSION,
        "num_cached = entry.branches[0].num_shared",
        "num_cached = group.num_prompt_tokens",
        _HITS,
    ),
    "cached tokens counted again after a preemption": Mutation(
        _ADMISSION,
        "if group.num_preemptions == 0 and group.reads_cache:",
        "if group.reads_cache:",
        f"{_UNIT} {_HITS}",
    ),
    "equal blocks of a request left apart": Mutation(
        _COMMITTER, "self._memory.replace(repeated)", "pass", _UNIT
    ),
    "equal blocks of two requests left apart": Mutation(
        _COMMITTER,
        "group.cache_root, group.reads_cache))",
        "group.cache_root, False))",
        _UNIT,
    ),
    "blocks given to a request that reads none": Mutation(
        _COMMITTER,
        "group.cache_root, group.reads_cache))",
        "group.cache_root, True))",
        _UNIT,
    ),
    "a new block kept instead of the cached one": Mutation(
        _ENTRIES,
        "key=lambda s: not is_cached[tables[s.row, place]]",
        "key=lambda s: bool(is_cached[tables[s.row, place]])",
        _UNIT,
    ),
    "a block that is cached replaced by another": Mutation(
        _ENTRIES,
        "in sorted(having, key=lambda s: not is_cached[tables[s.row, place]]):",
        "in having:",
        _UNIT,
    ),
    "a block given back that the window still touches": Mutation(
        _SHARING,
        "return blocks_for(sliding_window, block_size)",
        "return max(1, sliding_window // block_size)",
        f"{_LIVES} {_WINDOW}",
    ),
    "given back, and its references kept": Mutation(
        _TABLES,
        "release(state, blocks),\n        tables=write(tables, dropped.places, NULL_BLOCK, "
        "dropped.valid).reshape(R, M),\n    )",
        "state,\n        tables=write(tables, dropped.places, NULL_BLOCK, "
        "dropped.valid).reshape(R, M),\n    )",
        _UNIT,
    ),
    "blocks in use left cached behind an evicted one": Mutation(
        _CACHE,
        "                for each in in_use:\n                    self._forget(each)\n",
        "",
        f"{_EVICTION} {_LIVES}",
    ),
    "forgotten blocks in use still held": Mutation(
        _CACHE, "forgotten += in_use", "pass", f"{_EVICTION} {_LIVES}"
    ),
    "hits beside what was swapped out without its first blocks": Mutation(
        _ADMISSION,
        "if any(slot == DROPPED for other in group.live for slot in other.swapped_slots[:1]):",
        "if False:",
        _WINDOW,
    ),
    "unwritten blocks read behind one that has ended": Mutation(
        _ENTRIES, "if other.leader is leader and other.num_shared > done:", "if False:", _UNIT
    ),
    "blocks behind those that are gone taken for equal": Mutation(
        _ENTRIES,
        "if block == GIVEN_BACK or (place and before == GIVEN_BACK):",
        "if block == GIVEN_BACK:",
        f"{_LIVES} {_WINDOW}",
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
