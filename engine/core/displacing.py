"""Which running groups lose their blocks to the head of the queue, where the order allows it."""

import bisect
from collections.abc import Sequence

from pallas_paged.engine.core.admission import Admission, Room
from pallas_paged.engine.core.common_prefixes import ComingPrefixes
from pallas_paged.engine.core.policies import displaceable, next_to_admit
from pallas_paged.engine.core.queues import Queues, placed_of, rows_of
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.token_plan import StepSize, TokenPlan, plan, with_room


def groups_to_displace(
    queues: Queues,
    admission: Admission,
    size: StepSize,
    coming: ComingPrefixes,
    watermark_blocks: int,
) -> list[SequenceGroup]:
    """Returns the groups to preempt, as few as let the head of the queue run in this step.

    None if it fits without, or will not run in this step even so. Changes nothing.

    Args:
      queues: those of the scheduler.
      admission: over the same memory.
      size: of a step.
      coming: the blocks that running groups fill next, for which the head may wait.
      watermark_blocks: see `Scheduler`.
    """
    if not queues.waiting or not queues.running:
        return []
    head = next_to_admit(queues.waiting)
    victims = displaceable(queues.order, head, queues.running)
    if not victims or head.is_in_flight:
        return []

    def staying(num_victims: int) -> list[SequenceGroup]:
        gone = set(victims[:num_victims])
        return [group for group in queues.running if group not in gone]

    def fits(num_victims: int) -> bool:
        room = _room_beside(
            staying(num_victims),
            victims[:num_victims],
            admission,
            max_num_tokens=size.max_num_tokens,
            watermark_blocks=watermark_blocks,
        )
        return admission.arrival_of(head, room) is not None

    if not fits(len(victims)):
        return []
    num_needed = bisect.bisect_left(range(len(victims)), True, key=fits)
    planned = _plan_of(staying(num_needed), admission, size.max_num_tokens)
    if size.left_beside(admission.columns, planned) <= 0:
        return []  # the others compute so much that it would not get a token
    if coming.holds_back(head, admission.hits(head)[0]):
        return []
    return victims[:num_needed]


def _room_beside(
    staying: Sequence[SequenceGroup],
    victims: Sequence[SequenceGroup],
    admission: Admission,
    *,
    max_num_tokens: int,
    watermark_blocks: int,
) -> Room:
    """Returns what may be taken beside the groups that stay, once these have grown."""
    freed_rows = tuple(s.row for s in placed_of(victims) if s.row is not None)
    growth = _plan_of(staying, admission, max_num_tokens).growth(admission.columns)
    return Room(
        admission.max_num_seqs - sum(group.num_rows for group in staying),
        admission.memory.space(freed_rows, *growth),
        watermark_blocks if staying else 0,
        freed_rows,
    )


def _plan_of(running: Sequence[SequenceGroup], admission: Admission, budget: int) -> TokenPlan:
    """Returns what running groups would compute next without the others."""
    placed, columns = placed_of(running), admission.columns
    return with_room(columns, plan(columns, placed, rows_of(placed), budget))
