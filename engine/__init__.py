"""The serving engine: scheduler, runner, sampling and the LLM API."""

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.llm import LLM
from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]
