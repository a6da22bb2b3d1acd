"""Courses of requests through a server, as a client saw them, and the figures of a run of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks import metrics
from benchmarks.metrics import Figures, RequestTimes

_LATE_MS, _LATE_SHARE = 2.0, 0.05
"""A client is late when requests leave later on average, and by more than this part of TTFT."""
_BUSY_SHARE = 0.8
"""A client that computes for a greater part of the time may read late what has come."""


class Course(NamedTuple):
    """One request's course, in seconds from the run's start.

    Attributes:
      due_s: when it was due: by the arrivals, or when a place among the most concurrent ones was
        free, whichever is later.
      sent_s: when the client began to send it.
      end_s: when its stream had ended.
      chunk_times_s: when each chunk with output came.
      num_prompt_tokens: its prompt's length, as the server counts.
      num_output_tokens: tokens in all chunks, as the server counts.
      num_cached_tokens: tokens of the prompt that the server had in its cache.
      max_tokens: how many tokens it asked for.
      problem: why it failed, or None.
    """

    due_s: float
    sent_s: float
    end_s: float
    chunk_times_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    max_tokens: int = 0
    problem: str | None = None

    @property
    def times(self) -> RequestTimes:
        """What metrics are made of; the clock starts when the request was due."""
        return RequestTimes(
            self.due_s,
            self.chunk_times_s,
            self.num_prompt_tokens,
            self.problem is not None,
            self.num_output_tokens,
        )


def summarize(courses: Sequence[Course], cpu_s: float, limits_ms: Mapping[str, float]) -> Figures:
    """Returns a run's figures: those of `metrics.summarize`, and what the client was doing.

    The run lasts from its start to its last token, or without one to the end of its last request.

    Args:
      courses: every request of the run, at least one.
      cpu_s: CPU time that the client took meanwhile.
      limits_ms: see `metrics.summarize`.
    """
    done = [course for course in courses if course.problem is None]
    whole_s = max(course.end_s for course in courses)
    duration_s = max((course.chunk_times_s[-1] for course in done), default=whole_s)
    late_ms = [1e3 * (course.sent_s - course.due_s) for course in courses]
    return metrics.summarize([course.times for course in courses], duration_s, limits_ms) | {
        "total_cached_tokens": sum(course.num_cached_tokens for course in done),
        "num_short_outputs": sum(course.num_output_tokens < course.max_tokens for course in done),
        "max_concurrent_requests": most_at_once(courses),
        "mean_late_ms": float(np.mean(late_ms)),
        "max_late_ms": max(late_ms),
        "client_cpu_share": cpu_s / whole_s,
    }


def most_at_once(courses: Sequence[Course]) -> int:
    """Returns how many requests were on their way at once at most."""
    changes = [(course.sent_s, 1) for course in courses]
    changes += [(course.end_s, -1) for course in courses]
    return int(np.cumsum([change for _, change in sorted(changes)]).max())


def remarks(courses: Sequence[Course], figures: Figures, *, is_whole: bool) -> list[str]:
    """Returns what a reader of the figures should know, a line each; empty where all went well.

    Args:
      courses: every request of the run.
      figures: what `summarize` says of them.
      is_whole: whether each output was to have all the tokens that it asked for.
    """
    lines = []
    problems = Counter(course.problem for course in courses if course.problem is not None)
    for problem, count in problems.most_common(3):
        lines.append(f"{count} failed: {problem}")
    if len(problems) > 3:
        others = problems.total() - sum(count for _, count in problems.most_common(3))
        lines.append(f"{others} failed for {len(problems) - 3} other reasons")
    late_ms, ttft_ms = figures["mean_late_ms"] or 0, figures["mean_ttft_ms"]
    if ttft_ms is not None and late_ms > max(_LATE_MS, _LATE_SHARE * ttft_ms):
        lines.append(
            f"requests were sent {late_ms:.1f} ms late on average, which latencies hold: the "
            "client, or its machine, is overloaded; send fewer, or from another machine"
        )
    share = figures["client_cpu_share"] or 0
    if share > _BUSY_SHARE:
        lines.append(
            f"the client computed for {share:.0%} of the time: latencies may be its own; send "
            "fewer requests"
        )
    if is_whole and figures["num_short_outputs"]:
        lines.append(
            f"{figures['num_short_outputs']} outputs have fewer tokens than they asked for: the "
            "server does not honour ignore_eos, or its context has ended"
        )
    return lines
