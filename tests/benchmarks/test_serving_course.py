"""Courses of requests whose figures are computed by hand."""

import pytest

from benchmarks.serving_client.course import Course, most_at_once, remarks, summarize

# Five tokens in three chunks, sent 0.1 s late; one token; one that failed half way.
FIVE = Course(1.0, 1.1, 4.0, (1.5, 2.0, 3.5), 10, 5, 4, 5)
ONE = Course(2.0, 2.0, 6.5, (6.0,), 20, 1, 0, 8)
FAILED = Course(0.5, 0.8, 9.0, (0.7, 8.0), problem="HTTP 500: no")


def test_figures_by_hand() -> None:
    figures = summarize([FIVE, ONE, FAILED], 1.8, {"tpot": 500})
    expected = {
        "duration": 6.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 6,
        "request_throughput": 2 / 6,
        "output_throughput": 1.0,
        "total_token_throughput": 6.0,
        "request_goodput": 2 / 6,
        "mean_ttft_ms": 2250.0,
        "mean_tpot_ms": 1e3 * 2.0 / 4,  # of 5 tokens, not of 3 chunks
        "p99_tpot_ms": 500.0,
        "mean_itl_ms": 1e3 * (0.5 + 1.5) / 2,  # between chunks
        "p99_itl_ms": 500 + 0.99 * 1000,
        "mean_e2el_ms": 1e3 * (2.5 + 4.0) / 2,
        "normalized_latency_s_per_token": (2.5 / 5 + 4.0 / 1) / 2,
        "total_cached_tokens": 4,
        "num_short_outputs": 1,
        "max_concurrent_requests": 3,
        "mean_late_ms": 1e3 * (0.1 + 0.0 + 0.3) / 3,
        "max_late_ms": 300.0,
        "client_cpu_share": 0.2,
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)


def test_a_run_without_a_token_lasts_to_its_end() -> None:
    figures = summarize([FAILED], 0.0, {})
    assert (figures["duration"], figures["completed"]) == (9.0, 0)
    assert figures["mean_ttft_ms"] is None


def test_most_at_once() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (5.0, 6.0)]
    assert most_at_once([Course(0.0, begin, end) for begin, end in spans]) == 2


def remarks_of(*courses: Course, cpu_s: float = 0.0, is_whole: bool = False) -> list[str]:
    return remarks(courses, summarize(courses, cpu_s, {}), is_whole=is_whole)


def test_a_good_run_needs_no_remark() -> None:
    assert remarks_of(ONE._replace(num_output_tokens=8), cpu_s=4.0, is_whole=True) == []


def test_failures_are_counted_by_their_reason() -> None:
    failed = [FAILED._replace(problem=problem) for problem in "aabbbcdde"]
    assert remarks_of(*failed) == [
        *("3 failed: b", "2 failed: a", "2 failed: d"),
        "2 failed for 2 other reasons",
    ]


@pytest.mark.parametrize(
    ("late_s", "is_told"), [(0.0015, False), (0.04, False), (0.06, True), (5.0, True)]
)
def test_a_late_client_is_told_where_it_matters(late_s: float, is_told: bool) -> None:
    """The TTFT is 1 s, of which 5 % matter."""
    course = Course(0.0, late_s, 9.0, (1.0,), 1, 8, 0, 8)
    assert ["late on average" in line for line in remarks_of(course)] == [True] * is_told


def test_a_client_that_is_no_later_than_timers_are_is_not_told() -> None:
    assert remarks_of(Course(0.0, 0.0015, 9.0, (0.01,), 1, 8, 0, 8)) == []


def test_a_busy_client_is_told() -> None:
    (line,) = remarks_of(ONE, cpu_s=0.9 * 6.5)
    assert "computed for 90% of the time" in line


def test_short_outputs_are_told_where_they_were_to_be_whole() -> None:
    assert remarks_of(ONE) == []
    (line,) = remarks_of(ONE, is_whole=True)
    assert line.startswith("1 outputs have fewer tokens")
