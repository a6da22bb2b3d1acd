"""The serving engine: scheduler, runner, sampling and the LLM API."""

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineOverloadedError,
    ProcessLostError,
    StepFailedError,
)
from pallas_paged.engine.llm import LLM
from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.replicas import ReplicatedLLM
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "DeadlineExceededError",
    "EngineConfig",
    "EngineDeadError",
    "EngineDrainingError",
    "EngineError",
    "EngineOverloadedError",
    "Logprob",
    "ProcessLostError",
    "ReplicatedLLM",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StepFailedError",
    "StructuredOutputsParams",
]
