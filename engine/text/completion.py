"""Collects what belongs to one completion: tokens, log-probabilities, text up to a stop string."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_paged.engine.core.core_output import (
    BeamFigures,
    FinishReason,
    TokenLogprobs,
    Versions,
)
from pallas_paged.engine.outputs import CompletionOutput, Logprob
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.detokenizer import Detokenizer, prompt_context, text_of
from pallas_paged.engine.text.logprobs import logprobs_by_token
from pallas_paged.engine.text.stop import StopMatcher
from pallas_paged.engine.text.tokenizer import Tokenizer


class Texts:
    """What the completions of a request have in common: how text is made behind its prompt.

    Attributes:
      has_text: whether they have text.
      are_read: whether their text is made while their tokens arrive.
      are_late: whether it is made when they have ended.
      has_logprobs: whether they have log-probabilities.
      decode_token: gives the text of a single token; None if nobody wants text.
      params: what the request asks for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        final_only: bool,
        is_beam_search: bool,
    ):
        """Decodes nothing yet."""
        self._tokenizer = tokenizer if params.detokenize else None
        self._prompt_token_ids = prompt_token_ids
        self._context: list[int] | None = None
        self.params = params
        self.has_text = self._tokenizer is not None
        self.are_late = self.has_text and final_only and not params.stop
        self.are_read = self.has_text and not self.are_late
        self.has_logprobs = params.logprobs is not None and not is_beam_search
        self.decode_token: Callable[[int], str] | None = None
        if self._tokenizer is not None:
            self.decode_token = self._tokenizer.decode_token

    def stop_matcher(self) -> StopMatcher | None:
        """Returns what looks for stop strings in a text that begins; None if there are none."""
        if not self.params.stop or not self.has_text:
            return None
        return StopMatcher(
            self.params.stop, include_stop_str=self.params.include_stop_str_in_output
        )

    def detokenizer(self) -> Detokenizer:
        """Returns what makes a completion's text while its tokens arrive."""
        assert self._tokenizer is not None
        return self._tokenizer.detokenizer(
            self._prompt_context(), skip_special_tokens=self.params.skip_special_tokens
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Returns the text of a completion's tokens at once."""
        assert self._tokenizer is not None
        return text_of(
            self._tokenizer,
            self._prompt_context(),
            token_ids,
            skip_special_tokens=self.params.skip_special_tokens,
        )

    def _prompt_context(self) -> list[int]:
        if self._context is None:
            assert self._tokenizer is not None
            self._context = prompt_context(
                self._tokenizer,
                self._prompt_token_ids,
                skip_special_tokens=self.params.skip_special_tokens,
            )
        return self._context


@dataclasses.dataclass(slots=True, eq=False)
class Completion:
    """What has been made of a completion: all of it or, where `clear` is called, what is new.

    Attributes:
      index: which of the request's completions it is.
      texts: what it has in common with the others.
      stop: looks for its stop strings, if it has any.
      detokenizer: makes its text, from the first token on.
      num_read: the tokens in whose text stop strings have been looked for.
      token_ids: its tokens, those aside that have been cleared.
      text: what may be given out of the text, and has not been cleared.
      logprobs: of `token_ids`, as far as they have been made.
      found: log-probabilities that `logprobs` are still to be made of, with their tokens.
      cumulative_logprob: the sum of all tokens' log-probabilities, where it has any.
      finish_reason: None while it runs.
      stop_reason: see `CompletionOutput`.
      beam: of a result of a beam search.
      is_whole: see `CoreOutput`.
      is_torn: whether text may be missing between `text` and what `stop` holds back.
      is_changed: whether anything is new since it was cleared.
      versions: see `CoreOutput`.
      num_cleared: tokens that have been cleared.
    """

    index: int
    texts: Texts
    stop: StopMatcher | None
    detokenizer: Detokenizer | None = None
    num_read: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    found: list[tuple[Sequence[int], TokenLogprobs]] = dataclasses.field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    beam: BeamFigures | None = None
    is_whole: bool = False
    is_torn: bool = False
    is_changed: bool = False
    versions: Versions = ()
    num_cleared: int = 0

    def begun_detokenizer(self) -> Detokenizer:
        """Returns what makes its text, which is begun with the first token."""
        if self.detokenizer is None:
            self.detokenizer = self.texts.detokenizer()
        return self.detokenizer

    def take(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        logprobs: TokenLogprobs | None,
    ) -> None:
        """Takes in what a step gave; see `CoreOutput`.

        If a stop string ends in it, that ends the completion, and tokens behind it are dropped. An
        end by `max_tokens` with the same token is one by the stop string, any other end stands.

        An interrupt may strike anywhere in here. So the tokens come behind what is made of them,
        and the end behind everything.
        """
        self.is_changed = True
        texts = self.texts
        if texts.are_read:
            detokenizer = self.begun_detokenizer()
            if self.stop is not None:
                token_ids, finish_reason, stop_reason = self._look_for_stop(
                    self.stop, detokenizer, token_ids, finish_reason, stop_reason
                )
            elif finish_reason is None:
                for token_id in token_ids:
                    self.text += detokenizer.append(token_id)
            else:
                for token_id in self._tokens_with_text(token_ids, finish_reason):
                    self.text += detokenizer.append(token_id)
                self.text += detokenizer.finish()
        if logprobs is not None and texts.has_logprobs:
            self.found.append((token_ids, logprobs))
        self.token_ids += token_ids
        if finish_reason is not None:
            if texts.are_late:
                self.text = texts.text_of(self._tokens_with_text(self.token_ids, finish_reason))
            self.stop_reason = stop_reason
            self.finish_reason = finish_reason

    def _tokens_with_text(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> Sequence[int]:
        """Returns the tokens without the one that ended the completion: its text is left out."""
        keeps_all = self.is_whole or self.texts.params.include_stop_str_in_output
        if finish_reason == "stop" and not keeps_all:
            return token_ids[:-1]
        return token_ids

    def _look_for_stop(
        self,
        stop: StopMatcher,
        detokenizer: Detokenizer,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> tuple[Sequence[int], FinishReason | None, int | str | None]:
        """Adds the text up to a stop string; returns the tokens up to its end, and how it ends."""
        min_tokens, first = self.texts.params.min_tokens, self.num_read
        for token_id in self._tokens_with_text(token_ids, finish_reason):
            piece = detokenizer.append(token_id)
            self.num_read += 1
            self.is_torn = True
            self.text += stop.skip(piece) if self.num_read <= min_tokens else stop.append(piece)
            self.is_torn = False
            if stop.stop_reason is not None:
                if self.num_read - first < len(token_ids):
                    return token_ids[: self.num_read - first], "stop", stop.stop_reason
                break
        if finish_reason is not None:
            piece = detokenizer.finish()
            is_early = first + len(token_ids) <= min_tokens
            self.is_torn = True
            self.text += stop.skip(piece) if is_early else stop.append(piece)
            self.text += stop.finish()
        if stop.stop_reason is not None and finish_reason in (None, "length"):
            return token_ids, "stop", stop.stop_reason
        return token_ids, finish_reason, stop_reason

    def fail(self, cause: str | None, *, is_given: bool = False) -> None:
        """Ends it by "abort" as it is, if it has not ended; may strike at any point of `take`.

        `is_given` says that what is new may have been given out: then it is not given out again.
        """
        if is_given and self.is_changed:
            self.finish_reason, self.is_torn = None, True
            self.clear()
        if self.finish_reason is None:
            self.is_changed = True
            if self.stop is not None and not self.is_torn:
                self.text += self.stop.finish()
            self.stop_reason = cause
            self.finish_reason = "abort"

    def output(self, decodes: bool = True) -> CompletionOutput:
        """Returns what there is of it; without `decodes` new log-probabilities have no texts."""
        texts = self.texts
        text = self.text if texts.has_text else None
        output = CompletionOutput(self.index, text, tuple(self.token_ids))
        output.version_runs = self.version_runs(len(self.token_ids))
        if texts.has_logprobs:
            decode = texts.decode_token if decodes else None
            if self.found:
                made, total = self.logprobs[:], self.cumulative_logprob
                for token_ids, found in self.found:
                    new = logprobs_by_token(token_ids, found, decode)
                    for token_id, by_token in zip(token_ids, new, strict=True):
                        total += by_token[token_id].logprob
                    made += new
                # In one statement, which no interrupt divides.
                self.logprobs, self.cumulative_logprob, self.found = made, total, []
            # Of an interrupted `take` there may be more of them than tokens.
            output.logprobs = tuple(self.logprobs[: len(self.token_ids)])
            output.cumulative_logprob = self.cumulative_logprob
        if self.finish_reason is not None:
            output.finish_reason = self.finish_reason
            output.stop_reason = self.stop_reason
            if self.beam is not None:
                output.cumulative_logprob, output.score = self.beam
        return output

    def version_runs(self, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Returns for so many tokens behind those that have been cleared how many are of which."""
        begin, versions = self.num_cleared, self.versions
        if not versions or not num_tokens:
            return ()
        if len(versions) == 1:
            return ((num_tokens, versions[0][1]),)
        end = begin + num_tokens
        borders = [*(place for place, _ in versions[1:]), end]
        runs = []
        for (_, version), border in zip(versions, borders, strict=True):
            count = min(border, end) - begin
            if count > 0:
                runs.append((count, version))
                begin += count
        return tuple(runs)

    def clear(self) -> None:
        """Forgets what an output has given out."""
        num_cleared = self.num_cleared + len(self.token_ids)
        # In one statement, which no interrupt divides.
        self.text, self.token_ids, self.logprobs, self.is_changed, self.num_cleared = (
            *("", [], []),
            *(False, num_cleared),
        )
