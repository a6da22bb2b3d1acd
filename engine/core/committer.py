"""Takes in what a step computed: new tokens, filled blocks, next beams; and how sequences end."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pallas_paged.engine.core import beam_groups
from pallas_paged.engine.core.beam_search import Candidates
from pallas_paged.engine.core.core_output import FinishReason, NewTokens
from pallas_paged.engine.core.entries import repeated_blocks
from pallas_paged.engine.core.queues import Queues
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.kv.interface import Memory
from pallas_paged.engine.kv.sharing import FullBlocks, window_blocks

type Result = int | list[int] | Candidates
"""What a step gave a sequence: the sampled token; several tokens; or the candidates of a beam.

Several, in order, only where the group `waits_for_host`. The step has computed none of them: like
the sampled token alone, they are the sequence's next inputs. What keys and values a step computed
beyond the tokens that it gave, `Memory.truncate` takes back.
"""


class Committed(NamedTuple):
    """What sequences got by a step.

    Attributes:
      num_tokens: new tokens; those that a group holds back are in none of the others.
      others: the sequences that got a token and have more to tell, or ended with it.
      tokens: of all others. See `SequenceGroup.told_stats`.
    """

    num_tokens: int
    others: list[TokenSequence]
    tokens: NewTokens


class Committer:
    """Changes sequences as their steps come back, and gives back the blocks of those that end."""

    def __init__(
        self, memory: Memory, queues: Queues, host_pool: HostPool, sliding_window: int | None
    ) -> None:
        """Works on the scheduler's own memory, queues and host pool."""
        self._memory = memory
        self._queues = queues
        self._host_pool = host_pool
        self._window_blocks = None
        if sliding_window is not None:
            self._window_blocks = window_blocks(sliding_window, memory.block_size)

    def commit(self, step: ScheduledStep, results: Sequence[Result]) -> Committed:
        """Takes a step's results; see `Scheduler.commit`."""
        S = self._memory.block_size
        filled: list[TokenSequence] = []
        others: list[TokenSequence] = []
        over: list[TokenSequence] = []
        searching: dict[SequenceGroup, None] = {}  # a set in order
        tokens = NewTokens([], [], [])
        request_ids, indices, new_ids = tokens
        num_new = 0
        sequences, _, starts, counts, samples, _ = step.batch
        ends = starts + counts
        for sequence, end, num_full, is_sampled, result in zip(
            sequences, ends.tolist(), (ends // S).tolist(), samples.tolist(), results, strict=True
        ):
            group = sequence.group
            if sequence.row is not None:
                sequence.num_computed = end
                if num_full > sequence.num_remembered:
                    filled.append(sequence)
            else:
                group.is_in_flight = False
            if not is_sampled or sequence.finish_reason is not None:
                continue
            token_ids = sequence.token_ids
            if not isinstance(result, int):
                if isinstance(result, Candidates):
                    if sequence.row is not None:
                        sequence.candidates = result
                        searching[group] = None
                    continue
                *before, result = _until_end(sequence, result)
                token_ids += before
                num_new += len(before)
                group.told_stats = None  # which a single token would be told with
            token_ids.append(result)
            num_new += 1
            if group.waits_for_host:
                sequence.num_tokens = len(token_ids)
            if result in group.ending_ids or len(token_ids) == group.max_length:
                over.append(sequence)
                others.append(sequence)
            elif group.stats is not group.told_stats:
                others.append(sequence)
            elif not group.is_held:
                request_ids.append(group.request_id)
                indices.append(sequence.index)
                new_ids.append(result)
        if filled:
            self._remember(filled)
        ended_rows: list[int] = []
        for sequence in over:
            ending = sequence.group.ending_of(sequence.token_ids[-1])
            ended_rows += self._retire([sequence], *ending)
        if ended_rows or searching:
            children = self._advance_beams(searching, ended_rows)
            others += children
            num_new += len(children)
        return Committed(num_new, others, tokens)

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
                repeated |= repeated_blocks(group.placed, self._memory.tables, S)
        if repeated:
            self._memory.replace(repeated)
        full: list[FullBlocks] = []
        for sequence in filled:
            group, row, end = sequence.group, sequence.row, sequence.num_computed // S
            if group.writes_cache and row is not None:
                first, ids = sequence.num_remembered, sequence.token_ids
                full.append(FullBlocks(row, ids, first, end, group.cache_root, group.reads_cache))
            sequence.num_remembered = end
        self._memory.remember(full)
        if self._window_blocks is not None:
            self._drop_left_of_window(filled, self._window_blocks)

    def _drop_left_of_window(self, filled: list[TokenSequence], num_kept: int) -> None:
        """Gives back the blocks that no further query of these sequences sees, in no layer.

        The device's tables change with the next step: the one in flight runs before that, and
        before whoever takes the blocks.
        """
        num_blocks = {
            sequence.row: sequence.num_remembered - num_kept
            for sequence in filled
            if sequence.row is not None and sequence.num_remembered > num_kept
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
            dead_rows, forks_here = beam_groups.advance(group)
            freed_rows = freed_rows + dead_rows
            forks += forks_here
            children += group.sequences
            self._queues.rows_changed()
            if not group.live:
                self._end(group)
        self._free(freed_rows)
        if forks:
            rows = self._memory.fork([parent_row for parent_row, _ in forks])
            for (_, child), row in zip(forks, rows, strict=True):
                child.row = row
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
            sequence.num_tokens = len(sequence.token_ids)
            sequence.give_up_blocks()
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


def _until_end(sequence: TokenSequence, tokens: list[int]) -> list[int]:
    """Returns those of a sequence's next tokens that it gets before it is over."""
    group = sequence.group
    assert group.waits_for_host, "a step in flight goes on from the first of them"
    tokens = tokens[: group.max_length - len(sequence.token_ids)]
    for index, token in enumerate(tokens):
        if token in group.ending_ids:
            return tokens[: index + 1]
    return tokens
