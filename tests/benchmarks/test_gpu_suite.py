"""The suite for GPUs, as far as a CPU allows: its checks, its processes, its report."""

import functools
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_suite import (
    correctness,
    report,
    shapes,
    supervise,
    torch_peer,
    triton_paged,
)
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.__main__ import STAGES
from benchmarks.gpu_suite.stage import Case, Context, Stage, run_case
from pallas_paged import KVCache, paged_attention
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
        *torch_peer.STAGE.cases(Context(False, ROOT))[:1],
    ],
    ids=lambda case: case.name,
)
def test_cases_of_other_stages_run(case, context):
    row = run_case(case, context)
    assert row["status"] == "ok" or "torch is not installed" in row["reason"], row


@pytest.fixture
def fake_torch(monkeypatch):
    """Peers of which `name` takes so many microseconds and is so wrong, of those in the dict."""

    def use(peers: dict[str, dict[str, tuple[float, float]]]) -> None:
        def make(name, setting):
            if name not in peers:
                raise NotImplementedError("not for this shape")
            return peers[name]

        names = ("sdpa", "triton_paged")
        monkeypatch.setattr(
            torch_peer, "PEERS", {name: functools.partial(make, name) for name in names}
        )
        monkeypatch.setattr(torch_peer, "Peer", tuple)
        monkeypatch.setattr(torch_peer, "_torch", lambda context: np)  # it has a version too
        monkeypatch.setattr(torch_peer, "relative_error", lambda torch, shape, peer: peer[1])
        monkeypatch.setattr(torch_peer, "graph_us", lambda torch, work, calls: work.args[0][0])

    return use


def test_torch_is_compared_with_what_earlier_stages_measured(context, fake_torch):
    context = context._replace(on_gpu=True)
    fake_torch({"sdpa": {"": (10.0, 0.003)}})
    cases = {case.name: case for case in torch_peer.STAGE.cases(context)}
    for stage, shape, us in (
        ("decode", shapes.DECODE_AIMS[0], 2.0),
        ("prefill", shapes.PREFILL_AIMS[0], 5.0),
    ):
        stages.append(context.results, stage, {"case": shape.name, "status": "ok", "us": us})
        row = cases[shape.name].run(context)
        assert (row["sdpa_us"], row["sdpa_error"], row["sdpa/ours"]) == (10.0, 0.003, 10.0 / us)
        assert row["triton_paged_us"] is None
        assert row["triton_paged_reason"] == "unsupported: not for this shape"
    assert "sdpa/ours" not in cases[shapes.DECODE_AIMS[1].name].run(context)


def test_the_fastest_variant_of_a_peer_counts(context, fake_torch):
    fake_torch({"triton_paged": {"a": (3.0, 0.001), "b": (2.0, 0.002), "c": (4.0, 0.003)}})
    row = torch_peer.run(shapes.DECODE_AIMS[0], context._replace(on_gpu=True))
    assert (row["triton_paged_us"], row["triton_paged_variant"]) == (2.0, "b")
    assert row["triton_paged_error"] == 0.003


@pytest.mark.parametrize("error", [0.02, math.nan])
def test_a_wrong_peer_has_no_time(error, context, fake_torch):
    fake_torch({"sdpa": {"": (1.0, 0.0)}, "triton_paged": {"a": (3.0, 0.001), "b": (2.0, error)}})
    row = torch_peer.run(shapes.DECODE_AIMS[0], context._replace(on_gpu=True))
    assert row["sdpa_us"] == 1.0
    assert row["triton_paged_us"] is None
    assert row["triton_paged_reason"].startswith("wrong: ")
    assert str(row["triton_paged_error"]) == str(error)


def test_torch_is_timed_at_sizes_at_which_we_are():
    ours = {shape.name for shape in (*shapes.decode_shapes(), *shapes.prefill_shapes())}
    assert {shape.name for shape in torch_peer.SHAPES} <= ours
    assert set(shapes.DECODE_AIMS) <= set(torch_peer.SHAPES)
    for shape in torch_peer.SHAPES:
        layers, turns = torch_peer.layers_and_turns(shape)
        assert layers * shape.kv_bytes >= 2 * torch_peer.L2_BYTES
        assert layers * turns <= torch_peer.MAX_GRAPH_CALLS


def test_sequences_are_split_until_each_sm_has_two_programs():
    splits = functools.partial(triton_paged.num_splits, tile=64, num_sms=132)
    assert splits(8, 32768) == 33  # 264 programs
    assert splits(64, 1024) == 4
    assert splits(512, 4096) == 1
    assert splits(8, 100) == 2  # no piece is smaller than a tile
    assert splits(8, 1) == 1


def test_without_torch_peers_are_unsupported(context, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for case in torch_peer.STAGE.cases(context):
        row = run_case(case, context)
        assert (row["status"], row["reason"]) == ("unsupported", "torch is not installed")


def test_xla_passes_the_checks_of_correctness(context):
    cases = [case for case in correctness.STAGE.cases(context) if case.name.startswith("xla: ")]
    assert len(cases) == 5 + 4 * 4
    some = ("mixed", "bfloat16", "write_kv int8", "gather_blocks float8_e4m3fn")
    cases = [case for case in cases if case.name.endswith(some)]
    for case in cases:
        row = run_case(case, context)
        assert row["status"] == "ok", row


def test_a_kernel_that_is_not_there_is_visible(context, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(correctness, "paged_attention", refuse)
    row = run_case(correctness.STAGE.cases(context)[0], context)
    assert (row["status"], row["reason"]) == ("unsupported", "no such kernel")


def test_specs_have_names_of_their_own():
    for specs in (correctness.gpu_specs(), correctness.interpreted_specs()):
        assert len({spec.name for spec in specs}) == len(specs)
    for on_gpu in (False, True):
        names = [case.name for case in correctness.STAGE.cases(Context(on_gpu, ROOT))]
        assert len(set(names)) == len(names)


# --- what the checks catch ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    arguments = arg_specs.build(correctness.interpreted_specs()[1])
    out, lse = paged_attention(
        *arguments.arrays, **arguments.options, return_lse=True, implementation="reference"
    )
    return arguments, out, lse


def test_the_reference_itself_passes(right):
    assert correctness.check_attention(*right)["status"] == "ok"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out, lse: (jnp.zeros_like(out), lse),
        lambda out, lse: (out.at[0, 1, 2].add(0.1), lse),
        lambda out, lse: (out.at[3, 0, 0].set(jnp.nan), lse),
        lambda out, lse: (jnp.flip(out, axis=1), lse),
        lambda out, lse: (out, lse + 0.01),
        lambda out, lse: (out, lse.at[0, 0].set(jnp.nan)),
        lambda out, lse: (out.at[-1].set(1), lse),
        lambda out, lse: (out, lse.at[-1].set(0)),
    ],
    ids=["zeros", "one", "nan", "heads", "lse", "lse-nan", "padding", "lse-padding"],
)
def test_a_wrong_result_fails(right, break_it):
    arguments, out, lse = right
    assert int(arguments.metadata.query_start_loc[-1]) < len(out)
    assert correctness.check_attention(arguments, *break_it(out, lse))["status"] == "failed"


@pytest.mark.parametrize("operation", correctness.BLOCK_OPERATIONS)
def test_a_wrong_block_fails(operation, context, monkeypatch):
    right_way = getattr(correctness, operation)

    def wrong(*args, implementation):
        cache = right_way(*args, implementation="xla")
        if implementation == "reference":
            return cache
        return cache._replace(v=cache.v.at[-1, 0, 0, 0].set(7))

    monkeypatch.setattr(correctness, operation, wrong)
    row = correctness.block_case(operation, "bfloat16", "xla", context)
    assert row["status"] == "failed"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_numbers_may_be_one_step_off_but_few_of_them(dtype):
    def cache(stored):
        scale = jnp.ones((1, 1, 4), jnp.float32)
        return KVCache(stored, stored, scale, scale)

    numbers = np.full((1, 1, 4, 64), 96.0)
    numbers[..., 0] = 127.0
    right, few, many, far = (numbers.copy() for _ in range(4))
    step = 1 if dtype == "int8" else 8
    few[0, 0, 0, 5] += step
    many[..., 5] += step
    far[0, 0, 0, 5] += 24
    statuses = [
        correctness.check_quantised(cache(jnp.asarray(right, dtype)), cache(jnp.asarray(x, dtype)))
        for x in (right, few, many, far)
    ]
    assert [row["status"] for row in statuses] == ["ok", "ok", "failed", "failed"]


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


def test_errors_are_relative_and_nan_is_infinite():
    error = correctness._error(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
    assert error == pytest.approx(1.0)
    assert correctness._error(jnp.array([np.nan]), jnp.array([1.0])) == np.inf
    assert correctness._error(jnp.array([-np.inf]), jnp.array([-np.inf])) == 0
