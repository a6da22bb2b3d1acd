"""Runs everything that needs a GPU, once, in under ten minutes.

  python -m benchmarks.gpu_suite --out=DIR
  python -m benchmarks.gpu_suite --out=DIR --stages=device,decode     # some of it
  JAX_PLATFORMS=cpu python -m benchmarks.gpu_suite --out=DIR --toy    # does the program work?

From the root of the repository, with jax (CUDA), flax, numpy, absl-py, jaxtyping and transformers
installed; it needs neither this package installed nor a network. Each stage is a process with a
time budget, and writes every result to DIR/STAGE.jsonl at once. The same command with the same DIR
goes on where an earlier one stopped, also with what time had cut off. suite.json and suite.txt hold
all of it, with device, versions and date.

Without a GPU kernels are interpreted at small sizes, and speeds stay unmeasured; --toy runs the
speed stages too, at sizes that measure nothing.
"""

import pathlib
import sys
import time

import jax
from absl import flags

from benchmarks.gpu_suite import (
    attention_speed,
    cache_speed,
    correctness,
    device,
    executable,
    model_step,
    report,
    supervise,
    torch_peer,
)
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Context, Stage
from pallas_paged.models import command_line

STAGES: tuple[Stage, ...] = (
    device.STAGE,
    correctness.STAGE,
    attention_speed.DECODE,
    attention_speed.PREFILL,
    model_step.STAGE,
    cache_speed.STAGE,
    torch_peer.STAGE,
    executable.STAGE,
)
_NAMES = [stage.name for stage in STAGES]
_OUT = flags.DEFINE_string("out", None, "Folder for the results.", required=True)
_STAGES = flags.DEFINE_list("stages", _NAMES, f"Which of {', '.join(_NAMES)}.")
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 590.0, "Seconds for everything.")
_SCALE = flags.DEFINE_float("budget_scale", 1.0, "Factor of every stage's and case's time budget.")
_TOY = flags.DEFINE_bool("toy", False, "Without a GPU, run the speed stages at toy sizes.")
_EXECUTABLE = flags.DEFINE_string(
    "executable", None, "A program that benchmarks.gpu_suite.executable made elsewhere, to check."
)
_WORKER = flags.DEFINE_enum("worker", None, _NAMES, "For the program itself: run this stage here.")
flags.register_validator(
    "stages", lambda names: set(names) <= set(_NAMES), f"must be a list of {', '.join(_NAMES)}"
)


def work(stage: Stage, context: Context) -> int:
    """Runs a stage's cases that have no result, in this process; returns its exit status."""
    folder = context.results
    known = stages.results(folder, stage.name)
    before = stages.results(folder, "device").get("description")
    if stage.needs_jax and before is not None:
        identity = device.identity()
        if {name: before.get(name) for name in identity} != identity:
            return supervise.WRONG_FOLDER
    for case in stage.cases(context):
        if stages.is_done(known.get(case.name)):
            continue
        stages.append(folder, stage.name, {"case": case.name, "began": time.time()})
        row = stages.run_case(case, context)
        stages.append(folder, stage.name, row)
        if row["status"] == "failed" and stage.needs_jax and not _is_healthy():
            return 1
    return 0


def _is_healthy() -> bool:
    """Whether the device still computes: after an illegal access nothing works any more."""
    try:
        return bool(jax.jit(lambda x: x + 1)(jax.numpy.int32(1)) == 2)
    except Exception:
        return False


def _context(folder: pathlib.Path) -> Context:
    """Returns what the device stage found out."""
    description = stages.results(folder, "device").get("description", {})
    return Context(description.get("platform") == "gpu", folder, _EXECUTABLE.value)


def main() -> None:
    """Runs the stages one after the other and keeps the report up to date."""
    folder = pathlib.Path(_OUT.value).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {stage.name: stage for stage in STAGES}
    if _WORKER.value is not None:
        on_gpu = jax.default_backend() == "gpu" if _WORKER.value == "device" else None
        context = _context(folder)
        if on_gpu is not None:
            context = context._replace(on_gpu=on_gpu)
        sys.exit(work(by_name[_WORKER.value], context))
    begin = time.monotonic()
    options = [f"--out={folder}"]
    if _EXECUTABLE.value is not None:
        options.append(f"--executable={pathlib.Path(_EXECUTABLE.value).absolute()}")
    for name in ["device", *(name for name in _STAGES.value if name != "device")]:
        stage, context = by_name[name], _context(folder)
        left_s = _TIME_LIMIT_S.value - (time.monotonic() - begin)
        if stage.toy and not context.on_gpu and not _TOY.value:
            row = {"case": "all", "status": "unmeasured", "reason": "there is no GPU"}
            stages.append(folder, stage.name, row)
        else:
            stage = stage.scaled(_SCALE.value)
            budget_s = min(stage.budget_s, left_s)
            command = [sys.executable, "-m", "benchmarks.gpu_suite", f"--worker={name}", *options]
            supervise.run(stage, context, command, budget_s)
        text = report.write(folder, STAGES)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"\n{text}\n{folder}/suite.json, {folder}/suite.txt")


if __name__ == "__main__":
    command_line.run(main)
