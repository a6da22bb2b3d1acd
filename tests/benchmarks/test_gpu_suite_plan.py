"""What the GPU suite runs, for how long, what it reports, and what it leaves for the next run."""

import json
import pathlib
import re
import tarfile

import pytest

from benchmarks.gpu_suite import all_stages, archive, choose, plan, preparation, programs, report
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.choose import Choice
from benchmarks.gpu_suite.stage import Case, Context, Program, Stage


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    (tmp_path / "results" / "now").mkdir(parents=True)
    return Context("cpu", tmp_path / "results" / "now", tmp_path)


def case(name, *needed, **fields):
    wanted = tuple(Program(each, lambda x: x, lambda: ()) for each in needed)
    return Case(name, lambda context: {}, programs=lambda: wanted, **fields)


def stage(name, *names, budget_s=10, **fields):
    cases = [each if isinstance(each, Case) else case(each) for each in names]
    return Stage(name, budget_s, lambda context: cases, ("us",), **fields)


def add(folder, stage, **statuses):
    folder.mkdir(exist_ok=True)
    for name, status in statuses.items():
        stages.append(folder, stage, {"case": name, "status": status})


# --- choosing -------------------------------------------------------------------------------------

STAGES = (stage("device", "d"), stage("one", "a", "b", "c", "d", "e"), stage("two", "a", "b"))


def names(context, **choice):
    last = choose.last_results(context.work / "results", STAGES)
    everything = Choice(**{"stages": ("one", "two"), "last": last} | choice)
    found = choose.chosen(STAGES, context, everything)
    return [f"{name}: {each.name}" for name, cases in found.items() for each in cases]


def test_what_is_missing_is_chosen(context):
    add(context.results, "one", a="ok", b="failed", c="out of time", d="unsupported")
    assert names(context) == ["device: d", "one: c", "one: e", "two: a", "two: b"]
    assert names(context, cases="^two|: e") == ["device: d", "one: e", "two: a", "two: b"]
    assert names(context, stages=("two",)) == ["device: d", "two: a", "two: b"]
    add(context.results, "device", d="ok")
    assert names(context, stages=("two",), cases="b$") == ["two: b"]


def test_what_failed_with_other_sources_is_chosen_from_their_last_results(context):
    before, oldest = context.results.parent / "a-before", context.results.parent / "z-oldest"
    for folder, date in ((before, "2026-11-02"), (oldest, "2026-11-01")):
        folder.mkdir()
        row = {"case": "description", "status": "ok", "date": date}
        stages.append(folder, "device", row)
    add(oldest, "one", a="failed", b="ok", e="crashed")
    add(before, "one", a="ok", b="failed", c="timed out", d="out of memory")
    assert names(context, rerun="failed") == [
        "device: d",
        "one: b",
        "one: c",
        "one: d",
        "one: e",
    ]
    # What has been mended since is not run again.
    stages.append(
        context.results, "device", {"case": "description", "status": "ok", "date": "2026-11-03"}
    )
    add(context.results, "one", b="ok", c="ok", d="ok")
    assert names(context, rerun="failed") == ["device: d", "one: e"]


def test_everything_is_chosen_again(context):
    add(context.results, "device", d="ok")
    add(context.results, "two", a="ok")
    assert names(context, rerun="all", cases="two") == ["device: d", "two: a", "two: b"]


# --- planning -------------------------------------------------------------------------------------


def test_a_stage_leaves_its_time_to_the_next(context):
    three = (stage("x", "a", budget_s=1), stage("y", "a", budget_s=5), stage("z", "a", budget_s=3))
    cases = {each.name: each.cases(context) for each in three if each.name != "y"}
    assert plan.deadlines(three, cases, 100.0) == {"x": 25.0, "z": 100.0}


def test_a_plan_by_hand(context, monkeypatch):
    monkeypatch.setattr(plan, "compile_seconds", lambda: {"p": 30.0, "q": 8.0, "r": 8.0})
    programs.write(programs.path_of("r", context, ".bin"), b"")
    one = stage("one", case("a", "q", run_s=2.0), case("b", "q", "r", run_s=3.0))
    two = stage("two", case("c", "p", prepare=lambda context: None, prepare_s=4.0, run_s=5.0))
    cases = {each.name: each.cases(context) for each in (one, two)}
    first, second = plan.plan((one, two), cases, context, jobs=2, budget_s=100.0)
    start = plan.START_S
    # Two processes: one compiles p, which is long, the other one q; then c is prepared. r is there.
    assert (first.programs, first.ahead_s) == (1, 8.0)
    assert first.begin_s == start
    assert first.end_s == pytest.approx(2 * start + 8 + 2 + 3 + 3 * plan._LOAD_S)
    assert (second.programs, second.ahead_s) == (1, 34.0)
    assert second.end_s == pytest.approx(2 * start + 30 + 5 + 2 * plan._LOAD_S)
    text = plan.table([first, second], 2, 100.0)
    assert "3 cases. 2 programs" in text
    assert f"About {second.end_s:.0f} s of 100 s." in text


def test_where_there_are_many_cores_two_are_left_to_who_runs():
    assert [plan.num_preparing(jobs) for jobs in (1, 2, 4, 8, 16)] == [1, 2, 4, 6, 14]


def test_cores_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(plan, "_CORES_FILE", quota)
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda process: range(12))
    assert plan.num_cores() == 12
    for text, cores in (("max 100000", 12), ("600000 100000", 6), ("50000 100000", 1)):
        quota.write_text(f"{text}\n")
        assert plan.num_cores() == cores
    quota.unlink()
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda process: range(208))
    assert plan.num_cores() == plan.MAX_JOBS


def test_the_ceilings_have_time_though_no_process_has_started(context):
    """Two starts, one after the other, of processes that take three times as long as planned."""
    cases = {each.name: [] for each in all_stages.STAGES if each.name != "rehearsal"}
    limits = plan.deadlines(all_stages.STAGES, cases, 480.0)
    assert limits["device"] > 2 * 3 * plan.START_S


def test_compile_times_are_kept_sorted(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "COMPILE_SECONDS", tmp_path / "table.csv")
    plan.compile_seconds.cache_clear()
    assert plan.compile_seconds() == {}
    plan.write_compile_seconds({"b, c": 2.06, "a": 1.0})
    plan.compile_seconds.cache_clear()
    assert list(plan.compile_seconds().items()) == [("a", 1.0), ("b, c", 2.1)]
    task = preparation.Task("compile", "b, c", "")
    assert plan.estimate_s(task, case("x", "b, c")) == 2.1
    plan.compile_seconds.cache_clear()


# --- the summary ----------------------------------------------------------------------------------


def summary(context, *all_stages):
    return report.summary(context.results, all_stages, "first line", "last line")


def test_the_summary_is_short_whatever_happened_and_keeps_what_matters(context):
    bad = stage("bad", *(f"bad {number}" for number in range(300)))
    good = stage("good", *(f"good {number}" for number in range(300)), aims=2)
    for each in bad.cases(context):
        row = {"case": each.name, "status": "failed", "reason": "because\nof " + "ü" * 500}
        stages.append(context.results, "bad", row)
    for each in good.cases(context):
        stages.append(context.results, "good", {"case": each.name, "status": "ok", "us": 12.3456})
    text = summary(context, bad, good)
    assert 5000 < len(text.encode()) <= report.SUMMARY_BYTES
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("first line", "last line")
    assert re.fullmatch(r"\(\d+ lines more in suite.txt, see results.tar.gz\)", lines[-2])
    assert "bad: 300 failed" in lines
    assert "good: 300 ok" in lines
    assert sum(line.startswith("  bad ") for line in lines) >= 8
    assert "  bad 0: FAILED: because of ü" in text
    assert [line for line in lines if "good 0" in line] == ["  good 0: us 12.35"]
    assert any("good 1:" in line for line in lines)


def test_aims_come_before_what_is_listed_earlier(context):
    many = stage("many", *(f"many {number}" for number in range(600)))
    late = stage("late", "aim", *(f"late {number}" for number in range(9)), aims=1)
    for each in (many, late):
        for one in each.cases(context):
            stages.append(context.results, each.name, {"case": one.name, "status": "ok", "us": 1.5})
    lines = summary(context, many, late).splitlines()
    assert "  aim: us 1.5" in lines
    assert "  many 0: us 1.5" in lines
    assert "  late 8: us 1.5" not in lines


def test_everything_is_in_the_summary_of_little(context):
    one = stage("one", "a", "b", "c", "d")
    stages.append(context.results, "one", {"case": "a", "status": "ok", "us": 1.0, "x": 2})
    stages.append(context.results, "one", {"case": "b", "status": "ok"})
    stages.append(context.results, "one", {"case": "c", "status": "skipped", "reason": "large"})
    stages.append(context.results, "one", {"case": "d", "status": "failed", "us": 7.0})
    assert summary(context, one, stage("two", "a")).splitlines()[-4:] == [
        "one: 2 ok, 1 skipped, 1 failed",
        "  a: us 1",
        "  d: FAILED: us 7",
        "last line",
    ]


def test_the_report_shows_reasons_once(context):
    device, one = stage("device", "description"), stage("one", "a", "b")
    row = {"case": "description", "status": "ok", "device": "X", "platform": "gpu"}
    stages.append(context.results, "device", row)
    for name in ("a", "b"):
        row = {"case": name, "status": "ok", "us": 12.345678, "dense_reason": "too large"}
        stages.append(context.results, "one", row)
    text = report.write(context.results, (device, one))
    assert "NO GPU" not in text
    assert "one: 2 ok" in text
    assert "12.35" in text
    assert text.count("too large (2 x, a)") == 1
    kept = json.loads((context.results / "suite.json").read_text())
    assert kept["stages"]["one"][1]["case"] == "b"


def test_a_line_that_was_cut_off_is_no_result(tmp_path):
    stages.append(tmp_path, "fake", {"case": "a", "status": "ok"})
    with (tmp_path / "fake.jsonl").open("a") as file:
        file.write('{"case": "b", "sta')
    assert list(stages.results(tmp_path, "fake")) == ["a"]


def test_figures_that_json_does_not_know_are_text(tmp_path):
    row = {"case": "a", "status": "failed", "error": float("inf"), "of": {"x": float("nan")}}
    stages.append(tmp_path, "fake", row)
    text = (tmp_path / "fake.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"case": "a", "status": "failed", "error": "inf", "of": {"x": "nan"}}


# --- archives -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [b"[1]", b'"a"', b"{}", b'{"case": "a"}', b'{"case": [], "status": "ok"}', b"\xff"]
)
def test_a_damaged_line_is_no_result(line, tmp_path):
    good = b'{"case": "b", "status": "ok"}'
    (tmp_path / "s.jsonl").write_bytes(b"\n".join([line, good]))
    assert stages.results(tmp_path, "s").keys() == {"b"}


def write_files(work, **sizes):
    for name, size in sizes.items():
        path = work / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))


def names_in(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_an_archive_is_read_back(tmp_path):
    work, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    write_files(
        work,
        results__now__one=10,
        logs__runs=500_000,
        programs__kept=30,
        programs__stale=40,
        autotuned__some=50,
        jax_cache__some=60,
        prepared__large=70,
    )
    assert archive.write(out, work, {"kept"}) == archive.Left(0, 0)
    assert sorted(path.name for path in out.iterdir()) == ["programs-1.tar", "results.tar.gz"]
    archive.read(tmp_path, again)  # it may lie deeper
    found = {
        path.relative_to(again).as_posix(): path.stat().st_size
        for path in again.rglob("*")
        if path.is_file()
    }
    assert found == {
        "results/now/one": 10,
        "logs/runs": 200_000,
        "programs/kept": 30,
        "autotuned/some": 50,
        "jax_cache/some": 60,
    }


def test_archives_are_few_and_small_and_say_what_is_not_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 100_000)
    work, out = tmp_path / "work", tmp_path / "out"
    sizes = {f"programs__{name}": 30_000 for name in "abcdef"}
    write_files(work, jax_cache__first=10_000, jax_cache__huge=200_000, **sizes)
    left = archive.write(out, work, set("abcdef"))
    parts = sorted(out.glob("programs-*.tar"))
    assert len(parts) == archive.MAX_PROGRAM_ARCHIVES
    assert all(path.stat().st_size <= 100_000 for path in parts)
    held = [name for path in parts for name in names_in(path)]
    assert held[0] == "jax_cache/first"
    assert left == archive.Left(8 - len(held), 200_000 + 30_000 * (7 - len(held)))
    # With less to keep no older part stays.
    for path in (work / "programs").iterdir():
        path.unlink()
    archive.write(out, work, set())
    assert [path.name for path in out.glob("programs-*.tar")] == ["programs-1.tar"]


def test_a_folder_without_archives_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.tar\.gz"):
        archive.read(tmp_path, tmp_path / "work")
    (tmp_path / "results.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"results\.tar\.gz cannot be read"):
        archive.read(tmp_path, tmp_path / "work")


def test_an_archive_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / "work"
    write_files(work, **{"results/a/s.jsonl": 100})
    archive.write(out, work, set())
    before = (out / "results.tar.gz").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space left"):
        archive.write(out, work, set())
    assert [path.name for path in out.iterdir()] == ["results.tar.gz"]
    assert (out / "results.tar.gz").read_bytes() == before


def test_an_archive_writes_nowhere_else(tmp_path):
    out, work = tmp_path / "out", tmp_path / "some" / "work"
    out.mkdir()
    work.mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"hostile")
    with tarfile.open(out / "results.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "file", "../escaped")
    with pytest.raises(ValueError, match=r"results\.tar\.gz cannot be read"):
        archive.read(out, work)
    assert not (tmp_path / "some" / "escaped").exists()


def test_archives_fit_what_may_be_carried():
    """At most eight files, each of at most 16 MiB, 64 MiB together with what travels already."""
    assert 2 + archive.MAX_PROGRAM_ARCHIVES <= 8
    assert archive.MAX_FILE_BYTES < 16 << 20
