"""The compiled programs of an engine step, one per bucket.

Every shape comes in two variants. The plain one samples and returns tokens. The full one also does
what few requests ask for, log-probabilities; a step runs it only if a sequence that samples
in it asks. What a full step's rows did not ask for is skipped when the program runs.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.engine import batch, logprobs
from pallas_paged.engine.buckets import Bucket
from pallas_paged.engine.sampling import sample
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import CausalLM
from pallas_paged.models.attend import paged_attend

logger = logging.getLogger(__name__)

Caches = tuple[KVCache, ...]


class StepResult(NamedTuple):
    """What a step leaves on the device.

    Attributes:
      kv_caches: in the place of those that were donated.
      last_tokens: i32[R + 1], with this step's samples.
      tokens: i32[B], the samples. A sequence whose logits are not finite gets V, which is no token:
        the host turns it into an error.
      logprobs: of a full step in which a row asks for them, see `logprobs.pack`, whose first column
        are the `tokens`; zeros if no row does; None after a plain step.
    """

    kv_caches: Caches
    last_tokens: jax.Array
    tokens: jax.Array
    logprobs: jax.Array | None


def run_step(
    params: Any,
    kv_caches: Caches,
    last_tokens: jax.Array,
    packed: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    bucket: Bucket,
    max_blocks_per_seq: int,
    logprobs_width: int,
    implementation: str | None,
    deterministic: bool,
) -> StepResult:
    """Computes a step's tokens, writes their keys and values, and samples.

    Args:
      params: the model's split state.
      kv_caches: one per layer; donated by `StepPrograms`.
      last_tokens: i32[R + 1], the last token sampled in each of the allocator's R rows, and one
        entry that padding writes to; donated.
      packed: i32[K], see `batch.build`.
      graphdef: the model's graph definition.
      bucket: the step's shape.
      max_blocks_per_seq: M.
      logprobs_width: W, see `logprobs`.
      implementation: of paged attention.
      deterministic: see `EngineConfig`.
    """
    x = batch.unpack(packed, bucket, max_blocks_per_seq)
    starts = x.query_start_loc[:-1]
    on_device = jnp.where(x.input_on_device == 1, starts, bucket.num_tokens)
    input_ids = x.input_ids.at[on_device].set(last_tokens[x.rows], mode="drop")

    model = nnx.merge(graphdef, params)
    attend = functools.partial(
        paged_attend, implementation=implementation, deterministic=deterministic
    )
    metadata = batch.attention_metadata(x, bucket)
    hidden, kv_caches = model(input_ids, metadata, kv_caches, attend=attend)
    logits = model.compute_logits(hidden[x.logits_indices])

    tokens = sample(logits, batch.sampling_inputs(x))
    # Not by the maximum: on a CPU it may leave out a NaN.
    wrong = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=-1)
    wrong |= jnp.all(logits == -jnp.inf, axis=-1)
    last_tokens = last_tokens.at[x.sample_rows].set(tokens)
    tokens = jnp.where(wrong, logits.shape[-1], tokens)
    packed_logprobs = None
    if bucket.is_full:
        shape = bucket.num_seqs, logprobs.packed_width(logprobs_width)
        packed_logprobs = jax.lax.cond(
            jnp.any(x.wants_logprobs == 1),
            lambda: logprobs.pack(logits, tokens, logprobs_width),
            lambda: jnp.zeros(shape, jnp.int32),
        )
    return StepResult(kv_caches, last_tokens, tokens, packed_logprobs)


@dataclasses.dataclass
class StepPrograms:
    """Compiles `run_step` per bucket, ahead or at first use, and counts what it traced.

    A compiled program refuses inputs of any other shape or dtype, so nothing compiles by accident.

    Attributes:
      model: the model; its state is an argument of every call, not a constant of the programs.
      kv_caches: the caches, of which only shapes and dtypes are kept.
      max_num_seqs: R.
      max_blocks_per_seq: M.
      logprobs_width: W, see `logprobs`.
      implementation: of paged attention.
      deterministic: see `EngineConfig`.
      num_traces: how often each bucket was traced.
    """

    model: CausalLM
    kv_caches: Caches
    max_num_seqs: int
    max_blocks_per_seq: int
    logprobs_width: int
    implementation: str | None = None
    deterministic: bool = False
    num_traces: dict[Bucket, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graphdef, self.params = nnx.split(self.model)
        # Not the arrays: they would stay in memory beside the ones that take their place.
        self.kv_caches = jax.eval_shape(lambda: self.kv_caches)
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}

    def __call__(
        self, bucket: Bucket, kv_caches: Caches, last_tokens: jax.Array, packed: jax.Array
    ) -> StepResult:
        """Runs the step; donates `kv_caches` and `last_tokens`."""
        if bucket not in self._compiled:
            self.compile([bucket])
        return self._compiled[bucket](self.params, kv_caches, last_tokens, packed)

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Compiles the programs of those `buckets` that have none yet, two at a time."""
        missing = [bucket for bucket in buckets if bucket not in self._compiled]
        begin = time.perf_counter()
        # Tracing runs Python and gains nothing from threads; XLA's compiler leaves the lock.
        lowered = [self.lower(bucket) for bucket in missing]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
            self._compiled.update(zip(missing, compiled, strict=True))
        if missing:
            names = ", ".join(
                f"{'decode' if b.is_decode else 'mixed'} {b.num_tokens}x{b.num_seqs}"
                f"{' full' if b.is_full else ''}"
                for b in missing
            )
            logger.info("compiled %s in %.1f s", names, time.perf_counter() - begin)

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """Traces the program of one bucket."""

        def step(params: Any, kv_caches: Caches, last: jax.Array, packed: jax.Array) -> StepResult:
            self.num_traces[bucket] = self.num_traces.get(bucket, 0) + 1
            return run_step(
                params,
                kv_caches,
                last,
                packed,
                graphdef=self.graphdef,
                bucket=bucket,
                max_blocks_per_seq=self.max_blocks_per_seq,
                logprobs_width=self.logprobs_width,
                implementation=self.implementation,
                deterministic=self.deterministic,
            )

        i32 = jnp.int32
        last_tokens = jax.ShapeDtypeStruct((self.max_num_seqs + 1,), i32)
        packed = jax.ShapeDtypeStruct((batch.packed_size(bucket, self.max_blocks_per_seq),), i32)
        jitted = jax.jit(step, donate_argnums=(1, 2))
        precision = jax.config.jax_default_matmul_precision
        if precision is None and jax.tree.leaves(self.params)[0].dtype == jnp.float32:
            precision = "highest"  # else a GPU rounds the factors of products to 10 bits
        with jax.default_matmul_precision(precision):
            return jitted.lower(self.params, self.kv_caches, last_tokens, packed)

    def temporary_bytes(self, bucket: Bucket) -> int:
        """Returns the bytes of temporaries of a bucket's compiled program."""
        self.compile([bucket])
        analysis = self._compiled[bucket].memory_analysis()
        assert analysis is not None, "XLA gave no memory analysis of a compiled program"
        return analysis.temp_size_in_bytes
