"""Other processes compile and prepare what cases need, in the cases' order, while others run."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks import interrupts
from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Case, Context, Row
from benchmarks.gpu_suite.supervise import Worker

PREPARE_LIMIT_S = 120.0
_LONG_S = 9.0
"""Steps of a model take as long where nothing is measured; on a GPU their products are, too."""


class Task(NamedTuple):
    """Something that a process can do ahead.

    Attributes:
      do: "compile" a program or "prepare" a case, both by `name`.
      name: of it.
      stage: of the case, or of the first one that needs the program.
      environment: of the process.
    """

    do: str
    name: str
    stage: str
    environment: tuple[tuple[str, str], ...] = ()


def tasks_of(stage: str, case: Case) -> list[Task]:
    """Returns what must be done before a case can run."""
    tasks = [Task("compile", program.name, "") for program in case.programs()]
    if case.prepare is not None:
        tasks.append(Task("prepare", case.name, stage, case.environment))
    return tasks


def in_order(
    cases: Iterable[tuple[str, Case]], estimate_s: Callable[[Task, Case], float]
) -> list[Task]:
    """Returns the tasks of cases, each once: in their order, but what compiles long comes first."""
    first: dict[Task, Case] = {}
    for stage, case in cases:
        for task in tasks_of(stage, case):
            first.setdefault(task, case)

    def is_first(task: Task) -> bool:
        return task.do == "compile" and estimate_s(task, first[task]) >= _LONG_S

    return sorted(first, key=lambda task: not is_first(task))


class Preparation:
    """Threads with a worker each, that do tasks until none is left or the time is over.

    Attributes:
      results: of the tasks that are done.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        context: Context,
        new_worker: Callable[[int, dict[str, str]], Worker],
        num_workers: int,
        deadline: float,
    ) -> None:
        """Starts nothing yet.

        Args:
          tasks: the most urgent first.
          context: of the cases.
          new_worker: from a number and an environment to the handle of a process.
          num_workers: how many tasks are done at a time.
          deadline: of `time.monotonic()`.
        """
        self.results: dict[Task, Row] = {}
        self._context = context
        self._new_worker = new_worker
        self._deadline = deadline
        self._changed = threading.Condition()
        self._workers: dict[int, Worker] = {}
        self._todo = []
        for task in tasks:
            if task.do == "compile" and programs.is_settled(task.name, context):
                self.results[task] = {"status": "ok", "took_s": 0.0}
            else:
                self._todo.append(task)
        self._num_workers = min(num_workers, len(self._todo))
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins with the first tasks."""
        with interrupts.held():
            for number in range(self._num_workers):
                self._threads.append(
                    threading.Thread(target=self._work, args=(number,), daemon=True)
                )
                self._threads[-1].start()

    def is_ready(self, tasks: Iterable[Task]) -> bool:
        """Whether all of these are done, well or not."""
        return all(task in self.results for task in tasks)

    def wait(self, timeout_s: float) -> None:
        """Returns when another task is done, or after so many seconds."""
        with self._changed:
            self._changed.wait(timeout_s)

    def is_over(self) -> bool:
        """Whether nothing more will be done."""
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Begins no more tasks, and kills what is under way."""
        self._deadline = 0.0
        for worker in list(self._workers.values()):
            worker.kill()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        environment: tuple[tuple[str, str], ...] = ()
        try:
            while time.monotonic() < self._deadline:
                with self._changed:
                    if not self._todo:
                        return
                    task = self._todo.pop(0)
                if number not in self._workers or task.environment != environment:
                    if number in self._workers:
                        self._workers[number].stop()
                    environment = task.environment
                    self._workers[number] = self._new_worker(number, dict(environment))
                row = self._do(task, self._workers[number])
                with self._changed:
                    self.results[task] = row
                    self._changed.notify_all()
        finally:
            if number in self._workers:
                self._workers[number].stop()
            with self._changed:
                self._changed.notify_all()

    def _do(self, task: Task, worker: Worker) -> Row:
        begin = time.monotonic()
        message: Row = {"do": task.do, "name": task.name, "stage": task.stage}
        message["context"] = self._context.fields()
        is_compile = task.do == "compile"
        limit_s = programs.COMPILE_LIMIT_S if is_compile else PREPARE_LIMIT_S
        row = worker.ask(message, limit_s, self._deadline)
        if row["status"] == "crashed":  # which may be the process's fault, not the task's
            row = worker.ask(message, limit_s, self._deadline)
        if is_compile and row["status"] in ("crashed", "timed out"):
            programs.keep_failure(task.name, self._context, row)
        return row | {"took_s": round(time.monotonic() - begin, 2)}
