"""When the sequences of a group are forked from its first one, and what they begin with."""

import numpy as np

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.token_plan import TokenPlan
from pallas_paged.engine.kv.interface import Memory


def fork_ready(planned: TokenPlan, memory: Memory) -> TokenPlan:
    """Forks the groups whose first sequence reaches the end of its prompt in this step.

    Returns the plan with their other sequences, each behind the first one of its group: it computes
    nothing, and samples its first token from the same logits. Where no group is ready, that is the
    plan itself.
    """
    parents: list[TokenSequence] = []
    children: list[TokenSequence] = []
    places: list[int] = []
    ends = (planned.starts + planned.counts).tolist()
    for place, (parent, end) in enumerate(zip(planned.sequences, ends, strict=True), 1):
        group = parent.group
        if group.is_forked or end != parent.num_tokens:
            continue
        group.is_forked = True
        for child in group.live[1:]:
            child.num_reserved = child.num_dispatched = parent.num_reserved
            child.num_remembered = parent.num_reserved // memory.block_size
            parents.append(parent)
            children.append(child)
            places.append(place)
    if not children:
        return planned
    rows = memory.fork([parent.row for parent in parents if parent.row is not None])
    for child, row in zip(children, rows, strict=True):
        child.row = row
    sequences = list(planned.sequences)
    for place, child in zip(reversed(places), reversed(children), strict=True):
        sequences.insert(place, child)
    starts = [child.num_dispatched for child in children]
    return TokenPlan(
        sequences, np.insert(planned.starts, places, starts), np.insert(planned.counts, places, 0)
    )
