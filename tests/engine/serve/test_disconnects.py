"""Clients that go or do not read, and servers that end: nobody else waits, nothing is left."""

import dataclasses
import http.client
import json
import socket
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.serve import server
from pallas_paged.engine.serve.exchange import Exchange
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.async_serving import device, make
from tests.engine.serve.live import MODEL, Live, live_server
from tests.engine.serve.wire import (
    COMPLETIONS,
    assert_error,
    connected,
    events,
    received,
    reset,
    send,
    whole,
)
from tests.engine.test_interrupts import Letters

STEP_S = 0.004
"""A step of the mock device takes about so long: clients have to be faster."""
VICTIM = "X-Request-Id: victim"


class Watch:
    """What there was of requests at each step of an engine, which is made slow enough to see.

    Attributes:
      held: of each step, the requests that had blocks or waited when it was dispatched.
      closed_at: so many steps had been when the server closed the victim.
    """

    def __init__(self, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[set[str]] = []
        self.closed_at: int | None = None
        queues = llm.engine.parts.core.scheduler.queues
        close = Exchange.close

        def before(event: str) -> None:
            if event.startswith("dispatch"):
                self.held.append(set(queues.unfinished))
                time.sleep(STEP_S)

        def noted(exchange: Exchange) -> None:
            if exchange.request_id == "victim" and self.closed_at is None:
                self.closed_at = len(self.held)
            close(exchange)

        device(llm).before = before
        monkeypatch.setattr(Exchange, "close", noted)

    @property
    def latest(self) -> set[str]:
        """What the last step's set was."""
        return self.held[-1] if self.held else set()

    def num_steps_until_gone(self) -> int:
        """Returns how many steps were dispatched with the victim after the server closed it."""
        assert self.closed_at is not None
        left = self.held[self.closed_at :]
        return sum(any(name.startswith("victim") for name in held) for held in left)


class Alphabet(Letters):
    """A tokenizer that a server can ask for special tokens, of which it has none."""

    implementation = types.SimpleNamespace(all_special_ids=(), added_tokens_decoder={})


def engine(**options: Any) -> AsyncLLM:
    """Returns an engine over the mock device; only its advice on sampling is the demo model's."""
    fixed = {"num_blocks": 1024, "max_model_len": 512, "tokenizer": Alphabet()}
    llm = make(**fixed | options)
    llm.config = dataclasses.replace(llm.config, model=str(DEMO_MODEL))
    return llm


@pytest.fixture
def live() -> Iterator[Live]:
    with live_server(engine()) as running:
        yield running
        running.assert_idle()


def request(max_tokens: int = 450, **fields: Any) -> dict[str, Any]:
    return {"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True} | fields


class Company:
    """A request that runs beside all others, so that steps go on; its answer is checked."""

    def __init__(self, url: str, max_tokens: int = 450) -> None:
        self._socket = connected(url)
        self._max_tokens = max_tokens
        self._socket.sendall(whole(COMPLETIONS, request(max_tokens, return_token_ids=True)))

    def __enter__(self) -> "Company":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._socket:
            if kind is None:
                answer = received(self._socket)
                assert len(answer.json["choices"][0]["token_ids"]) == self._max_tokens, answer


KINDS: dict[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "whole": {},
    "stream of three": {"stream": True, "n": 3},
    "stream of prompts": {"stream": True, "prompt": [[1], [2, 3], [4]]},
    "whole of prompts": {"prompt": [[1], [2, 3], [4]]},
    "beams": {"use_beam_search": True, "best_of": 3},
}


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("stream", "close"), ("whole", "close"), *((kind, "reset") for kind in KINDS)],
)
def test_the_blocks_of_a_client_that_goes_are_free_two_steps_later(
    live: Live, kind: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(live.llm, monkeypatch)
    with Company(live.url, 120):
        mine = connected(live.url)
        mine.sendall(whole(COMPLETIONS, request(**KINDS[kind]), VICTIM))
        until(lambda: "victim" in str(watch.latest))
        if "stream" in KINDS[kind]:
            assert b"data: " in mine.recv(1 << 16) + mine.recv(1 << 16)
        reset(mine) if ends == "reset" else mine.close()
        until(lambda: watch.closed_at is not None)
        until(lambda: len(watch.held) > watch.closed_at + 5)
    assert watch.num_steps_until_gone() <= 2


def test_a_client_that_goes_while_it_waits_leaves_the_queue(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(live.llm, monkeypatch)
    with Company(live.url), Company(live.url):
        many = [connected(live.url) for _ in range(20)]  # more than max_num_seqs
        for mine in many:
            mine.sendall(whole(COMPLETIONS, request(), VICTIM))
        until(lambda: len(watch.latest) == 22)
        for mine in many:
            reset(mine)
        until(lambda: len(watch.latest) == 2)


def until(is_so: Any) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(1e-3)


# --- readers that do not read ---------------------------------------------------------------------

MUCH: dict[str, Any] = {"n": 6, "logprobs": 20, "stream": True, "return_token_ids": True}
"""Asks for far more bytes than sockets hold."""


def stuck_client(live: Live) -> socket.socket:
    """Returns a client that asks for much, and reads nothing of it."""
    mine = connected(live.url, receive_bytes=4096)
    mine.sendall(whole(COMPLETIONS, request(**MUCH), VICTIM))
    return mine


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the server's sockets hold little."""
    make_socket = server.bound_socket

    def small(*address: Any) -> socket.socket:
        bound = make_socket(*address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        return bound

    monkeypatch.setattr(server, "bound_socket", small)


@pytest.mark.usefixtures("small_buffers")
def test_a_stuck_reader_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_server(engine(), stalled_client_s=60) as live:
        watch = Watch(live.llm, monkeypatch)
        stuck = stuck_client(live)
        until(lambda: watch.held)
        begin = len(watch.held)
        answer = send(live.url, COMPLETIONS, request(100, return_token_ids=True))
        assert len(answer.json["choices"][0]["token_ids"]) == 100
        assert len(watch.held) - begin <= 110, "each step gives each request a token"
        live.assert_idle()  # the stuck one's tokens too are all there, and its blocks are free
        assert watch.closed_at is None, "it was not given up"
        body = received(stuck).body  # and gets all that it asked for, once it reads
        stuck.close()
        token_ids: list[list[int]] = [[] for _ in range(6)]
        for event in events(body):
            for choice in event["choices"]:
                token_ids[choice["index"]] += choice["token_ids"]
        assert [len(ids) for ids in token_ids] == [450] * 6


@pytest.mark.usefixtures("small_buffers")
def test_a_stuck_reader_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_server(engine(max_num_seqs=6), stalled_client_s=0.3) as live:
        watch = Watch(live.llm, monkeypatch)
        stuck = stuck_client(live)
        until(lambda: watch.closed_at is not None)
        live.assert_idle()
        until(lambda: num_connections(live) == 0)  # with what the client has not taken
        stuck.close()


def num_connections(live: Live) -> int:
    """Returns how many connections of clients the server's process holds."""
    port = int(live.url.rpartition(":")[2])
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] != "0A" for row in rows)


# --- the end of a server --------------------------------------------------------------------------


def paced(llm: AsyncLLM, step_s: float = STEP_S) -> AsyncLLM:
    device(llm).before = lambda event: time.sleep(step_s) if event[0] == "d" else None
    return llm


def begun_stream(live: Live, **fields: Any) -> tuple[socket.socket, http.client.HTTPResponse]:
    """Returns a stream whose first event has come."""
    mine = connected(live.url)
    mine.sendall(whole(COMPLETIONS, request(stream=True, **fields)))
    response = http.client.HTTPResponse(mine)
    response.begin()
    assert response.readline().startswith(b"data: ")
    assert response.readline() == b"\n"
    return mine, response


def test_streams_end_properly_within_the_grace_period() -> None:
    with live_server(paced(engine()), grace_s=30) as live:
        streams = [begun_stream(live, max_tokens=200) for _ in range(3)]
        whole_one = connected(live.url)
        whole_one.sendall(whole(COMPLETIONS, request(200)))
        until(lambda: live.llm.engine.num_open_requests == 4)
        live.stop()
        until(lambda: send(live.url, "/health", method="GET").status == 503)
        for path, method in ((COMPLETIONS, "POST"), ("/health", "GET")):
            refused = send(live.url, path, request() if method == "POST" else None, method=method)
            assert_error(refused, 503)
            assert int(refused.headers["retry-after"]) > 0
        assert received(whole_one).json["choices"][0]["finish_reason"] == "length"
        for mine, response in streams:
            *_, last = events(response.read())
            assert last["choices"][0]["finish_reason"] == "length"
            mine.close()
        whole_one.close()
        assert live.status.result(20) == 0


def test_what_is_not_done_after_the_grace_period_gets_an_error() -> None:
    with live_server(paced(engine(), 0.02), grace_s=0.2) as live:
        mine, response = begun_stream(live)
        whole_one = connected(live.url)
        whole_one.sendall(whole(COMPLETIONS, request()))
        until(lambda: live.llm.engine.num_open_requests == 2)
        live.stop()
        *_, last = events(response.read())
        assert (last["error"]["code"], last["error"]["type"]) == (503, "ServiceUnavailableError")
        assert_error(received(whole_one), 503)
        mine.close()
        whole_one.close()
        assert live.status.result(20) == 0


def test_a_stuck_reader_does_not_keep_a_server_from_ending() -> None:
    begin = time.monotonic()
    with live_server(paced(engine()), grace_s=0.1) as live:
        stuck = stuck_client(live)
        until(lambda: live.llm.engine.num_open_requests)
        time.sleep(0.3)
        live.stop()
        assert live.status.result(20) == 0
    stuck.close()
    assert time.monotonic() - begin < 15


def test_an_engine_that_dies_ends_the_server() -> None:
    def fail(event: str) -> None:
        raise RuntimeError("the device is on fire")

    with live_server(paced(engine()), grace_s=30) as live:
        stream = begun_stream(live)
        device(live.llm).before = fail
        *_, last = events(stream[1].read())  # the first failed step ends what runs
        assert last["error"]["code"] == 500
        assert "on fire" in last["error"]["message"]
        stream[0].close()
        causes = []
        while not live.status.done():  # and so do the next ones, until the engine gives up
            try:
                answer = send(live.url, COMPLETIONS, request())
                health = send(live.url, "/health", method="GET")
            except (ConnectionError, http.client.HTTPException):
                break
            causes.append(answer.status)
            assert answer.status in (500, 503)
            assert "on fire" in assert_error(answer, answer.status)
            if health.status == 503:
                assert "on fire" in assert_error(health, 503)
                assert_error(send(live.url, "/metrics", method="GET"), 503)
                break
        assert causes
        assert live.status.result(20) == 1


def test_a_full_queue_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(max_queued_requests=2, max_num_seqs=1)
    with live_server(llm) as live:
        watch = Watch(llm, monkeypatch)
        running = []
        for k in range(3):
            running.append(connected(live.url))
            running[-1].sendall(whole(COMPLETIONS, request(100)))
            until(lambda k=k: len(watch.latest) == k + 1)
        refused = send(live.url, COMPLETIONS, request())
        assert "2" in assert_error(refused, 503)
        assert int(refused.headers["retry-after"]) > 0
        for mine in running:
            assert received(mine).status == 200
            mine.close()
        live.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_out_of_time(stream: bool) -> None:
    with live_server(paced(engine(), 0.02), request_timeout_s=0.3) as live:
        answer = send(live.url, COMPLETIONS, request(stream=stream))
        if stream:
            *_, last = events(answer.body)
            assert (answer.status, last["error"]["code"]) == (200, 504)
        else:
            assert "0.3 s" in assert_error(answer, 504)
        # A request may ask for less, and not for more.
        headers = {"X-Request-Timeout": "0.1"}
        assert "0.1 s" in assert_error(send(live.url, COMPLETIONS, request(), headers), 504)
        headers = {"X-Request-Timeout": "100"}
        assert "0.3 s" in assert_error(send(live.url, COMPLETIONS, request(), headers), 504)
        live.assert_idle()


def test_clients_that_do_all_at_once_leave_nothing(live: Live) -> None:
    """Threads whose clients go at random moments; what is not cut off is right."""
    paced(live.llm, 0.001)
    usual = send(live.url, COMPLETIONS, request(30)).json["choices"][0]["text"]
    faults: list[BaseException] = []

    def client(seed: int) -> None:
        try:
            for turn in range(6):
                with connected(live.url) as mine:
                    body = whole(COMPLETIONS, request(30, stream=turn % 2 == 0))
                    if (seed + turn) % 3 == 0:
                        mine.sendall(body[: len(body) * seed // 16])
                    elif (seed + turn) % 3 == 1:
                        mine.sendall(body)
                        time.sleep(seed * 2e-3)
                    else:
                        mine.sendall(body)
                        answer = received(mine)
                        texts = [answer.body]
                        pieces = events(answer.body) if turn % 2 == 0 else map(json.loads, texts)
                        text = "".join(piece["choices"][0]["text"] for piece in pieces)
                        assert text == usual
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert MODEL
