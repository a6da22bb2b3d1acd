"""`/metrics`: the engine's figures under the names that routers and dashboards know.

Names and labels are those of vLLM, both generations where they differ, so that what reads them
works unchanged: the Gateway API inference extension, llm-d, vLLM's production stack, Grafana's
boards.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.engine_client import EngineClient
from pallas_paged.engine.errors import EngineDeadError
from pallas_paged.engine.metrics import Counter
from pallas_paged.engine.metrics import Metric as Figure
from pallas_paged.engine.serve.latency import Latencies

CONTENT_TYPE = CONTENT_TYPE_LATEST

_ALSO = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""Names of the generation before, by today's."""
_HELP = {
    "num_requests_running": "Requests that hold blocks.",
    "num_requests_waiting": "Requests that wait for blocks.",
    "kv_cache_usage_perc": "Share of the pool's blocks that requests hold, 0 to 1.",
    "prefix_cache_queries": "Prompt tokens that were looked for in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that were found in the prefix cache.",
    "num_preemptions": "Times that a request lost its blocks.",
    "prompt_tokens": "Tokens of the prompts that were taken in.",
    "generation_tokens": "Tokens that were generated.",
    "request_success": "Requests that have ended, by their reason.",
    "spec_decode_num_draft_tokens": "Tokens that were guessed.",
    "spec_decode_num_accepted_tokens": "Tokens that were guessed right.",
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two outputs of a stream.",
    "request_time_per_output_token_seconds": "A request's mean time per token behind the first.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "From a request's arrival to its first step.",
    "request_inference_time_seconds": "From a request's first step to its end.",
    "request_prefill_time_seconds": "From a request's first step to its first token.",
    "request_decode_time_seconds": "From a request's first token to its end.",
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Tokens that a request generated.",
}


class EngineMetrics:
    """Writes the figures of a server's engines for Prometheus.

    Args:
      llm: the engines; each one's place is the label `engine`.
      model_name: the label of all figures.
      prefix: of their names.
    """

    def __init__(self, llm: EngineClient, model_name: str, prefix: str):
        """Watches the engines' outputs from now on."""
        self._prefix = prefix
        self._engines = [
            _Watched(replica, {"model_name": model_name, "engine": str(rank)})
            for rank, replica in enumerate(llm.replicas)
        ]

    async def text(self) -> bytes:
        """Returns all figures, of each engine that runs as they are between two steps.

        Raises:
          EngineDeadError: none runs.
        """
        families: dict[str, _Family] = {}
        death: EngineDeadError | None = None
        num_running = 0
        for engine in self._engines:
            try:
                figures, num_blocks = await engine.figures()
            except EngineDeadError as error:
                death = error
                continue
            num_running += 1
            self._add_figures(families, engine.labels, figures)
            self._add_histograms(families, engine)
            self._add_config(families, engine, num_blocks)
        if death is not None and not num_running:
            raise death
        registry = CollectorRegistry()
        registry.register(_Once(list(families.values())))
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def _add_figures(
        self, families: dict[str, "_Family"], labels: dict[str, str], figures: list[Figure]
    ) -> None:
        for figure in figures:
            name = figure.name.partition(":")[2]
            more = {key: one for key, one in figure.labels.items() if key not in labels}
            for own in filter(None, (name, _ALSO.get(name))):
                family = families.get(own)
                if family is None:
                    kind = CounterMetricFamily if isinstance(figure, Counter) else GaugeMetricFamily
                    family = kind(self._named(own), _HELP[name], labels=[*labels, *more])
                    families[own] = family
                family.add_metric([*labels.values(), *more.values()], figure.value)

    def _add_histograms(self, families: dict[str, "_Family"], engine: "_Watched") -> None:
        for name, histogram in engine.latencies.histograms.items():
            for own in filter(None, (name, _ALSO.get(name))):
                family = families.get(own)
                if family is None:
                    names = list(engine.labels)
                    family = HistogramMetricFamily(self._named(own), _HELP[name], labels=names)
                    families[own] = family
                values = list(engine.labels.values())
                family.add_metric(values, histogram.buckets(), histogram.total)

    def _add_config(
        self, families: dict[str, "_Family"], engine: "_Watched", num_blocks: int
    ) -> None:
        """Adds what routers read of the pool's shape."""
        config = engine.llm.config
        labels = engine.labels | {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(num_blocks),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
        }
        name = "cache_config"
        if name not in families:
            families[name] = InfoMetricFamily(self._named(name), "The KV pool's shape.", labels=[])
        families[name].add_metric([], labels)

    def _named(self, name: str) -> str:
        return f"{self._prefix}:{name}"


type _Family = Any
"""One of the families of `prometheus_client`, whose `add_metric` differ."""


class _Watched:
    """An engine, its labels, and how long its requests took."""

    def __init__(self, llm: AsyncLLM, labels: dict[str, str]):
        self.llm, self.labels = llm, labels
        self.latencies = Latencies(llm.engine)

    async def figures(self) -> tuple[list[Figure], int]:
        """Returns its figures, and the blocks of its pool, the null block included."""
        return await self.llm.get_metrics(), (await self.llm.kv_stats()).num_blocks + 1


class _Once(Collector):
    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
