"""How many tokens of which sequences a step computes, and what is counted when it is dispatched."""

from collections.abc import Iterable
from typing import NamedTuple

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.scheduled import Batch


class Counts(NamedTuple):
    """How many tokens of which sequences to compute, group by group, in columns.

    Attributes:
      sequences: the sequences.
      num_tokens: how many tokens of each.
    """

    sequences: list[TokenSequence]
    num_tokens: list[int]


class TokenPlan(NamedTuple):
    """What sequences compute next.

    Attributes:
      counts: how many tokens of which sequences.
      num_tokens: of all of them.
      rows: of the sequences that need room for more tokens than they have.
      growth: for how many more.
    """

    counts: Counts
    num_tokens: int
    rows: list[int]
    growth: list[int]


def plan(sequences: Iterable[TokenSequence], budget: int) -> TokenPlan:
    """Returns what sequences compute next, in their order, within the budget."""
    counts = Counts([], [])
    planned, lengths = counts
    rows: list[int] = []
    growth: list[int] = []
    left = budget
    for sequence in sequences:
        num_tokens = len(sequence.token_ids) + sequence.num_pending
        start = sequence.num_dispatched
        count = num_tokens - start
        # At the greatest length the last token is in flight. Without anything to compute its group
        # waits for the host: its token is in flight, or its candidates wait for those of others.
        if not count or num_tokens == sequence.group.max_length:
            continue
        if count > left:
            count = left
            if not count:
                break
        # A leader comes first, and takes the budget until all that it shares is computed.
        assert sequence.leader is None or _may_start(sequence, counts), "reads unwritten blocks"
        planned.append(sequence)
        lengths.append(count)
        left -= count
        more = start + count - sequence.num_reserved
        if more > 0:
            assert sequence.row is not None
            rows.append(sequence.row)
            growth.append(more)
    return TokenPlan(counts, budget - left, rows, growth)


def dispatch(counts: Counts) -> Batch:
    """Counts the planned tokens as dispatched; there is room for them."""
    batch = Batch(counts.sequences, [], [], counts.num_tokens, [], [])
    _, rows, starts, _, samples, on_device = batch
    for sequence, num_tokens in zip(*counts, strict=True):
        row, start, num_known = sequence.row, sequence.num_dispatched, len(sequence.token_ids)
        end = start + num_tokens
        assert row is not None
        is_end = end == num_known + sequence.num_pending
        assert end <= num_known or num_tokens == 1
        rows.append(row)
        starts.append(start)
        samples.append(is_end)
        on_device.append(end > num_known)
        sequence.num_dispatched = end
        if end > sequence.num_reserved:
            sequence.num_reserved = end
        sequence.num_in_flight += 1
        if is_end and not sequence.group.waits_for_host:
            sequence.num_pending += 1
    return batch


def _may_start(sequence: TokenSequence, counts: Counts) -> bool:
    """Whether the blocks that it shares will be written when its own tokens read them."""
    leader = sequence.leader
    if leader is None or leader.is_finished:
        return True
    num_planned = sum(count for other, count in zip(*counts, strict=True) if other is leader)
    return leader.num_dispatched + num_planned >= sequence.num_shared
