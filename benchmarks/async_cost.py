"""How many steps per second concurrent callers leave a device that takes a constant time per step.

  python -m benchmarks.async_cost                                    # about a minute
  python -m benchmarks.async_cost --num_seqs=256 --kinds=deltas --profile

The engine is the real one, with its thread of the steps, its event loop, its text and a coroutine
for each request; only the device's step is a sleep, during which other threads run. `share` is the
steps per second of what the device alone would do, 1 / --device_ms. The two threads' CPU time per
step says where the rest goes: together they cannot take less than that of one interpreter's lock,
whatever the cores are, and where they would run side by side, not less than the longer of them.
"""

import asyncio
import concurrent.futures
import contextlib
import cProfile
import functools
import json
import multiprocessing
import pathlib
import pstats
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import tables
from benchmarks.instant_engine import SleepingDevice, build_parts
from pallas_paged.engine import garbage
from pallas_paged.engine.async_engine import AsyncEngine
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_paged.engine.text.tokenizer import load_tokenizer
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

KINDS = {"deltas": RequestOutputKind.DELTA, "final": RequestOutputKind.FINAL_ONLY}
TARGET = 0.95
"""The share of the device's steps that is to be reached, of 256 sequences with text in deltas."""
_TARGET_CASE = (256, "deltas")

_DEVICE_MS = flags.DEFINE_float("device_ms", 10.0, "Duration of a step.", lower_bound=0.01)
_NUM_SEQS = flags.DEFINE_list("num_seqs", ["64", "256", "1024"], "Running sequences.")
command_line.integers_only("num_seqs", "256")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), f"What callers get: {', '.join(KINDS)}.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 200, "Decode steps to time.", lower_bound=1)
_WARM_STEPS = flags.DEFINE_integer("warm_steps", 40, "Decode steps before.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each case; the best counts.", lower_bound=1)
_SWITCH_MS = flags.DEFINE_float(
    "switch_ms", 1e3 * sys.getswitchinterval(), "For sys.setswitchinterval.", lower_bound=0.001
)
_GC = flags.DEFINE_enum(
    "gc", "served", ["served", "python"], "Garbage as programs that serve have it, or as it is."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Also print where the time goes, in all threads.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_PROMPT_LEN, _FIRST_TOKEN = 64, 260
"""Every token is text; those before are special or bytes, of which a character may need several."""
_ROOM = 1000
"""Tokens that requests may still generate when all steps are timed: clocks may be read late."""


class Reading(NamedTuple):
    """What the clocks say between two steps.

    Attributes:
      num_steps: dispatched so far.
      wall_s: the wall clock.
      cpu_s: CPU time of the thread of the steps.
    """

    num_steps: int
    wall_s: float
    cpu_s: float


async def _call(engine: AsyncEngine, name: str, params: SamplingParams, prompt: list[int]) -> str:
    """Returns the text that a caller gets."""
    make_group = functools.partial(engine.parts.intake.make_group, prompt, params, name)
    stream = await engine.open(name, make_group, prompt=None, kind=params.output_kind)
    return "".join([output.outputs[0].text or "" async for output in stream])


async def _measure(engine: AsyncEngine, num_seqs: int, kind: RequestOutputKind) -> dict[str, float]:
    """Returns the figures of the timed steps, all of whose sequences run."""
    num_steps = _WARM_STEPS.value + _NUM_STEPS.value + _ROOM
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True, output_kind=kind)
    rng = np.random.default_rng(0)
    shape = (num_seqs, _PROMPT_LEN)
    prompts = rng.integers(_FIRST_TOKEN, engine.parts.vocab_size, shape).tolist()
    may_begin = threading.Event()
    holding = asyncio.create_task(engine.call(may_begin.wait))  # until all can be added at once
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_call(engine, f"{index}", params, prompt))
            for index, prompt in enumerate(prompts)
        ]
        await asyncio.sleep(0)  # all are on their way
        may_begin.set()
        await holding
        figures = await _time(engine, num_seqs)
        for index in range(num_seqs):
            engine.abort(f"{index}")
    assert all(task.result() for task in tasks)
    return figures


async def _time(engine: AsyncEngine, num_seqs: int) -> dict[str, float]:
    core = engine.parts.core

    def read() -> Reading:
        assert core.scheduler.num_running == num_seqs, core.scheduler.num_running
        return Reading(core.num_steps, time.perf_counter(), time.thread_time())

    async def reach(num_steps: int) -> None:
        while core.num_steps < num_steps:
            await asyncio.sleep(1e-2)

    await reach(_WARM_STEPS.value)
    before, begin_s = await engine.call(read), time.thread_time()
    with _profiled():
        await reach(before.num_steps + _NUM_STEPS.value)
    after, end_s = await engine.call(read), time.thread_time()
    steps = after.num_steps - before.num_steps
    step_ms = 1e3 * (after.wall_s - before.wall_s) / steps
    return {
        "step ms": step_ms,
        "steps thread ms": 1e3 * (after.cpu_s - before.cpu_s) / steps,
        "callers thread ms": 1e3 * (end_s - begin_s) / steps,
        "share": _DEVICE_MS.value / step_ms,
    }


@contextlib.contextmanager
def _profiled() -> Iterator[None]:
    if not _PROFILE.value:
        yield
        return
    with cProfile.Profile() as profile:  # of both threads
        yield
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


async def _run(num_seqs: int, kind: RequestOutputKind) -> dict[str, float]:
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    assert tokenizer is not None
    room = _WARM_STEPS.value + _NUM_STEPS.value + _ROOM
    parts = build_parts(
        tokenizer,
        [_PROMPT_LEN] * num_seqs,
        _PROMPT_LEN + room,
        room,
        _FIRST_TOKEN,
        functools.partial(SleepingDevice, step_s=1e-3 * _DEVICE_MS.value),
    )
    engine = AsyncEngine(parts, num_seqs)
    if _GC.value == "served":
        garbage.leave_to_requests()
    try:
        return await _measure(engine, num_seqs, kind)
    finally:
        await engine.shutdown()


def measure(num_seqs: int, kind: str) -> dict[str, Any]:
    """Returns the row of a case, of its best run."""
    sys.setswitchinterval(1e-3 * _SWITCH_MS.value)
    runs = [asyncio.run(_run(num_seqs, KINDS[kind])) for _ in range(_REPEATS.value)]
    best = max(runs, key=lambda figures: figures["share"])
    host = best["steps thread ms"], best["callers thread ms"]
    met = "met" if best["share"] >= TARGET else "missed"
    return {
        "num_seqs": num_seqs,
        "kind": kind,
        **best,
        "worst share": min(figures["share"] for figures in runs),
        "bound": min(1.0, _DEVICE_MS.value / sum(host)),
        "side by side": min(1.0, _DEVICE_MS.value / max(host)),
        "target": TARGET if (num_seqs, kind) == _TARGET_CASE else None,
        "": met if (num_seqs, kind) == _TARGET_CASE else "",
    }


def apart(function: Callable[..., dict[str, Any]], *case: Any) -> dict[str, Any]:
    """Returns what a function does in a fork of this process, which no other case has used."""
    fork = multiprocessing.get_context("fork")  # nothing here starts a device, or its threads
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fork) as pool:
        return pool.submit(function, *case).result()


def main() -> None:
    """Prints the table."""
    if wrong := set(_KINDS.value) - set(KINDS):
        raise ValueError(f"--kinds={','.join(sorted(wrong))} must be of {', '.join(KINDS)}")
    rows = [apart(measure, int(n), kind) for kind in _KINDS.value for n in _NUM_SEQS.value]
    print(
        "CPU ms per step of the thread of the steps and of the callers' event loop; bound: the "
        "share\nthat one interpreter can reach at these, however many cores; side by side: two."
    )
    tables.show(f"steps of {_DEVICE_MS.value:g} ms", rows)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
