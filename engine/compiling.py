"""An engine's programs without an engine: prepared from shapes, and compiled into a bundle."""

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.deviceless import (
    compile_lowered,
    target_devices,
    target_memory_bytes,
    without_compilation_cache,
)
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.device import bundle as bundles
from pallas_paged.engine.device.block_programs import KINDS, BlockPrograms
from pallas_paged.engine.device.choices import choose
from pallas_paged.engine.device.device_memory import stats_of_card
from pallas_paged.engine.device.drafted import abstract_network
from pallas_paged.engine.device.fingerprint import fingerprint
from pallas_paged.engine.device.implementations import register_kernels
from pallas_paged.engine.device.kernel_check import KernelCheck
from pallas_paged.engine.device.placement import Placement, devices_for, share_shapes
from pallas_paged.engine.device.pool_size import (
    PoolPlan,
    buckets_for,
    num_bytes,
    plan_pool,
    unsized_programs,
)
from pallas_paged.engine.device.programs import Name, StepPrograms
from pallas_paged.engine.device.step_report import StepReport, report_step
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.engine.shape import engine_shape
from pallas_paged.models import ModelConfig
from pallas_paged.models.new_folder import new_folder

HOST = "cpu"
"""The target that is this machine's own CPU."""
NUM_AT_ONCE = 2
"""Programs that are compiled at a time."""
NOT_OURS_BYTES = 256 << 20
"""Of a GPU that is not here, what is taken beside weights and programs: gaps, other processes."""
_SHAPING = (
    *(
        "logprobs_mode",
        "kv_cache_dtype",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "max_logprobs",
    ),
    *("num_blocks", "kv_cache_memory_bytes", "gpu_memory_utilization", "deterministic"),
    *("num_scheduler_steps", "attention_implementation", "cache_implementation", "token_logprobs"),
    "tensor_parallel_size",
)
"""Fields of `EngineConfig` that an engine takes from its bundle, beside `dtype` and a length."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An engine's programs before any is compiled.

    Attributes:
      config: of the engine, its `dtype` and `max_model_len` resolved.
      shape: of the model.
      specs: what the layers cache.
      attention, writes: the implementations that run.
      plan: of the memory.
      fingerprint: see there.
      buckets: the shapes of the steps.
      programs, block_programs: over a pool of the planned size.
      checks: of the kernels, before an engine starts.
    """

    config: EngineConfig
    shape: ModelConfig
    specs: Sequence[CacheSpec]
    attention: str
    writes: str
    plan: PoolPlan
    fingerprint: dict[str, str]
    buckets: Buckets
    programs: StepPrograms
    block_programs: BlockPrograms
    checks: tuple[KernelCheck, ...]


class Progress(NamedTuple):
    """A program that is compiled.

    Attributes:
      name: which, as a user may read it.
      seconds: from the start of tracing to the end of compiling, whatever ran beside it.
      num_bytes: of its file.
    """

    name: str
    seconds: float
    num_bytes: int


def prepare(shape: ModelConfig, config: EngineConfig, target: str) -> Prepared:
    """Sizes the pool and prepares the programs of an engine; compiles what the size depends on.

    Args:
      shape: of the model; no weights are read.
      config: of the engine.
      target: one of `pallas_paged.deviceless.TARGETS`, or `HOST`. A GPU has the memory that its
        description says, of which JAX may use what this process's environment says.

    Raises:
      ValueError: an option is not usable, or the model does not fit.
      NotImplementedError: a named implementation cannot do this on the target.
      RuntimeError: as `target_device`.
    """
    count = config.tensor_parallel_size
    devices = _host_devices(count) if target == HOST else target_devices(target, count)
    placement = Placement.on(*devices)
    shape, max_model_len = engine_shape(config, shape)
    model = abstract_network(config, shape, max_model_len)
    shape = model.config
    stats = None
    if target != HOST:
        state = nnx.state(model)
        specs_of = placement.parameter_specs(state)
        weights = share_shapes(jax.tree.leaves(state), specs_of, count)
        in_use = num_bytes(weights) + NOT_OURS_BYTES
        stats = stats_of_card(target_memory_bytes(target), in_use)
    with placement.as_target(), without_compilation_cache():
        dtype, cache_dtype, specs, share, share_specs, attention, writes, checks = choose(
            config, model, placement
        )
        register_kernels(attention, share, dtype, share_specs)  # before threads would, at once
        plan = plan_pool(
            config, model, max_model_len, cache_dtype, attention, placement, stats=stats
        )
        table_width = blocks_for(max_model_len, config.block_size)
        unsized = unsized_programs(config, model, table_width, specs, attention, placement)
        own = fingerprint(unsized)
    caches = tuple(spec.shapes(plan.num_blocks) for spec in specs)
    return Prepared(
        dataclasses.replace(config, dtype=dtype.name, max_model_len=max_model_len),
        shape,
        specs,
        attention,
        writes,
        plan,
        own,
        buckets_for(config, plan.max_blocks_per_seq, placement.device.platform, specs),
        dataclasses.replace(
            unsized, kv_caches=caches, max_blocks_per_seq=plan.max_blocks_per_seq, num_traces={}
        ),
        BlockPrograms(
            caches,
            config.max_num_seqs,
            swaps=config.swap_space > 0,
            implementation=config.cache_implementation,
            placement=placement,
        ),
        checks,
    )


def _host_devices(count: int) -> Sequence[jax.Device]:
    """Returns this machine's CPU, or as many of it as JAX was told to see."""
    with jax.default_device(jax.devices("cpu")[0]):
        return devices_for(count)


def compile_bundle(
    prepared: Prepared,
    folder: str | pathlib.Path,
    *,
    full: bool,
    tell: Callable[[Progress], object],
) -> bundles.Manifest:
    """Compiles an engine's programs, writes them into a folder and returns what that holds.

    The folder is there whole or not at all; one that is there is replaced if it is a bundle, or
    empty. The files are pickles, see `pallas_paged.engine.device.bundle`.

    Args:
      prepared: the programs.
      folder: the bundle to be.
      full: also compile the steps with penalties and log-probabilities; those that give tokens'
        log-probabilities alone if the configuration's `token_logprobs` says so.
      tell: called when a program is compiled, in one of several threads.

    Raises:
      ValueError: the folder is there and is something else.
    """
    buckets = steps_of(prepared, full=full)
    others: list[Name] = [*prepared.programs.others(buckets), *prepared.block_programs.names()]
    others += [check.name for check in prepared.checks]
    entries: list[bundles.Entry] = []
    with new_folder(folder, may_replace=bundles.is_bundle) as work, without_compilation_cache():

        def compile_one(name: Name) -> bundles.Entry:
            begin = time.perf_counter()
            device = prepared.programs.placement.device
            compiled = compile_lowered(_lower(prepared, name), device)
            seconds = time.perf_counter() - begin
            entry = bundles.write_program(work, name, compiled)
            text = str(name) if isinstance(name, Bucket) else f"{name[0]} {name[1]}"
            tell(Progress(text, seconds, entry.num_bytes))
            return entry

        # After the steps, for one of the others cannot be traced before.
        for names in (buckets, others):
            entries += _in_threads(compile_one, names)
        manifest = bundles.Manifest(
            options={
                **{name: getattr(prepared.config, name) for name in _SHAPING},
                "dtype": prepared.config.dtype,
                "max_model_len": prepared.config.max_model_len,
            },
            fingerprint=prepared.fingerprint,
            num_blocks=prepared.plan.num_blocks,
            temporary_bytes=prepared.plan.temporary_bytes,
            programs=tuple(entries),
        )
        bundles.write_manifest(work, manifest)
    return manifest


def steps_of(prepared: Prepared, *, full: bool) -> list[Bucket]:
    """Returns the shapes of an engine's steps that are compiled ahead, see `compile_bundle`."""
    plain = bool(prepared.config.token_logprobs)
    return [
        bucket
        for bucket in prepared.buckets.all()
        if bucket.is_common or (full and bucket.is_full) or (plain and bucket.has_logprobs)
    ]


def report_steps(prepared: Prepared, buckets: Sequence[Bucket]) -> Iterator[StepReport]:
    """Yields what each of the buckets' steps takes, in their order; writes nothing."""

    def report(bucket: Bucket) -> StepReport:
        with prepared.programs.placement.as_target():
            return report_step(prepared.programs, bucket)

    with without_compilation_cache():
        yield from _in_threads(report, buckets)


def _lower(prepared: Prepared, name: Name) -> jax.stages.Lowered:
    for check in prepared.checks:
        if check.name == name:
            with prepared.programs.placement.as_target():
                return check.lower()
    if isinstance(name, Bucket) or name[0] not in KINDS:
        return prepared.programs.lower(name)
    return prepared.block_programs.lower(*name)


def _in_threads[T, R](function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
    """Yields the results in order; after an error no further one is begun."""
    with concurrent.futures.ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        try:
            yield from pool.map(function, values)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
