"""One request over a connection of its own, which may be given up at any point."""

import asyncio
import contextlib
import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

PATIENCE_S = 120.0
"""Seconds after which a server that says nothing is taken to hang."""


class Connection:
    """A connection to `/v1/completions` of a server.

    Attributes:
      status: of the answer, once its head has come.
      retry_after_s: as the head says, if it does.
      is_stream: whether the body is one of events.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self.status = 0
        self.retry_after_s: int | None = None
        self.is_stream = self._is_chunked = False

    def send(self, body: bytes, headers: dict[str, str], num_sent: int | None = None) -> None:
        """Sends a request, or only the first `num_sent` bytes of its body."""
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = ["POST /v1/completions HTTP/1.1", "Host: soak", "Connection: close", *lines]
        head.append(f"Content-Length: {len(body)}")
        self._writer.write("\r\n".join([*head, "", ""]).encode() + body[:num_sent])

    async def read_head(self) -> None:
        """Reads up to the body."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        self.is_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._is_chunked = headers.get("transfer-encoding") == "chunked"
        if "retry-after" in headers:
            self.retry_after_s = int(headers["retry-after"])

    async def read_body(self) -> bytes:
        """Returns the whole body."""
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes; raises `IncompleteReadError` if its end does not."""
        if not self._is_chunked:
            yield await self._reader.read(-1)
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def read_json(self) -> Any:
        """Returns the body of a whole answer."""
        return json.loads(await self.read_body())

    def reset(self) -> None:
        """Ends the connection at once."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[Connection]:
    """Connects to a server; fails if all that is done with it takes too long."""
    address = urllib.parse.urlsplit(url)
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
