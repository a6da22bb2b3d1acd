"""Stages, their cases, and the file in which a stage's results pile up. No jax here.

What a case needs compiled, or worked out on the host, is made ahead by other processes, so that
running it takes seconds; see `programs.py`. Cases run in processes of their own; see
`supervise.py`.
"""

import json
import math
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]
OPEN = ("unmeasured", "out of time")
"""States of cases that the next run with these results measures."""
BROKEN = ("failed", "crashed", "timed out", "out of memory")
"""States of cases that something is wrong with."""


class Program(NamedTuple):
    """A function that is compiled before the case that calls it.

    Attributes:
      name: unique in the suite, and different for every function and every shape.
      function: of arrays or pytrees of them; returns arrays or pytrees of them.
      arguments: returns its arguments, arrays or `jax.ShapeDtypeStruct`s; may take its time.
      donate: which of the arguments it may overwrite.
      options: XLA's own, by name, as `xla_gpu_enable_command_buffer`; on a GPU only.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    donate: tuple[int, ...] = ()
    options: tuple[tuple[str, str], ...] = ()


class Context(NamedTuple):
    """What a case knows of the run.

    Attributes:
      platform: "cpu", or the GPU's architecture, as "sm_90". On a CPU kernels are interpreted and
        sizes are toys.
      results: the folder with the results of these sources, one file per stage.
      work: the folder for everything else: compiled programs, arrays, caches.
      carried: folders with programs that were compiled elsewhere.
      target: one of `deviceless.TARGETS`, where programs are compiled for a GPU that is not there.
      more_time: called with seconds that a case needs beyond its limit, to compile something that
        could not be loaded.
    """

    platform: str
    results: pathlib.Path
    work: pathlib.Path
    carried: tuple[pathlib.Path, ...] = ()
    target: str | None = None
    more_time: Callable[[float], None] = lambda seconds: None

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.platform != "cpu"

    def fields(self) -> Row:
        """Returns all but `more_time` as what JSON can hold."""
        return {
            "platform": self.platform,
            "results": str(self.results),
            "work": str(self.work),
            "carried": [str(folder) for folder in self.carried],
            "target": self.target,
        }

    @classmethod
    def of(cls, fields: Row) -> "Context":
        """Returns the context with these `fields`."""
        results, work = pathlib.Path(fields["results"]), pathlib.Path(fields["work"])
        carried = tuple(map(pathlib.Path, fields["carried"]))
        return cls(fields["platform"], results, work, carried, fields["target"])

    def ceiling(self, name: str) -> float | None:
        """Returns a measured ceiling of the device, or None where there is none."""
        return results(self.results, "device").get(name, {}).get("per_second")


class Case(NamedTuple):
    """One thing to find out.

    Attributes:
      name: unique in its stage.
      run: returns figures; raises `NotImplementedError` for what an implementation refuses.
      skip: called first; returns why it cannot be run here, or None. Only now the device is asked.
      programs: what it loads with `programs.load`, compiled ahead; called often, so it makes no
        arrays.
      prepare: whatever else other processes do ahead, as working out what is expected, or filling
        the compilers' caches.
      limit_s: seconds after which it is given up, once everything is prepared.
      run_s: about how long it takes; for the plan.
      prepare_s: about how long one process prepares it, its programs apart; for the plan.
      environment: variables of the processes that prepare and run it.
    """

    name: str
    run: Callable[[Context], Row]
    skip: Callable[[Context], str | None] = lambda context: None
    programs: Callable[[], tuple[Program, ...]] = tuple
    prepare: Callable[[Context], None] | None = None
    limit_s: float = 10.0
    run_s: float = 0.5
    prepare_s: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()


class Stage(NamedTuple):
    """Cases that share a time budget, the most important first.

    Attributes:
      name: also of its file.
      budget_s: seconds for all of it, of the suite's 480; what earlier stages left over is added.
      cases: called with the context.
      columns: keys of the figures that the readable table shows.
      toy: whether it runs without a GPU only when toys are asked for, because it measures speed.
      parallel: whether several cases may run at a time, because none is timed.
      aims: how many of the first cases the summary shows with their figures before all others.
    """

    name: str
    budget_s: float
    cases: Callable[[Context], list[Case]]
    columns: tuple[str, ...]
    toy: bool = True
    parallel: bool = False
    aims: int = 0


def append(folder: pathlib.Path, stage: str, row: Row) -> None:
    """Adds a line to the stage's file, at once."""
    with (folder / f"{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(_strict(row), allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """Returns a value as JSON can hold it, which knows neither infinity nor NaN: as text."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def results(folder: pathlib.Path, stage: str) -> dict[str, Row]:
    """Returns the last result of each case that has one, by the case's name.

    A line that was cut off or damaged is none.
    """
    path = folder / f"{stage}.jsonl"
    rows: dict[str, Row] = {}
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("case", "status")):
            rows[row["case"]] = row
    return rows


def is_done(result: Mapping[str, Any] | None) -> bool:
    """Whether a case's result stands."""
    return result is not None and result["status"] not in OPEN


def run_case(case: Case, context: Context) -> Row:
    """Runs a case; whatever it raises becomes part of the result."""
    begin = time.monotonic()
    try:
        reason = case.skip(context)
        if reason is not None:
            return {"case": case.name, "status": "skipped", "reason": reason}
        row = {"status": "ok"} | case.run(context)
    except Exception as error:
        row = failure(error)
    return {"case": case.name} | row | {"took_s": round(time.monotonic() - begin, 2)}


def failure(error: Exception) -> Row:
    """Returns an error as a result: what it says, and where it came from."""
    if isinstance(error, NotImplementedError):
        return {"status": "unsupported", "reason": str(error)[:2000]}
    where = "".join(traceback.format_exception(error)[-4:])
    text = f"{type(error).__name__}: {error}"
    is_memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text
    status = "out of memory" if is_memory else "failed"
    return {"status": status, "reason": text[:2000], "where": where[-2000:]}


def why_none(error: Exception) -> str:
    """Returns in a few words why there is no figure."""
    if isinstance(error, NotImplementedError):
        return f"unsupported: {error}"
    return f"{type(error).__name__}: {error}"[:300]


def figure(value: Any) -> str:
    """Returns a figure of a result as text, in at most four digits where that makes sense."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
