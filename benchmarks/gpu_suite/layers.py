"""Layers of attention, timed as the difference of turns with many of them and with few."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.shapes import Shape
from benchmarks.gpu_suite.stage import Context, Row
from benchmarks.gpu_suite.timing import Loop

FEW_LAYERS, LAYERS = (2, 4), (4, 8)
TOY_LAYERS = (1, 2)
LONGEST_TURN_S = 0.04
"""Where turns would be longer, they have few layers."""
LONGEST_CALLS_S = 0.3
"""Where a call of both loops takes longer, it is repeated twice only."""
MAX_POOL_BYTES = 40e9
"""Of the keys and values of all layers; beyond it, layers share them."""
GUESS_BYTES_PER_S, GUESS_FLOPS, GUESS_LAUNCH_S = 3e12, 5e14, 5e-6
"""Only to choose how long to time."""


def rotations(shape: Shape, on_gpu: bool) -> int:
    """Returns how many steps' keys and values a layer's cache has: turns rotate over them.

    Those of two layers are then larger than the L2 cache.
    """
    return timing.num_copies(2 * shape.kv_bytes, 64) if on_gpu else 2


def num_caches(shape: Shape, on_gpu: bool) -> int:
    """Returns how many caches the layers have: one each, as long as memory allows."""
    most = (LAYERS if on_gpu else TOY_LAYERS)[1]
    return max(1, min(most, int(MAX_POOL_BYTES / (rotations(shape, on_gpu) * shape.kv_bytes))))


class Layers(NamedTuple):
    """Layers that feed each other, in a turn of a loop.

    Attributes:
      name: determines everything but the numbers of layers and turns.
      begin: `q, step = begin(turn, state, *rest)`: what happens once in a turn.
      attend: `q = attend(q, cache, step)`: a layer; the last one's q is the turn's state.
      operands: describes `(state, caches, *rest)`; layer i has cache `i % len(caches)`.
      counts: how many layers there are, in one loop and in the other.
      turns: turns of both.
      repeats: how often both are timed.
    """

    name: str
    begin: Callable[..., tuple[Any, Any]]
    attend: Callable[[Any, Any, Any], Any]
    operands: tuple[Any, ...]
    counts: tuple[int, int]
    turns: int
    repeats: int

    @classmethod
    def of(
        cls,
        name: str,
        shape: Shape,
        on_gpu: bool,
        begin: Callable[..., tuple[Any, Any]],
        attend: Callable[[Any, Any, Any], Any],
        operands: tuple[Any, ...],
        estimate_s: float | None = None,
    ) -> "Layers":
        """Chooses counts, turns and repeats by the seconds that a layer takes, or the shape's."""
        if not on_gpu:
            return cls(name, begin, attend, operands, TOY_LAYERS, 2, 2)
        if estimate_s is None:
            moving = shape.moved_bytes / GUESS_BYTES_PER_S
            estimate_s = max(moving, shape.operations / GUESS_FLOPS, GUESS_LAUNCH_S)
        counts = LAYERS if LAYERS[1] * estimate_s <= LONGEST_TURN_S else FEW_LAYERS
        turns = timing.num_turns(counts[1] * estimate_s)
        is_short = sum(counts) * turns * estimate_s <= LONGEST_CALLS_S
        return cls(name, begin, attend, operands, counts, turns, timing.REPEATS if is_short else 2)

    def loop(self, layers: int, turns: int) -> Loop:
        """Returns a loop of `turns` turns of so many layers."""

        def work(turn: jax.Array, state: Any, caches: Any, *rest: Any) -> Any:
            q, step = self.begin(turn, state, *rest)
            for layer in range(layers):
                q = self.attend(q, caches[layer % len(caches)], step)
            return q

        return Loop(f"{self.name}, {layers} layers", work, self.operands, turns)

    @property
    def loops(self) -> list[Loop]:
        """The two."""
        return [self.loop(count, self.turns) for count in self.counts]

    def measure(
        self, arrays: tuple[Any, ...], context: Context
    ) -> tuple[Row, list[tuple[list[np.ndarray], list[np.ndarray]]]]:
        """Returns `timing.per_layer`'s figures, and both loops' `timing.Timed.results`."""
        timed = timing.run(self.loops, arrays, context, self.repeats)
        few, many = timed.seconds
        return timing.per_layer(few, many, self.counts), timed.results
