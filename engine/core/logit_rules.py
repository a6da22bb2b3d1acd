"""What a request changes in its logits, resolved to token ids and checked.

Everything in here is the host's; `pallas_paged.engine.device.row_state` applies the rules on the
device.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence

from pallas_paged.engine.core.grammar import Grammar
from pallas_paged.engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class LogitRules:
    """The rules of one request; `resolve` makes them.

    Attributes:
      repetition_penalty: see `SamplingParams`, as are the next two.
      presence_penalty: likewise.
      frequency_penalty: likewise.
      fill: what is added to the logits of tokens that `values` does not name: 0, or -inf where
        `allowed_token_ids` names the only ones.
      values: what is added to the logits of these tokens; -inf excludes one for good.
      bad_sequences: of at least two tokens, never to be completed.
      min_tokens: so many tokens come before one of `ending_ids`.
      ending_ids: the tokens that end the request.
      grammar: what the output has to follow, after everything else.
    """

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    fill: float
    values: dict[int, float]
    bad_sequences: tuple[tuple[int, ...], ...]
    min_tokens: int
    ending_ids: frozenset[int]
    grammar: Grammar | None = None

    @property
    def uses_penalties(self) -> bool:
        """Whether the logits depend on what the prompt and the output hold."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def uses_bias(self) -> bool:
        """Whether anything is added to the logits."""
        return bool(self.values or self.bad_sequences or self.min_tokens or self.fill)

    @property
    def max_looked_at(self) -> int:
        """How many of the last tokens `bans` looks at, at most."""
        return max(map(len, self.bad_sequences), default=1) - 1

    def value_of(self, token: int, num_output_tokens: int) -> float:
        """Returns what is added to a token's logit after so many tokens, bad sequences aside."""
        if num_output_tokens < self.min_tokens and token in self.ending_ids:
            return -math.inf
        return self.values.get(token, self.fill)

    def bans(self, output: Sequence[int], *, last_is_known: bool) -> list[tuple[int, int]]:
        """Returns the tokens that would now complete a bad sequence, as (token, condition) pairs.

        Args:
          output: the tokens generated so far, all but the last if that one is not known; the last
            `max_looked_at` of them are enough.
          last_is_known: otherwise the condition of each pair is the last token under which it
            holds; it is -1 where all is known.
        """
        found = []
        num_output = len(output) + (not last_is_known)
        for sequence in self.bad_sequences:
            *before, token = sequence
            if len(before) > num_output:
                continue
            condition = -1 if last_is_known else before.pop()
            if list(output[len(output) - len(before) :]) == before:
                found.append((token, condition))
        return found


def resolve(
    params: SamplingParams,
    *,
    bad_sequences: Sequence[tuple[int, ...]],
    vocab_size: int,
    ending_ids: Collection[int],
    grammar: Grammar | None = None,
) -> LogitRules | None:
    """Returns the rules of a request, None if it has none.

    Args:
      params: what the request asks for.
      bad_sequences: the tokens of its `bad_words`, each of at least one token of the vocabulary.
      vocab_size: V; token ids are below it.
      ending_ids: the tokens that end the request.
      grammar: of its `structured_outputs`.

    Raises:
      ValueError: a token id is outside the vocabulary, or the rules leave no token at all.
    """
    for field in ("logit_bias", "allowed_token_ids"):
        outside = [token for token in getattr(params, field) or () if token >= vocab_size]
        if outside:
            raise ValueError(
                f"{field} holds {outside[0]}, which is outside the vocabulary of {vocab_size} "
                "tokens"
            )
    bias = params.logit_bias or {}
    fill, values = 0.0, dict(bias)
    if params.allowed_token_ids is not None:
        fill, values = -math.inf, {id: bias.get(id, 0.0) for id in params.allowed_token_ids}
    excluded = {sequence[0] for sequence in bad_sequences if len(sequence) == 1}
    values |= dict.fromkeys(excluded, -math.inf)
    rules = LogitRules(
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        fill=fill,
        values=values,
        bad_sequences=tuple(sequence for sequence in bad_sequences if len(sequence) > 1),
        min_tokens=params.min_tokens if ending_ids else 0,
        ending_ids=frozenset(ending_ids),
        grammar=grammar,
    )
    if not rules.uses_penalties and not rules.uses_bias:
        return None if grammar is None else rules
    _check_that_some_token_is_left(params, rules, excluded, vocab_size)
    return rules


def _check_that_some_token_is_left(
    params: SamplingParams, rules: LogitRules, excluded: set[int], vocab_size: int
) -> None:
    """Counts instead of listing: the vocabulary is large, and the rules are few."""
    allowed = params.allowed_token_ids
    if allowed is None:
        num_left = vocab_size - len(excluded)
        num_going_on = vocab_size - len(excluded | rules.ending_ids)
        source = "the vocabulary"
    else:
        left = set(allowed) - excluded
        num_left, num_going_on = len(left), len(left - rules.ending_ids)
        source = f"allowed_token_ids={allowed!r:.80}"
    if not num_left:
        raise ValueError(
            f"bad_words={params.bad_words!r:.80} excludes all of {source}; allow another token"
        )
    if rules.min_tokens and not num_going_on:
        raise ValueError(
            f"min_tokens={params.min_tokens} excludes the tokens that end the request, and "
            f"{source} has no other; allow another token, or use min_tokens=0"
        )
