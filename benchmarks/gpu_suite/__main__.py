"""Runs everything that needs a GPU, once, in eight minutes: is all of it right, and how fast is it?

  python -m benchmarks.gpu_suite --out=DIR
  python -m benchmarks.gpu_suite --out=DIR2 --previous=DIR --rerun=failed   # what was wrong, again
  python -m benchmarks.gpu_suite --out=DIR --stages=decode --cases='64 x 4096'
  python -m benchmarks.gpu_suite --dry_run                                   # what would it do?
  JAX_PLATFORMS=cpu python -m benchmarks.gpu_suite --out=DIR --toy           # does the suite work?

From the root of the repository, with jax (CUDA), flax, numpy, absl-py, jaxtyping and transformers
installed, and CUDA's assembler, in /usr/local/cuda or from the package nvidia-cuda-nvcc; it needs
neither this package installed nor a network. Programs are compiled by many processes while others
run them; what was compiled elsewhere, by `benchmarks.gpu_suite.carry`, is loaded from --programs. A
case that hangs or crashes costs that case alone.

After each stage DIR has summary.txt (what matters, at most 6 kB, also printed last), results.tar.gz
(every figure, suite.txt to read, suite.json, logs, tuned configurations) and programs-1.tar, ...
with what was compiled and autotuned. Results are kept apart by device and sources. The exit status
is 1 if something is wrong, 2 for wrong flags, 130 after a Ctrl-C or a SIGTERM, which keep what was
found until then. What there was no time for is not wrong: the summary counts it, and the next run
with --previous runs it. The device's stage is always run, unless its results are there. What lies
in --previous and --programs is loaded as code: take no folder that somebody else made.

Without a GPU kernels are interpreted at small sizes, and speeds stay unmeasured; --toy runs all
stages, at sizes that measure nothing, and cases that fail, hang and crash on purpose.
"""

import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import jax
from absl import flags

from benchmarks import interrupts
from benchmarks.gpu_suite import (
    archive,
    choose,
    conduct,
    device,
    plan,
    preparation,
    programs,
    rehearsal,
    report,
)
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.all_stages import STAGES
from benchmarks.gpu_suite.choose import Choice
from benchmarks.gpu_suite.stage import Case, Context, Row
from benchmarks.gpu_suite.supervise import START_LIMIT_S, Worker, check_gpu, no_assembler
from pallas_paged.models import command_line

_TRY_LIMIT_S = 45.0
"""Seconds that running the first carried program may take."""
_NAMES = [stage.name for stage in STAGES if stage is not rehearsal.STAGE]
_OUT = flags.DEFINE_string("out", None, "Folder for summary and archives.")
_STAGES = flags.DEFINE_list("stages", _NAMES, "Which stages; they keep their order.")
_CASES = flags.DEFINE_string(
    "cases",
    "",
    "Only cases in whose STAGE: CASE this regular expression is found; --dry_run lists them.",
)
_RERUN = flags.DEFINE_enum(
    "rerun",
    "missing",
    choose.RERUN,
    "Cases to run: without a result of these sources, those that failed last, or all.",
)
_PREVIOUS = flags.DEFINE_string(
    "previous", None, "Folder that an earlier run wrote, to go on from."
)
_PROGRAMS = flags.DEFINE_list("programs", [], "Folders of benchmarks.gpu_suite.carry.")
_BUDGET_S = flags.DEFINE_float("budget_s", 480.0, "Seconds for everything.", lower_bound=1.0)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Processes; by default as many as there are cores, at most 16.", lower_bound=1
)
_TOY = flags.DEFINE_bool("toy", False, "Without a GPU, run the speed stages too, at toy sizes.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run on an H100, and for how long.")
flags.register_validator(
    "stages",
    lambda names: bool(names) and set(names) <= set(_NAMES),
    f"must be a list of {', '.join(_NAMES)}",
)
flags.register_validator("cases", choose.is_pattern, "must be a regular expression")


def main() -> None:
    """Plans, or runs all stages and keeps summary and archives up to date."""
    begin = time.monotonic()
    # Nothing here needs a device; should anything take one, it must not be the GPU's memory.
    jax.config.update("jax_platforms", "cpu")
    out = None if _OUT.value is None else pathlib.Path(_OUT.value).absolute()
    if out is None and not _DRY_RUN.value:
        raise ValueError("--out=DIR is needed, or --dry_run")
    if _RERUN.value == "failed" and _PREVIOUS.value is None:
        raise ValueError("--rerun=failed needs --previous=DIR of the run in which they failed")
    if out is not None and not _DRY_RUN.value:
        _check_free(out)
    interrupts.interrupt_on_sigterm()
    work = pathlib.Path(tempfile.mkdtemp(prefix="gpu_suite_"))
    try:
        if _PREVIOUS.value is not None:
            archive.read(pathlib.Path(_PREVIOUS.value), work)
        if out is None or _DRY_RUN.value:
            print(_planned(Context("sm_90", _results_of_h100(work), work, _carried())))
        elif wrong := _run(work, out, begin):
            print(f"wrong: {'; '.join(wrong)}"[:500])
            sys.exit(1)
    except KeyboardInterrupt:
        where = "" if out is None or _DRY_RUN.value else f"; what was found is in {out}"
        print(f"error: interrupted{where}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_free(out: pathlib.Path) -> None:
    """Makes the folder, and raises an error if it cannot be written or has another run's results.

    Results cost time on a GPU: they are replaced by a run that begins with them, and by no other.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; it must be a folder, or nothing yet")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass
    previous = None if _PREVIOUS.value is None else pathlib.Path(_PREVIOUS.value).resolve()
    if (out / "results.tar.gz").exists() and out.resolve() != previous:
        raise ValueError(
            f"--out={out} holds the results of a run: go on from them with --previous={out}, or "
            "give another folder"
        )


def _results_of_h100(work: pathlib.Path) -> pathlib.Path:
    """Returns the folder with what an earlier run of these sources found on an H100."""
    pattern = f"{device.source_hash()}-*h100*"
    return next((work / "results").glob(pattern), work / "results" / "none")


def _planned(context: Context) -> str:
    cases = _chosen(context)
    plans = plan.plan(STAGES, cases, context, jobs := _JOBS.value or 16, _BUDGET_S.value)
    names = [f"{name}: {case.name}" for name in cases for case in cases[name]]
    return "\n".join([*(names if _CASES.value else ()), plan.table(plans, jobs, _BUDGET_S.value)])


def _carried() -> tuple[pathlib.Path, ...]:
    folders = tuple(pathlib.Path(folder).absolute() for folder in _PROGRAMS.value)
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--programs: there is no folder {folder}")
    return folders


def _chosen(context: Context) -> dict[str, list[Case]]:
    names = set(_STAGES.value)
    if not context.on_gpu and _TOY.value:
        names.add(rehearsal.STAGE.name)
    every = [f"{s.name}: {c.name}" for s in STAGES if s.name in names for c in s.cases(context)]
    if not any(re.search(_CASES.value, name) for name in every):
        raise ValueError(f"--cases={_CASES.value!r} matches no case, as {every[-1]!r}")
    if not context.on_gpu and not _TOY.value:
        names -= {stage.name for stage in STAGES if stage.toy}
    last = choose.last_results(context.work / "results", STAGES)
    return choose.chosen(STAGES, context, Choice(names, _CASES.value, _RERUN.value, last))


def _run(work: pathlib.Path, out: pathlib.Path, begin: float) -> list[str]:
    """Runs everything; returns what should have ended otherwise."""
    budget_s, logs = _BUDGET_S.value, work / "logs"
    end = begin + budget_s
    carried = _carried()
    asked = Worker(logs / "describe.log", {})
    described = asked.ask({"do": "describe"}, START_LIMIT_S, end)
    if described["status"] != "ok":
        asked.stop()
        raise RuntimeError(f"no device answers: {described['reason']}")
    context = Context(described["architecture"], work / "results" / _name(described), work, carried)
    check_gpu(context.on_gpu)
    context.results.mkdir(parents=True, exist_ok=True)
    title = "GPU suite"
    if context.on_gpu and (where := no_assembler()):
        title += f" (kernels may not compile here: {where})"
    if carried:
        message = {"do": "try carried", "context": context.fields()}
        if why := asked.ask(message, _TRY_LIMIT_S, end)["reason"]:
            context = context._replace(carried=())
            title += f" (--programs are not used: {why})"
    asked.stop()
    cases = _chosen(context)
    every = [(name, case) for name in cases for case in cases[name]]
    print(f"{len(every)} cases to run on {described['device']}", flush=True)
    limits = plan.deadlines(STAGES, cases, budget_s)
    new_worker = conduct.worker_factory(context, logs)
    jobs = _JOBS.value or plan.num_cores()
    preparing = preparation.Preparation(
        preparation.in_order(every, plan.estimate_s),
        context,
        lambda number, variables: new_worker(
            f"prepares-{number}", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | variables
        ),
        plan.num_preparing(jobs),
        end,
    )
    runners = conduct.Runners(context, preparing, new_worker)
    try:
        preparing.start()
        for stage in STAGES:
            if stage.name in cases:
                runners.run_stage(stage, cases[stage.name], begin + limits[stage.name])
            elif stage.toy and not context.on_gpu and stage.name in _STAGES.value:
                row = {"case": "all", "status": "unmeasured", "reason": "there is no GPU"}
                stages.append(context.results, stage.name, row)
            seconds = f"{time.monotonic() - begin:.0f} s"
            if stage.name in cases:
                print(f"{stage.name}: done at {seconds}", flush=True)
            summary, unkept = _keep(out, context, f"{title}, {seconds} of {budget_s:.0f} s")
    except KeyboardInterrupt:
        preparing.stop()
        runners.stop()
        _keep(out, context, f"{title}, interrupted after {time.monotonic() - begin:.0f} s")
        raise
    finally:
        preparing.stop()
        runners.stop()
    print(f"\n{summary}\n{out}")
    wrong = _wrong(context, cases)
    if unkept is not None:
        kept = work.rename(work.with_name(f"{work.name}_kept"))
        wrong.insert(0, f"{out} could not be written, everything is in {kept}: {unkept}")
    return wrong


def _name(described: Row) -> str:
    """Returns the name of the folder for results of this device and these sources."""
    kind = re.sub(r"[^a-z0-9]+", "_", described["device"].lower())
    return f"{described['sources']}-jax{described['versions']['jax']}-{kind}"


def _keep(out: pathlib.Path, context: Context, first: str) -> tuple[str, OSError | None]:
    """Writes report, archives and summary; returns the summary, and why `out` was not written.

    A full disk may have room again after the next stage.
    """
    report.write(context.results, STAGES)
    version = programs.version(context.platform)
    names = [p.name for s in STAGES for case in s.cases(context) for p in case.programs()]
    last = f"all of it: {out.name}/results.tar.gz"
    try:
        left = archive.write(out, context.work, archive.wanted_files(names, version))
        if left.files:
            last += (
                f"; no room in programs-*.tar for {left.files} files of {left.num_bytes >> 20} MiB"
            )
        summary = report.summary(context.results, STAGES, first, last)
        (out / "summary.txt").write_text(summary, encoding="utf-8")
    except OSError as error:
        return report.summary(context.results, STAGES, first, f"NOT WRITTEN: {error}"), error
    return summary, None


def _wrong(context: Context, cases: dict[str, list[Case]]) -> list[str]:
    """Returns the cases that should have ended otherwise."""
    wrong = []
    for name in cases:
        results = stages.results(context.results, name)
        for case in cases[name]:
            status = results[case.name]["status"]
            if name == rehearsal.STAGE.name:
                is_wrong = status != rehearsal.EXPECTED[case.name]
            else:
                is_wrong = status in stages.BROKEN
            if is_wrong:
                wrong.append(f"{name}: {case.name}: {status}")
    return wrong


if __name__ == "__main__":
    command_line.run(main)
