"""Hundreds of clients that come and go at a server whose memory is far too small for them.

  python -m benchmarks.soak --seconds=300 --clients=200

They read their answers whole or as streams, slowly or not; go in the middle, before the answer,
and while they send; have little time; and send what is wrong. They ask for one completion and
several, sampled and greedy, with stop strings, log-probabilities, grammars and beams. The server
runs in this process, over a real socket, with the demo model in float32 and `deterministic=True`,
and a pool that holds a fraction of what is asked for at once: requests are swapped out and computed
again.

Every answer that is read to its end must be the one that `LLM` gives to the request alone, bit for
bit. All clients stop twice, when a third of the time is over, and at the end. Each time no block
and no task may be left of them; and at the end no more threads, open files and, but for
--tolerance_mib, memory than the first time. It reads these in /proc, so it needs Linux.

With --url the clients go to a server elsewhere, that was started with
`--dtype=float32 --deterministic`; only its answers are looked at then. Ends with status 1 if
anything was wrong.
"""

import asyncio
import collections
import contextlib
import json
import logging
import os
import pathlib
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import uvloop
from absl import flags

from benchmarks import tables
from benchmarks.soak_client.client import Client
from benchmarks.soak_client.kinds import Kind, make_kinds
from pallas_paged.engine import LLM
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.serve import server
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.service import ServeOptions, Service
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_SECONDS = flags.DEFINE_float("seconds", 300.0, "How long clients come.", lower_bound=1)
_CLIENTS = flags.DEFINE_integer("clients", 200, "Clients at once.", lower_bound=1)
_URL = flags.DEFINE_string("url", None, "A server to go to; by default one in this process.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what they do.")
_TOLERANCE_MIB = flags.DEFINE_float("tolerance_mib", 64.0, "What memory may grow by, in MiB.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_SAME: dict[str, Any] = {
    "dtype": "float32",
    "deterministic": True,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "compilation_cache_dir": None,
}
_SMALL: dict[str, Any] = {"num_blocks": 32, "swap_space": 0.001, "preemption_mode": "swap"}
_MAX_QUEUED = 96
_MAX_SHOWN = 10
_IDLE_S = 30.0
"""Seconds that the last requests have to go."""


class Left(NamedTuple):
    """What a server holds while nobody asks it anything."""

    blocks: int
    tasks: int
    threads: int
    files: int
    rss_mib: float


class Here(NamedTuple):
    """A server in this process.

    Attributes:
      url: where it is.
      llm: its engine.
      loop: its event loop.
    """

    url: str
    llm: AsyncLLM
    loop: asyncio.AbstractEventLoop

    def left(self, num_tasks: int | None = None) -> Left:
        """Returns what it holds once no request is left, nor more than so many tasks.

        Or, if that does not come to be, what it holds after a while.
        """
        left = self._left(num_tasks)
        return asyncio.run_coroutine_threadsafe(left, self.loop).result(_IDLE_S + 10)

    async def _left(self, num_tasks: int | None) -> Left:
        engine, memory = self.llm.engine, self.llm.engine.parts.memory
        end = time.monotonic() + _IDLE_S
        while True:
            await engine.call(engine.parts.core.scheduler.check_invariants)
            blocks = memory.num_usable_blocks - memory.num_free_blocks
            tasks = len(asyncio.all_tasks())
            is_over = not (engine.num_open_requests or engine.parts.core.has_unfinished or blocks)
            if (is_over and tasks <= (num_tasks or tasks)) or time.monotonic() > end:
                break
            await asyncio.sleep(0.05)
        num_pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        rss_mib = num_pages * resource.getpagesize() / 2**20
        num_files = len(os.listdir("/proc/self/fd"))
        return Left(blocks, tasks, threading.active_count(), num_files, rss_mib)

    def preemptions(self) -> dict[str, int]:
        """Returns how often a request lost its blocks, by what became of them."""
        scheduler = self.llm.engine.parts.core.scheduler
        num_swapped = scheduler.host_pool.num_swaps
        num_others = scheduler.num_preemptions - num_swapped
        return {"swapped out": num_swapped, "computed again": num_others}


class Course(NamedTuple):
    """What came of all clients.

    Attributes:
      counts: of what they did and what became of it.
      left: at the beginning, after a third of the time, and at the end; empty of another's server.
      preemptions: see `Here`.
      faults: what was wrong.
    """

    counts: collections.Counter[tuple[str, str]]
    left: list[Left]
    preemptions: dict[str, int]
    faults: list[str]


def main() -> None:
    """Runs the clients, prints what became of them, and ends with 1 if anything was wrong."""
    logging.getLogger("pallas_paged").setLevel(logging.WARNING)
    kinds = make_kinds(LLM(DEMO_MODEL, **_SAME, num_blocks=400), _SEED.value)
    if _URL.value:
        course = run(_URL.value, kinds, None)
    else:
        with serving() as here:
            course = run(here.url, kinds, here)
    report(course)
    if course.faults:
        sys.exit(1)


def run(url: str, kinds: Sequence[Kind], here: Here | None) -> Course:
    """Lets the clients come twice; `here` is the server if it is in this process."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    faults: list[str] = []
    left = [] if here is None else [here.left()]
    for part, share in enumerate((1 / 3, 2 / 3)):
        seeds = range(part * _CLIENTS.value, (part + 1) * _CLIENTS.value)
        clients = [Client(url, kinds, _SEED.value + seed) for seed in seeds]
        asyncio.run(_run_all(clients, _SECONDS.value * share))
        for client in clients:
            counts += client.counts
            faults += client.faults
        if here is not None:
            left.append(here.left(left[0].tasks))
    preemptions = {} if here is None else here.preemptions()
    faults += [f"no request was {what}" for what, number in preemptions.items() if not number]
    return Course(counts, left, preemptions, faults + _leaks(left))


async def _run_all(clients: Sequence[Client], seconds: float) -> None:
    end = time.monotonic() + seconds
    await asyncio.gather(*(client.run(end) for client in clients))


def _leaks(left: Sequence[Left]) -> list[str]:
    """Returns what is left of clients that have gone."""
    if not left:
        return []
    begin, middle, end = left
    found = [f"{one.blocks} blocks are not free" for one in (middle, end) if one.blocks]
    for field in ("tasks", "threads", "files"):
        before, after = getattr(begin if field == "tasks" else middle, field), getattr(end, field)
        if after > before:
            found.append(f"there are {after} {field}, and there were {before}")
    growth = end.rss_mib - middle.rss_mib
    if growth > _TOLERANCE_MIB.value:
        found.append(f"memory has grown by {growth:.0f} MiB, from {middle.rss_mib:.0f}")
    return found


@contextlib.contextmanager
def serving() -> Iterator[Here]:
    """Serves the demo model, over a pool that is too small, in a thread of this process."""
    llm = AsyncLLM(DEMO_MODEL, max_queued_requests=_MAX_QUEUED, **_SAME, **_SMALL)
    app = make_app(Service(llm, ServeOptions(("demo",), body_timeout_s=5.0)))
    bound = server.bound_socket("127.0.0.1", 0)
    bound.listen(1024)  # now: clients come at once
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stopping = asyncio.Event()
        begun.set_result((asyncio.get_running_loop(), stopping))
        await server.run(llm, app, bound, stopping, 1.0)

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    loop, stopping = begun.result()
    try:
        yield Here(server.url_of(bound), llm, loop)
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()


def report(course: Course) -> None:
    """Prints what became of the clients; writes it where --json says."""
    counts = sorted(course.counts.items())
    rows = [{"a client": name, "and": result, "times": number} for (name, result), number in counts]
    print(tables.render([list(rows[0]), *(list(row.values()) for row in rows)], left=2))
    for what, number in course.preemptions.items():
        print(f"{number} times a request was {what}")
    if course.left:
        moments = ("at first", "after a third", "at the end")
        held = zip(moments, course.left, strict=True)
        tables.show("What the server holds", [{"": when} | one._asdict() for when, one in held])
    print(f"\n{len(course.faults)} faults")
    for fault in course.faults[:_MAX_SHOWN]:
        print(f"  {fault}")
    if _JSON.value:
        figures: dict[str, Any] = {"counts": rows, "left": [one._asdict() for one in course.left]}
        figures |= {"preemptions": course.preemptions, "faults": course.faults}
        pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    command_line.run(main)
