"""What a run's token times say: latencies, throughput, goodput.

TTFT is the time from a request's arrival to its first token, E2EL to its last, TPOT
`(E2EL - TTFT) / (tokens - 1)`, of requests with two tokens or more, and ITL every single gap
between two tokens. Normalized latency is the metric of the paper (Kwon et al. 2023, section 6.1):
the mean over requests of E2EL divided by output tokens. Where only chunks of several tokens are
seen, as in a server's stream, TTFT is that of the first chunk and ITL the gap between two.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LIMITS = ("ttft", "tpot", "e2el")
"""What goodput can be limited by."""
Figures = dict[str, float | int | None]
ROWS = {
    "duration": "duration, s",
    "request_throughput": "requests/s",
    "request_goodput": "good requests/s",
    "output_throughput": "output tokens/s",
    "normalized_latency_s_per_token": "normalized latency, s/token",
    **{
        f"{statistic}_{name}_ms": f"{name.upper()} {statistic}, ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "p99")
    },
}
"""What a table says of figures, by their keys."""


class RequestTimes(NamedTuple):
    """One request's course, in seconds on one clock.

    Attributes:
      arrival_s: when it was due, whether or not anyone had time for it then.
      token_times_s: when each output token, or each chunk of several, reached the caller.
      num_prompt_tokens: its prompt's length.
      failed: whether it ended before it had its tokens.
      num_output_tokens: how many tokens the chunks hold; None: the times are those of tokens.
    """

    arrival_s: float
    token_times_s: tuple[float, ...]
    num_prompt_tokens: int
    failed: bool = False
    num_output_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        seen = len(self.token_times_s)
        return seen if self.num_output_tokens is None else self.num_output_tokens

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.token_times_s[-1] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with one token only."""
        gaps = self.num_tokens - 1
        return (self.e2el_s - self.ttft_s) / gaps if gaps else None


def summarize(
    requests: Sequence[RequestTimes], duration_s: float, limits_ms: Mapping[str, float]
) -> Figures:
    """Returns the figures of a run, under the keys that serving benchmarks use.

    Failed requests count as such and enter nothing else. Statistics of nothing are None.

    Args:
      requests: every request of the run.
      duration_s: from the run's start to its last token.
      limits_ms: upper limits, by names in `LIMITS`, that a request must keep to be good; without
        any, `request_goodput` is None.
    """
    done = [request for request in requests if not request.failed]
    num_prompt_tokens = sum(request.num_prompt_tokens for request in done)
    num_output_tokens = sum(request.num_tokens for request in done)
    figures: Figures = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "total_input_tokens": num_prompt_tokens,
        "total_output_tokens": num_output_tokens,
        "request_throughput": len(done) / duration_s,
        "output_throughput": num_output_tokens / duration_s,
        "total_token_throughput": (num_prompt_tokens + num_output_tokens) / duration_s,
        "request_goodput": None,
    }
    if limits_ms:
        good = sum(is_good(request, limits_ms) for request in done)
        figures["request_goodput"] = good / duration_s
    latencies = {
        "ttft": [request.ttft_s for request in done],
        "tpot": [request.tpot_s for request in done if request.tpot_s is not None],
        "itl": [gap for request in done for gap in np.diff(request.token_times_s).tolist()],
        "e2el": [request.e2el_s for request in done],
    }
    for name, seconds in latencies.items():
        figures |= {f"{key}_{name}_ms": value for key, value in statistics_ms(seconds).items()}
    normalized = [request.e2el_s / request.num_tokens for request in done]
    figures["normalized_latency_s_per_token"] = float(np.mean(normalized)) if normalized else None
    return figures


def statistics_ms(seconds: Sequence[float]) -> Figures:
    """Returns mean, median, standard deviation and 99th percentile in milliseconds.

    The percentile is linearly interpolated; the deviation is that of all values, not an estimate.
    """
    if not seconds:
        return dict.fromkeys(("mean", "median", "std", "p99"))
    ms = 1e3 * np.asarray(seconds)
    return {
        "mean": float(np.mean(ms)),
        "median": float(np.median(ms)),
        "std": float(np.std(ms)),
        "p99": float(np.percentile(ms, 99)),
    }


def is_good(request: RequestTimes, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request kept every limit; TPOT's does not bind a single token."""
    seconds = {"ttft": request.ttft_s, "tpot": request.tpot_s, "e2el": request.e2el_s}
    values = {name: seconds[name] for name in limits_ms}
    return all(value is None or 1e3 * value <= limits_ms[name] for name, value in values.items())


def parse_limits(entries: Sequence[str]) -> dict[str, float]:
    """Returns limits in milliseconds from entries such as `ttft:500`.

    Raises:
      ValueError: an entry is not of this form, names no latency that can be limited, or comes
        twice.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if name not in LIMITS or name in limits or not value > 0:
            raise ValueError(
                f"goodput={entry!r} must be NAME:MILLISECONDS with a name among "
                f"{', '.join(LIMITS)}, each at most once, and a positive limit"
            )
        limits[name] = value
    return limits
