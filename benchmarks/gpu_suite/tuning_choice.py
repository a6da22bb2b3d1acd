"""Times a problem's configurations beside each other, chooses one, keeps the choices in a file."""

import datetime
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu_suite.programs import write
from benchmarks.gpu_suite.stage import Program, why_none
from benchmarks.gpu_suite.tuning_problems import Config, Key, Problem, describe
from pallas_paged.ops.attention.config import DecodeConfig, DecodeKey, tuned_file_name
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_tuned import PrefillKey, merged

NOISE = 0.02
TOLERANCE = 3e-2
"""Weights and results are rounded to bfloat16: an eighth of this each, and the weights' errors add
up to at most some times their spread."""
ROUNDS = 7
ROUND_S = 3e-3
"""About how long a candidate is timed at a time."""

Call = Callable[..., tuple[Any, ...]]


class Measured(NamedTuple):
    """Seconds of one configuration in each of the steps."""

    config: Config
    times_s: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        """The geometric mean: each step counts by its ratio, not by its length."""
        return math.exp(statistics.fmean(map(math.log, self.times_s)))


class Outcome(NamedTuple):
    """What came of a problem.

    Attributes:
      best: the choice.
      by_rule: the configuration where none is chosen.
      measured: all that were timed.
      left_out: why each other candidate was not.
      wrong: those of them that gave another result than the one by rule.
      steps: names of the steps, as in `times_s`.
    """

    best: Measured
    by_rule: Measured
    measured: tuple[Measured, ...]
    left_out: Mapping[str, str]
    wrong: tuple[str, ...]
    steps: tuple[str, ...]


def choose(default: Config, measured: Sequence[Measured], noise: float = NOISE) -> Measured:
    """Returns the fastest, or the one with the default configuration if that is as fast."""
    fastest = min(measured, key=lambda result: result.mean_s)
    by_rule = [result for result in measured if result.config == default]
    if by_rule and by_rule[0].mean_s <= fastest.mean_s * (1 + noise):
        return by_rule[0]
    return fastest


def seconds(call: Callable[[], Any], count: int) -> float:
    """Returns the seconds of one of `count` calls that are begun without waiting in between."""
    begin = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / count


class _Step(NamedTuple):
    """A step of an arrangement, with the arrays it is called with."""

    name: str
    arrangement: int
    arguments: tuple[Any, ...]


def tune(
    problem: Problem,
    load: Callable[[Program], Call],
    budget_s: float,
    *,
    rounds: int = ROUNDS,
    timer: Callable[[Callable[[], Any], int], float] = seconds,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Returns what was measured of a problem, and the choice.

    A candidate that cannot be loaded, that fails or that gives another result than the one by rule
    is left out. The candidates that are left take turns.

    Args:
      problem: what to tune.
      load: from one of `problem.programs()` to what calls it and returns its results' leaves.
      budget_s: after half of it no more candidates are loaded, after all of it no more rounds are
        begun; one there is in any case.
      rounds: the most rounds; of each candidate's times the median counts.
      timer: as `seconds`.
      clock: seconds since whenever.

    Raises:
      Exception: whatever kept the configuration by rule from being run.
    """
    begin = clock()
    left_out: dict[str, str] = {}
    wrong: list[str] = []
    arrangements = problem.arrangements()
    rule, *others = problem.candidates()

    def load_all(config: Config) -> list[Call]:
        return [load(problem.attention(config, arrangement)) for arrangement in arrangements]

    functions: dict[Config, list[Call]] = {rule: load_all(rule)}
    for config in others:
        try:
            if clock() - begin > budget_s / 2:
                raise TimeoutError("no time was left to load it")
            functions[config] = load_all(config)
        except Exception as error:
            left_out[describe(config)] = why_none(error)
    compare = [load(problem.compared(arrangement)) for arrangement in arrangements]
    steps = _steps(problem, load(problem.inputs())())
    for step in steps:
        expected = functions[rule][step.arrangement](*step.arguments)
        for config in list(functions)[1:]:
            try:
                actual = functions[config][step.arrangement](*step.arguments)
                (found,) = compare[step.arrangement](tuple(actual), tuple(expected))
                size = float(np.asarray(found))
                if not size <= TOLERANCE:
                    wrong.append(describe(config))
                    left_out[describe(config)] = f"wrong by {size:.2g} in {step.name}"
                    del functions[config]
            except Exception as error:
                _check_device(functions[rule][step.arrangement], step, config)
                left_out[describe(config)] = why_none(error)
                del functions[config]
    times = _times(functions, steps, begin + budget_s, rounds, timer, clock)
    measured = tuple(Measured(config, tuple(found)) for config, found in times.items())
    return Outcome(
        choose(rule, measured),
        measured[0],
        measured,
        left_out,
        tuple(wrong),
        tuple(step.name for step in steps),
    )


def _check_device(by_rule: Call, step: _Step, config: Config) -> None:
    """Raises `RuntimeError` if nothing can be run any more since `config` failed."""
    try:
        jax.block_until_ready(by_rule(*step.arguments))
    except Exception as error:
        raise RuntimeError(
            f"the device fails since {describe(config)} failed in {step.name}"
        ) from error


def _steps(problem: Problem, inputs: Sequence[Any]) -> list[_Step]:
    """Returns the steps; `inputs` are the leaves that `problem.inputs()` makes."""
    arrangements = problem.arrangements()
    queries = inputs[-len(arrangements) :]
    cache = jax.tree.unflatten(jax.tree.structure(problem.cache()), inputs[: -len(arrangements)])
    steps = []
    for i, arrangement in enumerate(arrangements):
        for step in arrangement.steps:
            arrays = map(jax.device_put, problem.step_arrays(arrangement, step))
            name = f"group {arrangement.group}: {step.batch} x {step.context}"
            if step.queries > 1:
                name += f", new {step.queries}"
            steps.append(_Step(name, i, (queries[i], cache, *arrays)))
    return steps


def _times(
    functions: Mapping[Config, Sequence[Call]],
    steps: Sequence[_Step],
    end: float,
    rounds: int,
    timer: Callable[[Callable[[], Any], int], float],
    clock: Callable[[], float],
) -> dict[Config, list[float]]:
    """Returns each candidate's median seconds of each step."""

    def time_once(config: Config, step: _Step, count: int) -> float:
        function = functions[config][step.arrangement]
        return timer(lambda: function(*step.arguments), count)

    rule = next(iter(functions))
    counts = []
    if rounds > 1:  # else nobody looks at the times
        counts = [
            max(1, min(30, round(ROUND_S / max(time_once(rule, step, 1), 1e-9)))) for step in steps
        ]
    samples: list[list[list[float]]] = [[[] for _ in steps] for _ in functions]
    for turn in range(rounds):
        if turn and clock() > end:
            break
        for i, step in enumerate(steps):
            for of_config, config in zip(samples, functions, strict=True):
                of_config[i].append(time_once(config, step, counts[i] if counts else 1))
    return {
        config: [statistics.median(found) for found in of_config]
        for config, of_config in zip(functions, samples, strict=True)
    }


def merged_text(old: str | None, chosen: Mapping[Key, Config], device_kind: str) -> str:
    """Returns the new text of a file of configurations: the chosen ones over those of before."""
    decode: dict[DecodeKey, DecodeConfig] = {}
    prefill: dict[PrefillKey, PrefillTuning] = {}
    for key, config in chosen.items():
        if isinstance(key, DecodeKey) and isinstance(config, DecodeConfig):
            decode[key] = config
        elif isinstance(key, PrefillKey) and isinstance(config, PrefillTuning):
            prefill[key] = config
        else:
            raise TypeError(f"{key} and {config} are not of one kernel")
    about = {
        "device": device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return merged(old, decode, prefill, about)


def keep(folder: pathlib.Path, chosen: Mapping[Key, Config], device_kind: str) -> pathlib.Path:
    """Adds choices to the file of this kind of GPU in `folder`, and returns it.

    Without such a file they are added to what the package ships.
    """
    file = folder / tuned_file_name(device_kind)
    shipped = resources.files("pallas_paged.ops.attention") / "tuned" / file.name
    old = next((source.read_text() for source in (file, shipped) if source.is_file()), None)
    write(file, merged_text(old, chosen, device_kind).encode())
    return file
