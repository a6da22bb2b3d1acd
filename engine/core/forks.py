"""When the sequences of a group are forked from its first one, and what they begin with."""

import numpy as np

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.core.token_plan import TokenPlan
from pallas_paged.engine.kv.interface import Memory


def fork_ready(columns: RowColumns, planned: TokenPlan, memory: Memory) -> TokenPlan:
    """Forks the groups whose first sequence reaches the end of its prompt in this step.

    Returns the plan with their other sequences, each behind the first one of its group: it computes
    nothing, and samples its first token from the same logits. Where no group is ready, that is the
    plan itself.
    """
    parents: list[int] = []
    children: list[TokenSequence] = []
    places: list[int] = []
    ends = planned.starts + planned.counts - planned.drafts
    at_end = ends == columns.num_tokens[planned.rows]
    for place in np.flatnonzero(at_end).tolist():
        parent = planned.sequences[place]
        group = parent.group
        if not group.is_forked:
            group.is_forked = True
            assert parent.row is not None
            for child in group.live[1:]:
                parents.append(parent.row)
                children.append(child)
                places.append(place + 1)
    if not children:
        return planned
    rows = memory.fork(parents)
    num_reserved = columns.num_reserved[parents].tolist()
    for child, row, num_tokens in zip(children, rows, num_reserved, strict=True):
        num_full = num_tokens // memory.block_size
        child.take_row(columns, row, Progress(num_tokens, 0, num_tokens, num_full))
    sequences = list(planned.sequences)
    for place, child in zip(reversed(places), reversed(children), strict=True):
        sequences.insert(place, child)
    return TokenPlan(
        sequences,
        np.insert(planned.rows, places, rows),
        np.insert(planned.starts, places, num_reserved),
        np.insert(planned.counts, places, 0),
        np.insert(planned.steps, places, 1),
        np.insert(planned.drafts, places, 0),
        np.insert(planned.ahead, places, 0),
    )
