"""What the scheduler decides for one step, with the sequences themselves: for the core alone."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.kv.host_pool import BlockMove
from pallas_paged.engine.kv.sharing import CopyPairs


class ScheduledSequence(NamedTuple):
    """What a step computes of a sequence.

    Attributes:
      sequence: the sequence.
      row: its row in the block tables; copied, because the sequence may lose it meanwhile.
      start: the position of the first token to compute.
      num_tokens: tokens to compute. 0 for a sequence forked from the one in front of it, whose
        logits it samples its first token from.
      samples: whether the step reaches the sequence's end, so that its next token is sampled.
      input_on_device: whether the one token to compute is the row's last sampled token, which the
        host does not know yet. Otherwise the tokens are
        `sequence.token_ids[start : start + num_tokens]`.
      num_steps: how many tokens it samples, if it samples: each one but the last is computed behind
        the `num_tokens`, as a decode step of its own would.
      num_drafts: how many of the last `num_tokens` are guesses, `sequence.drafts`, and follow the
        last token that is known; behind each of them, and that one, a token is sampled.
    """

    sequence: TokenSequence
    row: int
    start: int
    num_tokens: int
    samples: bool
    input_on_device: bool
    num_steps: int = 1
    num_drafts: int = 0


class Batch(NamedTuple):
    """What a step computes of all its sequences: the fields of `ScheduledSequence` in columns.

    Arrays cost the host less than an object for each sequence: i32[B], but for two bool[B].
    `numbers`, i64[B], are the sequences' own: they tell whether a row is still the sequence's.
    """

    sequences: Sequence[TokenSequence]
    numbers: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    num_tokens: np.ndarray
    samples: np.ndarray
    input_on_device: np.ndarray
    num_steps: np.ndarray
    num_drafts: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """Where the tokens end that the step computes, those between two samples included."""
        return self.starts + self.num_tokens + self.num_steps - 1


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """What one step computes.

    Attributes:
      step_id: counts the scheduler's steps from 0.
      batch: what is computed of each sequence, in order of arrival; never empty.
      num_tokens: tokens of all of them.
      dropped_chunks: numbers of chunks in host memory that nobody will read.
      swap_outs: blocks to copy to the host before the step, and before all other copies.
      swap_ins: blocks to copy back after those.
      copies: blocks to copy inside the pool after these.
      admitted: groups that came in with this step.
      preempted: groups that lost their blocks to this step.
    """

    step_id: int
    batch: Batch
    num_tokens: int
    dropped_chunks: tuple[int, ...]
    swap_outs: tuple[BlockMove, ...]
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs
    admitted: tuple[SequenceGroup, ...]
    preempted: tuple[SequenceGroup, ...]

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        """The batch one by one, a new list: for what few steps need."""
        sequences, _, *columns = self.batch
        return list(map(ScheduledSequence, sequences, *(column.tolist() for column in columns)))
