"""What a request gives back."""

import dataclasses
from collections.abc import Callable

from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.sequence import FinishReason


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, as seconds of `time.monotonic()`.

    Attributes:
      arrival_time_s: the engine took the request in.
      first_scheduled_time_s: it first took part in a step; None while it waits.
      first_token_time_s: its first token reached the host; None before.
      finish_time_s: it finished or was aborted; None before.
      num_preemptions: times it lost its blocks and was recomputed.
    """

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None
    num_preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class Logprob:
    """How likely the model found a token, before bias, masks, penalties and temperature.

    Attributes:
      logprob: log-softmax of the model's logits.
      rank: the token's place among all tokens, 1 for the most likely.
      decoded_token: its text, None without a tokenizer or with `detokenize=False`.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request, as far as it has come.

    Attributes:
      index: which of the request's completions this is.
      text: the text of the tokens; None without a tokenizer or with `detokenize=False`. While
        streaming it ends before a character or a stop string that may still be under way. A
        tokenizer's `clean_up_tokenization_spaces` is not applied.
      token_ids: the generated tokens, the one that ended the completion included.
      cumulative_logprob: sum of the log-probabilities of the tokens; None unless asked for, or of a
        beam search.
      logprobs: per token, by token id: the most likely tokens in their order and the token itself;
        None unless asked for.
      finish_reason: None while it runs.
      stop_reason: the stop string or the token id of `stop_token_ids` that ended it, None when EOS
        did; what went wrong when the engine aborted it.
      score: of a beam search, the sum with the length penalty; else None.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request with its completions, finished or, while streaming, as far as they have come.

    A beam search has an output when it is over, its results best first. If it was aborted, they are
    its best beams at that moment.

    Attributes:
      request_id: the engine's name for the request.
      prompt: the prompt's text; None when it came as tokens alone.
      prompt_token_ids: the prompt's tokens.
      outputs: the completions, by index; of a beam search, best first.
      finished: all completions are.
      metrics: times and counts of this request.
      num_cached_tokens: prompt tokens whose KV came from the prefix cache.
      prompt_logprobs: per prompt token, as in `CompletionOutput.logprobs`; None for the first one,
        which nothing predicts. All are there with the first generated token, those of the chunks
        computed so far in what is aborted before. None unless asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


def logprobs_by_token(
    token: int, found: TokenLogprobs, decode: Callable[[int], str] | None
) -> dict[int, Logprob]:
    """Returns the most likely tokens of one place, in their order, and the token that stands there.

    `decode` gives a token's text, None leaves the texts out.
    """
    ranked = zip(found.top_token_ids, found.top_logprobs, strict=True)
    figures = {top: (logprob, rank) for rank, (top, logprob) in enumerate(ranked, 1)}
    figures.setdefault(token, (found.logprob, found.rank))
    return {
        each: Logprob(logprob, rank, decode(each) if decode is not None else None)
        for each, (logprob, rank) in figures.items()
    }
