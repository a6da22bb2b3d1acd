"""A fixed piece of work of the kind that an engine's host does, to compare machines by.

The same machine is slower when others use its caches and its clock, and another machine is slower
always: a figure divided by this loop's, timed close to it, says what the code costs.
"""

import dataclasses
import gc
import statistics
import time
from typing import Any, NamedTuple

import numpy as np

QUIET_MS = 10.0
"""What `calibrate` returns on the machine whose milliseconds targets are stated in, when quiet.

One core of an AMD EPYC (2 virtual cores), CPython 3.12, NumPy 2.
"""
_NUM_ITEMS = 1024
_NUM_ROUNDS = 14


@dataclasses.dataclass(eq=False, slots=True)
class _Item:
    """Stands for a sequence."""

    name: str
    count: int
    tokens: list[int]

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.tokens)


class _Share(NamedTuple):
    """Stands for what a step computes of a sequence."""

    item: _Item
    start: int
    is_last: bool


def calibrate(repeats: int = 5) -> float:
    """Returns the CPU milliseconds of the loop, the median of `repeats` runs of it."""
    return statistics.median(_timed() for _ in range(repeats))


def judged(figures: dict[str, Any], target_ms: float | None) -> dict[str, Any]:
    """Returns figures, of which `ratio` is to this loop, with their target and whether it is met.

    `target_ms` is in milliseconds of the machine of `QUIET_MS`; None is no target.
    """
    if target_ms is None:
        return figures | {"target": None, "": ""}
    target = target_ms / QUIET_MS
    return figures | {"target": target, "": "met" if figures["ratio"] <= target else "missed"}


def _timed() -> float:
    items = {f"item-{i}": _Item(f"item-{i}", i % 7, []) for i in range(_NUM_ITEMS)}
    gc.collect()
    gc.disable()  # what else is alive would cost time
    try:
        begin = time.process_time()
        for number in range(_NUM_ROUNDS):
            _work(items, number)
        return 1e3 * (time.process_time() - begin)
    finally:
        gc.enable()


def _work(items: dict[str, _Item], number: int) -> int:
    """Looks at every item, as a step looks at every sequence, and computes with arrays of them."""
    shares = [_Share(item, item.length, item.count == 6) for item in items.values()]
    seen: dict[_Item, int] = {}
    for share in shares:
        item = items[share.item.name]
        item.tokens.append(number)
        item.count += not share.is_last
        if item not in seen:
            seen[item] = share.start + item.length
    lengths = np.array(list(seen.values()), np.int32)
    total = 0
    for _ in range(8):
        order = np.argsort(lengths, kind="stable")
        ends = np.cumsum(lengths[order], dtype=np.int32)
        total += int(np.where(ends > number, ends, 0).max())
    return total + sum(ends.tolist())
