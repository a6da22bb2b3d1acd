"""Gives an engine's memory back for a while, such as that in which a trainer needs it."""

import dataclasses
import logging
from collections.abc import Collection

from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.engine import Engine, Pinned
from pallas_paged.engine.weights import Weights

logger = logging.getLogger(__name__)

KV_CACHE, WEIGHTS = "kv_cache", "weights"
LEVELS = {1: frozenset({KV_CACHE}), 2: frozenset({KV_CACHE, WEIGHTS})}
"""What an engine gives back, by level."""


@dataclasses.dataclass(frozen=True)
class Freed:
    """What `sleep` has given back, in bytes of all devices together.

    Attributes:
      kv_cache_bytes: of the KV pool.
      weights_bytes: of weights that were the engine's alone.
      shared_weights_bytes: of weights that the engine has let go, and whose arrays a caller has
        too: they stay as long as that one has them.
    """

    kv_cache_bytes: int = 0
    weights_bytes: int = 0
    shared_weights_bytes: int = 0

    def __str__(self) -> str:
        pool, weights, shared = (
            f"{value / 2**20:.1f} MiB"
            for value in (self.kv_cache_bytes, self.weights_bytes, self.shared_weights_bytes)
        )
        return f"freed {pool} of the KV pool and {weights} of weights; {shared} are the caller's"


class Sleep:
    """What an engine has given back, and how it gets it again; one thread at a time.

    Attributes:
      pinned: prefixes that were pinned, and are to be computed again when it is awake.
    """

    def __init__(self, engine: Engine, runner: ModelRunner, weights: Weights) -> None:
        """It is awake."""
        self._engine, self._runner, self._weights = engine, runner, weights
        self.pinned: list[Pinned] = []

    def begin(self, level: int) -> Freed:
        """Gives back what belongs to a level; what it has given back already stays so.

        Raises:
          ValueError: there is no such level; the engine is of several processes.
          RuntimeError: requests are unfinished.
        """
        if level not in LEVELS or isinstance(level, bool):
            raise ValueError(f"level={level!r} must be 1, the KV pool, or 2, that and the weights")
        self._weights.check_process("sleep")
        if self._engine.has_unfinished:
            raise RuntimeError("requests are unfinished: sleep when they have ended")
        wanted = LEVELS[level] - self._engine.asleep
        freed = Freed()
        if KV_CACHE in wanted:
            pool_bytes, pinned = self._engine.change_device(self._runner.release)
            self.pinned += pinned
            freed = dataclasses.replace(freed, kv_cache_bytes=pool_bytes)
        if WEIGHTS in wanted:
            mine, shared = self._weights.give_back()
            freed = dataclasses.replace(freed, weights_bytes=mine, shared_weights_bytes=shared)
        self._engine.asleep |= wanted
        logger.info("asleep: %s", freed)
        return freed

    def end(self, tags: Collection[str] | None) -> None:
        """Gets back what `tags` name, or all.

        Raises:
          ValueError: there is no such tag.
          RuntimeError: the weights were the caller's.
        """
        every = LEVELS[max(LEVELS)]
        if isinstance(tags, str) or not set(tags or ()) <= every:
            raise ValueError(f"tags={tags!r} must be a list of {' and '.join(sorted(every))}")
        wanted = self._engine.asleep & (every if tags is None else set(tags))
        if WEIGHTS in wanted:
            self._weights.reload()
            self._engine.core.note_new_weights()
            self._engine.asleep -= {WEIGHTS}
        if KV_CACHE in wanted:
            self._runner.recover()
            self._engine.asleep -= {KV_CACHE}

    def take_pinned(self) -> list[Pinned]:
        """Returns the prefixes to pin again, and forgets them."""
        pinned, self.pinned = self.pinned, []
        return pinned
