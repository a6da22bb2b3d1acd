"""From a configuration to an engine: the model, the pool, the programs, and what joins them."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_paged.cache_spec import common_window
from pallas_paged.dispatch import target_device
from pallas_paged.engine.config import (
    EngineConfig,
)
from pallas_paged.engine.core.buckets import Buckets
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.intake import Intake
from pallas_paged.engine.core.plan import Executor
from pallas_paged.engine.core.planner import Planner
from pallas_paged.engine.core.policies import (
    CheaperRecovery,
    ChooseRecovery,
    Order,
    PriorityOrder,
    always_recompute,
    always_swap,
)
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.core.speculation import make_proposer, speculation_settings
from pallas_paged.engine.core.swapping import num_blocks_to_swap
from pallas_paged.engine.device import bundle as bundles
from pallas_paged.engine.device import device_memory
from pallas_paged.engine.device.following import leading
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.device.recovery_costs import measured_costs
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.loading import begin, load
from pallas_paged.engine.model_source import ModelSource
from pallas_paged.engine.parts import EngineParts
from pallas_paged.engine.text.grammars import Grammars
from pallas_paged.engine.text.output_processor import OutputProcessor
from pallas_paged.engine.text.tokenizer import Tokenizer, known_eos_token_ids
from pallas_paged.engine.weights import Weights
from pallas_paged.models import ModelConfig

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """An engine's parts, and what they were made of.

    Attributes:
      parts: ready to take requests.
      runner: its device.
      tokenizer: None where the folder has none.
      model_config: the model's shape, for sequences of `max_model_len` tokens.
      max_model_len: most tokens of a sequence.
      weights: the model's, which may be replaced.
      source: where the model came from.
    """

    parts: EngineParts
    runner: ModelRunner
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    max_model_len: int
    weights: Weights
    source: ModelSource


def config_with_limits(model: str, options: dict[str, Any]) -> EngineConfig:
    """Returns the configuration that a caller's options make, on JAX's default device.

    Raises:
      ValueError, FileNotFoundError: an option is not usable; `bundle` names no bundle.
    """
    stats = device_memory.memory_stats(target_device())
    return EngineConfig(model=model, **device_memory.with_limits(with_bundle(options), stats))


def with_bundle(options: dict[str, Any]) -> dict[str, Any]:
    """Returns a caller's options, and those of its bundle, if it names one, that it leaves out.

    Raises:
      ValueError, FileNotFoundError: `bundle` names no bundle.
    """
    if options.get("bundle") is None:
        return options
    given = {name: value for name, value in options.items() if value is not None}
    return {**bundles.read_manifest(options["bundle"]).options, **given}


def build(
    config: EngineConfig, placement: Placement | None = None, source: ModelSource | None = None
) -> Built:
    """Loads the model, sizes the pool, makes an engine; compiles what the size depends on.

    Args:
      config: what the engine is like.
      placement: the devices that it runs on, as many as `tensor_parallel_size`; None for JAX's
        default device, or the first ones of its platform.
      source: of the model; None for the folder that the configuration names.

    Raises:
      ValueError: an option or the checkpoint is not usable; the message names the field or tensor.
      FileNotFoundError: the folder or one of its files is missing.
    """
    begun = begin(config, placement, source)  # first: what is wrong is not the tokenizer's
    placement, max_model_len = begun.placement, begun.max_model_len
    tokenizer = begun.source.tokenizer(config.tokenizer)
    if placement.is_local:
        loaded = load(begun)
    else:
        with leading(config) as make_runner:
            loaded = load(begun, make_runner)
    runner, plan, specs, num_host_blocks, shared = loaded
    memory = BlockTableMemory(
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_blocks_per_seq * config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    host_pool = HostPool(num_host_blocks, memory.num_usable_blocks)
    scheduler = Scheduler(
        memory,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        order=PriorityOrder() if config.scheduling_policy == "priority" else Order(),
        choose_recovery=_recovery(config, memory, host_pool, runner),
        host_pool=host_pool,
        sliding_window=common_window(specs),
        num_scheduler_steps=runner.buckets.num_steps,
        proposer=make_proposer(speculation_settings(config.speculative_config)),
        worth_while=runner.buckets.worth_while,
        step_cost=runner.buckets.step_cost,
    )
    vocab_size = begun.shape.vocab_size
    assert config.seed is not None
    parts = join(
        scheduler,
        memory,
        runner,
        runner.buckets,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=known_eos_token_ids(begun.source.eos_token_ids(), tokenizer, vocab_size),
        tokenizer=tokenizer,
        seed=config.seed,
        max_logprobs=config.max_logprobs,
        async_scheduling=config.async_scheduling,
    )
    weights = Weights(runner.programs, begun, shared)
    return Built(parts, runner, tokenizer, begun.shape, max_model_len, weights, begun.source)


def join(
    scheduler: Scheduler,
    memory: BlockTableMemory,
    executor: Executor,
    buckets: Buckets,
    *,
    vocab_size: int,
    max_model_len: int,
    eos_token_ids: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    max_logprobs: int = 20,
    async_scheduling: bool = True,
) -> EngineParts:
    """Returns an engine's parts over a scheduler, the memory that it schedules, and a device.

    Args:
      scheduler: whose memory is `memory`.
      memory: the owner of the block tables.
      executor: the device. An engine that goes on after another one has used its device must be
        reset before, see `EngineCore.reset`.
      buckets: the shapes of its steps.
      vocab_size: V; token ids are below it.
      max_model_len: most tokens of a sequence.
      eos_token_ids: tokens that end an output unless `ignore_eos`.
      tokenizer: None serves token prompts only, and outputs have no text.
      seed: where the seeds of requests that bring none are drawn from.
      max_logprobs: see `EngineConfig`, as is the next one.
      async_scheduling: likewise.
    """
    grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
    core = EngineCore(
        scheduler,
        Planner(memory, buckets, executor.choose, grammars.find_masks),
        executor,
        vocab_size=vocab_size,
        async_scheduling=async_scheduling,
    )
    intake = Intake(
        scheduler,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        has_text=tokenizer is not None,
        seed=seed,
        max_logprobs=max_logprobs,
        speculates=scheduler.proposer is not None,
    )
    processor = OutputProcessor(tokenizer)
    return EngineParts(
        *(core, memory, intake, processor, tokenizer, vocab_size, grammars),
        plain_logprobs=buckets.has_logprobs,
    )


def _recovery(
    config: EngineConfig, memory: BlockTableMemory, host_pool: HostPool, runner: ModelRunner
) -> ChooseRecovery:
    """Returns the policy that `preemption_mode` names; measures what "auto" needs to know."""
    if config.preemption_mode == "recompute" or not config.swap_space:
        return always_recompute
    if config.preemption_mode == "swap":
        return always_swap
    if host_pool.padded(1) > host_pool.num_blocks:
        logger.warning(
            "swap_space=%s GiB holds %d blocks, and the smallest swap takes %d: preempted requests "
            "are computed again",
            config.swap_space,
            host_pool.num_blocks,
            host_pool.padded(1),
        )
        return always_recompute

    def num_copied(group: SequenceGroup) -> int:
        return host_pool.padded(num_blocks_to_swap(group, memory.tables, config.block_size))

    return CheaperRecovery(measured_costs(runner, host_pool.num_blocks), num_copied)
