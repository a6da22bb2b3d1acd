"""One HTTP request while it is served: its body, its client, its streams, its line in the log."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from pallas_paged.engine.engine_client import EngineClient
from pallas_paged.engine.errors import EngineError
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.serve.counts import Counts
from pallas_paged.engine.serve.http_errors import HttpError
from pallas_paged.engine.text.prompts import Params, Prompt

logger = logging.getLogger("pallas_paged.engine.serve.requests")


_OF_THE_REQUEST = ("structured_outputs: ", "no token is left: ")
"""How reasons begin for which the engine ends a request whose rules cannot be followed."""


class ClientGoneError(Exception):
    """The client has closed its connection; there is nobody to answer."""


class Exchange:
    """What the server knows of a request, from its arrival to its last byte.

    Attributes:
      request_id: the client's, or a new one; what the engine calls it begins with that.
      streams: of the engine's requests that it became.
      counts: of its tokens, once it is known what it asks for.
      names: of the request's fields, by what the engine calls them, where these differ.
    """

    def __init__(self, request_id: str, path: str):
        """Begins now."""
        self.request_id = request_id
        self.streams: list[RequestStream] = []
        self.counts: Counts | None = None
        self.names: dict[str, str] = {}
        self._path = path
        self._begin = time.monotonic()
        self._is_logged = False

    async def submit(
        self,
        llm: EngineClient,
        prompts: Sequence[Prompt],
        params: Params,
        *,
        priority: int | None,
        timeout_s: float | None,
    ) -> None:
        """Queues a request for each prompt: all or, if one is refused, none."""
        # Two clients may choose the same id, and one may try again before its first try is over.
        name = f"{self.request_id}-{uuid.uuid4().hex[:12]}"
        names = [f"{name}-{index}" if index else name for index in range(len(prompts))]
        streams: dict[int, RequestStream] = {}

        async def submit(index: int) -> None:
            streams[index] = await llm.submit(
                prompts[index], params, names[index], priority=priority, timeout_s=timeout_s
            )

        submitted = map(submit, range(len(prompts)))
        try:
            results = await asyncio.gather(*submitted, return_exceptions=True)
        finally:  # also where the client has gone meanwhile
            self.streams = [streams[index] for index in sorted(streams)]
        for index, error in enumerate(results):
            if error is not None:
                self.close()
                if isinstance(error, ValueError) and len(prompts) > 1:
                    raise ValueError(f"prompt[{index}]: {error}") from error
                raise error

    def close(self) -> None:
        """Aborts what has not ended."""
        for stream in self.streams:
            stream.close()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields the outputs of all streams, as they come, with the stream's place.

        Raises:
          ClientGoneError: `close` was called before the end.
          EngineError: a request ended without an output.
        """
        if len(self.streams) == 1:
            output = None
            async for output in self.streams[0]:
                _check_served(output)
                yield 0, output
            if output is None or not output.finished:
                raise ClientGoneError
            return
        waiting = {
            asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(self.streams)
        }
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    index = waiting.pop(future)
                    if isinstance(future.exception(), StopAsyncIteration):
                        raise ClientGoneError
                    output = future.result()
                    _check_served(output)
                    if not output.finished:
                        waiting[asyncio.ensure_future(anext(self.streams[index]))] = index
                    yield index, output
        finally:
            for future in waiting:
                future.cancel()

    def log(self, status: int, **more: Any) -> None:
        """Writes the request's line; once."""
        if self._is_logged:
            return
        self._is_logged = True
        seconds = time.monotonic() - self._begin
        line: dict[str, Any] = {"time": round(time.time(), 3), "request_id": self.request_id}
        line |= {"path": self._path, "status": status, "seconds": round(seconds, 4)}
        line |= self.counts.fields() if self.counts is not None else {}
        line |= more
        logger.info("%s", json.dumps(line, ensure_ascii=True))


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Returns a request's body.

    Raises:
      HttpError: it is longer than `max_bytes` (413), or has not come after `timeout_s` (408).
      ClientGoneError: the client has closed its connection before its end.
    """
    too_large = HttpError(413, f"the body is longer than {max_bytes} bytes; send less at once")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise HttpError(408, f"the body did not come within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return b"".join(parts)


async def until_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns what the work does; cancels it, and waits for it, when the client goes.

    Raises:
      ClientGoneError: the client has gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_served(output: RequestOutput) -> None:
    """Raises an error if the engine has ended a completion without serving it.

    A `ValueError` where it could not: what the request asks for cannot be followed.
    """
    for one in output.outputs:
        if one.finish_reason == "abort":
            reason = str(one.stop_reason)
            if reason.startswith(_OF_THE_REQUEST):
                raise ValueError(reason)
            raise EngineError(f"request {output.request_id!r} was aborted: {reason}")
