"""The program that the stage "hints" runs under NVIDIA's tools; by hand it is of little use."""

import json
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
    context = Context.of(json.loads(_CONTEXT.value))
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
    _CONTEXT = flags.DEFINE_string("context", None, "Its fields, as JSON.", required=True)
    _LEAVE_OUT = flags.DEFINE_multi_string("leave_out", None, "Programs that do not compile.")
    _TIMES = flags.DEFINE_integer("times", 1, "How often each program runs.")
    command_line.run(main)
