"""ASGI answers of the server: bodies of JSON, and streams of events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pallas_paged.engine.serve.exchange import ClientGoneError, Exchange, until_gone
from pallas_paged.engine.serve.http_errors import answer_to
from pallas_paged.engine.serve.responses import DONE

logger = logging.getLogger(__name__)


class _ClientStalledError(Exception):
    """The client takes nothing; no `TimeoutError`, which an engine's deadline is."""


def json_answer(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns an answer of JSON."""
    return Response(body, status, headers, "application/json")


class EventStream(Response):
    """A stream of server-sent events, each sent when it is there.

    An error in the middle is an event of its own, and the stream ends properly behind it. If the
    client goes, or does not read for too long, the exchange is closed, which aborts its requests.
    """

    def __init__(self, exchange: Exchange, pieces: AsyncIterator[bytes], stalled_client_s: float):
        """Sends `pieces`, the last of which is `DONE`."""
        super().__init__(None, 200, {"cache-control": "no-cache"}, "text/event-stream")
        del self.headers["content-length"]
        self._exchange = exchange
        self._pieces = pieces
        self._stalled_client_s = stalled_client_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        exchange, status, error_text = self._exchange, 200, None
        try:
            await until_gone(receive, self._send_all(send))
        except ClientGoneError:
            status = 499
        except _ClientStalledError as error:
            status, error_text = 499, str(error)
        finally:
            exchange.close()
            more = {} if error_text is None else {"error": error_text}
            exchange.log(status, **more)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for piece in self._pieces:
                await self._send(send, piece)
        except (ClientGoneError, _ClientStalledError):
            raise
        except Exception as error:
            answer = answer_to(error, self._exchange.names)
            if answer.status == 500:
                logger.error("%s: %s", self._exchange.request_id, error, exc_info=error)
            self._exchange.log(answer.status, error=str(error))
            await self._send(send, b"data: " + answer.body + b"\n\n" + DONE)
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, piece: bytes) -> None:
        try:
            async with asyncio.timeout(self._stalled_client_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            text = f"the client read nothing for {self._stalled_client_s:g} s"
            raise _ClientStalledError(text) from None
