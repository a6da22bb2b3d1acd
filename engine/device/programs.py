"""The compiled programs of steps, one per bucket, and of what goes with them."""

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.deviceless import compile_lowered
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.grammar import NUM_MASKS
from pallas_paged.engine.core.row_edits import edit_size
from pallas_paged.engine.core.step_inputs import packed_size
from pallas_paged.engine.core.table_edits import NUM_ENTRIES
from pallas_paged.engine.device.background import Background
from pallas_paged.engine.device.compilation_cache import cache_counts
from pallas_paged.engine.device.placement import BY_HEAD, DEFAULT_DEVICE, WHOLE, Placement
from pallas_paged.engine.device.row_edits import edit_function
from pallas_paged.engine.device.row_state import RowState
from pallas_paged.engine.device.rows import Rows
from pallas_paged.engine.device.step import NUM_PROMPT_ROWS, prompt_logprobs, run_step
from pallas_paged.engine.device.step_arrays import Caches, StepArrays
from pallas_paged.models import CausalLM
from pallas_paged.ops.cpu.later import kernels_later

logger = logging.getLogger(__name__)

ANNOUNCED_AFTER_S = 2.0
"""A compilation that is longer under way is announced."""

Name = Bucket | tuple[str, int]
"""What a compiled program is found by: a step's shape, or what else it is and the size of that."""


@dataclasses.dataclass
class StepPrograms:
    """Compiles `run_step` per bucket, ahead or at first use, and counts what it traced.

    A compiled program refuses inputs of any other shape or dtype, so nothing compiles by accident.

    Attributes:
      model: the model, of whose state only shapes are kept: it is an argument of every call.
      kv_caches: the caches, of which only shapes and dtypes are kept.
      max_num_seqs: R.
      max_blocks_per_seq: M, the width of the block tables.
      logprobs_width: W, see `logprobs`.
      implementation: of paged attention.
      cache_implementation: of the writes to the caches.
      deterministic: see `EngineConfig`, as is the next one.
      logprobs_mode: likewise.
      placement: of all arrays, by default JAX's default device when a program is compiled.
      num_traces: how often each bucket was traced.
      on_compiled: called with the names of steps' programs and the seconds that it took to compile
        them, in whichever thread did.
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
    logprobs_mode: str = "raw"
    placement: Placement = DEFAULT_DEVICE
    num_traces: dict[Bucket, int] = dataclasses.field(default_factory=dict)
    on_compiled: Callable[[list[str], float], object] = lambda names, seconds: None
    announce: Callable[[str], object] = logger.info

    def __post_init__(self) -> None:
        self.graphdef, params = nnx.split(self.model)
        self._specs = self.placement.parameter_specs(params)
        self.params = self.placement.put_parameters(params)
        # Not the arrays: they would stay in memory beside the ones that take their place.
        self.model = nnx.merge(self.graphdef, jax.eval_shape(lambda x: x, params))
        self.kv_caches = self.placement.cache_shapes(self.kv_caches)
        self._compiled: dict[Name, jax.stages.Compiled] = {}
        self._hidden: dict[int, jax.ShapeDtypeStruct] = {}  # by T, of full steps
        self._kernels: dict[str, Callable[[], object]] = {}  # that programs call, see `_finish`
        self._background = Background(self._compile_alone)

    @property
    def params(self) -> Any:
        """The model's split state. What is assigned here takes its place in every program."""
        return jax.tree.unflatten(self._tree, self._leaves)

    @params.setter
    def params(self, params: Any) -> None:
        # What a call flattens costs the host time in every step: a list is the least of it.
        self._leaves, self._tree = jax.tree.flatten(params)

    def __call__(
        self,
        bucket: Bucket,
        kv_caches: Caches,
        rows: Rows,
        packed: jax.Array,
        row_state: RowState | None = None,
    ) -> StepArrays:
        """Runs the step; donates `kv_caches`, `rows` and, to a full step, the counts.

        A full step needs `row_state`, and a plain one takes none.
        """
        assert bucket.is_full == (row_state is not None)
        if bucket not in self._compiled:
            self.compile([bucket])
        state = () if row_state is None else row_state
        return self._compiled[bucket](self._leaves, kv_caches, rows, packed, *state)

    def edit_tables(self, rows: Rows, edit: jax.Array) -> Rows:
        """Writes the entries of a `StepPlan.table_edits` into the block tables; donates `rows`."""
        return self._other("edit_tables", NUM_ENTRIES)(rows, edit)

    def new_row_state(self) -> RowState:
        """Returns the state of rows that nobody uses, newly allocated."""
        return self._other("new_row_state", self.max_num_seqs)()

    def edit_rows(self, row_state: RowState, last_tokens: jax.Array, packed: jax.Array) -> RowState:
        """Runs `row_state.edit_rows`; donates `row_state`."""
        return self._other("edit_rows", self.max_num_seqs)(row_state, last_tokens, packed)

    def edit_masks(self, row_state: RowState, edit: jax.Array) -> RowState:
        """Runs `row_state.edit_masks`; donates the masks."""
        masks = self._other("edit_masks", NUM_MASKS)(row_state.masks, edit)
        return row_state._replace(masks=masks)

    def prompt_logprobs(self, hidden: jax.Array, packed: jax.Array) -> jax.Array:
        """Runs `prompt_logprobs`."""
        num_tokens = hidden.shape[0]
        if num_tokens not in self._hidden:
            self._hidden[num_tokens] = self.placement.input_shapes(hidden)
        return self._other("prompt_logprobs", num_tokens)(self._leaves, hidden, packed)

    def _other(self, kind: str, size: int) -> jax.stages.Compiled:
        """Returns a program that is no step, compiled if it is not."""
        if (kind, size) not in self._compiled:
            lowered = self.lower((kind, size))
            with self.placement.as_target():
                self._compiled[kind, size] = self._finish(lowered)
        return self._compiled[kind, size]

    def others(self, buckets: Iterable[Bucket]) -> list[tuple[str, int]]:
        """Returns the programs beside steps that steps of the `buckets` may need.

        What computes log-probabilities of prompts can be traced when a step of as many tokens was.
        """
        full = [bucket for bucket in buckets if bucket.is_full]
        state = ("new_row_state", "edit_rows") if full else ()
        masks = [("edit_masks", NUM_MASKS)] if full else []
        num_tokens = sorted({bucket.num_tokens for bucket in full if not bucket.is_decode})
        return [
            ("edit_tables", NUM_ENTRIES),
            *((kind, self.max_num_seqs) for kind in state),
            *masks,
            *(("prompt_logprobs", size) for size in num_tokens),
        ]

    def adopt(self, compiled: Mapping[Name, jax.stages.Compiled]) -> None:
        """Takes programs that were compiled elsewhere, for the same arguments and devices."""
        self._compiled.update(compiled)

    def compile_all(self, buckets: Iterable[Bucket]) -> None:
        """Compiles every program that steps of the `buckets` may run."""
        buckets = list(buckets)
        self.compile(buckets)
        for kind, size in self.others(buckets):
            if kind != "prompt_logprobs" or size in self._hidden:
                self._other(kind, size)

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Compiles the programs of those `buckets` that have none yet, two at a time.

        And the one that edits block tables, which the steps of any bucket may need.
        """
        missing = [bucket for bucket in buckets if bucket not in self._compiled]
        if not missing:
            return
        self._other("edit_tables", NUM_ENTRIES)
        names = ", ".join(map(str, missing))
        if_slow = threading.Timer(ANNOUNCED_AFTER_S, self.announce, [f"compiling {names}"])
        if_slow.start()
        try:
            for bucket in missing:
                self._background.settle(bucket)
            self._compile([bucket for bucket in missing if bucket not in self._compiled])
        finally:
            if_slow.cancel()

    def _compile(self, missing: list[Bucket]) -> None:
        begin = time.perf_counter()
        # Tracing runs Python and gains nothing from threads; XLA's compiler leaves the lock.
        lowered = [self.lower(bucket) for bucket in missing]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            compiled = pool.map(self._finish, lowered)
            self._compiled.update(zip(missing, compiled, strict=True))
        if missing:
            self._tell(missing, time.perf_counter() - begin)

    def is_ready(self, bucket: Bucket) -> bool:
        """Whether a step of that shape waits for no compilation."""
        return bucket in self._compiled

    def compile_soon(self, bucket: Bucket) -> None:
        """Lets a thread compile a bucket's program; `compile` waits if it is under way."""
        if bucket not in self._compiled:
            self._background.start(bucket)

    def wait_for_background(self) -> None:
        """Waits until all that `compile_soon` was asked for is compiled, or has failed."""
        self._background.wait()

    def _compile_alone(self, bucket: Bucket) -> None:
        begin = time.perf_counter()
        self._compiled[bucket] = self._finish(self.lower(bucket))
        self._tell([bucket], time.perf_counter() - begin)

    def _finish(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program, and what it calls if that was put off."""
        placement = self.placement
        compiled = compile_lowered(lowered, placement.device, placement.compiler_options)
        for compile_kernel in list(self._kernels.values()):  # while others may add to them
            compile_kernel()
        return compiled

    def _tell(self, buckets: list[Bucket], seconds: float) -> None:
        names = list(map(str, buckets))
        logger.info("compiled %s in %.1f s%s", ", ".join(names), seconds, cache_counts())
        self.on_compiled(names, seconds)

    def lower(self, name: Name) -> jax.stages.Lowered:
        """Traces one program."""
        if not isinstance(name, Bucket):
            return self._lower_other(*name)
        step, arguments, donated = self.function(name)
        lowered = self._lower(jax.jit(step, donate_argnums=donated), *arguments)
        hidden = lowered.out_info.hidden
        if hidden is not None:
            self._hidden[name.num_tokens] = self.placement.input_shapes(hidden)
        return lowered

    def _lower_other(self, kind: str, size: int) -> jax.stages.Lowered:
        """Traces a program that is no step: one of `others`."""
        if kind == "new_row_state":
            return self._lower(jax.jit(self._zero_rows, out_shardings=self.placement.inputs))
        if kind == "prompt_logprobs":
            run = self.placement.per_device(
                self._prompt_logprobs, (self._specs, WHOLE, WHOLE), WHOLE
            )
            arguments = self._parameters(), self._hidden[size], self._input(3, NUM_PROMPT_ROWS)
            return self._lower(jax.jit(run), *arguments)
        state = self._row_state()
        edited = {
            "edit_tables": (self._rows(), self._input(2, size)),
            "edit_rows": (state, self._input(size + 1), self._input(edit_size(size))),
            "edit_masks": (state.masks, self._input(size, 1 + state.masks.shape[1])),
        }[kind]
        edit = edit_function(kind, looks=self.placement.may_look)
        on_each = self.placement.per_device(edit, WHOLE, WHOLE)
        return self._lower(jax.jit(on_each, donate_argnums=0), *edited)

    def _prompt_logprobs(
        self, leaves: list[Any], hidden: jax.Array, packed: jax.Array
    ) -> jax.Array:
        params, width = jax.tree.unflatten(self._tree, leaves), self.logprobs_width
        return prompt_logprobs(params, hidden, packed, graphdef=self.graphdef, width=width)

    def function(
        self, bucket: Bucket
    ) -> tuple[Callable[..., StepArrays], tuple[Any, ...], tuple[int, ...]]:
        """Returns what is compiled for a bucket: `run_step` with everything but arrays filled in.

        Returns:
          the function; the shapes and dtypes of its arguments, which are the parameters' leaves as
          a list and those of a call; which of them are donated.
        """

        def step(
            leaves: list[Any], kv_caches: Caches, rows: Rows, packed: jax.Array, *state: jax.Array
        ) -> StepArrays:
            self.num_traces[bucket] = self.num_traces.get(bucket, 0) + 1
            return run_step(
                jax.tree.unflatten(self._tree, leaves),
                kv_caches,
                rows,
                packed,
                RowState(*state) if bucket.is_full else None,
                graphdef=self.graphdef,
                bucket=bucket,
                logprobs_width=self.logprobs_width,
                logprobs_mode=self.logprobs_mode,
                implementation=self.implementation,
                cache_implementation=self.cache_implementation,
                deterministic=self.deterministic,
                looks=self.placement.may_look,
            )

        packed = self._input(packed_size(bucket))
        state = self._row_state() if bucket.is_full else ()
        arguments = (self._parameters(), self.kv_caches, self._rows(), packed, *state)
        in_specs = (self._specs, BY_HEAD, *(WHOLE for _ in arguments[2:]))
        out_specs: Any = StepArrays._make((BY_HEAD, *(WHOLE for _ in StepArrays._fields[1:])))
        on_each = self.placement.per_device(step, in_specs, out_specs)
        return on_each, arguments, (1, 2, 4) if bucket.is_full else (1, 2)

    def _lower(self, jitted: Any, *args: Any) -> jax.stages.Lowered:
        """Traces a program for the placement's devices."""
        precision = jax.config.jax_default_matmul_precision
        if precision is None and self._leaves[0].dtype == jnp.float32:
            precision = "highest"  # else a GPU rounds the factors of products to 10 bits
        with (
            jax.default_matmul_precision(precision),
            self.placement.as_target(),
            kernels_later(self._kernels),
        ):
            return jitted.lower(*args)

    def _parameters(self) -> list[Any]:
        return self.placement.parameter_shapes(self._leaves, self._specs)

    def _input(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self.placement.input_shapes(jax.ShapeDtypeStruct(shape, jnp.int32))

    def _rows(self) -> Rows:
        rows = jax.eval_shape(lambda: Rows.zeros(self.max_num_seqs, self.max_blocks_per_seq))
        return self.placement.input_shapes(rows)

    def _row_state(self) -> RowState:
        return self.placement.input_shapes(jax.eval_shape(self._zero_rows))

    def _zero_rows(self) -> RowState:
        return RowState.zeros(self.max_num_seqs, self.model.config.vocab_size)

    def temporary_bytes(self, bucket: Bucket) -> int:
        """Returns the bytes of a bucket's compiled program beside inputs and what is in place."""
        self.compile([bucket])
        analysis = self._compiled[bucket].memory_analysis()
        assert analysis is not None, "XLA gave no memory analysis of a compiled program"
        in_place = analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - in_place
