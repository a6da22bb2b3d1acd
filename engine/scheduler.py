"""Continuous batching: which tokens of which sequences the next step computes.

The scheduler decides once per step. It may run one step ahead of the device: step n + 1 is
scheduled while step n computes, so a sequence can be continued from a token that only the device
knows yet. The device executes steps in order, which is why blocks may be given back, and taken by
the next step, while a step that uses them is still in flight.

Why every request finishes: requests are admitted in order of arrival and preempted in the reverse
order, so the running sequences are always the earliest ones. The earliest of all is preempted only
when it runs alone, and alone it fits, or `add` had refused it.
"""

import collections
import collections.abc
import dataclasses
import itertools
from typing import TYPE_CHECKING

from pallas_paged.engine.sequence import FinishReason, Sequence, SequenceStatus

if TYPE_CHECKING:  # the protocol's module also holds the implementation, which imports jax
    from pallas_paged.engine.memory import Memory


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of a step.

    Attributes:
      sequence: the sequence.
      row: its row in the block tables; copied, because the sequence may lose it meanwhile.
      start: the position of the first token to compute.
      num_tokens: tokens to compute, at least 1.
      samples: whether the share reaches the sequence's end, so that its next token is sampled.
      input_on_device: whether the share's one token is the row's last sampled token, which the
        host does not know yet. Otherwise the tokens are
        `sequence.token_ids[start : start + num_tokens]`.
    """

    sequence: Sequence
    row: int
    start: int
    num_tokens: int
    samples: bool
    input_on_device: bool


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """What one step computes.

    Attributes:
      step_id: counts the scheduler's steps from 0.
      scheduled: the shares, in order of arrival; never empty.
      num_tokens: tokens of all shares.
      preempted: sequences that lost their blocks to this step.
    """

    step_id: int
    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int
    preempted: tuple[Sequence, ...]


def next_to_admit(waiting: collections.deque[Sequence]) -> Sequence:
    """First come, first served: nobody overtakes the head of the queue, however small."""
    return waiting[0]


def choose_victim(running: list[Sequence]) -> Sequence:
    """The sequence that arrived last loses its blocks first."""
    return running[-1]


class Scheduler:
    """First come, first served, with chunked prefill and preemption by recomputation.

    The engine's loop is `step = schedule()`, dispatch, then `commit` of the *previous* step; or of
    this one, to run without overlap. Steps are committed in the order in which they were scheduled.

    Args:
      memory: the block tables, with `max_num_seqs` rows, each wide enough for `max_model_len`.
      max_num_seqs: the most sequences that run at once.
      max_num_batched_tokens: the most tokens of a step. Longer prompts are computed in chunks.
      max_model_len: the most tokens of a sequence, prompt and output; there it ends by "length".
      watermark_blocks: blocks that admission leaves free while other sequences run, so that they
        can grow before anyone is preempted. None: one in a hundred, at least one.
    """

    def __init__(
        self,
        memory: "Memory",
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        watermark_blocks: int | None = None,
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
        self._unfinished: dict[str, Sequence] = {}
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []
        self._in_flight: collections.deque[ScheduledStep] = collections.deque()
        self._step_ids = itertools.count()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is unfinished; the last step may be in flight even if not."""
        return bool(self._unfinished)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, new and preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue; raises `ValueError` as `check` does."""
        self.check(sequence)
        self._unfinished[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def check(self, sequence: Sequence) -> None:
        """Tells whether `add` would accept the sequence; changes nothing.

        Raises:
          ValueError: the request is empty, its id is taken, or it could not run to its end even
            if it had the whole pool for itself.
        """
        name, prompt_len = sequence.request_id, sequence.num_prompt_tokens
        if name in self._unfinished:
            raise ValueError(f"request_id={name!r} is taken by an unfinished request; use another")
        if prompt_len == 0:
            raise ValueError(f"request {name!r}: the prompt is empty; give at least one token")
        if sequence.max_tokens < 1:
            raise ValueError(
                f"request {name!r}: max_tokens={sequence.max_tokens} must be at least 1"
            )
        if prompt_len >= self.max_model_len:
            raise ValueError(
                f"request {name!r}: a prompt of {prompt_len} tokens leaves no room for output in "
                f"max_model_len={self.max_model_len}; shorten the prompt or raise max_model_len"
            )
        num_tokens = self._max_length(sequence)
        num_blocks, usable = self.memory.blocks_for(num_tokens), self.memory.num_usable_blocks
        if num_blocks > usable:
            raise ValueError(
                f"request {name!r}: {prompt_len} prompt tokens and max_tokens="
                f"{sequence.max_tokens} may take {num_tokens} tokens, {num_blocks} blocks, and the "
                f"KV cache has {usable}; lower max_tokens, shorten the prompt or enlarge the cache"
            )

    def schedule(self) -> ScheduledStep | None:
        """Returns the next step, or None if nothing can be computed now.

        None means that nothing is unfinished, or that the step in flight must be committed first.
        Running sequences come first, then those that wait, as far as tokens, rows and blocks
        allow. When the running ones find no blocks to grow, the last of them loses its own, until
        the others fit; it waits at the head of the queue then, and nobody overtakes it.
        """
        assert len(self._in_flight) <= 1, "at most one step may be in flight"
        preempted: list[Sequence] = []
        planned = self._plan_running()
        while not self._reserve(planned):
            preempted.append(self._preempt(choose_victim(self._running)))
            planned = self._plan_running()
        planned += self._admit(self.max_num_batched_tokens - sum(count for _, count in planned))
        if not planned:
            assert self._in_flight or not self._unfinished, "nothing to wait for, nothing to do"
            return None
        step = ScheduledStep(
            next(self._step_ids),
            tuple(self._dispatch(sequence, count) for sequence, count in planned),
            sum(count for _, count in planned),
            tuple(preempted),
        )
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
        for share, token in zip(step.scheduled, tokens, strict=True):
            sequence = share.sequence
            sequence.num_in_flight -= 1
            if sequence.is_finished:
                continue
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed = share.start + share.num_tokens
            if share.samples:
                sequence.num_pending -= 1
                sequence.token_ids.append(token)
                extended.append(sequence)
                freed_rows += self._finish_if_over(sequence)
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
            freed_rows = self._retire(sequence, reason, stop_reason)
            if freed_rows:
                self.memory.free(freed_rows)
        elif (sequence.finish_reason, reason) == ("length", "stop"):
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def abort(self, request_id: str) -> None:
        """Ends a request by "abort"; does nothing if it is unknown or has ended."""
        if request_id in self._unfinished:
            self.finish(self._unfinished[request_id], "abort")

    def abort_all(self) -> list[Sequence]:
        """Aborts and returns all requests, and forgets the steps in flight.

        For use after an error or an interrupt, wherever it struck: nothing that may be half-changed
        is read, and the scheduler and its memory are empty again.
        """
        aborted = list(self._unfinished.values())
        for sequence in aborted:
            sequence.status = SequenceStatus.FINISHED
            sequence.finish_reason = "abort"
            sequence.row = None
            sequence.num_reserved = sequence.num_pending = 0
        for queue in (self._unfinished, self._waiting, self._running, self._in_flight):
            queue.clear()
        self.memory.free_all()
        return aborted

    def check_invariants(self) -> None:
        """Asserts that the queues, the counts, the steps in flight and the memory agree."""
        queued = [*self._running, *self._waiting]
        assert {id(s) for s in queued} == {id(s) for s in self._unfinished.values()}
        assert len(queued) == len(self._unfinished)
        assert len(self._running) <= self.max_num_seqs
        for sequence in queued:
            shares = [
                share
                for step in self._in_flight
                for share in step.scheduled
                if share.sequence is sequence
            ]
            assert sequence.num_in_flight == len(shares)
            assert sequence.num_pending == sum(share.samples for share in shares)
            assert sequence.num_tokens <= self._max_length(sequence)
            assert sequence.num_computed <= sequence.num_dispatched <= sequence.num_reserved
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_dispatched < sequence.num_tokens
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert sequence.row is None
            assert sequence.num_reserved == 0
        used = {s.row: s.num_reserved for s in self._running if s.row is not None}
        assert len(used) == len(self._running)
        self.memory.check_invariants(used)

    def _max_length(self, sequence: Sequence) -> int:
        return min(sequence.num_prompt_tokens + sequence.max_tokens, self.max_model_len)

    def _plan_running(self) -> list[tuple[Sequence, int]]:
        """Returns (sequence, number of tokens) in order of arrival, within the token budget."""
        planned = []
        budget = self.max_num_batched_tokens
        for sequence in self._running:
            if sequence.num_tokens == self._max_length(sequence):
                continue  # its last token is in flight
            num_tokens = min(sequence.num_tokens - sequence.num_dispatched, budget)
            if num_tokens == 0:
                break
            planned.append((sequence, num_tokens))
            budget -= num_tokens
        return planned

    def _reserve(self, planned: list[tuple[Sequence, int]]) -> bool:
        """Allocates what the planned tokens need beyond their sequences' blocks: all or nothing."""
        growth = {
            sequence: sequence.num_dispatched + num_tokens - sequence.num_reserved
            for sequence, num_tokens in planned
            if sequence.num_dispatched + num_tokens > sequence.num_reserved
        }
        rows = [sequence.row for sequence in growth if sequence.row is not None]
        if not self.memory.append(rows, list(growth.values())):
            return False
        for sequence, count in growth.items():
            sequence.num_reserved += count
        return True

    def _admit(self, budget: int) -> list[tuple[Sequence, int]]:
        """Moves sequences from the queue to the running ones; blocks for all known tokens."""
        admitted: list[tuple[Sequence, int]] = []
        free = self.memory.num_free_blocks
        while self._waiting and budget and len(self._running) < self.max_num_seqs:
            sequence = next_to_admit(self._waiting)
            needed = self.memory.blocks_for(sequence.num_tokens)
            spare = self.watermark_blocks if self._running else 0
            # What a preempted sequence still has in flight belongs to its earlier life.
            if sequence.num_in_flight or needed + spare > free:
                break
            free -= needed
            num_tokens = min(sequence.num_tokens, budget)
            budget -= num_tokens
            admitted.append((sequence, num_tokens))
            self._waiting.remove(sequence)
            self._running.append(sequence)
        if admitted:
            rows = self.memory.admit([sequence.num_tokens for sequence, _ in admitted])
            for (sequence, _), row in zip(admitted, rows, strict=True):
                sequence.status = SequenceStatus.RUNNING
                sequence.row = row
                sequence.num_reserved = sequence.num_tokens
        return admitted

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

    def _preempt(self, sequence: Sequence) -> Sequence:
        """Takes all blocks; the sequence starts again with its prompt and output as the prompt."""
        assert sequence.row is not None
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)  # it arrived before all that wait
        self.memory.free([sequence.row])
        sequence.status = SequenceStatus.WAITING
        sequence.row = None
        sequence.num_reserved = sequence.num_dispatched = sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        return sequence

    def _finish_if_over(self, sequence: Sequence) -> list[int]:
        """Ends a sequence whose last token demands it; returns the rows to free."""
        token = sequence.token_ids[-1]
        if token in sequence.eos_token_ids:
            return self._retire(sequence, "stop", None)
        if token in sequence.stop_token_ids:
            return self._retire(sequence, "stop", token)
        if len(sequence.token_ids) == self._max_length(sequence):
            return self._retire(sequence, "length", None)
        return []

    def _retire(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None
    ) -> list[int]:
        """Forgets a sequence, whose late results `commit` then drops; returns the rows to free."""
        del self._unfinished[sequence.request_id]
        rows = [] if sequence.row is None else [sequence.row]
        if rows:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.row = None
        sequence.num_reserved = sequence.num_pending = 0
        return rows
