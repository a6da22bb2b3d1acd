"""What a figure of the evaluation is, and what several of them need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.paper.claims import Row
from benchmarks.paper.jobs import OVER, Curve, Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.simulation.systems import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

type Curves = Mapping[Job, Curve]

COLORS = {
    "paged": "tab:red",
    "orca-oracle": "tab:green",
    "orca-pow2": "tab:blue",
    "orca-max": "tab:orange",
    "static": "tab:gray",
}


class Figure(NamedTuple):
    """A figure of the paper's, simulated.

    Attributes:
      names: of the paper's figures that it shows.
      file: of the picture, without its ending.
      jobs: what has to be run.
      rows: the summary's, of the curves of those jobs.
      draw: draws the picture.
      size: of the picture, in inches.
    """

    names: tuple[str, ...]
    file: str
    jobs: Callable[[Scale, Sources], list[Job]]
    rows: Callable[[Scale, Sources, Curves], list[Row]]
    draw: "Callable[[Scale, Sources, Curves, Picture], None]"
    size: tuple[float, float] = (9, 4)


def bracket(system: System, most: float) -> tuple[float, float]:
    """Returns between which rates a system's sustained one is searched.

    `most` is more than the paper's paged system sustains. A search that begins closer needs fewer
    runs; one that ends at an edge is told by `bounds`.
    """
    if system.is_static:
        return most / 80, most / 4
    if system.reserve == "max":
        return most / 60, most / 2
    if system.reserve is not None:
        return most / 15, most / 1.25
    return (most / 8, most) if system.is_of_paper else (most / 4, 2 * most)


def ratios(above: Sequence[Job], below: Sequence[Job], curves: Curves) -> tuple[float, ...]:
    """Returns the ratio of two systems' sustained rates for each seed, which has the same trace."""
    pairs = zip(above, below, strict=True)
    return tuple(curves[a].sustained_rate / curves[b].sustained_rate for a, b in pairs)


def bounds(found: Iterable[Job], curves: Curves) -> str:
    """Returns a note if a sustained rate lies beyond the rates that were tried."""
    beyond = {job.system.name for job in found if not curves[job].crosses}
    return f"beyond the rates tried: {', '.join(sorted(beyond))}" if beyond else ""


def draw_curve(axes: "Axes", curve: Curve, label: str | None = None, **style: Any) -> None:
    """Draws normalized latency over rates; a run that was given up leaves the picture."""
    name, top = curve.job.system.name, OVER * curve.job.limit_s
    style = {"color": COLORS.get(name, ""), **style}
    style = {key: value for key, value in style.items() if value}
    axes.plot(
        [point.rate for point in curve.points],
        [
            2 * top if point.outcome.is_over else point.outcome.normalized_latency_s
            for point in curve.points
        ],
        marker=".",
        label=label or name,
        **style,
    )
    axes.set(ylim=(0, top))
    axes.set_xlim(left=0, auto=True)  # later curves may reach further
    axes.set(xlabel="requests/s", ylabel="normalized latency, s/token")
