"""Beam search over whole vocabularies, written down as plainly as it can be: the only oracle."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

NextLogprobs = Callable[[list[int]], np.ndarray]
"""The log-probabilities f64[V] of what follows the tokens."""


class Ended(NamedTuple):
    """A hypothesis."""

    score: float
    tokens: tuple[int, ...]
    cumulative_logprob: float


def beam_search(
    next_logprobs: NextLogprobs,
    prompt: Sequence[int],
    *,
    width: int,
    max_tokens: int,
    ending_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: Any = False,
) -> list[Ended]:
    """Returns the `width` best hypotheses, best first."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[Ended] = []
    for length in range(1, max_tokens + 1):
        continuations = []
        for total, tokens in beams:
            logprobs = next_logprobs([*prompt, *tokens])
            continuations += [
                (total + float(logprob), (*tokens, token)) for token, logprob in enumerate(logprobs)
            ]
        continuations.sort(key=lambda one: -one[0])
        for total, tokens in continuations[:width]:
            if tokens[-1] in ending_ids or length == max_tokens:
                ended.append(Ended(total / length**length_penalty, tokens, total))
        ended = sorted(ended, key=lambda one: -one.score)[:width]
        beams = [one for one in continuations if one[1][-1] not in ending_ids][:width]
        if len(ended) == width:
            if early_stopping is True:
                break
            best_length = length
            if early_stopping == "never" and length_penalty > 0:
                best_length = max_tokens
            if beams[0][0] / best_length**length_penalty <= ended[-1].score:
                break
    return ended
