"""Holds the device's state and runs the scheduler's steps on it.

The only module that copies from the device to the host.
"""

import itertools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.block_tables import BlockTables
from pallas_paged.engine import batch, logprobs
from pallas_paged.engine.block_programs import BlockPrograms
from pallas_paged.engine.buckets import Buckets
from pallas_paged.engine.logits import RowEdits, RowState
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.scheduler import ScheduledStep
from pallas_paged.engine.sequence import Sequence
from pallas_paged.engine.step import NUM_PROMPT_ROWS, StepPrograms
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import CausalLM


class InFlight(NamedTuple):
    """A dispatched step and what it will have computed, in the step's order.

    Attributes:
      step: the step.
      tokens: i32[B], the samples.
      logprobs: of `logprobs.pack` where a sequence of the step asked for it, else None.
      prompts: the sequences whose prompts' log-probabilities it computes, with their numbers.
      prompt_logprobs: of `logprobs.pack`, theirs one after the other, in as many arrays as needed.
    """

    step: ScheduledStep
    tokens: jax.Array | np.ndarray
    logprobs: jax.Array | np.ndarray | None = None
    prompts: tuple[tuple[Sequence, int], ...] = ()
    prompt_logprobs: tuple[jax.Array, ...] = ()


class Collected(NamedTuple):
    """What a step brought to the host, one entry per scheduled sequence.

    Attributes:
      tokens: meaningful where the sequence samples.
      logprobs: of those tokens, with the most likely ones as `SamplingParams.logprobs` says; None
        where they were not asked for.
      prompt_logprobs: of the prompts' next tokens, for the sequences that ask for them.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: tuple[tuple[Sequence, list[TokenLogprobs]], ...] = ()


class Runner(Protocol):
    """What the engine needs of a device. Steps run in the order of their dispatch."""

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        """Starts a step without waiting for its result."""

    def collect(self, in_flight: InFlight) -> Collected:
        """Waits for a step and returns what it computed."""

    def recover(self) -> None:
        """Makes the device usable again after a step that failed; cached tokens are lost."""


class ModelRunner:
    """Runs a model's steps on JAX's default device.

    Attributes:
      buckets: the shapes of steps.
      kv_caches: one per layer; replaced by every step.
      last_tokens: i32[R + 1], see `StepResult`.
      row_state: what full steps keep of the rows; None before the first of them.
      programs: the compiled steps.
      block_programs: the compiled copies of blocks.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: jnp.dtype,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        buckets: Buckets,
        max_logprobs: int = 20,
        implementation: str | None = None,
        cache_implementation: str | None = None,
        deterministic: bool = False,
        swaps: bool = False,
    ):
        config = model.config
        self._make_caches = lambda: tuple(
            KVCache.zeros(
                num_blocks, config.num_kv_heads, block_size, config.head_dim, kv_cache_dtype
            )
            for _ in range(config.num_layers)
        )
        self.buckets = buckets
        self.kv_caches = self._make_caches()
        self._num_rows = max_num_seqs
        self._vocab_size = config.vocab_size
        self.row_state: RowState | None = None
        self.last_tokens, self._row_edits = self._fresh_rows()
        self.programs = StepPrograms(
            model,
            self.kv_caches,
            max_num_seqs,
            max_blocks_per_seq,
            logprobs.width_for(max_logprobs, config.vocab_size),
            implementation,
            cache_implementation,
            deterministic,
        )
        self.block_programs = BlockPrograms(
            self.kv_caches, max_num_seqs, swaps=swaps, implementation=cache_implementation
        )

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        """Starts a step without waiting for its result; the caches are donated to it."""
        targets = [batch.prompt_targets(share) for share in step.scheduled]
        bucket = self.buckets.pick(
            step.num_tokens,
            len(step.scheduled),
            is_decode=step.is_decode and not any(targets),
            is_full=batch.needs_full(step),
        )
        for move in step.swap_outs:
            self.block_programs.swap_out(self.kv_caches, move)
        for move in step.swap_ins:
            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move)
        if len(step.copies.src):
            self.kv_caches = self.block_programs.copy(self.kv_caches, step.copies)
        packed = jax.device_put(batch.build(step, state, bucket))
        row_state = self._edited_rows(step) if bucket.is_full else None
        result = self.programs(bucket, self.kv_caches, self.last_tokens, packed, row_state)
        self.kv_caches, self.last_tokens = result.kv_caches, result.last_tokens
        if row_state is not None and result.counts is not None:
            self.row_state = row_state._replace(counts=result.counts)
        wants_logprobs = any(map(batch.wants_logprobs, step.scheduled))
        packed_logprobs = result.logprobs if wants_logprobs else None
        copied = result.tokens if packed_logprobs is None else packed_logprobs
        copied.copy_to_host_async()
        in_flight = InFlight(step, result.tokens, packed_logprobs)
        return self._dispatch_prompts(in_flight, targets, result.hidden)

    def _edited_rows(self, step: ScheduledStep) -> RowState:
        """Returns what a full step needs of the rows, which is not there before the first one."""
        if self.row_state is None:
            self.row_state = self.programs.new_row_state()
        for edit in self._row_edits.next_edits(step):
            self.row_state = self.programs.edit_rows(
                self.row_state, self.last_tokens, jax.device_put(edit)
            )
        return self.row_state

    def _dispatch_prompts(
        self, in_flight: InFlight, targets: list[range], hidden: jax.Array | None
    ) -> InFlight:
        """Starts the log-probabilities of prompts that a step's hidden states give."""
        if not any(targets):
            return in_flight
        assert hidden is not None, "a step with targets in a prompt is full, and no decode step"
        indices: list[int] = []
        tokens: list[int] = []
        prompts, offset = [], 0
        for share, positions in zip(in_flight.step.scheduled, targets, strict=True):
            if positions:
                sequence = share.sequence
                indices.extend(offset + p - 1 - share.start for p in positions)
                tokens.extend(sequence.prompt_token_ids[positions.start : positions.stop])
                prompts.append((sequence, len(positions)))
                sequence.group.num_prompt_logprobs = positions.stop - 1
            offset += share.num_tokens
        arrays = []
        for start in range(0, len(tokens), NUM_PROMPT_ROWS):
            packed = np.zeros((2, NUM_PROMPT_ROWS), np.int32)
            piece = slice(start, start + NUM_PROMPT_ROWS)
            packed[:, : len(tokens[piece])] = indices[piece], tokens[piece]
            arrays.append(self.programs.prompt_logprobs(hidden, jax.device_put(packed)))
            arrays[-1].copy_to_host_async()
        return in_flight._replace(prompts=tuple(prompts), prompt_logprobs=tuple(arrays))

    def collect(self, in_flight: InFlight) -> Collected:
        """Waits for a step and returns what it computed."""
        scheduled = in_flight.step.scheduled
        prompts = self._collect_prompts(in_flight)
        if in_flight.logprobs is None:
            tokens = np.asarray(in_flight.tokens)[: len(scheduled)]
            return Collected(tokens.tolist(), [None] * len(scheduled), prompts)
        packed = np.asarray(in_flight.logprobs)[: len(scheduled)]
        found = [
            logprobs.read(row, self._num_top(share.sequence.sampling_params.logprobs))
            if batch.wants_logprobs(share)
            else None
            for share, row in zip(scheduled, packed, strict=True)
        ]
        return Collected(packed[:, 0].tolist(), found, prompts)

    def _collect_prompts(
        self, in_flight: InFlight
    ) -> tuple[tuple[Sequence, list[TokenLogprobs]], ...]:
        rows = (row for array in in_flight.prompt_logprobs for row in np.asarray(array))
        found = []
        for sequence, count in in_flight.prompts:
            num_top = self._num_top(sequence.sampling_params.prompt_logprobs)
            of_one = [logprobs.read(row, num_top) for row in itertools.islice(rows, count)]
            found.append((sequence, of_one))
        return tuple(found)

    def _num_top(self, asked: int) -> int:
        return self._vocab_size if asked == -1 else asked

    def recover(self) -> None:
        """Replaces the caches: a failed step may have taken them, or left its error in them."""
        self.kv_caches = ()  # first, for there may be no room for two
        self.kv_caches = self._make_caches()
        self.row_state = None
        self.last_tokens, self._row_edits = self._fresh_rows()

    def _fresh_rows(self) -> tuple[jax.Array, RowEdits]:
        """Returns rows that nobody uses."""
        return jnp.zeros(self._num_rows + 1, jnp.int32), RowEdits(self._num_rows)

    def warm_up(self) -> None:
        """Compiles every program, so that no step waits for a compilation."""
        self.programs.compile_all(self.buckets.all())
        self.block_programs.compile()

    def block_until_ready(self) -> None:
        """Waits until every dispatched step has run."""
        jax.block_until_ready((self.kv_caches, self.last_tokens, self.row_state))
