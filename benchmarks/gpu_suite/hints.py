"""Hints of why kernels are wrong or slow: NVIDIA's checkers and profiler, and XLA's thunks.

Every tool runs a process of its own, `hints_child`, over programs that are compiled ahead. What the
tools print is kept in the folder `hints` beside the results. A tool that is not there, or that the
machine does not let work, is unsupported. Without a GPU the child runs with no tool in front.

What memcheck cannot see: the arrays of a program lie apart from each other, with room between them,
but all temporaries of a program are one piece of memory.
"""

import functools
import json
import pathlib
import shutil
import sys

from benchmarks.gpu_suite import hints_child, hints_tools, hints_work, programs
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, failure

LIMIT_S = 60.0
"""Of a case; its tool is given up some seconds before, so that what it printed is kept."""
_SPARE_S = 6.0
_NO_TOOL = "none, there is no GPU"
_APART = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
"""Every array is an allocation of its own, else memcheck sees one large one."""
_ENVIRONMENT = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)
"""Of the cases' processes and their children: each leaves the memory to the others."""
_SANITIZER = "--target-processes=all --report-api-errors=no --print-limit=200"
_SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
    "SourceCounters",
)
_PAGES = {
    "details.txt": "--page=details --print-details=all",
    "raw.csv": "--page=raw --csv --print-units=base",
    "source.csv.gz": "--page=source --csv",
}
"""What of ncu's report is kept as text, by the end of the file's name."""
KERNELS = {
    "decode": "regex:^paged_(decode|attention_sm80|attention_sm100)_mosaic_gpu",
    "prefill": "regex:^paged_(prefill|attention_sm80|attention_sm100)_mosaic_gpu",
}
"""The kernel of a job that is profiled, as ncu takes it."""


def sanitize(tool: str, context: Context) -> Row:
    """Runs the smallest cases under `memcheck` or `synccheck`; failed if it reports an error."""
    left_out = _left_out("smallest", context)
    prefix: list[str] = []
    if context.on_gpu:
        padding = ["--padding=4096"] if tool == "memcheck" else []
        path = hints_tools.find_tool("compute-sanitizer")
        prefix = [path, f"--tool={tool}", *_SANITIZER.split(), *padding]
    command = [*prefix, *_child("smallest", context, leave_out=tuple(left_out))]
    ran = _run(tool, command, context, LIMIT_S - _SPARE_S, _APART)
    row: Row = {"tool": prefix[0] if prefix else _NO_TOOL, "file": _kept(tool, ran, context)}
    if prefix and ran.status is not None:
        row |= hints_tools.sanitizer_figures(ran.output)
    row |= {"ran": _programs_run(ran.output)} | ({"left_out": left_out} if left_out else {})
    if row.get("errors"):
        return row | {"status": "failed", "reason": f"{row['errors']} errors of {tool}"}
    return row | _why_broken(ran, len(hints_work.programs("smallest", context)) - len(left_out))


def profile(job: str, context: Context) -> Row:
    """Profiles one launch of a job's kernel with ncu, the clocks as they are."""
    if left_out := _left_out(job, context):
        raise RuntimeError(str(left_out))
    name = f"ncu {job}"
    report = context.work / "hints" / f"{job}.ncu-rep"
    report.unlink(missing_ok=True)
    prefix: list[str] = []
    if context.on_gpu:
        options = "--clock-control=none --target-processes=all --launch-skip=1 --launch-count=1 -f"
        sections = [f"--section={section}" for section in _SECTIONS]
        prefix = [hints_tools.find_tool("ncu"), *options.split(), *sections]
        prefix += ["--kernel-name", KERNELS[job], "-o", str(report)]
    command = [*prefix, *_child(job, context, times=3)]
    ran = _run(name, command, context, LIMIT_S - (1 + len(_PAGES)) * _SPARE_S)
    row: Row = {"tool": prefix[0] if prefix else _NO_TOOL, "file": _kept(name, ran, context)}
    row["ran"] = _programs_run(ran.output)
    if not prefix:
        return row | _why_broken(ran, 1)
    if not report.exists():
        hints_tools.raise_refusal("ncu", ran.output)
        broken = _why_broken(ran, 1) or {"status": "failed", "reason": "ncu wrote no report"}
        end = hints_tools.end_of(ran.output)
        return row | broken | {"reason": f"{broken['reason']}; its output ends:\n{end}"}
    return row | _pages(prefix[0], report, context)


def _pages(ncu: str, report: pathlib.Path, context: Context) -> Row:
    """Keeps the pages of a report as text, and itself; returns the figures."""
    folder, job = context.results / "hints", report.stem
    files, texts = [], {}
    for suffix, options in _PAGES.items():
        command = [ncu, f"--import={report}", *options.split()]
        log = context.work / "hints" / f"{job} {suffix}"
        page = hints_tools.run(command, log, _SPARE_S, {})
        texts[suffix] = page.output
        files.append(hints_tools.keep(folder, f"ncu-{job}-{suffix}", page.output))
    files.append(hints_tools.keep(folder, f"ncu-{job}.ncu-rep", report.read_bytes()))
    return hints_tools.profile_figures(texts["raw.csv"]) | {"files": files}


def dump_thunks(context: Context) -> None:
    """Compiles the step of two layers in a process that dumps its thunks, and keeps them.

    Raises:
      NotImplementedError: there is neither a GPU nor what compiles without one.
      RuntimeError: the process failed.
    """
    path = _thunks_path(context)
    path.with_suffix(".json").unlink(missing_ok=True)
    try:
        programs.write(path, _dumped(context).encode())
    except Exception as error:
        programs.write(path.with_suffix(".json"), json.dumps(failure(error)).encode())
        raise


def _dumped(context: Context) -> str:
    """Returns the thunks of the step that another process compiles."""
    folder = context.work / "hints" / _thunks_path(context).stem
    shutil.rmtree(folder, ignore_errors=True)
    autotuned = context.work / "autotuned"
    autotuned.mkdir(parents=True, exist_ok=True)
    flags = [f"--xla_dump_to={folder}", f"--xla_gpu_per_fusion_autotune_cache_dir={autotuned}"]
    flags.append("--xla_gpu_experimental_autotune_cache_mode=AUTOTUNE_CACHE_MODE_UPDATE")
    log = folder.with_suffix(".log")
    environment = dict(_ENVIRONMENT) | {"XLA_FLAGS": " ".join(flags)}
    ran = hints_tools.run(_child("thunks", context), log, LIMIT_S - _SPARE_S, environment)
    if ran.status != 0:
        end = hints_tools.end_of(ran.output)
        if not context.on_gpu and "cannot compile for" in ran.output:
            raise NotImplementedError(end)
        raise RuntimeError(f"{_how_it_ended(ran)}; its output ends:\n{end}")
    sequence = hints_work.dumped_sequence(folder)
    shutil.rmtree(folder)
    return sequence


def count_thunks(context: Context) -> Row:
    """Counts the thunks of the step, dumped ahead; keeps the dump."""
    path = _thunks_path(context)
    if path.with_suffix(".json").exists():
        return json.loads(path.with_suffix(".json").read_text())
    if not path.exists():
        dump_thunks(context)
    sequence = path.read_text()
    kept = hints_tools.keep(context.results / "hints", "thunks.txt.gz", sequence)
    return hints_tools.thunk_figures(sequence) | {"file": kept}


def _thunks_path(context: Context) -> pathlib.Path:
    return programs.path_of("hints thunks", context, ".txt")


def _child(
    job: str, context: Context, times: int = 1, leave_out: tuple[str, ...] = ()
) -> list[str]:
    """Returns the command that runs a job."""
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite.hints_child",
        f"--job={job}",
        f"--context={json.dumps(context.fields())}",
        f"--times={times}",
        *(f"--leave_out={name}" for name in leave_out),
    ]


def _left_out(job: str, context: Context) -> dict[str, str]:
    """Returns which programs of a job cannot be loaded, and why: the tools are no place to compile.

    Raises:
      NotImplementedError: an implementation refuses all of them.
      programs.NotCompiledError, RuntimeError: none of them is compiled.
    """
    reasons: dict[str, Exception] = {}
    wanted = hints_work.programs(job, context)
    for program in wanted:
        if programs.find(program.name, context) is not None:
            continue
        if not programs.is_settled(program.name, context):
            reasons[program.name] = RuntimeError(f"{program.name} was not compiled ahead")
            continue
        try:
            programs.load(program, context)
        except (NotImplementedError, programs.NotCompiledError) as error:
            reasons[program.name] = error
    if len(reasons) == len(wanted):
        raise next(iter(reasons.values()))
    return {name: f"{type(error).__name__}: {error}"[:300] for name, error in reasons.items()}


def _run(
    name: str,
    command: list[str],
    context: Context,
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> hints_tools.Ran:
    """Runs the child, behind a tool if there is one."""
    log = context.work / "hints" / f"{name}.log"
    return hints_tools.run(command, log, limit_s, dict(_ENVIRONMENT) | (environment or {}))


def _kept(name: str, ran: hints_tools.Ran, context: Context) -> str:
    return hints_tools.keep(context.results / "hints", f"{name.replace(' ', '-')}.txt", ran.output)


def _programs_run(output: str) -> dict[str, str]:
    """Returns which programs the child ran, and where they came from."""
    lines = [line for line in output.splitlines() if line.startswith(hints_child.MARK)]
    parts = [line.removeprefix(hints_child.MARK).split(" | ") for line in lines]
    return {name: source for name, source, _ in parts}


def _how_it_ended(ran: hints_tools.Ran) -> str:
    if ran.status is None:
        return f"killed after {ran.took_s:.0f} s"
    return f"exit status {ran.status}"


def _why_broken(ran: hints_tools.Ran, num_programs: int) -> Row:
    """Returns the status and the reason if not all programs ran."""
    if ran.status is None:
        return {"status": "timed out", "reason": _how_it_ended(ran)}
    num_run = len(_programs_run(ran.output))
    if ran.status == 0 and num_run == num_programs:
        return {}
    reason = f"{num_run} of {num_programs} programs ran, {_how_it_ended(ran)}"
    return {"status": "failed", "reason": f"{reason}:\n{hints_tools.end_of(ran.output)}"}


def _cases(context: Context) -> list[Case]:
    def of_tool(name: str, run: functools.partial[Row], job: str) -> Case:
        return Case(
            name,
            run,
            programs=functools.partial(hints_work.programs, job, context),
            limit_s=LIMIT_S,
            run_s=12.0 if context.on_gpu else 4.0,
            environment=_ENVIRONMENT,
        )

    thunks = Case(
        "thunks",
        count_thunks,
        prepare=dump_thunks,
        limit_s=LIMIT_S,
        run_s=0.1,
        prepare_s=15.0 if context.on_gpu else 10.0,
        environment=_ENVIRONMENT,
    )
    cases = [
        of_tool("memcheck", functools.partial(sanitize, "memcheck"), "smallest"),
        of_tool("synccheck", functools.partial(sanitize, "synccheck"), "smallest"),
        of_tool("ncu decode", functools.partial(profile, "decode"), "decode"),
        of_tool("ncu prefill", functools.partial(profile, "prefill"), "prefill"),
        thunks,
    ]
    return cases if context.on_gpu else cases[::2]  # one of each kind


STAGE = Stage(
    "hints",
    60,
    _cases,
    (
        "errors",
        "duration_us",
        "dram_percent",
        "sm_percent",
        "occupancy_percent",
        "registers",
        "bank_conflicts",
        "stalls",
        "thunks",
        "command_buffers",
        "whiles",
        "conditionals",
    ),
)
