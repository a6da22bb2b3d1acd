"""The servers that are measured: their addresses, whether they are ready, which model they have."""

import asyncio
import json
import time
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.serving_client.answer import http_problem

if TYPE_CHECKING:
    from aiohttp import ClientSession

_POLL_S, _ANSWER_S = 0.25, 10
_HAS_NO_HEALTH = (404, 405)


class Server(NamedTuple):
    """A server under test.

    Attributes:
      label: what tables call it.
      base_url: its address, without a slash at the end and without /v1.
      model: the name of its model.
      max_model_len: most tokens of a request, if it says so.
    """

    label: str
    base_url: str
    model: str = ""
    max_model_len: int | None = None


def parse(base_urls: Sequence[str], labels: Sequence[str]) -> list[Server]:
    """Returns the servers at these addresses; without labels they are called by host and port.

    Raises:
      ValueError: an address is none of HTTP, or there are not as many different labels.
    """
    urls = [url.rstrip("/").removesuffix("/v1") for url in base_urls]
    hosts = []
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"base_url={url!r} must be like http://127.0.0.1:8000")
        hosts.append(parts.netloc)
    names = list(labels) or hosts
    if len(names) != len(urls) or len(set(names)) != len(names):
        raise ValueError(
            f"label={', '.join(names)} must be one name for each of {len(urls)} base_url, all "
            "different; give --label as often as --base_url"
        )
    return [Server(name, url) for name, url in zip(names, urls, strict=True)]


async def wait_until_ready(session: "ClientSession", base_url: str, timeout_s: float) -> None:
    """Returns when /health is answered with status 200; or with 404, by a server that has none.

    Raises:
      TimeoutError: it is not within `timeout_s`; it is asked once at least.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        status, body = await _get(session, f"{base_url}/health")
        if status == 200 or status in _HAS_NO_HEALTH:
            return
        if time.monotonic() + _POLL_S > end_s:
            raise TimeoutError(
                f"{base_url} is not ready after {timeout_s:g} s ({_problem(status, body)}); start "
                "the server, or give it more time with --ready_timeout_s"
            )
        await asyncio.sleep(_POLL_S)


async def with_model(session: "ClientSession", server: Server, model: str | None) -> Server:
    """Returns `server` with a model that it says it has, the first one unless `model` names one.

    Raises:
      ValueError: it does not list its models, or not this one.
    """
    status, body = await _get(session, f"{server.base_url}/v1/models")
    found = _models_of(body) if status == 200 else {}
    if not found:
        raise ValueError(f"{server.base_url}/v1/models lists no models: {_problem(status, body)}")
    name = next(iter(found)) if model is None else model
    if name not in found:
        raise ValueError(
            f"model={name!r} is not at {server.base_url}, which has {', '.join(found)}"
        )
    return server._replace(model=name, max_model_len=found[name])


async def _get(session: "ClientSession", url: str) -> tuple[int, bytes]:
    """Returns status and body of an answer; 0 and the reason where there is none."""
    import aiohttp

    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        return 0, f"{type(error).__name__}: {error}".encode()


def _problem(status: int, body: bytes) -> str:
    return http_problem(status, body) if status else body.decode()


def _models_of(body: bytes) -> dict[str, int | None]:
    """Returns the names of models in a listing, and most tokens of a request where it has them."""
    try:
        cards: list[dict[str, Any]] = json.loads(body)["data"]
        return {str(card["id"]): card.get("max_model_len") for card in cards}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
