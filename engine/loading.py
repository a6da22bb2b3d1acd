"""From a configuration to a model on its devices, with a KV pool and programs."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.dispatch import target_device
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device import bundle as bundles
from pallas_paged.engine.device.checks_ahead import ChecksAhead, begin_checks
from pallas_paged.engine.device.choices import choose
from pallas_paged.engine.device.compilation_cache import use_compilation_cache
from pallas_paged.engine.device.drafted import Drafted, draft_model_of
from pallas_paged.engine.device.implementations import (
    compile_kernels_soon,
    register_kernels,
    warn_of_slow_types,
)
from pallas_paged.engine.device.kernel_check import check_kernels
from pallas_paged.engine.device.placement import Placement, devices_for
from pallas_paged.engine.device.pool_size import (
    PoolPlan,
    buckets_for,
    plan_pool,
    unsized_programs,
)
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.engine.model_source import FolderSource, LoadedModel, ModelSource
from pallas_paged.engine.resolved import resolve_background_compilation
from pallas_paged.engine.shape import engine_shape
from pallas_paged.models import CausalLM, ModelConfig
from pallas_paged.models.new_weights import Path

logger = logging.getLogger(__name__)

MakeRunner = Callable[..., ModelRunner]
"""`ModelRunner`, or what makes another one of the same arguments."""


class Begun(NamedTuple):
    """What is known of an engine before its weights are read.

    Attributes:
      config: what it is like.
      placement: its devices.
      shape: of its model, for sequences of `max_model_len` tokens and for so many devices.
      max_model_len: most tokens of a sequence.
      checks: of the kernels, which are compiled meanwhile; None if there is nothing to compile.
      source: of the model.
    """

    config: EngineConfig
    placement: Placement
    shape: ModelConfig
    max_model_len: int
    checks: ChecksAhead | None
    source: ModelSource


class Loaded(NamedTuple):
    """An engine's device.

    Attributes:
      runner: with the weights and an empty pool.
      plan: of the memory.
      specs: of the layers' caches.
      num_host_blocks: how many blocks `swap_space` holds.
      shared: see `LoadedModel`.
    """

    runner: ModelRunner
    plan: PoolPlan
    specs: tuple[CacheSpec, ...]
    num_host_blocks: int
    shared: frozenset[Path]


def begin(
    config: EngineConfig, placement: Placement | None = None, source: ModelSource | None = None
) -> Begun:
    """Looks at the model's shape, and lets threads compile what needs no weights.

    `source` is of the model, by default the folder that the configuration names.

    Raises:
      ValueError, FileNotFoundError: see `pallas_paged.engine.build.build`.
    """
    use_compilation_cache(config.compilation_cache_dir)
    source = FolderSource(config.model) if source is None else source
    shape, max_model_len = engine_shape(config, source.shape())
    if placement is None:
        placement = Placement.on(*devices_for(config.tensor_parallel_size))
    if placement.num_devices != config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} does not go with a placement on "
            f"{placement.num_devices} devices"
        )
    if not placement.is_local:
        for name in ("bundle", "background_compilation"):
            if value := getattr(config, name):
                raise ValueError(
                    f"{name}={value!r} is for an engine of one process, not of several"
                )
        if not isinstance(source, FolderSource):
            raise ValueError(
                "a model in memory is for an engine of one process, not of several: the others "
                "read theirs from a folder"
            )
    with placement.as_target():
        compile_kernels_soon(config, shape, placement)
        checks = begin_checks(config, shape, max_model_len, placement)
    return Begun(config, placement, shape, max_model_len, checks, source)


def load(begun: Begun, make_runner: MakeRunner = ModelRunner) -> Loaded:
    """Reads the weights and sizes the pool; compiles what the size depends on.

    Processes that share the devices call it at the same time.

    Raises:
      ValueError, FileNotFoundError: see `pallas_paged.engine.build.build`.
    """
    config, placement = begun.config, begun.placement
    with placement.as_target():
        network, shared = load_network(begun)
        plan, runner, specs = _build_runner(begun, network, make_runner)
    host_block_bytes = plan.block_bytes * len(placement.local_devices)
    num_host_blocks = placement.least(int(config.swap_space * 2**30 / host_block_bytes))
    return Loaded(runner, plan, specs, num_host_blocks, shared)


def load_network(begun: Begun) -> LoadedModel:
    """Returns the model on its devices, with its draft model if it has one.

    Raises:
      ValueError, FileNotFoundError: see `pallas_paged.engine.build.build`.
    """
    config, placement = begun.config, begun.placement
    seed = config.seed if config.load_format == "dummy" else None
    network, shared = begun.source.load(begun.shape, config.dtype, placement, seed=seed)
    draft = draft_model_of(config, begun.shape, begun.max_model_len)
    if draft is None:
        return LoadedModel(network, shared)
    folder, shape = draft
    dtype = jax.tree.leaves(nnx.state(network))[0].dtype.name
    small = FolderSource(folder).load(shape, dtype, placement, seed=seed).network
    return LoadedModel(Drafted(network, small), frozenset(("target", *path) for path in shared))


def _build_runner(
    begun: Begun, network: CausalLM, make_runner: MakeRunner
) -> tuple[PoolPlan, ModelRunner, tuple[CacheSpec, ...]]:
    """Returns the pool's plan, the device with a pool of that size, and what its layers cache."""
    config, placement, _, max_model_len, ahead, _ = begun
    choices = choose(config, network, placement) if ahead is None else ahead.choices
    dtype, cache_dtype, specs, share, share_specs, implementation, writes, checks = choices
    warn_of_slow_types(dtype, cache_dtype)
    if (scaled := network.config.kv_cache_dtype) is not None:
        use = "used" if cache_dtype == scaled else f"not used in a cache of {cache_dtype}"
        logger.info("the checkpoint's scales for a KV cache of %s are %s", scaled, use)
    bundle = None
    if config.bundle is not None:
        table_width = blocks_for(max_model_len, config.block_size)
        unsized = unsized_programs(config, network, table_width, specs, implementation, placement)
        bundle = bundles.open_matching(config.bundle, unsized)
    if checks:
        compiled: Callable[[], Mapping[Any, jax.stages.Compiled]] = dict
        if bundle is not None:
            assert config.bundle is not None
            arguments = config.bundle, bundle, checks, placement.device
            compiled = functools.partial(bundles.load_checks, *arguments)
        elif ahead is not None:
            compiled = ahead.programs
        check_kernels(checks, compiled)
    plan = plan_pool(
        config,
        network,
        max_model_len,
        cache_dtype,
        implementation,
        placement,
        bundled=None if bundle is None else bundle.pool,
    )
    logger.info(
        "attention: %s, writes: %s, on %s", implementation, writes, target_device().device_kind
    )
    logger.info("%s", plan)
    if plan.max_blocks_per_seq * config.block_size < max_model_len:
        logger.warning(
            "the KV pool holds %d tokens, fewer than max_model_len=%d: longer requests will be "
            "refused",
            plan.max_blocks_per_seq * config.block_size,
            max_model_len,
        )
    runner = make_runner(
        network,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        kv_cache_dtype=cache_dtype,
        max_num_seqs=config.max_num_seqs,
        buckets=buckets_for(config, plan.max_blocks_per_seq, placement.device.platform, specs),
        max_logprobs=config.max_logprobs,
        implementation=implementation,
        cache_implementation=config.cache_implementation,
        deterministic=config.deterministic,
        logprobs_mode=config.logprobs_mode,
        swaps=config.swap_space > 0,
        background_compilation=placement.is_local
        and resolve_background_compilation(config, placement.device.platform),
        placement=placement,
    )
    if bundle is not None and bundle.has_pool_of(plan.num_blocks):
        register_kernels(implementation, share, dtype, share_specs)
        assert config.bundle is not None
        bundles.adopt(config.bundle, bundle, runner.programs, runner.block_programs, runner.buckets)
    return plan, runner, specs
