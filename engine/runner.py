"""Holds the device's state and runs the scheduler's steps on it.

The only module that copies from the device to the host.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.block_tables import BlockTables
from pallas_paged.engine import batch
from pallas_paged.engine.block_programs import BlockPrograms
from pallas_paged.engine.buckets import Buckets
from pallas_paged.engine.scheduler import ScheduledStep
from pallas_paged.engine.step import StepPrograms
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import CausalLM


class InFlight(NamedTuple):
    """A dispatched step and the tokens it will have sampled, i32[B] in the step's order."""

    step: ScheduledStep
    tokens: jax.Array | np.ndarray


class Runner(Protocol):
    """What the engine needs of a device. Steps run in the order of their dispatch."""

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        """Starts a step without waiting for its result."""

    def collect(self, in_flight: InFlight) -> list[int]:
        """Waits for a step; returns one entry per scheduled sequence, meaningful if it samples."""

    def recover(self) -> None:
        """Makes the device usable again after a step that failed; cached tokens are lost."""


class ModelRunner:
    """Runs a model's steps on JAX's default device."""

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
        implementation: str | None = None,
        deterministic: bool = False,
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
        self.last_tokens = jnp.zeros(max_num_seqs + 1, jnp.int32)
        self.programs = StepPrograms(
            model,
            self.kv_caches,
            max_num_seqs,
            max_blocks_per_seq,
            implementation,
            deterministic,
        )
        self.block_programs = BlockPrograms(self.kv_caches, max_num_seqs)

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        """Starts a step without waiting for its result; the caches are donated to it."""
        bucket = self.buckets.pick(step.num_tokens, len(step.scheduled), is_decode=step.is_decode)
        if len(step.copies.src):
            self.kv_caches = self.block_programs.copy(self.kv_caches, step.copies)
        packed = jnp.asarray(batch.build(step, state, bucket))
        self.kv_caches, self.last_tokens, tokens = self.programs(
            bucket, self.kv_caches, self.last_tokens, packed
        )
        tokens.copy_to_host_async()
        return InFlight(step, tokens)

    def collect(self, in_flight: InFlight) -> list[int]:
        """Waits for a step; returns one entry per scheduled sequence, meaningful if it samples."""
        tokens = np.asarray(in_flight.tokens)[: len(in_flight.step.scheduled)]
        return tokens.tolist()

    def recover(self) -> None:
        """Replaces the caches: a failed step may have taken them, or left its error in them."""
        self.kv_caches = ()  # first, for there may be no room for two
        self.kv_caches = self._make_caches()
        self.last_tokens = jnp.zeros(self._num_rows + 1, jnp.int32)

    def compile(self) -> None:
        """Compiles every program that a step can need."""
        self.programs.compile(self.buckets.all())
        self.block_programs.compile()

    def block_until_ready(self) -> None:
        """Waits until every dispatched step has run."""
        jax.block_until_ready((self.kv_caches, self.last_tokens))
