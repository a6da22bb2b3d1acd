"""Beam search as a rule: which continuations go on, which are kept as results, and when it ends.

The semantics are those of transformers' `generate(num_beams=..., do_sample=False)`. Of all
continuations of all beams by one token, the W best by the sum of log-probabilities may end: those
by an ending token, and all of them at `max_tokens`, become hypotheses, of which the W best by score
are kept. The W best of those that do not end go on. A hypothesis' score is its sum divided by
`length ** length_penalty`, where the length counts its generated tokens, the last one included.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

EarlyStopping = Literal["never"] | bool


class Candidates(NamedTuple):
    """The most likely next tokens of a beam, best first; at least `num_candidates` of them."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


class Hypothesis(NamedTuple):
    """A result of the search.

    Attributes:
      token_ids: the generated tokens.
      cumulative_logprob: the sum of their log-probabilities.
      score: that sum with the length penalty.
    """

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    score: float


class Selection(NamedTuple):
    """The beams that go on, best first.

    Attributes:
      search: the search after the step.
      parents: which beam each of them continues.
      tokens: by which token.
    """

    search: "BeamSearch"
    parents: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSearch:
    """A search between two steps; the beams' tokens are the caller's.

    Attributes:
      width: W, how many beams go on and how many hypotheses are kept.
      max_tokens: every hypothesis ends there.
      ending_ids: tokens that end a hypothesis.
      length_penalty: above 0 favours long hypotheses, below 0 short ones.
      early_stopping: when the search ends, once there are W hypotheses. True: at once. False: when
        the best beam, scored at its present length, is no better than the worst of them. "never":
        when it could not become better, were it scored at the length that is best for it; with a
        positive `length_penalty` that is `max_tokens`, else the present one.
      num_results: how many hypotheses are results, at most W.
      cumulative_logprobs: the sum of each beam, best first; one beam at the start.
      hypotheses: best first.
      is_done: whether the search is over: there are W hypotheses then.
    """

    width: int
    max_tokens: int
    ending_ids: frozenset[int] = frozenset()
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_results: int = 1
    cumulative_logprobs: tuple[float, ...] = (0.0,)
    hypotheses: tuple[Hypothesis, ...] = ()
    is_done: bool = False

    @property
    def num_candidates(self) -> int:
        """Continuations of each beam that matter: beside ending tokens there must be W others."""
        return self.width + len(self.ending_ids)

    @property
    def results(self) -> tuple[Hypothesis, ...]:
        """The best hypotheses, best first."""
        return self.hypotheses[: self.num_results]

    def score(self, cumulative_logprob: float, num_tokens: int) -> float:
        """Returns the sum with the length penalty for so many generated tokens."""
        return cumulative_logprob / num_tokens**self.length_penalty

    def advance(
        self, outputs: Sequence[Sequence[int]], candidates: Sequence[Candidates]
    ) -> Selection:
        """Returns the search after one more token; the same beams if equal sums come in any order.

        Args:
          outputs: the generated tokens of each beam, all of one length below `max_tokens`.
          candidates: of each beam. Of equal sums the earlier beam's comes first, and of one beam's
            the earlier candidate.
        """
        assert not self.is_done
        assert len(outputs) == len(candidates) == len(self.cumulative_logprobs)
        count, length = self.num_candidates, len(outputs[0]) + 1
        tokens = np.array([found.token_ids[:count] for found in candidates])
        logprobs = np.array([found.logprobs[:count] for found in candidates], np.float64)
        assert tokens.shape == (len(outputs), count), "fewer candidates than the search needs"
        sums = np.array(self.cumulative_logprobs)[:, None] + logprobs
        ranked = np.argsort(-sums, axis=None, kind="stable")
        is_ending = np.isin(tokens, list(self.ending_ids)).ravel()

        is_last = length == self.max_tokens
        best = ranked[: self.width]
        ended = best if is_last else best[is_ending[best]]
        hypotheses = self._merged(outputs, ended // count, tokens.flat[ended], sums.flat[ended])
        going_on = ranked[~is_ending[ranked]][: self.width]
        is_done = is_last or self._is_over(sums.flat[going_on[0]], length, hypotheses)
        if is_done:
            going_on = going_on[:0]
        search = dataclasses.replace(
            self,
            cumulative_logprobs=tuple(sums.flat[going_on].tolist()),
            hypotheses=hypotheses,
            is_done=is_done,
        )
        parents, next_tokens = going_on // count, tokens.flat[going_on]
        return Selection(search, tuple(parents.tolist()), tuple(next_tokens.tolist()))

    def _merged(
        self,
        outputs: Sequence[Sequence[int]],
        parents: np.ndarray,
        tokens: np.ndarray,
        sums: np.ndarray,
    ) -> tuple[Hypothesis, ...]:
        """Returns the W best of the hypotheses and those that have just ended."""
        new = []
        for parent, token, total in zip(
            parents.tolist(), tokens.tolist(), sums.tolist(), strict=True
        ):
            token_ids = (*outputs[parent], token)
            new.append(Hypothesis(token_ids, total, self.score(total, len(token_ids))))
        ranked = sorted([*self.hypotheses, *new], key=lambda one: -one.score)
        return tuple(ranked[: self.width])

    def _is_over(self, best_sum: float, length: int, hypotheses: Sequence[Hypothesis]) -> bool:
        """Whether the beams, of which the best has this sum, are not worth going on with."""
        if len(hypotheses) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return self.score(best_sum, length) <= hypotheses[-1].score
