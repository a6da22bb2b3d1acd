"""The suite for GPUs, as far as a CPU allows: its checks, its processes, its report."""

import json
import pathlib
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from benchmarks.gpu_suite import (
    attention_speed,
    cache_speed,
    executable,
    model_step,
    report,
    shapes,
    supervise,
    torch_peer,
)
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.__main__ import STAGES
from benchmarks.gpu_suite.stage import Case, Context, Stage, run_case
from pallas_paged.ops.attention import arg_specs

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context(on_gpu=False, results=tmp_path)


# --- the stages -----------------------------------------------------------------------------------


def test_the_program_runs_without_a_gpu_and_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", f"--out={tmp_path}"]
    command.append("--budget_scale=4")  # a busy machine's time is not measured here
    done = subprocess.run(
        [*command, "--stages=prefill", "--toy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "suite.json").read_text())
    assert figures["device"]["platform"] == "cpu"
    assert {"jax", "flax"} <= figures["device"]["versions"].keys()
    (row,) = figures["stages"]["prefill"]
    assert (row["status"], row["implementation"]) == ("ok", "xla")
    assert min(row["us"], row["in_order_us"], row["dense_us"], row["xla_us"]) > 0
    assert "matmul_share" not in row  # it would mean nothing
    text = (tmp_path / "suite.txt").read_text()
    assert "NO GPU" in text
    assert "correctness: unmeasured, it was not run" in text

    # Speeds are unmeasured unless toys are asked for; what is done is not done again.
    before = (tmp_path / "device.jsonl").read_text()
    again = subprocess.run(
        [*command, "--stages=model"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert stages.results(tmp_path, "model")["all"]["status"] == "unmeasured"
    assert (tmp_path / "device.jsonl").read_text() == before
    assert "model: 1 unmeasured" in (tmp_path / "suite.txt").read_text()


@pytest.mark.parametrize(
    "case",
    [
        model_step.STAGE.cases(Context(False, ROOT))[0],
        attention_speed.DECODE.cases(Context(False, ROOT))[0],
        *cache_speed.STAGE.cases(Context(False, ROOT))[:4],
        *torch_peer.STAGE.cases(Context(False, ROOT))[:1],
    ],
    ids=lambda case: case.name,
)
def test_cases_of_other_stages_run(case, context):
    row = run_case(case, context)
    assert row["status"] == "ok" or "torch is not installed" in row["reason"], row


def test_torch_is_compared_with_what_earlier_stages_measured(context, monkeypatch):
    decode, prefill = torch_peer.STAGE.cases(context)
    for stage, case, us in (("decode", decode, 2.0), ("prefill", prefill, 5.0)):
        stages.append(context.results, stage, {"case": case.name, "status": "ok", "us": us})
    monkeypatch.setattr(torch_peer, "_torch", lambda context: np)  # it has a version too
    monkeypatch.setattr(torch_peer, "sdpa_us", lambda context, shape: 10.0)
    monkeypatch.setattr(torch_peer, "flex_us", lambda context, shape: None)
    assert [case.run(context)["sdpa/ours"] for case in (decode, prefill)] == [5.0, 2.0]
    assert "flex_paged/ours" not in decode.run(context)


# --- processes ------------------------------------------------------------------------------------


def worker(tmp_path: pathlib.Path, behaviour: str) -> tuple[Stage, list[str]]:
    """Returns a stage of four cases, and a command for a process that runs them like a stage's."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, pathlib, sys, time
            sys.path.insert(0, {str(ROOT)!r})
            from benchmarks.gpu_suite import stage as stages
            folder = pathlib.Path({str(tmp_path)!r})
            for name in "abcd":
                if stages.is_done(stages.results(folder, "fake").get(name)):
                    continue
                stages.append(folder, "fake", {{"case": name, "began": time.time()}})
                {behaviour}
                stages.append(folder, "fake", {{"case": name, "status": "ok"}})
            """)
    )
    cases = [Case(name, lambda context: {}) for name in "abcd"]
    return Stage("fake", 9, 0.5, lambda context: cases, ()), [sys.executable, str(script)]


def statuses(tmp_path: pathlib.Path) -> str:
    results = stages.results(tmp_path, "fake")
    return ", ".join(f"{name} {results[name]['status']}" for name in sorted(results))


def test_a_process_that_dies_takes_one_case_with_it(context, tmp_path):
    stage, command = worker(tmp_path, 'if name == "b": os.abort()')
    supervise.run(stage, context, command, 60)
    assert statuses(tmp_path) == "a ok, b crashed, c ok, d ok"
    assert "exit status" in stages.results(tmp_path, "fake")["b"]["reason"]


def test_what_interprets_kernels_has_enough_threads(context, tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    stage, command = worker(tmp_path, 'print(os.environ.get("NPROC"))')
    supervise.run(stage, context, command, 60)
    assert (tmp_path / "fake.log").read_text().split() == ["16"] * 4


def test_a_case_that_hangs_is_given_up(context, tmp_path):
    stage, command = worker(tmp_path, 'if name == "c": time.sleep(60)')
    begin = time.monotonic()
    supervise.run(stage, context, command, 60)
    assert statuses(tmp_path) == "a ok, b ok, c timed out, d ok"
    assert time.monotonic() - begin < 30


def test_what_time_cuts_off_is_named_and_done_later(context, tmp_path):
    stage, command = worker(tmp_path, 'if name == "b": time.sleep(60)')
    stage = stage._replace(case_limit_s=60)
    supervise.run(stage, context, command, 2)
    assert statuses(tmp_path) == "a ok, b out of time, c out of time, d out of time"
    stage, command = worker(tmp_path, "pass")
    supervise.run(stage, context, command, 60)
    assert statuses(tmp_path) == "a ok, b ok, c ok, d ok"
    assert sum(row["case"] == "a" for row in stages.read(tmp_path, "fake")) == 2  # began, ok


def test_results_of_another_device_are_refused(context, tmp_path):
    stage, _ = worker(tmp_path, "pass")
    command = [sys.executable, "-c", f"import sys; sys.exit({supervise.WRONG_FOLDER})"]
    with pytest.raises(RuntimeError, match="another device or version"):
        supervise.run(stage, context, command, 60)


def test_a_line_that_was_cut_off_is_no_result(tmp_path):
    stages.append(tmp_path, "fake", {"case": "a", "status": "ok"})
    with (tmp_path / "fake.jsonl").open("a") as file:
        file.write('{"case": "b", "sta')
    assert list(stages.results(tmp_path, "fake")) == ["a"]


def test_errors_become_results(context):
    def fail(context):
        raise ValueError("RESOURCE_EXHAUSTED: too large" if context.executable else "wrong")

    row = run_case(Case("a", fail), context)
    assert row["status"] == "failed"
    assert row["reason"] == "ValueError: wrong"
    assert "test_gpu_suite.py" in row["where"]
    assert run_case(Case("a", fail), context._replace(executable="x"))["status"] == "out of memory"
    assert run_case(Case("a", fail, skip=lambda: "too large"), context)["status"] == "skipped"


# --- sizes and the report -------------------------------------------------------------------------


def test_figures_of_a_shape_by_hand():
    shape = shapes.Shape(2, 40, "6/3", 16, queries=4)
    assert shape.blocks_per_seq == 3
    assert shape.kv_bytes == 2 * (2 * 48) * 3 * 128 * 2
    assert shape.moved_bytes == shape.kv_bytes + 2 * (2 * 4) * 6 * 128 * 2
    assert shape.operations == 4 * 6 * 128 * 2 * (37 + 38 + 39 + 40)


def test_grids_are_whole_and_begin_with_the_aims():
    decode, prefill = shapes.decode_shapes(), shapes.prefill_shapes()
    assert len(set(decode)) == len(decode)
    assert decode[:4] == list(shapes.DECODE_AIMS)
    grid = {(s.batch, s.context, s.heads, s.block_size) for s in decode}
    for batch in (1, 8, 32, 64, 256):
        for context in (512, 2048, 8192, 32768):
            for heads in ("32/8", "32/32", "40/40"):
                assert all((batch, context, heads, size) in grid for size in (16, 32, 64))
    assert all(s.queries in (s.context, 512) for s in prefill)
    assert tuple(prefill[:3]) == shapes.PREFILL_AIMS
    assert attention_speed.why_not(Context(False, ROOT), prefill[-1]) is not None


def test_the_report_shows_reasons_once(tmp_path):
    stages.append(
        tmp_path,
        "device",
        {"case": "description", "status": "ok", "device": "X", "platform": "gpu"},
    )
    for name in ("a", "b"):
        row = {"case": name, "status": "ok", "us": 12.345678, "dense_reason": "too large"}
        stages.append(tmp_path, "decode", row)
    text = report.write(tmp_path, STAGES)
    assert "NO GPU" not in text
    assert "decode: 2 ok" in text
    assert "12.35" in text
    assert text.count("too large (2 x, a)") == 1
    assert json.loads((tmp_path / "suite.json").read_text())["stages"]["decode"][1]["case"] == "b"


def test_a_program_made_ahead_is_loaded_and_checked(context, tmp_path, monkeypatch):
    path = tmp_path / "program.bin"
    flags = f"--file={path} --target=cpu --spec=decode --implementation=xla"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite.executable", *flags.split()],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    (case,) = executable.STAGE.cases(context._replace(executable=str(path)))
    row = run_case(case, context)
    assert (row["status"], row["spec"]) == ("ok", "decode"), row
    # Other inputs than it was made for are its result's error.
    spec = executable.specs()["decode"]
    other = arg_specs.build(spec, seed=1)
    monkeypatch.setattr(executable, "_flat", lambda arguments: (flat(other), {}))
    assert run_case(case, context)["status"] == "failed"
    assert executable.STAGE.cases(context) == []


def flat(arguments):
    m = arguments.metadata
    return (*arguments.arrays[:3], m.block_tables, m.seq_lens, m.query_start_loc)


def test_specs_with_arrays_among_their_options_are_refused_ahead():
    with pytest.raises(ValueError, match="specs with alibi_slopes are not for this"):
        executable.build("decode alibi", executable.HOST, "xla")
