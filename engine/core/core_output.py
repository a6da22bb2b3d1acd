"""What a step gave each request: new token ids, their log-probabilities, how it ended; no text."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]

Versions = tuple[tuple[int, int], ...]
"""Which weights a sequence's output tokens came from: (place of the first token, version) pairs.

Each pair is of the tokens up to the next pair's.
"""


class TokenLogprobs(NamedTuple):
    """How likely the model found n places of a sequence, one after the other.

    Attributes:
      logprobs: f32[n], of the tokens that stand there.
      ranks: i32[n], their places among all tokens, 1 for the most likely; of equals the lower id
        comes first.
      top_token_ids: i32[n, K], the most likely tokens in that order, as many as were asked for.
      top_logprobs: f32[n, K], theirs.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_token_ids: np.ndarray
    top_logprobs: np.ndarray


class Held(NamedTuple):
    """All that a sequence has which has not given anything yet.

    Attributes:
      token_ids: its output tokens.
      versions: theirs.
      logprobs: theirs, if its request asks for them and there is a token.
    """

    token_ids: Sequence[int]
    versions: Versions
    logprobs: TokenLogprobs | None = None


class RequestStats(NamedTuple):
    """What the engine knows of a request beside its tokens; replaced whenever it changes.

    Attributes:
      first_scheduled_time_s: when it first took part in a step, as `time.monotonic()`.
      first_token_time_s: when its first token came to the host.
      num_cached_tokens: prompt tokens found in the prefix cache when it was first admitted.
      num_preemptions: how often it lost its blocks.
    """

    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


class BeamFigures(NamedTuple):
    """What tells one result of a beam search from another; see `CompletionOutput`.

    Attributes:
      cumulative_logprob: the sum of its tokens' log-probabilities.
      score: that with the length penalty; None of a beam that was aborted before its first token.
    """

    cumulative_logprob: float
    score: float | None


@dataclasses.dataclass(slots=True)
class CoreOutput:
    """What a step gave one sequence of a request.

    A sequence of a group that `is_held` gives nothing before it ends, and then all its tokens at
    once. So does a beam search with its results.

    Attributes:
      request_id: the request's.
      index: which of its completions; of a beam search, which of the results, best first.
      token_ids: the new tokens, in order. Empty where a sequence ends without one.
      finish_reason: why the sequence ended; None while it goes on.
      stop_reason: the stop token that ended it, or what went wrong; None for any other end.
      is_last: whether nothing more comes for the request.
      stats: the request's, as they are now.
      logprobs: of `token_ids`, if the request asks for them.
      prompt_logprobs: of the next tokens of the prompt, if the request asks for them. They come
        with the first sequence, also where it gets no token yet.
      beam: of a result of a beam search.
      is_whole: whether it ended by "stop" without a token that only says so: its last one is a part
        of the output.
      versions: of all tokens of the sequence so far.
    """

    request_id: str
    index: int
    token_ids: Sequence[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    is_last: bool
    stats: RequestStats
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None
    beam: BeamFigures | None = None
    is_whole: bool = False
    versions: Versions = ()


class NewTokens(NamedTuple):
    """What most sequences get of most steps: a token each, and nothing else to say.

    Columns of plain values cost the host less than an object for each sequence.

    Attributes:
      request_ids: see `CoreOutput`, as are the next two.
      indices: likewise.
      token_ids: the new tokens, one of each sequence.
    """

    request_ids: list[str]
    indices: list[int]
    token_ids: list[int]


class CoreOutputs(NamedTuple):
    """What a step gave.

    Attributes:
      outputs: of the sequences that got no token, or have more to say; to be read first.
      tokens: of all others; the `stats` of their requests, and the `versions` of their tokens, are
        those that `outputs` told last.
    """

    outputs: list[CoreOutput]
    tokens: NewTokens
