"""A server of several engines: one that ends leaves the others serving, and figures are apart."""

import concurrent.futures
import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pallas_paged.engine.replicas import ReplicatedLLM
from tests.engine.async_serving import device
from tests.engine.serve.live import Live, is_idle, live_server
from tests.engine.serve.test_disconnects import engine, request
from tests.engine.serve.test_program import program
from tests.engine.serve.wire import COMPLETIONS, Answer, assert_error, complete, events, send
from tests.programs import run_program


@pytest.fixture
def live() -> Iterator[Live]:
    engines = [engine(enable_prefix_caching=True) for _ in range(2)]
    llm = ReplicatedLLM.of_replicas(engines[0].config, engines)
    with live_server(llm) as running:  # type: ignore[arg-type]
        yield running
        for each in engines:
            if each.is_running:
                end = time.monotonic() + 20
                while not running.call(each.engine.call(lambda each=each: is_idle(each))):
                    assert time.monotonic() < end
                    time.sleep(0.01)


def ask(live: Live, first: int, **fields: Any) -> Answer:
    """Sends a request whose prompt begins with a token, repeated."""
    return send(live.url, COMPLETIONS, request(**{"prompt": [first] * 40} | fields))


def kill(live: Live, rank: int) -> None:
    """Lets a replica's thread end when it gets its next request."""

    def fail(event: str) -> None:
        raise SystemExit("killed")

    device(live.llm.replicas[rank]).before = fail


def values(live: Live, name: str) -> dict[str, float]:
    """Returns a figure by the label `engine`."""
    text = send(live.url, "/metrics", method="GET").body.decode()
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"vllm:{name}"
    }


def test_prompts_with_a_prefix_go_to_one_and_figures_are_apart(live: Live) -> None:
    for first in (1, 2, 1, 1):
        assert ask(live, first, max_tokens=4).status == 200
    assert values(live, "prompt_tokens_total") == {"0": 120, "1": 40}
    assert values(live, "prefix_cache_hits_total") == {"0": 2 * 36, "1": 0}
    assert values(live, "time_to_first_token_seconds_count") == {"0": 3, "1": 1}
    assert values(live, "cache_config_info") == {"0": 1, "1": 1}
    assert send(live.url, "/health", method="GET").status == 200


def test_one_that_ends_leaves_the_other_serving(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(60)
    kill(live, 0)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(ask, live, first, max_tokens=200, stream=first % 2 == 0)
            for first in range(8)
        ]
        answers = [future.result(timeout=60) for future in futures]
    num_failed = num_whole = 0
    for answer in answers:
        if b"killed" not in answer.body:
            assert answer.status == 200
            is_stream = answer.headers["content-type"].startswith("text/event-stream")
            last = list(events(answer.body))[-1] if is_stream else answer.json
            assert last["choices"][0]["finish_reason"] == "length"
            num_whole += 1
        elif answer.status == 200:  # a stream that had begun
            error, done, _ = answer.body.split(b"\n\n")[-3:]
            assert json.loads(error[6:])["error"]["code"] == 503
            assert done == b"data: [DONE]"
            num_failed += 1
        else:
            assert "the engine has ended: SystemExit: killed" in assert_error(answer, 503)
            num_failed += 1
    assert num_failed > 0
    assert num_whole > 0
    for first in range(4):
        assert ask(live, first, max_tokens=4).status == 200
    for path in ("/health", "/ping"):
        answer = send(live.url, path, method="GET")
        assert "replica 0 of 2: the engine has ended: SystemExit" in assert_error(answer, 503)
        assert "retry-after" not in answer.headers
    assert values(live, "num_requests_running") == {"1": 0}
    assert send(live.url, "/v1/models", method="GET").status == 200
    assert not live.status.done()
    live.stop()
    assert live.status.result(timeout=30) == 1  # a supervisor sees that it was not all well


def test_the_server_ends_with_the_last_of_them(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(60)
    for rank in range(2):
        kill(live, rank)
    for first in range(2):
        assert_error(ask(live, first), 503)
    assert live.status.result(timeout=30) == 1


def test_a_program_with_too_few_devices_says_what_it_needs() -> None:
    done = run_program("pallas_paged.engine.serve", "--port=0", "--data_parallel_size=99")
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith(
        "error: data_parallel_size=99 with tensor_parallel_size=1 needs 99 devices"
    )
    assert said.endswith("set XLA_FLAGS=--xla_force_host_platform_device_count=99")


@pytest.mark.slow
def test_a_program_serves_two_and_ends_well() -> None:
    with program("--data_parallel_size=2") as (process, url):
        texts = [complete(url, "def ", model="demo") for _ in range(3)]
        assert len(set(texts)) == 1
        text = send(url, "/metrics", method="GET").body.decode()
        found = re.findall(r'vllm:prompt_tokens_total{engine="(\d)",.*} (\S+)', text)
        assert [engine for engine, _ in found] == ["0", "1"]
        assert sum(float(value) for _, value in found) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
