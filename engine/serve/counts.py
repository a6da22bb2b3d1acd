"""How many tokens a request had so far, for its usage and its line in the log."""

from typing import Any

from pallas_paged.engine.outputs import RequestMetrics, RequestOutput
from pallas_paged.engine.serve.responses import Usage, usage_of


class Counts:
    """Tokens of a request's prompts and of what they gave, and when.

    Args:
      num_prompts: how many prompts it has.

    Attributes:
      finish_reasons: of the choices that have ended; for who knows them to add to.
    """

    def __init__(self, num_prompts: int):
        """Counts from nothing."""
        self.finish_reasons: list[str | None] = []
        self._prompts = [0] * num_prompts
        self._cached = [0] * num_prompts
        self._num_completion = 0
        self._num_preemptions = 0
        self._times: dict[str, float] = {}

    def note(self, place: int, output: RequestOutput) -> None:
        """Adds what an output of the prompt at a place holds, all of which is new."""
        self._prompts[place] = len(output.prompt_token_ids)
        self._cached[place] = output.num_cached_tokens
        self._num_completion += sum([len(one.token_ids) for one in output.outputs])
        if len(self._times) < 2:
            self._times = _times(output.metrics) | self._times
        if output.finished:
            self._num_preemptions += output.metrics.num_preemptions

    def usage(self) -> Usage:
        """Returns what has been noted."""
        return usage_of(sum(self._prompts), self._num_completion, sum(self._cached))

    def fields(self) -> dict[str, Any]:
        """Returns what the log says of it: nothing before the first output."""
        if not any(self._prompts):
            return {}
        fields: dict[str, Any] = dict(self._times)
        if self._num_preemptions:
            fields["preemptions"] = self._num_preemptions
        return fields | {
            "prompt_tokens": sum(self._prompts),
            "completion_tokens": self._num_completion,
            "cached_tokens": sum(self._cached),
            "finish_reasons": self.finish_reasons,
        }


def _times(metrics: RequestMetrics) -> dict[str, float]:
    """Returns the milliseconds until a request's first token and its first step, once known."""
    times = {"ttft_ms": metrics.first_token_time_s, "queue_ms": metrics.first_scheduled_time_s}
    arrival = metrics.arrival_time_s
    return {name: round(1e3 * (t - arrival), 2) for name, t in times.items() if t is not None}
