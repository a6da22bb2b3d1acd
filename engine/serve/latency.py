"""Counts how long requests took, for the histograms of `/metrics`."""

import bisect
from collections.abc import Sequence

from pallas_paged.engine.async_engine import AsyncEngine
from pallas_paged.engine.outputs import RequestOutput

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_FIRST_TOKEN = (*_SECONDS, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_BETWEEN_TOKENS = (*(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5), *_SECONDS[10:], 10.0)
_REQUEST = (*_LONG_SECONDS, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_NUM_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Histogram:
    """Counts of values by the bounds that they are not above; made for many values a step.

    Attributes:
      bounds: ascending; values above all of them are counted too.
      counts: of values up to each bound and above the one before, and of the rest.
      total: the sum of all values.
    """

    def __init__(self, bounds: Sequence[float]):
        """Counts from nothing."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Returns, as Prometheus has them, how many values are not above each bound."""
        made, count = [], 0
        for bound, here in zip((*self.bounds, float("inf")), self.counts, strict=True):
            count += here
            made.append(("+Inf" if bound == float("inf") else str(bound), float(count)))
        return made


class Latencies:
    """Histograms of an engine's requests.

    Attributes:
      histograms: by the names of vLLM, without a prefix.
    """

    def __init__(self, engine: AsyncEngine):
        """Sees all outputs from now on; nobody else may watch them."""
        self.histograms = {
            "time_to_first_token_seconds": Histogram(_FIRST_TOKEN),
            "inter_token_latency_seconds": Histogram(_BETWEEN_TOKENS),
            "request_time_per_output_token_seconds": Histogram(_BETWEEN_TOKENS),
            "e2e_request_latency_seconds": Histogram(_REQUEST),
            "request_queue_time_seconds": Histogram(_REQUEST),
            "request_inference_time_seconds": Histogram(_REQUEST),
            "request_prefill_time_seconds": Histogram(_REQUEST),
            "request_decode_time_seconds": Histogram(_REQUEST),
            "request_prompt_tokens": Histogram(_NUM_TOKENS),
            "request_generation_tokens": Histogram(_NUM_TOKENS),
        }
        self._last_token_s: dict[str, float] = {}
        self._num_tokens: dict[str, int] = {}
        engine.on_outputs = self.note

    def note(self, outputs: Sequence[RequestOutput], now: float) -> None:
        """Counts the outputs of a step, which came at that time."""
        last_token_s, num_tokens = self._last_token_s, self._num_tokens
        between = self.histograms["inter_token_latency_seconds"].observe
        for output in outputs:
            request_id = output.request_id
            before = last_token_s.get(request_id)
            if before is not None:
                between(now - before)
            elif output.metrics.first_token_time_s is not None:
                waited_s = output.metrics.first_token_time_s - output.metrics.arrival_time_s
                self.histograms["time_to_first_token_seconds"].observe(waited_s)
            if output.finished:
                self._note_end(output, num_tokens.pop(request_id, 0))
                last_token_s.pop(request_id, None)
            else:
                last_token_s[request_id] = now
                count = sum([len(one.token_ids) for one in output.outputs])
                num_tokens[request_id] = num_tokens.get(request_id, 0) + count

    def _note_end(self, output: RequestOutput, num_before: int) -> None:
        """Counts a request that has ended, with so many tokens in its outputs before."""
        metrics, observe = output.metrics, self._observe
        num_tokens = num_before + sum(len(one.token_ids) for one in output.outputs)
        observe("request_prompt_tokens", len(output.prompt_token_ids))
        observe("request_generation_tokens", num_tokens)
        scheduled_s, first_s = metrics.first_scheduled_time_s, metrics.first_token_time_s
        end_s = metrics.finish_time_s
        if end_s is None:
            return
        observe("e2e_request_latency_seconds", end_s - metrics.arrival_time_s)
        if scheduled_s is None:
            return
        observe("request_queue_time_seconds", scheduled_s - metrics.arrival_time_s)
        observe("request_inference_time_seconds", end_s - scheduled_s)
        if first_s is None:
            return
        observe("request_prefill_time_seconds", first_s - scheduled_s)
        observe("request_decode_time_seconds", end_s - first_s)
        if num_tokens > 1:
            seconds = (end_s - first_s) / (num_tokens - 1)
            observe("request_time_per_output_token_seconds", seconds)

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)
