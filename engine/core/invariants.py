"""What must be true of a scheduler's queues and sequences whenever it is not at work."""

from collections.abc import Iterable, Sequence

import numpy as np

from pallas_paged.engine.core import beam_groups
from pallas_paged.engine.core.queues import Queues, placed_of
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.kv.host_pool import HostPool


def check_queues(queues: Queues, host_pool: HostPool) -> None:
    """Asserts that the queues, their groups, and the room of swapped ones agree."""
    waiting, running = queues.waiting, queues.running
    queued = [*running, *waiting]
    assert {id(g) for g in queued} == {id(g) for g in queues.unfinished.values()}
    assert len(queued) == len(queues.unfinished)
    assert queues.placed == placed_of(running)
    assert queues.num_rows == sum(group.num_rows for group in running)
    for group in queued:
        assert group.live
        beam_groups.check_invariants(group)
    used: set[int] = set()
    for group in running:
        assert group.status is SequenceStatus.RUNNING
        rows = {s.row for s in group.placed if s.row is not None}
        assert len(rows) == len(group.placed)
        assert all(s.row is None for s in group.live if s not in group.placed)
        waits = group.waits_for_host
        for s in group.live:
            assert s.progress.num_dispatched < s.num_tokens + waits + len(s.drafts)
        assert rows.isdisjoint(used)
        used |= rows
    for group in waiting:
        swapped = group.swapped is not None
        assert group.status is (SequenceStatus.SWAPPED if swapped else SequenceStatus.WAITING)
        assert all(s.row is None and s.progress.num_reserved == 0 for s in group.sequences)
    for queue in (running, waiting):
        keys = [queues.order.key(group) for group in queue]
        assert keys == sorted(set(keys))
    chunks = [group.swapped.num_blocks for group in queued if group.swapped is not None]
    assert sum(chunks) == host_pool.num_used <= host_pool.num_blocks


def check_columns(placed: Sequence[TokenSequence], rows: np.ndarray, columns: RowColumns) -> None:
    """Asserts that the columns hold these sequences in these rows, and nobody in any other."""
    assert rows.tolist() == [sequence.row for sequence in placed]
    assert columns.numbers[rows].tolist() == [sequence.number for sequence in placed]
    assert np.count_nonzero(columns.numbers >= 0) == len(placed)
    assert columns.num_known[rows].tolist() == [len(sequence.token_ids) for sequence in placed]
    for sequence, row in zip(placed, rows.tolist(), strict=True):
        assert sequence.columns is columns
        assert columns.token_ids[row] is sequence.token_ids


def check_groups(groups: Iterable[SequenceGroup], in_flight: Sequence[ScheduledStep]) -> None:
    """Asserts that groups and the counts of their sequences fit the steps in flight."""
    for group in groups:
        check_in_flight(group, in_flight)
        for sequence in group.live:
            check_counts(sequence, in_flight)


def check_in_flight(group: SequenceGroup, in_flight: Iterable[ScheduledStep]) -> None:
    """Asserts that a preempted group waits for the steps in flight with its tokens alone."""
    mine = any(one.sequence.group is group for step in in_flight for one in step.scheduled)
    assert group.is_in_flight == (mine and group.status is not SequenceStatus.RUNNING)


def check_counts(sequence: TokenSequence, in_flight: Iterable[ScheduledStep]) -> None:
    """Asserts that a sequence's counts fit the steps in flight."""
    mine = [one for step in in_flight for one in step.scheduled if one.sequence is sequence]
    group, num_samples = sequence.group, sum(one.num_steps for one in mine if one.samples)
    assert sequence.num_pending == (0 if group.waits_for_host else num_samples)
    assert sequence.num_tokens <= group.max_length
    assert not mine or sequence.candidates is None
    progress = sequence.progress
    assert progress.num_computed <= progress.num_dispatched <= progress.num_reserved
    if sequence.columns is not None:
        assert progress.num_remembered <= sequence.columns.num_entered[sequence.row]
