"""Figs. 18b and 19b: latencies at one rate over block sizes, and by how lost memory comes back.

What larger blocks waste is simulated. What small ones cost a kernel is not: a step's cost does not
depend on the block size here, and on a GPU it is unmeasured. Nor does a swap's, but by its bytes:
this project copies all blocks of a request at once, and the paper copies each by itself.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from benchmarks.paper.claims import Range, Row
from benchmarks.paper.figures.figure import Curves, Figure
from benchmarks.paper.jobs import Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.simulation.serve import Kind
from benchmarks.simulation.systems import PAPER, System

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SIZES = (8, 16, 32, 64, 128, 256)
_RATES = {"sharegpt": 1.6, "alpaca": 30.0}
_PRESSED_RATE = 2.0
"""On ShareGPT: requests lose their memory now and then."""
_SWAPS = dataclasses.replace(PAPER, name="paged, swapping", swaps=True)


def job(data: str, size: int, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the run with blocks of one size."""
    return Job(
        dataclasses.replace(PAPER, block_size=size),
        "opt-13b",
        sources.data(data),
        Kind(),
        scale.minutes,
        seed,
        (_RATES[data],),
        limit_s=math.inf,
    )


def pressed_job(system: System, size: int, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns a run in which requests lose their memory, and are swapped or computed again."""
    return Job(
        dataclasses.replace(system, block_size=size),
        "opt-13b",
        sources.data("sharegpt"),
        Kind(),
        scale.minutes,
        seed,
        (_PRESSED_RATE,),
        limit_s=math.inf,
    )


def pressed_sizes(scale: Scale) -> tuple[int, ...]:
    """Returns the block sizes of those runs."""
    return (16,) if scale.name == "quick" else (16, 32, 64)


def sizes(scale: Scale) -> tuple[int, ...]:
    """Returns the block sizes that are run."""
    return (16, 256) if scale.name == "quick" else SIZES


def jobs(scale: Scale, sources: Sources) -> list[Job]:
    """Returns a run for each size and data set, then those with and without swapping."""
    found = [
        job(data, size, scale, sources, seed)
        for data in _RATES
        for size in sizes(scale)
        for seed in scale.few_seeds
    ]
    return found + [
        pressed_job(system, size, scale, sources, seed)
        for system in (PAPER, _SWAPS)
        for size in pressed_sizes(scale)
        for seed in scale.few_seeds
    ]


def rows(scale: Scale, sources: Sources, curves: Curves) -> list[Row]:
    """Returns the latency of each size beside that of blocks of 16."""
    claims = {
        ("sharegpt", 32): Range("about 1", 0.8, 1.25),
        ("sharegpt", 64): Range("about 1", 0.8, 1.25),
        ("sharegpt", 128): Range("about 1", 0.8, 1.25),
        ("alpaca", 32): Range("about 1", 0.8, 1.25),
        ("alpaca", 128): Range.order("above 1"),
        ("alpaca", 256): Range.order("above 1"),
    }
    found = []
    for data in _RATES:
        base = _latencies(data, 16, scale, sources, curves)
        for size in sizes(scale):
            if size == 16:
                continue
            mine = _latencies(data, size, scale, sources, curves)
            found.append(
                Row(
                    "18b",
                    f"latency / blocks of 16, {data}, blocks of {size}",
                    claims.get((data, size)),
                    tuple(a / b for a, b in zip(mine, base, strict=True)),
                    "simulated",
                    sources.data(data).source,
                    "x",
                    "a kernel's cost by block size is left out",
                )
            )
    for size in pressed_sizes(scale):
        again, swapped = (
            [
                curves[pressed_job(system, size, scale, sources, seed)].points[0].outcome
                for seed in scale.few_seeds
            ]
            for system in (PAPER, _SWAPS)
        )
        lost = sum(outcome.num_preemptions for outcome in again)
        found.append(
            Row(
                "19",
                f"latency, recompute / swap, sharegpt, blocks of {size}",
                Range("comparable", 0.8, 1.25),
                tuple(
                    a.normalized_latency_s / b.normalized_latency_s
                    for a, b in zip(again, swapped, strict=True)
                ),
                "simulated",
                sources.data("sharegpt").source,
                "x",
                f"{lost} times memory was lost; a swap is one copy",
            )
        )
    return found


def _latencies(
    data: str, size: int, scale: Scale, sources: Sources, curves: Curves
) -> tuple[float, ...]:
    runs = [curves[job(data, size, scale, sources, seed)] for seed in scale.few_seeds]
    return tuple(run.points[0].outcome.normalized_latency_s for run in runs)


def draw(scale: Scale, sources: Sources, curves: Curves, picture: "Picture") -> None:
    """Draws latencies over block sizes, of the first seed."""
    axes = picture.subplots()
    places = range(len(sizes(scale)))
    for index, data in enumerate(_RATES):
        values = [_latencies(data, size, scale, sources, curves)[0] for size in sizes(scale)]
        axes.bar([place + 0.4 * index for place in places], values, width=0.4, label=data)
    axes.set_xticks(list(places), [str(size) for size in sizes(scale)])
    axes.set(xlabel="block size", ylabel="normalized latency, s/token", title="Fig. 18b: simulated")
    axes.legend()


FIGURE = Figure(("18b", "19"), "fig18b-block-sizes", jobs, rows, draw, (6, 4))
