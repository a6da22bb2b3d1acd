"""Figs. 2 and 13: what the KV cache's slots hold, and how many requests that lets run together."""

from typing import TYPE_CHECKING

from benchmarks.paper.claims import Range, Row
from benchmarks.paper.figures.figure import COLORS, Curves, Figure
from benchmarks.paper.jobs import Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.paper.traces import Data
from benchmarks.simulation.serve import Kind
from benchmarks.simulation.systems import OF_PAPER, System

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_CASES = {"13a": ("sharegpt", 2.0), "13b": ("alpaca", 30.0)}
_SHARES = {"orca-max": 20.4, "orca-pow2": 26.8, "orca-oracle": 38.2, "paged": 96.3}
_BATCHES = {
    "13a": {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "paged": 30.42},
    "13b": {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "paged": 132.44},
}
_POINTS = 5.0
"""Percentage points by which a share may differ."""
_HOST, _LENGTHS = "host and kernels are", "lengths are"
_CHOSEN = {
    ("2", "orca-max"): _LENGTHS,
    ("13a", "paged"): _HOST,
    ("13b", "paged"): _HOST,
    ("13b", "orca-oracle"): _LENGTHS,
}
_FILL_NOTE = "of the slots of allocated blocks"


def job(system: System, name: str, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the run of a system in Fig. 13: everything until the last request has come."""
    data, rate = _CASES[name]
    return Job(
        system,
        "opt-13b",
        sources.data(data),
        Kind(),
        scale.minutes,
        seed,
        (rate,),
        drains=False,
    )


def jobs(scale: Scale, sources: Sources) -> list[Job]:
    """Returns the runs of Fig. 13; Fig. 2 is of the same on ShareGPT."""
    return [
        job(system, name, scale, sources, seed)
        for name in _CASES
        for system in OF_PAPER
        for seed in scale.seeds
    ]


def rows(scale: Scale, sources: Sources, curves: Curves) -> list[Row]:
    """Returns the shares of slots with tokens, then the mean batches."""
    found = []
    for system in reversed(OF_PAPER):
        runs = [curves[job(system, "13a", scale, sources, seed)] for seed in scale.seeds]
        outcomes = [run.points[0].outcome for run in runs]
        tokens = tuple(100 * (o.shares.tokens if o.shares else o.token_share) for o in outcomes)
        paper, name = _SHARES[system.name], system.name
        found.append(
            Row(
                "2",
                f"KV memory with tokens, {name}",
                Range(f"{paper} %", paper - _POINTS, paper + _POINTS),
                tokens,
                "simulated",
                runs[0].job.data.source,
                " %",
                _FILL_NOTE if name == "paged" else "",
                _chosen("2", system, runs[0].job.data),
            )
        )
    for name in _CASES:
        for system in reversed(OF_PAPER):
            runs = [curves[job(system, name, scale, sources, seed)] for seed in scale.seeds]
            paper = _BATCHES[name][system.name]
            found.append(
                Row(
                    name,
                    f"mean batch, {runs[0].job.data.name}, {system.name}",
                    Range.about(paper, f"{paper:.2f}"),
                    tuple(run.points[0].outcome.mean_running for run in runs),
                    "simulated",
                    runs[0].job.data.source,
                    chosen=_chosen(name, system, runs[0].job.data),
                )
            )
    return found


def _chosen(name: str, system: System, data: Data) -> str:
    """Returns what was chosen by this figure; lengths of a file were not."""
    chosen = _CHOSEN.get((name, system.name), "")
    return "" if chosen == _LENGTHS and data.lengths is not None else chosen


def draw(scale: Scale, sources: Sources, curves: Curves, picture: "Picture") -> None:
    """Draws what slots hold, and mean batches, of the first seed."""
    left, *right = picture.subplots(1, 3)
    seed = scale.seeds[0]
    parts = ("tokens", "reserved", "internal", "external")
    colors = ("tab:green", "tab:olive", "tab:orange", "tab:gray")
    for place, system in enumerate(reversed(OF_PAPER)):
        outcome = curves[job(system, "13a", scale, sources, seed)].points[0].outcome
        values: tuple[float, ...] = (outcome.token_share, 0.0, 1 - outcome.token_share, 0.0)
        if outcome.shares is not None:
            values = tuple(outcome.shares)
        bottom = 0.0
        for part, value, color in zip(parts, values, colors, strict=True):
            label = part if not place else None
            left.bar(system.name, 100 * value, bottom=100 * bottom, color=color, label=label)
            bottom += value
    left.set(ylabel="KV slots, %", title="Fig. 2")
    left.legend(fontsize="small")
    for axes, name in zip(right, _CASES, strict=True):
        for system in reversed(OF_PAPER):
            outcome = curves[job(system, name, scale, sources, seed)].points[0].outcome
            axes.bar(system.name, outcome.mean_running, color=COLORS[system.name])
            axes.plot(
                [system.name], [_BATCHES[name][system.name]], "k_", markersize=24, label="paper"
            )
        data, rate = _CASES[name]
        axes.set(title=f"Fig. {name}: {data}, {rate:g} req/s", ylabel="mean batched requests")
    for axes in (left, *right):
        axes.tick_params(axis="x", labelrotation=30)


FIGURE = Figure(("2", "13a", "13b"), "fig02-fig13-memory", jobs, rows, draw, (12, 4))
