"""Who comes first, and who gives way: one small function per decision."""

from collections.abc import Sequence as Seq

from pallas_paged.engine.sequence import SequenceGroup


def next_to_admit(waiting: Seq[SequenceGroup]) -> SequenceGroup:
    """First come, first served: nobody overtakes the head of the queue, however small."""
    return waiting[0]


def choose_victim(running: Seq[SequenceGroup]) -> SequenceGroup:
    """The group that arrived last loses its blocks first."""
    return running[-1]
