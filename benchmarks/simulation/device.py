"""An `Executor` that computes nothing, on a clock that goes on by what a step would have taken."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.simulation.cost_model import Attention, Costs, Work
from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.core.step_inputs import StepInputs, views

TILE_ROWS = 64
"""Rows of queries that read a shared prefix together, in cascade attention."""


class Way(NamedTuple):
    """How a system runs steps.

    Attributes:
      mixes: whether prompts and tokens that decode are computed in one program; else a step with
        both is two programs, one after the other, as in an engine that computes whole prompts.
      pads: whether what fills up a step's shape costs as much as tokens do.
      host_s: the host's seconds for each program.
      host_s_per_seq: and for each sequence in it.
      group: Hq / Hk, query heads that read the same keys; for shared prefixes.
      block_size: S; likewise.
    """

    mixes: bool = True
    pads: bool = True
    host_s: float = 0.0
    host_s_per_seq: float = 0.0
    group: int = 1
    block_size: int = 16


class Candidates:
    """Draws what a beam search's step gives for each beam: tokens, and how likely they are.

    A real model decides which beams die. Here the log-probabilities of a step's most likely tokens
    are those of exponentially distributed weights to the power of `1 / temperature`: the lower the
    temperature, the less a beam's first candidate is like its second, and the fewer beams die.
    """

    def __init__(self, temperature: float, vocab_size: int, seed: int) -> None:
        self._scale, self._vocab_size = 1 / temperature, vocab_size
        self._rng = np.random.default_rng([seed, 3])

    def draw(self, num_rows: int, width: int) -> np.ndarray:
        """Returns packed log-probabilities, i32[num_rows, 3 + 2 * width], see `logprobs`."""
        packed = np.zeros((num_rows, logprobs.packed_width(width)), np.int32)
        weights = self._scale * np.log(self._rng.exponential(size=(num_rows, 4 * width)))
        weights = -np.sort(-weights, axis=1)
        values = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True))
        first = self._rng.integers(0, self._vocab_size, (num_rows, 1))
        tokens = (first + np.arange(width)) % self._vocab_size
        packed[:, 0] = tokens[:, 0]
        packed[:, 1] = values[:, 0].astype(np.float32).view(np.int32)
        packed[:, 2] = 1
        packed[:, 3 : 3 + width] = tokens
        packed[:, 3 + width :] = values[:, :width].astype(np.float32).view(np.int32)
        return packed


class SimulatedDevice:
    """Takes `costs` for each step, in their order; the host waits in `collect`.

    Attributes:
      now_s: the clock.
      busy_s: seconds that steps took so far.
      num_tokens: computed so far, padding left out.
    """

    def __init__(
        self,
        costs: Costs,
        way: Way,
        *,
        vocab_size: int,
        seed: int,
        logprobs_width: int = 0,
        candidates: Candidates | None = None,
    ) -> None:
        """Draws tokens from `vocab_size`; beams need `candidates`, `logprobs_width` of them."""
        self.now_s = self.busy_s = 0.0
        self.num_tokens = 0
        self._costs, self._way = costs, way
        self._free_at_s = 0.0
        self._tokens = np.random.default_rng(seed).integers(0, vocab_size, 1 << 16, np.int32)
        self._place = 0
        self._width, self._candidates = logprobs_width, candidates

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """Every shape is compiled."""
        return best

    def expect(self, bucket: Bucket) -> None:
        """Every shape is compiled."""

    def dispatch(self, plan: StepPlan) -> tuple[float, StepResult]:
        """Lets the host's time pass, and begins the step when the one before has ended."""
        parts, num_seqs, num_tokens = works_of(plan, self._way)
        self.now_s += len(parts) * self._way.host_s + num_seqs * self._way.host_s_per_seq
        seconds = sum(map(self._costs.seconds, parts))
        self._free_at_s = max(self.now_s, self._free_at_s) + seconds
        self.busy_s += seconds
        self.num_tokens += num_tokens
        B = plan.bucket.num_seqs
        if self._place + B > len(self._tokens):
            self._place = 0
        tokens = self._tokens[self._place : self._place + B, None]
        self._place += B
        packed = None
        if plan.wants_logprobs:
            assert self._candidates is not None, "beams need candidates"
            packed = self._candidates.draw(B, self._width)[:, None]
        return self._free_at_s, StepResult(tokens, packed)

    def collect(self, in_flight: tuple[float, StepResult]) -> StepResult:
        """Waits until the step has ended."""
        ends_at_s, result = in_flight
        self.now_s = max(self.now_s, ends_at_s)
        return result

    def recover(self) -> None:
        """Nothing can fail."""


def works_of(plan: StepPlan, way: Way) -> tuple[list[Work], int, int]:
    """Returns the programs that a step is, how many sequences it has, and how many tokens.

    A plan does not say what is of a prompt: a chunk of one token counts as one that decodes.
    """
    bucket = plan.bucket
    assert bucket.num_steps == 1, "several decode steps in one program are not simulated"
    x = views(plan.inputs, bucket)
    num_seqs = int(np.count_nonzero(x.seq_lens))
    lens = x.seq_lens[:num_seqs].astype(np.int64)
    counts = np.diff(x.query_start_loc[: num_seqs + 1]).astype(np.int64)
    num_tokens = int(counts.sum())
    moves = (*plan.swap_outs, *plan.swap_ins)
    moved = sum(int(np.count_nonzero(move.block_ids)) for move in moves)
    copied = len(plan.copies.src), moved, len(moves)
    padding = bucket.num_tokens - num_tokens if way.pads else 0
    pairs = counts * lens - counts * (counts - 1) // 2
    is_decode = counts <= 1  # a sequence forked in a prompt's last step has none

    def attention(chosen: np.ndarray, num_read_once: int = 0) -> Attention:
        return Attention(int(lens[chosen].sum()) - num_read_once, int(pairs[chosen].sum()))

    decodes, prompts = attention(is_decode, _num_read_once(x, way)), attention(~is_decode)
    if way.mixes or not is_decode.any() or is_decode.all():
        return [Work(num_tokens + padding, decodes, prompts, *copied)], num_seqs, num_tokens
    num_decodes = int(counts[is_decode].sum())
    first = Work(num_tokens - num_decodes, Attention(), prompts, *copied)
    return [first, Work(num_decodes, decodes)], num_seqs, num_tokens


def _num_read_once(x: StepInputs[np.ndarray], way: Way) -> int:
    """Returns how many tokens' keys and values a cascade does not read again."""
    if x.prefix is None:
        return 0
    num_sharing = int(np.count_nonzero(x.prefix.shares_prefix))
    num_reads = -(-num_sharing * way.group // TILE_ROWS)
    num_prefix = int(x.prefix.prefix_blocks[0]) * way.block_size
    return max(0, num_sharing - num_reads) * num_prefix
