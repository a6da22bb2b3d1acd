"""A server over a real socket, in a thread of the test process."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from pallas_paged.engine import AsyncLLM
from pallas_paged.engine.serve import server
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.service import ServeOptions, Service
from pallas_paged.models.demo import DEMO_MODEL

MODEL = "demo"
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_blocks": 200,
    "compilation_cache_dir": None,
    "background_compilation": False,
}
"""An engine that compiles few programs."""


@dataclasses.dataclass(frozen=True)
class Live:
    """A server that runs.

    Attributes:
      url: where it is.
      llm: its engine.
      loop: the event loop of both.
      stopping: tells it to stop.
      status: what the program would end with, once it has.
    """

    url: str
    llm: AsyncLLM
    loop: asyncio.AbstractEventLoop
    stopping: asyncio.Event
    status: concurrent.futures.Future[int]

    def stop(self) -> None:
        """Tells it to stop, if it has not ended."""
        with contextlib.suppress(RuntimeError):  # its event loop is closed
            self.loop.call_soon_threadsafe(self.stopping.set)

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine in the server's event loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=60)

    def assert_idle(self) -> None:
        """Asserts that nothing is left of any request, after at most a few seconds."""
        self.call(until_idle(self.llm))


async def until_idle(llm: AsyncLLM) -> None:
    """Waits until nothing is left of any request; fails after some seconds."""
    engine = llm.engine
    async with asyncio.timeout(20):
        while engine.num_open_requests or not await engine.call(lambda: is_idle(llm)):
            await asyncio.sleep(0.01)


def is_idle(llm: AsyncLLM) -> bool:
    """Whether the core holds no request, and no block; to be called between steps."""
    parts = llm.engine.parts
    if parts.core.has_unfinished:
        return False
    parts.core.scheduler.check_invariants()
    assert parts.memory.num_free_blocks + len(parts.memory.pins) == parts.memory.num_usable_blocks
    assert not parts.processor.request_ids
    return True


@contextlib.contextmanager
def live_server(
    llm: AsyncLLM | None = None, *, grace_s: float = 0.0, **options: Any
) -> Iterator[Live]:
    """Serves an engine, by default the demo model, at a free port; ends both.

    `options` are those of `ServeOptions`.
    """
    llm = AsyncLLM(DEMO_MODEL, **SMALL) if llm is None else llm
    app = make_app(Service(llm, ServeOptions(**{"served_model_names": (MODEL,)} | options)))
    bound = server.bound_socket("127.0.0.1", 0)
    bound.listen()  # who connects before the server runs waits for it
    begun: concurrent.futures.Future[tuple[Any, asyncio.Event]] = concurrent.futures.Future()
    status: concurrent.futures.Future[int] = concurrent.futures.Future()

    async def serve() -> None:
        stopping = asyncio.Event()
        begun.set_result((asyncio.get_running_loop(), stopping))
        status.set_result(await server.run(llm, app, bound, stopping, grace_s))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    live = Live(server.url_of(bound), llm, *begun.result(timeout=60), status)
    try:
        _wait_until_it_listens(bound)
        yield live
    finally:
        live.stop()
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server does not end"


def _wait_until_it_listens(bound: socket.socket) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(bound.getsockname()[:2], timeout=60).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.01)
        else:
            return
