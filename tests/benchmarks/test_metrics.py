"""Metrics of runs whose figures are computed by hand."""

import pytest

from benchmarks.metrics import RequestTimes, is_good, parse_limits, statistics_ms, summarize

# Tokens after 0.5 s and then every 0.25 s; a single token after 2 s; one that failed.
THREE = RequestTimes(1.0, (1.5, 1.75, 2.0), 10)
ONE = RequestTimes(2.0, (4.0,), 20)
FAILED = RequestTimes(0.0, (0.1, 0.2), 40, failed=True)


def test_figures_by_hand():
    figures = summarize([THREE, FAILED, ONE], 4.0, {"ttft": 1000})
    expected = {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 4,
        "request_throughput": 0.5,
        "output_throughput": 1.0,
        "total_token_throughput": 8.5,
        "request_goodput": 0.25,
        "mean_ttft_ms": 1250.0,
        "median_ttft_ms": 1250.0,
        "std_ttft_ms": 750.0,
        "p99_ttft_ms": 500 + 0.99 * 1500,
        "mean_tpot_ms": 250.0,
        "median_tpot_ms": 250.0,
        "std_tpot_ms": 0.0,
        "p99_tpot_ms": 250.0,
        "mean_itl_ms": 250.0,
        "median_itl_ms": 250.0,
        "std_itl_ms": 0.0,
        "p99_itl_ms": 250.0,
        "mean_e2el_ms": 1500.0,
        "median_e2el_ms": 1500.0,
        "std_e2el_ms": 500.0,
        "p99_e2el_ms": 1000 + 0.99 * 1000,
        "normalized_latency_s_per_token": (1.0 / 3 + 2.0 / 1) / 2,
    }
    assert figures == pytest.approx(expected)


def test_gaps_are_pooled_and_times_per_token_are_not():
    long, short = RequestTimes(0.0, (1.0, 2.0, 3.0, 4.0), 1), RequestTimes(0.0, (1.0, 6.0), 1)
    figures = summarize([long, short], 6.0, {})
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * (1 + 1 + 1 + 5) / 4)
    assert figures["mean_tpot_ms"] == pytest.approx(1e3 * (1 + 5) / 2)
    assert figures["request_goodput"] is None


def test_chunks_of_several_tokens():
    """Five tokens in three chunks: gaps are those of chunks, tokens are five."""
    figures = summarize([RequestTimes(0.0, (1.0, 2.0, 5.0), 1, num_output_tokens=5)], 5.0, {})
    assert figures["total_output_tokens"] == 5
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * (1 + 3) / 2)
    assert figures["mean_tpot_ms"] == pytest.approx(1e3 * (5 - 1) / 4)
    assert figures["normalized_latency_s_per_token"] == pytest.approx(5 / 5)


def test_statistics_of_nothing_are_none():
    assert set(statistics_ms([]).values()) == {None}
    figures = summarize([FAILED], 1.0, {})
    assert figures["mean_ttft_ms"] is None
    assert figures["normalized_latency_s_per_token"] is None
    assert figures["completed"] == 0


def test_percentile_is_interpolated():
    assert statistics_ms([i / 1e3 for i in range(1, 102)])["p99"] == pytest.approx(100.0)
    assert statistics_ms([0.0, 1.0])["p99"] == pytest.approx(990.0)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500}, True),
        ({"ttft": 499}, False),
        ({"tpot": 250, "e2el": 1000}, True),
        ({"tpot": 249, "e2el": 1000}, False),
        ({"tpot": 250, "e2el": 999}, False),
    ],
)
def test_every_limit_binds(limits, good):
    assert is_good(THREE, limits) is good


def test_time_per_token_does_not_bind_one_token():
    assert is_good(ONE, {"tpot": 1})


def test_limits_are_parsed_or_refused():
    assert parse_limits(["ttft:500", "e2el:2.5"]) == {"ttft": 500.0, "e2el": 2.5}
    for wrong in (["itl:3"], ["ttft"], ["ttft:x"], ["ttft:0"], ["ttft:1", "ttft:2"]):
        with pytest.raises(ValueError, match="NAME:MILLISECONDS"):
            parse_limits(wrong)
