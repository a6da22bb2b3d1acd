"""The engine's loop: schedule a step, dispatch it, then take in the step before it.

Everything about a request lives here until its last output; `LLM` and servers translate, and keep
outputs that nobody has fetched yet. One thread at a time.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq

from pallas_paged.engine.beam_search import Candidates
from pallas_paged.engine.detokenizer import Detokenizer
from pallas_paged.engine.intake import Intake
from pallas_paged.engine.kv_stats import KVStats, kv_stats
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.metrics import Counts
from pallas_paged.engine.outputs import RequestOutput, logprobs_by_token
from pallas_paged.engine.requests import Completion, Request, output_of, update_text
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

    Attributes:
      undelivered: outputs that `step` returns next; who calls `advance` takes them from here.
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
        self.counts = Counts()
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
        self._requests: dict[str, Request] = {}
        self._in_flight: InFlight | None = None
        self.undelivered: list[RequestOutput] = []
        self._failure: str | None = None  # of a change that is under way, or was cut short
        self._late_aborts: list[str] = []  # asked for during a change

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
        self._recover()
        return self._intake.make_group(prompt_token_ids, params, request_id, cache_salt)

    def all_or_none(self) -> contextlib.AbstractContextManager[None]:
        """Inside, groups are made together: if one is refused, none has drawn an id or a seed."""
        return self._intake.all_or_none()

    def add(
        self, group: SequenceGroup, prompt: str | None = None, *, final_only: bool = False
    ) -> None:
        """Queues a group made by `make_group`; `prompt` is its text, if it came as text.

        With `final_only` the request has no output before it has ended. Others have one per step,
        with a copy of all tokens so far, which costs more than the step itself where many are long.

        Raises:
          ValueError: its request id is in use, or it no longer fits beside what is pinned.
        """
        completions = [self._completion(sequence) for sequence in group.sequences]
        with self._all_or_nobody(ValueError):
            if group.request_id in self._requests:
                raise ValueError(f"request_id={group.request_id!r} is in use; choose another")
            self.scheduler.check(group)
            self._requests[group.request_id] = Request(group, prompt, completions, final_only)
            self.scheduler.add(group)
            self.counts.num_prompt_tokens += group.num_prompt_tokens

    def _completion(self, sequence: Sequence) -> Completion:
        params = sequence.sampling_params
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer,
                sequence.group.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
            )
        stop = StopMatcher(params.stop or (), include_stop_str=params.include_stop_str_in_output)
        return Completion(sequence, detokenizer, stop)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; the next `step` returns its last output.

        Allowed in every state and as often as one likes; unknown and finished ones are ignored.
        While a step is under way it is left for the next one.
        """
        if self._failure is not None:  # in the middle of a step, by a collector of garbage, say
            self._late_aborts.append(request_id)
            return
        with self._all_or_nobody():
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.group.beams is not None:
            request.completions = self._completions_of_beams(request.group)
        running = [c for c in request.completions if not c.sequence.is_finished]
        self.scheduler.abort(request_id)
        for completion in running:
            self._take_tokens(completion)
        self._give_out(request)

    def pin(self, token_ids: Seq[int], salt: str | None) -> bool:
        """Keeps the full blocks of a prefix until `unpin`; see `Scheduler.pin`."""
        with self._all_or_nobody(ValueError):
            return self.scheduler.pin(token_ids, salt)

    def unpin(self, token_ids: Seq[int], salt: str | None) -> bool:
        """Takes a `pin` back; returns False if there is none."""
        with self._all_or_nobody():
            return self.scheduler.unpin(token_ids, salt)

    def reset_prefix_cache(self) -> bool:
        """Forgets what is cached and not in use; returns whether that is all but pinned blocks."""
        with self._all_or_nobody():
            return self.memory.reset_prefix_cache()

    def _completions_of_beams(self, group: SequenceGroup) -> list[Completion]:
        """Returns those of the results of a beam search, or of its beams while it runs."""
        assert group.beams is not None
        return [self._completion(beam) for beam in group.sequences[: group.beams.num_results]]

    def kv_stats(self) -> KVStats:
        """Returns what the blocks of the pool hold now."""
        return kv_stats(self.memory, self.scheduler)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        waiting = self._requests or self.undelivered or self._failure
        return bool(waiting) or self._in_flight is not None

    # --- steps --------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step and takes in the one before; returns what changed.

        With `async_scheduling` the step dispatched here stays in flight, so that the host's work
        for the next one happens while the device computes.

        Raises:
          BaseException: whatever failed or interrupted it. Every request has been aborted, every
            block is free again, and the engine can be used on; the next `step` returns the
            requests' last outputs, with the error as `stop_reason`. So it is after an error in
            `add`, `abort`, `pin` or `unpin`, but for the errors that their docstrings name.
        """
        self.advance()
        outputs, self.undelivered = self.undelivered, []
        return outputs

    def advance(self) -> None:
        """Does what `step` does, and leaves what changed in `undelivered`."""
        with self._all_or_nobody():
            while self._late_aborts:
                self._abort(self._late_aborts.pop())
            self._step()

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

    @contextlib.contextmanager
    def _all_or_nobody(self, *refusals: type[Exception]) -> Iterator[None]:
        """Runs a change of what the engine holds; if it fails, every request has failed.

        But not by `refusals`, before which nothing has changed. An interrupt may strike anywhere,
        also while all requests are failed: `_failure` stands until that is done, and whatever comes
        next begins with `_recover`.
        """
        self._recover()
        self._failure = "interrupted"
        try:
            yield
        except refusals:
            self._failure = None
            raise
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            self._fail_all(self._failure)
            raise
        self._failure = None

    def _recover(self) -> None:
        """Ends what an interrupt has cut short."""
        if self._failure is not None:
            self._fail_all(self._failure)

    def _fail_all(self, cause: str) -> None:
        """Leaves an empty engine, and each request's last output to be given out.

        Nothing in here may fail, whatever the engine was at: no text is detokenized, no count is
        trusted, and what is not wholly taken in is not given out. It may be begun again.
        """
        self._in_flight = None
        self._late_aborts.clear()
        for request in self._requests.values():
            self._fail(request, cause)
        self.scheduler.abort_all()
        for request in list(self._requests.values()):
            self._give_out(request)
        self.runner.recover()
        self._failure = None

    def _fail(self, request: Request, cause: str) -> None:
        """Ends what runs of a request, and what has ended but was not taken in to its end."""
        group = request.group
        group.abort(cause)
        if group.beams is not None:
            first = request.completions[0]
            request.completions = [
                Completion(beam, first.detokenizer, first.stop, num_tokens=beam.num_output_tokens)
                for beam in group.sequences[: group.beams.num_results]
            ]
        for completion in request.completions:
            sequence = completion.sequence
            if group.beams is not None or completion.num_tokens < sequence.num_output_tokens:
                sequence.finish_reason, sequence.stop_reason = "abort", cause
            if (sequence.finish_reason, sequence.stop_reason) == ("abort", cause):
                completion.text += completion.stop.finish()

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
        self.counts.num_generated_tokens += len(advanced)
        changed |= dict.fromkeys(advanced)
        self._deliver(changed)

    def _deliver(self, changed: Iterable[Sequence]) -> None:
        """Takes in what is new of the sequences, and gives their requests out.

        A beam search is only given out when it is over.
        """
        now = time.monotonic()
        requests: dict[str, Request] = {}
        for sequence in changed:
            request = requests[sequence.request_id] = self._requests[sequence.request_id]
            if request.first_token_time_s is None and sequence.num_output_tokens:
                request.first_token_time_s = now
            if request.group.beams is None:
                self._take_tokens(request.completions[sequence.index])
        for request in requests.values():
            group = request.group
            if group.beams is not None and group.is_finished:
                request.completions = self._completions_of_beams(group)
                for completion in request.completions:
                    self._take_tokens(completion)
            if group.is_finished or not (request.final_only or group.beams is not None):
                self._give_out(request)

    def _give_out(self, request: Request) -> None:
        """Gives out a request as far as it has come, and forgets it when it is finished."""
        self.undelivered.append(output_of(request))
        group = request.group
        if group.is_finished:
            del self._requests[group.request_id]
            self.counts.num_finished[group.sequences[0].finish_reason or "abort"] += 1

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

    def _take_tokens(self, completion: Completion) -> None:
        """Takes in the tokens that are new; ends the sequence where a stop string has completed."""
        sequence, first = completion.sequence, completion.num_tokens
        new = sequence.token_ids[sequence.num_prompt_tokens + first :]
        if completion.detokenizer is not None:
            update_text(completion, completion.detokenizer, new)
            if completion.stop.stop_reason is not None:
                self.scheduler.finish(sequence, "stop", completion.stop.stop_reason)
        added = zip(new, sequence.logprobs[first:], strict=False)  # few requests ask for any
        completion.cumulative_logprob += sum(by_token[token].logprob for token, by_token in added)
        completion.num_tokens = first + len(new)


def _candidates(found: TokenLogprobs) -> Candidates:
    return Candidates(found.top_token_ids, found.top_logprobs)
