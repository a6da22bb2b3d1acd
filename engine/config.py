"""Engine configuration: frozen, checked when built; derived values are functions of it."""

import dataclasses
import math
import os
import secrets
from typing import Any

import jax.numpy as jnp

from pallas_paged.dispatch import KNOWN_IMPLEMENTATIONS
from pallas_paged.engine.core.speculation import speculation_settings
from pallas_paged.engine.kv_events import DEFAULT_BUFFER_STEPS, check_kv_events

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
LOGPROBS_MODES = ("raw", "processed")
_LOGPROBS_MODE_ALIASES = {f"{mode}_logprobs": mode for mode in LOGPROBS_MODES}
LOAD_FORMATS = ("auto", "dummy")
KV_CACHE_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "fp8": jnp.float8_e4m3fn,
    "fp8_e4m3": jnp.float8_e4m3fn,
    "int8": jnp.int8,
}
"""What the KV cache can be stored as, beside "auto"."""
DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
"""The pool on a CPU when nothing is asked for: a stated size, not a share of all memory."""

CPU_SCHEDULER_STEPS = 8
"""Decode steps in one program on a CPU when nothing is asked for."""

PREEMPTION_MODES = ("recompute", "swap", "auto")
SCHEDULING_POLICIES = ("fcfs", "priority")
_SWITCHES = (
    *("async_scheduling", "deterministic", "compile_ahead", "verify_kernels"),
    "enable_prefix_caching",
    "merge_projections",
)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How an engine runs. The names are those of vLLM's engine arguments where it has them.

    Attributes:
      model: folder with a Hugging Face checkpoint, or with a ported one.
      tokenizer: folder with tokenizer files; None means `model`.
      dtype: of parameters and activations: "auto" (the checkpoint's), "float32" or "float",
        "bfloat16", "float16" or "half", or such a NumPy or JAX dtype; held under the first name.
      load_format: "auto" reads the checkpoint's weights, "dummy" draws random ones (from `seed`)
        for the shape in `config.json`, the only file then needed.
      kv_cache_dtype: of the KV cache: "auto", "float32", "bfloat16", "float16", or quantised: "fp8"
        or "fp8_e4m3" (the same), "int8", with a scale per token and KV head or the checkpoint's.
        "auto" is what that has scales for (but not fp8 on a CPU, which has none), else `dtype`.
      max_model_len: most tokens (prompt + output) of a sequence; None means the model's limit, with
        `rope_scaling` as far as that reaches, but for LongRoPE the length before it: longer
        sequences, which compute all with other factors, are to be asked for.
      max_num_seqs: most sequences that run at once. `LLM` has other defaults on a GPU, for this and
        the next: 256, and 8192 tokens with 70 GiB or more, else 2048.
      max_num_batched_tokens: most tokens computed in one step; longer prompts are computed in
        chunks. At least `max_num_seqs`, so that every running sequence can advance in every step.
      block_size: tokens in a KV block.
      num_blocks: size of the pool in blocks, the null block included; wins over
        `kv_cache_memory_bytes`.
      kv_cache_memory_bytes: size of the pool in bytes, of each device's part if several share the
        model; wins over `gpu_memory_utilization`.
      gpu_memory_utilization: share of the whole card's memory for weights, temporaries and pool
        together, as far as JAX may use it: by default JAX takes 75 % of the card, and the
        environment variable XLA_CLIENT_MEM_FRACTION more.
        On a CPU the default pool is 1 GiB on each device (or less, when all sequences at their
        longest need less).
      seed: where the seeds of requests that bring none are drawn from, and dummy weights. None or
        -1 draws one at every start, which is what is held then.
      max_logprobs: most log-probabilities per token that a request may ask for; -1 allows the whole
        vocabulary, which every step that returns log-probabilities then copies to the host.
      logprobs_mode: "raw" or "raw_logprobs": log-probabilities are the model's own; "processed" or
        "processed_logprobs": those of sampled tokens are of the distribution that they were drawn
        from, after bias, penalties, masks, temperature, min-p, top-k and top-p; tokens that these
        leave out have -inf there. For a greedy request that is after bias, penalties and masks.
        Those of prompts and of beam searches are the model's own in both. Held under the first
        name.
      attention_implementation: None chooses by platform; a named one is used or refused.
      cache_implementation: the same for what writes and copies KV blocks.
      async_scheduling: schedule and dispatch a step before the previous one's tokens are on the
        host.
      num_scheduler_steps: the most decode steps that one program makes before the host looks, while
        nobody waits for single tokens: all requests that run came to `generate`, or want their
        output at its end only, and without stop strings, penalties, and log-probabilities of more
        than the tokens themselves. Their tokens are the same. None: 8 on a CPU, where the host's
        work takes the model's cores, and 1 elsewhere.
      token_logprobs: whether there are programs of steps that give each token's log-probability and
        do nothing else that others do not, for requests with `logprobs=0`. Without them these run
        in the steps of those with penalties and with `logprobs=k`, a token at a time. As many
        programs more are compiled ahead, where any are. None: yes, but for engines that compile
        ahead or have a bundle, which is to hold all that they ever run.
      deterministic: run every step in one fixed shape, so that in float32 a request's tokens do
        not depend, bit for bit, on what else is in its batches. Decoding then costs as much as
        the largest step.
      compile_ahead: compile every bucket when the engine starts instead of at first use.
      speculative_config: guess tokens, and compute several of a sequence in one step: a dictionary
        with vLLM's keys. "method" is "draft_model": a small model of the same vocabulary, in the
        folder "model", guesses "num_speculative_tokens" behind each step; it draws them with the
        keys that the requests' own samples have, and its keys and values share the pool's blocks.
        Or "method" is "ngram": what followed the last time that the sequence had its
        last tokens, `prompt_lookup_min` (2) to `prompt_lookup_max` (4) of them, is taken for what
        follows now; up to "num_speculative_tokens" are. Outputs are the same. It is faster for
        texts that repeat their prompt or themselves, and where few sequences run; a request that
        gains less than "min_gain" (0.25) tokens a step goes on without. Steps of such requests
        wait for the host. Requests with log-probabilities, penalties or beams run as always.
      background_compilation: where a step's shape is not compiled yet, run it in a larger one that
        is while a thread compiles its own, and compile ahead of need what the next step will
        have. Sums in another shape round differently, so that which of two tokens comes that are
        as good as equal may depend on it. None: on a CPU, unless `deterministic`; a GPU tunes
        matrix products while it compiles, and should do nothing else.
      verify_kernels: on a GPU, whether each kernel that the model needs first runs on a small
        problem beside XLA's program for the same; one that differs ends the start, by name.
      disable_cascade_attn: read a prefix that many sequences share for each of them, and not for
        several at a time (see `Bucket.shares_prefix`). None: on a CPU, which has it in its caches.
      compilation_cache_dir: folder in which JAX keeps compiled programs, one per process; "auto"
        is the one JAX is configured with, else `~/.cache/pallas-paged`; None leaves JAX's
        configuration as it is. Another folder than the process already uses is refused; one that
        cannot be written to is reported, and nothing is kept.
      bundle: folder with the programs of an engine like this one, which
        `python -m pallas_paged.engine.compile` wrote; None has none. A bundle is loaded with
        pickle, which runs whatever is in it: name none that you do not trust. Options of `LLM` that
        are not given are those of the bundle, the pool's size too if the device holds it. What a
        bundle has is not compiled; if it was made for something else, a warning says what differs,
        and everything is compiled.
      enable_prefix_caching: keep full blocks of finished requests for later ones that begin with
        the same tokens. On by default: cached blocks only take memory that nobody else asks for.
      swap_space: GiB of host memory for the blocks of requests that are preempted, in each process.
        0: they are computed again instead.
      preemption_mode: how preempted requests come back: "recompute"; "swap", as long as there is
        room in `swap_space`; "auto", which is faster for each request by its length and blocks,
        from times of steps and copies that it measures when the engine starts, if `swap_space`
        is not 0. That takes a few steps and copies, and the compilation of their programs, and
        two starts may decide differently.
      scheduling_policy: "fcfs", first come, first served; "priority": requests with a lower
        `priority` run first, and take the memory of others if they need it.
      step_log: file to append a line of JSON to for each step and compilation, see `StepLog`.
      profile_dir: folder for traces of JAX's profiler, see `LLM.start_profile`.
      profile_steps: trace the steps from the first of these to before the second, counted from the
        engine's start; needs `profile_dir`.
      kv_events_endpoint: ZeroMQ endpoint, like "tcp://*:5557", on which routers are told what is
        cached, see `pallas_paged.engine.kv_events`; None publishes nothing. Prompts can be read
        there. Needs the extra `serve`.
      kv_events_topic: what each message begins with.
      kv_events_replay_endpoint: where routers can ask for batches that they missed; None has none.
      kv_events_buffer_steps: how many batches are kept for that, one per step.
      tensor_parallel_size: how many devices share the model: each has a part of the heads, of the
        MLPs' features and of the vocabulary, see `pallas_paged.models.sharding`. KV heads fewer
        than devices are kept several times. Of several processes (`jax.distributed`) it is the
        number of all their devices, see `pallas_paged.engine.distributed`.
      merge_projections: compute the projections of one input, to queries, keys and values or to
        gate and up, as one product, by one parameter. False keeps their parameters apart, as
        checkpoints and most trainers have them: `LLM.update_weights` then takes a trainer's as they
        are, and each step runs more products. `benchmarks.weights` measures both.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int | None = 0
    max_logprobs: int = 20
    logprobs_mode: str = "raw"
    attention_implementation: str | None = None
    cache_implementation: str | None = None
    async_scheduling: bool = True
    num_scheduler_steps: int | None = None
    token_logprobs: bool | None = None
    deterministic: bool = False
    compile_ahead: bool = False
    background_compilation: bool | None = None
    verify_kernels: bool = True
    disable_cascade_attn: bool | None = None
    speculative_config: dict[str, Any] | None = None
    compilation_cache_dir: str | None = "auto"
    bundle: str | None = None
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    merge_projections: bool = True
    swap_space: float = 0
    preemption_mode: str = "auto"
    scheduling_policy: str = "fcfs"
    step_log: str | None = None
    profile_dir: str | None = None
    profile_steps: tuple[int, int] | None = None
    kv_events_endpoint: str | None = None
    kv_events_topic: str = ""
    kv_events_replay_endpoint: str | None = None
    kv_events_buffer_steps: int = DEFAULT_BUFFER_STEPS

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        mode = self.logprobs_mode
        if isinstance(mode, str):
            object.__setattr__(self, "logprobs_mode", _LOGPROBS_MODE_ALIASES.get(mode, mode))
        ok = mode not in ("raw_logits", "processed_logits")
        _require(
            ok,
            self,
            "logprobs_mode",
            f"is not offered: logits are not given back; use one of {LOGPROBS_MODES}",
        )
        if self.seed is None or self.seed == -1:
            object.__setattr__(self, "seed", secrets.randbits(63))
        ok = self.load_format in LOAD_FORMATS
        _require(ok, self, "load_format", f"must be one of {LOAD_FORMATS}")
        for name, choices in (
            ("dtype", DTYPES),
            ("kv_cache_dtype", ("auto", *KV_CACHE_DTYPES)),
            ("logprobs_mode", LOGPROBS_MODES),
        ):
            _require(getattr(self, name) in choices, self, name, f"must be one of {choices}")
        for name in (
            *("max_num_seqs", "max_num_batched_tokens", "block_size"),
            "tensor_parallel_size",
        ):
            _require(_is_int(getattr(self, name), 1), self, name, "must be an integer >= 1")
        for name, least in (
            ("max_model_len", 2),
            ("num_blocks", 2),
            ("kv_cache_memory_bytes", 1),
            ("num_scheduler_steps", 1),
        ):
            value = getattr(self, name)
            ok = value is None or _is_int(value, least)
            _require(ok, self, name, f"must be None or an integer >= {least}")
        ok = _is_int(self.seed, 0, 2**63 - 1)
        _require(ok, self, "seed", "must be an integer from 0 to 2**63 - 1; None or -1 draws one")
        folder = self.compilation_cache_dir
        ok = folder is None or (isinstance(folder, str | os.PathLike) and bool(os.fspath(folder)))
        _require(ok, self, "compilation_cache_dir", "must be 'auto', the name of a folder or None")
        ok = self.bundle is None or (
            isinstance(self.bundle, str | os.PathLike) and bool(os.fspath(self.bundle))
        )
        _require(ok, self, "bundle", "must be the name of a folder or None")
        ok = _is_int(self.max_logprobs, -1)
        _require(ok, self, "max_logprobs", "must be an integer >= -1; -1 allows the vocabulary")
        share = self.gpu_memory_utilization
        ok = isinstance(share, int | float) and 0 < share <= 1
        _require(ok, self, "gpu_memory_utilization", "must be in (0, 1]")
        for name in _SWITCHES:
            _require(isinstance(getattr(self, name), bool), self, name, "must be True or False")
        speculation = speculation_settings(self.speculative_config)
        ok = speculation is None or not self.deterministic
        _require(ok, self, "speculative_config", "must be None with deterministic=True")
        for name in ("background_compilation", "disable_cascade_attn", "token_logprobs"):
            ok = getattr(self, name) in (None, True, False)
            _require(ok, self, name, "must be True, False or None")
        room = self.swap_space
        ok = isinstance(room, int | float) and not isinstance(room, bool) and 0 <= room < 2**30
        _require(ok, self, "swap_space", "must be a number of GiB >= 0")
        for name, choices in (
            ("preemption_mode", PREEMPTION_MODES),
            ("scheduling_policy", SCHEDULING_POLICIES),
        ):
            _require(getattr(self, name) in choices, self, name, f"must be one of {choices}")
        _require(
            self.preemption_mode != "swap" or room > 0,
            self,
            "preemption_mode",
            "needs host memory; set swap_space",
        )
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            self,
            "max_num_batched_tokens",
            f"must be at least max_num_seqs={self.max_num_seqs}",
        )
        for name in ("step_log", "profile_dir"):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, str | os.PathLike) and bool(os.fspath(value)))
            _require(ok, self, name, "must be the name of a file or folder, or None")
        steps = self.profile_steps
        ok = steps is None or (
            isinstance(steps, tuple | list)
            and len(steps) == 2
            and _is_int(steps[0], 0)
            and _is_int(steps[1], steps[0] + 1)
        )
        _require(ok, self, "profile_steps", "must be two integers, 0 <= first < second, or None")
        _require(
            steps is None or self.profile_dir is not None,
            self,
            "profile_steps",
            "needs a folder for the trace; set profile_dir",
        )
        check_kv_events(
            self.kv_events_endpoint,
            self.kv_events_topic,
            self.kv_events_replay_endpoint,
            self.kv_events_buffer_steps,
            self.enable_prefix_caching,
        )
        _require(
            not self.deterministic or self.num_scheduler_steps in (None, 1),
            self,
            "num_scheduler_steps",
            "must be None or 1 with deterministic=True, where every step has the same shape",
        )
        for name in ("attention_implementation", "cache_implementation"):
            _require(
                getattr(self, name) in (None, *KNOWN_IMPLEMENTATIONS),
                self,
                name,
                f"must be None or one of {KNOWN_IMPLEMENTATIONS}",
            )


def _dtype_name(dtype: Any) -> Any:
    """Returns the first name of a dtype; what is none is left for the check."""
    if isinstance(dtype, str):
        return _DTYPE_ALIASES.get(dtype, dtype)
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return dtype


def _is_int(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(condition: bool, config: EngineConfig, name: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={getattr(config, name)!r} {rule}")
