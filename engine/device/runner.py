"""Holds the device's state and runs the plans of steps on it.

The only module that copies from the device to the host.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.device.block_programs import BlockPrograms, Caches
from pallas_paged.engine.device.placement import DEFAULT_DEVICE, Placement
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.device.row_state import RowState
from pallas_paged.engine.device.rows import Rows
from pallas_paged.engine.device.step import NUM_PROMPT_ROWS
from pallas_paged.models import CausalLM

_CHEAP_TOKENS, _CHEAP_FACTOR = 64, 4
"""Of steps that are padded further than need be, because their own shape is not compiled yet."""


class InFlight(NamedTuple):
    """What a dispatched step will have computed.

    Attributes:
      tokens: i32[B, K], the samples.
      logprobs: i32[B, K, 3 + 2 W]; None unless the plan wants them.
      prompt_logprobs: i32[`NUM_PROMPT_ROWS`, 3 + 2 W] each, in as many arrays as needed.
      num_prompt_targets: how many of their rows are not padding.
    """

    tokens: jax.Array
    logprobs: jax.Array | None
    prompt_logprobs: tuple[jax.Array, ...] = ()
    num_prompt_targets: int = 0


class ModelRunner:
    """Runs a model's steps on the devices of a placement, by default JAX's default device.

    Attributes:
      buckets: the shapes of steps.
      kv_caches: one per layer; replaced by every step.
      rows: last tokens and block tables; replaced by every step.
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
        buckets: Buckets,
        max_logprobs: int = 20,
        implementation: str | None = None,
        cache_implementation: str | None = None,
        deterministic: bool = False,
        logprobs_mode: str = "raw",
        swaps: bool = False,
        background_compilation: bool = False,
        placement: Placement = DEFAULT_DEVICE,
    ):
        config = model.config
        specs = config.cache_specs(block_size, kv_cache_dtype)
        if placement.mesh is None:  # what lies there now is not moved by another setting later
            placement = Placement.on(placement.device)
        self._placement = placement
        self._make_caches = lambda: tuple(
            spec.zeros(num_blocks, placement.kv_caches) for spec in specs
        )
        self.buckets = buckets
        self.kv_caches = self._make_caches()
        self._num_rows = max_num_seqs
        self._background_compilation = background_compilation
        self.row_state: RowState | None = None
        self.rows = self._fresh_rows()
        self._chunks: dict[int, Caches] = {}  # swapped blocks in host memory, by number
        self.programs = StepPrograms(
            model,
            self.kv_caches,
            max_num_seqs,
            buckets.table_widths[-1],
            logprobs.width_for(max_logprobs, config.vocab_size),
            implementation,
            cache_implementation,
            deterministic,
            logprobs_mode,
            placement,
        )
        self.block_programs = BlockPrograms(
            self.kv_caches,
            max_num_seqs,
            swaps=swaps,
            implementation=cache_implementation,
            placement=placement,
        )

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """Returns `best`; or, until that is compiled, another one that is and does not cost much.

        Where programs are compiled in the background; else `dispatch` compiles it.
        """
        if not self._background_compilation or self.programs.is_ready(best):
            return best
        most_tokens = max(_CHEAP_TOKENS, _CHEAP_FACTOR * best.num_tokens)
        for bucket in all_that_fit():
            if bucket.num_tokens <= most_tokens and self.programs.is_ready(bucket):
                self.programs.compile_soon(best)
                return bucket
        return best

    def expect(self, bucket: Bucket) -> None:
        """Compiles a bucket in the background, where programs are."""
        if self._background_compilation:
            self.programs.compile_soon(bucket)

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step without waiting for its result; the caches are donated to it."""
        with jax.profiler.StepTraceAnnotation("step", step_num=plan.step_id):
            try:
                return self._dispatch(plan)
            except RuntimeError as error:
                if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.programs.params)):
                    raise RuntimeError(
                        "the weights have been donated to another program, such as a training "
                        "step: call update_weights with what that returned"
                    ) from error
                raise

    def _dispatch(self, plan: StepPlan) -> InFlight:
        self._move_blocks(plan)
        for edit in plan.table_edits:
            self.rows = self.programs.edit_tables(self.rows, self._placement.put_inputs(edit))
        packed = self._placement.put_inputs(plan.inputs)
        row_state = self._edited_rows(plan) if plan.bucket.is_full else None
        result = self.programs(plan.bucket, self.kv_caches, self.rows, packed, row_state)
        self.kv_caches, self.rows = result.kv_caches, result.rows
        if row_state is not None and result.counts is not None:
            self.row_state = row_state._replace(counts=result.counts)
        result.tokens.copy_to_host_async()
        logprobs = None
        if plan.wants_logprobs:
            assert result.logprobs is not None, "no such step gives log-probabilities"
            logprobs = result.logprobs
            logprobs.copy_to_host_async()
        if not plan.prompt_targets.size:
            return InFlight(result.tokens, logprobs)
        assert result.hidden is not None, "a step with prompt targets is full, and no decode step"
        found = self._prompt_logprobs(result.hidden, plan.prompt_targets)
        return InFlight(result.tokens, logprobs, found, plan.prompt_targets.shape[1])

    def _move_blocks(self, plan: StepPlan) -> None:
        """Carries out the copies that come before a step."""
        for number in plan.dropped_chunks:
            self._chunks.pop(number, None)  # dropped before it was ever swapped out: not here
        for move in plan.swap_outs:
            chunk = self.block_programs.swap_out(self.kv_caches, move)
            self._chunks[move.chunk.number] = chunk
        for move in plan.swap_ins:
            chunk = self._chunks.pop(move.chunk.number)
            self.kv_caches = self.block_programs.swap_in(self.kv_caches, move, chunk)
        if len(plan.copies.src):
            self.kv_caches = self.block_programs.copy(self.kv_caches, plan.copies)

    def _edited_rows(self, plan: StepPlan) -> RowState:
        """Returns what a full step needs of the rows, which is not there before the first one."""
        if self.row_state is None:
            self.row_state = self.programs.new_row_state()
        for edit in plan.row_edits:
            self.row_state = self.programs.edit_rows(
                self.row_state, self.rows.last_tokens, self._placement.put_inputs(edit)
            )
        for edit in plan.mask_edits:
            there = self._placement.put_inputs(edit)
            self.row_state = self.programs.edit_masks(self.row_state, there)
        return self.row_state

    def _prompt_logprobs(self, hidden: jax.Array, targets: np.ndarray) -> tuple[jax.Array, ...]:
        """Starts the log-probabilities of prompts that a step's hidden states give."""
        arrays = []
        for start in range(0, targets.shape[1], NUM_PROMPT_ROWS):
            piece = targets[:, start : start + NUM_PROMPT_ROWS]
            packed = np.zeros((3, NUM_PROMPT_ROWS), np.int32)
            packed[2].view(np.float32)[:] = 1  # of padding, too
            packed[:, : piece.shape[1]] = piece
            packed_there = self._placement.put_inputs(packed)
            arrays.append(self.programs.prompt_logprobs(hidden, packed_there))
            arrays[-1].copy_to_host_async()
        return tuple(arrays)

    def collect(self, in_flight: InFlight) -> StepResult:
        """Waits for a step and returns what it computed."""
        prompts = None
        if in_flight.prompt_logprobs:
            rows = np.concatenate([np.asarray(array) for array in in_flight.prompt_logprobs])
            prompts = rows[: in_flight.num_prompt_targets]
        logprobs = None if in_flight.logprobs is None else np.asarray(in_flight.logprobs)
        return StepResult(np.asarray(in_flight.tokens), logprobs, prompts)

    def recover(self) -> None:
        """Replaces all state: a failed step may have taken it, or left its error in it."""
        self.kv_caches = ()  # first, for there may be no room for two
        self.kv_caches = self._make_caches()
        self._chunks.clear()
        self.row_state = None
        self.rows = self._fresh_rows()

    def release(self) -> int:
        """Gives back the caches, and blocks in host memory; returns the bytes of the caches."""
        freed = num_bytes(self.kv_caches)
        self.kv_caches, self.row_state = (), None
        self._chunks.clear()
        return freed

    def _fresh_rows(self) -> Rows:
        return Rows.zeros(self._num_rows, self.buckets.table_widths[-1], self._placement.inputs)

    def warm_up(self) -> None:
        """Compiles every program, so that no step waits for a compilation."""
        self.programs.compile_all(self.buckets.all())
        self.block_programs.compile()

    def block_until_ready(self) -> None:
        """Waits until every dispatched step has run."""
        jax.block_until_ready((self.kv_caches, self.rows, self.row_state))
