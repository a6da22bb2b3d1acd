"""What a run will do and about how long it will take: from compile times that were measured.

`compile_seconds.csv` has the seconds of a processor that each program took to trace and to compile
for an H100, on a machine without a GPU; see `carry.py`.
"""

import csv
import functools
import heapq
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import tables
from benchmarks.gpu_suite import conduct, preparation, programs
from benchmarks.gpu_suite.preparation import Task
from benchmarks.gpu_suite.stage import Case, Context, Stage

COMPILE_SECONDS = pathlib.Path(__file__).parent / "compile_seconds.csv"
START_S = 10.0
"""A guess: a process starts, imports everything, and asks the device."""
MAX_JOBS = 16
"""Processes by default: each takes about half a GiB of the GPU's memory, and two of the host's."""
_CORES_FILE = pathlib.Path("/sys/fs/cgroup/cpu.max")
_UNKNOWN_S = 5.0
_LOAD_S = 0.05


class StagePlan(NamedTuple):
    """What is expected of a stage.

    Attributes:
      name: of it.
      cases: how many there are.
      programs: how many it is the first to need, and that are not compiled yet.
      ahead_s: seconds that one process would take to compile and prepare what is new.
      run_s: seconds of the cases themselves, one after the other.
      begin_s, end_s: since the start of the program.
      deadline_s: when its time is over.
    """

    name: str
    cases: int
    programs: int
    ahead_s: float
    run_s: float
    begin_s: float
    end_s: float
    deadline_s: float


@functools.cache
def compile_seconds() -> Mapping[str, float]:
    """Returns the seconds of each measured program, by name."""
    if not COMPILE_SECONDS.exists():
        return {}
    with COMPILE_SECONDS.open(newline="", encoding="utf-8") as lines:
        return {name: float(seconds) for name, seconds in list(csv.reader(lines))[1:]}


def write_compile_seconds(seconds: Mapping[str, float]) -> None:
    """Replaces the table."""
    with COMPILE_SECONDS.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("program", "seconds"))
        writer.writerows((name, f"{each:.1f}") for name, each in sorted(seconds.items()))


def estimate_s(task: Task, case: Case) -> float:
    """Returns about how long a process takes for a task; `case` is the first that needs it."""
    if task.do == "prepare":
        return case.prepare_s
    return compile_seconds().get(task.name, _UNKNOWN_S)


def deadlines(
    all_stages: Sequence[Stage], cases: Mapping[str, Sequence[Case]], budget_s: float
) -> dict[str, float]:
    """Returns by when each stage with cases must end, in seconds since the start.

    Their budgets are shares of `budget_s`; what one leaves is the next one's.
    """
    own = {stage.name: stage.budget_s for stage in all_stages if stage.name in cases}
    total, used, found = sum(own.values()), 0.0, {}
    for name, share in own.items():
        used += share
        found[name] = budget_s * used / total
    return found


def plan(
    all_stages: Sequence[Stage],
    cases: Mapping[str, Sequence[Case]],
    context: Context,
    jobs: int,
    budget_s: float,
) -> list[StagePlan]:
    """Returns what is expected if nothing fails and every estimate is right."""
    limits = deadlines(all_stages, cases, budget_s)
    first: dict[Task, tuple[str, float]] = {}
    for name in cases:
        for case in cases[name]:
            for task in preparation.tasks_of(name, case):
                is_there = task.do == "compile" and programs.is_settled(task.name, context)
                first.setdefault(task, (name, 0.0 if is_there else estimate_s(task, case)))
    every = [(name, case) for name in cases for case in cases[name]]
    free = [2 * START_S] * num_preparing(jobs)
    ready_s: dict[Task, float] = {}
    for task in preparation.in_order(every, estimate_s):
        begin = heapq.heappop(free)
        ready_s[task] = begin + first[task][1]
        heapq.heappush(free, ready_s[task])
    plans, now = [], START_S
    for stage in all_stages:
        if stage.name not in cases:
            continue
        begin = now
        runners = [now + (START_S if stage.parallel else 0.0)] * conduct.num_running(stage, context)
        for case in cases[stage.name]:
            needed = [ready_s[task] for task in preparation.tasks_of(stage.name, case)]
            at = max([heapq.heappop(runners), *needed])
            heapq.heappush(runners, at + case.run_s + _LOAD_S * len(needed))
        now = max(runners)
        new = [(task, each) for task, (owner, each) in first.items() if owner == stage.name]
        plans.append(
            StagePlan(
                stage.name,
                len(cases[stage.name]),
                sum(task.do == "compile" and each > 0 for task, each in new),
                sum(each for _, each in new),
                sum(case.run_s for case in cases[stage.name]),
                begin,
                now,
                limits[stage.name],
            )
        )
    return plans


def num_cores() -> int:
    """Returns how many cores this process may use, at most `MAX_JOBS`.

    A container sees all cores of its host, but may have a share of their time only.
    """
    cores = len(os.sched_getaffinity(0))
    if _CORES_FILE.exists():
        quota, period = _CORES_FILE.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, min(MAX_JOBS, cores))


def num_preparing(jobs: int) -> int:
    """Returns how many of `jobs` processes prepare; where there are many, two cores stay free."""
    return jobs - 2 if jobs > 4 else jobs


def table(plans: Sequence[StagePlan], jobs: int, budget_s: float) -> str:
    """Returns plans as text."""
    heading = ["stage", "cases", "programs", "ahead, s", "run, s", "from, s", "to, s", "until, s"]
    lines: list[list[object]] = [list(heading)]
    for each in plans:
        lines.append([each.name, each.cases, each.programs, *(round(x) for x in each[3:])])
    end_s = plans[-1].end_s if plans else 0.0
    num_cases, num_programs = sum(p.cases for p in plans), sum(p.programs for p in plans)
    return (
        f"{tables.render(lines, left=1)}\n\n{num_cases} cases. {num_programs} programs to compile "
        f"and what is prepared would take one process {sum(p.ahead_s for p in plans):.0f} s; "
        f"{num_preparing(jobs)} work at a time.\nAbout {end_s:.0f} s of {budget_s:.0f} s."
    )
