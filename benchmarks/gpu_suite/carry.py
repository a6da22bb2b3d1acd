"""Compiles the suite's programs for a GPU that is not here, and puts them into a folder.

  JAX_PLATFORMS=cpu python -m benchmarks.gpu_suite.carry --target=h100 --out=DIR

The machine with the GPU loads them with `python -m benchmarks.gpu_suite --programs=DIR --out=...`.
Both need the same sources, the same jax and the same CUDA plugin of it (jax-cuda13-plugin and
jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc), or the programs are not found there. They
are compiled in the order in which the suite needs them, until the folder is as large as it may be;
programs of other sources, another jax or another GPU are deleted from it. Without the GPU matrix
products are not autotuned: by default no program is made here in which one is timed.
"""

import pathlib
import re
import shutil
import tempfile
import time

from absl import flags

from benchmarks import interrupts
from benchmarks.gpu_suite import choose, conduct, plan, preparation, programs
from benchmarks.gpu_suite.all_stages import STAGES
from benchmarks.gpu_suite.preparation import Task
from benchmarks.gpu_suite.stage import Case, Context
from pallas_paged import deviceless
from pallas_paged.models import command_line

HOST = "cpu"
_DAY_S = 86400.0
_OUT = flags.DEFINE_string("out", None, "Folder for the programs.", required=True)
_TARGET = flags.DEFINE_enum("target", "h100", [*deviceless.TARGETS, HOST], "The GPU.")
_CASES = flags.DEFINE_string(
    "cases", "^(correctness|more_correctness|tuning)", "Only for cases whose STAGE: CASE has this."
)
_MAX_MIB = flags.DEFINE_float("max_mib", 24.0, "The most MiB of programs.", lower_bound=0.0)
_JOBS = flags.DEFINE_integer("jobs", 2, "Processes.", lower_bound=1)
_KEEP_SECONDS = flags.DEFINE_bool(
    "keep_seconds",
    False,
    "Compile all, and write how long programs took into the suite's compile_seconds.csv.",
)


flags.register_validator("cases", choose.is_pattern, "must be a regular expression")


def context_of(target: str, work: pathlib.Path) -> Context:
    """Returns the context of the machine with the GPU, as far as compiling goes."""
    if target == HOST:
        return Context("cpu", work, work)
    capability = deviceless.target_device(target).compute_capability
    return Context(f"sm_{capability.replace('.', '')}", work, work, target=target)


def tasks(context: Context, pattern: str) -> list[Task]:
    """Returns the programs of the cases whose "STAGE: CASE" has `pattern`, in order."""
    found: dict[Task, Case] = {}
    for stage in STAGES:
        for case in stage.cases(context):
            if re.search(pattern, f"{stage.name}: {case.name}"):
                for task in preparation.tasks_of(stage.name, case):
                    found.setdefault(task, case)
    return [task for task in found if task.do == "compile"]


def main() -> None:
    """Fills the folder, and says what did not compile."""
    folder = pathlib.Path(_OUT.value).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    interrupts.interrupt_on_sigterm()
    work = pathlib.Path(tempfile.mkdtemp(prefix="carry_"))
    try:
        failed = _fill(folder, context_of(_TARGET.value, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if failed:
        raise ValueError(f"{failed} programs could not be compiled")


def _fill(folder: pathlib.Path, context: Context) -> int:
    """Compiles what the folder lacks; returns how many programs failed."""
    every = tasks(context, _CASES.value)
    if not every:
        raise ValueError(f"--cases={_CASES.value!r} matches no case that has programs")
    version = programs.version(context.platform)
    file_of = {task: f"{programs.file_name(task.name, version)}.bin" for task in tasks(context, "")}
    for path in folder.glob("*.bin"):
        if path.name not in file_of.values():
            path.unlink()
    left = _MAX_MIB.value * 2**20 - sum(path.stat().st_size for path in folder.glob("*.bin"))
    todo = [task for task in every if not (folder / file_of[task]).exists()]
    print(f"{len(every) - len(todo)} of {len(every)} programs are there", flush=True)
    new_worker = conduct.worker_factory(context, context.work / "logs")
    preparing = preparation.Preparation(
        todo,
        context,
        lambda number, variables: new_worker(f"compiles-{number}", variables),
        _JOBS.value,
        time.monotonic() + _DAY_S,
    )
    seconds = dict(plan.compile_seconds())
    failed, is_full = 0, False
    try:
        preparing.start()
        for number, task in enumerate(todo, 1):
            while not preparing.is_ready([task]):
                preparing.wait(1.0)
            row = preparing.results[task]
            result = f"{row['status']}: {' '.join(str(row.get('reason')).split())[:200]}"
            if row["status"] == "ok":
                seconds[task.name] = row["seconds"]
                path = context.work / "programs" / file_of[task]
                size = path.stat().st_size
                result = f"{size / 1024:.0f} KiB, {row['seconds']:.1f} s"
                if size <= left:
                    left -= size
                    shutil.move(path, folder / path.name)
                else:
                    is_full = not _KEEP_SECONDS.value
                    result += ", no room"
                    path.unlink()
            failed += row["status"] not in ("ok", "unsupported")
            print(f"{number}/{len(todo)} {task.name}: {result}", flush=True)
            if is_full:
                print(f"the folder is full, --max_mib={_MAX_MIB.value:g}: the rest is left out")
                break
    finally:
        preparing.stop()
    if _KEEP_SECONDS.value:
        plan.write_compile_seconds(seconds)
    kept = sum((folder / file_of[task]).exists() for task in every)
    print(f"{folder}: {kept} of {len(every)} programs, {failed} failed")
    return failed


if __name__ == "__main__":
    command_line.run(main)
