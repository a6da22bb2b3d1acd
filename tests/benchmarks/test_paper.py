"""The paper's evaluation: the summary by hand, resuming, and that quick runs show its orders."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import pytest

from benchmarks.paper import jobs, report
from benchmarks.paper.claims import HEAD, Range, Row, half_width
from benchmarks.paper.figures.every import FIGURES, NAMES
from benchmarks.paper.jobs import Curve, Job, Point
from benchmarks.paper.scale import SCALES, Sources
from benchmarks.paper.traces import Data
from benchmarks.simulation.calibration import calibrate, make_llm
from benchmarks.simulation.serve import Kind, Outcome
from benchmarks.simulation.systems import ORCA_ORACLE, PAPER
from pallas_paged.models.demo import DEMO_MODEL
from tests.models.references import DATA
from tests.programs import run_program

JOB = Job(PAPER, "opt-13b", Data("sharegpt"), Kind(), 0.05, 0, (1.0,))
OUTCOME = Outcome(0.1, False, 1.0, 2.0, 3, 4, 5, 0.9, None, 0.0, 0.0)


def row(*values: float, paper: Range | None = None) -> Row:
    return Row("12", "what", paper, values, "simulated", "drawn lengths", "x")


class TestClaims:
    def test_intervals_by_hand(self) -> None:
        """Of 1, 2, 3: the deviation is 1, and t with two degrees of freedom is 4.303."""
        assert half_width((1.0, 2.0, 3.0)) == pytest.approx(4.303 / 3**0.5)
        assert half_width((1.0,)) is None
        assert row(1.0, 2.0, 3.0).ours == "2.00 ± 2.48x"
        assert row(12.345).ours == "12.3x"

    @pytest.mark.parametrize(
        ("value", "verdict"),
        [(1.7, "in range"), (2.7, "in range"), (1.53, "10% below"), (3.24, "20% above")],
    )
    def test_verdicts(self, value: float, verdict: str) -> None:
        assert row(value, paper=Range("1.7-2.7", 1.7, 2.7)).verdict == verdict

    def test_verdicts_on_single_figures_are_by_these(self) -> None:
        batch = Range.about(30.42, "30.42")
        assert row(21.0, paper=batch).verdict == "31% below"
        assert row(28.0, paper=batch).verdict == "in range, 8% below"
        assert row(0.9, paper=Range.order("above 1")).verdict == "order does not hold"
        assert row(1.1, paper=Range.order("above 1")).verdict == "order holds"

    def test_what_nobody_measured_says_so(self) -> None:
        unmeasured = dataclasses.replace(row(paper=Range.about(1.2, "1.2")), how="unmeasured")
        assert (unmeasured.ours, unmeasured.verdict, unmeasured.agrees) == ("-", "unmeasured", None)
        assert len(unmeasured.cells()) == len(HEAD)

    def test_the_report_counts(self, tmp_path: pathlib.Path) -> None:
        rows = [
            row(2.0, paper=Range("1.7-2.7", 1.7, 2.7)),
            row(9.0, paper=Range("1.7-2.7", 1.7, 2.7)),
            row(1.0),
            dataclasses.replace(row(), how="unmeasured"),
            row(1.1, paper=Range.order("above 1")),
            dataclasses.replace(row(2.0, paper=Range.about(2.0, "2")), chosen="all is"),
        ]
        text = report.write(tmp_path, rows, SCALES["quick"], "head")
        assert "1 of 2 figures are in the paper's range, 1 of 1 orders hold; by 1 figures" in text
        assert "1 unmeasured; 1 rows have no" in text
        assert (tmp_path / "summary.txt").read_text() == text
        assert (tmp_path / "summary.md").read_text().count("\n|") == 2 + 4  # those of the paper's
        saved = json.loads((tmp_path / "summary.json").read_text())
        assert [one["mean"] for one in saved["rows"]] == [2.0, 9.0, 1.0, None, 1.1, 2.0]
        assert "Infinity" not in (tmp_path / "summary.json").read_text()


def curve(*latencies: tuple[float, float]) -> Curve:
    points = [
        Point(rate, OUTCOME._replace(normalized_latency_s=latency)) for rate, latency in latencies
    ]
    return Curve(JOB, tuple(points))


class TestSustainedRates:
    def test_between_two_rates(self) -> None:
        """The limit is 0.5: half way from 0.25 to 1 by logarithms, and so half way from 2 to 8."""
        assert curve((1, 0.1), (2, 0.25), (8, 1.0)).sustained_rate == pytest.approx(4.0)

    def test_beyond_what_was_run(self) -> None:
        assert curve((1, 0.1), (2, 0.2)).sustained_rate == 2
        assert curve((1, 0.9), (2, 2.0)).sustained_rate == 1
        assert not curve((1, 0.1), (2, 0.2)).crosses
        assert not curve((1, 0.9), (2, 2.0)).crosses
        assert curve((1, 0.1), (2, 2.0)).crosses

    def test_a_run_that_was_given_up_says_no_more_than_above(self) -> None:
        found = curve((1, 0.1), (4, 0.6))
        given_up = found.points[1].outcome._replace(is_over=True)
        found = Curve(JOB, (found.points[0], Point(4, given_up)))
        assert found.sustained_rate == 2.0

    def test_a_search_closes_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system whose latency is its rate squared has 0.5 at 0.707."""
        tried = []

        def run_at(job: Job, rate: float) -> Point:
            tried.append(rate)
            return Point(rate, OUTCOME._replace(normalized_latency_s=rate**2))

        monkeypatch.setattr(jobs, "run_at", run_at)
        job = dataclasses.replace(JOB, rates=(0.1, 10.0), searches=6)
        found = jobs.run(job)
        assert len(tried) == 6
        assert tried[0] == pytest.approx(1.0)
        assert found.sustained_rate == pytest.approx(0.5**0.5, rel=1e-3)
        assert [point.rate for point in found.points] == sorted(tried)


class TestResuming:
    def test_only_what_is_missing_is_run(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = JOB, dataclasses.replace(JOB, system=ORCA_ORACLE)
        before = jobs.run_all([first], tmp_path, 1)
        path = tmp_path / "curves.jsonl"
        with path.open("a") as file:
            file.write('{"code": "cut off')  # the run was ended in the middle of a line
        ran: list[Job] = []

        def run(job: Job) -> Curve:
            ran.append(job)
            return Curve(job, (Point(1.0, OUTCOME),))

        monkeypatch.setattr(jobs, "run", run)
        after = jobs.run_all([first, second], tmp_path, 1)
        assert ran == [second]
        assert after[first] == before[first]
        ran.clear()
        assert jobs.run_all([first, second], tmp_path, 1) == after
        assert not ran

    def test_other_sources_make_other_curves(
        self,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(jobs, "run", lambda job: Curve(job, (Point(1.0, OUTCOME),)))
        jobs.run_all([JOB], tmp_path, 1)
        monkeypatch.setattr(jobs, "sources_hash", lambda: "other")
        jobs.run_all([JOB], tmp_path, 1)
        assert "1 curves are of other sources, and are run again" in capsys.readouterr().err
        assert len((tmp_path / "curves.jsonl").read_text().splitlines()) == 2

    def test_keys_tell_jobs_apart(self) -> None:
        every = [
            job
            for scale in SCALES.values()
            for figure in FIGURES
            for job in figure.jobs(scale, Sources())
        ]
        assert len({job.key for job in every}) == len(set(every))
        assert all(math.isfinite(job.minutes) for job in every)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=DIR"], "choose one of --quick, --all and --full"),
        (["--quick", "--all", "--out=DIR"], "choose one of --quick, --all and --full"),
        (["--quick"], "--out=DIR is missing"),
        (["--quick", "--out=DIR", "--figures=3"], "figures=3: choose among 12"),
        (["--quick", "--out=DIR", "--sharegpt=x.json"], "--sharegpt=x.json needs --tokenizer"),
        (["--quick", "--out=DIR", "--tokenizer=y"], "give one"),
        (["--quick", "--out=DIR", "--alpaca=x.json", f"--tokenizer={DEMO_MODEL}"], "x.json"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str, tmp_path: pathlib.Path) -> None:
    done = run_program("benchmarks.paper", *(flag.replace("DIR", str(tmp_path)) for flag in flags))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error:")
    assert message in done.stderr


def quick(folder: pathlib.Path, *flags: str) -> dict[str, Any]:
    done = run_program("benchmarks.paper", "--quick", f"--out={folder}", *flags)
    assert done.returncode == 0, done.stderr
    (summary,) = folder.glob("summary*.json")
    rows = json.loads(summary.read_text())["rows"]
    return {f"{one['figure']}: {one['what']}": one["mean"] for one in rows}


def check_orders(found: dict[str, Any], *figures: str) -> None:
    """Asserts the orders that the paper claims in these figures of a quick run."""

    def values(*starts: str) -> list[float]:
        return [
            next(value for name, value in found.items() if name.startswith(start))
            for start in starts
        ]

    memories = ("orca-max", "orca-pow2", "orca-oracle", "paged")
    for figure, what in (("2", "KV memory with tokens"), ("13a", "mean batch, sharegpt")):
        if figure in figures:
            ordered = values(*(f"{figure}: {what}, {name}" for name in memories))
            assert ordered == sorted(ordered), figure
    if "12" in figures:
        rate = "12: sustained rate / "
        oracle, most, static = values(rate + "orca-oracle", rate + "orca-max", rate + "static")
        assert 1.2 < oracle < most < static
    if "16" in figures:
        gain = "16: sustained rate / orca-oracle, prefix of "
        short, long = values(f"{gain}80", f"{gain}341")
        assert 1.2 < short < long
        burst = "16, today: prompt tokens found, 64 requests at once: "
        plain, waits = values(f"{burst}+ prefix", f"{burst}+ waiting")
        assert plain < waits


@pytest.mark.slow
def test_a_quick_run_shows_the_papers_orders(tmp_path: pathlib.Path) -> None:
    found = quick(tmp_path, "--nomeasure")
    check_orders(found, "2", "12", "13a", "16")
    gain = "14: sustained rate / orca-oracle, alpaca, "
    one, beams = found[f"{gain}one sample"], found[f"{gain}6 beams"]
    assert beams > one
    batches = [found[f"13b: mean batch, alpaca, {name}"] for name in ("orca-oracle", "paged")]
    assert batches == sorted(batches)
    assert found["17: sustained rate / orca-oracle, chat"] > 1.2
    assert found["18b: latency / blocks of 16, alpaca, blocks of 256"] > 1
    assert found["15: blocks saved, alpaca, 6 beams"] > 30
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {figure.file for figure in FIGURES}


@pytest.mark.slow
def test_another_seed_keeps_the_orders(tmp_path: pathlib.Path) -> None:
    found = quick(tmp_path, "--nomeasure", "--seed=1", "--figures=2,12,13a,16")
    check_orders(found, "2", "12", "13a", "16")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report(tmp_path: pathlib.Path) -> None:
    flags = ("--figures=13a,15", "--nomeasure")
    first = quick(tmp_path / "1", *flags, "--jobs=2")
    assert quick(tmp_path / "2", *flags, "--jobs=1") == first
    assert len(first) > 5


@pytest.mark.slow
def test_an_hour_is_simulated_in_two_minutes() -> None:
    """Of the paper's heaviest point, Alpaca at 30 requests/s: a minute, at half of that speed."""
    job = Job(PAPER, "opt-13b", Data("alpaca"), Kind(), 1.0, 0, (30.0,), drains=False)
    (point,) = jobs.run(job).points
    assert point.outcome.mean_running > 50
    assert point.cpu_s < 4


@pytest.mark.slow
def test_what_is_measured(tmp_path: pathlib.Path) -> None:
    """Which rows there are; their values are this machine's."""
    found = quick(tmp_path, "--figures=15,18a,19,cost")
    assert {name.split(":")[0] for name in found} == {"15", "18a", "19", "cost"}
    assert all(value > 0 for name, value in found.items() if "GPU" not in name)
    assert found["18a: kernel's time on a GPU / contiguous"] is None


@pytest.mark.slow
def test_the_cost_model_is_near_a_real_engine() -> None:
    """While others use the machine, one run is slower than another: the nearest of a few counts.

    Loose bounds, that wrong terms are outside of each time.
    """
    llm = make_llm(str(DATA / "llama-mqa-linear"))
    found = []
    for seed in range(6):
        found.append(calibrate(llm, 16, seed))
        if found[-1].step_error < 0.4 and 0.6 < found[-1].run_ratio < 1.6:
            return
    raise AssertionError(f"the errors are {[(one.step_error, one.run_ratio) for one in found]}")


def test_every_figure_of_the_papers_table_has_a_program() -> None:
    assert {"2", "12", "13a", "13b", "14", "15", "16", "17", "18a", "18b", "19"} <= set(NAMES)


def test_the_readme_shows_what_the_program_wrote() -> None:
    root = pathlib.Path(__file__).parents[2]
    results = root / "benchmarks/results/paper"
    written = [
        line for line in (results / "summary.md").read_text().splitlines() if line[:1] == "|"
    ]
    readme = (root / "README.md").read_text()
    section = readme.split("### The paper's evaluation")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line[:1] == "|"] == written
    assert len(written) > 20
    pictures = re.findall(r"\(benchmarks/results/paper/([^)]*\.png)\)", section)
    assert len(pictures) == 3
    assert all((results / name).exists() for name in pictures)
