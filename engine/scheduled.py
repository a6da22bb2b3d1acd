"""What the scheduler decides, for those who carry it out."""

import dataclasses

from pallas_paged.engine.groups import CopyPairs
from pallas_paged.engine.sequence import Sequence, SequenceGroup
from pallas_paged.engine.swap import BlockMove


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of a step.

    Attributes:
      sequence: the sequence.
      row: its row in the block tables; copied, because the sequence may lose it meanwhile.
      start: the position of the first token to compute.
      num_tokens: tokens to compute. 0 for a sequence forked from the one in front of it, whose
        logits it samples its first token from.
      samples: whether the share reaches the sequence's end, so that its next token is sampled.
      input_on_device: whether the share's one token is the row's last sampled token, which the
        host does not know yet. Otherwise the tokens are
        `sequence.token_ids[start : start + num_tokens]`.
    """

    sequence: Sequence
    row: int
    start: int
    num_tokens: int
    samples: bool
    input_on_device: bool


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """What one step computes.

    Attributes:
      step_id: counts the scheduler's steps from 0.
      scheduled: the shares, in order of arrival; never empty.
      num_tokens: tokens of all shares.
      swap_outs: blocks to copy to the host before the step, and before all other copies.
      swap_ins: blocks to copy back after those.
      copies: blocks to copy inside the pool after these.
      preempted: groups that lost their blocks to this step.
    """

    step_id: int
    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int
    swap_outs: tuple[BlockMove, ...]
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs
    preempted: tuple[SequenceGroup, ...]

    @property
    def is_decode(self) -> bool:
        """Whether each share has one token."""
        return all(share.num_tokens == 1 for share in self.scheduled)
