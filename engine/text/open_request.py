"""Makes one request's outputs of what the engine's steps gave it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pallas_paged.engine.core.core_output import CoreOutput, Held, RequestStats, TokenLogprobs
from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.text.completion import Completion, Texts
from pallas_paged.engine.text.logprobs import logprobs_by_token


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


@dataclasses.dataclass(slots=True, eq=False)
class OpenRequest:
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
      is_token_stream: whether a token and its text are all that a delta of it holds.
      num_open: completions that have not ended; of a beam search 1, until the last result is there.
      completions: by index; those of a beam search as they come.
      metrics: as they are now; replaced when they change, as outputs hold them.
      append: of a token stream, gives the text that is settled by the next token.
      is_given: whether what is new of it may be in an output that has been given out.
      last_output: the last one, from when it is made until the request is forgotten.
      num_cached_tokens: prompt tokens found in the prefix cache.
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
    is_token_stream: bool
    num_open: int
    completions: list[Completion]
    metrics: RequestMetrics
    append: Callable[[int], str] | None = None
    is_given: bool = False
    last_output: RequestOutput | None = None
    num_cached_tokens: int = 0
    stats: RequestStats = dataclasses.field(default_factory=RequestStats)
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    found_prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    def take(self, output: CoreOutput, endings: list[Ending]) -> bool:
        """Takes in an output of the core; returns whether it has an output for it."""
        if output.stats is not self.stats:
            self._note_stats(output.stats)
        if output.prompt_logprobs is not None:
            self.found_prompt_logprobs.append(output.prompt_logprobs)
        index, token_ids, finish_reason = output.index, output.token_ids, output.finish_reason
        if index == len(self.completions):
            assert self.is_beam_search
            self.completions.append(Completion(index, self.texts, None, beam=output.beam))
        completion = self.completions[index]
        if completion.finish_reason is not None:
            return False
        if not token_ids and finish_reason is None:
            return False  # log-probabilities of the prompt alone
        completion.is_whole = output.is_whole
        if output.versions:  # a token alone is told without: they are as they were
            completion.versions = output.versions
        completion.take(token_ids, finish_reason, output.stop_reason, output.logprobs)
        if completion.finish_reason is not None:
            if not self.is_beam_search:  # which ends with its last result
                self.num_open -= 1
            if finish_reason is None:
                assert isinstance(completion.stop_reason, str)
                endings.append(Ending(self.request_id, index, completion.stop_reason))
        if output.is_last:
            self.num_open = 0
        return not (self.is_final_only and self.num_open)

    def _note_stats(self, stats: RequestStats) -> None:
        self.metrics = dataclasses.replace(
            self.metrics,
            first_scheduled_time_s=stats.first_scheduled_time_s,
            first_token_time_s=stats.first_token_time_s,
            num_preemptions=stats.num_preemptions,
        )
        self.num_cached_tokens = stats.num_cached_tokens
        self.stats = stats

    def next_token(self, token_id: int) -> RequestOutput:
        """Returns the delta of a token stream for its next token, and keeps nothing of it."""
        if self.append is None and self.texts.are_read:
            self.append = self.completions[0].begun_detokenizer().append
        text = None if self.append is None else self.append(token_id)
        completion = self.completions[0]
        runs = completion.version_runs(1)
        completion.num_cleared += 1
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            (CompletionOutput(0, text, (token_id,), version_runs=runs),),
            False,
            self.metrics,
            self.num_cached_tokens,
        )

    def output(self, now: float, decodes: bool = True) -> RequestOutput:
        """Returns what it has now; see `Completion.output`."""
        is_finished, completions = not self.num_open, self.completions
        if is_finished:
            self.metrics = dataclasses.replace(self.metrics, finish_time_s=now)
        if self.is_delta and not self.is_single:
            completions = [completion for completion in completions if completion.is_changed]
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            (completions[0].output(decodes),)
            if self.is_single and len(completions) == 1
            else tuple([completion.output(decodes) for completion in completions]),
            is_finished,
            self.metrics,
            self.num_cached_tokens,
            self._prompt_logprobs_so_far(decodes) if self.has_prompt_logprobs else None,
        )

    def _prompt_logprobs_so_far(
        self, decodes: bool
    ) -> tuple[dict[int, Logprob] | None, ...] | None:
        """Returns the prompt's as far as they have come; of a delta only in its first output."""
        decode = self.texts.decode_token if decodes else None
        made = self.prompt_logprobs
        if self.found_prompt_logprobs or made is None:
            first, targets = self.texts.params.logprob_targets(self.prompt_token_ids)
            made = (None,) * first if made is None else made
            for found in self.found_prompt_logprobs:
                made += tuple(logprobs_by_token(targets[len(made) :], found, decode))
            # In one statement, which no interrupt divides.
            self.prompt_logprobs, self.found_prompt_logprobs = made, []
            return made
        return None if self.is_delta else made

    def fail(self, cause: str | None, held: Sequence[Held]) -> RequestOutput:
        """Ends it by "abort" as it is; see `OutputProcessor.fail`."""
        if not self.completions:  # a beam search that is not over
            self.completions.append(Completion(0, self.texts, None))
        for one, (token_ids, versions, logprobs) in zip(self.completions, held, strict=False):
            if one.finish_reason is None:
                found = [] if logprobs is None else [(token_ids, logprobs)]
                # In one statement, which no interrupt divides: what is held is told once.
                one.token_ids, one.versions, one.found = list(token_ids), versions, found
        for completion in self.completions:
            completion.fail(cause, is_given=self.is_given)
        self.num_open = 0
        self.last_output = self.output(time.monotonic(), decodes=False)
        return self.last_output
