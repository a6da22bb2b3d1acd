"""A client that does, one after the other, what clients do; it knows what must come of it."""

import asyncio
import collections
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from benchmarks.soak_client.connection import Connection, connect
from benchmarks.soak_client.kinds import Answer, Completion, Kind

_BAD = (
    b"",
    b"{",
    b"[" * 2000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": []}',
    b'{"prompt": [99999999]}',
    b'{"prompt": "a", "max_tokens": 1e400}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "model": "nobody"}',
    b'{"prompt": "a", "structured_outputs": {"regex": "("}}',
)


class WrongError(Exception):
    """What a server did that it must not do."""


class Client:
    """Sends requests until it is told to stop.

    Args:
      url: of the server.
      kinds: what is asked for.
      seed: of what it does.

    Attributes:
      counts: how often it did each thing, and what became of it.
      faults: what was wrong.
    """

    def __init__(self, url: str, kinds: Sequence[Kind], seed: int):
        self._url, self._kinds = url, kinds
        self._rng = random.Random(seed)
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.faults: list[str] = []

    async def run(self, end_s: float) -> None:
        """Goes on until `time.monotonic()` is `end_s`."""
        ways: dict[str, tuple[int, Callable[[Kind], Awaitable[str]]]] = {
            "reads the whole": (6, self._whole),
            "reads a stream": (6, self._stream),
            "reads slowly": (2, self._slowly),
            "goes in the middle of a stream": (3, self._leave_stream),
            "goes before the answer": (3, self._leave_early),
            "goes while it sends": (2, self._cut_body),
            "has little time": (2, self._in_time),
            "sends what is wrong": (2, self._bad),
        }
        names, weights = list(ways), [weight for weight, _ in ways.values()]
        while time.monotonic() < end_s and not self.faults:
            (name,) = self._rng.choices(names, weights)
            kind = self._rng.choice(self._kinds)
            try:
                result = await ways[name][1](kind)
            except (WrongError, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
                result = "is wrong"
                body = json.dumps(kind.body)
                self.faults.append(f"{name}: {type(error).__name__}: {error!s:.500}; {body:.300}")
            self.counts[name, result] += 1

    # --- what clients do ----------------------------------------------------------------------

    async def _whole(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            return await self._ask(connection, kind, {})

    async def _stream(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            return await self._ask(connection, kind, {}, streams=True)

    async def _slowly(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            return await self._ask(connection, kind, {}, streams=True, pause_s=0.02)

    async def _in_time(self, kind: Kind) -> str:
        headers = {"X-Request-Timeout": f"{self._rng.random() + 1e-3:.4f}"}
        streams = self._rng.random() < 0.5
        async with connect(self._url) as connection:
            return await self._ask(connection, kind, headers, streams=streams)

    async def _bad(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            connection.send(self._rng.choice(_BAD), {})
            await connection.read_head()
            error = (await connection.read_json())["error"]
            if connection.status == 503 and connection.retry_after_s:
                return "is asked to wait"
            if connection.status not in (400, 404) or error["code"] != connection.status:
                raise WrongError(f"{connection.status} for a bad request: {error}")
        return "is told"

    async def _leave_stream(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            self._send(connection, kind, {}, streams=True)
            await connection.read_head()
            num_parts = self._rng.randint(0, 10)
            async for _ in connection.parts():
                num_parts -= 1
                if num_parts < 0:
                    break
            self._go(connection)
        return "is gone"

    async def _leave_early(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            self._send(connection, kind, {}, streams=self._rng.random() < 0.5)
            await asyncio.sleep(self._rng.random() ** 2)
            self._go(connection)
        return "is gone"

    async def _cut_body(self, kind: Kind) -> str:
        async with connect(self._url) as connection:
            body = json.dumps(kind.body).encode()
            connection.send(body, {}, self._rng.randrange(len(body)))
            await asyncio.sleep(self._rng.random() * 0.1)
            self._go(connection)
        return "is gone"

    # --- how ----------------------------------------------------------------------------------

    def _go(self, connection: Connection) -> None:
        if self._rng.random() < 0.5:
            connection.reset()

    def _send(
        self, connection: Connection, kind: Kind, headers: dict[str, str], *, streams: bool
    ) -> None:
        body = kind.body | ({"stream": True} if streams and kind.can_stream else {})
        connection.send(json.dumps(body).encode(), headers)

    async def _ask(
        self,
        connection: Connection,
        kind: Kind,
        headers: dict[str, str],
        *,
        streams: bool = False,
        pause_s: float = 0.0,
    ) -> str:
        """Returns how a request ended whose answer is read to its end, and compared."""
        self._send(connection, kind, headers, streams=streams)
        await connection.read_head()
        if connection.status == 503 and connection.retry_after_s:
            await connection.read_body()
            await asyncio.sleep(min(connection.retry_after_s, 1.0))
            return "is asked to wait"
        parts = []
        async for part in connection.parts():
            parts.append(part)
            await asyncio.sleep(pause_s)
        body = b"".join(parts)
        pieces = list(_events(body)) if connection.is_stream else [json.loads(body)]
        errors = [piece["error"] for piece in pieces if "error" in piece]
        if headers and [error["code"] for error in errors] == [504]:
            return "is out of time"
        if errors or connection.status != 200:
            raise WrongError(f"{connection.status}: {errors}")
        got = _answer_of(pieces, len(kind.expected))
        if got != kind.expected:
            raise WrongError(f"{_difference(got, kind.expected)}")
        return "is answered"


def _events(body: bytes) -> Iterable[Any]:
    *events, last, end = body.split(b"\n\n")
    if last != b"data: [DONE]" or end:
        raise WrongError(f"a stream ends in {last!r:.80}")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def _answer_of(pieces: Sequence[Any], num_choices: int) -> Answer:
    """Returns the completions that an answer, or the pieces of a stream, hold."""
    made = [Completion("", (), (), None, None)] * num_choices
    for piece in pieces:
        for choice in piece["choices"]:
            before = made[choice["index"]]
            logprobs = choice["logprobs"] or {"token_logprobs": []}
            made[choice["index"]] = Completion(
                before.text + choice["text"],
                before.token_ids + tuple(choice["token_ids"]),
                before.logprobs + tuple(logprobs["token_logprobs"]),
                choice["finish_reason"],
                choice["stop_reason"],
            )
    return made


def _difference(got: Answer, expected: Answer) -> str:
    index = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    return f"choice {index} is {got[index]}, and alone it was {expected[index]}"
