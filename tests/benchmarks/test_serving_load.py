"""Requests to a server that is made up: when they are sent, what comes back, what fails."""

import asyncio
import math
import sys
import time
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from benchmarks.serving_client import experiment, load, servers
from benchmarks.serving_client.course import Course, most_at_once
from benchmarks.serving_client.experiment import Place, Run, Settings, measure
from benchmarks.serving_client.load import Outgoing, send, send_all
from benchmarks.serving_client.prompts import COMPLETIONS, outgoing
from benchmarks.serving_client.servers import Server
from tests.benchmarks.fake_openai import FakeServer, Script

BODY = outgoing([1, 2], 3, endpoint=COMPLETIONS, model="fake", options={})


def served(
    answer: Script | Callable[[int, dict[str, Any]], Script],
    use: Callable[[Any, FakeServer], Awaitable[Any]],
    *,
    timeout_s: float = 5.0,
    api_key: str | None = None,
) -> tuple[Any, FakeServer]:
    """Returns what `use` does with a session and a server, and the server."""
    server = FakeServer(answer if callable(answer) else lambda index, body: answer)

    async def run() -> Any:
        async with server.serving(), load.open_session(api_key, timeout_s) as session:
            return await use(session, server)

    return asyncio.run(run()), server


def course_of(script: Script, timeout_s: float = 5.0) -> Course:
    async def use(session: Any, server: FakeServer) -> Course:
        begin_s = time.perf_counter()
        return await send(session, f"{server.url}/v1/completions", BODY, 0.0, begin_s)

    return served(script, use, timeout_s=timeout_s)[0]


def test_chunks_are_timed_when_they_come() -> None:
    course = course_of(Script(("a", 0.2, "b", 0.1, "c", 0.1), usage=(2, 3, 1)))
    first, second, third = course.chunk_times_s
    assert 0 <= course.sent_s < first
    # Half a pause: how late a chunk is read is the machine's affair.
    assert second - first > 0.1
    assert third - second > 0.05
    assert course.end_s - third > 0.05
    assert course[4:] == (2, 3, 1, 3, None)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (Script(status=503), "HTTP 503: no room"),
        (Script(ending="cut"), "ClientPayloadError: "),
        (Script(ending="open"), "the stream ended without [DONE]"),
        (Script(ending="error"), "in the stream: no room"),
        (Script(usage=None), "the stream has no usage"),
        (Script(("a", 5.0, "b")), "no end after 0.2 s"),
    ],
)
def test_failures_are_told(script: Script, problem: str) -> None:
    assert (course_of(script, timeout_s=0.2).problem or "").startswith(problem)


def test_nobody_there_is_told() -> None:
    async def use(session: Any, server: FakeServer) -> Course:
        return await send(session, "http://127.0.0.1:1/v1/completions", BODY, 0.0, 0.0)

    assert "127.0.0.1:1" in served(Script(), use)[0].problem


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Takes no time to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        select = self._selector.select

        def pass_time(timeout: float | None) -> Any:
            self.now_s += timeout or 0.0
            return select(0)

        self._selector.select = pass_time

    def time(self) -> float:
        return self.now_s


def sent_at(
    monkeypatch: pytest.MonkeyPatch,
    due_s: list[float],
    max_concurrency: int | None,
    takes_s: float,
    blocks_s: float = 0.0,
) -> list[Course]:
    """Returns the courses of requests that take `takes_s`, and the client `blocks_s` before."""
    loop = SimulatedLoop()
    monkeypatch.setattr(load, "time", types.SimpleNamespace(perf_counter=loop.time))

    async def send_one(index: int, due_s: float, begin_s: float) -> Course:
        sent_s = loop.now_s - begin_s
        loop.now_s += blocks_s
        await asyncio.sleep(takes_s)
        return Course(due_s, sent_s, loop.now_s - begin_s, (float(index),))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        courses = runner.run(send_all(send_one, due_s, max_concurrency))
    assert [course.chunk_times_s for course in courses] == [(i,) for i in range(len(due_s))]
    return courses


def test_requests_are_sent_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    due_s = [0.0, 0.0, 0.5, 3.0]
    courses = sent_at(monkeypatch, due_s, None, 2.0)
    assert [course.due_s for course in courses] == due_s
    assert [course.sent_s for course in courses] == pytest.approx(due_s)
    assert most_at_once(courses) == 3


def test_without_a_free_place_a_request_is_due_when_it_gets_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    courses = sent_at(monkeypatch, [0.0, 0.5, 1.0, 5.0], 2, 2.0)
    assert [course.due_s for course in courses] == pytest.approx([0.0, 0.5, 2.0, 5.0])
    assert [course.sent_s for course in courses] == pytest.approx([0.0, 0.5, 2.0, 5.0])
    assert most_at_once(courses) == 2


def test_a_client_that_cannot_follow_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    courses = sent_at(monkeypatch, [0.0, 1.0, 2.0], None, 1.0, blocks_s=1.5)
    assert [course.due_s for course in courses] == [0.0, 1.0, 2.0]
    assert [course.sent_s for course in courses] == pytest.approx([0.0, 1.5, 3.0])


def test_what_is_late_does_not_keep_others_from_being_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are due, but the first is sent before the second one is made."""
    begun = []
    loop = SimulatedLoop()
    monkeypatch.setattr(load, "time", types.SimpleNamespace(perf_counter=loop.time))

    class Due(list[float]):
        def __iter__(self) -> Iterator[float]:
            for value in super().__iter__():
                begun.append("made")
                yield value

    async def send_one(index: int, due_s: float, begin_s: float) -> Course:
        begun.append("sent")
        return Course(due_s, 0.0, 1.0)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(send_all(send_one, Due([0.0] * 4)))
    assert begun.index("sent") < 3


def measured(
    answer: Any, place: Place, settings: Settings, num_requests: int = 6
) -> tuple[Run, FakeServer]:
    async def use(session: Any, server: FakeServer) -> Run:
        requests = [
            outgoing([index], 3, endpoint=settings.endpoint, model="fake", options={})
            for index in range(num_requests)
        ]
        return await measure(session, Server("one", server.url), place, requests, settings)

    return served(answer, use)


def test_a_run_counts_and_times_all_its_requests() -> None:
    def answer(index: int, body: dict[str, Any]) -> Script:
        return Script(status=500) if body["prompt"] == [3] else Script(("a", 0.05, "b"), (2, 5, 1))

    run, server = measured(answer, Place(0, math.inf, 0), Settings(COMPLETIONS, is_whole=True))
    assert {key: run.figures[key] for key in ("completed", "failed")} == {
        "completed": 5,
        "failed": 1,
    }
    assert run.figures["total_input_tokens"] == 10
    assert run.figures["total_output_tokens"] == 25
    assert run.figures["total_cached_tokens"] == 5
    assert run.figures["mean_itl_ms"] > 25
    assert run.figures["mean_tpot_ms"] == pytest.approx(run.figures["mean_itl_ms"] / 4)
    assert "1 failed: HTTP 500: no room" in run.remarks
    assert sorted(body["prompt"] for body in server.requests) == [[i] for i in range(6)]


def test_a_run_keeps_its_rate() -> None:
    settings = Settings(COMPLETIONS, burstiness=100.0, limits_ms={"e2el": 9e3})
    run, _ = measured(Script(), Place(0, 40.0, 0), settings, 8)
    assert run.figures["duration"] > 8 / 40 * 0.6
    assert run.figures["request_goodput"] == run.figures["request_throughput"]


def test_a_run_keeps_its_concurrency() -> None:
    settings = Settings(COMPLETIONS, max_concurrency=2)
    run, server = measured(Script(("a", 0.03)), Place(0, math.inf, 0), settings)
    assert server.most_at_once == run.figures["max_concurrent_requests"] == 2


@pytest.mark.parametrize("api_key", [None, "secret"])
def test_a_key_is_shown_where_there_is_one(api_key: str | None) -> None:
    async def use(session: Any, server: FakeServer) -> Course:
        return await send(session, f"{server.url}/v1/completions", BODY, 0.0, 0.0)

    headers = served(Script(), use, api_key=api_key)[1].headers
    assert headers.get("Authorization") == (api_key and "Bearer secret")


def test_warm_up_fails_only_as_a_whole() -> None:
    async def use(session: Any, server: FakeServer) -> str | None:
        found = Server("one", server.url)
        requests = [
            outgoing([token], 3, endpoint=COMPLETIONS, model="fake", options={})
            for token in range(2)
        ]
        return await experiment.warm_up(session, found, COMPLETIONS, requests)

    half = served(lambda index, body: Script(status=200 if body["prompt"][0] else 500), use)
    assert (half[0], len(half[1].requests)) == (None, 2)
    assert served(Script(status=500), use)[0] == "HTTP 500: no room"


def found_server(
    health: list[int], models: Any, model: str | None = None, timeout_s: float = 5.0
) -> Server:
    async def use(session: Any, server: FakeServer) -> Server:
        server.health = health
        server.models = server.models if models is None else models
        await servers.wait_until_ready(session, server.url, timeout_s)
        return await servers.with_model(session, Server("one", server.url), model)

    return served(Script(), use)[0]


@pytest.mark.parametrize("health", [[200], [503, 200], [404]])
def test_a_server_is_waited_for_and_asked(health: list[int]) -> None:
    found = found_server(health, None)
    assert (found.model, found.max_model_len) == ("fake", 512)
    assert found_server(health, None, model="other").max_model_len is None


def test_a_server_that_is_not_ready_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"not ready after 0.3 s \(HTTP 503: \); start"):
        found_server([503], None, timeout_s=0.3)


@pytest.mark.parametrize("models", [{}, [], {"data": []}, {"data": [{}]}, {"data": "x"}])
def test_a_server_without_models_is_refused(models: Any) -> None:
    with pytest.raises(ValueError, match="lists no models"):
        found_server([200], models)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gpt' is not at .* which has fake, other"):
        found_server([200], None, model="gpt")


def test_a_missing_aiohttp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ValueError, match="the extra `bench`"):
        load.open_session(None, 1.0)


def test_servers_are_named() -> None:
    urls = ["http://a:1/", "https://b/v1"]
    assert servers.parse(urls, []) == [Server("a:1", "http://a:1"), Server("b", "https://b")]
    twice = servers.parse(["http://a:1"] * 2, ["x", "y"])
    assert [server.label for server in twice] == ["x", "y"]


@pytest.mark.parametrize(
    ("urls", "labels", "message"),
    [
        (["127.0.0.1:8000"], [], "base_url='127.0.0.1:8000'"),
        (["ftp://a"], [], "base_url"),
        (["http://a"], ["x", "y"], "label=x, y must be one name for each of 1"),
        (["http://a", "http://b"], ["x", "x"], "all different"),
        (["http://a", "http://a"], [], "all different"),
    ],
)
def test_wrong_servers_are_refused(urls: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        servers.parse(urls, labels)


def test_a_request_is_ready_before_it_is_due() -> None:
    assert Outgoing(b"{}", 3).max_tokens == 3
    assert BODY.body == (
        b'{"model":"fake","prompt":[1,2],"max_tokens":3,"stream":true,'
        b'"stream_options":{"include_usage":true}}'
    )
