"""A server with OpenAI's API that says what it is told to, when it is told to."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

from aiohttp import web


class Script(NamedTuple):
    """How a request is answered.

    Attributes:
      chunks: texts of chunks; a number is a pause, in seconds.
      usage: prompt, output and cached tokens; None: the server does not say.
      status: another one than 200 is an error with this message.
      message: of an error.
      ending: "done" as it should be, "cut" in the middle, "open" without [DONE], or "error".
    """

    chunks: tuple[str | float, ...] = ("a", "b", "c")
    usage: tuple[int, int, int] | None = (7, 3, 0)
    status: int = 200
    message: str = "no room"
    ending: str = "done"


class FakeServer:
    """What is asked of it, and what it answers.

    Attributes:
      url: where it is.
      requests: the bodies of requests, in their order.
      headers: of the last one.
      most_at_once: requests.
      health: the status of /health, one after the other; the last one stays.
      models: what /v1/models lists.
    """

    def __init__(self, answer: Callable[[int, dict[str, Any]], Script]) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.most_at_once = 0
        self.health = [200]
        self.models: Any = {"data": [{"id": "fake", "max_model_len": 512}, {"id": "other"}]}
        self._answer, self._num_running = answer, 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeServer"]:
        """Serves on a free port."""
        app = web.Application()
        app.router.add_get("/health", self._say_health)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _say_health(self, request: web.Request) -> web.Response:
        status = self.health.pop(0) if len(self.health) > 1 else self.health[0]
        return web.Response(status=status, text="")

    async def _list_models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        script = self._answer(len(self.requests), body)
        self.requests.append(body)
        self.headers = dict(request.headers)
        self._num_running += 1
        self.most_at_once = max(self.most_at_once, self._num_running)
        try:
            if script.status != 200:
                error = {"message": script.message, "code": script.status}
                return web.json_response({"error": error}, status=script.status)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self._stream(script, "chat" in request.path, response)
            if script.ending == "cut":
                assert request.transport is not None
                request.transport.abort()
            return response
        finally:
            self._num_running -= 1

    async def _stream(self, script: Script, is_chat: bool, response: web.StreamResponse) -> None:
        if is_chat:
            await response.write(event({"choices": [{"delta": {"role": "assistant"}}]}))
        for chunk in script.chunks:
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
            else:
                choice = {"delta": {"content": chunk}} if is_chat else {"text": chunk}
                await response.write(event({"choices": [choice]}))
        if script.ending == "error":
            await response.write(event({"error": {"message": script.message}}))
        if script.usage is not None:
            names = ("prompt_tokens", "completion_tokens")
            usage: dict[str, Any] = dict(zip(names, script.usage, strict=False))
            usage["prompt_tokens_details"] = {"cached_tokens": script.usage[2]}
            await response.write(event({"choices": [], "usage": usage}))
        if script.ending == "done":
            await response.write(b"data: [DONE]\n\n")


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@contextlib.contextmanager
def in_thread(*servers: FakeServer) -> Iterator[None]:
    """Serves in a thread, for programs."""
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.serving())
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
