"""How much memory a GPU has for an engine, and what suits so much."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

from pallas_paged.engine.config import EngineConfig

logger = logging.getLogger(__name__)

_FRACTION_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_JAX_FRACTION = 0.75
"""Of a card's memory, what JAX takes unless one of these environment variables says otherwise."""
_LARGE_GPU_BYTES = 70 << 30


def card_bytes(stats: Mapping[str, int], environment: Mapping[str, str] = os.environ) -> int:
    """Returns the memory of a card, from JAX's statistics of what it may use of it."""
    return int(stats["bytes_limit"] / _fraction(environment))


def stats_of_card(
    card_bytes: int, bytes_in_use: int, environment: Mapping[str, str] = os.environ
) -> Mapping[str, int]:
    """Returns JAX's statistics of a card that need not be here, under this environment."""
    limit = int(card_bytes * _fraction(environment))
    return {"bytes_limit": limit, "bytes_in_use": bytes_in_use}


def _fraction(environment: Mapping[str, str]) -> float:
    settings = (environment.get(name) for name in _FRACTION_SETTINGS)
    return next((float(setting) for setting in settings if setting), _JAX_FRACTION)


def usable_bytes(
    stats: Mapping[str, int], utilization: float, environment: Mapping[str, str] = os.environ
) -> int:
    """Returns the bytes that an engine may fill of a GPU: a share of the whole card, as in vLLM.

    What JAX may use is a limit too; if it is the smaller one, a warning says how to raise it.

    Args:
      stats: `memory_stats()` of the device.
      utilization: `gpu_memory_utilization`, of the card's memory.
      environment: variables that tell what JAX may use.
    """
    share = int(card_bytes(stats, environment) * utilization)
    limit = stats["bytes_limit"]
    if limit < share:
        is_set = [name for name in _FRACTION_SETTINGS if environment.get(name)]
        logger.warning(
            "gpu_memory_utilization=%s of the card are %.1f GiB, and JAX may use %.1f GiB: set the "
            "environment variable %s=%s before Python starts to use all of them",
            utilization,
            share / 2**30,
            limit / 2**30,
            (is_set or _FRACTION_SETTINGS)[0],  # JAX refuses both of them together
            utilization,
        )
    return min(share, limit)


def memory_stats(device: jax.Device) -> Mapping[str, int] | None:
    """Returns what JAX says of a device's memory; None on a CPU."""
    return device.memory_stats()


def with_limits(options: Mapping[str, Any], stats: Mapping[str, int] | None) -> dict[str, Any]:
    """Returns the options of an engine with the limits of a step that suit the device.

    `max_num_seqs` and `max_num_batched_tokens`, where they are absent or None, are those of
    `EngineConfig` on a CPU, and on a GPU 256, and 8192 tokens or, below 70 GiB, 2048. A default is
    no reason to refuse the other one: no more sequences than tokens.

    Args:
      options: fields of `EngineConfig`.
      stats: `memory_stats()` of the device.
    """
    if stats is None:
        num_seqs, num_tokens = EngineConfig.max_num_seqs, EngineConfig.max_num_batched_tokens
    else:
        is_large = card_bytes(stats) >= _LARGE_GPU_BYTES
        num_seqs, num_tokens = 256, 8192 if is_large else 2048
    given_seqs, given_tokens = map(options.get, ("max_num_seqs", "max_num_batched_tokens"))
    if given_seqs is None and isinstance(given_tokens, int):
        num_seqs = max(1, min(num_seqs, given_tokens))
    if given_tokens is None and isinstance(given_seqs, int):
        num_tokens = max(num_tokens, given_seqs)
    return {
        **options,
        "max_num_seqs": num_seqs if given_seqs is None else given_seqs,
        "max_num_batched_tokens": num_tokens if given_tokens is None else given_tokens,
    }
