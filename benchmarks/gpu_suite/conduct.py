"""Runs a stage's cases as they are ready: in which processes, for how long, with what result."""

import pathlib
import threading
import time
from collections.abc import Callable, Sequence

from benchmarks import interrupts
from benchmarks.gpu_suite import preparation
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.preparation import Preparation
from benchmarks.gpu_suite.stage import Case, Context, Stage
from benchmarks.gpu_suite.supervise import Worker

ALONE_MEMORY, SHARED_MEMORY = 0.7, 0.18
"""Shares of the GPU's memory that a process takes: the only one that runs, and one of several.

Some 20 GiB are left to those that prepare: a context each, and what XLA compares products with."""
PARALLEL_RUNS = 4
"""Cases that run at a time in a stage where none is timed; two without a GPU."""

PATIENCE_ON_CPU = 4
"""Factor of the cases' limits without a GPU, where nothing is timed and tests run beside it."""

NewWorker = Callable[[str, dict[str, str]], Worker]
"""From a name and variables of its environment to the handle of a process."""


def num_running(stage: Stage, context: Context) -> int:
    """Returns how many processes run the cases of a stage."""
    return (PARALLEL_RUNS if context.on_gpu else 2) if stage.parallel else 1


class Runners:
    """Processes that run cases.

    The one that times outlives its stage, as it takes seconds to start; it belongs to the thread
    that calls `run_stage`.
    """

    def __init__(self, context: Context, preparing: Preparation, new_worker: NewWorker) -> None:
        """Starts nothing yet."""
        self._context, self._preparing, self._new_worker = context, preparing, new_worker
        self._alone: Worker | None = None
        self._alone_in: tuple[tuple[str, str], ...] = ()
        self._lock = threading.Lock()
        self._beside: list[threading.Thread] = []
        self._workers_beside: list[Worker] = []
        self._is_stopped = False

    def stop(self) -> None:
        """Kills what runs, and begins nothing more, whichever stage is under way."""
        self._is_stopped = True  # first: who makes another worker now kills it
        for worker in list(self._workers_beside):
            worker.kill()
        for thread in self._beside:
            thread.join()
        self._stop_alone()

    def _stop_alone(self) -> None:
        if self._alone is not None:
            self._alone.stop()
            self._alone = None

    def run_stage(self, stage: Stage, cases: Sequence[Case], deadline: float) -> None:
        """Runs cases until `deadline`, of `time.monotonic()`; afterwards each has a result."""
        todo = list(cases)
        number = num_running(stage, self._context)
        if number == 1:
            self._run(stage, todo, deadline)
        else:
            self._stop_alone()  # for its memory
            self._workers_beside = []
            self._beside = []
            with interrupts.held():
                for i in range(min(number, len(todo))):
                    self._beside.append(
                        threading.Thread(target=self._run_beside, args=(stage, todo, deadline, i))
                    )
                    self._beside[-1].start()
            for thread in self._beside:
                thread.join()
        for case in todo:
            self._append(stage, {"case": case.name} | self._why_not_run(stage, case))

    def _run(self, stage: Stage, todo: list[Case], deadline: float) -> None:
        while (case := self._take(stage, todo, deadline)) is not None:
            if self._alone is None or self._alone_in != case.environment:
                self._stop_alone()
                self._alone_in = case.environment
                self._alone = self._worker("runs", ALONE_MEMORY, case)
            self._run_case(stage, case, self._alone, deadline)

    def _run_beside(self, stage: Stage, todo: list[Case], deadline: float, number: int) -> None:
        worker: Worker | None = None
        while (case := self._take(stage, todo, deadline)) is not None:
            if worker is None:
                worker = self._worker(f"runs-{number}", SHARED_MEMORY, case)
                self._workers_beside.append(worker)
                if self._is_stopped:
                    worker.kill()
            self._run_case(stage, case, worker, deadline)
        if worker is not None:
            worker.stop()

    def _worker(self, name: str, memory: float, case: Case) -> Worker:
        variables = dict(case.environment)
        if self._context.on_gpu:
            variables["XLA_CLIENT_MEM_FRACTION"] = str(memory)
        return self._new_worker(name, variables)

    def _take(self, stage: Stage, todo: list[Case], deadline: float) -> Case | None:
        """Takes the first case that is ready; None if all are taken or the time is over."""
        while time.monotonic() < deadline and not self._is_stopped:
            with self._lock:
                if not todo:
                    return None
                for case in todo:
                    if self._preparing.is_ready(preparation.tasks_of(stage.name, case)):
                        todo.remove(case)
                        return case
            self._preparing.wait(min(0.5, max(0.0, deadline - time.monotonic())))
        return None

    def _run_case(self, stage: Stage, case: Case, worker: Worker, deadline: float) -> None:
        prepare = preparation.Task("prepare", case.name, stage.name, case.environment)
        row = self._preparing.results.get(prepare, {"status": "ok"})
        if row["status"] == "ok":
            message = {"do": "run", "stage": stage.name, "name": case.name}
            limit_s = case.limit_s * (1 if self._context.on_gpu else PATIENCE_ON_CPU)
            row = worker.ask(message | {"context": self._context.fields()}, limit_s, deadline)
        elif row["status"] != "unsupported":
            row = row | {"reason": f"while it was prepared: {row.get('reason', '')}"}
        self._append(stage, {"case": case.name} | row | {"ahead_s": self._ahead_s(stage, case)})

    def _ahead_s(self, stage: Stage, case: Case) -> float:
        """Returns how long it took to compile and prepare what a case needs, in this run."""
        done = self._preparing.results
        tasks = [task for task in preparation.tasks_of(stage.name, case) if task in done]
        return round(sum(done[task].get("took_s", 0.0) for task in tasks), 2)

    def _why_not_run(self, stage: Stage, case: Case) -> stages.Row:
        needed = preparation.tasks_of(stage.name, case)
        waiting = [task.name for task in needed if not self._preparing.is_ready([task])]
        reason = "the stage's time was over"
        if waiting:
            reason += f" before {waiting[0]!r} was ready"
        return {"status": "out of time", "reason": reason}

    def _append(self, stage: Stage, row: stages.Row) -> None:
        with self._lock:
            if self._is_stopped:
                return  # what was killed has no result
            stages.append(self._context.results, stage.name, row)


def worker_factory(context: Context, logs: pathlib.Path) -> NewWorker:
    """Returns what makes the handles of workers for these cases."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": "jax_cache",
        "TRITON_CACHE_DIR": "triton_cache",
        "TORCHINDUCTOR_CACHE_DIR": "inductor_cache",
    }
    common = {name: str(context.work / folder) for name, folder in caches.items()} | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if context.on_gpu and context.target is None:
        # Both are needed, whatever the environment says; and without the GPU nothing shall run.
        common["JAX_PLATFORMS"] = "cuda,cpu"
        common["XLA_PYTHON_CLIENT_MEM_FRACTION"] = ""  # JAX refuses it beside the new name
    if not context.on_gpu:
        # An interpreted kernel blocks one of JAX's threads for each of its own that waits; with as
        # many as two cores give, it would wait forever.
        common["NPROC"] = "16"

    def new_worker(name: str, variables: dict[str, str]) -> Worker:
        return Worker(logs / f"{name}.log", common | variables)

    return new_worker
