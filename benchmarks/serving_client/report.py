"""Tables and a picture of runs against servers: medians over rounds, ratios within them."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import metrics, tables
from benchmarks.metrics import Figures
from benchmarks.serving_client.experiment import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = {
    **metrics.ROWS,
    "total_token_throughput": "all tokens/s",
    "total_input_tokens": "prompt tokens",
    "total_cached_tokens": "of them cached by the server",
    "total_output_tokens": "output tokens",
    "max_concurrent_requests": "most requests at once",
    "mean_late_ms": "sent late mean, ms",
    "max_late_ms": "sent late max, ms",
    "client_cpu_share": "client's share of a core",
    "completed": "completed",
    "failed": "failed",
}
COMPARED = [*metrics.ROWS, "total_token_throughput"]
"""Figures of servers of which ratios say something."""
PANELS = {"ttft": "TTFT, ms", "tpot": "TPOT, ms", "itl": "ITL, ms"}


def line_of(run: Run) -> str:
    """Returns in a line that a run has ended, and below it what there is to remark."""
    figures = run.figures
    head = (
        f"round {run.place.round + 1}, {run.place.rate:g} requests/s, {run.server.label}: "
        f"{figures['completed']} completed, {figures['failed']} failed, {figures['duration']:.1f} s"
    )
    return "\n".join([head, *(f"  {remark}" for remark in run.remarks)])


def render(runs: Sequence[Run]) -> str:
    """Returns a table with a column for each rate; of several servers one table for each rate.

    Figures are medians over the rounds. A ratio is the median of what it is in each round.
    """
    rates = list(dict.fromkeys(run.place.rate for run in runs))
    labels = list(dict.fromkeys(run.server.label for run in runs))
    if len(labels) == 1:
        columns = [medians(_figures(runs, rate, labels[0])) for rate in rates]
        lines: list[list[Any]] = [["requests/s that arrive", *(f"{rate:g}" for rate in rates)]]
        lines += [[name, *(column[key] for column in columns)] for key, name in ROWS.items()]
        return tables.render(lines, left=1)
    return "\n\n".join(_comparison(runs, rate, labels) for rate in rates)


def _comparison(runs: Sequence[Run], rate: float, labels: Sequence[str]) -> str:
    """Returns the table of one rate: servers, and all but the first divided by it."""
    found = [_figures(runs, rate, label) for label in labels]
    columns = [medians(one) for one in found]
    quotients = [ratios(one, found[0]) for one in found[1:]]
    names = [f"{label} / {labels[0]}" for label in labels[1:]]
    lines: list[list[Any]] = [[f"{rate:g} requests/s arrive", *labels, *names]]
    for key, name in ROWS.items():
        lines.append(
            [name, *(column[key] for column in columns), *(one.get(key) for one in quotients)]
        )
    return tables.render(lines, left=1)


def _figures(runs: Sequence[Run], rate: float, label: str) -> list[Figures]:
    """Returns the figures of a server at a rate, one for each round, in the rounds' order."""
    found = [run for run in runs if run.place.rate == rate and run.server.label == label]
    return [run.figures for run in sorted(found, key=lambda run: run.place.round)]


def medians(rounds: Sequence[Figures]) -> Figures:
    """Returns the median of each figure over the rounds that have it, None where none has."""
    found: Figures = {}
    for key in rounds[0]:
        values = [value for one in rounds if (value := one[key]) is not None]
        found[key] = statistics.median(values) if values else None
        if len(set(values)) == 1:
            found[key] = values[0]  # counts, which stay integers
    return found


def ratios(rounds: Sequence[Figures], base: Sequence[Figures]) -> Figures:
    """Returns figures of `COMPARED` divided by those of `base` in the same round: the medians."""
    found: Figures = {}
    for key in COMPARED:
        pairs = [(one[key], other[key]) for one, other in zip(rounds, base, strict=True)]
        values = [above / below for above, below in pairs if above is not None and below]
        found[key] = statistics.median(values) if values else None
    return found


def draw(figure: "Figure", runs: Sequence[Run]) -> None:
    """Draws latencies against finite request rates, mean and P99, a colour for each server."""
    labels = list(dict.fromkeys(run.server.label for run in runs))
    rates = sorted({run.place.rate for run in runs if run.place.rate < float("inf")})
    axes = list(figure.subplots(2, 2).flat)
    for index, label in enumerate(labels):
        points = [medians(_figures(runs, rate, label)) for rate in rates]
        for panel, name in zip(axes, PANELS, strict=False):
            for statistic, style in (("mean", "o-"), ("p99", "s--")):
                values = [_number(point[f"{statistic}_{name}_ms"]) for point in points]
                panel.plot(rates, values, style, color=f"C{index}", label=f"{label}, {statistic}")
        normalized = [_number(point["normalized_latency_s_per_token"]) for point in points]
        axes[3].plot(rates, normalized, "o-", color=f"C{index}", label=f"{label}, mean")
    for panel, title in zip(axes, [*PANELS.values(), "normalized latency, s/token"], strict=True):
        highest = panel.dataLim.y1
        top = 1.05 * highest if 0 < highest < float("inf") else 1.0  # 1 where there is no figure
        panel.set(xlabel="requests/s that arrive", ylabel=title, ylim=(0.0, top))
    axes[0].legend()


def _number(value: float | int | None) -> float:
    """Returns a figure for a picture, which leaves out what is no number."""
    return float("nan") if value is None else value
