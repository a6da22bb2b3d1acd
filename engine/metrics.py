"""What an engine counts, under the names that vLLM's users and dashboards know."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from pallas_paged.engine.core.core_output import FinishReason
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.kv.stats import KVStats
from pallas_paged.engine.outputs import RequestOutput


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure with a name.

    Attributes:
      name: begins with "vllm:".
      labels: what tells it from others of the name; `model_name` always.
      value: the figure.
    """

    name: str
    labels: Mapping[str, str]
    value: float


class Gauge(Metric):
    """A figure of this moment."""


class Counter(Metric):
    """A figure that only grows, from the engine's start."""


@dataclasses.dataclass
class Counts:
    """What the engine counts of requests, beside what its core and memory count.

    Attributes:
      num_prompt_tokens: of the requests that were taken in.
      num_finished: requests by the reason of their first completion.
    """

    num_prompt_tokens: int = 0
    num_finished: collections.Counter[FinishReason] = dataclasses.field(
        default_factory=collections.Counter
    )

    def note(self, outputs: Iterable[RequestOutput]) -> None:
        """Counts those of a request's outputs that are its last one."""
        for output in outputs:
            if output.finished:
                self.num_finished[output.outputs[0].finish_reason or "abort"] += 1


def metrics(core: EngineCore, stats: KVStats, counts: Counts, model_name: str) -> list[Metric]:
    """Returns an engine's figures; `model_name` is their label."""
    gauges = {
        "num_requests_running": core.scheduler.num_running,
        "num_requests_waiting": core.scheduler.num_waiting,
        "kv_cache_usage_perc": stats.num_allocated_blocks / stats.num_blocks,
    }
    counters = {
        "prefix_cache_queries": stats.num_queried_tokens,
        "prefix_cache_hits": stats.num_hit_tokens,
        "num_preemptions": core.scheduler.num_preemptions,
        "prompt_tokens": counts.num_prompt_tokens,
        "generation_tokens": core.num_generated_tokens,
    }
    if core.scheduler.proposer is not None:
        counters["spec_decode_num_draft_tokens"] = core.scheduler.proposer.num_drafts
        counters["spec_decode_num_accepted_tokens"] = core.scheduler.proposer.num_accepted
    labels = {"model_name": model_name}
    reasons: tuple[FinishReason, ...] = ("stop", "length", "abort")
    return [
        *(Gauge(f"vllm:{name}", labels, value) for name, value in gauges.items()),
        *(Counter(f"vllm:{name}", labels, value) for name, value in counters.items()),
        *(
            Counter(
                "vllm:request_success",
                labels | {"finished_reason": reason},
                counts.num_finished[reason],
            )
            for reason in reasons
        ),
    ]
