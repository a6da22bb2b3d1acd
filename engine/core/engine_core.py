"""The engine's loop without text: schedule a step, dispatch it, then take in the step before it."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_paged.engine.core import beam_groups, logprobs
from pallas_paged.engine.core.beam_search import Candidates
from pallas_paged.engine.core.committer import Result
from pallas_paged.engine.core.core_output import (
    CoreOutput,
    CoreOutputs,
    NewTokens,
    TokenLogprobs,
)
from pallas_paged.engine.core.plan import Executor, StepResult
from pallas_paged.engine.core.planner import Planned, Planner, samples_logprobs
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.core.scheduler import Scheduler

logger = logging.getLogger(__name__)

NO_TOKEN_REASONS = (
    "logits are not finite",
    "no token is left: allowed_token_ids, bad_words and min_tokens exclude all of them",
)
"""What V, V + 1 mean in the place of a token."""


class _InFlight(NamedTuple):
    """A dispatched step: as it was scheduled, as it was planned, and what the executor returned."""

    step: ScheduledStep
    planned: Planned
    handle: Any


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
      num_steps: steps dispatched so far; several decode steps in one program count as one.
      num_generated_tokens: tokens that steps have brought.
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
        self.num_steps = self.num_generated_tokens = 0
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

    def abort(self, request_id: str) -> list[CoreOutput]:
        """Ends a request in any state, and returns its last outputs; none if it is unknown."""
        group = self.scheduler.queues.unfinished.get(request_id)
        if group is None:
            return []
        running = group.live
        self.scheduler.abort(request_id)
        if group.beams is not None:
            return _beam_outputs(group)
        outputs = [_output(sequence) for sequence in running]
        _mark_last(outputs)
        return outputs

    def finish(self, request_id: str, index: int, stop_reason: str) -> None:
        """Ends a sequence by "stop" in any state; nothing more comes for it."""
        group = self.scheduler.queues.unfinished.get(request_id)
        if group is not None:
            self.scheduler.finish(group.sequences[index], "stop", stop_reason)

    def held_tokens(self) -> dict[str, list[list[int]]]:
        """Returns the tokens so far of each sequence of the requests that are held, by request."""
        groups = list(self.scheduler.queues.unfinished.values())
        return {
            group.request_id: [sequence.output_token_ids for sequence in group.sequences]
            for group in groups
            if group.is_held
        }

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
        step = self.scheduler.schedule()
        dispatched = self._dispatch(step) if step is not None else None
        if self._async_scheduling:
            dispatched, self._in_flight = self._in_flight, dispatched
        if dispatched is None:
            return CoreOutputs([], NewTokens([], [], []))
        return self._take_in(dispatched)

    def _dispatch(self, step: ScheduledStep) -> _InFlight:
        if step.admitted:
            now = time.monotonic()
            for group in step.admitted:
                if group.stats.first_scheduled_time_s is None:
                    group.stats = group.stats._replace(first_scheduled_time_s=now)
        self.num_steps += 1
        planned = self._planner.plan(step)
        return _InFlight(step, planned, self.executor.dispatch(planned.plan))

    def _take_in(self, in_flight: _InFlight) -> CoreOutputs:
        """Commits a step's tokens and returns what the requests get by it."""
        step = in_flight.step
        result = self.executor.collect(in_flight.handle)
        results = _results(step, result.tokens)
        logprobs = {} if result.logprobs is None else _logprobs_of(step, result)
        for b, sequence in enumerate(step.batch.sequences if logprobs else ()):
            if sequence.group.beams is not None and sequence in logprobs:
                results[b] = _candidates(logprobs[sequence])
        faults: list[tuple[TokenSequence, int]] = []
        if (result.tokens >= self._vocab_size).any():
            faults = self._cut_at_faults(step, result.tokens, results)
        committed = self.scheduler.commit(step, results)
        self.num_generated_tokens += committed.num_tokens
        aborted = self._abort(faults) if faults else {}
        advanced = [sequence for sequence in committed.others if sequence not in aborted]
        prompts = _prompt_logprobs_of(in_flight.planned, result)
        return CoreOutputs(_outputs(aborted, advanced, logprobs, prompts), committed.tokens)

    def _cut_at_faults(
        self, step: ScheduledStep, tokens: np.ndarray, results: list[Result]
    ) -> list[tuple[TokenSequence, int]]:
        """Leaves in `results` the tokens before the first place without one.

        Returns the sequences that have such a place, and what stands there in `tokens`, i32[B, K].
        """
        faults: list[tuple[TokenSequence, int]] = []
        for b, one in enumerate(step.scheduled):
            mine = tokens[b, : one.num_steps if one.samples else 0].tolist()
            place = next((i for i, token in enumerate(mine) if token >= self._vocab_size), None)
            if place is None or not one.sequence.group.ending_ids.isdisjoint(mine[:place]):
                continue  # it was over before
            results[b] = mine[:place]
            faults.append((one.sequence, mine[place]))
        return faults

    def _abort(self, faults: list[tuple[TokenSequence, int]]) -> dict[TokenSequence, None]:
        """Ends the sequences for which the device found no token, beams together with others'."""
        aborted: dict[TokenSequence, None] = {}
        for sequence, token in faults:
            group, reason = sequence.group, NO_TOKEN_REASONS[token - self._vocab_size]
            if sequence.is_finished:
                continue
            logger.error("request %s aborted: %s", group.request_id, reason)
            for other in [sequence] if group.beams is None else group.live:
                self.scheduler.finish(other, "abort", reason)
                aborted[other] = None
        return aborted


def _results(step: ScheduledStep, tokens: np.ndarray) -> list[Result]:
    """Returns what a step's samples, i32[B, K], are for `Scheduler.commit`."""
    B, num_steps = len(step.batch.sequences), step.batch.num_steps
    if num_steps.max() == 1:
        results: list[Result] = tokens[:B, 0].tolist()
        return results
    rows = zip(tokens[:B].tolist(), num_steps.tolist(), strict=True)
    return [mine[:count] for mine, count in rows]


def _outputs(
    aborted: Iterable[TokenSequence],
    advanced: Iterable[TokenSequence],
    logprobs: dict[TokenSequence, TokenLogprobs],
    prompts: dict[SequenceGroup, TokenLogprobs],
) -> list[CoreOutput]:
    """Returns what sequences without and with a new token give; beams only when all is over."""
    outputs = [_output(sequence) for sequence in aborted if sequence.group.beams is None]
    searches = {sequence.group: None for sequence in aborted if sequence.group.beams is not None}
    now = time.monotonic()
    for sequence in advanced:
        group, found = sequence.group, logprobs.get(sequence)
        if group.stats.first_token_time_s is None:
            group.stats = group.stats._replace(first_token_time_s=now)
        if group.beams is not None:
            searches[group] = None
            continue
        if found is None and sequence.columns is not None:
            sequence.columns.has_told[sequence.row] = True
        if sequence.finish_reason is not None or not group.is_held:
            outputs.append(_output(sequence, sequence.token_ids[-1:], found))
    for group in searches:
        if group.is_finished:
            outputs += _beam_outputs(group)
    _mark_last(outputs)
    for group, of_prompt in prompts.items():
        _attach(outputs, group, of_prompt)
    return outputs


def _output(
    sequence: TokenSequence,
    token_ids: Sequence[int] = (),
    logprobs: TokenLogprobs | None = None,
) -> CoreOutput:
    """Returns what a sequence gives with these new tokens, or with all that were held back."""
    return CoreOutput(
        sequence.request_id,
        sequence.index,
        sequence.output_token_ids if sequence.group.is_held else token_ids,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.group.is_finished,
        sequence.group.stats,
        logprobs,
    )


def _beam_outputs(group: SequenceGroup) -> list[CoreOutput]:
    """Returns the results of a search that is over, or its best beams if it was aborted."""
    assert group.beams is not None
    results = group.sequences[: group.beams.num_results]
    return [
        CoreOutput(
            group.request_id,
            index,
            beam.output_token_ids,
            beam.finish_reason,
            beam.stop_reason,
            beam is results[-1],
            group.stats,
            beam=beam_groups.figures(beam),
        )
        for index, beam in enumerate(results)
    ]


def _mark_last(outputs: list[CoreOutput]) -> None:
    """Leaves `is_last` with the last output of each request that has ended."""
    last: dict[str, CoreOutput] = {}
    for output in outputs:
        if output.is_last:
            before = last.get(output.request_id)
            if before is not None:
                before.is_last = False
            last[output.request_id] = output


def _attach(outputs: list[CoreOutput], group: SequenceGroup, found: TokenLogprobs) -> None:
    """Adds log-probabilities of a prompt to the first output of its request."""
    mine = next((output for output in outputs if output.request_id == group.request_id), None)
    if mine is None:
        if group.is_finished:
            return
        mine = _output(group.sequences[0])
        outputs.append(mine)
    mine.prompt_logprobs = found


def _logprobs_of(step: ScheduledStep, result: StepResult) -> dict[TokenSequence, TokenLogprobs]:
    """Returns the log-probabilities of the sampled tokens whose requests ask for them."""
    asking = [b for b, one in enumerate(step.scheduled) if samples_logprobs(one)]
    sequences = [step.batch.sequences[b] for b in asking]
    asked = [sequence.sampling_params.logprobs for sequence in sequences]
    assert result.logprobs is not None
    found = logprobs.read(result.logprobs[asking], -1 if -1 in asked else max(asked))
    return {
        sequence: _of_place(found, place, num_top)
        for place, (sequence, num_top) in enumerate(zip(sequences, asked, strict=True))
    }


def _of_place(found: TokenLogprobs, place: int, num_top: int) -> TokenLogprobs:
    width = found.top_token_ids.shape[1] if num_top == -1 else num_top
    one = slice(place, place + 1)
    return TokenLogprobs(
        found.logprobs[one],
        found.ranks[one],
        found.top_token_ids[one, :width],
        found.top_logprobs[one, :width],
    )


def _prompt_logprobs_of(planned: Planned, result: StepResult) -> dict[SequenceGroup, TokenLogprobs]:
    """Returns the log-probabilities of the next tokens of prompts."""
    found, end = {}, 0
    for group, count in planned.prompts:
        assert result.prompt_logprobs is not None
        begin, end = end, end + count
        num_top = group.sampling_params.prompt_logprobs
        found[group] = logprobs.read(result.prompt_logprobs[begin:end], num_top)
    return found


def _candidates(found: TokenLogprobs) -> Candidates:
    return Candidates(found.top_token_ids[0].tolist(), found.top_logprobs[0].tolist())
