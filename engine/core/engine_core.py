"""The engine's loop without text: schedule a step, dispatch it, then take in the step before it."""

import time
from typing import Any, NamedTuple

import numpy as np

from pallas_paged.engine.core.committer import Result
from pallas_paged.engine.core.core_output import (
    CoreOutput,
    CoreOutputs,
    Held,
    NewTokens,
    Versions,
)
from pallas_paged.engine.core.found_logprobs import FoundLogprobs, held_tokens
from pallas_paged.engine.core.matching import ending_without_token
from pallas_paged.engine.core.plan import Executor
from pallas_paged.engine.core.planner import Planned, Planner
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.core.speculation import num_right
from pallas_paged.engine.core.step_outputs import (
    beam_outputs,
    mark_last,
    output_of,
    prompt_logprobs_of,
    step_outputs,
)
from pallas_paged.engine.core.step_record import StepObserver, StepRecord

NO_TOKEN_REASONS = (
    "logits are not finite",
    "no token is left: allowed_token_ids, bad_words, min_tokens and structured_outputs exclude all "
    "of them",
)
"""What V, V + 1 mean in the place of a token."""
NOTHING = CoreOutputs([], NewTokens([], [], []))


class _InFlight(NamedTuple):
    """A dispatched step.

    Attributes:
      step: as it was scheduled.
      planned: as it was planned.
      handle: what the executor returned.
      schedule_s: see `StepRecord`, as is the next one.
      dispatch_s: likewise.
    """

    step: ScheduledStep
    planned: Planned
    handle: Any
    schedule_s: float
    dispatch_s: float


class EngineCore:
    """Runs requests over a scheduler and an executor: token ids in, token ids out.

    Nothing in here is safe against an error or an interrupt in the middle of a call: after one,
    `reset` is all that may be called.

    Args:
      scheduler: with its queues and its memory.
      planner: over the same memory.
      executor: the device.
      vocab_size: V; token ids are below it.
      async_scheduling: keep one step in flight while the next is scheduled.

    Attributes:
      scheduler: as given, as is `executor`.
      executor: likewise.
      observers: are told of each step; empty at first.
      num_steps: steps dispatched so far; several decode steps in one program count as one.
      num_generated_tokens: tokens that steps have brought.
      weights_version: of the executor's weights, from which the tokens of the next step come.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        planner: Planner,
        executor: Executor,
        *,
        vocab_size: int,
        async_scheduling: bool = True,
    ):
        self.scheduler = scheduler
        self.executor = executor
        self.observers: list[StepObserver] = []
        self.num_steps = self.num_generated_tokens = self.weights_version = 0
        self._versions: Versions = ((0, 0),)  # of a new sequence
        self._planner = planner
        self._vocab_size = vocab_size
        self._async_scheduling = async_scheduling
        self._in_flight: _InFlight | None = None

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return self.scheduler.has_unfinished or self._in_flight is not None

    def add(self, group: SequenceGroup) -> None:
        """Queues a group; raises `ValueError` as `Scheduler.check` does, before any change."""
        self.scheduler.add(group)
        for sequence in group.sequences:
            sequence.versions = self._versions

    def abort(self, request_id: str) -> list[CoreOutput]:
        """Ends a request in any state, and returns its last outputs; none if it is unknown."""
        group = self.scheduler.queues.unfinished.get(request_id)
        if group is None:
            return []
        running = group.live
        self.scheduler.abort(request_id)
        if group.beams is not None:
            return beam_outputs(group)
        outputs = [output_of(sequence) for sequence in running]
        mark_last(outputs)
        return outputs

    def finish(self, request_id: str, index: int, stop_reason: str) -> None:
        """Ends a sequence by "stop" in any state; nothing more comes for it."""
        group = self.scheduler.queues.unfinished.get(request_id)
        if group is not None:
            self.scheduler.finish(group.sequences[index], "stop", stop_reason)

    def held_tokens(self) -> dict[str, list[Held]]:
        """Returns what each sequence of the requests that are held has so far, by request.

        It may be called whatever an interrupt has left behind.
        """
        groups = list(self.scheduler.queues.unfinished.values())
        return {
            group.request_id: list(map(held_tokens, group.sequences))
            for group in groups
            if group.is_held
        }

    def settle(self) -> CoreOutputs:
        """Takes in the step in flight, if there is one, and dispatches no other."""
        in_flight, self._in_flight = self._in_flight, None
        return NOTHING if in_flight is None else self._take_in(in_flight)

    def start_over(self) -> None:
        """Forgets all that is computed, for the executor has lost it; no step may be in flight.

        Requests keep their tokens, and go on from them when they have been computed again.
        """
        assert self._in_flight is None, "take it in first"
        self.scheduler.start_over()
        self._planner.reset()

    def note_new_weights(self) -> None:
        """Counts the executor's weights as others than before, for all tokens to come."""
        self.weights_version += 1
        self._versions = ((0, self.weights_version),)
        for group in self.scheduler.queues.unfinished.values():
            for sequence in group.live:
                place = sequence.num_output_tokens
                kept = tuple(pair for pair in sequence.versions if pair[0] < place)
                sequence.versions = (*kept, (place, self.weights_version))

    def reset(self) -> None:
        """Forgets every request and every step, whatever was cut short; may be begun again."""
        self._in_flight = None
        self.scheduler.abort_all()
        self._planner.reset()
        self.executor.recover()

    def step(self) -> CoreOutputs:
        """Dispatches the next step and takes in the one before; returns what that one gave.

        With `async_scheduling` the step dispatched here stays in flight, so that the host's work
        for the next one happens while the device computes.
        """
        begin = time.perf_counter()
        step = self.scheduler.schedule()
        dispatched = self._dispatch(step, begin) if step is not None else None
        if self._async_scheduling:
            dispatched, self._in_flight = self._in_flight, dispatched
        if dispatched is None:
            return NOTHING
        return self._take_in(dispatched)

    def _dispatch(self, step: ScheduledStep, begin: float) -> _InFlight:
        """Plans and dispatches a step, whose scheduling began at that time."""
        if step.admitted:
            now = time.monotonic()
            for group in step.admitted:
                if group.stats.first_scheduled_time_s is None:
                    group.stats = group.stats._replace(first_scheduled_time_s=now)
        self.num_steps += 1
        planned = self._planner.plan(step)
        for observer in self.observers:
            observer.begin(step.step_id)
        middle = time.perf_counter()
        handle = self.executor.dispatch(planned.plan)
        if planned.likely is not None:
            self.executor.expect(planned.likely)
        return _InFlight(step, planned, handle, middle - begin, time.perf_counter() - middle)

    def _take_in(self, in_flight: _InFlight) -> CoreOutputs:
        """Commits a step's tokens and returns what the requests get by it."""
        step, begin = in_flight.step, time.perf_counter()
        result = self.executor.collect(in_flight.handle)
        middle = time.perf_counter()
        results = _results(step, result.tokens)
        if in_flight.planned.plan.bucket.proposes:
            _keep_proposals(step, result.tokens, in_flight.planned.plan.bucket.num_drafts)
        found = None if result.logprobs is None else FoundLogprobs(step, result.logprobs)
        for b, candidates in found.candidates().items() if found is not None else ():
            results[b] = candidates
        faults: list[tuple[TokenSequence, int]] = []
        if (result.tokens >= self._vocab_size).any():
            faults = self._cut_at_faults(step, result.tokens, results)
        begins = {
            sequence: len(sequence.token_ids)
            for sequence, result in zip(step.batch.sequences, results, strict=True)
            if isinstance(result, list)
        }
        committed = self.scheduler.commit(step, results)
        logprobs = {} if found is None else found.of_new_tokens()
        self.num_generated_tokens += committed.num_tokens
        aborted = self._abort(faults) if faults else {}
        advanced = [sequence for sequence in committed.others if sequence not in aborted]
        prompts = prompt_logprobs_of(in_flight.planned, result)
        outputs = CoreOutputs(
            step_outputs(aborted, advanced, begins, logprobs, prompts), committed.tokens
        )
        if self.observers:
            times = middle - begin, time.perf_counter() - middle
            record = self._record(in_flight, committed.num_tokens, *times)
            for observer in self.observers:
                observer.end(record)
        return outputs

    def _record(
        self, in_flight: _InFlight, num_new_tokens: int, wait_s: float, commit_s: float
    ) -> StepRecord:
        step, batch = in_flight.step, in_flight.step.batch
        return StepRecord(
            step_id=step.step_id,
            bucket=in_flight.planned.plan.bucket,
            num_seqs=len(batch.sequences),
            num_tokens=int((batch.ends - batch.starts).sum()),
            num_steps=int(batch.num_steps.max()),
            num_drafts=int(batch.num_drafts.sum()),
            num_new_tokens=num_new_tokens,
            num_admitted=len(step.admitted),
            num_preempted=len(step.preempted),
            num_copies=len(step.copies.src),
            num_swap_outs=len(step.swap_outs),
            num_swap_ins=len(step.swap_ins),
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            schedule_s=in_flight.schedule_s,
            dispatch_s=in_flight.dispatch_s,
            wait_s=wait_s,
            commit_s=commit_s,
        )

    def _cut_at_faults(
        self, step: ScheduledStep, tokens: np.ndarray, results: list[Result]
    ) -> list[tuple[TokenSequence, int]]:
        """Leaves in `results` the tokens before the first place without one.

        Returns the sequences that have such a place, and what stands there in `tokens`, i32[B, K].
        """
        faults: list[tuple[TokenSequence, int]] = []
        for b, one in enumerate(step.scheduled):
            result = results[b] if one.samples else []
            mine = tokens[b, :1].tolist() if not isinstance(result, list) else result
            place = next((i for i, token in enumerate(mine) if token >= self._vocab_size), None)
            if place is None or not one.sequence.group.ending_ids.isdisjoint(mine[:place]):
                continue  # it was over before
            results[b] = mine[:place]
            faults.append((one.sequence, mine[place]))
        return faults

    def _abort(self, faults: list[tuple[TokenSequence, int]]) -> dict[TokenSequence, None]:
        """Ends the sequences for which the device found no token, beams together with others'.

        By "abort", unless the output of one is whole by its grammar: then by "stop".
        """
        aborted: dict[TokenSequence, None] = {}
        for sequence, token in faults:
            group, reason = sequence.group, NO_TOKEN_REASONS[token - self._vocab_size]
            if sequence.is_finished:
                continue
            ending = ending_without_token(sequence, reason)
            for other in [sequence] if group.beams is None else group.live:
                self.scheduler.finish(other, *ending)
                aborted[other] = None
        return aborted


def _results(step: ScheduledStep, tokens: np.ndarray) -> list[Result]:
    """Returns what a step's samples, i32[B, K], are for `Scheduler.commit`."""
    batch = step.batch
    B, num_steps, num_drafts = len(batch.sequences), batch.num_steps, batch.num_drafts
    if num_steps.max() == 1:
        results: list[Result] = tokens[:B, 0].tolist()
        for b in np.flatnonzero(num_drafts).tolist():
            drafts = batch.sequences[b].drafts[: num_drafts[b]]
            results[b] = tokens[b, : 1 + num_right(drafts, tokens[b].tolist())].tolist()
        return results
    rows = zip(tokens[:B].tolist(), num_steps.tolist(), strict=True)
    return [mine[:count] for mine, count in rows]


def _keep_proposals(step: ScheduledStep, tokens: np.ndarray, num_drafts: int) -> None:
    """Gives the sequences what the device guessed behind their samples, i32[B, 2 D + 1]."""
    batch, proposals = step.batch, tokens[:, num_drafts + 1 :].tolist()
    for b in np.flatnonzero(batch.samples).tolist():
        batch.sequences[b].proposals = proposals[b]
