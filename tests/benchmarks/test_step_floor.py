"""What the comparison of a decode step with its parts calls worse."""

import json
import pathlib

import pytest

from benchmarks import step_floor
from benchmarks.step_floor import Case, worse_than
from tests.programs import run_program

CASE = Case("20m", "float32", 16, 128).name
EXPECTED = {CASE: {"floor/step": 0.8, "step/engine": 0.9}}


def figures(
    floor_of_step: float, step_of_engine: float, case: str = CASE
) -> list[dict[str, object]]:
    return [{"case": case, "floor/step": floor_of_step, "step/engine": step_of_engine}]


@pytest.mark.parametrize(
    ("measured", "worse"),
    [
        (figures(0.8, 0.9), []),
        (figures(0.7, 0.95), []),
        (figures(0.6, 0.9), [f"{CASE}: floor/step is 0.60, expected 0.80"]),
        (figures(0.9, 0.5), [f"{CASE}: step/engine is 0.50, expected 0.90"]),
        (figures(0.1, 0.1, "another"), []),
    ],
)
def test_what_is_worse_by_more_than_the_tolerance_is_named(
    measured: list[dict[str, object]], worse: list[str]
) -> None:
    assert worse_than(EXPECTED, measured, tolerance=0.15) == worse


def test_expectations_are_written_compared_and_missed(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "expected.json"
    sizes = "--models=tiny --dtypes=float32 --rows=1 --contexts=9 --rounds=1 --min_ms=0"
    flags = [*sizes.split(), f"--expected={file}"]
    done = run_program("benchmarks.step_floor", *flags, "--update")
    assert done.returncode == 0, done.stderr
    assert set(step_floor.RATIOS) == set(*json.loads(file.read_text()).values())
    too_much = dict.fromkeys(step_floor.RATIOS, 99.0)
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), too_much)))
    done = run_program("benchmarks.step_floor", *flags)
    assert done.returncode == 1
    assert "tiny float32 1 x 9: floor/step is" in done.stdout
