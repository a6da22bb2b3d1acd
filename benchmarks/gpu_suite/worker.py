"""A process that compiles, prepares and runs what the supervisor asks for, one after the other.

  python -m benchmarks.gpu_suite.worker

reads a JSON object per line from its standard input, and answers each with one on its standard
output; see `answer`. One with `is_last` says that the process ends. What else is printed goes to
standard error.
"""

import ctypes
import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.gpu_suite import device, programs
from benchmarks.gpu_suite.all_stages import STAGES
from benchmarks.gpu_suite.stage import Case, Context, Program, Row, failure, run_case
from pallas_paged.models import command_line

_PR_SET_PDEATHSIG = 1
_NICE = 10
_BROKEN_DEVICE = ("CUDA error", "CUDA_ERROR_ILLEGAL", "CUDA_ERROR_LAUNCH")


def answer(message: Row, more_time: Callable[[float], None]) -> Row:
    """Returns the result of what a message asks for.

    Args:
      message: `do` is "describe", or, with a `context`, "try carried" (is there a `reason` why
        carried programs cannot be used?), "compile" of the program `name`, "prepare" or "run" of
        the case `name` of `stage`.
      more_time: see `Context`.
    """
    if message["do"] == "describe":
        return device.identity() | {"status": "ok", "architecture": _architecture()}
    context = Context.of(message["context"])
    if message["do"] == "try carried":
        return {"status": "ok", "reason": programs.cannot_use(_programs(context).values(), context)}
    if message["do"] != "run":
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # what runs comes first
    if message["do"] == "compile":
        return programs.compile_ahead(_programs(context)[message["name"]], context)
    case = _cases(message["stage"], context)[message["name"]]
    if message["do"] == "run":
        return run_case(case, context._replace(more_time=more_time))
    assert case.prepare is not None
    try:
        case.prepare(context)
        return {"status": "ok"}
    except Exception as error:
        return failure(error)


def as_line(row: Row) -> str:
    """Returns a row as a line of JSON; a case may have left numbers of NumPy in it, or anything."""
    return json.dumps(row, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))


def _architecture() -> str:
    """Returns what programs are compiled for: "cpu", or as "sm_90"."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return "cpu"
    return f"sm_{first.compute_capability.replace('.', '')}"


@functools.cache
def _cases(stage: str, context: Context) -> dict[str, Case]:
    (found,) = (each for each in STAGES if each.name == stage)
    return {case.name: case for case in found.cases(context)}


@functools.cache
def _programs(context: Context) -> dict[str, Program]:
    return {
        program.name: program
        for stage in STAGES
        for case in _cases(stage.name, context).values()
        for program in case.programs()
    }


def _take_device() -> None:
    """Begins to use the device, which takes seconds that no case should be given up for.

    A process that does not get the device ends by this, instead of computing elsewhere.
    """
    jax.block_until_ready(jax.device_put(np.zeros(1, np.float32)))


def _is_healthy(row: Row) -> bool:
    """Whether the device still computes after a case.

    After an illegal access nothing works any more: not in JAX, and not in PyTorch, whose errors
    say so and may be but a peer's in a case that is all right.
    """
    if any(text in as_line(row) for text in _BROKEN_DEVICE):
        return False
    if row["status"] != "failed":
        return True
    try:
        return bool(jax.jit(lambda x: x + 1)(jax.numpy.int32(1)) == 2)
    except Exception:
        return False


def main() -> None:
    """Answers until the input ends."""
    # Nothing is left behind, whatever becomes of the supervisor.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(row: Row) -> None:
        answers.write(as_line(row) + "\n")
        answers.flush()

    _take_device()
    send({"status": "ready"})
    for line in sys.stdin:
        message = json.loads(line)
        row = answer(message, lambda seconds: send({"more_s": seconds}))
        if message["do"] == "run" and not _is_healthy(row):
            send(row | {"is_last": True})
            sys.exit("the device is broken")
        send(row)
        if row["status"] != "ok":
            gc.collect()  # an error may hold arrays of many GiB in a circle


if __name__ == "__main__":
    command_line.run(main)
