"""The program that the stage "hints" runs under NVIDIA's tools; by hand it is of little use."""

import pathlib
import time

import jax
from absl import flags

from benchmarks.gpu_suite import hints_work, programs
from benchmarks.gpu_suite.stage import Context
from pallas_paged.models import command_line

MARK = "hints: ran "
"""Begins the lines of the output that tell which programs ran, and where they came from."""


def main() -> None:
    """Runs the programs of a job, each some times, or compiles the step for its dump."""
    carried = tuple(map(pathlib.Path, _CARRIED.value or ()))
    results, work = pathlib.Path(_RESULTS.value), pathlib.Path(_WORK.value)
    context = Context(_PLATFORM.value, results, work, carried)
    if _JOB.value == "thunks":
        hints_work.compile_step(context)
        return
    for program in hints_work.programs(_JOB.value, context):
        if program.name in (_LEAVE_OUT.value or ()):
            continue
        loaded = programs.load(program, context)
        begin = time.monotonic()
        host = hints_work.inputs(program)
        arguments = jax.device_put(host, jax.devices()[0])
        for _ in range(_TIMES.value):
            jax.block_until_ready(loaded(*arguments))
            if program.donate:
                arguments = jax.device_put(host, jax.devices()[0])
        print(f"{MARK}{program.name} | {loaded.source} | {time.monotonic() - begin:.2f} s")


if __name__ == "__main__":
    _JOB = flags.DEFINE_enum(
        "job", None, ["smallest", "decode", "prefill", "thunks"], "What.", required=True
    )
    _PLATFORM = flags.DEFINE_string("platform", None, "Of the run's context.", required=True)
    _RESULTS = flags.DEFINE_string("results", None, "A folder.", required=True)
    _WORK = flags.DEFINE_string("work", None, "A folder.", required=True)
    _CARRIED = flags.DEFINE_multi_string("carried", None, "Folders.")
    _LEAVE_OUT = flags.DEFINE_multi_string("leave_out", None, "Programs that do not compile.")
    _TIMES = flags.DEFINE_integer("times", 1, "How often each program runs.")
    command_line.run(main)
