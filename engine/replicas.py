"""Several engines over disjoint devices of this host, as one: data parallelism in one process."""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_paged.engine.async_llm import MAX_QUEUED_REQUESTS, AsyncLLM
from pallas_paged.engine.build import build, config_with_limits
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.errors import EngineDeadError, EngineError
from pallas_paged.engine.kv_events import endpoint_of_rank
from pallas_paged.engine.metrics import Metric
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.prefix_router import PrefixRouter, block_hashes
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.prompts import Message, Params, Prompt, cache_salt

logger = logging.getLogger(__name__)


class ReplicatedLLM:
    """Replicas of a model behind the methods of an `AsyncLLM`, which are described there.

    A request goes to the replica that has its prompt's prefix cached, or the least loaded one, see
    `PrefixRouter`, and stays there. One that ends by an error fails its own requests and gets no
    more; the others go on, while `check_accepts` and `check_health` raise: who watches the process
    is to start it again, for an engine cannot be.

    Args:
      model: see `LLM`.
      data_parallel_size: how many replicas. The first has the first `tensor_parallel_size` of
        JAX's local devices, the next one those behind them.
      max_queued_requests: requests that may wait at each replica, see `AsyncLLM`.
      **options: the other fields of `EngineConfig`, for each of them. Replica i publishes its
        `kv_events` at ports that are greater by i, as in vLLM, and writes its `step_log` to a file
        with the suffix `.i`. A trace, which is one for the process, counts the steps of the first.

    Attributes:
      config: what each of them is like.
      replicas: they themselves.
      tokenizer, model_config, max_model_len, vocab_size: see `AsyncLLM`.
      router: chooses among them.

    Raises:
      ValueError, FileNotFoundError: see `AsyncLLM`; or there are too few devices.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        data_parallel_size: int,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        **options: Any,
    ):
        if max_queued_requests < 1:
            raise ValueError(f"max_queued_requests={max_queued_requests} must be at least 1")
        config = config_with_limits(str(model), options)
        groups = device_groups(jax.local_devices(), data_parallel_size, config.tensor_parallel_size)
        configs = [config_of_rank(config, rank) for rank in range(data_parallel_size)]
        replicas = []
        for rank, (own, devices) in enumerate(zip(configs, groups, strict=True)):
            logger.info("replica %d of %d: %s", rank, data_parallel_size, devices)
            built = build(own, Placement.on(*devices))
            if own.compile_ahead:
                built.runner.warm_up()
            replicas.append(AsyncLLM.of_built(own, built, max_queued_requests, rank))
        self._join(config, replicas)

    @classmethod
    def of_replicas(cls, config: EngineConfig, replicas: Sequence[AsyncLLM]) -> "ReplicatedLLM":
        """Returns one over engines with this configuration, which are nobody else's."""
        llm = cls.__new__(cls)
        llm._join(config, replicas)
        return llm

    def _join(self, config: EngineConfig, replicas: Sequence[AsyncLLM]) -> None:
        self.config, self.replicas = config, tuple(replicas)
        first = self.replicas[0]
        self.tokenizer, self.model_config = first.tokenizer, first.model_config
        self.max_model_len, self.vocab_size = first.max_model_len, first.vocab_size
        num_blocks = sum(each.engine.parts.memory.num_usable_blocks for each in self.replicas)
        self.router = PrefixRouter(len(self.replicas), num_blocks)
        self._coming: dict[str, int] = {}  # replicas of requests that are being submitted
        self._num_named = 0

    async def __aenter__(self) -> "ReplicatedLLM":
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
        """Completes a prompt, see `AsyncLLM.generate`."""
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
        """Takes a request in at one of the replicas, see `AsyncLLM.submit`.

        It is refused by `EngineOverloadedError` where none of those that run has room.
        """
        self._loads()  # raises where nobody would take it
        text, ids = await self._reader.read_prompt(prompt)
        salt = cache_salt(prompt)
        if request_id is None:
            request_id = self._new_name()
        elif request_id in self:
            raise ValueError(f"request_id={request_id!r:.80} is in use; choose another")
        hashes: list[int] = []
        if self.config.enable_prefix_caching:
            hashes = block_hashes(ids, self.config.block_size, salt)
        rank = self.router.choose(hashes, self._loads())
        self.router.note(hashes, rank)
        read = {"prompt_token_ids": ids, "prompt": text, "cache_salt": salt}
        self._coming[request_id] = rank
        try:
            return await self.replicas[rank].submit(
                read, sampling_params, request_id, priority=priority, timeout_s=timeout_s
            )
        finally:
            del self._coming[request_id]

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of that name is on its way, or has not had its end."""
        is_open = any(request_id in replica.engine for replica in self.replicas)
        return request_id in self._coming or is_open

    def _new_name(self) -> str:
        while True:
            self._num_named += 1
            if (name := f"async-{self._num_named}") not in self:  # a caller may choose such a name
                return name

    def _loads(self) -> list[int | None]:
        """Returns the unfinished requests of each replica; None of one that takes no more.

        Raises:
          EngineError: none does; of several reasons one that passes.
        """
        loads: list[int | None] = []
        errors: list[EngineError] = []
        for rank, replica in enumerate(self.replicas):
            try:
                replica.check_accepts()
            except EngineError as error:
                errors.append(error)
                loads.append(None)
            else:
                engine = replica.engine
                coming = [name for name, to in self._coming.items() if to == rank]
                num_new = sum(name not in engine for name in coming)
                loads.append(engine.num_open_requests + num_new)
        if len(errors) == len(self.replicas):
            raise min(errors, key=lambda error: isinstance(error, EngineDeadError))
        return loads

    @property
    def _reader(self) -> AsyncLLM:
        """A replica that reads prompts, which all do alike."""
        return next((each for each in self.replicas if each.is_running), self.replicas[0])

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends one request or several, wherever they run; see `AsyncLLM.abort`."""
        for replica in self.replicas:
            await replica.abort(request_id)

    async def chat_prompt(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """Returns the prompt of a conversation; see `LLM.chat_prompt` for the options."""
        return await self._reader.chat_prompt(messages, **options)

    async def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns a text's tokens, see `AsyncLLM.token_ids`."""
        return await self._reader.token_ids(text, add_special_tokens=add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what requests without parameters get, see `LLM.get_default_sampling_params`."""
        return self.replicas[0].get_default_sampling_params()

    # --- state --------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether steps can run, in one replica at least."""
        return any(replica.is_running for replica in self.replicas)

    @property
    def errored(self) -> bool:
        """Whether a replica has ended by an error."""
        return any(replica.errored for replica in self.replicas)

    @property
    def dead_error(self) -> EngineDeadError:
        """What says which replica has ended first in their order, and why."""
        rank = next((i for i, each in enumerate(self.replicas) if not each.is_running), 0)
        cause = self.replicas[rank].dead_error
        error = EngineDeadError(f"replica {rank} of {len(self.replicas)}: {cause}")
        error.__cause__ = cause
        return error

    def check_accepts(self) -> None:
        """Tells whether all replicas run, and one of them would take a request in now.

        Raises:
          EngineDeadError: one has ended, be it that others go on.
          EngineDrainingError, EngineOverloadedError, RuntimeError: see `AsyncLLM.check_accepts`.
        """
        if not all(replica.is_running for replica in self.replicas):
            raise self.dead_error
        self._loads()

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if a replica can run no step any more."""
        if not all(replica.is_running for replica in self.replicas):
            raise self.dead_error

    async def get_metrics(self) -> list[Metric]:
        """Returns the figures of all replicas that run, each with its place as the label `engine`.

        Raises:
          EngineDeadError: none runs.
        """
        found: list[Metric] = []
        for rank, replica in enumerate(self.replicas):
            if replica.is_running:
                label = {"engine": str(rank)}
                found += [
                    dataclasses.replace(one, labels={**one.labels, **label})
                    for one in await replica.get_metrics()
                ]
        if not found:
            raise self.dead_error
        return found

    async def reset_prefix_cache(self) -> bool:
        """Forgets the cached blocks of all replicas that run; returns whether all did.

        See `LLM.reset_prefix_cache`.
        """
        self.router.clear()
        running = [replica for replica in self.replicas if replica.is_running]
        return all(await asyncio.gather(*(each.reset_prefix_cache() for each in running)))

    async def start_profile(self) -> None:
        """Begins a trace of the process, all devices; see `LLM.start_profile`."""
        await self.replicas[0].start_profile()

    async def stop_profile(self) -> None:
        """Ends the trace and writes it, see `LLM.stop_profile`."""
        await self.replicas[0].stop_profile()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new requests, and waits for those that there are; returns whether all ended."""
        return all(await asyncio.gather(*(each.drain(timeout_s) for each in self.replicas)))

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Ends all replicas; requests that are unfinished after `drain_s` seconds fail."""
        await asyncio.gather(*(each.shutdown(drain_s) for each in self.replicas))


def device_groups(
    devices: Sequence[jax.Device], data_parallel_size: int, group_size: int
) -> list[Sequence[jax.Device]]:
    """Returns the devices of each replica: consecutive ones, none in two groups.

    Raises:
      ValueError: `data_parallel_size` is below 1, there are fewer than
        `data_parallel_size * group_size` devices, or this is one of several processes.
    """
    if data_parallel_size < 1:
        raise ValueError(f"data_parallel_size={data_parallel_size} must be at least 1")
    if jax.process_count() > 1:
        raise ValueError(
            f"data_parallel_size={data_parallel_size} is for one process: several processes share "
            "one model; across hosts run replicas with Ray Serve, or a server on each"
        )
    num_needed = data_parallel_size * group_size
    if num_needed > len(devices):
        platform = devices[0].platform
        way_out = "use fewer replicas"
        if platform == "cpu":
            way_out += f", or set XLA_FLAGS=--xla_force_host_platform_device_count={num_needed}"
        raise ValueError(
            f"data_parallel_size={data_parallel_size} with tensor_parallel_size={group_size} "
            f"needs {num_needed} devices, and JAX sees {len(devices)} ({platform}); {way_out}"
        )
    return [devices[at : at + group_size] for at in range(0, num_needed, group_size)]


def config_of_rank(config: EngineConfig, rank: int) -> EngineConfig:
    """Returns the configuration of one replica: what cannot be the same for two is its own.

    Seeds of requests that bring none are others, but random weights are the same.
    """
    changes: dict[str, Any] = {
        "kv_events_endpoint": endpoint_of_rank(config.kv_events_endpoint, rank),
        "kv_events_replay_endpoint": endpoint_of_rank(config.kv_events_replay_endpoint, rank),
    }
    if config.step_log is not None:
        changes["step_log"] = f"{config.step_log}.{rank}"
    if rank:
        changes |= {"profile_dir": None, "profile_steps": None}  # JAX has one profiler
    if config.load_format != "dummy":
        assert config.seed is not None
        changes["seed"] = (config.seed + rank) % 2**63
    return dataclasses.replace(config, **changes)
