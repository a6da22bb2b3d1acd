"""What who runs a server sees and decides: lines of the log, and whose pages may ask."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.serve.live import MODEL, Live, live_server
from tests.engine.serve.wire import CHAT, COMPLETIONS, connected, reset, send, whole

ORIGIN = "https://pages.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}
REQUEST = {"model": MODEL, "prompt": "def ", "max_tokens": 4, "ignore_eos": True}

type Lines = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Returns the lines of the log so far, once there are so many."""
    name = "pallas_paged.engine.serve.requests"
    caplog.set_level(logging.INFO, logger=name)

    def found(count: int) -> list[dict[str, Any]]:
        end = time.monotonic() + 20
        while True:
            records = [each for each in caplog.records if each.name == name]
            if len(records) >= count or time.monotonic() > end:
                return [json.loads(each.getMessage()) for each in records]
            time.sleep(0.01)

    return found


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_is_one_line(live: Live, lines: Lines, streams: bool) -> None:
    answer = send(live.url, COMPLETIONS, REQUEST | {"stream": streams}, {"X-Request-Id": "mine"})
    assert answer.status == 200
    (line,) = lines(1)
    assert line["request_id"] == "mine"
    assert (line["path"], line["status"]) == (COMPLETIONS, 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 4)
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= 1e3 * line["seconds"] + 1
    assert abs(line["time"] - time.time()) < 60
    assert "error" not in line


def test_a_refused_request_is_one_line_with_the_reason(live: Live, lines: Lines) -> None:
    assert send(live.url, COMPLETIONS, REQUEST | {"max_tokens": -1}).status == 400
    assert send(live.url, CHAT, b"{").status == 400
    first, second = lines(2)
    assert (first["path"], first["status"]) == (COMPLETIONS, 400)
    assert "max_tokens" in first["error"]
    assert (second["path"], second["status"]) == (CHAT, 400)
    assert second["error"]


@pytest.mark.parametrize("streams", [False, True])
def test_an_abort_is_one_line(live: Live, lines: Lines, streams: bool) -> None:
    mine = connected(live.url)
    mine.sendall(whole(COMPLETIONS, REQUEST | {"max_tokens": 400, "stream": streams}))
    while not live.llm.engine.num_open_requests:
        time.sleep(0.001)
    if streams:
        received = b""
        while b"data: " not in received:
            received += mine.recv(4096)
    reset(mine)
    (line,) = lines(1)
    assert (line["path"], line["status"]) == (COMPLETIONS, 499)
    assert ("completion_tokens" in line) is streams
    if streams:
        assert 0 < line["completion_tokens"] < 400
        assert line["ttft_ms"] > 0
        assert line["finish_reasons"] == []
    live.assert_idle()
    assert len(lines(1)) == 1


def test_pages_of_others_are_refused_by_default(live: Live) -> None:
    answer = send(live.url, COMPLETIONS, None, PREFLIGHT, "OPTIONS")
    assert answer.status == 405
    asked = send(live.url, COMPLETIONS, REQUEST, {"Origin": ORIGIN})
    for each in (answer, asked):
        assert not [name for name in each.headers if name.startswith("access-control")]


def test_pages_of_allowed_origins_may_ask() -> None:
    with live_server(allowed_origins=(ORIGIN,), api_keys=("secret",)) as live:
        allowed = send(live.url, COMPLETIONS, None, PREFLIGHT, "OPTIONS")
        assert allowed.status == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 200)):
            answer = send(live.url, COMPLETIONS, REQUEST, headers | {"Origin": ORIGIN})
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            exposed = answer.headers["access-control-expose-headers"].lower()
            assert "x-request-id" in exposed
            assert "retry-after" in exposed
        other = send(live.url, COMPLETIONS, None, PREFLIGHT | {"Origin": "https://x.y"}, "OPTIONS")
        assert other.status == 400
        assert "access-control-allow-origin" not in other.headers
        live.assert_idle()
