"""The engine's loop: schedule a step, dispatch it, then take in the step before it.

Everything about a request lives here until its last output; `LLM` and servers translate, and keep
outputs that nobody has fetched yet. One thread at a time.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from pallas_paged.engine import beam_groups
from pallas_paged.engine.beam_search import Candidates
from pallas_paged.engine.detokenizer import Detokenizer
from pallas_paged.engine.intake import Intake
from pallas_paged.engine.kv_stats import KVStats, kv_stats
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    logprobs_by_token,
)
from pallas_paged.engine.runner import InFlight, Runner
from pallas_paged.engine.sampling_params import BeamSearchParams, SamplingParams
from pallas_paged.engine.scheduler import ScheduledStep, Scheduler
from pallas_paged.engine.sequence import Sequence, SequenceGroup
from pallas_paged.engine.stop import StopMatcher
from pallas_paged.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NO_TOKEN_REASONS = (
    "logits are not finite",
    "no token is left: allowed_token_ids, bad_words and min_tokens exclude all of them",
)
"""What V, V + 1 mean in the place of a token."""


@dataclasses.dataclass
class _Completion:
    """A sequence, and the text made of it so far."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    stop: StopMatcher
    text: str = ""
    num_detokenized: int = 0

    def take_text(self, text: str, num_tokens: int) -> None:
        """Adds to the text what `num_tokens` output tokens have settled."""
        is_early = num_tokens <= self.sequence.sampling_params.min_tokens
        self.text += self.stop.skip(text) if is_early else self.stop.append(text)


@dataclasses.dataclass
class _Request:
    """A request between arrival and its last output.

    The completions of a beam search are made when it ends; until then there is a first beam.
    """

    group: SequenceGroup
    prompt: str | None
    completions: list[_Completion]
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None


class Engine:
    """Runs requests over a scheduler, a memory and a runner.

    Args:
      scheduler: whose memory is `memory`.
      memory: the owner of the block tables.
      runner: the device.
      vocab_size: V; token ids are below it.
      max_model_len: most tokens of a sequence.
      eos_token_ids: tokens that end an output unless `ignore_eos`.
      tokenizer: None serves token prompts only, and outputs have no text.
      seed: where the seeds of requests that bring none are drawn from.
      max_logprobs: see `EngineConfig`.
      async_scheduling: keep one step in flight while the next is scheduled.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        memory: BlockTableMemory,
        runner: Runner,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Seq[int] = (),
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        max_logprobs: int = 20,
        async_scheduling: bool = True,
    ):
        self.scheduler = scheduler
        self.memory = memory
        self.tokenizer = tokenizer
        self.num_steps = 0
        self.num_generated_tokens = 0
        self.runner = runner
        self._vocab_size = vocab_size
        self._intake = Intake(
            scheduler,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
            seed=seed,
            max_logprobs=max_logprobs,
        )
        self._async_scheduling = async_scheduling
        self._requests: dict[str, _Request] = {}
        self._in_flight: InFlight | None = None
        self._undelivered: list[RequestOutput] = []

    def check_idle(self) -> None:
        """Asserts that no request is left, and that every block is free, cached or pinned."""
        assert not self.has_unfinished, f"unfinished: {sorted(self._requests)}"
        self.scheduler.check_invariants()
        free = self.memory.num_free_blocks + len(self.memory.pins)
        usable = self.memory.num_usable_blocks
        assert free == usable, f"{usable - free} blocks are lost"

    # --- requests -----------------------------------------------------------------------------

    def make_group(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams | BeamSearchParams,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> SequenceGroup:
        """Returns a group that `add` accepts, and queues nothing; see `Intake.make_group`."""
        return self._intake.make_group(prompt_token_ids, params, request_id, cache_salt)

    def add(self, group: SequenceGroup, prompt: str | None = None) -> None:
        """Queues a group made by `make_group`; `prompt` is its text, if it came as text.

        Raises:
          ValueError: its request id is in use.
        """
        if group.request_id in self._requests:
            raise ValueError(f"request_id={group.request_id!r} is in use; choose another")
        completions = [self._completion(sequence) for sequence in group.sequences]
        self.scheduler.add(group)
        self._requests[group.request_id] = _Request(group, prompt, completions)

    def _completion(self, sequence: Sequence) -> _Completion:
        params = sequence.sampling_params
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer,
                sequence.group.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
            )
        stop = StopMatcher(params.stop or (), include_stop_str=params.include_stop_str_in_output)
        return _Completion(sequence, detokenizer, stop)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; the next `step` returns its last output.

        Allowed in every state and as often as one likes; unknown and finished ones are ignored.
        """
        request = self._requests.get(request_id)
        if request is not None:
            if request.group.beams is not None:
                request.completions = self._completions_of_beams(request.group)
            running = [c for c in request.completions if not c.sequence.is_finished]
            self.scheduler.abort(request_id)
            for completion in running:
                self._update_text(completion)
            self._undelivered.append(self._output(request))

    def _completions_of_beams(self, group: SequenceGroup) -> list[_Completion]:
        """Returns those of the results of a beam search, or of its beams while it runs."""
        assert group.beams is not None
        return [self._completion(beam) for beam in group.sequences[: group.beams.num_results]]

    def kv_stats(self) -> KVStats:
        """Returns what the blocks of the pool hold now."""
        return kv_stats(self.memory, self.scheduler)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._requests or self._undelivered) or self._in_flight is not None

    # --- steps --------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step and takes in the one before; returns what changed.

        With `async_scheduling` the step dispatched here stays in flight, so that the host's work
        for the next one happens while the device computes.

        Raises:
          Exception: whatever failed. Every request has been aborted, every block is free again, and
            the engine can be used on; the next `step` returns the requests' last outputs, with
            the error as `stop_reason`.
        """
        try:
            self._step()
        except BaseException as error:
            self._fail_all(f"{type(error).__name__}: {error}")
            raise
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def drain(self) -> None:
        """Steps until nothing is left to do; what the requests still get is lost."""
        while self.has_unfinished:
            self.step()

    def _step(self) -> None:
        step = self.scheduler.schedule()
        dispatched = self._dispatch(step) if step is not None else None
        if self._async_scheduling:
            dispatched, self._in_flight = self._in_flight, dispatched
        if dispatched is not None:
            self._take_in(dispatched)

    def _fail_all(self, cause: str) -> None:
        """Leaves an empty engine; nothing in here may fail, and no text is detokenized for that."""
        self._in_flight = None
        for request in self._requests.values():
            search, first = request.group.beams, request.completions[0]
            if search is not None:
                request.completions = [
                    _Completion(beam, first.detokenizer, first.stop)
                    for beam in request.group.sequences[: search.num_results]
                ]
        running = [c for r in self._requests.values() for c in r.completions]
        running = [c for c in running if not c.sequence.is_finished]
        self.scheduler.abort_all()
        for completion in running:
            completion.sequence.stop_reason = cause
            completion.text += completion.stop.finish()
        for request in list(self._requests.values()):
            self._undelivered.append(self._output(request))
        self.runner.recover()

    def _dispatch(self, step: ScheduledStep) -> InFlight:
        now = time.monotonic()
        for scheduled in step.scheduled:
            request = self._requests[scheduled.sequence.request_id]
            if request.first_scheduled_time_s is None:
                request.first_scheduled_time_s = now
        self.num_steps += 1
        return self.runner.dispatch(step, self.memory.state)

    def _take_in(self, in_flight: InFlight) -> None:
        """Commits a step's tokens and delivers what the requests have by now."""
        tokens, logprobs, prompts = self.runner.collect(in_flight)
        self._keep_prompt_logprobs(prompts)
        changed: dict[Sequence, None] = {}  # a set in order
        for share, token in zip(in_flight.step.scheduled, tokens, strict=True):
            if share.samples and token >= self._vocab_size and not share.sequence.is_finished:
                name = share.sequence.request_id
                reason = NO_TOKEN_REASONS[token - self._vocab_size]
                logger.error("request %s aborted: %s", name, reason)
                group = share.sequence.group
                for sequence in [share.sequence] if group.beams is None else group.live:
                    self.scheduler.finish(sequence, "abort", reason)
                    changed[sequence] = None
        results = [
            token if found is None or share.sequence.group.beams is None else _candidates(found)
            for share, token, found in zip(in_flight.step.scheduled, tokens, logprobs, strict=True)
        ]
        advanced = self.scheduler.commit(in_flight.step, results)
        self._keep_logprobs(in_flight.step, logprobs, advanced)
        self.num_generated_tokens += len(advanced)
        changed |= dict.fromkeys(advanced)
        now = time.monotonic()
        requests: dict[str, _Request] = {}
        for sequence in changed:
            request = requests[sequence.request_id] = self._requests[sequence.request_id]
            if request.first_token_time_s is None and sequence.num_output_tokens:
                request.first_token_time_s = now
            if request.group.beams is None:
                self._update_text(request.completions[sequence.index])
        for request in requests.values():
            self._deliver(request)

    def _deliver(self, request: _Request) -> None:
        """Gives out a request as far as it has come, but a beam search only when it is over."""
        if request.group.beams is not None:
            if not request.group.is_finished:
                return
            request.completions = self._completions_of_beams(request.group)
            for completion in request.completions:
                self._update_text(completion)
        self._undelivered.append(self._output(request))

    def _keep_logprobs(
        self,
        step: ScheduledStep,
        logprobs: Seq[TokenLogprobs | None],
        advanced: Seq[Sequence],
    ) -> None:
        """Files the log-probabilities of the tokens that were committed."""
        committed = set(advanced)
        for share, found in zip(step.scheduled, logprobs, strict=True):
            if found is not None and share.sequence in committed:
                share.sequence.logprobs.append(
                    logprobs_by_token(
                        share.sequence.token_ids[-1], found, self._decode_for(share.sequence)
                    )
                )

    def _keep_prompt_logprobs(self, prompts: Seq[tuple[Sequence, list[TokenLogprobs]]]) -> None:
        """Files the log-probabilities of the next tokens of prompts."""
        for sequence, found in prompts:
            first = 1 + len(sequence.group.prompt_logprobs)
            tokens = sequence.prompt_token_ids[first : first + len(found)]
            sequence.group.prompt_logprobs += [
                logprobs_by_token(token, one, self._decode_for(sequence))
                for token, one in zip(tokens, found, strict=True)
            ]

    def _decode_for(self, sequence: Sequence) -> Callable[[int], str] | None:
        """Returns what gives a single token's text, if the request wants text."""
        tokenizer = self.tokenizer
        if tokenizer is None or not sequence.sampling_params.detokenize:
            return None
        return tokenizer.decode_token

    def _update_text(self, completion: _Completion) -> None:
        """Detokenizes what is new, and ends the sequence where a stop string has completed."""
        sequence, detokenizer = completion.sequence, completion.detokenizer
        if detokenizer is None:
            return
        first = completion.num_detokenized
        new = sequence.token_ids[sequence.num_prompt_tokens + first :]
        completion.num_detokenized += len(new)
        params = sequence.sampling_params
        if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
            new = new[:-1]  # the token that ended the output is not part of its text
        for index, token in enumerate(new, first):
            completion.take_text(detokenizer.append(token), index + 1)
        if sequence.is_finished:
            completion.take_text(detokenizer.finish(), completion.num_detokenized)
        if completion.stop.stop_reason is not None:
            self.scheduler.finish(sequence, "stop", completion.stop.stop_reason)
        elif sequence.is_finished:
            completion.text += completion.stop.finish()

    def _output(self, request: _Request) -> RequestOutput:
        """Returns the request as far as it has come, and forgets it when it is finished."""
        group = request.group
        finished = group.is_finished
        if finished:
            del self._requests[group.request_id]
        return RequestOutput(
            request_id=group.request_id,
            prompt=request.prompt,
            prompt_token_ids=group.prompt_token_ids,
            prompt_logprobs=(
                None
                if group.sampling_params.prompt_logprobs is None
                else (None, *group.prompt_logprobs)
            ),
            outputs=tuple(
                CompletionOutput(
                    index=completion.sequence.index,
                    text=None if completion.detokenizer is None else completion.text,
                    token_ids=tuple(completion.sequence.output_token_ids),
                    finish_reason=completion.sequence.finish_reason,
                    stop_reason=completion.sequence.stop_reason,
                    **_logprobs_of(completion.sequence),
                )
                for completion in request.completions
            ),
            finished=finished,
            metrics=RequestMetrics(
                arrival_time_s=group.arrival_time,
                first_scheduled_time_s=request.first_scheduled_time_s,
                first_token_time_s=request.first_token_time_s,
                finish_time_s=time.monotonic() if finished else None,
                num_preemptions=group.num_preemptions,
            ),
            num_cached_tokens=group.num_cached_tokens,
        )


def _candidates(found: TokenLogprobs) -> Candidates:
    return Candidates(found.top_token_ids, found.top_logprobs)


def _logprobs_of(sequence: Sequence) -> dict[str, Any]:
    """Returns the fields of `CompletionOutput` that hold log-probabilities, if it has them."""
    if sequence.group.beams is not None:
        cumulative_logprob, score = beam_groups.figures(sequence)
        return {"cumulative_logprob": cumulative_logprob, "score": score}
    if sequence.sampling_params.logprobs is None:
        return {}
    pairs = zip(sequence.output_token_ids, sequence.logprobs, strict=True)
    return {
        "logprobs": tuple(sequence.logprobs),
        "cumulative_logprob": sum(by_token[token].logprob for token, by_token in pairs),
    }
