"""Sends requests to a server when they are due: aiohttp, which only the extra `bench` installs."""

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.serving_client.answer import Answer, http_problem
from benchmarks.serving_client.course import Course

if TYPE_CHECKING:
    from aiohttp import ClientSession

_MAX_FILES = 65_536
_KEEPALIVE_S = 2
"""How long a connection waits for its next request: less than servers wait, which is often 5 s, for
else one could close it just when a request is sent."""


class Outgoing(NamedTuple):
    """A request, ready to be sent.

    Attributes:
      body: JSON.
      max_tokens: how many tokens it asks for.
    """

    body: bytes
    max_tokens: int


def allow_connections() -> None:
    """Lets this process have as many connections open as the system allows it, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_session(api_key: str | None, timeout_s: float) -> "ClientSession":
    """Returns a session for as many connections as there are requests, for `async with`.

    Args:
      api_key: what servers want to be shown, or None.
      timeout_s: a request that takes longer, from its first byte to the end of its answer, fails.

    Raises:
      ValueError: aiohttp is not installed.
    """
    try:
        import aiohttp
    except ImportError as error:
        raise ValueError(
            "benchmarks.serving needs aiohttp, which the extra `bench` installs"
        ) from error
    # A stream that is compressed may come in larger pieces than it was made in.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=headers,
    )


async def send(
    session: "ClientSession", url: str, request: Outgoing, due_s: float, begin_s: float
) -> Course:
    """Returns a request's course; what fails is told there, and nothing is raised.

    Args:
      session: of `open_session`.
      url: with the endpoint.
      request: what is sent.
      due_s: when it is due, in seconds from `begin_s`: now, or a little ago.
      begin_s: the run's start, by `time.perf_counter`.
    """
    import aiohttp

    answer, problem = Answer(), None
    sent_s = time.perf_counter() - begin_s
    try:
        async with session.post(url, data=request.body) as response:
            if response.status == 200:
                async for piece in response.content.iter_any():
                    answer.feed(piece, time.perf_counter() - begin_s)
            else:
                problem = http_problem(response.status, await response.read())
    except TimeoutError:
        problem = f"no end after {session.timeout.total} s"
    except (aiohttp.ClientError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    end_s = time.perf_counter() - begin_s
    return answer.course(due_s, sent_s, end_s, request.max_tokens, problem)


async def send_all(
    send_one: Callable[[int, float, float], Awaitable[Course]],
    due_s: Sequence[float],
    max_concurrency: int | None = None,
) -> list[Course]:
    """Returns the courses of requests that are sent when they are due.

    Args:
      send_one: sends a request; its arguments are the request's index and `send`'s last two.
      due_s: when each request is due, in seconds from now, ascending.
      max_concurrency: most requests on their way at once. Others wait for a place, and are due when
        they get one.
    """
    places = asyncio.Semaphore(max_concurrency or len(due_s))
    begin_s = time.perf_counter()

    async def take_place(index: int, due_s: float) -> Course:
        must_wait = places.locked()
        async with places:
            if must_wait:
                due_s = time.perf_counter() - begin_s
            return await send_one(index, due_s, begin_s)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, due in enumerate(due_s):
            # Not even where it is late: else nothing would be sent before all are begun.
            await asyncio.sleep(max(0.0, begin_s + due - time.perf_counter()))
            tasks.append(group.create_task(take_place(index, due)))
    return [task.result() for task in tasks]
