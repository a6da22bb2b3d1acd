"""Who comes first, who gives way, and how it comes back: one small function per decision."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from pallas_paged.engine.core.request import SequenceGroup

Recovery = Literal["recompute", "swap"]


class Order:
    """First come, first served: nobody overtakes an earlier group, however small."""

    def key(self, group: SequenceGroup) -> tuple[int, ...]:
        """Groups run, and come back, in ascending order of their keys, which all differ."""
        return (group.arrival,)

    def may_displace(self, waiting: SequenceGroup, running: SequenceGroup) -> bool:
        """Whether a waiting group may take a running one's blocks to be admitted."""
        return False


class PriorityOrder(Order):
    """Lower priorities first, equal ones in order of arrival; the urgent displace the others."""

    def key(self, group: SequenceGroup) -> tuple[int, ...]:
        """Groups run, and come back, in ascending order of their keys, which all differ."""
        return group.priority, group.arrival

    def may_displace(self, waiting: SequenceGroup, running: SequenceGroup) -> bool:
        """Whether a waiting group may take a running one's blocks to be admitted."""
        return waiting.priority < running.priority


def next_to_admit(waiting: Sequence[SequenceGroup]) -> SequenceGroup:
    """The head of the queue."""
    return waiting[0]


def choose_victim(running: Sequence[SequenceGroup]) -> SequenceGroup:
    """The last one in the order loses its blocks first."""
    return running[-1]


def displaceable(
    order: Order, head: SequenceGroup, running: Sequence[SequenceGroup]
) -> list[SequenceGroup]:
    """Returns the running groups that the head of the queue may displace, first victim first."""
    return list(
        itertools.takewhile(lambda group: order.may_displace(head, group), reversed(running))
    )


type ChooseRecovery = Callable[[SequenceGroup], Recovery]


def always_recompute(group: SequenceGroup) -> Recovery:
    """Computes everything again."""
    return "recompute"


def always_swap(group: SequenceGroup) -> Recovery:
    """Copies to host memory, as long as there is room."""
    return "swap"


class RecoveryCosts(NamedTuple):
    """How long a device takes to bring a preempted group back.

    Attributes:
      seconds_per_token: to compute one token of a prompt.
      seconds_per_block: to copy one block one way.
      seconds_per_swap: to start the copies of one swap, both ways.
    """

    seconds_per_token: float
    seconds_per_block: float
    seconds_per_swap: float

    def recompute_s(self, num_tokens: int) -> float:
        """Returns the seconds to compute so many tokens again, whatever the block size."""
        return num_tokens * self.seconds_per_token

    def swap_s(self, num_blocks: int) -> float:
        """Returns the seconds to copy so many blocks out and back in, padding among them."""
        return self.seconds_per_swap + 2 * num_blocks * self.seconds_per_block

    def cheaper(self, num_tokens: int, num_blocks: int) -> Recovery:
        """Returns what is faster; recomputation, which needs no host memory, if both are alike."""
        faster = self.swap_s(num_blocks) < self.recompute_s(num_tokens)
        return "swap" if faster else "recompute"

    def __str__(self) -> str:
        token, block, swap = (1e6 * seconds for seconds in self)
        return (
            f"recomputing takes {token:.3g} us per token, "
            f"swapping {swap:.3g} us + {2 * block:.3g} us per block"
        )


@dataclasses.dataclass(frozen=True)
class CheaperRecovery:
    """Estimates both and takes the cheaper one.

    Attributes:
      costs: of the device.
      num_copied: returns the blocks that a swap of a group copies one way, padding among them.
    """

    costs: RecoveryCosts
    num_copied: Callable[[SequenceGroup], int]

    def __call__(self, group: SequenceGroup) -> Recovery:
        """Compares; what several sequences share is counted once, as far as the prompt goes."""
        prompt = group.num_prompt_tokens
        computed = [sequence.progress.num_computed for sequence in group.placed]
        num_tokens = min(prompt, max(computed)) + sum(max(0, n - prompt) for n in computed)
        return self.costs.cheaper(num_tokens, self.num_copied(group))
