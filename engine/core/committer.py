"""Takes in what a step computed: new tokens, filled blocks, next beams; and how sequences end."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

from pallas_paged.engine.core import beam_groups, matching
from pallas_paged.engine.core.beam_search import Candidates
from pallas_paged.engine.core.core_output import FinishReason, NewTokens
from pallas_paged.engine.core.entries import part_from, repeated_blocks
from pallas_paged.engine.core.queues import Queues
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.core.scheduled import Batch, ScheduledStep
from pallas_paged.engine.core.speculation import Proposer
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.sharing import FullBlocks, window_blocks

type Result = int | list[int] | Candidates
"""What a step gave a sequence: the sampled token; a list of tokens; or the candidates of a beam.

Of a list, which ends where the sequence does at the latest, the step has computed as many tokens as
the sequence's steps are more than one; the next one is its next input, like a sampled token alone.
It may only be shorter if the sequence ends with it, or is finished at once; and longer, where the
group `waits_for_host`.
"""


class Committed(NamedTuple):
    """What sequences got by a step.

    Attributes:
      num_tokens: how many tokens all sequences got, those that their groups hold back included.
      others: the sequences that have more to tell than a token (see `RowColumns.has_told`), or have
        ended with it.
      tokens: of the sequences that have nothing else to tell, and do not hold theirs back.
    """

    num_tokens: int
    others: list[TokenSequence]
    tokens: NewTokens


class _Appended(NamedTuple):
    """What the sequences of a batch got that still have their rows.

    Attributes:
      gets: bool[B], who got a token.
      lengths: i32[B], how many tokens these have now.
      ended: the places in the batch of those that got an ending one; in any order.
      searching: the groups of beams that got candidates, in order.
    """

    gets: np.ndarray
    lengths: np.ndarray
    ended: list[int]
    searching: dict[SequenceGroup, None]


class Committer:
    """Changes sequences as their steps come back, and gives back the blocks of those that end."""

    def __init__(
        self,
        memory: Memory,
        columns: RowColumns,
        queues: Queues,
        host_pool: HostPool,
        sliding_window: int | None,
        proposer: Proposer | None,
    ) -> None:
        """Works on the scheduler's own memory, columns, queues, host pool and proposer."""
        self._memory = memory
        self._columns = columns
        self._queues = queues
        self._host_pool = host_pool
        self._proposer = proposer
        self._window_blocks = None
        if sliding_window is not None:
            self._window_blocks = window_blocks(sliding_window, memory.block_size)

    def commit(self, step: ScheduledStep, results: Sequence[Result]) -> Committed:
        """Takes a step's results; see `Scheduler.commit`."""
        columns, S = self._columns, self._memory.block_size
        batch = step.batch
        sequences, rows, samples = batch.sequences, batch.rows, batch.samples
        assert len(results) == len(sequences)
        here = columns.numbers[rows] == batch.numbers  # others have ended, or lost their blocks
        gets, lengths, ended, searching = self._append(batch, here, results)
        # The last token is not computed; what is behind it, or from wrong drafts, is nobody's.
        ends = np.where(gets, np.minimum(batch.ends, lengths - 1), batch.ends)
        columns.num_computed[rows[here]] = ends[here]
        is_filled = here & (ends // S > columns.num_remembered[rows])
        columns.num_known[rows[gets]] = lengths[gets]
        masked = gets & columns.uses_mask[rows]
        ended += [b for b in np.flatnonzero(masked).tolist() if matching.is_over(sequences[b])]
        # Of those that wait for the host nothing was counted when it was dispatched.
        columns.num_tokens[rows[gets]] = np.maximum(columns.num_tokens[rows], lengths)[gets]
        is_over = gets & (lengths == columns.max_length[rows])
        is_over[ended] = True
        is_told = gets & columns.has_told[rows] & ~is_over
        tokens = self._tokens(rows, results, np.flatnonzero(is_told & ~columns.is_held[rows]))
        num_new = int((lengths - batch.starts - batch.num_tokens + batch.num_drafts)[gets].sum())
        others, over = _chosen(sequences, gets & ~is_told), _chosen(sequences, is_over)
        if not here.all():
            places = np.flatnonzero(~here).tolist()
            late = [
                (sequences[b], int(batch.num_steps[b]), results[b] if samples[b] else None)
                for b in places
            ]
            num_late, more, more_over = _append_late(late)
            num_new, others, over = num_new + num_late, others + more, over + more_over
        if self._proposer is not None:
            self._take_back(self._proposer, batch, gets, ends)
        if is_filled.any():
            self._remember(_chosen(sequences, is_filled))
        ended_rows: list[int] = []
        for sequence in over:
            ended_rows += self._retire([sequence], *matching.ending_of(sequence))
        if ended_rows or searching:
            children = self._advance_beams(searching, ended_rows)
            others += children
            num_new += len(children)
        return Committed(num_new, others, tokens)

    def _append(self, batch: Batch, here: np.ndarray, results: Sequence[Result]) -> _Appended:
        """Gives the sequences that still have their rows, bool[B], what the step found for them."""
        columns = self._columns
        token_ids, ending_ids = columns.token_ids, columns.ending_ids
        gets = here & batch.samples
        lengths = batch.starts + batch.num_tokens - batch.num_drafts + 1
        ended: list[int] = []
        searching: dict[SequenceGroup, None] = {}
        places = np.flatnonzero(gets)
        for b, row in zip(places.tolist(), batch.rows[places].tolist(), strict=True):
            result = results[b]
            if not isinstance(result, int):
                sequence = batch.sequences[b]
                if isinstance(result, Candidates):
                    sequence.candidates = result
                    searching[sequence.group] = None
                    gets[b] = False
                    continue
                tokens = _until_end(sequence, result)
                if not tokens:
                    gets[b] = False
                    continue
                *before, result = tokens
                token_ids[row] += before
                lengths[b] += len(before)
                columns.has_told[row] &= columns.is_held[row]  # `NewTokens` has one token of each
            token_ids[row].append(result)
            if result in ending_ids[row]:
                ended.append(b)
        return _Appended(gets, lengths, ended, searching)

    def _take_back(
        self, proposer: Proposer, batch: Batch, gets: np.ndarray, ends: np.ndarray
    ) -> None:
        """Takes back what steps computed from wrong drafts, and lets go who gains too little.

        `gets` bool[B] are the sequences that got a token, `ends` i32[B] where the right ones end.
        """
        columns = self._columns
        drafted = gets & (columns.speculates[batch.rows] | (batch.num_drafts > 0))
        too_long: dict[int, int] = {}
        for b in np.flatnonzero(drafted).tolist():
            sequence, row, end = batch.sequences[b], int(batch.rows[b]), int(ends[b])
            num_drafts = int(batch.num_drafts[b])
            sequence.drafts, columns.num_drafts[row] = [], 0
            columns.num_dispatched[row] = end
            if columns.num_reserved[row] > end:
                too_long[row] = columns.num_reserved[row] = end
            num_right = end - int(batch.starts[b] + batch.num_tokens[b]) + num_drafts
            if not proposer.is_worth_it(sequence, num_drafts, num_right):
                group = sequence.group
                group.waits_for_host = False
                rows = [other.row for other in group.placed if other.row is not None]
                columns.waits_for_host[rows] = columns.speculates[rows] = False
                columns.runs_on[rows] = group.runs_on
        if too_long:
            self._memory.truncate(list(too_long), list(too_long.values()))

    def _tokens(self, rows: np.ndarray, results: Sequence[Result], places: np.ndarray) -> NewTokens:
        """Returns the tokens at these places of a batch, which are all that there is to tell."""
        columns, told = self._columns, rows[places].tolist()
        return NewTokens(
            [columns.request_ids[row] for row in told],
            [columns.indices[row] for row in told],
            cast(list[int], [results[b] for b in places.tolist()]),
        )

    def finish(
        self, sequence: TokenSequence, reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        """Ends a sequence in any state and frees its blocks; does nothing if it has ended."""
        if not sequence.is_finished:
            self._free(self._retire([sequence], reason, stop_reason))

    def abort(self, group: SequenceGroup) -> None:
        """Ends what runs of a group by "abort"."""
        self._free(self._retire(group.live, "abort", None))

    def _free(self, rows: list[int]) -> None:
        if rows:
            self._memory.free(rows)

    def _remember(self, filled: list[TokenSequence]) -> None:
        """Lets the blocks that computed tokens have filled be shared."""
        S = self._memory.block_size
        repeated: dict[int, int] = {}
        for group in dict.fromkeys(sequence.group for sequence in filled):
            if len(group.sequences) > 1:
                memory = self._memory
                repeated |= repeated_blocks(group.placed, memory.tables, memory.is_cached, S)
        if repeated:
            self._memory.replace(repeated)
        full: list[FullBlocks] = []
        for sequence in filled:
            group, row, end = sequence.group, sequence.row, sequence.progress.num_computed // S
            assert row is not None
            first, ids = int(self._columns.num_entered[row]), sequence.token_ids
            if group.writes_cache and first < end:
                full.append(FullBlocks(row, ids, first, end, group.cache_root, group.reads_cache))
            self._columns.num_remembered[row] = end
            self._columns.num_entered[row] = max(first, end)
        self._memory.remember(full)
        if self._window_blocks is not None:
            self._drop_left_of_window(filled, self._window_blocks)

    def _drop_left_of_window(self, filled: list[TokenSequence], num_kept: int) -> None:
        """Gives back the blocks that no further query of these sequences sees, in no layer.

        The device's tables change with the next step: the one in flight runs before that, and
        before whoever takes the blocks.
        """
        num_blocks = {
            sequence.row: sequence.progress.num_remembered - num_kept
            for sequence in filled
            if sequence.row is not None and sequence.progress.num_remembered > num_kept
        }
        if num_blocks:
            self._memory.drop_front(num_blocks)

    def _advance_beams(
        self, groups: Iterable[SequenceGroup], freed_rows: list[int]
    ) -> list[TokenSequence]:
        """Replaces the beams of groups that are ready; frees these rows and those of dead beams.

        Blocks only change owners here, all at once: none is copied, and none is taken.
        """
        children: list[TokenSequence] = []
        forks: list[tuple[int, TokenSequence]] = []
        for group in filter(beam_groups.is_ready, groups):
            dead_rows, forks_here = beam_groups.advance(self._columns, group)
            freed_rows = freed_rows + dead_rows
            forks += forks_here
            children += group.sequences
            self._queues.rows_changed()
            if not group.live:
                self._end(group)
        self._free(freed_rows)
        if forks:
            rows = self._memory.fork([parent_row for parent_row, _ in forks])
            for (parent_row, child), row in zip(forks, rows, strict=True):
                # An heir has the parent's row already, and is as far as the parent was.
                child.take_row(self._columns, row, self._columns.progress(parent_row))
        return children

    def _retire(
        self,
        sequences: Sequence[TokenSequence],
        reason: FinishReason,
        stop_reason: int | str | None,
    ) -> list[int]:
        """Ends sequences of a group, whose late results `commit` drops; returns the rows to free.

        The group ends with the last of them.
        """
        group = sequences[0].group
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        for sequence in sequences:
            sequence.finish_reason = reason
            sequence.stop_reason = stop_reason
            part_from(sequence, self._columns)
            sequence.give_up_blocks()
            sequence.num_late = 0
        self._queues.rows_changed()
        if not group.live:
            self._end(group)
        else:
            assert group.is_forked or group.status is not SequenceStatus.RUNNING
        return rows

    def _end(self, group: SequenceGroup) -> None:
        if group.swapped is not None:
            self._host_pool.give_back(group.swapped, is_read=False)
            group.forget_swapped()
        self._queues.end(group)


def _append_late(
    late: Iterable[tuple[TokenSequence, int, Result | None]],
) -> tuple[int, list[TokenSequence], list[TokenSequence]]:
    """Appends their tokens to sequences that have lost their rows since the step was scheduled.

    `late` are the sequences, how many steps each was scheduled for, and what it got. A sequence
    that has ended gets none; a beam computes its candidates again.

    Returns how many tokens that were, who got some, and who of these is over with them.
    """
    num_new, extended, over = 0, [], []
    for sequence, num_steps, result in late:
        sequence.group.is_in_flight = False
        if sequence.is_finished or result is None or isinstance(result, Candidates):
            continue
        tokens = [result] if isinstance(result, int) else _until_end(sequence, result)
        if not tokens:
            continue
        sequence.token_ids += tokens
        sequence.num_late = max(0, sequence.num_late - num_steps)
        num_new += len(tokens)
        extended.append(sequence)
        group = sequence.group
        is_long = len(sequence.token_ids) == group.max_length
        if tokens[-1] in group.ending_ids or is_long or matching.is_over(sequence):
            over.append(sequence)
    return num_new, extended, over


def _chosen(sequences: Sequence[TokenSequence], which: np.ndarray) -> list[TokenSequence]:
    return [sequences[b] for b in np.flatnonzero(which).tolist()]


def _until_end(sequence: TokenSequence, tokens: list[int]) -> list[int]:
    """Returns those of a sequence's next tokens that it gets before it is over."""
    group = sequence.group
    tokens = tokens[: group.max_length - len(sequence.token_ids)]
    for index, token in enumerate(tokens):
        if token in group.ending_ids:
            return tokens[: index + 1]
    return tokens
