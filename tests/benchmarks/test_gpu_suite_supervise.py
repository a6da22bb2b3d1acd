"""Who prepares and runs the GPU suite's cases, and what becomes of cases that go wrong."""

import json
import os
import pathlib
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest

from benchmarks import interrupts
from benchmarks.gpu_suite import conduct, preparation, programs, rehearsal, supervise
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.preparation import Preparation, Task, in_order, tasks_of
from benchmarks.gpu_suite.stage import Case, Context, Program, Stage
from benchmarks.gpu_suite.supervise import Worker
from benchmarks.gpu_suite.worker import as_line

FAR = 60.0


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    (tmp_path / "results").mkdir()
    return Context("cpu", tmp_path / "results", tmp_path)


class FakeWorker:
    """Answers at once what `answers` says, and keeps what it was asked."""

    def __init__(self, asked, answers, environment):
        self.asked, self.answers, self.environment = asked, answers, environment
        self.is_stopped = False

    def ask(self, message, limit_s, deadline):
        self.asked.append((message["do"], message["name"], self.environment))
        self.limit_s = limit_s
        answer = self.answers.get(message["name"], {"status": "ok"})
        return answer() if callable(answer) else answer

    def kill(self):
        self.is_stopped = True

    stop = kill


class Fakes:
    def __init__(self, **answers):
        self.asked, self.answers, self.workers = [], answers, []

    def __call__(self, name, environment):
        self.workers.append(FakeWorker(self.asked, self.answers, environment))
        return self.workers[-1]


def program(name):
    return Program(name, lambda x: x, lambda: ())


def case(name, *needed, **fields):
    return Case(name, lambda context: {}, programs=lambda: tuple(map(program, needed)), **fields)


def prepare(context, fakes, cases, number=1, deadline_s=FAR):
    tasks = in_order([("s", each) for each in cases], lambda task, case: case.prepare_s)
    preparing = Preparation(tasks, context, fakes, number, time.monotonic() + deadline_s)
    preparing.start()
    return preparing


def finish(preparing):
    while not preparing.is_over():
        preparing.wait(0.01)


# --- preparing ------------------------------------------------------------------------------------


def test_tasks_come_once_in_the_order_of_cases_but_what_compiles_long_first():
    cases = [
        case("a", "p", "q"),
        case("waits", prepare=lambda context: None, prepare_s=90.0),
        case("b", "q", "r", prepare=lambda context: None),
        case("c", "slow", prepare_s=90.0),
    ]
    tasks = in_order([("s", each) for each in cases], lambda task, case: case.prepare_s)
    names = [(task.do, task.name) for task in tasks]
    assert names == [
        ("compile", "slow"),
        ("compile", "p"),
        ("compile", "q"),
        ("prepare", "waits"),
        ("compile", "r"),
        ("prepare", "b"),
    ]


def test_what_is_compiled_or_known_not_to_compile_is_not_asked_for_again(context):
    programs.write(programs.path_of("there", context, ".bin"), b"")
    programs.keep_failure("broken", context, {"status": "failed", "reason": "no"})
    carried = context.work / "carried"
    programs.write(carried / programs.path_of("carried", context, ".bin").name, b"")
    context = context._replace(carried=(carried,))
    fakes = Fakes()
    preparing = prepare(context, fakes, [case("a", "there", "broken", "carried", "new")])
    finish(preparing)
    assert [name for _, name, _ in fakes.asked] == ["new"]
    assert preparing.is_ready(tasks_of("s", case("a", "there", "broken", "carried", "new")))


@pytest.mark.parametrize("status", ["crashed", "timed out"])
def test_a_program_that_takes_its_compiler_with_it_is_not_compiled_by_who_runs(context, status):
    fakes = Fakes(bad=lambda: {"status": status, "reason": "gone"})
    finish(prepare(context, fakes, [case("a", "bad", "good")]))
    with pytest.raises(programs.NotCompiledError, match=f"{status} while compiling: gone"):
        programs.load(program("bad"), context)


def test_a_process_that_ended_may_not_have_been_the_tasks_fault(context):
    answers = iter([{"status": "crashed", "reason": "no device"}, {"status": "ok"}])
    fakes = Fakes(p=lambda: next(answers))
    preparing = prepare(context, fakes, [case("a", "p")])
    finish(preparing)
    assert [name for _, name, _ in fakes.asked] == ["p", "p"]
    assert [row["status"] for row in preparing.results.values()] == ["ok"]
    assert not programs.path_of("p", context, ".json").exists()


def test_time_that_is_over_is_no_failure_of_a_program(context):
    fakes = Fakes(late=lambda: {"status": "out of time", "reason": "over"})
    finish(prepare(context, fakes, [case("a", "late")]))
    assert not programs.is_settled("late", context)


def test_other_variables_take_another_process(context):
    other = (("JAX_PLATFORMS", "cpu"),)
    cases = [
        case("a", "p", prepare=lambda context: None, environment=other),
        case("b", "q"),
    ]
    fakes = Fakes()
    finish(prepare(context, fakes, cases))
    assert [(name, bool(environment)) for _, name, environment in fakes.asked] == [
        ("p", False),
        ("a", True),
        ("q", False),
    ]
    assert len(fakes.workers) == 3
    assert all(worker.is_stopped for worker in fakes.workers)


def test_several_processes_share_the_tasks(context):
    both = threading.Barrier(2, timeout=FAR)
    fakes = Fakes(p=lambda: {"status": "ok", "n": both.wait()}, q=lambda: {"n": both.wait()} | OK)
    finish(prepare(context, fakes, [case("a", "p", "q")], number=2))
    assert len(fakes.workers) == 2


OK = {"status": "ok"}


def test_nothing_is_begun_after_the_time(context):
    fakes = Fakes()
    finish(prepare(context, fakes, [case("a", "p")], deadline_s=-1.0))
    assert fakes.asked == []


# --- running --------------------------------------------------------------------------------------


def run(context, fakes, cases, preparing, parallel=False, deadline_s=FAR):
    stage = Stage("s", 1, lambda context: cases, (), parallel=parallel)
    runners = conduct.Runners(context, preparing, fakes)
    runners.run_stage(stage, cases, time.monotonic() + deadline_s)
    runners.stop()
    return stages.results(context.results, "s")


@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_ready_runs_while_something_else_is_compiled(context, parallel):
    go = threading.Event()
    preparer = Fakes(slow=lambda: {"status": "ok", "waited": go.wait(FAR)})
    cases = [case("first", "slow"), case("second"), case("third")]
    preparing = prepare(context, preparer, cases)

    def third():
        go.set()
        return OK

    fakes = Fakes(third=third)
    rows = run(context, fakes, cases, preparing, parallel)
    assert [name for _, name, _ in fakes.asked] == ["second", "third", "first"]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert all(worker.is_stopped for worker in fakes.workers)


def test_cases_of_a_stage_that_times_share_one_process_and_others_do_not(context):
    cases = [case(str(number)) for number in range(6)]
    for parallel, most in ((False, 1), (True, 2)):
        fakes = Fakes()
        run(context, fakes, cases, prepare(context, Fakes(), cases), parallel)
        assert 1 <= len(fakes.workers) <= most


def test_a_stage_whose_time_is_over_says_what_it_waited_for(context):
    go = threading.Event()
    preparer = Fakes(slow=lambda: {"status": "ok", "waited": go.wait(FAR)})
    cases = [case("a"), case("b", "slow")]
    preparing = prepare(context, preparer, cases)
    rows = run(context, Fakes(), cases, preparing, deadline_s=0.5)
    go.set()
    assert rows["a"]["status"] == "ok"
    assert rows["b"]["status"] == "out of time"
    assert "before 'slow' was ready" in rows["b"]["reason"]


def test_a_stage_is_stopped_in_the_middle_and_what_is_killed_has_no_result(context):
    class Hanging(FakeWorker):
        def ask(self, message, limit_s, deadline):
            self.asked.append(message["name"])
            assert self.killed.wait(FAR)
            return {"status": "crashed", "reason": "killed"}

        def kill(self):
            self.killed.set()

    asked, workers = [], []

    def new_worker(name, environment):
        workers.append(Hanging(asked, {}, environment))
        workers[-1].killed = threading.Event()
        return workers[-1]

    cases = [case("a"), case("b"), case("c")]
    runners = conduct.Runners(context, prepare(context, Fakes(), cases), new_worker)
    stage = Stage("s", 10, lambda context: cases, (), parallel=True)
    deadline = time.monotonic() + 3.0
    thread = threading.Thread(target=runners.run_stage, args=(stage, cases, deadline))
    thread.start()
    while len(asked) < 2:
        time.sleep(0.01)
    runners.stop()
    thread.join()
    assert time.monotonic() < deadline
    assert sorted(asked) == ["a", "b"]
    assert not stages.results(context.results, "s")


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_that_is_interrupted_at_any_line_ends_all_that_it_began(context, parallel):
    cases = [case("a", "p"), case("b", "q")]
    tasks = in_order([("s", each) for each in cases], lambda task, case: 0.0)
    stage = Stage("s", 1, lambda context: cases, (), parallel=parallel)

    def begin_and_run():
        preparing.start()
        runners.run_stage(stage, cases, time.monotonic() + FAR)

    target, was_interrupted = 0, True
    while was_interrupted:
        target += 1
        begun, threads = Fakes(), set(threading.enumerate())
        preparing = Preparation(tasks, context, begun, 2, time.monotonic() + FAR)
        runners = conduct.Runners(context, preparing, begun)
        was_interrupted = terminated_at_line(target, begin_and_run)
        preparing.stop()
        runners.stop()
        assert set(threading.enumerate()) <= threads, target
        assert all(worker.is_stopped for worker in begun.workers), target
    assert target > 20


def test_what_is_killed_may_still_be_made(context):
    """A worker that a thread makes while the suite stops is killed as all others."""
    making, go = threading.Event(), threading.Event()

    class Hanging(FakeWorker):
        def __init__(self):
            super().__init__([], {}, {})
            self.killed = threading.Event()

        def ask(self, message, limit_s, deadline):
            return {"status": "crashed", "reason": "killed" if self.killed.wait(FAR) else "not"}

        def kill(self):
            self.killed.set()

        stop = kill

    def new_worker(name, environment):
        making.set()
        assert go.wait(FAR)
        return Hanging()

    cases = [case("a")]
    runners = conduct.Runners(context, prepare(context, Fakes(), cases), new_worker)
    stage = Stage("s", 10, lambda context: cases, (), parallel=True)
    deadline = time.monotonic() + FAR / 2
    running = threading.Thread(target=runners.run_stage, args=(stage, cases, deadline))
    running.start()
    assert making.wait(FAR)
    stopping = threading.Thread(target=runners.stop)
    stopping.start()
    while not runners._is_stopped:
        time.sleep(0.01)
    go.set()
    stopping.join()
    running.join()
    assert time.monotonic() < deadline


@pytest.mark.usefixtures("terminable")
def test_an_interrupt_is_held_until_what_began_has_begun():
    """And is never lost, wherever it comes."""
    target, was_interrupted = 0, True
    while was_interrupted:
        target += 1
        steps = []

        def begin(steps=steps):
            with interrupts.held():
                steps.append("begins")
                steps.append("has begun")

        was_interrupted = terminated_at_line(target, begin, (interrupts.__file__, __file__))
        assert len(steps) in (0, 2), target
        assert interrupts._Held.depth == 0
        assert not interrupts._Held.came
    assert target > 8


@pytest.fixture
def terminable():
    """SIGTERM is an interrupt, as in the suite."""
    numbers = (signal.SIGTERM, signal.SIGALRM, signal.SIGINT)
    before, hook = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    interrupts.interrupt_on_sigterm()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    sys.unraisablehook = hook


def terminated_at_line(target, run, files=(conduct.__file__, preparation.__file__)):
    """Runs until SIGTERM comes at the `target`-th line of some files, or of what starts threads.

    Returns whether it came.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        code = frame.f_code
        if code.co_filename not in files and code is not threading.Thread.start.__code__:
            return None
        if event == "line":
            count += 1
            if count == target:
                signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    assert count < target, "the interrupt was lost"
    return False


def test_a_process_that_was_killed_before_it_began_does_not_begin(context):
    handle = Worker(context.work / "log", {})
    handle.kill()
    row = handle.ask({"do": "describe"}, FAR, time.monotonic() + FAR)
    assert row == {"status": "out of time", "reason": "the suite was stopped"}
    assert handle._process is None


def test_the_last_words_of_a_long_log_are_its_last(context):
    handle = Worker(context.work / "runs.log", {})
    handle.log.write_text("Fatal: an old one\n" + "noise\n" * 400_000 + "Check failed: here\n")
    assert handle._last_words() == "runs.log: Check failed: here"


def test_a_case_that_could_not_be_prepared_does_not_run(context):
    ready = lambda context: None  # noqa: E731
    cases = [
        case("bad", prepare=ready),
        case("refused", prepare=ready),
        case("good", prepare=ready),
    ]
    preparer = Fakes(
        bad={"status": "failed", "reason": "wrong"},
        refused={"status": "unsupported", "reason": "cannot"},
    )
    fakes = Fakes()
    rows = run(context, fakes, cases, prepare(context, preparer, cases))
    assert [name for _, name, _ in fakes.asked] == ["good"]
    assert rows["bad"]["reason"] == "while it was prepared: wrong"
    assert (rows["refused"]["status"], rows["refused"]["reason"]) == ("unsupported", "cannot")


# --- processes ------------------------------------------------------------------------------------


def worker(context):
    return Worker(
        context.work / "log", conduct.worker_factory(context, context.work)("", {}).environment
    )


def asked(handle, context, name, limit_s=FAR, deadline_s=FAR, **more):
    message = {"do": "run", "stage": "rehearsal", "name": name, "context": context.fields()}
    return handle.ask(message | more, limit_s, time.monotonic() + deadline_s)


@pytest.mark.slow
def test_a_process_that_crashes_or_hangs_is_replaced(context):
    handle = worker(context)
    try:
        assert asked(handle, context, "fails")["reason"] == "ValueError: this case fails on purpose"
        row = asked(handle, context, "crashes")
        assert row["status"] == "crashed"
        assert "SIGABRT; log: Fatal Python error: Aborted" in row["reason"]
        begin = time.monotonic()
        row = asked(handle, context, "hangs", limit_s=0.5)
        assert (row["status"], row["reason"]) == ("timed out", "longer than 0.5 s")
        assert time.monotonic() - begin < 60
        # Nobody compiled its program ahead: it takes its time here, beyond the limit if need be.
        row = asked(handle, context, "works", limit_s=FAR)
        assert row["status"] == "ok"
        assert row["program"] == "here: not compiled ahead"
        assert asked(handle, context, "hangs", deadline_s=0.5)["status"] == "out of time"
    finally:
        handle.stop()


@pytest.mark.slow
def test_a_broken_device_costs_no_other_case(context):
    """Its process ends after the answer, and the next case has another one."""
    handle = worker(context)
    script = "import benchmarks.gpu_suite.worker as w; w._is_healthy = lambda row: False; w.main()"
    handle.command = [sys.executable, "-c", script]
    try:
        for _ in range(3):
            row = asked(handle, context, "fails")
            assert (row["status"], "is_last" in row) == ("failed", False)
            assert handle._process is None
    finally:
        handle.stop()


@pytest.mark.slow
def test_compiling_what_was_not_loaded_gets_more_time(context, monkeypatch):
    found = []
    (works,) = (each for each in rehearsal.cases(context) if each.name == "works")
    stages.run_case(works, context._replace(more_time=found.append))
    assert found == [programs.COMPILE_LIMIT_S]


def test_who_asks_for_more_time_gets_it(context):
    handle = Worker(context.work / "log", {})
    reading, writing = os.pipe()

    def answer():
        os.write(writing, b'{"more_s": 60}\n')
        time.sleep(1.0)
        os.write(writing, b'{"status": "ok"}\n')

    with os.fdopen(reading, "rb") as answers:
        handle._process = types.SimpleNamespace(stdout=answers)
        thread = threading.Thread(target=answer)
        thread.start()
        assert handle._receive(0.5, time.monotonic() + FAR) == OK
        thread.join()
    os.close(writing)


def test_preparing_is_killed_when_the_suite_ends(context):
    preparing = Preparation(
        [Task("prepare", "hangs", "rehearsal")],
        context,
        lambda number, variables: worker(context),
        1,
        time.monotonic() + FAR,
    )
    preparing.start()
    time.sleep(0.5)
    begin = time.monotonic()
    preparing.stop()
    assert preparing.is_over()
    assert time.monotonic() - begin < 10


def test_memory_is_divided_on_a_gpu_only(context):
    fakes = Fakes()
    for platform in ("cpu", "sm_90"):
        there = context._replace(platform=platform)
        cases = [case(platform)]
        run(there, fakes, cases, prepare(there, Fakes(), cases))
    on_cpu, on_gpu = (environment for _, _, environment in fakes.asked)
    limits = [each.limit_s for each in fakes.workers]
    assert limits == [10.0 * conduct.PATIENCE_ON_CPU, 10.0]
    assert on_cpu == {}
    assert on_gpu == {"XLA_CLIENT_MEM_FRACTION": str(conduct.ALONE_MEMORY)}
    made = [
        conduct.worker_factory(context._replace(platform=platform), context.work)("x", {"A": "b"})
        for platform in ("cpu", "sm_90")
    ]
    assert [each.environment.get("NPROC") for each in made] == ["16", None]
    assert all(each.environment["A"] == "b" for each in made)
    assert preparation.PREPARE_LIMIT_S >= 60


def test_who_has_a_gpu_computes_there_and_on_the_host_and_nowhere_else(context, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    there = context._replace(platform="sm_90")

    def platforms(context, **variables):
        made = conduct.worker_factory(context, context.work)("x", variables)
        return made.environment.get("JAX_PLATFORMS")

    assert platforms(there) == "cuda,cpu"
    assert platforms(there, JAX_PLATFORMS="cpu") == "cpu"
    # Where programs are compiled for a GPU that is not there.
    assert platforms(there._replace(target="h100")) is None
    assert platforms(context) is None


def test_a_process_without_its_device_does_not_begin(context):
    handle = Worker(context.work / "log", {"JAX_PLATFORMS": "no_such_platform"})
    row = asked(handle, context, "fails")  # which needs no device
    assert row["status"] == "crashed"
    assert "no_such_platform" in row["reason"]


def test_a_gpu_that_is_there_must_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "_GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    supervise.check_gpu(on_gpu=False)
    (tmp_path / "nvidia0").touch()
    with pytest.raises(RuntimeError, match="JAX uses the CPU"):
        supervise.check_gpu(on_gpu=False)
    supervise.check_gpu(on_gpu=True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    supervise.check_gpu(on_gpu=False)


def test_a_process_that_cannot_be_killed_is_left_behind(context, monkeypatch):
    monkeypatch.setattr(supervise, "_STOP_LIMIT_S", 0.1)
    handle = worker(context)
    assert handle.ask({"do": "describe"}, FAR, time.monotonic() + FAR)["status"] == "ok"
    process = handle._process
    with monkeypatch.context() as patch:
        patch.setattr(supervise.os, "killpg", lambda group, number: None)  # a driver holds it
        begin = time.monotonic()
        handle.stop()
    assert time.monotonic() - begin < 10
    assert process.poll() is None
    assert handle._process is None
    process.kill()
    process.wait()


def test_numbers_of_numpy_in_a_row_cost_no_case():
    row = {"us": np.float32(1.5), "count": np.int64(2), "of": {"path": pathlib.Path("x")}}
    assert json.loads(as_line(row)) == {"us": 1.5, "count": 2, "of": {"path": "x"}}


def test_a_missing_assembler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "_TOOLKIT", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert str(tmp_path) in supervise.no_assembler()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    assert supervise.no_assembler() is None


def test_errors_become_results(context):
    def fail(error):
        def run(context):
            raise error

        return stages.run_case(Case("a", run), context)

    row = fail(ValueError("wrong"))
    assert (row["status"], row["reason"]) == ("failed", "ValueError: wrong")
    assert "test_gpu_suite_supervise.py" in row["where"]
    assert fail(RuntimeError("RESOURCE_EXHAUSTED: too large"))["status"] == "out of memory"
    row = fail(NotImplementedError("no such kernel"))
    assert (row["status"], row["reason"]) == ("unsupported", "no such kernel")
    skipped = Case("a", lambda context: {}, skip=lambda context: "too large")
    assert stages.run_case(skipped, context)["reason"] == "too large"
