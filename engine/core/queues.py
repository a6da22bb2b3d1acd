"""Which groups wait and which run, each queue in the order of the scheduling policy."""

import bisect
from collections.abc import Iterable, Sequence

import numpy as np

from pallas_paged.engine.core.policies import Order
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence


class Queues:
    """The unfinished groups of a scheduler; their blocks are none of its business.

    Attributes:
      order: by which both queues are sorted.
      unfinished: all groups, by request id.
      waiting: new and preempted groups.
      running: groups that hold rows.
    """

    def __init__(self, order: Order) -> None:
        """Starts empty."""
        self.order = order
        self.unfinished: dict[str, SequenceGroup] = {}
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self._placed: list[TokenSequence] | None = None
        self._placed_rows: np.ndarray | None = None
        self._num_rows: int | None = None
        self._are_forked: bool | None = None

    @property
    def placed(self) -> list[TokenSequence]:
        """The sequences of running groups that have a row, in order; not to be changed."""
        if self._placed is None:
            self._placed = placed_of(self.running)
        return self._placed

    @property
    def placed_rows(self) -> np.ndarray:
        """The rows of `placed`, i32[B]."""
        if self._placed_rows is None:
            self._placed_rows = rows_of(self.placed)
        return self._placed_rows

    @property
    def num_rows(self) -> int:
        """Rows that the running groups take, those of sequences that are yet to fork included."""
        if self._num_rows is None:
            self._num_rows = sum(group.num_rows for group in self.running)
        return self._num_rows

    @property
    def are_forked(self) -> bool:
        """Whether every live sequence of the running groups has a row."""
        if self._are_forked is None:
            self._are_forked = all(group.is_forked for group in self.running)
        return self._are_forked

    def rows_changed(self) -> None:
        """To be called when a running group has other sequences, or others of them have rows."""
        self._placed = self._placed_rows = self._num_rows = self._are_forked = None

    def add(self, group: SequenceGroup) -> None:
        """Takes a new group in; it waits."""
        self.unfinished[group.request_id] = group
        self.wait(group)

    def wait(self, group: SequenceGroup) -> None:
        """Lets a group that does not run wait at its place."""
        bisect.insort(self.waiting, group, key=self.order.key)

    def run(self, groups: Iterable[SequenceGroup]) -> None:
        """Moves waiting groups to the running ones."""
        for group in groups:
            self.waiting.remove(group)
            bisect.insort(self.running, group, key=self.order.key)
            group.status = SequenceStatus.RUNNING
            self.rows_changed()

    def stop(self, group: SequenceGroup) -> None:
        """Takes a group from the running ones; the caller lets it wait."""
        self.running.remove(group)
        self.rows_changed()

    def end(self, group: SequenceGroup) -> None:
        """Forgets a group of which no sequence is left."""
        if group.status is SequenceStatus.RUNNING:
            self.stop(group)
        else:
            self.waiting.remove(group)
        group.status = SequenceStatus.FINISHED
        del self.unfinished[group.request_id]  # last: `abort_all` looks in there

    def clear(self) -> None:
        """Forgets all groups, however they stand."""
        self.waiting.clear()
        self.running.clear()
        self.rows_changed()
        self.unfinished.clear()


def placed_of(groups: Iterable[SequenceGroup]) -> list[TokenSequence]:
    """Returns the sequences of groups that have a row, or would if they ran; in order."""
    return [sequence for group in groups for sequence in group.placed]


def rows_of(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Returns the rows of sequences that have one, i32[B]."""
    return np.array([sequence.row for sequence in sequences], np.int32)
