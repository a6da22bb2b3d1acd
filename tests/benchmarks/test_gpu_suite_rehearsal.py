"""Every stage of the GPU suite on a CPU, and again from what that run left; a few cases of each."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import pytest

from benchmarks.gpu_suite import archive, plan, programs, rehearsal, report
from benchmarks.gpu_suite.all_stages import STAGES
from benchmarks.gpu_suite.stage import BROKEN, Context, append
from tests.programs import run_program

ROOT = pathlib.Path(__file__).parent.parent.parent
TOYS = (
    "^((device|rehearsal|model|decode|prefill|cache): |hints: memcheck|tuning: decode|torch: 2|"
    "correctness: mosaic_gpu: (write_kv int8|gather_blocks int8)|"
    "more_correctness: xla: (decode|float8|one token|copy_blocks|write_kv b))"
)
"""A few of each stage: what the others compute, the tests of stages and kernels look at."""
CARRIED = "^(rehearsal: works|more_correctness: xla: [cd])"
BUDGET_S, LIMIT_S = 480, 240
"""Tests beside it may take most of the cores: alone it takes a third of the limit."""
H100 = Context("sm_90", pathlib.Path("/nonexistent"), pathlib.Path("/nonexistent"))


class Run(NamedTuple):
    status: int
    output: str
    errors: str
    seconds: float


# Each program runs often, which is worth LLVM's time, see tests/conftest.py.
_FLAGS = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")


def suite(*options: str, module: str = "benchmarks.gpu_suite") -> Run:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=ROOT,
        env=dict(os.environ) | {"XLA_FLAGS": _FLAGS},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)


def results(folder: pathlib.Path) -> dict[str, dict[str, dict]]:
    """Returns the results of one run by stage and case, from its archive."""
    with tarfile.open(folder / "results.tar.gz") as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("/suite.json"))
        file = archive.extractfile(name)
        assert file is not None
        found = json.load(file)
    return {stage: {row["case"]: row for row in rows} for stage, rows in found["stages"].items()}


def lines(folder: pathlib.Path, stage: str, name: str) -> int:
    """Returns how many results a case has had in all runs."""
    with tarfile.open(folder / "results.tar.gz") as archive:
        (path,) = (path for path in archive.getnames() if path.endswith(f"/{stage}.jsonl"))
        file = archive.extractfile(path)
        assert file is not None
        return sum(json.loads(line)["case"] == name for line in file)


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("carried")
    options = ["--target=cpu", f"--out={folder}", f"--cases={CARRIED}"]
    done = suite(*options, module="benchmarks.gpu_suite.carry")
    assert done.status == 0, done.errors
    assert "0 failed" in done.output
    return folder


@pytest.fixture(scope="module")
def first(carried, tmp_path_factory) -> tuple[pathlib.Path, Run]:
    out = tmp_path_factory.mktemp("out")
    return out, suite(
        f"--out={out}",
        "--toy",
        f"--cases={TOYS}",
        f"--programs={carried}",
        f"--budget_s={BUDGET_S}",
    )


@pytest.mark.slow
def test_every_stage_runs_and_what_goes_wrong_costs_one_case(first):
    out, done = first
    assert done.status == 0, done.output + done.errors
    found = results(out)
    assert {stage.name for stage in STAGES} == found.keys()
    for stage, rows in found.items():
        assert rows, stage
        for row in rows.values():
            if stage == "rehearsal":
                assert row["status"] == rehearsal.EXPECTED[row["case"]], row
            else:
                assert row["status"] in ("ok", "unsupported", "skipped"), (stage, row)
    assert found["rehearsal"].keys() == rehearsal.EXPECTED.keys()
    assert {row["status"] for row in found["correctness"].values()} == {"ok"}
    assert min(row["ahead_s"] for row in found["model"].values()) > 0
    assert {"hangs", "crashes", "fails"} <= found["rehearsal"].keys()


@pytest.mark.slow
def test_it_takes_half_of_its_budget_at_most(first):
    _, done = first
    pattern = rf"^GPU suite, (\d+) s of {BUDGET_S} s$"
    (seconds,) = re.findall(pattern, done.output, re.MULTILINE)
    assert int(seconds) <= LIMIT_S


@pytest.mark.slow
def test_few_files_are_left_and_the_summary_is_printed_last(first):
    out, done = first
    assert sorted(path.name for path in out.iterdir()) == [
        "programs-1.tar",
        "results.tar.gz",
        "summary.txt",
    ]
    summary = (out / "summary.txt").read_text()
    assert len(summary.encode()) <= report.SUMMARY_BYTES
    assert "NO GPU" in summary
    assert done.output.rstrip().endswith(f"{summary}\n{out}")
    # Every stage says when it ended.
    for stage in STAGES:
        assert re.search(rf"^{stage.name}: done at \d+ s$", done.output, re.MULTILINE), stage.name


@pytest.mark.slow
def test_programs_made_elsewhere_are_loaded(first, carried):
    out, _ = first
    found = results(out)
    assert found["rehearsal"]["works"]["program"] == "carried"
    of_xla = {
        name: row["program"] for name, row in found["more_correctness"].items() if "program" in row
    }
    wanted = {"xla: decode", "xla: copy_blocks bfloat16", "xla: copy_blocks int8"}
    assert wanted <= {name for name, source in of_xla.items() if source == "carried"}
    assert set(of_xla.values()) == {"carried", "compiled"}
    # They are not archived again, what was compiled in the run is.
    with tarfile.open(out / "programs-1.tar") as archive:
        names = {pathlib.Path(name).name for name in archive.getnames()}
    assert not names & {path.name for path in carried.iterdir()}
    assert any(name.endswith(".bin") for name in names)


@pytest.mark.slow
def test_the_next_run_begins_with_this_one(first, tmp_path):
    out, _ = first
    before = results(out)
    toys = "--toy", f"--cases={TOYS}"
    again = suite(f"--out={tmp_path}", *toys, f"--previous={out}", "--rerun=failed")
    assert again.status == 0, again.output + again.errors
    after = results(tmp_path)
    for stage, rows in before.items():
        for name, row in rows.items():
            is_run = row["status"] in BROKEN
            assert is_run or after[stage][name] == row, (stage, name)
            assert lines(tmp_path, stage, name) == 1 + is_run, (stage, name)
    assert after["rehearsal"]["crashes"]["status"] == "crashed"
    # And with nothing left to do there is nothing to wait for.
    idle = suite(f"--out={tmp_path}", *toys, f"--previous={tmp_path}")
    assert idle.status == 0, idle.output + idle.errors
    assert results(tmp_path) == after


@pytest.mark.slow
def test_programs_that_cannot_be_loaded_are_not_used(tmp_path):
    made, out = tmp_path / "made", tmp_path / "out"
    made.mkdir()
    name = programs.file_name(rehearsal.DOUBLE.name, programs.version("cpu"))
    (made / f"{name}.bin").write_bytes(b"damaged")
    options = [f"--out={out}", f"--programs={made}", "--toy", "--stages=device"]
    done = suite(*options, "--cases=rehearsal: works")
    assert done.status == 0, done.output + done.errors
    assert "(--programs are not used: UnpicklingError" in (out / "summary.txt").read_text()
    assert results(out)["rehearsal"]["works"]["program"] == "compiled"


@pytest.mark.slow
def test_without_toys_speeds_are_unmeasured(tmp_path):
    done = suite(f"--out={tmp_path}", "--stages=decode,model", "--cases=^(decode|model): ")
    assert done.status == 0, done.errors
    found = results(tmp_path)
    for stage in ("decode", "model"):
        assert found[stage]["all"]["reason"] == "there is no GPU"
    assert not found["correctness"]
    assert not found["rehearsal"]


def planned(*options: str) -> tuple[dict[str, int], int]:
    """Returns how many cases of each stage a plan for 16 cores has, and its seconds."""
    done = run_program("benchmarks.gpu_suite", "--dry_run", "--jobs=16", *options)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(\d+) +\d+ .*$", done.stdout, re.MULTILINE)
    (seconds,) = re.findall(r"^About (\d+) s of \d+ s\.$", done.stdout, re.MULTILINE)
    return {name: int(count) for name, count in rows}, int(seconds)


def test_the_plan_for_an_h100_fits_the_budget():
    cases, seconds = planned()
    there = {stage.name: len(stage.cases(H100)) for stage in STAGES}
    assert there.pop("rehearsal") == 0
    assert cases == there
    assert seconds <= 480


def test_every_program_has_a_measured_compile_time():
    """But for cuDNN's: it is compiled where its library is."""
    known = plan.compile_seconds()
    names = {p.name for s in STAGES for case in s.cases(H100) for p in case.programs()}
    assert {name for name in names - known.keys() if "cudnn" not in name} == set()
    assert known.keys() <= names


def test_what_failed_is_run_again_in_what_is_left(tmp_path):
    """The second call on the same machine: if every eighth case went wrong, in 200 s."""
    folder = tmp_path / "work" / "results" / "first"
    folder.mkdir(parents=True)
    expected = {}
    for stage in STAGES:
        cases = stage.cases(H100)
        for number, case in enumerate(cases):
            status = "ok" if number % 8 else "failed"
            append(folder, stage.name, {"case": case.name, "status": status})
        if cases:
            expected[stage.name] = -(-len(cases) // 8)
    archive.write(tmp_path / "out", tmp_path / "work", set())
    options = ["--rerun=failed", f"--previous={tmp_path / 'out'}", "--budget_s=200"]
    cases, seconds = planned(*options)
    expected["device"] = len(STAGES[0].cases(H100))
    assert cases == expected
    assert seconds <= 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--out=DIR is needed, or --dry_run"),
        (("--dry_run", "--stages=decoding"), "must be a list of device, "),
        (("--dry_run", "--stages="), "must be a list of device, "),
        (("--dry_run", "--cases=("), "must be a regular expression"),
        (("--dry_run", "--cases=nothing of the kind"), "matches no case, as 'hints: "),
        (("--dry_run", "--rerun=failed"), "--rerun=failed needs --previous=DIR"),
        ((f"--out={__file__}",), "is a file; it must be a folder"),
        (("--dry_run", "--previous=/nonexistent"), "holds no results.tar.gz"),
        (("--dry_run", "--programs=/nonexistent"), "there is no folder /nonexistent"),
        (("--dry_run", "--rerun=some"), "should be one of <missing|failed|all>"),
        (("--dry_run", "--budget_s=0"), "budget_s"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(options, message):
    done = run_program("benchmarks.gpu_suite", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_results_are_not_replaced_by_a_run_that_does_not_begin_with_them(tmp_path):
    (tmp_path / "results.tar.gz").write_bytes(b"of an hour on a GPU")
    done = suite(f"--out={tmp_path}")
    assert done.status == 2
    assert f"go on from them with --previous={tmp_path}" in done.errors
    assert (tmp_path / "results.tar.gz").read_bytes() == b"of an hour on a GPU"


@pytest.mark.slow
def test_a_run_that_is_terminated_keeps_what_it_found_and_leaves_nothing(tmp_path):
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    options = [f"--out={out}", "--toy", "--stages=device", "--cases=rehearsal: (works|hangs)"]
    running = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_suite", *options],
        cwd=ROOT,
        env=dict(os.environ) | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    while not (line := running.stdout.readline()).startswith("device: done"):
        assert line, running.communicate()
    running.terminate()
    _, errors = running.communicate(timeout=60)
    said = f"error: interrupted; what was found is in {out}\n"
    assert (running.returncode, errors) == (130, said)
    assert "interrupted after" in (out / "summary.txt").read_text()
    found = results(out)
    assert found["device"]["copy bandwidth"]["status"] == "ok"
    assert "crashed" not in {row["status"] for row in found["rehearsal"].values()}
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_programs_of_other_sources_are_deleted_from_the_folder(carried):
    version = programs.version("cpu")
    works = carried / f"{programs.file_name(rehearsal.DOUBLE.name, version)}.bin"
    assert works.exists()
    stale = carried / "stale.bin"
    stale.write_bytes(b"")
    options = ["--target=cpu", f"--out={carried}", f"--cases={CARRIED}"]
    done = suite(*options, module="benchmarks.gpu_suite.carry")
    assert done.status == 0, done.errors
    assert not stale.exists()
    count = len(list(carried.glob("*.bin")))
    assert f"{count} of {count} programs are there" in done.output
    # Those of other cases stay.
    options[-1] = "--cases=^rehearsal: works"
    done = suite(*options, module="benchmarks.gpu_suite.carry")
    assert "1 of 1 programs are there" in done.output
    assert len(list(carried.glob("*.bin"))) == count
