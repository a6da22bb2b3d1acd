"""Tables and pictures of runs: medians over rounds, ratios within them."""

import math

import pytest

from benchmarks import pictures
from benchmarks.metrics import Figures
from benchmarks.serving_client import report
from benchmarks.serving_client.course import Course, summarize
from benchmarks.serving_client.experiment import Place, Run
from benchmarks.serving_client.servers import Server

EMPTY = summarize([Course(0.0, 0.0, 1.0, problem="no")], 0.0, {})


def run_of(label: str, round_: int, rate: float, **figures: float | None) -> Run:
    return Run(Place(round_, rate, 0), Server(label, "http://a"), EMPTY | figures, [])


def cells(table: str, row: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(row))
    return line.removeprefix(row).split()


def test_medians_leave_out_what_was_not_measured() -> None:
    rounds: list[Figures] = [{"a": 3.0, "b": None}, {"a": None, "b": None}, {"a": 1.0, "b": None}]
    assert report.medians(rounds) == {"a": 2.0, "b": None}


def test_ratios_are_of_the_same_round() -> None:
    mine = [EMPTY | {"mean_ttft_ms": value} for value in (10.0, 40.0, 90.0)]
    other = [EMPTY | {"mean_ttft_ms": value} for value in (5.0, 10.0, 100.0)]
    found = report.ratios(mine, other)
    assert found["mean_ttft_ms"] == 2.0  # of 2, 4 and 0.9; medians would be 4 apart
    assert found["mean_itl_ms"] is None
    assert "failed" not in found
    assert report.ratios([{**EMPTY, "duration": 1.0}], [{**EMPTY, "duration": 0.0}])[
        "duration"
    ] is None  # fmt: skip


def test_one_server_has_a_column_for_each_rate() -> None:
    runs = [
        run_of("a", round_, rate, mean_ttft_ms=rate * (round_ + 1))
        for round_ in range(3)
        for rate in (2.0, 8.0)
    ]
    table = report.render([*runs, run_of("a", 0, math.inf)])
    assert cells(table, "requests/s that arrive") == ["2", "8", "inf"]
    assert cells(table, "TTFT mean, ms") == ["4.000", "16.000", "-"]
    assert cells(table, "failed") == ["1", "1", "1"]


def test_servers_have_a_table_for_each_rate() -> None:
    runs = [
        run_of("a", 0, 2.0, p99_itl_ms=10.0),
        run_of("b", 0, 2.0, p99_itl_ms=15.0),
        run_of("b", 1, 2.0, p99_itl_ms=30.0),  # the opposite order
        run_of("a", 1, 2.0, p99_itl_ms=12.0),
        *(run_of(label, round_, 4.0, p99_itl_ms=1.0) for label in "ab" for round_ in range(2)),
    ]
    first, second = report.render(runs).split("\n\n")
    assert cells(first, "2 requests/s arrive") == ["a", "b", "b", "/", "a"]
    assert cells(first, "ITL p99, ms") == ["11.000", "22.500", "2.000"]
    assert cells(first, "completed") == ["0", "0", "-"]
    assert cells(second, "4 requests/s arrive")[:2] == ["a", "b"]
    assert cells(second, "ITL p99, ms") == ["1.000", "1.000", "1.000"]


def test_a_run_is_told_in_a_line_with_its_remarks() -> None:
    run = run_of("a", 1, math.inf, duration=2.25)._replace(remarks=["one", "two"])
    assert report.line_of(run) == (
        "round 2, inf requests/s, a: 0 completed, 1 failed, 2.2 s\n  one\n  two"
    )


def test_every_latency_of_every_server_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    figure = pictures.new_figure(10, 8)
    runs = [
        run_of(label, 0, rate, mean_ttft_ms=rate, p99_ttft_ms=2 * rate if rate < 4 else None)
        for label in "ab"
        for rate in (4.0, 1.0, math.inf)
    ]
    report.draw(figure, runs)
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 4, 2]
    mean, p99 = figure.axes[0].lines[:2]
    assert (mean.get_label(), p99.get_label()) == ("a, mean", "a, p99")
    assert list(mean.get_xdata()) == [1.0, 4.0]
    assert list(mean.get_ydata()) == [1.0, 4.0]
    assert figure.axes[0].get_ylim() == (0.0, 1.05 * 4.0)
    assert figure.axes[1].get_ylim() == (0.0, 1.0)
    assert p99.get_ydata()[0] == 2.0
    assert math.isnan(p99.get_ydata()[1])
    assert [axes.get_ylabel()[:4] for axes in figure.axes] == ["TTFT", "TPOT", "ITL,", "norm"]
