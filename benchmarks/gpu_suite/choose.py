"""Which cases of which stages a run is about."""

import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage

RERUN = ("missing", "failed", "all")
DEVICE = "device"
"""The stage without which no figure means anything; always run, unless its results are there."""


class Choice(NamedTuple):
    """What is to be run.

    Attributes:
      stages: by name.
      cases: a regular expression, searched for in "STAGE: CASE".
      rerun: "missing": what has no result of these sources; "failed": what something was wrong with
        when it last ran, whatever the sources; "all".
      last: the last result of each case by stage and case, whatever the sources.
    """

    stages: Collection[str]
    cases: str = ""
    rerun: str = "missing"
    last: Mapping[tuple[str, str], Row] = {}


def chosen(all_stages: Sequence[Stage], context: Context, choice: Choice) -> dict[str, list[Case]]:
    """Returns the cases that are to be run, by stage; stages without any are left out."""
    found = {stage.name: _of_stage(stage, context, choice) for stage in all_stages}
    return {name: cases for name, cases in found.items() if cases}


def _of_stage(stage: Stage, context: Context, choice: Choice) -> list[Case]:
    known = stages.results(context.results, stage.name)
    rerun = "missing" if stage.name == DEVICE and choice.rerun == "failed" else choice.rerun

    def is_wanted(case: Case) -> bool:
        if rerun == "missing":
            return not stages.is_done(known.get(case.name))
        last = choice.last.get((stage.name, case.name), {})
        return rerun == "all" or last.get("status") in stages.BROKEN

    cases = [case for case in stage.cases(context) if is_wanted(case)]
    if stage.name == DEVICE:
        return cases
    if stage.name not in choice.stages:
        return []
    return [case for case in cases if re.search(choice.cases, f"{stage.name}: {case.name}")]


def last_results(folder: pathlib.Path, all_stages: Sequence[Stage]) -> dict[tuple[str, str], Row]:
    """Returns the last result of every case in the folders of all sources below `folder`."""
    last: dict[tuple[str, str], Row] = {}
    for one in sorted(folder.iterdir() if folder.exists() else (), key=_date):
        for stage in all_stages:
            for name, row in stages.results(one, stage.name).items():
                last[stage.name, name] = row
    return last


def _date(folder: pathlib.Path) -> str:
    """Returns when results were begun, as text that sorts."""
    return str(stages.results(folder, DEVICE).get("description", {}).get("date", ""))


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True
