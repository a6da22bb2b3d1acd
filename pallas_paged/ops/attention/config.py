"""How the Mosaic GPU kernels are configured: data, and where it comes from.

A configuration changes no result, only time. The one given wins, then the one that
`benchmarks/tune_attention.py` measured on this kind of GPU (`tuned/`), then a rule.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

_SMEM_ALIGNMENT_BYTES = 1024
_BARRIER_BYTES = 8
_REDUCTION_SCRATCH_BYTES = plgpu.CompilerParams().reduction_scratch_bytes


@dataclasses.dataclass(frozen=True)
class GpuLimits:
    """What a chip offers; see `GPU_LIMITS`.

    Attributes:
      smem_per_cta_bytes: the most shared memory that one CTA may have.
      smem_per_sm_bytes: what the CTAs on an SM share.
      smem_reserved_bytes: what each CTA takes of it besides its own.
      shared_stages: the tiles in flight per CTA, most first, that the rule tries for CTAs which
        share an SM.
      smallest_tile: the fewest keys per step of what is worth while there.
    """

    smem_per_cta_bytes: int
    smem_per_sm_bytes: int
    smem_reserved_bytes: int
    shared_stages: tuple[int, ...]
    smallest_tile: int = 64


SM90 = GpuLimits(227 * 1024, 228 * 1024, 1024, shared_stages=(4, 3))
"""H100, H200: compute capability 9.0."""

SM80 = GpuLimits(163 * 1024, 164 * 1024, 1024, shared_stages=(4, 3, 2))
"""A100: compute capability 8.0."""

SM86 = GpuLimits(99 * 1024, 100 * 1024, 1024, shared_stages=(4, 3, 2), smallest_tile=32)
"""A10, RTX 3090, L4, L40S, RTX 4090: compute capabilities 8.6 and 8.9."""

GPU_LIMITS = {(8, 0): SM80, (8, 6): SM86, (8, 9): SM86, (9, 0): SM90}
"""By compute capability."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel cuts its work.

    Attributes:
      tile: keys per step, 64 or 128; where `GpuLimits.smallest_tile` allows it 32.
      num_stages: tiles in flight per CTA.
      ctas_per_sm: CTAs that share an SM; the grid has so many for each SM of the chip.
      min_tiles: the fewest tiles of a CTA that has any; more of them, fewer partial results.
      converts_ahead: on sm_90a, whether tiles of a quantised cache are converted while the tensor
        core multiplies: values during the product with keys, the next tile's keys during that with
        values. Else each right before its product. Needs two stages.
    """

    tile: int = 64
    num_stages: int = 3
    ctas_per_sm: int = 2
    min_tiles: int = 1
    converts_ahead: bool = True

    def __post_init__(self) -> None:
        if self.tile not in (32, 64, 128):
            raise ValueError(f"tile={self.tile} must be 32, 64 or 128")
        if self.num_stages < 1 or self.ctas_per_sm < 1 or self.min_tiles < 1:
            raise ValueError(f"num_stages, ctas_per_sm and min_tiles must be positive: {self}")
        if self.converts_ahead and self.num_stages < 2:
            raise ValueError(f"converts_ahead needs two tiles, num_stages >= 2: {self}")


@dataclasses.dataclass(frozen=True)
class DecodeKey:
    """What a measured configuration is looked up by.

    Attributes:
      dtype: of the cache, by name.
      head_dim, block_size: D, S.
      columns: query rows that the kernel multiplies at a time: the heads of a group, rounded up to
        8, times the most query tokens per sequence.
    """

    dtype: str
    head_dim: int
    columns: int
    block_size: int


def shared_memory_bytes(scratch: Any) -> int:
    """Returns the shared memory of a CTA with a tree of scratch types, barriers included."""
    total = _REDUCTION_SCRATCH_BYTES
    for scratch_type in jax.tree.leaves(scratch):
        if isinstance(scratch_type, plgpu.Barrier):
            total += int(np.prod(scratch_type.num_barriers)) * _BARRIER_BYTES
        else:
            size = math.prod(scratch_type.shape) * jnp.dtype(scratch_type.dtype).itemsize
            total += -(-size // _SMEM_ALIGNMENT_BYTES) * _SMEM_ALIGNMENT_BYTES
    return total


def fits(config: DecodeConfig, scratch: Any, limits: GpuLimits) -> bool:
    """Whether `config.ctas_per_sm` CTAs with these scratch types share an SM, in tiles it has."""
    smem_bytes = shared_memory_bytes(scratch)
    per_sm = config.ctas_per_sm * (smem_bytes + limits.smem_reserved_bytes)
    is_room = smem_bytes <= limits.smem_per_cta_bytes and per_sm <= limits.smem_per_sm_bytes
    return is_room and config.tile >= limits.smallest_tile


def decode_config(
    key: DecodeKey,
    device_kind: str,
    scratch_types: Callable[[DecodeConfig], Any],
    limits: GpuLimits = SM90,
) -> DecodeConfig:
    """Returns the configuration measured for `key` on such a device, else one by rule.

    Args:
      key: the kernel's case.
      device_kind: JAX's name of the GPU.
      scratch_types: from a configuration to what the kernel allocates with it.
      limits: of the chip.
    """
    tuned = tuned_configs(device_kind).get(key)
    if tuned is not None and fits(tuned, scratch_types(tuned), limits):
        return tuned
    return heuristic(key, scratch_types, limits)


def heuristic(
    key: DecodeKey,
    scratch_types: Callable[[DecodeConfig], Any],
    limits: GpuLimits = SM90,
) -> DecodeConfig:
    """Returns the first configuration that fits: CTAs that hide each other's waits, then stages.

    Reasoned, not measured. One CTA's chain of dependent steps per tile is about half as long as the
    tile's time on the memory bus, so two CTAs per SM keep the bus busy, and three for small heads.
    For the sake of the second CTA a tile is halved where the chip has such tiles.
    """
    shared = limits.shared_stages
    many = 3 if key.head_dim <= 64 and key.columns <= 16 else 2
    for ctas_per_sm, stages in ((many, shared), (2, shared), (1, (4, 3, 2))):
        for tile, num_stages in itertools.product((64, 32), stages):
            config = DecodeConfig(tile, num_stages, ctas_per_sm)
            if fits(config, scratch_types(config), limits):
                return config
    raise AssertionError(f"no configuration fits the shared memory for {key}")


@functools.cache
def tuned_configs(device_kind: str) -> Mapping[DecodeKey, DecodeConfig]:
    """Returns the configurations that were measured on such a device; there may be none."""
    file = resources.files("pallas_paged.ops.attention") / "tuned" / tuned_file_name(device_kind)
    return parse_tuned(file.read_text()) if file.is_file() else {}


def tuned_file_name(device_kind: str) -> str:
    """Returns the name of the file with the configurations measured on such a device."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def parse_tuned(text: str) -> dict[DecodeKey, DecodeConfig]:
    """Returns the configurations in a file that `format_tuned` wrote; every field must be there."""
    return {
        DecodeKey(**entry["key"]): DecodeConfig(**entry["config"])
        for entry in json.loads(text)["decode"]
    }


def format_tuned(configs: Mapping[DecodeKey, DecodeConfig], about: Mapping[str, Any]) -> str:
    """Returns the text of a file of measured configurations; `about` says when and on what."""
    entries = [
        {"key": dataclasses.asdict(key), "config": dataclasses.asdict(config)}
        for key, config in sorted(configs.items(), key=lambda item: dataclasses.astuple(item[0]))
    ]
    return json.dumps({"about": dict(about), "decode": entries}, indent=2) + "\n"
