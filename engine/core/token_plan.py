"""How many tokens of which sequences a step computes, and what is counted when it is dispatched."""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.scheduled import Batch

_row = operator.attrgetter("row")
_token_ids = operator.attrgetter("token_ids")
_num_tokens = operator.attrgetter("num_tokens")
_num_reserved = operator.attrgetter("num_reserved")
_num_dispatched = operator.attrgetter("num_dispatched")
_max_length = operator.attrgetter("group.max_length")
_waits_for_host = operator.attrgetter("group.waits_for_host")


class TokenPlan(NamedTuple):
    """What sequences compute next, group by group, in columns.

    Attributes:
      sequences: the sequences.
      starts: i32[B], the position of the first token to compute of each.
      counts: i32[B], how many tokens of each.
    """

    sequences: Sequence[TokenSequence]
    starts: np.ndarray
    counts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.counts.sum())

    def growth(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns which rows need room for more tokens than they have, and for how many, i32[K]."""
        growth = self.starts + self.counts - _column(self.sequences, _num_reserved)
        grows = growth > 0
        return _column(self.sequences, _row)[grows], growth[grows]

    def and_then(self, other: "TokenPlan") -> "TokenPlan":
        """Returns what these sequences and the other ones compute."""
        return TokenPlan(
            [*self.sequences, *other.sequences],
            np.concatenate([self.starts, other.starts]),
            np.concatenate([self.counts, other.counts]),
        )


def plan(sequences: Sequence[TokenSequence], budget: int) -> TokenPlan:
    """Returns what sequences compute next, in their order, within the budget; changes nothing."""
    starts, num_tokens = _column(sequences, _num_dispatched), _column(sequences, _num_tokens)
    # At the greatest length the last token is in flight. Without anything to compute its group
    # waits for the host: its token is in flight, or its candidates wait for those of others.
    counts = num_tokens - starts
    counts[num_tokens == _column(sequences, _max_length)] = 0
    if counts.sum() > budget:
        before = counts.cumsum(dtype=np.int32) - counts
        counts = np.minimum(counts, np.maximum(budget - before, 0))
    if not counts.all():
        chosen = counts > 0
        sequences = list(itertools.compress(sequences, chosen))
        starts, counts = starts[chosen], counts[chosen]
    return TokenPlan(sequences, starts, counts)


def dispatch(planned: TokenPlan) -> Batch:
    """Counts the planned tokens as dispatched; there is room for them."""
    sequences, starts, counts = planned
    ends, num_tokens = starts + counts, _column(sequences, _num_tokens)
    samples = ends == num_tokens
    on_device = ends > _column(list(map(_token_ids, sequences)), len)
    assert (counts[on_device] == 1).all(), "the host does not know these tokens"
    num_tokens += samples & ~_column(sequences, _waits_for_host).astype(bool)
    for sequence, end, length in zip(sequences, ends.tolist(), num_tokens.tolist(), strict=True):
        sequence.num_dispatched, sequence.num_tokens = end, length
        if end > sequence.num_reserved:
            sequence.num_reserved = end
    for b in np.flatnonzero(~on_device).tolist():
        assert _reads_what_is_written(sequences[b]), "reads unwritten blocks"
    return Batch(sequences, _column(sequences, _row), starts, counts, samples, on_device)


def _reads_what_is_written(sequence: TokenSequence) -> bool:
    """Whether the blocks that it shares are written when its own tokens read them."""
    leader = sequence.leader
    return leader is None or leader.is_finished or leader.num_dispatched >= sequence.num_shared


def _column[T](items: Sequence[T], read: Callable[[T], int]) -> np.ndarray:
    """Returns a number of each item, i32[B]."""
    return np.fromiter(map(read, items), np.int32, len(items))
