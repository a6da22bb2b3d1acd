"""The compiled programs of an engine step, one per bucket.

Every shape comes in two variants. The plain one samples and returns tokens. The full one also does
what few requests ask for: penalties, bias and masks (`logits`), and log-probabilities (`logprobs`).
A step runs it only if a sequence that samples in it asks, and what none of its rows asked for is
skipped when the program runs.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.engine import batch, logprobs
from pallas_paged.engine.buckets import Bucket
from pallas_paged.engine.logits import (
    RowState,
    apply_rules,
    count_tokens,
    edit_rows,
    edit_size,
)
from pallas_paged.engine.sampling import sample
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import CausalLM
from pallas_paged.models.attend import paged_attend

logger = logging.getLogger(__name__)

Caches = tuple[KVCache, ...]

ANNOUNCED_AFTER_S = 2.0
"""A compilation that is longer under way is announced."""

NUM_PROMPT_ROWS = 64
"""Tokens whose log-probabilities one call of the program for prompts computes."""


class StepResult(NamedTuple):
    """What a step leaves on the device.

    Attributes:
      kv_caches: in the place of those that were donated.
      last_tokens: i32[R + 1], with this step's samples.
      tokens: i32[B], the samples. A sequence whose logits are not finite gets V, one whose rules
        leave no token V + 1, which are no tokens: the host turns them into errors.
      logprobs: of a full step in which a row asks for them, see `logprobs.pack`, whose first column
        are the `tokens`; zeros if no row does; None after a plain step.
      counts: see `RowState`, with this step's input tokens; None after a plain step.
      hidden: of all T tokens, for `prompt_logprobs`; of full steps that are not decode steps.
    """

    kv_caches: Caches
    last_tokens: jax.Array
    tokens: jax.Array
    logprobs: jax.Array | None
    counts: jax.Array | None
    hidden: jax.Array | None


def run_step(
    params: Any,
    kv_caches: Caches,
    last_tokens: jax.Array,
    packed: jax.Array,
    row_state: RowState | None,
    *,
    graphdef: nnx.GraphDef,
    bucket: Bucket,
    max_blocks_per_seq: int,
    logprobs_width: int,
    implementation: str | None,
    cache_implementation: str | None,
    deterministic: bool,
) -> StepResult:
    """Computes a step's tokens, writes their keys and values, and samples.

    Args:
      params: the model's split state.
      kv_caches: one per layer; donated by `StepPrograms`.
      last_tokens: i32[R + 1], the last token sampled in each of the allocator's R rows, and one
        entry that padding writes to; donated.
      packed: i32[K], see `batch.build`.
      row_state: of a full step, else None; its counts are donated.
      graphdef: the model's graph definition.
      bucket: the step's shape.
      max_blocks_per_seq: M.
      logprobs_width: W, see `logprobs`.
      implementation: of paged attention.
      cache_implementation: of the writes to the caches.
      deterministic: see `EngineConfig`.
    """
    x = batch.unpack(packed, bucket, max_blocks_per_seq)
    starts = x.query_start_loc[:-1]
    on_device = jnp.where(x.input_on_device == 1, starts, bucket.num_tokens)
    input_ids = x.input_ids.at[on_device].set(last_tokens[x.rows], mode="drop")

    model = nnx.merge(graphdef, params)
    attend = functools.partial(
        paged_attend,
        implementation=implementation,
        write_implementation=cache_implementation,
        promise_in_bounds=True,  # the scheduler's own ids; a step has no launches to spare
        deterministic=deterministic,
    )
    metadata = batch.attention_metadata(x, bucket)
    hidden, kv_caches = model(input_ids, metadata, kv_caches, attend=attend)
    logits = model.compute_logits(hidden[x.logits_indices])

    wrong = cannot_sample(logits)
    if x.full is None or row_state is None:
        tokens = sample(logits, batch.sampling_inputs(x))
        last_tokens = last_tokens.at[x.sample_rows].set(tokens)
        tokens = jnp.where(wrong, logits.shape[-1], tokens)
        return StepResult(kv_caches, last_tokens, tokens, None, None, None)

    counts = count_tokens(row_state.counts, x.full.counted_rows, input_ids[x.logits_indices])
    ruled = apply_rules(logits, RowState(counts, row_state.bias), batch.logit_inputs(x))
    empty = jnp.all(ruled == -jnp.inf, axis=-1)
    tokens = sample(ruled, batch.sampling_inputs(x))
    last_tokens = last_tokens.at[x.sample_rows].set(tokens)
    tokens = jnp.where(empty, logits.shape[-1] + 1, tokens)
    tokens = jnp.where(wrong, logits.shape[-1], tokens)
    found = jax.lax.cond(
        jnp.any(x.full.wants_logprobs == 1),
        lambda: logprobs.pack(logits, tokens, logprobs_width),
        lambda: jnp.zeros((bucket.num_seqs, logprobs.packed_width(logprobs_width)), jnp.int32),
    )
    kept = None if bucket.is_decode else hidden
    return StepResult(kv_caches, last_tokens, tokens, found, counts, kept)


def cannot_sample(logits: jax.Array) -> jax.Array:
    """Returns which rows of logits [B, V] have a NaN, an infinity, or nothing but -infinities."""
    # Not by the maximum of the logits: on a CPU it may leave out a NaN.
    grades = jnp.where(logits == -jnp.inf, 0, jnp.where(logits < jnp.inf, jnp.int32(1), 2))
    return jnp.max(grades, axis=-1) != 1


def prompt_logprobs(
    params: Any,
    hidden: jax.Array,
    packed: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    width: int,
) -> jax.Array:
    """Returns `logprobs.pack`'s i32[P, 3 + 2 W] of P tokens of prompts; P is `NUM_PROMPT_ROWS`.

    Args:
      params: the model's split state.
      hidden: `StepResult.hidden`.
      packed: i32[2, P], the tokens in front of those P, as indices into `hidden`, and the P tokens.
      graphdef: the model's graph definition.
      width: W.
    """
    logits = nnx.merge(graphdef, params).compute_logits(hidden[packed[0]])
    return logprobs.pack(logits, packed[1], width)


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
      cache_implementation: of the writes to the caches.
      deterministic: see `EngineConfig`.
      num_traces: how often each bucket was traced.
      announce: called with a line, in another thread, while a compilation takes its time.
    """

    model: CausalLM
    kv_caches: Caches
    max_num_seqs: int
    max_blocks_per_seq: int
    logprobs_width: int
    implementation: str | None = None
    cache_implementation: str | None = None
    deterministic: bool = False
    num_traces: dict[Bucket, int] = dataclasses.field(default_factory=dict)
    announce: Callable[[str], object] = logger.info

    def __post_init__(self) -> None:
        self.graphdef, self.params = nnx.split(self.model)
        # Not the arrays: they would stay in memory beside the ones that take their place.
        self.kv_caches = jax.eval_shape(lambda: self.kv_caches)
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}
        self._compiled_edit: jax.stages.Compiled | None = None
        self._compiled_rows: jax.stages.Compiled | None = None
        self._compiled_prompt: dict[int, jax.stages.Compiled] = {}  # by T
        self._hidden: dict[int, jax.ShapeDtypeStruct] = {}  # by T, of full steps

    def __call__(
        self,
        bucket: Bucket,
        kv_caches: Caches,
        last_tokens: jax.Array,
        packed: jax.Array,
        row_state: RowState | None = None,
    ) -> StepResult:
        """Runs the step; donates `kv_caches`, `last_tokens` and, to a full step, the counts.

        A full step needs `row_state`, and a plain one takes none.
        """
        assert bucket.is_full == (row_state is not None)
        if bucket not in self._compiled:
            self.compile([bucket])
        state = () if row_state is None else (row_state.counts, row_state.bias)
        return self._compiled[bucket](self.params, kv_caches, last_tokens, packed, *state)

    def new_row_state(self) -> RowState:
        """Returns the state of rows that nobody uses, newly allocated."""
        self.compile_rows()
        assert self._compiled_rows is not None
        return self._compiled_rows()

    def edit_rows(self, row_state: RowState, last_tokens: jax.Array, packed: jax.Array) -> RowState:
        """Runs `logits.edit_rows`; donates `row_state`."""
        self.compile_edit()
        assert self._compiled_edit is not None
        return self._compiled_edit(row_state, last_tokens, packed)

    def compile_edit(self) -> None:
        """Compiles the program of `edit_rows`, if it is not."""
        if self._compiled_edit is not None:
            return
        packed = jax.ShapeDtypeStruct((edit_size(self.max_num_seqs),), jnp.int32)
        jitted = jax.jit(edit_rows, donate_argnums=0)
        lowered = jitted.lower(self._row_state(), self._last_tokens(), packed)
        self._compiled_edit = lowered.compile()

    def compile_rows(self) -> None:
        """Compiles the program of `new_row_state`, if it is not."""
        if self._compiled_rows is None:
            self._compiled_rows = jax.jit(self._zero_rows).lower().compile()

    def prompt_logprobs(self, hidden: jax.Array, packed: jax.Array) -> jax.Array:
        """Runs `prompt_logprobs`."""
        num_tokens = hidden.shape[0]
        if num_tokens not in self._compiled_prompt:
            self._compile_prompt(hidden)
        return self._compiled_prompt[num_tokens](self.params, hidden, packed)

    def _compile_prompt(self, hidden: jax.Array | jax.ShapeDtypeStruct) -> None:
        packed = jax.ShapeDtypeStruct((2, NUM_PROMPT_ROWS), jnp.int32)
        run = functools.partial(prompt_logprobs, graphdef=self.graphdef, width=self.logprobs_width)
        lowered = self._lower(jax.jit(run), self.params, hidden, packed)
        self._compiled_prompt[hidden.shape[0]] = lowered.compile()

    def compile_all(self, buckets: Iterable[Bucket]) -> None:
        """Compiles every program that steps of the `buckets` may run."""
        self.compile(buckets)
        self.compile_rows()
        self.compile_edit()
        for num_tokens, hidden in self._hidden.items():
            if num_tokens not in self._compiled_prompt:
                self._compile_prompt(hidden)

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Compiles the programs of those `buckets` that have none yet, two at a time."""
        missing = [bucket for bucket in buckets if bucket not in self._compiled]
        if not missing:
            return
        names = ", ".join(map(str, missing))
        begin = time.perf_counter()
        if_slow = threading.Timer(ANNOUNCED_AFTER_S, self.announce, [f"compiling {names}"])
        if_slow.start()
        try:
            self._compile(missing)
        finally:
            if_slow.cancel()
        logger.info("compiled %s in %.1f s", names, time.perf_counter() - begin)

    def _compile(self, missing: list[Bucket]) -> None:
        # Tracing runs Python and gains nothing from threads; XLA's compiler leaves the lock.
        lowered = [self.lower(bucket) for bucket in missing]
        for bucket, program in zip(missing, lowered, strict=True):
            hidden = program.out_info.hidden
            if hidden is not None:
                self._hidden[bucket.num_tokens] = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
            self._compiled.update(zip(missing, compiled, strict=True))

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """Traces the program of one bucket."""
        step, arguments, donated = self.function(bucket)
        return self._lower(jax.jit(step, donate_argnums=donated), *arguments)

    def function(
        self, bucket: Bucket
    ) -> tuple[Callable[..., StepResult], tuple[Any, ...], tuple[int, ...]]:
        """Returns what is compiled for a bucket: `run_step` with everything but arrays filled in.

        Returns:
          the function; the shapes and dtypes of its arguments, which are the parameters and those
          of a call; which of them are donated.
        """

        def step(
            params: Any, kv_caches: Caches, last: jax.Array, packed: jax.Array, *state: jax.Array
        ) -> StepResult:
            self.num_traces[bucket] = self.num_traces.get(bucket, 0) + 1
            return run_step(
                params,
                kv_caches,
                last,
                packed,
                RowState(*state) if bucket.is_full else None,
                graphdef=self.graphdef,
                bucket=bucket,
                max_blocks_per_seq=self.max_blocks_per_seq,
                logprobs_width=self.logprobs_width,
                implementation=self.implementation,
                cache_implementation=self.cache_implementation,
                deterministic=self.deterministic,
            )

        size = batch.packed_size(bucket, self.max_blocks_per_seq)
        packed = jax.ShapeDtypeStruct((size,), jnp.int32)
        state = self._row_state() if bucket.is_full else ()
        arguments = (self.params, self.kv_caches, self._last_tokens(), packed, *state)
        return step, arguments, (1, 2, 4) if bucket.is_full else (1, 2)

    def _lower(self, jitted: Any, *args: Any) -> jax.stages.Lowered:
        """Traces a program that computes with the model's parameters."""
        precision = jax.config.jax_default_matmul_precision
        if precision is None and jax.tree.leaves(self.params)[0].dtype == jnp.float32:
            precision = "highest"  # else a GPU rounds the factors of products to 10 bits
        with jax.default_matmul_precision(precision):
            return jitted.lower(*args)

    def _last_tokens(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.max_num_seqs + 1,), jnp.int32)

    def _row_state(self) -> RowState:
        return jax.eval_shape(self._zero_rows)

    def _zero_rows(self) -> RowState:
        return RowState.zeros(self.max_num_seqs, self.model.config.vocab_size)

    def temporary_bytes(self, bucket: Bucket) -> int:
        """Returns the bytes of a bucket's compiled program beside inputs and what is in place."""
        self.compile([bucket])
        analysis = self._compiled[bucket].memory_analysis()
        assert analysis is not None, "XLA gave no memory analysis of a compiled program"
        in_place = analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - in_place
