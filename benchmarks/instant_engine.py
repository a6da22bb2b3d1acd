"""The real engine with a device that computes nothing: all that is left is the host's work."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.build import join
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.device.pool_size import buckets_for
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.parts import EngineParts
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.prompts import PromptReader
from pallas_paged.engine.text.tokenizer import Tokenizer

_BLOCK_SIZE = 16
_NUM_DRAWN = 4096


class InstantDevice:
    """An `Executor` that gives out tokens that were drawn beforehand.

    Args:
      num_rows: R, rows of the block tables.
      vocab_size: V.
      first_token: tokens are drawn from here to V, low ones more often, as words in a text are.
      max_logprobs: see `EngineConfig`.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        first_token: int,
        max_logprobs: int,
    ):
        self._num_steps = 0
        rng = np.random.default_rng(0)
        count = vocab_size - first_token
        drawn = first_token + np.exp(rng.uniform(0, np.log(count), _NUM_DRAWN + num_rows)) - 1
        width = logprobs.width_for(max_logprobs, vocab_size)
        self._packed = np.zeros((len(drawn), logprobs.packed_width(width)), np.int32)
        self._packed[:, 0] = drawn
        self._packed[:, 1] = np.float32(-0.5).view(np.int32)
        self._packed[:, 2] = 1
        self._packed[:, 3 : 3 + width] = (drawn[:, None] + np.arange(width)) % vocab_size
        values = -0.5 - np.arange(width, dtype=np.float32)
        self._packed[:, 3 + width :] = values.view(np.int32)
        self._tokens = self._packed[:, 0].copy()

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """Nothing is compiled."""
        return best

    def expect(self, bucket: Bucket) -> None:
        """Nothing is compiled."""

    def dispatch(self, plan: StepPlan) -> StepResult:
        """Draws the step's tokens, with log-probabilities where they are asked for."""
        self._num_steps += 1
        first = self._num_steps * 37 % _NUM_DRAWN
        drawn = slice(first, first + plan.bucket.num_seqs)
        packed = self._packed[drawn, None] if plan.wants_logprobs else None
        return StepResult(self._tokens[drawn, None], packed)

    def collect(self, in_flight: StepResult) -> StepResult:
        """Returns what was drawn."""
        return in_flight

    def recover(self) -> None:
        """Nothing can fail."""


class SleepingDevice(InstantDevice):
    """Gives out its tokens as a device does that takes `step_s` for each step, in their order."""

    def __init__(self, *args: int, step_s: float):
        super().__init__(*args)
        self._step_s = step_s
        self._free_at = 0.0

    def dispatch(self, plan: StepPlan) -> tuple[float, StepResult]:  # type: ignore[override]
        """Begins the step when the one before has ended."""
        self._free_at = max(time.perf_counter(), self._free_at) + self._step_s
        return self._free_at, super().dispatch(plan)

    def collect(self, in_flight: tuple[float, StepResult]) -> StepResult:  # type: ignore[override]
        """Sleeps until the step has ended."""
        ends_at, result = in_flight
        if (left := ends_at - time.perf_counter()) > 0:
            time.sleep(left)
        return result


class House(NamedTuple):
    """An engine, and what reads its prompts."""

    engine: Engine
    reader: PromptReader

    def add(self, token_ids: list[int], params: SamplingParams) -> None:
        """Takes a request in as `LLM` does."""
        text, ids = self.reader.read({"prompt_token_ids": token_ids})
        self.engine.add(self.engine.make_group(ids, params), text)


def build(
    tokenizer: Tokenizer, lens: list[int], max_model_len: int, room: int, first_token: int
) -> House:
    """Returns an engine of `build_parts`."""
    parts = build_parts(tokenizer, lens, max_model_len, room, first_token)
    return House(Engine(parts), PromptReader(tokenizer, "none", tokenizer.vocab_size))


def build_parts(
    tokenizer: Tokenizer,
    lens: list[int],
    max_model_len: int,
    room: int,
    first_token: int,
    make_device: Callable[[int, int, int, int], InstantDevice] = InstantDevice,
) -> EngineParts:
    """Returns an engine's parts as `LLM` makes them, for prompts of these lengths in a single step.

    There is a row more than there are prompts; but beside them, and `room` tokens of output for
    each, its pool has no block for anybody else. Tokens are drawn from `first_token` on, by what
    `make_device` makes of the arguments of `InstantDevice`.
    """
    vocab_size = tokenizer.vocab_size
    config = EngineConfig(
        "none", max_num_seqs=len(lens) + 1, max_num_batched_tokens=sum(lens), block_size=_BLOCK_SIZE
    )
    growth = len(lens) * (room // _BLOCK_SIZE + 1)
    memory = BlockTableMemory(
        num_blocks=1 + sum(-(-length // _BLOCK_SIZE) for length in lens) + growth,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    buckets = buckets_for(config, memory.tables.shape[1], "gpu", ())
    scheduler = Scheduler(
        memory,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        watermark_blocks=growth,
        step_cost=buckets.step_cost,
    )
    device = make_device(
        config.max_num_seqs,
        vocab_size,
        first_token,
        config.max_logprobs,
    )
    return join(
        scheduler,
        memory,
        device,
        buckets,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=(1,),
        tokenizer=tokenizer,
    )
