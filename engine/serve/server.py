"""Runs the application: a socket, signals, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from pallas_paged.engine import garbage
from pallas_paged.engine.engine_client import EngineClient

logger = logging.getLogger(__name__)

_HEALTH_POLL_S = 0.25
_CLOSE_S = 5
"""Seconds for the last bytes, once no request is left."""


class _Server(uvicorn.Server):
    """Leaves the signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket at an address, which does not listen yet.

    Raises:
      ValueError: the address cannot be had; the message says why.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host={host} --port={port} cannot be used: {error}") from error
    bound.set_inheritable(True)
    return bound


def url_of(bound: socket.socket) -> str:
    """Returns the URL at which a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run(
    llm: EngineClient, app: FastAPI, bound: socket.socket, stopping: asyncio.Event, grace_s: float
) -> int:
    """Serves until `stopping` is set, or the engine ends; returns the program's exit status.

    When told to stop it takes no new requests, ends those that it has, as far as `grace_s` seconds
    suffice, and returns 0. If the engine ends by an error, its requests get that, and it returns 1;
    of several engines the others go on first, until it is told to stop or none is left.
    """
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_CLOSE_S,
        )
    )
    _give_up_stalled(bound, app.state.service.options.stalled_client_s)
    garbage.leave_to_requests()
    serving = asyncio.ensure_future(server.serve([bound]))
    ending = asyncio.ensure_future(_until_end(llm, stopping))
    await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    if not _has_ended(llm):
        await llm.shutdown(grace_s)
    server.should_exit = True
    await serving
    ending.cancel()
    return 1 if llm.errored else 0


def _give_up_stalled(bound: socket.socket, timeout_s: float) -> None:
    """Lets connections end whose client takes nothing for so long, where the system can do that.

    A transport that is closed waits for what it holds to be taken, be it forever.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = min(max(1, round(timeout_s * 1e3)), 2**31 - 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def stop_at_signals(stopping: asyncio.Event) -> None:
    """Sets `stopping` at the first SIGTERM or SIGINT; ends the process at the second one.

    The status is 128 and the signal's number then. For the main thread's event loop.
    """

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        logger.warning("signal %d: no new requests; those that run may end", number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


async def _until_end(llm: EngineClient, stopping: asyncio.Event) -> None:
    while not stopping.is_set() and not _has_ended(llm):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _HEALTH_POLL_S)


def _has_ended(llm: EngineClient) -> bool:
    return llm.errored and not llm.is_running
