"""How large the KV pool is, and where a device's bytes go."""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.cache_spec import CacheSpec, common_window
from pallas_paged.engine.config import DEFAULT_CPU_KV_CACHE_BYTES, EngineConfig
from pallas_paged.engine.core.buckets import Buckets
from pallas_paged.engine.core.logprobs import width_for
from pallas_paged.engine.core.speculation import DraftModelSettings, speculation_settings
from pallas_paged.engine.device.device_memory import memory_stats, usable_bytes
from pallas_paged.engine.device.placement import (
    DEFAULT_DEVICE,
    Placement,
    may_look,
    share_shapes,
)
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.device.row_state import RowState
from pallas_paged.engine.device.rows import Rows
from pallas_paged.engine.resolved import (
    resolve_cascade,
    resolve_num_scheduler_steps,
    resolve_token_logprobs,
)
from pallas_paged.models import CausalLM

logger = logging.getLogger(__name__)

_STEP_COST = {"cpu": 16, "gpu": 256}
"""Tokens that take as long to compute as reading the weights once, and the host's share of a step.

On the CPU a rounded measurement, of 20 and 100 million parameters in float32; on a GPU what the
arithmetic and the bandwidth of an H100 say, which nobody has measured."""


class BundledPool(NamedTuple):
    """The pool that programs were compiled for; see `pallas_paged.engine.device.bundle`.

    Attributes:
      num_blocks: N.
      temporary_bytes: of the largest step, as in `PoolPlan`.
    """

    num_blocks: int
    temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """The pool's size and the bytes beside it, of one device if several share the model.

    Attributes:
      num_blocks: N, the null block included.
      max_blocks_per_seq: M, the width of a block table.
      block_size: S.
      block_bytes: bytes of one block over all layers, scales of quantised caches included.
      weight_bytes: bytes of the model's parameters.
      rows_bytes: bytes of `Rows`, which are those of the block tables.
      row_state_bytes: bytes of `RowState`, from the first request on that asks for penalties, bias
        or log-probabilities.
      temporary_bytes: bytes of the largest step's temporaries; None where the pool's size did not
        need them.
      num_devices: that share the model.
    """

    num_blocks: int
    max_blocks_per_seq: int
    block_size: int
    block_bytes: int
    weight_bytes: int
    rows_bytes: int
    row_state_bytes: int
    temporary_bytes: int | None
    num_devices: int = 1

    def __str__(self) -> str:
        slots = (self.num_blocks - 1) * self.block_size
        parts = [
            f"weights {_mib(self.weight_bytes)}",
            f"KV pool {_mib(self.num_blocks * self.block_bytes)}"
            f" ({self.num_blocks} blocks of {self.block_size} tokens, {slots} tokens)",
            f"block tables {_mib(self.rows_bytes)}",
            f"penalties and bias {_mib(self.row_state_bytes)} from their first use on",
        ]
        if self.temporary_bytes is not None:
            parts.append(f"temporaries of the largest step {_mib(self.temporary_bytes)}")
        of_which = "" if self.num_devices == 1 else f" on each of {self.num_devices} devices"
        return f"memory{of_which}: " + ", ".join(parts)


def buckets_for(
    config: EngineConfig, max_blocks_per_seq: int, platform: str, specs: Sequence[CacheSpec]
) -> Buckets:
    """Returns the shapes of the steps of an engine on devices of a platform.

    `specs` are those of the layers' caches: where all have a window, nothing reads old prefixes.
    """
    speculation = speculation_settings(config.speculative_config)
    return Buckets.for_limits(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        max_blocks_per_seq,
        deterministic=config.deterministic,
        num_steps=resolve_num_scheduler_steps(config, platform),
        num_drafts=0 if speculation is None else speculation.num_speculative_tokens,
        proposes=isinstance(speculation, DraftModelSettings),
        step_cost=_STEP_COST.get(platform, max(_STEP_COST.values())),
        specialised=not may_look(platform),
        shares_prefix=shares_prefixes(config, platform, specs),
        has_logprobs=resolve_token_logprobs(config),
    )


def shares_prefixes(config: EngineConfig, platform: str, specs: Sequence[CacheSpec]) -> bool:
    """Returns whether steps may read a shared prefix at once; see `buckets_for`."""
    return resolve_cascade(config, platform) and common_window(specs) is None


def unsized_programs(
    config: EngineConfig,
    model: CausalLM,
    max_blocks_per_seq: int,
    specs: Sequence[CacheSpec],
    implementation: str,
    placement: Placement,
) -> StepPrograms:
    """Returns the steps over a pool of two blocks: what they are before the pool's size is known.

    Temporaries do not depend on that.
    """
    return StepPrograms(
        model,
        tuple(spec.shapes(2) for spec in specs),
        config.max_num_seqs,
        max_blocks_per_seq,
        width_for(config.max_logprobs, model.config.vocab_size),
        implementation,
        config.cache_implementation,
        config.deterministic,
        config.logprobs_mode,
        placement=placement,
    )


def plan_pool(
    config: EngineConfig,
    model: CausalLM,
    max_model_len: int,
    cache_dtype: jnp.dtype,
    implementation: str,
    placement: Placement = DEFAULT_DEVICE,
    *,
    bundled: BundledPool | None = None,
    stats: Mapping[str, int] | None = None,
) -> PoolPlan:
    """Sizes the pool by `num_blocks`, else by bytes, else by a bundle, else by the device.

    On a CPU the device's default is a stated size; on a GPU it is the configured share of its
    memory less what is in use (the weights), the temporaries of the largest compiled step,
    `rows_bytes`, and `row_state_bytes`, without which the first request with a penalty would run
    out of memory.
    Unless `num_blocks` asks for it, no pool is larger than all sequences at their longest need.
    The device is that of `placement`, by default JAX's default device; `stats` are its memory's if
    it is not here. The size of `bundled` is taken if the device holds it, else a warning says so.

    Raises:
      ValueError: there is no room for a single block beside the null block, or more is asked for
        than the device has.
      NotImplementedError: a layer's cache is of a kind that no pool holds, see `CacheSpec`.
    """
    S = config.block_size
    shape = model.config
    specs = shape.cache_specs(S, cache_dtype)
    block_bytes = sum(spec.block_bytes for spec in specs) // placement.num_devices
    max_blocks_per_seq = math.ceil(max_model_len / S)
    state = nnx.state(model)
    weight_bytes = num_bytes(
        share_shapes(
            jax.tree.leaves(state), placement.parameter_specs(state), placement.num_devices
        )
    )
    row_state = jax.eval_shape(lambda: RowState.zeros(config.max_num_seqs, shape.vocab_size))
    row_state_bytes = num_bytes(row_state)
    rows_bytes = _rows_bytes(config.max_num_seqs, max_blocks_per_seq)
    temporary_bytes = None
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        if config.kv_cache_memory_bytes is not None:
            source = f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
            pool_bytes = config.kv_cache_memory_bytes
        elif placement.device.platform == "cpu":
            source, pool_bytes = "the default on a CPU", DEFAULT_CPU_KV_CACHE_BYTES
        else:
            source = f"gpu_memory_utilization={config.gpu_memory_utilization}"
            stats = _memory_stats(placement) if stats is None else stats
            if stats is None:
                raise ValueError(
                    "JAX does not tell the memory of this device, so that no share of it is known; "
                    "set num_blocks or kv_cache_memory_bytes"
                )
            usable = usable_bytes(stats, config.gpu_memory_utilization)
            pool_bytes = usable - stats["bytes_in_use"] - rows_bytes - row_state_bytes
            if bundled is not None and bundled.temporary_bytes is not None:
                temporary_bytes = bundled.temporary_bytes
            else:
                programs = unsized_programs(
                    config, model, max_blocks_per_seq, specs, implementation, placement
                )
                platform = placement.device.platform
                largest = buckets_for(config, max_blocks_per_seq, platform, specs).largest()
                programs.compile(largest)
                temporary_bytes = max(map(programs.temporary_bytes, largest))
            pool_bytes -= temporary_bytes
        num_blocks = round_num_blocks(max(0, pool_bytes) // block_bytes)
        if num_blocks < 2:
            raise ValueError(
                f"{source} leaves {max(0, pool_bytes)} bytes for the KV pool, and a block takes "
                f"{block_bytes}; at least 2 blocks are needed: give it more memory, or choose a "
                "smaller block_size or model"
            )
        num_blocks = placement.least(num_blocks)
        num_blocks = min(num_blocks, config.max_num_seqs * max_blocks_per_seq + 1)
        if bundled is not None and config.kv_cache_memory_bytes is None:
            room = pool_bytes if stats is not None else _memory_bytes(placement.device)
            if bundled.num_blocks * block_bytes <= room:
                num_blocks = bundled.num_blocks
            else:
                logger.warning(
                    "the bundle is for a KV pool of %s, and there is room for %s",
                    _mib(bundled.num_blocks * block_bytes),
                    _mib(room),
                )
    capacity = stats["bytes_limit"] if stats is not None else _memory_bytes(placement.device)
    if num_blocks * block_bytes > capacity:
        raise ValueError(
            f"a KV pool of {num_blocks} blocks takes {_mib(num_blocks * block_bytes)}, and the "
            f"device has {_mib(capacity)}; choose a smaller num_blocks or kv_cache_memory_bytes"
        )
    # Nobody can hold more blocks than there are.
    max_blocks_per_seq = min(max_blocks_per_seq, num_blocks - 1)
    return PoolPlan(
        num_blocks,
        max_blocks_per_seq,
        S,
        block_bytes,
        weight_bytes,
        _rows_bytes(config.max_num_seqs, max_blocks_per_seq),
        row_state_bytes,
        temporary_bytes,
        placement.num_devices,
    )


def round_num_blocks(num_blocks: int) -> int:
    """Rounds down to 8 sizes per power of two.

    The pool's size is a shape of every compiled program: on this grid a start with slightly more
    or less free memory finds the same programs in the compilation cache.
    """
    step = 1 << max(0, num_blocks.bit_length() - 4)
    return num_blocks // step * step


def _memory_stats(placement: Placement) -> Mapping[str, int] | None:
    """Returns those of the device that has the least left; None if JAX does not tell them."""
    every = [memory_stats(device) for device in placement.local_devices]
    known = [stats for stats in every if stats is not None]
    return min(known, key=lambda s: s["bytes_limit"] - s["bytes_in_use"], default=None)


def _memory_bytes(device: jax.Device) -> int:
    """Returns the memory of a device: what JAX may use of a GPU, or the machine's."""
    stats = memory_stats(device)
    if stats is not None:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rows_bytes(num_rows: int, table_width: int) -> int:
    return num_bytes(jax.eval_shape(lambda: Rows.zeros(num_rows, table_width)))


def num_bytes(arrays: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of what has their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
