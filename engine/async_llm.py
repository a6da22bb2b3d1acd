"""The API for coroutines: any number of concurrent requests, each a stream of outputs."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_paged.engine.async_engine import AsyncEngine
from pallas_paged.engine.build import Built, build, config_with_limits
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.errors import EngineDeadError
from pallas_paged.engine.kv.stats import KVStats, kv_stats
from pallas_paged.engine.metrics import Metric, metrics
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.text.prompts import (
    Message,
    Params,
    Prompt,
    PromptReader,
    cache_salt,
    checked_priorities,
)
from pallas_paged.engine.text.tokenizer import Tokenizer
from pallas_paged.engine.watching import watch

MAX_QUEUED_REQUESTS = 1024
"""Requests that may wait, when nothing else is asked for."""
_LONG_TEXT = 4096
"""Characters; a longer prompt is split by another thread than the event loop's."""
_NUM_READERS = 2


class AsyncLLM:
    """A model, its KV cache, and the engine that serves it to the coroutines of one event loop.

    Its thread runs from the beginning to `shutdown`, or the end of `async with`.

    Args:
      model: see `LLM`.
      max_queued_requests: requests that may wait for the engine, beside those that run; more are
        refused with `EngineOverloadedError`.
      **options: the other fields of `EngineConfig`.

    Attributes:
      config: what the engine is like.
      engine: what hands requests to it.
      tokenizer: the engine's; None where the folder has none.
      model_config: see `Built`, as is the next one.
      max_model_len: likewise.
      kv_events: publishes what is cached, until `shutdown`; None without `kv_events_endpoint`.
      vocab_size: V; token ids are below it.

    Raises:
      ValueError, FileNotFoundError: see `LLM`; or `max_queued_requests` is below 1.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        **options: Any,
    ):
        if max_queued_requests < 1:
            raise ValueError(f"max_queued_requests={max_queued_requests} must be at least 1")
        config = config_with_limits(str(model), options)
        built = build(config)
        if config.compile_ahead:
            built.runner.warm_up()
        self._join(config, built, max_queued_requests)

    @classmethod
    def of_built(
        cls,
        config: EngineConfig,
        built: Built,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        data_parallel_rank: int = 0,
    ) -> "AsyncLLM":
        """Returns one over an engine that has been built, and is nobody else's.

        `data_parallel_rank` is its place among replicas, as its `kv_events` tell.
        """
        llm = cls.__new__(cls)
        llm._join(config, built, max_queued_requests, data_parallel_rank)
        return llm

    def _join(
        self, config: EngineConfig, built: Built, max_queued_requests: int, rank: int = 0
    ) -> None:
        """Takes an engine as its own, and starts its thread."""
        self.config = config
        self.tokenizer: Tokenizer | None = built.tokenizer
        self.model_config, self.max_model_len = built.model_config, built.max_model_len
        self.vocab_size = self.model_config.vocab_size
        self._prompts = PromptReader(built.tokenizer, config.model, self.vocab_size)
        core, programs = built.parts.core, built.runner.programs
        self._profiler, self.kv_events = watch(core, programs, config, rank)
        self._readers = concurrent.futures.ThreadPoolExecutor(_NUM_READERS, "prompt-reader")
        weakref.finalize(self, self._readers.shutdown, wait=False)
        self._num_named, self._defaults = 0, built.source.sampling_defaults
        self.engine = AsyncEngine(built.parts, max_queued_requests)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    # --- requests -----------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt, and yields its output whenever it has grown; see `submit`.

        Leaving the iteration, or cancelling who iterates, aborts the request.
        """
        stream = await self.submit(
            prompt, sampling_params, request_id, priority=priority, timeout_s=timeout_s
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Takes a request in, and returns the stream of its outputs.

        Args:
          prompt: see `Prompt`.
          sampling_params: None means what `generation_config.json` advises, of whose `max_tokens`
            as many as fit. `output_kind` says what each output holds; a beam search has one.
          request_id: what the outputs are called, different from all requests that have not ended.
            None is a new name.
          priority: lower ones first; for `scheduling_policy="priority"`.
          timeout_s: seconds after which it is aborted, with `DeadlineExceededError`.

        Raises:
          ValueError: prompt, parameters, id or priority are not usable; the message names them.
            Nothing has been queued.
          EngineOverloadedError: too many requests wait. Nothing has been queued.
          EngineDrainingError, EngineDeadError: no new requests are taken.
          RuntimeError: requests of another event loop are unfinished.
        """
        arrival_s = time.monotonic()
        self.engine.check_accepts()
        priorities = None if priority is None else [priority]
        (rank,) = checked_priorities(priorities, 1, self.config.scheduling_policy)
        params, most_tokens = self._checked_params(sampling_params)
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r} must be above 0, or None for no limit")
        if not isinstance(request_id, str | None):
            raise ValueError(f"request_id={request_id!r:.80} must be a string or None")
        text, ids = await self.read_prompt(prompt)
        salt = cache_salt(prompt)
        parts = self.engine.parts
        bad_sequences = parts.bad_sequences(params)
        grammar = None
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            grammar = await self._in_reader(functools.partial(parts.grammar, params))
        if request_id is None:
            request_id = self._new_name()

        def make_group() -> SequenceGroup:
            group = parts.intake.make_group(ids, params, request_id, salt, bad_sequences, grammar)
            group.arrival_time, group.priority = arrival_s, rank
            if most_tokens is not None:
                group.max_tokens = min(group.max_tokens, most_tokens)
            return group

        kind = RequestOutputKind.FINAL_ONLY
        if isinstance(params, SamplingParams):
            kind = params.output_kind
        return await self.engine.open(
            request_id, make_group, prompt=text, kind=kind, timeout_s=timeout_s
        )

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends one request or several; unknown and finished ones are ignored.

        That is done before the next step begins. Each stream then gets a last output, with
        `finish_reason="abort"` and what there is of the request.
        """
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self.engine.abort(one)

    async def chat_prompt(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """Returns the prompt of a conversation; see `LLM.chat_prompt` for the options."""
        return await self._in_reader(
            functools.partial(self._prompts.from_chat, messages, **options)
        )

    async def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns a text's tokens; `ValueError` if it is none, or the model has not all of them."""
        encode = functools.partial(self._prompts.encode, add_special_tokens=add_special_tokens)
        if len(text) > _LONG_TEXT:
            return await self._in_reader(functools.partial(encode, text))
        return encode(text)

    def _new_name(self) -> str:
        while True:
            self._num_named += 1
            name = f"async-{self._num_named}"
            if name not in self.engine:  # a caller may choose such a name
                return name

    def _checked_params(self, params: Params | None) -> tuple[Params, int | None]:
        """Returns a request's parameters, and the most tokens where these are the model's own."""
        if params is None:
            params = self._defaults()
            return dataclasses.replace(params, max_tokens=None), params.max_tokens
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise ValueError(
                f"sampling_params={params!r:.80} must be SamplingParams, BeamSearchParams or None"
            )
        return params, None

    async def read_prompt(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        """Returns a prompt's text, if it came as text, and its tokens; `ValueError` for none."""
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str) and len(text) > _LONG_TEXT:
            return await self._in_reader(functools.partial(self._prompts.read, prompt))
        return self._prompts.read(prompt)

    async def _in_reader[T](self, function: Callable[[], T]) -> T:
        if not self.is_running:  # nor are the readers
            raise self.dead_error
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    # --- state --------------------------------------------------------------------------------

    @property
    def replicas(self) -> Sequence["AsyncLLM"]:
        """Itself: the engines of an `EngineClient`."""
        return (self,)

    def check_accepts(self) -> None:
        """Tells whether a request of the running event loop would be taken in now.

        Raises:
          EngineDeadError, EngineDrainingError, EngineOverloadedError: it would not.
          RuntimeError: requests of another event loop are unfinished.
        """
        self.engine.check_accepts()

    @property
    def is_running(self) -> bool:
        """Whether steps can run."""
        return self.engine.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine has ended by an error."""
        return self.engine.is_dead

    @property
    def dead_error(self) -> EngineDeadError:
        """What requests get once the engine has ended."""
        return self.engine.dead_error

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if no step can run any more."""
        if not self.is_running:
            raise self.dead_error

    async def kv_stats(self) -> KVStats:
        """Returns what the blocks of the KV pool hold between two steps."""
        parts = self.engine.parts
        return await self.engine.call(lambda: kv_stats(parts.memory, parts.core.scheduler))

    async def get_metrics(self) -> list[Metric]:
        """Returns gauges and counters by the names of vLLM, see `pallas_paged.engine.metrics`."""
        core, counts = self.engine.parts.core, self.engine.parts.counts
        return metrics(core, await self.kv_stats(), counts, self.config.model)

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached blocks, see `LLM.reset_prefix_cache`."""
        return await self.engine.call(self.engine.parts.memory.reset_prefix_cache)

    async def start_profile(self) -> None:
        """Begins a trace of JAX's profiler, see `LLM.start_profile`."""
        await self.engine.call(self._profiler.start)

    async def stop_profile(self) -> None:
        """Ends the trace and writes it, see `LLM.stop_profile`."""
        await self.engine.call(self._profiler.stop)

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what requests without parameters get, see `LLM.get_default_sampling_params`."""
        return self._defaults()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new requests, and waits for those that it has; returns whether all ended."""
        return await self.engine.drain(timeout_s)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Ends the engine and its thread; requests that are unfinished after `drain_s` fail."""
        await self.engine.shutdown(drain_s)
        if self.kv_events is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.kv_events.close)
        await asyncio.get_running_loop().run_in_executor(None, self._readers.shutdown)
