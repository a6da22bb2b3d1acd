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
from typing import TYPE_CHECKING

from pallas_paged.engine import beam_groups
from pallas_paged.engine.admission import Admission, Arrival, Places
from pallas_paged.engine.beam_search import Candidates
from pallas_paged.engine.groups import CopyPairs, FullBlocks, repeated_blocks
from pallas_paged.engine.policies import (
    ChooseRecovery,
    Order,
    always_recompute,
    choose_victim,
    displaceable,
    next_to_admit,
)
from pallas_paged.engine.scheduled import ScheduledSequence, ScheduledStep
from pallas_paged.engine.sequence import FinishReason, Sequence, SequenceGroup, SequenceStatus
from pallas_paged.engine.swap import BlockMove, HostPool, swap_out

if TYPE_CHECKING:  # the protocol's module also holds the implementation, which imports jax
    from pallas_paged.engine.memory import Memory

type Plan = list[tuple[Sequence, int]]
"""How many tokens of which sequences to compute, group by group."""


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
        self.max_num_batched_tokens = max_num_batched_tokens
        if watermark_blocks is None:
            watermark_blocks = max(1, memory.num_usable_blocks // 100)
        self.watermark_blocks = watermark_blocks
        self.num_preemptions = 0
        self._unfinished: dict[str, SequenceGroup] = {}
        self.host_pool = HostPool(0, memory.num_usable_blocks) if host_pool is None else host_pool
        self.admission = Admission(memory, self.host_pool, max_num_seqs, max_model_len)
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
          ValueError: its id is taken; or see `Admission.check`.
        """
        if group.request_id in self._unfinished:
            raise ValueError(
                f"request_id={group.request_id!r} is taken by an unfinished request; use another"
            )
        self.admission.check(group)

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
            if not self.admission.fits_beside_pins(group):
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
        planned = self._plan_running(self._running)
        while (copies := self._reserve(planned)) is None:
            preempted.append(self._preempt(choose_victim(self._running)))
            planned = self._plan_running(self._running)
        arrivals, first = self._admit(
            self.max_num_batched_tokens - sum(count for _, count in planned)
        )
        swap_ins, more_copies = self.admission.give_blocks(arrivals)
        planned = self._fork(planned + first)
        if not planned:
            assert self._in_flight or not self._unfinished, "nothing to wait for, nothing to do"
            return None
        step = ScheduledStep(
            next(self._step_ids),
            tuple(self._dispatch(sequence, count) for sequence, count in planned),
            sum(count for _, count in planned),
            tuple(self._swap_outs),
            swap_ins,
            copies.and_then(more_copies),
            tuple(preempted),
        )
        self._swap_outs.clear()
        self._in_flight.append(step)
        return step

    def commit(
        self, step: ScheduledStep, results: collections.abc.Sequence[int | Candidates]
    ) -> list[Sequence]:
        """Takes a step's results and returns the sequences that got a token, finished or not.

        Tokens for sequences that finished or were aborted after the step was scheduled are
        dropped. A sequence that was preempted meanwhile keeps its token; a beam computes its
        candidates again. Beams go on, as new sequences, when all those of their group have theirs.

        Args:
          step: the earliest uncommitted step.
          results: the sampled token, or a beam's candidates, aligned with `step.scheduled`; any
            value where nothing is sampled.
        """
        oldest = self._in_flight.popleft()
        assert step is oldest, "steps are committed in order"
        assert len(results) == len(step.scheduled), f"{len(results)} results: {step.scheduled}"
        live = [
            (share, result)
            for share, result in zip(step.scheduled, results, strict=True)
            if not share.sequence.is_finished
        ]
        for share in step.scheduled:
            share.sequence.num_in_flight -= 1
        self._take_computed([share for share, _ in live])
        extended: list[Sequence] = []
        freed_rows: list[int] = []
        searching: dict[SequenceGroup, None] = {}  # a set in order
        for share, result in live:
            sequence = share.sequence
            if not share.samples:
                continue
            if isinstance(result, Candidates):
                if sequence.row is not None:
                    sequence.candidates = result
                    searching[sequence.group] = None
                continue
            sequence.num_pending -= 1
            sequence.token_ids.append(result)
            extended.append(sequence)
            freed_rows += self._finish_if_over(sequence)
        return extended + self._advance_beams(searching, freed_rows)

    def _advance_beams(
        self, groups: collections.abc.Iterable[SequenceGroup], freed_rows: list[int]
    ) -> list[Sequence]:
        """Replaces the beams of groups that are ready; frees these rows and those of dead beams.

        Blocks only change owners here, all at once: none is copied, and none is taken.
        """
        children: list[Sequence] = []
        forks: list[tuple[int, Sequence]] = []
        for group in filter(beam_groups.is_ready, groups):
            dead_rows, forks_here = beam_groups.advance(group)
            freed_rows = freed_rows + dead_rows
            forks += forks_here
            children += group.sequences
            if not group.live:
                self._end(group)
        if freed_rows:
            self.memory.free(freed_rows)
        if forks:
            rows = self.memory.fork([parent_row for parent_row, _ in forks])
            for (_, child), row in zip(forks, rows, strict=True):
                child.row = row
        return children

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
        is read, and the scheduler and its memory begin anew. May be called again if it was
        interrupted itself.
        """
        aborted = list(self._unfinished.values())
        for group in aborted:
            group.abort()
        for queue in (self._waiting, self._running, self._in_flight, self._swap_outs):
            queue.clear()
        self.host_pool.clear()
        self.memory.free_all()
        self._unfinished.clear()
        return aborted

    def check_invariants(self) -> None:
        """Asserts that the queues, the counts, the steps in flight and the memory agree."""
        queued = [*self._running, *self._waiting]
        assert {id(g) for g in queued} == {id(g) for g in self._unfinished.values()}
        assert len(queued) == len(self._unfinished)
        assert sum(group.num_rows for group in self._running) <= self.admission.max_num_seqs
        used: dict[int, int] = {}
        for group in queued:
            assert group.live
            for sequence in group.live:
                self._check_counts(sequence)
            beam_groups.check_invariants(group)
        for group in self._running:
            assert group.status is SequenceStatus.RUNNING
            rows = {s.row: s.num_reserved for s in group.placed if s.row is not None}
            assert len(rows) == len(group.placed)
            assert all(s.row is None for s in group.live if s not in group.placed)
            waits = group.beams is not None
            assert all(s.num_dispatched < s.num_tokens + waits for s in group.live)
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
        num_samples = sum(share.samples for share in shares)
        assert sequence.num_pending == (num_samples if sequence.group.beams is None else 0)
        assert sequence.num_tokens <= self.admission.max_length(sequence.group)
        assert sequence.num_computed <= sequence.num_dispatched <= sequence.num_reserved

    def _plan_running(self, groups: collections.abc.Iterable[SequenceGroup]) -> Plan:
        """Returns what running groups compute next, in their order, within the budget."""
        planned: Plan = []
        budget = self.max_num_batched_tokens
        for group in groups:
            planned_here = self._plan(group, budget)
            planned += planned_here
            budget -= sum(count for _, count in planned_here)
            if not budget:
                break
        return planned

    def _plan(self, group: SequenceGroup, budget: int) -> Plan:
        """Returns what a group's sequences compute next, in their order, within the budget."""
        planned: dict[Sequence, int] = {}
        max_length = self.admission.max_length(group)
        for sequence in group.placed:
            if sequence.num_tokens == max_length:
                continue  # its last token is in flight
            if sequence.num_dispatched == sequence.num_tokens:
                continue  # a beam whose candidates are in flight, or wait for those of others
            if not budget:
                break
            # A leader comes first, and takes the budget until all that it shares is computed.
            assert _may_start(sequence, planned), "reads blocks that nobody has written"
            count = min(sequence.num_tokens - sequence.num_dispatched, budget)
            planned[sequence] = count
            budget -= count
        return list(planned.items())

    def _reserve(self, planned: Plan) -> CopyPairs | None:
        """Allocates what the planned tokens need beyond their sequences' blocks: all or nothing."""
        growth = _growth(planned)
        rows = [sequence.row for sequence in growth if sequence.row is not None]
        copies = self.memory.append(rows, list(growth.values()))
        if copies is not None:
            for sequence, count in growth.items():
                sequence.num_reserved += count
        return copies

    def _enqueue(self, group: SequenceGroup) -> None:
        bisect.insort(self._waiting, group, key=self._order.key)

    def _displace(self) -> list[SequenceGroup]:
        """Preempts groups that the head of the queue may displace, as few as let it run now.

        None if it fits without, or will not run in this step even so.
        """
        if not self._waiting or not self._running:
            return []
        head = next_to_admit(self._waiting)
        victims = displaceable(self._order, head, self._running)
        if not victims or _is_in_flight(head):
            return []

        def fits(num_victims: int) -> bool:
            places = self._places_without(victims[:num_victims])
            return self.admission.arrival_of(head, places) is not None

        if not fits(len(victims)):
            return []
        needed = victims[: bisect.bisect_left(range(len(victims)), True, key=fits)]
        planned = self._plan_running(self._staying(needed))
        if sum(count for _, count in planned) == self.max_num_batched_tokens:
            return []  # the others compute so much that it would not get a token
        return [self._preempt(victim) for victim in needed]

    def _staying(self, victims: collections.abc.Collection[SequenceGroup]) -> list[SequenceGroup]:
        gone = set(victims)
        return [group for group in self._running if group not in gone]

    def _places_without(self, victims: collections.abc.Sequence[SequenceGroup]) -> Places:
        """Returns what may be taken without some groups, once the others have grown."""
        staying = self._staying(victims)
        freed_rows = tuple(s.row for group in victims for s in group.placed if s.row is not None)
        growth = _growth(self._plan_running(staying))
        rows = [sequence.row for sequence in growth if sequence.row is not None]
        num_blocks = self.memory.num_free_after(freed_rows, rows, list(growth.values()))
        return Places(
            self.admission.max_num_seqs - sum(group.num_rows for group in staying),
            num_blocks - (self.watermark_blocks if staying else 0),
            freed_rows,
        )

    def _places(self, arrivals: collections.abc.Sequence[Arrival] = ()) -> Places:
        """Returns what may be taken beside what runs, and what has been admitted in this step."""
        groups = [*self._running, *(arrival.group for arrival in arrivals)]
        num_blocks = self.memory.num_free_blocks - sum(a.num_blocks for a in arrivals)
        return Places(
            self.admission.max_num_seqs - sum(group.num_rows for group in groups),
            num_blocks - (self.watermark_blocks if groups else 0),
        )

    def _admit(self, budget: int) -> tuple[list[Arrival], Plan]:
        """Moves groups from the queue to the running ones, and plans their first tokens."""
        arrivals: list[Arrival] = []
        planned: Plan = []
        for group in tuple(self._waiting) if budget else ():
            if _is_in_flight(group):
                break  # what a preempted group still has in flight belongs to its earlier life
            arrival = self.admission.arrival_of(group, self._places(arrivals))
            if arrival is None:
                break
            arrivals.append(arrival)
            self.admission.enter(arrival)
            planned_here = self._plan(group, budget)
            planned += planned_here
            budget -= sum(count for _, count in planned_here)
            if not budget:
                break
        for arrival in arrivals:
            self._waiting.remove(arrival.group)
            bisect.insort(self._running, arrival.group, key=self._order.key)
            arrival.group.status = SequenceStatus.RUNNING
        return arrivals, planned

    def _take_computed(self, shares: list[ScheduledSequence]) -> None:
        """Counts tokens as computed, and lets the blocks that they have filled be shared."""
        S = self.memory.block_size
        filled: list[Sequence] = []
        for share in shares:
            sequence = share.sequence
            if sequence.row is not None:
                sequence.num_computed = share.start + share.num_tokens
                if sequence.num_computed // S > sequence.num_remembered:
                    filled.append(sequence)
        if not filled:
            return
        repeated: dict[int, int] = {}
        for group in dict.fromkeys(sequence.group for sequence in filled):
            repeated |= repeated_blocks(group.placed, self.memory.tables, S)
        self.memory.replace(repeated)
        full: list[FullBlocks] = []
        for sequence in filled:
            group, row, end = sequence.group, sequence.row, sequence.num_computed // S
            if group.writes_cache and row is not None:
                first, ids = sequence.num_remembered, sequence.token_ids
                full.append(FullBlocks(row, ids, first, end, group.cache_salt, group.reads_cache))
            sequence.num_remembered = end
        self.memory.remember(full)

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
        if sequence.group.beams is None:
            sequence.num_pending += share.samples
        return share

    def _preempt(self, group: SequenceGroup) -> SequenceGroup:
        """Takes all blocks; what is not swapped out starts again, prompt and output as a prompt."""
        self._running.remove(group)
        self.num_preemptions += 1  # before the host pool counts a swap, which is one of them
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
        return group

    def _finish_if_over(self, sequence: Sequence) -> list[int]:
        """Ends a sequence whose last token demands it; returns the rows to free."""
        ending = sequence.group.ending_of(sequence.token_ids[-1])
        if ending is not None:
            return self._retire([sequence], *ending)
        if len(sequence.token_ids) == self.admission.max_length(sequence.group):
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
            self._end(group)
        else:
            assert group.is_forked or group.status is not SequenceStatus.RUNNING
        return rows

    def _end(self, group: SequenceGroup) -> None:
        """Forgets a group of which no sequence is left."""
        if group.status is SequenceStatus.RUNNING:
            self._running.remove(group)
        else:
            self._waiting.remove(group)
        self.host_pool.give_back(group)
        group.status = SequenceStatus.FINISHED
        del self._unfinished[group.request_id]  # last: what `abort_all` must know of is in there


def _may_start(sequence: Sequence, planned: dict[Sequence, int]) -> bool:
    """Whether the blocks that it shares will be written when its own tokens read them."""
    leader = sequence.leader
    if leader is None or leader.is_finished:
        return True
    return leader.num_dispatched + planned.get(leader, 0) >= sequence.num_shared


def _growth(planned: Plan) -> dict[Sequence, int]:
    """Returns how many tokens' room the planned sequences need beyond what they have."""
    return {
        sequence: sequence.num_dispatched + num_tokens - sequence.num_reserved
        for sequence, num_tokens in planned
        if sequence.num_dispatched + num_tokens > sequence.num_reserved
    }


def _is_in_flight(group: SequenceGroup) -> bool:
    return any(sequence.num_in_flight for sequence in group.live)
