"""What the host tells a device that runs steps, and what the device answers: arrays and integers.

A `StepPlan` says all that a step needs, so that it can be sent to another process as bytes. An
`Executor` runs plans in the order in which it gets them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.grammar import NUM_MASKS
from pallas_paged.engine.kv.host_pool import BlockMove, SwappedChunk
from pallas_paged.engine.kv.sharing import CopyPairs


class StepPlan(NamedTuple):
    """One step. What comes first here is done first; T, P: tokens of the step, of prompts.

    Attributes:
      step_id: counts the steps.
      bucket: the step's shape.
      dropped_chunks: numbers of chunks in host memory that nobody will read.
      swap_outs: blocks to copy to the host.
      swap_ins: blocks to copy back; a chunk is dropped when it is read.
      copies: blocks to copy inside the pool.
      table_edits: i32[2, `table_edits.NUM_ENTRIES`] each, to be written into the block tables in
        order, before what the inputs write there: places and blocks, see `StepInputs`.
      row_edits: i32[`edit_size`] each, to be applied to the row state in order; none in a plain
        step. Whatever the host learns between two steps comes to a row this way.
      mask_edits: i32[`grammar.NUM_MASKS`, 1 + W] each, to be written into the row state's masks:
        rows, R for padding, and which tokens may come next there, see `grammar.FindMasks`.
      inputs: i32[`packed_size`], see `step_inputs`.
      wants_logprobs: whether a row's log-probabilities are to be given back.
      prompt_targets: i32[3, P], for log-probabilities of prompts: the tokens in front of the P
        tokens, as indices of the step's T; the P tokens; and the bits of the float32 by which each
        one's logits are divided.
    """

    step_id: int
    bucket: Bucket
    dropped_chunks: tuple[int, ...]
    swap_outs: tuple[BlockMove, ...]
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs
    table_edits: tuple[np.ndarray, ...]
    row_edits: tuple[np.ndarray, ...]
    mask_edits: tuple[np.ndarray, ...]
    inputs: np.ndarray
    wants_logprobs: bool
    prompt_targets: np.ndarray

    def to_bytes(self) -> bytes:
        """Returns the plan as int32: the lengths of its parts, then the parts."""
        bucket = self.bucket
        parts = [
            divmod(self.step_id, 2**31),  # a server may make more steps than that
            [bucket.num_tokens, bucket.num_seqs, bucket.table_width],
            [bucket.num_steps, bucket.num_drafts, bucket.proposes],
            [bucket.is_decode, bucket.is_full, bucket.filters, bucket.has_decodes],
            [bucket.shares_prefix, bucket.has_logprobs, self.wants_logprobs],
            self.dropped_chunks,
            *self.copies,
            self.inputs,
            *self.prompt_targets,
            [len(self.swap_outs), len(self.swap_ins), len(self.table_edits), len(self.mask_edits)],
            *(part for move in self.swap_outs + self.swap_ins for part in move),
            *(part for edit in self.table_edits for part in edit),
            *(edit.reshape(-1) for edit in self.mask_edits),
            *self.row_edits,
        ]
        arrays = [np.asarray(part, np.int32) for part in parts]
        head = np.array([len(arrays), *map(len, arrays)], np.int32)
        return np.concatenate([head, *arrays]).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "StepPlan":
        """Returns the plan that `to_bytes` made these of; its arrays are views of them."""
        ints = np.frombuffer(data, np.int32)
        lengths = ints[1 : 1 + ints[0]]
        ends = np.cumsum(lengths)
        parts = iter(np.split(ints[1 + ints[0] :], ends[:-1]))
        high, low = next(parts).tolist()
        num_tokens, num_seqs, table_width = next(parts).tolist()
        num_steps, num_drafts, proposes = next(parts).tolist()
        is_decode, is_full, filters, has_decodes = map(bool, next(parts))
        shares_prefix, has_logprobs, wants_logprobs = map(bool, next(parts))
        dropped = tuple(next(parts).tolist())
        copies = CopyPairs(next(parts), next(parts))
        inputs = next(parts)
        targets = np.stack([next(parts) for _ in range(3)])
        num_outs, num_ins, num_edits, num_masks = next(parts).tolist()
        moves = tuple(
            BlockMove(SwappedChunk(*next(parts).tolist()), next(parts))
            for _ in range(num_outs + num_ins)
        )
        table_edits = tuple(np.stack([next(parts), next(parts)]) for _ in range(num_edits))
        mask_edits = tuple(next(parts).reshape(NUM_MASKS, -1) for _ in range(num_masks))
        return cls(
            high * 2**31 + low,
            Bucket(
                num_tokens,
                num_seqs,
                table_width,
                is_decode,
                is_full,
                num_steps,
                num_drafts,
                bool(proposes),
                filters,
                has_decodes,
                shares_prefix,
                has_logprobs,
            ),
            dropped,
            moves[:num_outs],
            moves[num_outs:],
            copies,
            table_edits,
            tuple(parts),
            mask_edits,
            inputs,
            wants_logprobs,
            targets,
        )


class StepResult(NamedTuple):
    """What a step brought to the host, row by row as in the plan's inputs.

    Attributes:
      tokens: i32[B, K], the samples of the bucket's `num_steps`, or D + 1 of its `num_drafts`,
        and what it proposes behind them. V in
        the place of a sample where the logits are not finite, V + 1 where the rules leave no token.
        Anything behind such a place, behind a token that ends the row's sequence, and where nothing
        is sampled.
      logprobs: i32[B, K, 3 + 2 W], of each sample, see `logprobs`; None unless the plan wants
        them. W is 0 after a plain step, and K is 1 after a full one.
      prompt_logprobs: i32[P, 3 + 2 W], of the plan's `prompt_targets`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None


class Executor(Protocol):
    """A device that runs steps in the order of their dispatch."""

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """Returns the shape that a step shall have: the best one, or another that fits."""

    def expect(self, bucket: Bucket) -> None:
        """Prepares for a step of this shape, which is likely to come; waits for nothing."""

    def dispatch(self, plan: StepPlan) -> Any:
        """Starts a step without waiting for it; returns what `collect` takes."""

    def collect(self, in_flight: Any) -> StepResult:
        """Waits for a step and returns what it computed."""

    def recover(self) -> None:
        """Makes the device usable again after a step that failed; cached tokens are lost."""
