"""Flags of programs that serve an engine: the fields of `EngineConfig` that their users set."""

import json
from typing import Any

from absl import flags

from pallas_paged.dispatch import KNOWN_IMPLEMENTATIONS
from pallas_paged.engine.config import (
    DTYPES,
    KV_CACHE_DTYPES,
    LOGPROBS_MODES,
    PREEMPTION_MODES,
    SCHEDULING_POLICIES,
)
from pallas_paged.models.demo import DEMO_MODEL

_AUTO = "by default as the device allows"

_MODEL = flags.DEFINE_string(
    "model",
    str(DEMO_MODEL),
    "Folder with a Hugging Face checkpoint, or with a ported one; by default the small model that "
    "comes with the package.",
)
_FLAGS = (
    flags.DEFINE_string("tokenizer", None, "Folder with tokenizer files; by default the model's."),
    flags.DEFINE_enum("dtype", "auto", list(DTYPES), "Type of weights and activations."),
    flags.DEFINE_enum(
        "kv_cache_dtype",
        "auto",
        ["auto", *KV_CACHE_DTYPES],
        "Type of the KV cache; auto is the one that the checkpoint has scales for, or dtype.",
    ),
    flags.DEFINE_integer(
        "max_model_len", None, "Most tokens of prompt and output; by default the model's limit."
    ),
    flags.DEFINE_integer("max_num_seqs", None, f"Most sequences that run at once; {_AUTO}."),
    flags.DEFINE_integer("max_num_batched_tokens", None, f"Most tokens of a step; {_AUTO}."),
    flags.DEFINE_integer("block_size", None, "Tokens of a KV block; by default 16."),
    flags.DEFINE_integer("num_blocks", None, "Size of the KV pool in blocks; wins over bytes."),
    flags.DEFINE_integer("kv_cache_memory_bytes", None, "Size of the KV pool in bytes."),
    flags.DEFINE_float(
        "gpu_memory_utilization", None, "Share of a GPU's memory to use; by default 0.9."
    ),
    flags.DEFINE_integer("tensor_parallel_size", None, "Devices that share the model; 1."),
    flags.DEFINE_float("swap_space", None, "GiB of host memory for preempted requests."),
    flags.DEFINE_enum(
        "preemption_mode",
        None,
        list(PREEMPTION_MODES),
        "How they come back; by default what is faster, by times measured at the start.",
    ),
    flags.DEFINE_enum(
        "scheduling_policy", None, list(SCHEDULING_POLICIES), "Who runs before whom."
    ),
    flags.DEFINE_bool("enable_prefix_caching", None, "Keep blocks for later requests; on."),
    flags.DEFINE_integer("max_logprobs", None, "Most log-probabilities per token; by default 20."),
    flags.DEFINE_enum(
        "logprobs_mode",
        None,
        list(LOGPROBS_MODES),
        "Log-probabilities in the model's own distribution, or in that which tokens are drawn "
        "from; raw.",
    ),
    flags.DEFINE_bool(
        "token_logprobs",
        None,
        "Programs of plain steps that also give tokens' log-probabilities (logprobs=0), compiled "
        "ahead too; by default with neither compile_ahead nor bundle.",
    ),
    flags.DEFINE_bool("deterministic", None, "One shape of steps: the same answers in any batch."),
    flags.DEFINE_bool(
        "compile_ahead", None, "Compile all programs before the first request; off by default."
    ),
    flags.DEFINE_enum(
        "attention_implementation",
        None,
        KNOWN_IMPLEMENTATIONS,
        "Chosen by the device if not given.",
    ),
    flags.DEFINE_enum(
        "cache_implementation", None, KNOWN_IMPLEMENTATIONS, "Of what writes and copies blocks."
    ),
    flags.DEFINE_bool(
        "verify_kernels", None, "On a GPU, run each kernel beside XLA's programs first; on."
    ),
    flags.DEFINE_bool(
        "disable_cascade_attn", None, "Read a shared prefix for each sequence; off on a GPU."
    ),
    flags.DEFINE_string(
        "bundle",
        None,
        "Folder that pallas_paged.engine.compile wrote for this model and machine. It is loaded "
        "with pickle, which runs whatever is in it: name none that you do not trust.",
    ),
    flags.DEFINE_string(
        "kv_events_endpoint",
        None,
        "ZeroMQ endpoint, such as tcp://*:5557, on which routers are told what is cached.",
    ),
    flags.DEFINE_string("kv_events_topic", None, "What each of these messages begins with."),
    flags.DEFINE_string(
        "kv_events_replay_endpoint", None, "Where routers can ask for messages that they missed."
    ),
    flags.DEFINE_integer("seed", None, "Where the seeds of requests that bring none come from."),
)
_SPECULATIVE_CONFIG = flags.DEFINE_string(
    "speculative_config", None, "Guess tokens, as JSON; see EngineConfig.speculative_config."
)


def _is_object(text: str | None) -> bool:
    if text is None:
        return True
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


flags.register_validator("speculative_config", _is_object, "must be a JSON object")


def engine_options() -> dict[str, Any]:
    """Returns the arguments of `LLM` and `AsyncLLM` that the flags set, `model` among them."""
    given = {flag.name: flag.value for flag in _FLAGS if flag.value is not None}
    if _SPECULATIVE_CONFIG.value is not None:
        given["speculative_config"] = json.loads(_SPECULATIVE_CONFIG.value)
    return {"model": _MODEL.value} | given
