"""`/metrics` as Prometheus reads it: the names that dashboards know, and counts that are right."""

import math
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pallas_paged.engine import AsyncLLM
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.serve.exact import OPTIONS, Exact
from tests.engine.serve.live import MODEL, Live, live_server

GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
GAUGES += ["gpu_cache_usage_perc", "cache_config_info"]
COUNTERS = ["prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens"]
COUNTERS += ["generation_tokens", "request_success"]
COUNTERS += ["gpu_prefix_cache_queries", "gpu_prefix_cache_hits"]
HISTOGRAMS = [
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_time_per_output_token_seconds"),
    "time_per_output_token_seconds",
]
PROMPT = "def f(x):\n    return x\n\n" * 5


@pytest.fixture(scope="module")
def counted() -> Iterator[Live]:
    """A server that has seen no request, and names its figures in its own way."""
    with live_server(AsyncLLM(DEMO_MODEL, **OPTIONS), metrics_prefix="mine") as running:
        yield running
        running.assert_idle()


def families(live: Live) -> dict[str, Any]:
    """Returns what `/metrics` has, by name; no name twice."""
    with urllib.request.urlopen(f"{live.url}/metrics", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        found = list(text_string_to_metric_families(answer.read().decode()))
    by_name = {family.name: family for family in found}
    assert len(by_name) == len(found)
    return by_name


def value(found: dict[str, Any], name: str, suffix: str = "", **labels: str) -> float:
    (sample,) = [
        one
        for one in found[f"mine:{name}"].samples
        if one.name == f"mine:{name}{suffix}" and one.labels.items() >= labels.items()
    ]
    return sample.value


def test_all_names_are_there_with_the_models(exact: Exact) -> None:
    found = families(exact.live)
    kinds = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    kinds |= dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name for name in found if name.startswith("vllm:")} == {f"vllm:{n}" for n in kinds}
    for name, kind in kinds.items():
        family = found[f"vllm:{name}"]
        assert family.type == kind
        assert family.documentation
        suffix = "_total" if kind == "counter" else ""
        for sample in family.samples:
            assert sample.labels["model_name"] == "chatty"
            assert sample.name.startswith(f"vllm:{name}{suffix}")
    assert {one.labels["finished_reason"] for one in found["vllm:request_success"].samples} == {
        *("stop", "length", "abort")
    }
    (config,) = found["vllm:cache_config_info"].samples
    assert config.value == 1
    assert (config.labels["block_size"], config.labels["num_gpu_blocks"]) == ("16", "200")
    assert found["process_resident_memory_bytes"].samples[0].value > 0


def test_counts_are_those_of_the_requests(counted: Live) -> None:
    nothing = families(counted)
    for name in COUNTERS[:-3]:
        assert value(nothing, name, "_total") == 0
    with openai.OpenAI(base_url=f"{counted.url}/v1", api_key="none", max_retries=0) as client:
        request: Any = {"model": MODEL, "prompt": PROMPT, "temperature": 0}
        whole = client.completions.create(**request, max_tokens=5).usage
        ended = client.completions.create(**request, max_tokens=9, logit_bias={"1": 100}).usage
        (*_, last) = client.completions.create(
            **request, max_tokens=7, stream=True, stream_options={"include_usage": True}
        )
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**request, n=0)
        with client.completions.create(**request, max_tokens=300, stream=True) as left:
            next(iter(left))
    counted.assert_idle()
    found = families(counted)
    num_prompt, num_cached = whole.prompt_tokens, ended.prompt_tokens_details.cached_tokens
    assert num_cached == (num_prompt - 1) // 16 * 16 > 0
    assert value(found, "prompt_tokens", "_total") == 4 * num_prompt
    for generation in ("prefix_cache", "gpu_prefix_cache"):
        assert value(found, f"{generation}_queries", "_total") == 4 * num_prompt
        assert value(found, f"{generation}_hits", "_total") == 3 * num_cached
    for reason, count in {"length": 2, "stop": 1, "abort": 1}.items():
        assert value(found, "request_success", "_total", finished_reason=reason) == count
    for gauge in GAUGES[:-1]:
        assert value(found, gauge) == 0
    assert (ended.completion_tokens, last.usage.completion_tokens) == (1, 7)
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds"):
        assert value(found, name, "_count") == 4
    assert value(found, "request_prompt_tokens", "_sum") == 4 * num_prompt
    assert value(found, "request_prompt_tokens", "_count") == 4
    generated = value(found, "generation_tokens", "_total")
    assert value(found, "request_generation_tokens", "_sum") <= generated
    assert value(found, "request_generation_tokens", "_bucket", le="1.0") == 1
    assert 5 + 1 + 7 < generated < 5 + 1 + 7 + 300
    check_histograms(found)


def check_histograms(found: dict[str, Any]) -> None:
    """Asserts that buckets only grow, up to the count, and fit the sums and each other."""
    for name in HISTOGRAMS:
        samples = found[f"mine:{name}"].samples
        buckets = [(float(s.labels["le"]), s.value) for s in samples if "le" in s.labels]
        bounds, counts = zip(*buckets, strict=True)
        assert bounds == tuple(sorted(set(bounds)))
        assert counts == tuple(sorted(counts))
        assert (bounds[-1], counts[-1]) == (math.inf, value(found, name, "_count"))
        least = sum(
            low * (count - before)
            for low, before, count in zip((0, *bounds), (0, *counts), counts, strict=False)
        )
        assert value(found, name, "_sum") >= least
    whole, parts = (
        sum(value(found, f"request_{name}_time_seconds", "_sum") for name in names)
        for names in (("queue", "inference"), ("queue", "prefill", "decode"))
    )
    assert whole == pytest.approx(parts)
    assert whole == pytest.approx(value(found, "e2e_request_latency_seconds", "_sum"))
