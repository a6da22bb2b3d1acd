"""Continuous batching: which tokens of which sequences the next step computes.

The scheduler decides once per step. It may run one step ahead of the device: step n + 1 is
scheduled while step n computes, so a sequence can be continued from a token that only the device
knows yet. The device executes steps in order, which is why blocks may be given back, and taken by
the next step, while a step that uses them is still in flight.

It moves whole groups: the sequences of a request are admitted, preempted and recomputed together.

Why every request finishes: groups are admitted in order of arrival and preempted in the reverse
order, so the running groups are always the earliest ones. The earliest of all is preempted only
when it runs alone, and alone it fits, or `add` had refused it. Nor does it wait for another one's
blocks: a group waits for those only of one before it that runs, with tokens left that the host
knows. These precede its own in every step, so that it waits until they are dispatched at the most.
"""

import collections
import itertools
from collections.abc import Callable, Sequence

from pallas_paged.engine.core import invariants, token_plan
from pallas_paged.engine.core.admission import Admission, Arrival, Room
from pallas_paged.engine.core.committer import Committed, Committer, Result
from pallas_paged.engine.core.common_prefixes import ComingPrefixes, enter_dispatched
from pallas_paged.engine.core.core_output import FinishReason
from pallas_paged.engine.core.displacing import groups_to_displace
from pallas_paged.engine.core.forks import fork_ready
from pallas_paged.engine.core.policies import ChooseRecovery, Order, always_recompute, choose_victim
from pallas_paged.engine.core.queues import Queues, placed_of, rows_of
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.core.speculation import Proposer, propose
from pallas_paged.engine.core.swapping import lose_blocks, lose_everything
from pallas_paged.engine.core.token_plan import StepSize, TokenPlan
from pallas_paged.engine.kv.host_pool import BlockMove, HostPool
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.sharing import NO_COPIES, CopyPairs, Root


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
      sliding_window: the most tokens that a query sees in any layer, itself included; rows give
        back the blocks that have left it. None: a layer sees all tokens, and rows keep theirs.
      num_scheduler_steps: the most decode steps that are scheduled at once, by `token_plan.run_on`.
      proposer: guesses tokens of the groups that wait for the host; None guesses none.
      worth_while: says how many tokens a step with prompts computes, see `Buckets.worth_while`.
      step_cost: tokens that a request waits for if another computes them; 0: it does not wait.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        watermark_blocks: int | None = None,
        order: Order | None = None,
        choose_recovery: ChooseRecovery = always_recompute,
        host_pool: HostPool | None = None,
        sliding_window: int | None = None,
        num_scheduler_steps: int = 1,
        proposer: Proposer | None = None,
        worth_while: Callable[[int, int], int] = lambda num_tokens, num_fixed: num_tokens,
        step_cost: int = 0,
    ) -> None:
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2),
            ("watermark_blocks", watermark_blocks, 0),
            ("sliding_window", sliding_window, 1),
            ("num_scheduler_steps", num_scheduler_steps, 1),
            ("step_cost", step_cost, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.memory, self.max_num_batched_tokens = memory, max_num_batched_tokens
        if watermark_blocks is None:
            watermark_blocks = max(1, memory.num_usable_blocks // 100)
        self.watermark_blocks = watermark_blocks
        self.num_preemptions = 0
        self.host_pool = HostPool(0, memory.num_usable_blocks) if host_pool is None else host_pool
        columns = RowColumns(len(memory.tables), proposer.num_ahead if proposer else 0)
        self._columns, self.proposer = columns, proposer
        self.admission = Admission(memory, columns, self.host_pool, max_num_seqs, max_model_len)
        self.queues = Queues(Order() if order is None else order)
        self._committer = Committer(
            memory, columns, self.queues, self.host_pool, sliding_window, proposer
        )
        self._choose_recovery, self.num_scheduler_steps = choose_recovery, num_scheduler_steps
        self._size, self._step_cost = StepSize(max_num_batched_tokens, worth_while), step_cost
        self._arrivals = itertools.count()
        self._swap_outs: list[BlockMove] = []  # for the next step
        self._in_flight: collections.deque[ScheduledStep] = collections.deque()
        self._step_ids = itertools.count()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is unfinished; the last step may be in flight even if not."""
        return bool(self.queues.unfinished)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, new and preempted."""
        return len(self.queues.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self.queues.running)

    @property
    def row_lens(self) -> dict[int, int]:
        """The tokens of each row in use that are computed, or will be by the step in flight."""
        rows = self.queues.placed_rows
        return dict(zip(rows.tolist(), self._columns.num_dispatched[rows].tolist(), strict=True))

    def add(self, group: SequenceGroup) -> None:
        """Puts a new group at the end of the queue; raises `ValueError` as `check` does."""
        self.check(group)
        group.arrival = next(self._arrivals)
        group.max_length = self.admission.max_length(group)
        self.queues.add(group)

    def check(self, group: SequenceGroup) -> None:
        """Tells whether `add` would accept the group; changes nothing.

        Raises:
          ValueError: its id is taken; or see `Admission.check`.
        """
        if group.request_id in self.queues.unfinished:
            raise ValueError(
                f"request_id={group.request_id!r} is taken by an unfinished request; use another"
            )
        self.admission.check(group)

    def pin(self, token_ids: Sequence[int], root: Root) -> bool:
        """Keeps the full blocks of a prefix, see `Admission.pin`, until `unpin`."""
        return self.admission.pin(token_ids, root, self.queues.unfinished.values())

    def unpin(self, token_ids: Sequence[int], root: Root) -> bool:
        """Takes a `pin` back; returns False if there is none."""
        return self.memory.unpin(token_ids, root)

    def schedule(self) -> ScheduledStep | None:
        """Returns the next step, or None if nothing can be computed now.

        None means that nothing is unfinished, or that the step in flight must be committed first.
        Running groups come first, then those that wait, as far as tokens, rows and blocks
        allow. When the running ones find no blocks to grow, the last of them loses its own, until
        the others fit; it waits at the head of the queue then, and nobody overtakes it.
        """
        assert len(self._in_flight) <= 1, "at most one step may be in flight"
        if self._in_flight and token_plan.better_together(self._columns, self.queues.placed_rows):
            return None
        if self.proposer is not None:
            propose(self.proposer, self._columns, self.queues.placed, self.queues.placed_rows)
        preempted = self._displace()
        displaces, planned = bool(preempted), self._plan()
        while (copies := self._reserve(planned)) is None:
            if planned.has_more:
                planned = planned.least()
                continue
            preempted.append(self._preempt(choose_victim(self.queues.running)))
            planned = self._plan()
        budget = self._size.left_beside(self._columns, planned) if self.queues.waiting else 0
        arrivals = self._admit(budget, displaces)
        swap_ins, more_copies = self.admission.give_blocks(arrivals)
        if arrivals:
            entering = placed_of(arrival.group for arrival in arrivals)
            more = token_plan.plan(self._columns, entering, rows_of(entering), budget)
            planned = planned.and_then(more)
        planned = self._size.within(self._columns, planned)
        if not self.queues.are_forked:
            before, planned = planned, fork_ready(self._columns, planned, self.memory)
            if planned is not before:
                self.queues.rows_changed()
        if not planned.sequences:
            assert self._in_flight or not self.has_unfinished, "nothing to wait for, nothing to do"
            return None
        dropped = self.host_pool.take_dropped()
        step = ScheduledStep(
            next(self._step_ids),
            token_plan.dispatch(self._columns, planned),
            planned.num_tokens,
            dropped,
            tuple(move for move in self._swap_outs if move.chunk.number not in dropped),
            swap_ins,
            copies.and_then(more_copies),
            tuple(arrival.group for arrival in arrivals),
            tuple(preempted),
        )
        enter_dispatched(self.memory, self._columns, step.batch)
        self._swap_outs.clear()
        self._in_flight.append(step)
        return step

    def commit(self, step: ScheduledStep, results: Sequence[Result]) -> Committed:
        """Takes a step's results and returns what the sequences got, finished or not.

        Tokens for sequences that finished or were aborted after the step was scheduled are
        dropped. A sequence that was preempted meanwhile keeps its token; a beam computes its
        candidates again. Beams go on, as new sequences, when all those of their group have theirs.

        Args:
          step: the earliest uncommitted step.
          results: see `Result`, aligned with `step.scheduled`; any value where nothing is sampled.
        """
        oldest = self._in_flight.popleft()
        assert step is oldest, "steps are committed in order"
        return self._committer.commit(step, results)

    def finish(
        self, sequence: TokenSequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends a sequence in any state and frees its blocks; does nothing if it has ended."""
        self._committer.finish(sequence, reason, stop_reason)

    def abort(self, request_id: str) -> None:
        """Ends what runs of a request by "abort"; does nothing if it is unknown or has ended."""
        if request_id in self.queues.unfinished:
            self._committer.abort(self.queues.unfinished[request_id])

    def start_over(self) -> None:
        """Lets requests compute all again; forgets all prefixes. No step may be in flight."""
        assert not self._in_flight, "a step in flight still reads the blocks"
        self.num_preemptions += len(self.queues.running)
        lose_everything(self.queues, self.memory, self.host_pool)
        self._swap_outs.clear()

    def abort_all(self) -> list[SequenceGroup]:
        """Aborts and returns all requests, and forgets the steps in flight.

        For use after an error or an interrupt, wherever it struck: nothing that may be half-changed
        is read, and the scheduler and its memory begin anew. May be called again if it was
        interrupted itself.
        """
        aborted = list(self.queues.unfinished.values())
        for group in aborted:
            group.abort()
        self._in_flight.clear()
        self._swap_outs.clear()
        self.host_pool.clear()
        self.memory.free_all()
        self._columns.clear_all()
        self.queues.clear()  # last: what is aborted is in there
        return aborted

    def check_invariants(self) -> None:
        """Asserts that the queues, the counts, the steps in flight and the memory agree."""
        invariants.check_queues(self.queues, self.host_pool)
        invariants.check_groups(self.queues.unfinished.values(), self._in_flight)
        assert self.queues.num_rows <= self.admission.max_num_seqs
        placed = self.queues.placed
        invariants.check_columns(placed, self.queues.placed_rows, self._columns)
        self.memory.check_invariants(
            {s.row: s.progress.num_reserved for s in placed if s.row is not None}
        )

    def _plan(self) -> TokenPlan:
        queues, columns, rows = self.queues, self._columns, self.queues.placed_rows
        planned = token_plan.plan(columns, queues.placed, rows, self.max_num_batched_tokens)
        planned = token_plan.with_room(columns, planned)
        if self.num_scheduler_steps == 1 or not len(planned.rows) or not queues.are_forked:
            return planned
        may_admit = queues.waiting and queues.num_rows < self.admission.max_num_seqs
        if may_admit or not columns.runs_on[rows].all():
            return planned
        return token_plan.run_on(
            columns, planned, self.num_scheduler_steps, keeps_all=bool(queues.waiting)
        )

    def _reserve(self, planned: TokenPlan) -> CopyPairs | None:
        """Allocates what the planned tokens need beyond their sequences' blocks: all or nothing."""
        rows, num_tokens = planned.growth(self._columns)
        return self.memory.append(rows, num_tokens) if len(rows) else NO_COPIES

    def _displace(self) -> list[SequenceGroup]:
        """Preempts the groups that the head of the queue displaces."""
        victims = groups_to_displace(
            self.queues, self.admission, self._size, self._coming(), self.watermark_blocks
        )
        return [self._preempt(victim) for victim in victims]

    def _coming(self) -> ComingPrefixes:
        return ComingPrefixes(self.memory, self._columns, self.queues, self._step_cost)

    def _admit(self, budget: int, displaces: bool) -> list[Arrival]:
        """Moves groups from the queue to the running ones, until their tokens fill the budget."""
        arrivals: list[Arrival] = []
        coming = self._coming()
        num_rows = self.admission.max_num_seqs - self.queues.num_rows
        space = self.memory.space()
        for group in self.queues.waiting:
            if budget <= 0 or group.is_in_flight:
                break  # what a preempted group still has in flight belongs to its earlier life
            spared = self.watermark_blocks if self.queues.running or arrivals else 0
            arrival = self.admission.arrival_of(group, Room(num_rows, space, spared))
            if arrival is None:
                break
            if not displaces and coming.holds_back(group, arrival.hits[0]):
                break
            displaces = False  # only the first may; whether it has to wait was asked before
            arrivals.append(arrival)
            num_rows -= group.num_rows
            self.admission.enter(arrival)
            coming.add(group, arrival.hits)
            budget -= sum(len(s.token_ids) - s.num_shared for s in group.placed)
        self.queues.run(arrival.group for arrival in arrivals)
        return arrivals

    def _preempt(self, group: SequenceGroup) -> SequenceGroup:
        """Takes all blocks; what is not swapped out starts again, prompt and output as a prompt."""
        self.queues.stop(group)
        self.num_preemptions += 1  # before the host pool counts a swap, which is one of them
        swaps = self._choose_recovery(group) == "swap"
        move = lose_blocks(group, self.memory, self.host_pool if swaps else None)
        if move is not None:
            self._swap_outs.append(move)
        in_flight = itertools.chain(*(step.batch.sequences for step in self._in_flight))
        group.is_in_flight = any(sequence.group is group for sequence in in_flight)
        self.queues.wait(group)
        return group
