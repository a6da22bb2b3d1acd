"""Fig. 12: latencies over request rates, and what today's engine adds on the same axes."""

from typing import TYPE_CHECKING

from benchmarks.paper.claims import Range, Row
from benchmarks.paper.figures.figure import Curves, Figure, bounds, bracket, draw_curve, ratios
from benchmarks.paper.jobs import Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.simulation.serve import Kind
from benchmarks.simulation.systems import (
    OF_PAPER,
    ORCA_MAX,
    ORCA_ORACLE,
    PAPER,
    STATIC,
    TODAY,
    System,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_MOST = {
    ("opt-13b", "sharegpt"): 4.0,
    ("opt-66b", "sharegpt"): 2.0,
    ("opt-175b", "sharegpt"): 8.0,
    ("opt-13b", "alpaca"): 60.0,
    ("opt-66b", "alpaca"): 40.0,
    ("opt-175b", "alpaca"): 80.0,
}
"""Requests per second; see `bracket`."""
_CLAIMS = {
    "orca-oracle": Range("1.7-2.7", 1.7, 2.7),
    "orca-max": Range("2.7-8", 2.7, 8.0),
    "static": Range("up to 22", 1.0, 22.0),
}


_NOTES = {
    "opt-175b": "the host's share per sequence, chosen on OPT-13B, weighs more in large batches",
    "static": "few batches fit into a trace: the rate scatters",
}
"""What we take to be the reason where a ratio is not the paper's."""


def job(system: System, shape: str, data: str, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the search for a system's sustained rate."""
    return Job(
        system,
        shape,
        sources.data(data),
        Kind(),
        scale.minutes,
        seed,
        bracket(system, _MOST[shape, data]),
        scale.searches,
        limit_s=scale.limit_s,
    )


def panels(scale: Scale) -> dict[tuple[str, str], tuple[System, ...]]:
    """Returns which systems serve which model and data set."""
    everyone = (*OF_PAPER, STATIC)
    if scale.name == "quick":
        return {("opt-13b", "sharegpt"): (PAPER, ORCA_ORACLE, ORCA_MAX, STATIC)}
    few = everyone if scale.every_system else (PAPER, ORCA_ORACLE, ORCA_MAX)
    return {case: everyone if case[0] == "opt-13b" else few for case in _MOST}


def seeds_of(shape: str, data: str, scale: Scale) -> tuple[int, ...]:
    """Returns the seeds of a panel: more where the paper makes its claim."""
    return scale.seeds if (shape, data) == ("opt-13b", "sharegpt") else scale.few_seeds


def jobs(scale: Scale, sources: Sources) -> list[Job]:
    """Returns all searches."""
    found = [
        job(system, shape, data, scale, sources, seed)
        for (shape, data), systems in panels(scale).items()
        for system in systems
        for seed in seeds_of(shape, data, scale)
    ]
    today = [] if scale.name == "quick" else TODAY
    return found + [
        job(system, "opt-13b", "sharegpt", scale, sources, seed)
        for system in today
        for seed in scale.few_seeds
    ]


def rows(scale: Scale, sources: Sources, curves: Curves) -> list[Row]:
    """Returns the ratios to each baseline, then those of today's features to the paper's system."""
    found = []
    for (shape, data), systems in panels(scale).items():
        seeds = seeds_of(shape, data, scale)
        paged = [job(PAPER, shape, data, scale, sources, seed) for seed in seeds]
        for system in systems:
            claim = _CLAIMS.get(system.name)
            if claim is None:
                continue
            others = [job(system, shape, data, scale, sources, seed) for seed in seeds]
            found.append(
                Row(
                    "12",
                    f"sustained rate / {system.name}, {shape}, {data}",
                    claim if data == "sharegpt" else None,
                    ratios(paged, others, curves),
                    "simulated",
                    others[0].data.source,
                    "x",
                    "; ".join(
                        filter(
                            None,
                            (
                                _NOTES.get(shape) if data == "sharegpt" else None,
                                _NOTES.get(system.name),
                                bounds([*paged, *others], curves),
                            ),
                        )
                    ),
                )
            )
    if scale.name == "quick":
        return found
    seeds = scale.few_seeds
    paged = [job(PAPER, "opt-13b", "sharegpt", scale, sources, seed) for seed in seeds]
    for system in TODAY:
        mine = [job(system, "opt-13b", "sharegpt", scale, sources, seed) for seed in seeds]
        found.append(
            Row(
                "12, today",
                f"sustained rate / paged of the paper: {system.name}",
                None,
                ratios(mine, paged, curves),
                "simulated",
                mine[0].data.source,
                "x",
                bounds([*mine, *paged], curves),
            )
        )
    return found


def draw(scale: Scale, sources: Sources, curves: Curves, picture: "Picture") -> None:
    """Draws a panel for each model and data set, of the first seed."""
    cases = panels(scale)
    axes = picture.subplots(2, 3).ravel() if len(cases) > 1 else [picture.subplots()]
    seed = scale.seeds[0]
    for panel, ((shape, data), systems) in zip(axes, cases.items(), strict=True):
        for system in systems:
            draw_curve(panel, curves[job(system, shape, data, scale, sources, seed)])
        if (shape, data) == ("opt-13b", "sharegpt") and scale.name != "quick":
            for system in TODAY:
                curve = curves[job(system, shape, data, scale, sources, seed)]
                draw_curve(panel, curve, linestyle="--")
        panel.set(title=f"{shape}, {data}: simulated")
        panel.legend(fontsize="x-small")


FIGURE = Figure(("12",), "fig12-rates", jobs, rows, draw, (14, 8))
