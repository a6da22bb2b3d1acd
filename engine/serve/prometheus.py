"""`/metrics`: the engine's figures under the names that routers and dashboards know.

Names and labels are those of vLLM, both generations where they differ, so that what reads them
works unchanged: the Gateway API inference extension, llm-d, vLLM's production stack, Grafana's
boards.
"""

from collections.abc import Iterator

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
    """Writes an engine's figures for Prometheus.

    Args:
      llm: the engine.
      model_name: the label of all figures.
      prefix: of their names.
    """

    def __init__(self, llm: AsyncLLM, model_name: str, prefix: str):
        """Watches the engine's outputs from now on."""
        self._llm, self._prefix = llm, prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._latencies = Latencies(llm.engine)

    async def text(self) -> bytes:
        """Returns all figures as they are between two steps.

        Raises:
          EngineDeadError: the engine has ended.
        """
        figures = await self._llm.get_metrics()
        stats = await self._llm.kv_stats()
        registry = CollectorRegistry()
        registry.register(_Once([*self._families(figures), self._config(stats.num_blocks + 1)]))
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def _families(self, figures: list[Figure]) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for figure in figures:
            name = figure.name.partition(":")[2]
            more = {key: one for key, one in figure.labels.items() if key != "model_name"}
            for own in filter(None, (name, _ALSO.get(name))):
                family = families.get(own)
                if family is None:
                    kind = CounterMetricFamily if isinstance(figure, Counter) else GaugeMetricFamily
                    family = kind(self._named(own), _HELP[name], labels=[*names, *more])
                    families[own] = family
                family.add_metric([*values, *more.values()], figure.value)
        yield from families.values()
        for name, histogram in self._latencies.histograms.items():
            for own in filter(None, (name, _ALSO.get(name))):
                made = HistogramMetricFamily(self._named(own), _HELP[name], labels=names)
                made.add_metric(values, histogram.buckets(), histogram.total)
                yield made

    def _config(self, num_blocks: int) -> Metric:
        """Returns what routers read of the pool's shape."""
        config = self._llm.config
        labels = self._labels | {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(num_blocks),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
        }
        made = InfoMetricFamily(self._named("cache_config"), "The KV pool's shape.", labels=[])
        made.add_metric([], labels)
        return made

    def _named(self, name: str) -> str:
        return f"{self._prefix}:{name}"


class _Once(Collector):
    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
