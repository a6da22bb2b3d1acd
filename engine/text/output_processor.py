"""Makes the outputs that callers get, of what the engine's steps gave their requests.

It holds each request from its arrival to its last output, finds out where a stop string has ended a
sequence, and makes text, log-probabilities and outputs as far as the request's `output_kind` asks
for them. A fault in one request's text ends that request alone.
"""

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from pallas_paged.engine.core.core_output import CoreOutput, Held, NewTokens
from pallas_paged.engine.outputs import RequestMetrics, RequestOutput
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_paged.engine.text.completion import Completion, Texts
from pallas_paged.engine.text.open_request import Ending, OpenRequest
from pallas_paged.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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


class OutputProcessor:
    """Makes the outputs of the requests that it was told of; starts, steps and ends nothing."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer no output has text."""
        self._tokenizer = tokenizer
        self._requests: dict[str, OpenRequest] = {}

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
        self._requests[request_id] = OpenRequest(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=tuple(prompt_token_ids),
            texts=texts,
            is_delta=output_kind is RequestOutputKind.DELTA,
            is_final_only=output_kind is RequestOutputKind.FINAL_ONLY,
            is_beam_search=is_beam_search,
            has_prompt_logprobs=params.prompt_logprobs is not None and not is_beam_search,
            is_single=num_seqs == 1 or is_beam_search,
            is_token_stream=output_kind is RequestOutputKind.DELTA
            and num_seqs == 1
            and not params.stop
            and params.logprobs is None
            and params.prompt_logprobs is None,
            num_open=1 if is_beam_search else num_seqs,
            completions=[Completion(i, texts, texts.stop_matcher()) for i in range(num_first)],
            metrics=RequestMetrics(arrival_time_s),
        )

    def process(
        self,
        outputs: Iterable[CoreOutput],
        tokens: NewTokens | None = None,
        into: list[RequestOutput] | None = None,
    ) -> Processed:
        """Takes in what a step gave, and returns what the callers get for it.

        What comes of sequences and requests that have had their end is ignored.

        Args:
          outputs: see `CoreOutputs`, as is the next.
          tokens: likewise.
          into: a list to put the outputs in, each before its request is forgotten: an interrupt
            then loses none. It becomes `Processed.outputs`; None is a new one.
        """
        now, requests = time.monotonic(), self._requests
        processed = Processed([] if into is None else into, [], {})
        changed: dict[str, OpenRequest] = {}
        for output in outputs:
            request = requests.get(output.request_id)
            if request is not None:
                self._process(request, output, now, processed, changed)
        for request_id, index, token_id in zip(*(tokens or ()), strict=True):
            request = requests.get(request_id)
            if request is None:
                continue
            if not request.is_token_stream:
                output = CoreOutput(request_id, index, [token_id], None, None, False, request.stats)
                self._process(request, output, now, processed, changed)
                continue
            try:
                processed.outputs.append(request.next_token(token_id))
            except BaseException as error:
                self._fail_by_fault(request, error, processed)
        for request in changed.values():
            self._give_out(request, now, processed)
        return processed

    def _process(
        self,
        request: OpenRequest,
        output: CoreOutput,
        now: float,
        processed: Processed,
        changed: dict[str, OpenRequest],
    ) -> None:
        """Takes in an output of the core; adds the request's own, or notes that it has changed."""
        try:
            is_new = request.take(output, processed.endings)
        except BaseException as error:
            self._fail_by_fault(request, error, processed)
            changed.pop(output.request_id, None)
            return
        if is_new:
            if request.is_single:
                self._give_out(request, now, processed)
            else:
                changed[output.request_id] = request

    def _give_out(self, request: OpenRequest, now: float, processed: Processed) -> None:
        """Adds a request's output; forgets the request if it is the last, else what is given out.

        An interrupt may strike anywhere in here; see `fail`.
        """
        try:
            output = request.output(now)
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
        held: Sequence[Held] = (),
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
          held: what the core held back of its completions.
        """
        request = self._requests[request_id]
        output = request.last_output
        if output is None:
            output = request.fail(cause, held)
        if into is not None and not any(one is output for one in into):
            into.append(output)
        del self._requests[request_id]
        return output

    def _fail_by_fault(
        self, request: OpenRequest, error: BaseException, processed: Processed
    ) -> None:
        """Ends a request whose text has failed; raises what is no fault but an interrupt."""
        # A panic of Rust code, which tokenizers are made of, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        cause = f"{type(error).__name__}: {error}"
        logger.error("request %s aborted: %s", request.request_id, cause, exc_info=error)
        processed.faults[request.request_id] = cause
        self.fail(request.request_id, cause, processed.outputs)
