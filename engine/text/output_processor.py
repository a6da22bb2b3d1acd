"""Makes the outputs that callers get, of what the engine's steps gave their requests.

It holds each request from its arrival to its last output, finds out where a stop string has ended a
sequence, and makes text, log-probabilities and outputs as far as the request's `output_kind` asks
for them. A fault in one request's text ends that request alone.
"""

import dataclasses
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from pallas_paged.engine.core.core_output import CoreOutput, RequestStats, TokenLogprobs
from pallas_paged.engine.outputs import Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_paged.engine.text.completion import Completion, Texts
from pallas_paged.engine.text.logprobs import logprobs_by_token
from pallas_paged.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Ending(NamedTuple):
    """A stop string ended a sequence, which the core has not ended yet; the caller does.

    Attributes:
      request_id: the request's.
      index: which of its completions.
      stop_reason: the stop string.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index
    stop_reason: str


class Processed(NamedTuple):
    """What a step's outputs of the core came to.

    Attributes:
      outputs: what the callers get now, at most one output of each request.
      endings: the sequences to end in the core.
      faults: what went wrong, by the request whose text failed. Its last output is among
        `outputs`; the caller aborts it in the core.
    """

    outputs: list[RequestOutput]
    endings: list[Ending]
    faults: dict[str, str]


@dataclasses.dataclass(slots=True, eq=False)
class _Request:
    """A request that has not had its last output.

    Attributes:
      request_id: see `OutputProcessor.add`, as are the next two.
      prompt: likewise.
      prompt_token_ids: likewise.
      texts: how its completions get their text.
      is_delta: whether an output holds what is new since the one before.
      is_final_only: whether there is one output, at the end.
      is_beam_search: whether its completions are the results of a beam search.
      has_prompt_logprobs: whether it asks for them.
      is_single: whether a step has at most one thing to give out for it.
      num_open: completions that have not ended; of a beam search 1, until the last result is there.
      completions: by index; those of a beam search as they come.
      metrics: as they are now; replaced when they change, as outputs hold them.
      is_given: whether what is new of it may be in an output that has been given out.
      last_output: the last one, from when it is made until the request is forgotten.
      stats: what the core said last.
      prompt_logprobs: those that outputs have had.
      found_prompt_logprobs: what came since, to be made into more of them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    texts: Texts
    is_delta: bool
    is_final_only: bool
    is_beam_search: bool
    has_prompt_logprobs: bool
    is_single: bool
    num_open: int
    completions: list[Completion]
    metrics: RequestMetrics
    is_given: bool = False
    last_output: RequestOutput | None = None
    stats: RequestStats = dataclasses.field(default_factory=RequestStats)
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    found_prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)


class OutputProcessor:
    """Makes the outputs of the requests that it was told of; starts, steps and ends nothing."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer no output has text."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def request_ids(self) -> Collection[str]:
        """The requests that have not had their last output."""
        return self._requests.keys()

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None,
        num_seqs: int,
        is_beam_search: bool,
        arrival_time_s: float,
        output_kind: RequestOutputKind,
    ) -> None:
        """Takes note of a request before the core's first output of it; decodes nothing.

        Args:
          request_id: its name, which no unfinished request has.
          prompt_token_ids: the prompt.
          params: what it asks for; of a beam search, what each beam does.
          prompt: the prompt's text, if it came as text.
          num_seqs: how many completions it has; of no matter for a beam search.
          is_beam_search: whether its completions are the results of a beam search. Such a request
            has one output, whatever `output_kind` says, and no log-probabilities of single tokens.
          arrival_time_s: when it arrived, as `time.monotonic()`.
          output_kind: what each of its outputs holds.
        """
        assert request_id not in self._requests, f"{request_id} is in use"
        if is_beam_search:
            output_kind = RequestOutputKind.FINAL_ONLY
        texts = Texts(
            self._tokenizer,
            prompt_token_ids,
            params,
            final_only=output_kind is RequestOutputKind.FINAL_ONLY,
            is_beam_search=is_beam_search,
        )
        num_first = 0 if is_beam_search else num_seqs  # its results come when it is over
        self._requests[request_id] = _Request(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=tuple(prompt_token_ids),
            texts=texts,
            is_delta=output_kind is RequestOutputKind.DELTA,
            is_final_only=output_kind is RequestOutputKind.FINAL_ONLY,
            is_beam_search=is_beam_search,
            has_prompt_logprobs=params.prompt_logprobs is not None and not is_beam_search,
            is_single=num_seqs == 1 or is_beam_search,
            num_open=1 if is_beam_search else num_seqs,
            completions=[Completion(i, texts, texts.stop_matcher()) for i in range(num_first)],
            metrics=RequestMetrics(arrival_time_s),
        )

    def process(
        self, outputs: Iterable[CoreOutput], into: list[RequestOutput] | None = None
    ) -> Processed:
        """Takes in what a step gave, and returns what the callers get for it.

        What comes of sequences and requests that have had their end is ignored.

        Args:
          outputs: of the core.
          into: a list to put the outputs in, each before its request is forgotten: an interrupt
            then loses none. It becomes `Processed.outputs`; None is a new one.
        """
        now = time.monotonic()
        processed = Processed([] if into is None else into, [], {})
        changed: dict[str, _Request] = {}
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            try:
                if not _take(request, output, processed.endings):
                    continue
            except BaseException as error:
                self._fail_by_fault(request, error, processed)
                changed.pop(output.request_id, None)
                continue
            if request.is_single:
                self._give_out(request, now, processed)
            else:
                changed[output.request_id] = request
        for request in changed.values():
            self._give_out(request, now, processed)
        return processed

    def _give_out(self, request: _Request, now: float, processed: Processed) -> None:
        """Adds a request's output; forgets the request if it is the last, else what is given out.

        An interrupt may strike anywhere in here; see `fail`.
        """
        try:
            output = _output_of(request, now)
        except BaseException as error:
            self._fail_by_fault(request, error, processed)
            return
        if output.finished:
            request.last_output = output
            processed.outputs.append(output)
            del self._requests[request.request_id]
        elif request.is_delta:
            request.is_given = True
            processed.outputs.append(output)
            for completion in request.completions:
                if completion.is_changed:
                    completion.clear()
            request.is_given = False
        else:
            processed.outputs.append(output)

    def fail(
        self,
        request_id: str,
        cause: str | None,
        into: list[RequestOutput] | None = None,
        held: Sequence[Sequence[int]] = (),
    ) -> RequestOutput:
        """Ends a request now as "abort", and forgets it; returns its last output.

        It holds what there is of the request by now. Nothing is decoded: what waits for more tokens
        is left out, as is all text that would have been made at the end, and log-probabilities that
        are in no output yet have no texts. It may be called whatever an interrupt has left behind,
        and again if it was interrupted itself.

        Args:
          request_id: one of `request_ids`.
          cause: the `stop_reason` of what has not ended yet.
          into: a list that gets the output before the request is forgotten.
          held: the tokens of its completions that the core held back.
        """
        request = self._requests[request_id]
        if request.last_output is None:
            if not request.completions:  # a beam search that is not over
                request.completions.append(Completion(0, request.texts, None))
            for completion, token_ids in zip(request.completions, held, strict=False):
                if completion.finish_reason is None:
                    completion.token_ids = list(token_ids)
            for completion in request.completions:
                completion.fail(cause, is_given=request.is_given)
            request.num_open = 0
            request.last_output = _output_of(request, time.monotonic(), decodes=False)
        output = request.last_output
        if into is not None and not any(one is output for one in into):
            into.append(output)
        del self._requests[request_id]
        return output

    def _fail_by_fault(self, request: _Request, error: BaseException, processed: Processed) -> None:
        """Ends a request whose text has failed; raises what is no fault but an interrupt."""
        # A panic of Rust code, which tokenizers are made of, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        cause = f"{type(error).__name__}: {error}"
        logger.error("request %s aborted: %s", request.request_id, cause, exc_info=error)
        processed.faults[request.request_id] = cause
        self.fail(request.request_id, cause, processed.outputs)


def _take(request: _Request, output: CoreOutput, endings: list[Ending]) -> bool:
    """Takes in an output of the core; returns whether the request has an output for it."""
    if output.stats is not request.stats:
        _note_stats(request, output.stats)
    if output.prompt_logprobs is not None:
        request.found_prompt_logprobs.append(output.prompt_logprobs)
    index, token_ids, finish_reason = output.index, output.token_ids, output.finish_reason
    if index == len(request.completions):
        assert request.is_beam_search
        request.completions.append(Completion(index, request.texts, None, beam=output.beam))
    completion = request.completions[index]
    if completion.finish_reason is not None:
        return False
    if not token_ids and finish_reason is None:
        return False  # log-probabilities of the prompt alone
    completion.take(token_ids, finish_reason, output.stop_reason, output.logprobs)
    if completion.finish_reason is not None:
        if not request.is_beam_search:  # which ends with its last result
            request.num_open -= 1
        if finish_reason is None:
            assert isinstance(completion.stop_reason, str)
            endings.append(Ending(request.request_id, index, completion.stop_reason))
    if output.is_last:
        request.num_open = 0
    return not (request.is_final_only and request.num_open)


def _note_stats(request: _Request, stats: RequestStats) -> None:
    request.metrics = dataclasses.replace(
        request.metrics,
        first_scheduled_time_s=stats.first_scheduled_time_s,
        first_token_time_s=stats.first_token_time_s,
        num_preemptions=stats.num_preemptions,
    )
    request.stats = stats


def _output_of(request: _Request, now: float, decodes: bool = True) -> RequestOutput:
    """Returns what a request has now; see `Completion.output`."""
    is_finished, completions = not request.num_open, request.completions
    if is_finished:
        request.metrics = dataclasses.replace(request.metrics, finish_time_s=now)
    if request.is_delta and not request.is_single:
        completions = [completion for completion in completions if completion.is_changed]
    return RequestOutput(
        request.request_id,
        request.prompt,
        request.prompt_token_ids,
        (completions[0].output(decodes),)
        if request.is_single and len(completions) == 1
        else tuple([completion.output(decodes) for completion in completions]),
        is_finished,
        request.metrics,
        request.stats.num_cached_tokens,
        _prompt_logprobs_of(request, decodes) if request.has_prompt_logprobs else None,
    )


def _prompt_logprobs_of(
    request: _Request, decodes: bool
) -> tuple[dict[int, Logprob] | None, ...] | None:
    """Returns those of the prompt as far as they have come; of a delta only in its first output."""
    decode = request.texts.decode_token if decodes else None
    made = request.prompt_logprobs
    if request.found_prompt_logprobs or made is None:
        made = (None,) if made is None else made
        for found in request.found_prompt_logprobs:
            made += tuple(logprobs_by_token(request.prompt_token_ids[len(made) :], found, decode))
        # In one statement, which no interrupt divides.
        request.prompt_logprobs, request.found_prompt_logprobs = made, []
        return made
    return None if request.is_delta else made
