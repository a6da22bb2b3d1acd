"""Continuous batching: which tokens of which sequences the next step computes.

The scheduler decides once per step. It may run one step ahead of the device: step n + 1 is
scheduled while step n computes, so a sequence can be continued from a token that only the device
knows yet. The device executes steps in order, which is why blocks may be given back, and taken by
the next step, while a step that uses them is still in flight.

It moves whole groups: the sequences of a request are admitted, preempted and recomputed together.

Why every request finishes: groups are admitted in order of arrival and preempted in the reverse
order, so the running groups are always the earliest ones. The earliest of all is preempted only
when it runs alone, and alone it fits, or `add` had refused it.
"""

import bisect
import collections
import collections.abc
import itertools
from typing import TYPE_CHECKING, NamedTuple

from pallas_paged.engine.groups import (
    NO_COPIES,
    CopyPairs,
    Entry,
    FullBlocks,
    RowPlan,
    plan_entry,
    sequences_to_place,
    worst_case_blocks,
)
from pallas_paged.engine.policies import (
    ChooseRecovery,
    Order,
    always_recompute,
    choose_victim,
    next_to_admit,
)
from pallas_paged.engine.scheduled import ScheduledSequence, ScheduledStep
from pallas_paged.engine.sequence import FinishReason, Sequence, SequenceGroup, SequenceStatus
from pallas_paged.engine.swap import BlockMove, HostPool, plan_return, swap_in, swap_out

if TYPE_CHECKING:  # the protocol's module also holds the implementation, which imports jax
    from pallas_paged.engine.memory import Memory

type Plan = list[tuple[Sequence, int]]
"""How many tokens of which sequences to compute, group by group."""


class _Arrival(NamedTuple):
    """A waiting group that fits: its blocks, those of them that are cached, how many it takes."""

    group: SequenceGroup
    entry: Entry
    hits: list[list[int]]
    num_blocks: int


class _Admitted(NamedTuple):
    planned: Plan
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs


class Scheduler:
    """Continuous batching of groups, with chunked prefill and preemption of whole groups.

    The engine's loop is `step = schedule()`, dispatch, then `commit` of the *previous* step; or of
    this one, to run without overlap. Steps are committed in the order in which they were scheduled.

    Args:
      memory: the block tables, with `max_num_seqs` rows, each wide enough for `max_model_len`.
      max_num_seqs: the most sequences that run at once.
      max_num_batched_tokens: the most tokens of a step. Longer prompts are computed in chunks.
      max_model_len: the most tokens of a sequence, prompt and output; there it ends by "length".
      watermark_blocks: blocks that admission leaves free while other groups run, so that they
        can grow before anyone is preempted. None: one in a hundred, at least one.
      order: who runs, and comes back, before whom; see `policies`.
      choose_recovery: whether a group that loses its blocks is computed again or swapped out.
      host_pool: the host memory that groups are swapped to; None has no room.
    """

    def __init__(
        self,
        memory: "Memory",
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        watermark_blocks: int | None = None,
        order: Order | None = None,
        choose_recovery: ChooseRecovery = always_recompute,
        host_pool: HostPool | None = None,
    ) -> None:
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2),
            ("watermark_blocks", watermark_blocks, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.memory = memory
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        if watermark_blocks is None:
            watermark_blocks = max(1, memory.num_usable_blocks // 100)
        self.watermark_blocks = watermark_blocks
        self.num_preemptions = 0
        self._unfinished: dict[str, SequenceGroup] = {}
        self.host_pool = HostPool(0, memory.num_usable_blocks) if host_pool is None else host_pool
        self._order = Order() if order is None else order
        self._choose_recovery = choose_recovery
        self._arrivals = itertools.count()
        self._swap_outs: list[BlockMove] = []  # for the next step
        self._waiting: list[SequenceGroup] = []
        self._running: list[SequenceGroup] = []
        self._in_flight: collections.deque[ScheduledStep] = collections.deque()
        self._step_ids = itertools.count()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is unfinished; the last step may be in flight even if not."""
        return bool(self._unfinished)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, new and preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def row_lens(self) -> dict[int, int]:
        """The tokens of each row in use that are computed, or will be by the step in flight."""
        return {
            sequence.row: sequence.num_dispatched
            for group in self._running
            for sequence in group.placed
            if sequence.row is not None
        }

    def add(self, group: SequenceGroup) -> None:
        """Puts a new group at the end of the queue; raises `ValueError` as `check` does."""
        self.check(group)
        group.arrival = next(self._arrivals)
        self._unfinished[group.request_id] = group
        self._enqueue(group)

    def check(self, group: SequenceGroup) -> None:
        """Tells whether `add` would accept the group; changes nothing.

        Raises:
          ValueError: the request is empty, its id is taken, or it could not run to its end even
            if it had the whole pool for itself.
        """
        name, prompt_len = group.request_id, group.num_prompt_tokens
        if name in self._unfinished:
            raise ValueError(f"request_id={name!r} is taken by an unfinished request; use another")
        if prompt_len == 0:
            raise ValueError(f"request {name!r}: the prompt is empty; give at least one token")
        if group.max_tokens < 1:
            raise ValueError(f"request {name!r}: max_tokens={group.max_tokens} must be at least 1")
        if prompt_len >= self.max_model_len:
            raise ValueError(
                f"request {name!r}: a prompt of {prompt_len} tokens leaves no room for output in "
                f"max_model_len={self.max_model_len}; shorten the prompt or raise max_model_len"
            )
        if group.num_seqs > self.max_num_seqs:
            raise ValueError(
                f"request {name!r}: {group.num_seqs} sequences run together, and max_num_seqs="
                f"{self.max_num_seqs}; ask for fewer completions or raise max_num_seqs"
            )
        num_tokens = self._max_length(group)
        num_blocks = self._worst_case(group)
        others = self.memory.num_pinned_for_others(self._hits(group.sequences[0]))
        if num_blocks + others > self.memory.num_usable_blocks:
            pinned = f" besides {others} pinned for other prompts" if others else ""
            together = f" in each of {group.num_seqs} sequences" if group.num_seqs > 1 else ""
            raise ValueError(
                f"request {name!r}: {prompt_len} prompt tokens and max_tokens={group.max_tokens} "
                f"may take {num_tokens} tokens{together}, {num_blocks} blocks, and the KV cache "
                f"has {self.memory.num_usable_blocks - others}{pinned}; lower max_tokens, shorten "
                "the prompt or enlarge the cache"
            )

    def pin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Keeps the full blocks of a prefix, until `unpin`, however little memory there is.

        Returns False, and changes nothing, if not all of them are cached.

        Raises:
          ValueError: an unfinished request could not run to its end beside them.
        """
        num_blocks = len(token_ids) // self.memory.block_size
        if not self.memory.pin(token_ids, salt):
            return False
        for group in self._unfinished.values():
            others = self.memory.num_pinned_for_others(self._hits(group.sequences[0]))
            if self._worst_case(group) + others > self.memory.num_usable_blocks:
                self.memory.unpin(token_ids, salt)
                raise ValueError(
                    f"pinning {num_blocks} blocks would leave too few of "
                    f"{self.memory.num_usable_blocks} for request {group.request_id!r}; pin fewer "
                    "tokens, wait for the request's end, or enlarge the cache"
                )
        return True

    def unpin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Takes a `pin` back; returns False if there is none."""
        return self.memory.unpin(token_ids, salt)

    def schedule(self) -> ScheduledStep | None:
        """Returns the next step, or None if nothing can be computed now.

        None means that nothing is unfinished, or that the step in flight must be committed first.
        Running groups come first, then those that wait, as far as tokens, rows and blocks
        allow. When the running ones find no blocks to grow, the last of them loses its own, until
        the others fit; it waits at the head of the queue then, and nobody overtakes it.
        """
        assert len(self._in_flight) <= 1, "at most one step may be in flight"
        preempted = self._displace()
        planned = self._plan_running()
        while (copies := self._reserve(planned)) is None:
            preempted.append(self._preempt(choose_victim(self._running)))
            planned = self._plan_running()
        admitted = self._admit(self.max_num_batched_tokens - sum(count for _, count in planned))
        copies = copies.and_then(admitted.copies)
        planned += admitted.planned
        planned = self._fork(planned)
        if not planned:
            assert self._in_flight or not self._unfinished, "nothing to wait for, nothing to do"
            return None
        step = ScheduledStep(
            next(self._step_ids),
            tuple(self._dispatch(sequence, count) for sequence, count in planned),
            sum(count for _, count in planned),
            tuple(self._swap_outs),
            admitted.swap_ins,
            copies,
            tuple(preempted),
        )
        self._swap_outs.clear()
        self._in_flight.append(step)
        return step

    def commit(self, step: ScheduledStep, tokens: collections.abc.Sequence[int]) -> list[Sequence]:
        """Takes a step's results and returns the sequences that got a token, finished or not.

        Tokens for sequences that finished or were aborted after the step was scheduled are
        dropped. A sequence that was preempted meanwhile keeps its token.

        Args:
          step: the earliest uncommitted step.
          tokens: the sampled tokens, aligned with `step.scheduled`; any value where nothing is
            sampled.
        """
        oldest = self._in_flight.popleft()
        assert step is oldest, "steps are committed in order"
        assert len(tokens) == len(step.scheduled), f"{len(tokens)} tokens for {step.scheduled}"
        extended: list[Sequence] = []
        freed_rows: list[int] = []
        full: list[FullBlocks] = []
        for share, token in zip(step.scheduled, tokens, strict=True):
            sequence = share.sequence
            sequence.num_in_flight -= 1
            if sequence.is_finished:
                continue
            if sequence.row is not None:
                sequence.num_computed = share.start + share.num_tokens
                full += self._newly_full(sequence)
            if share.samples:
                sequence.num_pending -= 1
                sequence.token_ids.append(token)
                extended.append(sequence)
                freed_rows += self._finish_if_over(sequence)
        if full:
            self.memory.remember(full)
        if freed_rows:
            self.memory.free(freed_rows)
        return extended

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends a sequence in any state and frees its blocks; does nothing if it has ended.

        But for one thing: a stop string that the last allowed token completed is what ended it.
        """
        if not sequence.is_finished:
            freed_rows = self._retire([sequence], reason, stop_reason)
            if freed_rows:
                self.memory.free(freed_rows)
        elif (sequence.finish_reason, reason) == ("length", "stop"):
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def abort(self, request_id: str) -> None:
        """Ends what runs of a request by "abort"; does nothing if it is unknown or has ended."""
        if request_id in self._unfinished:
            freed_rows = self._retire(self._unfinished[request_id].live, "abort", None)
            if freed_rows:
                self.memory.free(freed_rows)

    def abort_all(self) -> list[SequenceGroup]:
        """Aborts and returns all requests, and forgets the steps in flight.

        For use after an error or an interrupt, wherever it struck: nothing that may be half-changed
        is read, and the scheduler and its memory are empty again.
        """
        aborted = list(self._unfinished.values())
        for group in aborted:
            group.status = SequenceStatus.FINISHED
            for sequence in group.live:
                sequence.finish_reason = "abort"
                sequence.num_pending = 0
                sequence.give_up_blocks()
            self.host_pool.give_back(group)
        for queue in (self._unfinished, self._waiting, self._running, self._in_flight):
            queue.clear()
        self._swap_outs.clear()
        self.memory.free_all()
        return aborted

    def check_invariants(self) -> None:
        """Asserts that the queues, the counts, the steps in flight and the memory agree."""
        queued = [*self._running, *self._waiting]
        assert {id(g) for g in queued} == {id(g) for g in self._unfinished.values()}
        assert len(queued) == len(self._unfinished)
        assert sum(len(group.live) for group in self._running) <= self.max_num_seqs
        used: dict[int, int] = {}
        for group in queued:
            assert group.live
            for sequence in group.live:
                self._check_counts(sequence)
        for group in self._running:
            assert group.status is SequenceStatus.RUNNING
            rows = {s.row: s.num_reserved for s in group.placed if s.row is not None}
            assert len(rows) == len(group.placed)
            assert all(s.row is None for s in group.live if s not in group.placed)
            assert all(s.num_dispatched < s.num_tokens for s in group.live)
            assert not rows.keys() & used.keys()
            used |= rows
        for group in self._waiting:
            swapped = group.swapped is not None
            assert group.status is (SequenceStatus.SWAPPED if swapped else SequenceStatus.WAITING)
            assert all(s.row is None and s.num_reserved == 0 for s in group.sequences)
        for queue in (self._running, self._waiting):
            keys = [self._order.key(group) for group in queue]
            assert keys == sorted(set(keys))
        chunks = [group.swapped.num_blocks for group in queued if group.swapped is not None]
        assert sum(chunks) == self.host_pool.num_used <= self.host_pool.num_blocks
        self.memory.check_invariants(used)

    def _check_counts(self, sequence: Sequence) -> None:
        shares = [
            share
            for step in self._in_flight
            for share in step.scheduled
            if share.sequence is sequence
        ]
        assert sequence.num_in_flight == len(shares)
        assert sequence.num_pending == sum(share.samples for share in shares)
        assert sequence.num_tokens <= self._max_length(sequence.group)
        assert sequence.num_computed <= sequence.num_dispatched <= sequence.num_reserved

    def _worst_case(self, group: SequenceGroup) -> int:
        """Returns the most blocks of the pool that the group can take."""
        num_blocks = worst_case_blocks(
            group.num_prompt_tokens,
            group.num_seqs,
            self._max_length(group),
            self.memory.block_size,
        )
        return self.memory.blocks_taken(num_blocks, group.num_seqs)

    def _max_length(self, group: SequenceGroup) -> int:
        return min(group.num_prompt_tokens + group.max_tokens, self.max_model_len)

    def _plan_running(self) -> Plan:
        """Returns what the running groups compute next, in order of arrival, within the budget."""
        planned: Plan = []
        budget = self.max_num_batched_tokens
        for group in self._running:
            planned_here = self._plan(group, budget)
            planned += planned_here
            budget -= sum(count for _, count in planned_here)
            if not budget:
                break
        return planned

    def _plan(self, group: SequenceGroup, budget: int) -> Plan:
        """Returns what a group's sequences compute next, in their order, within the budget."""
        planned: dict[Sequence, int] = {}
        max_length = self._max_length(group)
        for sequence in group.placed:
            if sequence.num_tokens == max_length:
                continue  # its last token is in flight
            if not _may_start(sequence, planned):
                continue  # what it shares is not computed yet
            count = min(sequence.num_tokens - sequence.num_dispatched, budget)
            if count == 0:
                break
            planned[sequence] = count
            budget -= count
        return list(planned.items())

    def _reserve(self, planned: Plan) -> CopyPairs | None:
        """Allocates what the planned tokens need beyond their sequences' blocks: all or nothing."""
        growth = {
            sequence: sequence.num_dispatched + num_tokens - sequence.num_reserved
            for sequence, num_tokens in planned
            if sequence.num_dispatched + num_tokens > sequence.num_reserved
        }
        rows = [sequence.row for sequence in growth if sequence.row is not None]
        copies = self.memory.append(rows, list(growth.values()))
        if copies is not None:
            for sequence, count in growth.items():
                sequence.num_reserved += count
        return copies

    def _enqueue(self, group: SequenceGroup) -> None:
        bisect.insort(self._waiting, group, key=self._order.key)

    def _displace(self) -> list[SequenceGroup]:
        """Preempts running groups that the head of the queue may displace, until it fits."""
        displaced: list[SequenceGroup] = []
        while self._waiting and self._running:
            head, victim = next_to_admit(self._waiting), choose_victim(self._running)
            if not self._order.may_displace(head, victim) or _is_in_flight(head):
                break
            if self._arrival_of(head, 0, 0) is not None:
                break
            displaced.append(self._preempt(victim))
        return displaced

    def _arrival_of(
        self, group: SequenceGroup, rows_taken: int, blocks_taken: int
    ) -> "_Arrival | None":
        """Returns how a waiting group would come in beside what is taken; None if it cannot."""
        live = group.live
        # What a preempted group still has in flight belongs to its earlier life.
        if _is_in_flight(group):
            return None
        num_running = sum(len(running.live) for running in self._running)
        if num_running + rows_taken + len(live) > self.max_num_seqs:
            return None
        hits = [self._hits(sequence) for sequence in sequences_to_place(group)]
        plan = plan_entry if group.swapped is None else plan_return
        entry = plan(group, hits, self.memory.block_size)
        needed = self.memory.blocks_taken(entry.num_needed, len(live))
        needed += self.memory.num_unreferenced(list(itertools.chain(*hits)))
        spare = self.watermark_blocks if self._running or rows_taken else 0
        if blocks_taken + needed + spare > self.memory.num_free_blocks:
            return None
        return _Arrival(group, entry, hits, needed)

    def _admit(self, budget: int) -> "_Admitted":
        """Moves groups from the queue to the running ones; blocks for all known tokens."""
        arrivals: list[_Arrival] = []
        planned: Plan = []
        rows_taken = blocks_taken = 0
        for group in tuple(self._waiting) if budget else ():
            arrival = self._arrival_of(group, rows_taken, blocks_taken)
            if arrival is None:
                break
            arrivals.append(arrival)
            rows_taken += len(group.live)
            blocks_taken += arrival.num_blocks
            self._enter(arrival)
            planned_here = self._plan(group, budget)
            planned += planned_here
            budget -= sum(count for _, count in planned_here)
            if not budget:
                break
        for arrival in arrivals:
            self._waiting.remove(arrival.group)
            bisect.insort(self._running, arrival.group, key=self._order.key)
            arrival.group.status = SequenceStatus.RUNNING
        if not arrivals:
            return _Admitted(planned, (), NO_COPIES)
        self._give_rows(arrivals)
        return _Admitted(planned, *self._bring_back(arrivals))

    def _enter(self, arrival: "_Arrival") -> None:
        """Lets a group's sequences begin with what they share, found or kept."""
        group, entry = arrival.group, arrival.entry
        for sequence, branch, cached in zip(
            entry.placed, entry.branches, arrival.hits, strict=True
        ):
            sequence.num_shared = sequence.num_dispatched = branch.num_shared
            sequence.num_reserved = len(sequence.token_ids)
            if branch.leader is not None:
                sequence.leader = entry.placed[branch.leader]
            else:
                sequence.num_computed = branch.num_shared
            found = len(cached) if group.swapped else branch.num_shared // self.memory.block_size
            sequence.num_remembered = found
        group.is_forked = len(entry.placed) == len(group.live)
        if group.num_preemptions == 0 and group.reads_cache:
            group.num_cached_tokens = entry.branches[0].num_shared
            self.memory.count_query(group.num_prompt_tokens, group.num_cached_tokens)

    def _give_rows(self, arrivals: list["_Arrival"]) -> None:
        """Allocates the rows of all arrivals at once."""
        placed: list[Sequence] = []
        plans: list[RowPlan] = []
        num_new = 0
        for group, entry, _, _ in arrivals:
            for sequence, branch in zip(entry.placed, entry.branches, strict=True):
                blocks = tuple(b if b > 0 else b - num_new for b in branch.blocks)
                num_tokens = sequence.num_reserved if group.swapped is None else branch.num_shared
                plans.append(RowPlan(num_tokens, blocks))
            num_new += entry.num_new
            placed += entry.placed
        for sequence, row in zip(placed, self.memory.admit(plans), strict=True):
            sequence.row = row

    def _bring_back(self, arrivals: list["_Arrival"]) -> tuple[tuple[BlockMove, ...], CopyPairs]:
        """Says what to copy from the host, and lets the rows grow for what was not kept."""
        swapped = [arrival for arrival in arrivals if arrival.group.swapped is not None]
        if not swapped:
            return (), NO_COPIES
        tables = self.memory.tables
        moves = tuple(swap_in(entry.placed, tables, hits) for _, entry, hits, _ in swapped)
        growing = [sequence for _, entry, _, _ in swapped for sequence in entry.placed]
        copies = self.memory.append(
            [sequence.row for sequence in growing if sequence.row is not None],
            [sequence.num_reserved - sequence.num_shared for sequence in growing],
        )
        assert copies is not None, "admitted without the blocks to grow"
        for arrival in swapped:
            self.host_pool.give_back(arrival.group)
        return moves, copies

    def _hits(self, sequence: Sequence) -> list[int]:
        """Returns the cached blocks that the sequence may begin with."""
        group = sequence.group
        if not group.reads_cache:
            return []
        hits = self.memory.match(sequence.token_ids, group.cache_salt)
        if group.swapped is not None:  # nothing past what it kept
            return hits[: sequence.num_swapped // self.memory.block_size]
        return hits

    def _newly_full(self, sequence: Sequence) -> list[FullBlocks]:
        """Returns the blocks, if any, that its committed tokens have filled since the last time."""
        first, end = sequence.num_remembered, sequence.num_computed // self.memory.block_size
        if end <= first or sequence.row is None or not sequence.group.writes_cache:
            return []
        sequence.num_remembered = end
        salt = sequence.group.cache_salt
        return [FullBlocks(sequence.row, sequence.token_ids, first, end, salt)]

    def _fork(self, planned: Plan) -> Plan:
        """Adds the sequences forked from those that reach the end of their group's prompt."""
        ready = {
            sequence
            for sequence, count in planned
            if not sequence.group.is_forked
            and sequence.num_dispatched + count == sequence.num_tokens
        }
        if not ready:
            return planned
        families: Plan = []
        children, parents = [], []
        for parent, count in planned:
            families.append((parent, count))
            if parent in ready:
                parent.group.is_forked = True
                for child in parent.group.live[1:]:
                    child.num_reserved = child.num_dispatched = parent.num_reserved
                    child.num_remembered = parent.num_reserved // self.memory.block_size
                    families.append((child, 0))
                    children.append(child)
                    parents.append(parent.row)
        rows = self.memory.fork([row for row in parents if row is not None])
        for child, row in zip(children, rows, strict=True):
            child.row = row
        return families

    def _dispatch(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Counts the tokens as dispatched."""
        start, end = sequence.num_dispatched, sequence.num_dispatched + num_tokens
        assert sequence.row is not None
        assert sequence.num_pending <= 1
        share = ScheduledSequence(
            sequence,
            sequence.row,
            start,
            num_tokens,
            samples=end == sequence.num_tokens,
            input_on_device=end > len(sequence.token_ids),
        )
        assert not share.input_on_device or num_tokens == 1
        sequence.num_dispatched = end
        sequence.num_in_flight += 1
        sequence.num_pending += share.samples
        return share

    def _preempt(self, group: SequenceGroup) -> SequenceGroup:
        """Takes all blocks; what is not swapped out starts again, prompt and output as a prompt."""
        self._running.remove(group)
        move = None
        if self._choose_recovery(group) == "swap":
            move = swap_out(group, self.memory.tables, self.memory.block_size, self.host_pool)
        if move is not None:
            self._swap_outs.append(move)
        self.memory.free([s.row for s in group.placed if s.row is not None])
        for sequence in group.sequences:
            sequence.give_up_blocks()
        group.status = SequenceStatus.WAITING if move is None else SequenceStatus.SWAPPED
        group.is_forked = False
        self._enqueue(group)
        group.num_preemptions += 1
        self.num_preemptions += 1
        return group

    def _finish_if_over(self, sequence: Sequence) -> list[int]:
        """Ends a sequence whose last token demands it; returns the rows to free."""
        token, group = sequence.token_ids[-1], sequence.group
        if token in group.eos_token_ids:
            return self._retire([sequence], "stop", None)
        if token in group.stop_token_ids:
            return self._retire([sequence], "stop", token)
        if len(sequence.token_ids) == self._max_length(group):
            return self._retire([sequence], "length", None)
        return []

    def _retire(
        self,
        sequences: collections.abc.Sequence[Sequence],
        reason: FinishReason,
        stop_reason: int | str | None,
    ) -> list[int]:
        """Ends sequences of a group, whose late results `commit` drops; returns the rows to free.

        The group ends with the last of them.
        """
        group = sequences[0].group
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        for sequence in sequences:
            sequence.finish_reason = reason
            sequence.stop_reason = stop_reason
            sequence.num_pending = 0
            sequence.give_up_blocks()
        if not group.live:
            del self._unfinished[group.request_id]
            if group.status is SequenceStatus.RUNNING:
                self._running.remove(group)
            else:
                self._waiting.remove(group)
            self.host_pool.give_back(group)
            group.status = SequenceStatus.FINISHED
        else:
            assert group.is_forked or group.status is not SequenceStatus.RUNNING
        return rows


def _may_start(sequence: Sequence, planned: dict[Sequence, int]) -> bool:
    """Whether the blocks that it shares will be written when its own tokens read them."""
    leader = sequence.leader
    if leader is None or leader.is_finished:
        return True
    return leader.num_dispatched + planned.get(leader, 0) >= sequence.num_shared


def _is_in_flight(group: SequenceGroup) -> bool:
    return any(sequence.num_in_flight for sequence in group.live)
