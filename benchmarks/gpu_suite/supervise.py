"""Runs a stage in processes of its own, and outlives what they do not."""

import os
import pathlib
import subprocess
import time
from collections.abc import Sequence

from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Context, Stage

ROOT = pathlib.Path(__file__).parent.parent.parent
WRONG_FOLDER = 4
"""Exit status of a process that found another device's results in the folder."""
_MAX_PROCESSES = 20


def run(stage: Stage, context: Context, command: Sequence[str], budget_s: float) -> None:
    """Runs the cases of a stage that have no result yet, within `budget_s` seconds.

    A case during which its process dies, or that runs longer than the stage allows, gets a result
    that says so, and another process goes on with the next one. A process is started with
    `command`.

    Raises:
      RuntimeError: the folder holds results of another device or version.
    """
    deadline = time.monotonic() + budget_s
    for _ in range(_MAX_PROCESSES):
        if not _pending(stage, context) or time.monotonic() >= deadline:
            break
        status = _run_process(stage, context, command, deadline)
        if status == WRONG_FOLDER:
            raise RuntimeError(f"{context.results} holds results of another device or version")
    for name in _pending(stage, context):
        row = {"case": name, "status": "out of time", "reason": "the stage's time was over"}
        stages.append(context.results, stage.name, row)


def _pending(stage: Stage, context: Context) -> list[str]:
    results = stages.results(context.results, stage.name)
    return [
        case.name for case in stage.cases(context) if not stages.is_done(results.get(case.name))
    ]


def _run_process(stage: Stage, context: Context, command: Sequence[str], deadline: float) -> int:
    """Starts a process for the stage; returns its exit status, after killing it if need be."""
    log = context.results / f"{stage.name}.log"
    defaults = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    if not context.on_gpu:
        # An interpreted kernel blocks one of JAX's threads for each of its own that waits; with as
        # many as two cores give, it would wait forever.
        defaults["NPROC"] = "16"
    environment = defaults | dict(os.environ)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    reason = None
    while process.poll() is None:
        time.sleep(0.1)
        current = stages.unfinished(context.results, stage.name)
        if current is not None and time.time() - current[1] > stage.case_limit_s:
            reason = f"longer than {stage.case_limit_s:g} s"
        elif time.monotonic() > deadline:
            reason = "the stage's time was over"
        if reason is not None:
            process.kill()
            process.wait()
            break
    current = stages.unfinished(context.results, stage.name)
    if current is not None:
        over = reason == "the stage's time was over"
        status = "out of time" if over else "timed out" if reason else "crashed"
        row = {
            "case": current[0],
            "status": status,
            "reason": reason or f"exit status {process.returncode}, see {log.name}",
        }
        stages.append(context.results, stage.name, row)
    return process.returncode
