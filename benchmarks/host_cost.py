"""What the engine costs the host: CPU time per decode step and per new request.

The engine is the real one (scheduler, block tables, intake, text); its device computes nothing.
Milliseconds are CPU time of a process, which each case has to itself: what earlier ones leave in
memory slows the next. They are compared with a fixed loop that is timed before
and after each case, so that a busy or another machine changes the ratios little: targets are
ratios too, printed as the milliseconds that they are on the machine of `calibration.QUIET_MS`.

  python -m benchmarks.host_cost --json=out.json --plot=out.png       # all cases: minutes
  python -m benchmarks.host_cost --num_seqs=256 --kinds=plain --max_model_len=8192 --profile
"""

import concurrent.futures
import cProfile
import functools
import gc
import itertools
import json
import multiprocessing
import pathlib
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import calibration, made_up_tokenizer, pictures, tables
from benchmarks.instant_engine import House, build
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_paged.engine.text.tokenizer import Tokenizer, load_tokenizer
from pallas_paged.models import command_line


class Kind(NamedTuple):
    """What requests ask for.

    Attributes:
      params: fields of `SamplingParams`.
      target: the kind of step, in `_STEP_TARGETS_MS`, whose target it has; None has none.
      is_whole: whether steps are timed until the requests have ended, for what is made of all their
        tokens comes in the last one; the figure is the mean then.
    """

    params: dict[str, Any]
    target: str | None
    is_whole: bool = False


_FINAL, _DELTA = (
    {"output_kind": kind} for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA)
)
KINDS = {
    "plain": Kind(_FINAL | {"detokenize": False}, "plain"),
    "text": Kind(_FINAL, "text", is_whole=True),  # as in `LLM.generate`
    "deltas": Kind(_DELTA, "text"),
    "stop string": Kind(_FINAL | {"stop": "no such text"}, None),
    "cumulative": Kind({}, None),  # all tokens and text so far, in every step
    "own logprobs": Kind(_FINAL | {"detokenize": False, "logprobs": 0}, None),
    "logprobs": Kind(_FINAL | {"detokenize": False, "logprobs": 1}, None),
    "logprobs+deltas": Kind(_DELTA | {"logprobs": 1}, None),
}
_STEP_TARGETS_MS = {"plain": {256: 1.0, 1024: 3.0}, "text": {256: 1.5, 1024: 5.0}}
_INTAKE_TARGET_MS = 0.3
_TITLES = {"steps": "a decode step", "intake": "a new request of token ids"}

_TABLES = flags.DEFINE_multi_enum("table", list(_TITLES), list(_TITLES), "Which; may be repeated.")
_NUM_SEQS = flags.DEFINE_list("num_seqs", ["64", "256", "1024"], "Running sequences.")
_MAX_MODEL_LEN = flags.DEFINE_list("max_model_len", ["8192", "131072"], "As of the engine.")
_VOCAB_SIZE = flags.DEFINE_list("vocab_size", ["32000", "152000"], "Tokens of the tokenizer.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), f"What requests ask for: {', '.join(KINDS)}.")
_WAITING = flags.DEFINE_list(
    "waiting",
    ["0", "20000"],
    "Requests in the queue while others run. Steps with any are timed for the first kind, the "
    "first max_model_len and the last vocab_size.",
)
for _name in ("num_seqs", "max_model_len", "vocab_size"):
    command_line.integers_only(_name, "256")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 48, "Steps to time.", lower_bound=1)
_WARM_STEPS = flags.DEFINE_integer("warm_steps", 16, "Decode steps before.", lower_bound=2)
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 200, "Requests to time.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_PLOT = flags.DEFINE_string("plot", None, "Draw the steps to this file; needs matplotlib.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also print where the time goes, by wall clock.")

_ROOM_BEHIND = 16
"""Tokens that requests may still generate when all steps are timed."""
_PROMPT_LEN = 1000
"""Tokens of the prompts whose intake is timed."""
_SHARED_LEN = 96
"""Tokens of a running prompt that waiting ones begin with; they have as many of their own."""


def prompt_lens(num_seqs: int, max_model_len: int, room: int) -> list[int]:
    """Returns lengths from 200 to 4,000 tokens; one in 64 is half of `max_model_len`."""
    rng = np.random.default_rng(0)
    lens = np.exp(rng.uniform(np.log(200), np.log(4000), num_seqs)).astype(int)
    lens[::64] = max_model_len // 2 - rng.integers(0, 16, len(lens[::64]))
    return np.minimum(lens, max_model_len - room).tolist()


def running(
    tokenizer: Tokenizer, num_seqs: int, max_model_len: int, kind: Kind, num_waiting: int
) -> House:
    """Returns an engine that decodes `num_seqs` sequences while `num_waiting` requests wait.

    They wait for blocks, and begin with tokens that are cached.
    """
    room = _WARM_STEPS.value + _NUM_STEPS.value + _ROOM_BEHIND
    lens = prompt_lens(num_seqs, max_model_len, room)
    house = build(tokenizer, lens, max_model_len, room, made_up_tokenizer.FIRST_WORD)
    rng = np.random.default_rng(1)
    params = SamplingParams(max_tokens=room, ignore_eos=True, **kind.params)
    draw = functools.partial(rng.integers, made_up_tokenizer.FIRST_WORD, tokenizer.vocab_size)
    prompts = [draw(length).tolist() for length in lens]
    for prompt in prompts:
        house.add(prompt, params)
    house.engine.step()
    waiting = SamplingParams(max_tokens=room, **KINDS["plain"].params)
    for _ in range(num_waiting):
        house.add([*prompts[0][:_SHARED_LEN], *draw(_SHARED_LEN).tolist()], waiting)
    for _ in range(_WARM_STEPS.value):
        house.engine.step()
    return house


def timed(
    title: str, count: int, function: Callable[[], object], *, is_mean: bool = False
) -> dict[str, Any]:
    """Returns what each of `count` calls takes, in milliseconds and in calibration loops."""
    gc.collect()
    before = calibration.calibrate()
    times = []
    for _ in range(count):
        begin = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - begin))
    loop = (before + calibration.calibrate()) / 2
    if _PROFILE.value:
        print(f"\n{title}, {count} times")
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(count):
            function()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    typical = statistics.mean(times) if is_mean else statistics.median(times)
    p90 = sorted(times)[-(-9 * count // 10) - 1]
    return {"ms": typical, "p90 ms": p90, "loop ms": loop, "ratio": typical / loop}


def measure_steps(
    name: str, tokenizer: Tokenizer, max_model_len: int, num_seqs: int, num_waiting: int
) -> dict[str, Any]:
    """Returns the row of a kind of decode step."""
    kind = KINDS[name]
    house = running(tokenizer, num_seqs, max_model_len, kind, num_waiting)
    case = {
        "kind": name,
        "num_seqs": num_seqs,
        "max_model_len": max_model_len,
        "vocab": tokenizer.vocab_size,
        "waiting": num_waiting,
    }
    step, scheduler = house.engine.step, house.engine.core.scheduler
    if kind.is_whole:
        figures = timed(str(case), _NUM_STEPS.value + _ROOM_BEHIND, step, is_mean=True)
        assert not house.engine.has_unfinished
    else:
        # The profile runs the same steps again, so half of them are timed with it.
        figures = timed(str(case), _NUM_STEPS.value // (1 + _PROFILE.value), step)
        assert (scheduler.num_running, scheduler.num_waiting) == (num_seqs, num_waiting)
    target = _STEP_TARGETS_MS[kind.target].get(num_seqs) if kind.target else None
    return case | calibration.judged(figures, target)


def measure_intake(
    name: str, tokenizer: Tokenizer, max_model_len: int, num_waiting: int
) -> dict[str, Any]:
    """Returns the row of a kind of new request."""
    kind = KINDS[name]
    house = running(tokenizer, 8, max_model_len, kind, num_waiting)
    params = SamplingParams(max_tokens=16, **kind.params)
    rng = np.random.default_rng(2)
    length = min(_PROMPT_LEN, max_model_len - 16)
    prompts = itertools.cycle(
        rng.integers(made_up_tokenizer.FIRST_WORD, tokenizer.vocab_size, (32, length)).tolist()
    )
    case = {
        "kind": name,
        "prompt": length,
        "max_model_len": max_model_len,
        "vocab": tokenizer.vocab_size,
        "waiting": num_waiting,
    }
    add = functools.partial(_add_next, house, prompts, params)
    figures = timed(str(case), _NUM_REQUESTS.value, add)
    return case | calibration.judged(figures, _INTAKE_TARGET_MS)


def _add_next(house: House, prompts: Iterator[list[int]], params: SamplingParams) -> None:
    house.add(next(prompts), params)


def apart(measure: Callable[..., dict[str, Any]], *case: Any) -> dict[str, Any]:
    """Returns the row of a case that is measured in a fork of this process."""
    fork = multiprocessing.get_context("fork")  # nothing here starts a device, or its threads
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fork) as pool:
        return pool.submit(measure, *case).result()


def made_up(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer of that size, as the engine loads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        made_up_tokenizer.write(pathlib.Path(folder), vocab_size)
        tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def measure() -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the tables that are asked for."""
    seqs, lens, sizes, waiting = (
        list(map(int, flag.value)) for flag in (_NUM_SEQS, _MAX_MODEL_LEN, _VOCAB_SIZE, _WAITING)
    )
    tokenizers = [made_up(size) for size in sizes]
    steps = list(itertools.product(_KINDS.value, tokenizers, lens, seqs, [0]))
    queues = [count for count in waiting if count]
    steps += itertools.product(_KINDS.value[:1], tokenizers[-1:], lens[:1], seqs, queues)
    kinds = [name for name in _KINDS.value if KINDS[name].target]
    intakes = list(itertools.product(kinds, tokenizers, lens[:1], waiting))
    rows: dict[str, list[dict[str, Any]]] = {}
    if "steps" in _TABLES.value:
        rows["steps"] = [apart(measure_steps, *case) for case in tqdm(steps, "steps", disable=None)]
    if "intake" in _TABLES.value:
        rows["intake"] = [
            apart(measure_intake, *case) for case in tqdm(intakes, "intake", disable=None)
        ]
    return rows


def draw(figure: "pictures.Figure", rows: list[dict[str, Any]]) -> None:
    """Draws the steps with nobody waiting: a line for each kind, length and vocabulary."""
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if not row["waiting"]:
            name = f"{row['kind']}, {row['max_model_len']}, vocabulary {row['vocab']}"
            lines.setdefault(name, []).append((row["num_seqs"], row["ratio"]))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    for name, targets in _STEP_TARGETS_MS.items():
        ratios = [target / calibration.QUIET_MS for target in targets.values()]
        axes.plot(list(targets), ratios, "k_", markersize=16, label=f"target of {name}")
    axes.set(xscale="log", yscale="log", xlabel="running sequences")
    axes.set_ylabel("CPU time of a decode step, in calibration loops")
    axes.legend(fontsize="small")


def main() -> None:
    """Prints the tables."""
    if wrong := set(_KINDS.value) - set(KINDS):
        raise ValueError(f"--kinds={','.join(sorted(wrong))} must be of {', '.join(KINDS)}")
    figure = pictures.new_figure(9, 5) if _PLOT.value else None
    rows = measure()
    print(
        "ms: median CPU time, of text the mean; ratio: to the calibration loop; target: 0.1 is 1 "
        f"ms where the loop takes {calibration.QUIET_MS:.0f} ms"
    )
    for name, title in _TITLES.items():
        if rows.get(name):
            tables.show(title, rows[name])
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    if figure and _PLOT.value:
        draw(figure, rows.get("steps", []))
        pictures.save(figure, _PLOT.value)


if __name__ == "__main__":
    command_line.run(main)
