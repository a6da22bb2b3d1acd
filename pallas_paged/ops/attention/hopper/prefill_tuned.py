"""Which `PrefillTuning` was measured to be the fastest on a kind of GPU, and the files they are in.

A file in `tuned/` has measured configurations of both sm_90a kernels: `config.py` reads those of
decode, this module reads those of prefill and writes files.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax.numpy as jnp

from pallas_paged.ops.attention.config import (
    SM90,
    DecodeConfig,
    DecodeKey,
    format_tuned,
    shared_memory_bytes,
    tuned_file_name,
)
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning, prefill_tuning
from pallas_paged.ops.attention.hopper.prefill_parts import Problem, scratch_types
from pallas_paged.quantisation import is_quantised


@dataclasses.dataclass(frozen=True)
class PrefillKey:
    """What a measured tuning is looked up by.

    Attributes:
      dtype: of the cache, by name.
      head_dim, block_size: D, S.
      group: query heads per KV head, which decides how many tokens a tile of the kernel has.
    """

    dtype: str
    head_dim: int
    group: int
    block_size: int


def prefill_key(problem: DecodeProblem) -> PrefillKey:
    """Returns what a measured tuning for a step of `problem` is looked up by."""
    return PrefillKey(
        dtype=jnp.dtype(problem.cache_dtype).name,
        head_dim=problem.head_dim,
        group=problem.group,
        block_size=problem.block_size,
    )


def prefill_tuning_for(
    key: PrefillKey, device_kind: str, interpreted: bool = False
) -> PrefillTuning:
    """Returns the tuning measured for `key` on such a device if it fits there, else one by rule.

    Args:
      key: the kernel's case.
      device_kind: JAX's name of the GPU.
      interpreted: whether it is for interpret mode; that one is by rule.
    """
    if not interpreted:
        tuned = tuned_prefill(device_kind).get(key)
        if tuned is not None and fits(key, tuned):
            return tuned
    return prefill_tuning(key.head_dim, interpreted, is_quantised(key.dtype))


def fits(key: PrefillKey, tuning: PrefillTuning) -> bool:
    """Whether the kernel can be cut so, on the chips that it is for.

    A step is of whole blocks or a block of whole steps, the shared memory holds a thread block, and
    the tensor core finds its operands in the registers.
    """
    larger, smaller = sorted((tuning.tile_keys, key.block_size), reverse=True)
    if larger % smaller or (tuning.converters > 1 and key.head_dim > 192):
        return False
    problem = Problem(
        num_kv_heads=1,
        group=key.group,
        head_dim=key.head_dim,
        block_size=key.block_size,
        # Queries of a quantised cache may be float16 too, which takes the same memory.
        dtype=jnp.dtype("bfloat16" if is_quantised(key.dtype) else key.dtype),
        cache_dtype=jnp.dtype(key.dtype),
        scale=1.0,
        sliding_window=None,
        logits_soft_cap=None,
        tuning=tuning,
    )
    return shared_memory_bytes(scratch_types(problem)) <= SM90.smem_per_cta_bytes


@functools.cache
def tuned_prefill(device_kind: str) -> Mapping[PrefillKey, PrefillTuning]:
    """Returns the tunings that were measured on such a device; there may be none."""
    file = resources.files("pallas_paged.ops.attention") / "tuned" / tuned_file_name(device_kind)
    return parse(file.read_text())[1] if file.is_file() else {}


def parse(text: str) -> tuple[dict[DecodeKey, DecodeConfig], dict[PrefillKey, PrefillTuning]]:
    """Returns the configurations of decode and of prefill in a file that `merged` wrote.

    Raises:
      ValueError: the text is no such file, an entry lacks a field or has one that is unknown, or a
        value is refused.
    """
    content = json.loads(text)
    decode = _entries(content, "decode", DecodeKey, DecodeConfig)
    prefill = _entries(content, "prefill", PrefillKey, PrefillTuning)
    return decode, prefill


def merged(
    old: str | None,
    decode: Mapping[DecodeKey, DecodeConfig],
    prefill: Mapping[PrefillKey, PrefillTuning],
    about: Mapping[str, Any],
) -> str:
    """Returns the new text of a file of configurations: these over those of before.

    Args:
      old: the text of before, or None.
      decode, prefill: what was measured now.
      about: says when and on what.

    Raises:
      ValueError: `old` is refused by `parse`.
    """
    all_decode, all_prefill = ({}, {}) if old is None else parse(old)
    all_decode.update(decode)
    all_prefill.update(prefill)
    content = json.loads(format_tuned(all_decode, about))
    content["prefill"] = [
        {"key": dataclasses.asdict(key), "config": dataclasses.asdict(tuning)}
        for key, tuning in sorted(
            all_prefill.items(), key=lambda item: dataclasses.astuple(item[0])
        )
    ]
    return json.dumps(content, indent=2) + "\n"


def _entries(content: Any, kernel: str, key_type: Any, config_type: Any) -> dict[Any, Any]:
    """Returns a kernel's entries; `content` may lack the list, as files without prefill did."""
    if not isinstance(content, dict):
        raise ValueError(f"a file of configurations is a JSON object, not {content!r:.80}")
    entries = {}
    for entry in content.get(kernel, []):
        parts = []
        for part, type_ in (("key", key_type), ("config", config_type)):
            fields = {field.name for field in dataclasses.fields(type_)}
            given = entry.get(part, {})
            if set(given) != fields:
                raise ValueError(
                    f"the {part} of an entry of {kernel!r} has the fields {sorted(given)}; "
                    f"it must have {sorted(fields)}"
                )
            parts.append(type_(**given))
        entries[parts[0]] = parts[1]
    return entries
