"""How many tokens of which sequences a step computes, and what is counted when it is dispatched."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.core.scheduled import Batch


class TokenPlan(NamedTuple):
    """What sequences compute next, group by group, in columns.

    Attributes:
      sequences: the sequences.
      rows: i32[B], their rows.
      starts: i32[B], the position of the first token to compute of each.
      counts: i32[B], how many tokens of each.
      steps: i32[B], how many decode steps from there on, the first included; more than 1 only where
        `run_on` says so.
      drafts: i32[B], how many of the tokens, the last ones, are `TokenSequence.drafts`.
      ahead: i32[B], how many tokens behind these there shall be room for, where the device guesses.
    """

    sequences: Sequence[TokenSequence]
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    steps: np.ndarray
    drafts: np.ndarray
    ahead: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.counts.sum())

    def growth(self, columns: RowColumns) -> tuple[np.ndarray, np.ndarray]:
        """Returns which rows need room for more tokens than they have, and for how many, i32[K]."""
        ends = self.starts + self.counts + self.steps - 1 + self.ahead
        growth = ends - columns.num_reserved[self.rows]
        grows = growth > 0
        return self.rows[grows], growth[grows]

    @property
    def has_more(self) -> bool:
        """Whether some sequence makes several steps, has drafts, or room for others."""
        return bool((self.steps > 1).any() or self.drafts.any() or self.ahead.any())

    def can_wait(self, columns: RowColumns) -> np.ndarray:
        """Returns bool[B], for which sequences there is room already: those with prompts."""
        return self.starts + self.counts <= columns.num_reserved[self.rows]

    def least(self) -> "TokenPlan":
        """Returns the first of these steps, without drafts."""
        ones, zeros = np.ones_like(self.steps), np.zeros_like(self.steps)
        return self._replace(
            counts=self.counts - self.drafts, steps=ones, drafts=zeros, ahead=zeros
        )

    def only(self, chosen: np.ndarray) -> "TokenPlan":
        """Returns what those sequences compute for which bool[B] `chosen` is true."""
        sequences = list(itertools.compress(self.sequences, chosen))
        return TokenPlan(sequences, *(column[chosen] for column in self[1:]))

    def and_then(self, other: "TokenPlan") -> "TokenPlan":
        """Returns what these sequences and the other ones compute."""
        arrays = zip(self[1:], other[1:], strict=True)
        return TokenPlan([*self.sequences, *other.sequences], *map(np.concatenate, arrays))


def plan(
    columns: RowColumns, sequences: Sequence[TokenSequence], rows: np.ndarray, budget: int
) -> TokenPlan:
    """Returns what sequences in these rows compute next, in order, within the budget."""
    starts, num_tokens = columns.num_dispatched[rows], columns.num_tokens[rows]
    # At the greatest length the last token is in flight. Without anything to compute its group
    # waits for the host: its token is in flight, or its candidates wait for those of others.
    known = num_tokens - starts
    known[num_tokens == columns.max_length[rows]] = 0
    counts = known
    if columns.num_drafts.any():  # of those in flight more may be dispatched than is known
        counts = np.where(known > 0, known + columns.num_drafts[rows], 0)
    if counts.sum() > budget:
        before = counts.cumsum(dtype=np.int32) - counts
        counts = np.minimum(counts, np.maximum(budget - before, 0))
    drafts = np.maximum(counts - known, 0)
    ones, zeros = np.ones_like(counts), np.zeros_like(counts)
    planned = TokenPlan(sequences, rows, starts, counts, ones, drafts, zeros)
    return planned if counts.all() else planned.only(counts > 0)


def better_together(columns: RowColumns, rows: np.ndarray) -> bool:
    """Whether to commit the step in flight before another one is planned for these rows.

    It would hold some of the sequences only, and the others, which wait for the host, would be in
    the one after that: from then on each would have a token in every second step. A step of all
    takes less than one of each half, but for the host's share.
    """
    if not columns.waits_for_host[rows].all():
        return False  # those that do not wait keep the device busy meanwhile
    num_known = columns.num_tokens[rows] - columns.num_dispatched[rows]  # less than 0 with drafts
    is_next = num_known == 1
    return bool((num_known <= 1).all() and is_next.any() and not is_next.all())


class StepSize(NamedTuple):
    """How many tokens a step may have, and how many are worth while.

    Attributes:
      max_num_tokens: the most.
      worth_while: of so many tokens, so many of which are of sequences that decode, how many one
        step should compute; as `Buckets.worth_while`.
    """

    max_num_tokens: int
    worth_while: Callable[[int, int], int]

    def left_beside(self, columns: RowColumns, planned: TokenPlan) -> int:
        """Returns how many tokens of others a step should hold, if there are as many as it may."""
        num_fixed = int(planned.counts[~planned.can_wait(columns)].sum())
        return self.worth_while(self.max_num_tokens, num_fixed) - planned.num_tokens

    def within(self, columns: RowColumns, planned: TokenPlan) -> TokenPlan:
        """Returns the plan with as many of its tokens as are worth while in one step.

        The last ones of prompts follow in the next step: there is room for them already, and nobody
        reads them before those in front of them. A step with guessed tokens has shapes of its own,
        and keeps all.
        """
        can_wait = planned.can_wait(columns)
        if not can_wait.any() or planned.has_more:
            return planned
        waiting = np.where(can_wait, planned.counts, 0)
        num_fixed = planned.num_tokens - int(waiting.sum())
        num_left = self.worth_while(planned.num_tokens, num_fixed) - num_fixed
        if num_left >= waiting.sum():
            return planned
        before = waiting.cumsum(dtype=np.int32) - waiting
        fewer = np.minimum(waiting, np.maximum(num_left - before, 0))
        planned = planned._replace(counts=np.where(can_wait, fewer, planned.counts))
        return planned.only(planned.counts > 0)


def with_room(columns: RowColumns, planned: TokenPlan) -> TokenPlan:
    """Returns the plan with room behind the sequences of which the device guesses tokens."""
    if not columns.num_ahead:
        return planned
    ends = planned.starts + planned.counts
    samples = ends - planned.drafts == columns.num_known[planned.rows]
    guesses = columns.speculates[planned.rows] & samples
    for b in np.flatnonzero(guesses).tolist():
        guesses[b] = planned.sequences[b].group.is_forked  # else its blocks are about to be shared
    most = np.clip(columns.max_length[planned.rows] - ends, 0, columns.num_ahead)
    return planned._replace(ahead=np.where(guesses, most, 0))


def run_on(columns: RowColumns, planned: TokenPlan, most: int, *, keeps_all: bool) -> TokenPlan:
    """Returns the plan with as many decode steps, at most `most`, as are worth while.

    All are computed in one program: the host is asked once for all of them, and a sequence that
    ends before the others leaves a gap. As many as each sequence has left at least, if someone
    waits for the first to end (`keeps_all`); else as three in four have left.
    """
    num_left = columns.max_length[planned.rows] - columns.num_tokens[planned.rows]
    ends_step = planned.starts + planned.counts == columns.num_tokens[planned.rows]
    if not (ends_step & (planned.counts == 1)).all():
        return planned  # a part of a prompt
    place = 0 if keeps_all else len(num_left) // 4
    num_steps = min(most, int(np.partition(num_left, place)[place]))
    return planned._replace(steps=np.minimum(num_left, num_steps, dtype=np.int32))


def dispatch(columns: RowColumns, planned: TokenPlan) -> Batch:
    """Counts the planned tokens as dispatched; there is room for them."""
    sequences, rows, starts, counts, steps, drafts, ahead = planned
    ends, num_tokens = starts + counts - drafts, columns.num_tokens[rows]
    samples, on_device = ends == num_tokens, ends > columns.num_known[rows]
    assert (counts[on_device] == 1).all(), "the host does not know these tokens"
    numbers = columns.numbers[rows]
    batch = Batch(sequences, numbers, rows, starts, counts, samples, on_device, steps, drafts)
    columns.num_tokens[rows] = num_tokens + steps * (samples & ~columns.waits_for_host[rows])
    columns.num_dispatched[rows] = batch.ends
    columns.num_reserved[rows] = np.maximum(columns.num_reserved[rows], batch.ends + ahead)
    columns.num_drafts[rows] = drafts
    for b in np.flatnonzero(~on_device).tolist():
        assert _reads_what_is_written(sequences[b]), "reads unwritten blocks"
    return batch


def _reads_what_is_written(sequence: TokenSequence) -> bool:
    """Whether the blocks that it shares are written when its own tokens read them."""
    leader = sequence.leader
    return (
        leader is None
        or leader.is_finished
        or leader.progress.num_dispatched >= sequence.num_shared
    )
