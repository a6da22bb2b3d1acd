"""What servers are sent: other prompts in each run, texts of as many tokens, the order of runs."""

import json
import math

import pytest

from benchmarks.serving_client.experiment import (
    Place,
    Run,
    Settings,
    parse_rates,
    places,
    report_of,
)
from benchmarks.serving_client.prompts import CHAT, COMPLETIONS, Supply, outgoing, text_of
from benchmarks.serving_client.servers import Server
from benchmarks.workloads import Request, draw, draw_equal
from pallas_paged.engine.text.tokenizer import load_tokenizer, require_tokenizer
from pallas_paged.models.demo import DEMO_MODEL

TOKENIZER = require_tokenizer(load_tokenizer(DEMO_MODEL), DEMO_MODEL)
LOADED = [Request((i,), 1) for i in range(8)]


def test_runs_have_other_entries_of_a_data_set() -> None:
    supply = Supply(LOADED, 3)
    assert supply.of_run(0) + supply.of_run(1) + supply.of_warm_up(2) == LOADED


def test_runs_may_have_the_same_entries() -> None:
    supply = Supply(LOADED[:3], 3, is_same=True)
    assert supply.of_run(0) == supply.of_run(1) == LOADED[:3]
    assert supply.of_warm_up(5) == [*LOADED[:3], *LOADED[:2]]


@pytest.mark.parametrize("is_same", [False, True])
def test_drawn_prompts_keep_their_lengths(is_same: bool) -> None:
    requests = draw("alpaca", 5, scale=1, max_model_len=99, vocab_size=500, seed=1).requests
    supply = Supply(requests, 5, 500, is_same, seed=1)
    runs = [supply.of_run(0), supply.of_run(1), supply.of_warm_up(5)]
    for run in runs:
        assert [lengths(one) for one in run] == [lengths(one) for one in requests]
        assert all(0 <= token < 500 for one in run for token in one.prompt_token_ids)
    assert (runs[0] == runs[1]) == is_same
    assert runs[2] not in runs[:2]
    assert supply.of_run(1) == runs[1]
    assert Supply(requests, 5, 500, is_same, seed=2).of_warm_up(5) != runs[2]


def lengths(request: Request) -> tuple[int, int]:
    return len(request.prompt_token_ids), request.num_output_tokens


def test_requests_of_one_length() -> None:
    workload = draw_equal(4, 6, 2, vocab_size=9, seed=0)
    assert [lengths(request) for request in workload.requests] == [(6, 2)] * 4
    assert len(set(workload.requests)) == 4
    assert workload == draw_equal(4, 6, 2, vocab_size=9, seed=0)


def test_a_text_of_a_data_set_stays_as_it_is() -> None:
    text = "def f(x):\n    return x + 1  # ä\n"
    assert text_of(TOKENIZER.encode(text), TOKENIZER) == text


def test_random_tokens_make_a_text_of_about_as_many() -> None:
    size = TOKENIZER.vocab_size
    requests = draw_equal(20, 50, 1, vocab_size=size, seed=0).requests
    counts = [len(TOKENIZER.encode(text_of(one[0], TOKENIZER))) for one in requests]
    assert max(counts) <= 52
    assert sum(counts) / 20 > 45


def test_bodies() -> None:
    options = {"temperature": 0.5, "ignore_eos": True}
    more = {
        **{"model": "m", "max_tokens": 3, "stream": True, "temperature": 0.5, "ignore_eos": True},
        "stream_options": {"include_usage": True},
    }
    body = outgoing("hi", 3, endpoint=COMPLETIONS, model="m", options=options).body
    assert json.loads(body) == {"prompt": "hi", **more}
    body = outgoing("hi", 3, endpoint=CHAT, model="m", options=options).body
    assert json.loads(body) == {"messages": [{"role": "user", "content": "hi"}], **more}


def test_servers_take_turns() -> None:
    assert [tuple(place) for place in places(2, [1.0, 4.0], 2)] == [
        *[(0, 1.0, 0), (0, 1.0, 1), (0, 4.0, 0), (0, 4.0, 1)],
        *[(1, 1.0, 1), (1, 1.0, 0), (1, 4.0, 1), (1, 4.0, 0)],
    ]


def test_rates_are_parsed_or_refused() -> None:
    assert parse_rates(["1", "2.5", "inf"], 1.0) == [1.0, 2.5, math.inf]
    for texts in (["x"], ["0"], ["-1"], ["nan"], ["1", "1.0"], [], [""]):
        with pytest.raises(ValueError, match="request_rate="):
            parse_rates(texts, 1.0)
    with pytest.raises(ValueError, match="burstiness=0"):
        parse_rates(["1"], 0.0)


@pytest.mark.parametrize(("rate", "written"), [(2.0, 2.0), (math.inf, "inf")])
def test_a_report_says_what_was_run(rate: float, written: object) -> None:
    run = Run(Place(1, rate, 0), Server("a", "http://a", "m"), {"completed": 3}, ["so"])
    settings = Settings(CHAT, 0.5, 7, 3, {"ttft": 9.0})
    report = json.loads(json.dumps(report_of(run, settings, num_prompts=4), allow_nan=False))
    assert report.pop("date")[:2] == "20"
    assert report == {
        **{"backend": "openai-chat", "label": "a", "base_url": "http://a", "endpoint": CHAT},
        **{"model_id": "m", "round": 1, "request_rate": written, "burstiness": 0.5},
        **{"max_concurrency": 7, "seed": 3, "goodput_limits_ms": {"ttft": 9.0}},
        **{"num_prompts": 4, "completed": 3, "remarks": ["so"]},
    }
