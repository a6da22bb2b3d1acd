"""Stages, their cases, and the file in which a stage's results pile up.

A stage runs in a process of its own, and appends a line before and after every case to its file: a
case that takes the process with it is known by its missing result, and a new process goes on behind
it. No jax here: whoever holds the stages together must not hold the GPU.
"""

import json
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]
OPEN = ("unmeasured", "out of time")
"""States of cases that another run with the same folder measures."""


class Context(NamedTuple):
    """What a case knows of the run.

    Attributes:
      on_gpu: whether there is a GPU. Without one, kernels are interpreted and sizes are toys.
      results: the folder with what earlier stages found.
      executable: the file of `--executable`, or None.
    """

    on_gpu: bool
    results: pathlib.Path
    executable: str | None = None

    def ceiling(self, name: str) -> float | None:
        """Returns a measured ceiling of the device, or None where there is none."""
        return results(self.results, "device").get(name, {}).get("per_second")


class Case(NamedTuple):
    """One thing to find out.

    Attributes:
      name: unique in its stage.
      run: returns figures; raises `NotImplementedError` for what an implementation refuses.
      skip: called first; returns why it cannot be run here, or None. Only now the device is asked.
    """

    name: str
    run: Callable[[Context], Row]
    skip: Callable[[], str | None] = lambda: None


class Stage(NamedTuple):
    """Cases that share a time budget, the most important first.

    Attributes:
      name: also of its file.
      budget_s: seconds for all of it.
      case_limit_s: seconds after which a case is given up, and its process with it.
      cases: called with the context.
      columns: keys of the figures that the readable table shows.
      toy: whether it runs without a GPU only when toys are asked for, because it measures speed.
      needs_jax: whether its process uses jax.
    """

    name: str
    budget_s: float
    case_limit_s: float
    cases: Callable[[Context], list[Case]]
    columns: tuple[str, ...]
    toy: bool = True
    needs_jax: bool = True

    def scaled(self, factor: float) -> "Stage":
        """Returns the stage with `factor` times as much time."""
        return self._replace(
            budget_s=factor * self.budget_s, case_limit_s=factor * self.case_limit_s
        )


def append(folder: pathlib.Path, stage: str, row: Row) -> None:
    """Adds a line to the stage's file, at once."""
    with (folder / f"{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: pathlib.Path, stage: str) -> list[Row]:
    """Returns the lines of the stage's file; one that was cut off is dropped."""
    path = folder / f"{stage}.jsonl"
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def results(folder: pathlib.Path, stage: str) -> dict[str, Row]:
    """Returns the last result of each case that has one, by the case's name."""
    return {row["case"]: row for row in read(folder, stage) if "status" in row}


def is_done(result: Row | None) -> bool:
    """Whether a case's result stands."""
    return result is not None and result["status"] not in OPEN


def unfinished(folder: pathlib.Path, stage: str) -> tuple[str, float] | None:
    """Returns the case that began and has no result, and when it began; None if there is none."""
    rows = read(folder, stage)
    if not rows or "status" in rows[-1]:
        return None
    return rows[-1]["case"], rows[-1]["began"]


def run_case(case: Case, context: Context) -> Row:
    """Runs a case; whatever it raises becomes part of the result."""
    begin = time.monotonic()
    try:
        reason = case.skip()
        if reason is not None:
            return {"case": case.name, "status": "skipped", "reason": reason}
        row = {"status": "ok"} | case.run(context)
    except NotImplementedError as error:
        row = {"status": "unsupported", "reason": str(error)}
    except Exception as error:
        row = failure(error)
    return {"case": case.name} | row | {"took_s": round(time.monotonic() - begin, 2)}


def failure(error: Exception) -> Row:
    """Returns an error as a result: what it says, and where it came from."""
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
