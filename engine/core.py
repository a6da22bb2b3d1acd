"""The engine's loop: schedule a step, dispatch it, then take in the step before it.

Everything about a request lives here until its last output; `LLM` and servers translate, and keep
outputs that nobody has fetched yet. One thread at a time.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from pallas_paged.engine import logprobs as token_logprobs
from pallas_paged.engine.detokenizer import Detokenizer
from pallas_paged.engine.logit_rules import resolve
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    logprobs_by_token,
)
from pallas_paged.engine.runner import InFlight, Runner
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.scheduler import ScheduledStep, Scheduler
from pallas_paged.engine.sequence import Sequence
from pallas_paged.engine.stop import StopMatcher
from pallas_paged.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NO_TOKEN_REASONS = (
    "logits are not finite",
    "no token is left: allowed_token_ids, bad_words and min_tokens exclude all of them",
)
"""What V, V + 1 mean in the place of a token."""


@dataclasses.dataclass
class _Request:
    """A request between arrival and its last output."""

    sequence: Sequence
    prompt: str | None
    params: SamplingParams
    detokenizer: Detokenizer | None
    stop: StopMatcher
    text: str = ""
    num_detokenized: int = 0
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None

    def take_text(self, text: str, num_tokens: int) -> None:
        """Adds to the text what `num_tokens` output tokens have settled."""
        is_early = num_tokens <= self.params.min_tokens
        self.text += self.stop.skip(text) if is_early else self.stop.append(text)


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
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_logprobs = max_logprobs
        self._async_scheduling = async_scheduling
        self._seeds = np.random.default_rng(seed)
        self._requests: dict[str, _Request] = {}
        self._in_flight: InFlight | None = None
        self._undelivered: list[RequestOutput] = []
        self._counter = itertools.count()

    def check_idle(self) -> None:
        """Asserts that no request is left, and that the block tables agree: every block is free."""
        assert not self.has_unfinished, f"unfinished: {sorted(self._requests)}"
        self.scheduler.check_invariants()
        free, usable = self.memory.num_free_blocks, self.memory.num_usable_blocks
        assert free == usable, f"{usable - free} blocks are lost"

    # --- requests -----------------------------------------------------------------------------

    def make_sequence(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        request_id: str | None = None,
    ) -> Sequence:
        """Returns a sequence that `add` accepts; queues nothing.

        A request without an id or a seed draws one.

        Raises:
          ValueError: the prompt is empty, too long for the model, or for the pool together with
            `max_tokens`; a token id is outside the vocabulary; stop strings without a tokenizer;
            more log-probabilities than `max_logprobs`; rules for the logits that cannot be, see
            `logit_rules.resolve`.
            The message names field, value and way out.
        """
        ids = _checked_token_ids(prompt_token_ids, self._vocab_size)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        for token_id in params.stop_token_ids or ():
            if token_id >= self._vocab_size:
                raise ValueError(
                    f"stop_token_ids holds {token_id}, which is outside the vocabulary of "
                    f"{self._vocab_size} tokens"
                )
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, field)
            token_logprobs.check(field, asked, self._max_logprobs, self._vocab_size)
        # No longer than the model allows, and than the pool could hold if it were alone.
        longest = min(
            self._max_model_len, self.memory.num_usable_blocks * self.memory.state.block_size
        )
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = max(1, longest - len(ids))
        if params.min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens={params.min_tokens} is more than the {max_tokens} tokens that fit "
                "behind the prompt; lower it, or shorten the prompt"
            )
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        stop_token_ids = frozenset(params.stop_token_ids or ())
        sequence = Sequence(
            request_id=f"request-{next(self._counter)}" if request_id is None else request_id,
            prompt_token_ids=ids,
            max_tokens=max_tokens,
            eos_token_ids=eos_token_ids,
            stop_token_ids=stop_token_ids,
            arrival_time=time.monotonic(),
            sampling_params=self._with_seed(params),
            reads_prefix_cache=params.prompt_logprobs is None,
            logit_rules=resolve(
                params,
                vocab_size=self._vocab_size,
                ending_ids=eos_token_ids | stop_token_ids,
                tokenizer=self.tokenizer,
            ),
        )
        self.scheduler.check(sequence)
        if len(ids) + max_tokens > self._max_model_len:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_tokens={max_tokens} are more than "
                f"max_model_len={self._max_model_len}; shorten one of them, or pass "
                "max_tokens=None for as many as fit"
            )
        return sequence

    def add(self, sequence: Sequence, prompt: str | None = None) -> None:
        """Queues a sequence made by `make_sequence`; `prompt` is its text, if it came as text.

        Raises:
          ValueError: its request id is in use.
        """
        if sequence.request_id in self._requests:
            raise ValueError(f"request_id={sequence.request_id!r} is in use; choose another")
        params = sequence.sampling_params
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer,
                sequence.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
            )
        stop = StopMatcher(params.stop or (), include_stop_str=params.include_stop_str_in_output)
        self.scheduler.add(sequence)
        self._requests[sequence.request_id] = _Request(sequence, prompt, params, detokenizer, stop)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; the next `step` returns its last output.

        Allowed in every state and as often as one likes; unknown and finished ones are ignored.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.abort(request_id)
            self._deliver(request)

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
        for sequence in self.scheduler.abort_all():
            sequence.stop_reason = cause
        for request in list(self._requests.values()):
            request.text += request.stop.finish()
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
        changed = []
        for share, token in zip(in_flight.step.scheduled, tokens, strict=True):
            if share.samples and token >= self._vocab_size and not share.sequence.is_finished:
                name = share.sequence.request_id
                reason = NO_TOKEN_REASONS[token - self._vocab_size]
                logger.error("request %s aborted: %s", name, reason)
                self.scheduler.finish(share.sequence, "abort", reason)
                changed.append(share.sequence)
        advanced = self.scheduler.commit(in_flight.step, tokens)
        self._keep_logprobs(in_flight.step, logprobs, advanced)
        self.num_generated_tokens += len(advanced)
        now = time.monotonic()
        for sequence in advanced:
            request = self._requests[sequence.request_id]
            if request.first_token_time_s is None:
                request.first_token_time_s = now
        for sequence in changed + advanced:
            self._deliver(self._requests[sequence.request_id])

    def _keep_logprobs(
        self,
        step: ScheduledStep,
        logprobs: Seq[TokenLogprobs | None],
        advanced: Seq[Sequence],
    ) -> None:
        """Files the log-probabilities of the tokens that were committed."""
        for share, found in zip(step.scheduled, logprobs, strict=True):
            if found is not None and share.sequence in advanced:
                share.sequence.logprobs.append(
                    logprobs_by_token(
                        share.sequence.token_ids[-1], found, self._decode_for(share.sequence)
                    )
                )

    def _keep_prompt_logprobs(self, prompts: Seq[tuple[Sequence, list[TokenLogprobs]]]) -> None:
        """Files the log-probabilities of the next tokens of prompts."""
        for sequence, found in prompts:
            first = 1 + len(sequence.prompt_logprobs)
            tokens = sequence.prompt_token_ids[first : first + len(found)]
            sequence.prompt_logprobs += [
                logprobs_by_token(token, one, self._decode_for(sequence))
                for token, one in zip(tokens, found, strict=True)
            ]

    def _decode_for(self, sequence: Sequence) -> Callable[[int], str] | None:
        """Returns what gives a single token's text, if the request wants text."""
        tokenizer = self.tokenizer
        if tokenizer is None or not sequence.sampling_params.detokenize:
            return None
        return lambda token: tokenizer.decode([token], skip_special_tokens=False)

    def _deliver(self, request: _Request) -> None:
        """Brings the request's text up to date, and leaves its output for `step` to return."""
        self._update_text(request)
        self._undelivered.append(self._output(request))

    def _update_text(self, request: _Request) -> None:
        """Detokenizes what is new, and ends the request where a stop string has completed."""
        sequence = request.sequence
        if request.detokenizer is None:
            return
        first = request.num_detokenized
        new = sequence.token_ids[sequence.num_prompt_tokens + first :]
        request.num_detokenized += len(new)
        if sequence.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            new = new[:-1]  # the token that ended the output is not part of its text
        for index, token in enumerate(new, first):
            request.take_text(request.detokenizer.append(token), index + 1)
        if sequence.is_finished:
            request.take_text(request.detokenizer.finish(), request.num_detokenized)
        if request.stop.stop_reason is not None:
            self.scheduler.finish(sequence, "stop", request.stop.stop_reason)
        elif sequence.is_finished:
            request.text += request.stop.finish()

    def _output(self, request: _Request) -> RequestOutput:
        sequence = request.sequence
        finished = sequence.is_finished
        if finished:
            del self._requests[sequence.request_id]
        completion = CompletionOutput(
            index=0,
            text=None if request.detokenizer is None else request.text,
            token_ids=tuple(sequence.output_token_ids),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            **_logprobs_of(sequence),
        )
        return RequestOutput(
            request_id=sequence.request_id,
            prompt=request.prompt,
            prompt_token_ids=sequence.prompt_token_ids,
            prompt_logprobs=(
                None
                if request.params.prompt_logprobs is None
                else (None, *sequence.prompt_logprobs)
            ),
            outputs=(completion,),
            finished=finished,
            metrics=RequestMetrics(
                arrival_time_s=sequence.arrival_time,
                first_scheduled_time_s=request.first_scheduled_time_s,
                first_token_time_s=request.first_token_time_s,
                finish_time_s=time.monotonic() if finished else None,
                num_preemptions=sequence.num_preemptions,
            ),
        )

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None:
            return params
        return dataclasses.replace(params, seed=int(self._seeds.integers(1 << 63)))


def _logprobs_of(sequence: Sequence) -> dict[str, Any]:
    """Returns the fields of `CompletionOutput` that hold log-probabilities, if it has them."""
    if sequence.sampling_params.logprobs is None:
        return {}
    pairs = zip(sequence.output_token_ids, sequence.logprobs, strict=True)
    return {
        "logprobs": tuple(sequence.logprobs),
        "cumulative_logprob": sum(by_token[token].logprob for token, by_token in pairs),
    }


def _checked_token_ids(token_ids: Seq[int], vocab_size: int) -> tuple[int, ...]:
    try:
        ids = np.asarray(token_ids)
    except ValueError as error:
        raise ValueError(f"prompt_token_ids must be a flat list of integers: {error}") from error
    if ids.size == 0:
        raise ValueError("the prompt is empty; give it at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"prompt_token_ids must be a flat list of integers, not {token_ids!r:.80}")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"prompt_token_ids holds {outside[0]}, which is outside the vocabulary of "
            f"{vocab_size} tokens"
        )
    return tuple(ids.tolist())
