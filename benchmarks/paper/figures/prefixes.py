"""Figs. 16 and 17: prompts that begin with the same tokens, and prompts of whole conversations."""

import dataclasses
import math
from typing import TYPE_CHECKING

from benchmarks.paper.claims import Range, Row
from benchmarks.paper.figures.figure import Curves, Figure, bounds, bracket, draw_curve, ratios
from benchmarks.paper.jobs import Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.simulation.serve import Kind
from benchmarks.simulation.systems import (
    CACHES,
    OF_PAPER,
    ORCA_ORACLE,
    PAPER,
    PAPER_SHARING,
    TODAY_SHARING,
    WAITS,
    System,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_CLAIMS = {80: Range.about(1.67, "1.67"), 341: Range.about(3.58, "3.58")}
_CHAT = Range.about(2.0, "2")
_MOST = {80: 160.0, 341: 110.0}
_MOST_CHATS = 4.0
"""Requests per second, likewise; see `bracket`."""
_LENGTHS = "lengths of translations are assumed: 32 tokens each way"
_CHATS = "how many rounds a chat has is assumed"
_BURST = 64
"""Requests with one prefix that come at once."""


def prefix_job(system: System, prefix: int, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the search for a system's sustained rate of translations with a common prefix."""
    return Job(
        system,
        "llama-13b",
        sources.data("translation", prefix),
        Kind(),
        min(scale.minutes, max(1.0, scale.minutes / 3)),
        seed,
        bracket(system, _MOST[prefix]),
        scale.searches,
        limit_s=scale.limit_s,
    )


def chat_job(system: System, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the search for a system's sustained rate of chats."""
    return Job(
        system,
        "opt-13b",
        sources.data("chat"),
        Kind(),
        scale.minutes,
        seed,
        bracket(system, _MOST_CHATS),
        scale.searches,
        limit_s=scale.limit_s,
    )


def burst_job(system: System, sources: Sources, seed: int) -> Job:
    """Returns the run of requests with a common prefix that all come at once."""
    data = sources.data("translation", max(_CLAIMS))
    at_once = (math.inf,)
    return Job(system, "llama-13b", data, Kind(), 0.0, seed, at_once, num_requests=_BURST)


def _translators(prefix: int, scale: Scale) -> tuple[System, ...]:
    shows_today = prefix == max(_CLAIMS) and scale.name != "quick"
    return (PAPER_SHARING, ORCA_ORACLE, *(TODAY_SHARING if shows_today else ()))


def _chatters(scale: Scale) -> tuple[System, ...]:
    return (PAPER, ORCA_ORACLE) if scale.name == "quick" else OF_PAPER


def jobs(scale: Scale, sources: Sources) -> list[Job]:
    """Returns all searches."""
    found = [
        prefix_job(system, prefix, scale, sources, seed)
        for prefix in _CLAIMS
        for system in _translators(prefix, scale)
        for seed in scale.few_seeds
    ]
    found += [
        burst_job(system, sources, seed) for system in (CACHES, WAITS) for seed in scale.seeds
    ]
    return found + [
        chat_job(system, scale, sources, seed)
        for system in _chatters(scale)
        for seed in scale.few_seeds
    ]


def rows(scale: Scale, sources: Sources, curves: Curves) -> list[Row]:
    """Returns the gains over Orca (Oracle), and those of today's features."""
    found = []
    seeds = scale.few_seeds
    for prefix, claim in _CLAIMS.items():
        searches = {
            system: [prefix_job(system, prefix, scale, sources, seed) for seed in seeds]
            for system in _translators(prefix, scale)
        }
        shared = searches[PAPER_SHARING]
        row = Row(
            "16",
            f"sustained rate / orca-oracle, prefix of {prefix}",
            claim,
            ratios(shared, searches[ORCA_ORACLE], curves),
            "simulated",
            shared[0].data.source,
            "x",
            "; ".join(filter(None, (_LENGTHS, bounds([*shared, *searches[ORCA_ORACLE]], curves)))),
        )
        found.append(row)
        found += [
            dataclasses.replace(
                row,
                figure="16, today",
                what=f"sustained rate / paged of the paper, prefix of {prefix}: {system.name}",
                paper=None,
                values=ratios(searches[system], shared, curves),
                note=bounds([*searches[system], *shared], curves),
            )
            for system in searches
            if system not in (PAPER_SHARING, ORCA_ORACLE)
        ]
    for system in (CACHES, WAITS):
        runs = [curves[burst_job(system, sources, seed)] for seed in scale.seeds]
        found.append(
            Row(
                "16, today",
                f"prompt tokens found, {_BURST} requests at once: {system.name}",
                None,
                tuple(100 * run.points[0].outcome.cached_share for run in runs),
                "simulated",
                runs[0].job.data.source,
                " %",
            )
        )
    paged = [chat_job(PAPER, scale, sources, seed) for seed in seeds]
    for system in _chatters(scale):
        if system == PAPER:
            continue
        others = [chat_job(system, scale, sources, seed) for seed in seeds]
        found.append(
            Row(
                "17",
                f"sustained rate / {system.name}, chat",
                _CHAT,
                ratios(paged, others, curves),
                "simulated",
                paged[0].data.source,
                "x",
                "; ".join(filter(None, (_CHATS, bounds([*paged, *others], curves)))),
            )
        )
    return found


def draw(scale: Scale, sources: Sources, curves: Curves, picture: "Picture") -> None:
    """Draws a panel for each prefix, and one of chats, of the first seed."""
    panels = picture.subplots(1, 3)
    seed = scale.seeds[0]
    for axes, prefix in zip(panels[:2], _CLAIMS, strict=True):
        for system in _translators(prefix, scale):
            style = "-" if system in (PAPER_SHARING, ORCA_ORACLE) else "--"
            curve = curves[prefix_job(system, prefix, scale, sources, seed)]
            draw_curve(axes, curve, linestyle=style)
        axes.set(title=f"Fig. 16, prefix of {prefix} tokens: simulated")
    for system in _chatters(scale):
        draw_curve(panels[2], curves[chat_job(system, scale, sources, seed)])
    panels[2].set(title="Fig. 17, chat: simulated")
    for axes in panels:
        axes.legend(fontsize="x-small")


FIGURE = Figure(("16", "17"), "fig16-fig17-prefixes", jobs, rows, draw, (14, 4.5))
