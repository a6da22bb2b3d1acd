"""How many steps per second streams over HTTP leave a device that takes a constant time per step.

  python -m benchmarks.http_cost                          # less than a minute
  python -m benchmarks.http_cost --num_seqs=64 --step_ms=20 --profile

The server is the real one, in a process of its own: sockets, JSON, text, the engine's thread; only
the device's step is a sleep. The client is another process on the same machine, and each request is
a stream of a piece per token. `share` is the steps per second of what the device alone would do.
The CPU time per step of the server's two threads says where it goes, and what further cores could
give at most: the threads share an interpreter, whose lock lets one of them run at a time.
"""

import asyncio
import cProfile
import functools
import json
import multiprocessing
import pathlib
import pstats
import threading
import time
import types
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import uvloop
from absl import flags

from benchmarks import tables
from benchmarks.instant_engine import SleepingDevice, build_parts
from benchmarks.serving_client.course import Course
from benchmarks.serving_client.load import Outgoing, open_session, send
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.build import Built
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.model_source import FolderSource
from pallas_paged.engine.serve import server
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.service import ServeOptions, Service
from pallas_paged.engine.text.tokenizer import load_tokenizer
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

TARGET = 0.9
"""The share of the device's steps that is to be reached, by 64 streams and steps of 20 ms."""
_TARGET_CASE = (64, 20.0)

_STEP_MS = flags.DEFINE_float("step_ms", 20.0, "Duration of a step.", lower_bound=0.01)
_NUM_SEQS = flags.DEFINE_list("num_seqs", ["16", "64", "256"], "Streams.")
command_line.integers_only("num_seqs", "64")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 200, "Decode steps to time.", lower_bound=1)
_WARM_STEPS = flags.DEFINE_integer("warm_steps", 50, "Decode steps before.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each case; the median.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Print where the time of the event loop goes.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_PROMPT_LEN, _FIRST_TOKEN, _MODEL = 64, 260, "sleeping"
"""Every token is text; those before are special or bytes, of which a character may need several."""


class _Case(NamedTuple):
    """What a server is made for."""

    num_seqs: int
    step_ms: float
    room: int
    profiles: bool


def _serve(case: _Case, pipe: Connection) -> None:
    """Serves until told to stop; sends its URL, and CPU times when it is asked."""
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    assert tokenizer is not None
    parts = build_parts(
        tokenizer,
        [_PROMPT_LEN] * case.num_seqs,
        _PROMPT_LEN + case.room,
        case.room,
        _FIRST_TOKEN,
        functools.partial(SleepingDevice, step_s=1e-3 * case.step_ms),
    )
    runner: Any = types.SimpleNamespace(programs=None)
    shape: Any = types.SimpleNamespace(vocab_size=tokenizer.vocab_size)
    weights: Any = None  # nothing computes
    source = FolderSource(str(DEMO_MODEL))
    built = Built(parts, runner, tokenizer, shape, _PROMPT_LEN + case.room, weights, source)
    llm = AsyncLLM.of_built(EngineConfig(str(DEMO_MODEL)), built)
    app = make_app(Service(llm, ServeOptions(served_model_names=(_MODEL,))))
    bound = server.bound_socket("127.0.0.1", 0)
    profiler = cProfile.Profile()

    async def run() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        answering = threading.Thread(
            target=_answer, args=(pipe, parts.core, threading.get_ident(), loop, stopping)
        )
        answering.start()
        if case.profiles:
            profiler.enable()
        await server.run(llm, app, bound, stopping, 0.0)

    bound.listen()  # whoever connects now waits, and is not refused
    pipe.send(server.url_of(bound))
    uvloop.run(run())
    if case.profiles:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def _answer(
    pipe: Connection,
    core: Any,
    event_thread: int,
    loop: asyncio.AbstractEventLoop,
    stopping: asyncio.Event,
) -> None:
    """Answers "read" with the number of steps, the time, and the CPU times of the two threads."""
    (steps_thread,) = [one.ident for one in threading.enumerate() if one.name == "engine-loop"]
    assert steps_thread is not None
    while pipe.recv() == "read":
        clocks = [time.pthread_getcpuclockid(each) for each in (steps_thread, event_thread)]
        times = [time.clock_gettime(clock) for clock in clocks]
        pipe.send((core.num_steps, time.perf_counter(), *times))
    loop.call_soon_threadsafe(stopping.set)


async def _drive(url: str, case: _Case, pipe: Connection) -> dict[str, Any]:
    """Returns the figures of the steps that are timed, while all streams run."""
    rng = np.random.default_rng(0)
    bodies = [
        {
            "model": _MODEL,
            "prompt": rng.integers(_FIRST_TOKEN, 1000, _PROMPT_LEN).tolist(),
            "max_tokens": case.room - 8,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(case.num_seqs)
    ]
    begin_s = time.perf_counter()
    async with open_session(None, 600.0) as session:
        requests = [Outgoing(json.dumps(body).encode(), case.room - 8) for body in bodies]
        tasks = [
            asyncio.create_task(send(session, f"{url}/v1/completions", one, 0.0, begin_s))
            for one in requests
        ]
        step_s = 1e-3 * case.step_ms
        await asyncio.sleep(_WARM_STEPS.value * step_s)
        before = await _read(pipe)
        cpu_before, begin = time.process_time(), time.perf_counter()
        await asyncio.sleep(_NUM_STEPS.value * step_s)
        after = await _read(pipe)
        end, client_cpu_s = time.perf_counter(), time.process_time() - cpu_before
        courses = await asyncio.gather(*tasks)
    return _figures(case, courses, before, after, (begin - begin_s, end - begin_s), client_cpu_s)


async def _read(pipe: Connection) -> tuple[float, ...]:
    def ask() -> tuple[float, ...]:
        pipe.send("read")
        answer: tuple[float, ...] = pipe.recv()
        return answer

    return await asyncio.to_thread(ask)


def _figures(
    case: _Case,
    courses: list[Course],
    before: tuple[float, ...],
    after: tuple[float, ...],
    window_s: tuple[float, float],
    client_cpu_s: float,
) -> dict[str, Any]:
    for course in courses:
        if course.problem is not None:
            raise RuntimeError(f"a stream broke: {course.problem}")
        assert course.num_output_tokens == course.max_tokens
    steps, wall_s, steps_cpu_s, event_cpu_s = (b - a for a, b in zip(before, after, strict=True))
    if not steps:
        raise RuntimeError("no step was made while it was timed; use more --num_steps")
    step_ms = 1e3 * wall_s / steps
    gaps = np.concatenate([_gaps(course, window_s) for course in courses])
    host_ms = 1e3 * steps_cpu_s / steps, 1e3 * event_cpu_s / steps
    return {
        "streams": case.num_seqs,
        "step ms": step_ms,
        "share": case.step_ms / step_ms,
        "steps thread ms": host_ms[0],
        "event loop ms": host_ms[1],
        "client ms": 1e3 * client_cpu_s / steps,
        "us per token": 1e3 * host_ms[1] / case.num_seqs,
        "ITL median ms": float(np.median(gaps)),
        "ITL P99 ms": float(np.percentile(gaps, 99)),
        "bound": min(1.0, case.step_ms / sum(host_ms)),
    }


def _gaps(course: Course, window_s: tuple[float, float]) -> np.ndarray:
    """Returns the milliseconds between a stream's pieces, as its client saw them."""
    times = np.array(course.chunk_times_s)
    inside = times[(times >= window_s[0]) & (times <= window_s[1])]
    return 1e3 * np.diff(inside)


def measure(case: _Case) -> dict[str, Any]:
    """Returns the row of one run, with a server of its own."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(case, theirs))
    process.start()
    try:
        url = mine.recv()
        return asyncio.run(_drive(url, case, mine))
    finally:
        mine.send("stop")
        process.join()


def main() -> None:
    """Prints the table."""
    room = _WARM_STEPS.value + 2 * _NUM_STEPS.value
    rows = []
    for num_seqs in map(int, _NUM_SEQS.value):
        case = _Case(num_seqs, _STEP_MS.value, room, _PROFILE.value)
        runs = sorted((measure(case) for _ in range(_REPEATS.value)), key=lambda row: row["share"])
        row = runs[len(runs) // 2]
        is_target = (num_seqs, _STEP_MS.value) == _TARGET_CASE
        met = "met" if row["share"] >= TARGET else "missed"
        rows.append(row | {"target": TARGET if is_target else None, "": met if is_target else ""})
    print(
        "CPU ms per step of the server's two threads and of the client; bound: the share that\n"
        "one interpreter can reach at these, however many cores there are."
    )
    tables.show(f"steps of {_STEP_MS.value:g} ms", rows)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
