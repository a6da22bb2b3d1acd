"""The offline API: prompts in, completions out."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from pallas_paged.dispatch import target_device
from pallas_paged.engine import device_memory
from pallas_paged.engine.buckets import Buckets
from pallas_paged.engine.compilation_cache import use_compilation_cache
from pallas_paged.engine.config import (
    EngineConfig,
    resolve_kv_cache_dtype,
    resolve_max_model_len,
)
from pallas_paged.engine.core import Engine
from pallas_paged.engine.kv_stats import KVStats
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.metrics import Metric, metrics
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.policies import (
    CheaperRecovery,
    ChooseRecovery,
    Order,
    PriorityOrder,
    always_recompute,
    always_swap,
)
from pallas_paged.engine.pool import PoolPlan, cache_shapes, plan_pool
from pallas_paged.engine.prompts import (
    Message,
    Params,
    Prompt,
    PromptReader,
    broadcast_params,
    cache_salt,
    split_conversations,
    split_prompts,
)
from pallas_paged.engine.runner import ModelRunner
from pallas_paged.engine.sampling_params import BeamSearchParams, SamplingParams
from pallas_paged.engine.scheduler import Scheduler
from pallas_paged.engine.sequence import SequenceGroup
from pallas_paged.engine.swap import HostPool
from pallas_paged.engine.tokenizer import known_eos_token_ids, load_tokenizer, require_tokenizer
from pallas_paged.engine.turns import Turns
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import (
    ModelConfig,
    init_model,
    load_config,
    load_eos_token_ids,
    load_model,
    load_sampling_defaults,
)
from pallas_paged.ops.attention.api import attention_implementation
from pallas_paged.ops.kv_write.api import write_implementation

logger = logging.getLogger(__name__)

_COMPUTED_BYTES_PER_S = 200e12
"""Weights that a prompt's tokens pass in a second: 400 bfloat16 TFLOP/s. For `"auto"` only."""
_COPIED_BYTES_PER_S = 20e9
"""Between a GPU and pinned host memory over PCIe 4.0. For `"auto"` only."""
_SWAP_OVERHEAD_S = 1e-4
"""Of the launches of one swap. For `"auto"` only."""


class LLM:
    """A model, its KV cache and the engine that serves it from this process.

    Several threads may use it: their requests run in one batch, and a step runs in the thread that
    waits for it. If that is interrupted, or fails, it raises there, and the other threads' requests
    end with `finish_reason="abort"` and the error as `stop_reason`. A forked child cannot use it.

    Args:
      model: folder with a Hugging Face checkpoint: `config.json`, safetensors, and tokenizer files
        if text is to go in or out; or with what `pallas_paged.models.port` made of one.
      **options: the other fields of `EngineConfig`.

    Attributes:
      announce: called with a line while a request waits for a compilation, after two seconds and
        where no progress bar says so; logs it, and may be replaced.

    Raises:
      ValueError: an option or the checkpoint is not usable; the message names the field or tensor.
      FileNotFoundError: the folder or one of its files is missing.
    """

    def __init__(self, model: str | Path, **options: Any):
        stats = device_memory.memory_stats()
        options = device_memory.with_limits(options, stats)
        self.config = config = EngineConfig(model=str(model), **options)
        assert config.seed is not None
        use_compilation_cache(config.compilation_cache_dir)
        shape = load_config(config.model)  # first: what is wrong with it is not the tokenizer's
        self.max_model_len = resolve_max_model_len(config, shape)
        self.model_config = shape = shape.for_length(self.max_model_len)
        self.tokenizer = load_tokenizer(config.tokenizer or config.model)
        network = (
            init_model(config.model, config.dtype, config.seed, config=shape)
            if config.load_format == "dummy"
            else load_model(config.model, config.dtype, config=shape)
        )
        dtype = jax.tree.leaves(nnx.state(network))[0].dtype
        cache_dtype = resolve_kv_cache_dtype(config, dtype)
        _warn_of_slow_types(dtype, cache_dtype)
        caches = cache_shapes(network.config, 2, config.block_size, cache_dtype)
        implementation = _choose_attention(config, network.config, dtype, caches[0])
        writes = _choose_writes(config, network.config, dtype, caches[0])
        self.buckets = Buckets.for_config(config)
        plan = plan_pool(
            config, network, self.buckets, self.max_model_len, cache_dtype, implementation
        )
        logger.info(
            "attention: %s, writes: %s, on %s", implementation, writes, target_device().device_kind
        )
        logger.info("%s", plan)
        if plan.max_blocks_per_seq * config.block_size < self.max_model_len:
            logger.warning(
                "the KV pool holds %d tokens, fewer than max_model_len=%d: longer requests will be "
                "refused",
                plan.max_blocks_per_seq * config.block_size,
                self.max_model_len,
            )
        memory = BlockTableMemory(
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=plan.max_blocks_per_seq * config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.runner = ModelRunner(
            network,
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            kv_cache_dtype=cache_dtype,
            max_num_seqs=config.max_num_seqs,
            max_blocks_per_seq=plan.max_blocks_per_seq,
            buckets=self.buckets,
            max_logprobs=config.max_logprobs,
            implementation=implementation,
            cache_implementation=config.cache_implementation,
            deterministic=config.deterministic,
            swaps=config.swap_space > 0,
        )
        num_host_blocks = int(config.swap_space * 2**30 / plan.block_bytes)
        scheduler = Scheduler(
            memory,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            order=PriorityOrder() if config.scheduling_policy == "priority" else Order(),
            choose_recovery=_recovery(config, plan),
            host_pool=HostPool(num_host_blocks, memory.num_usable_blocks),
        )
        vocab_size = network.config.vocab_size
        self._prompts = PromptReader(self.tokenizer, config.model, vocab_size)
        self.engine = Engine(
            scheduler,
            memory,
            self.runner,
            vocab_size=vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=known_eos_token_ids(
                load_eos_token_ids(config.model), self.tokenizer, vocab_size
            ),
            tokenizer=self.tokenizer,
            seed=config.seed,
            max_logprobs=config.max_logprobs,
            async_scheduling=config.async_scheduling,
        )
        self.announce: Callable[[str], object] = logger.info
        self._turns = Turns()
        self._awaited: set[str] = set()
        self._outputs: dict[str, RequestOutput] = {}
        if config.compile_ahead:
            self.warm_up()

    def warm_up(self) -> None:
        """Compiles every program, so that no request waits for a compilation."""
        with self._turns:
            self.runner.programs.announce = self.announce
            self.runner.warm_up()

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: Params | Seq[Params] | None = None,
        use_tqdm: bool = True,
        priority: Seq[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts as one continuously batched run.

        Args:
          prompts: one or several of `Prompt`; a list of integers is one.
          sampling_params: one for all, or one per prompt; None means what
            `get_default_sampling_params` returns, of whose `max_tokens` as many as fit. Some may be
            `BeamSearchParams`.
          use_tqdm: show progress on standard error, compilations too.
          priority: one number per prompt, lower ones first; for `scheduling_policy="priority"`.

        Returns:
          One output per prompt, in the order of the prompts.

        Raises:
          ValueError: a prompt or parameter is not usable; the message says which of several.
            Nothing has been run, and the next call gives what it would have given without this.
        """
        requests = self._check_all(prompts, sampling_params, priority)
        done: dict[str, RequestOutput] = {}
        with tqdm(total=len(requests), unit="request", disable=not use_tqdm) as progress:
            counts = self.engine.counts
            begin = counts.num_generated_tokens
            announce = progress.set_postfix_str if use_tqdm else self.announce
            for output in self._run(requests, announce, final_only=True):
                done[output.request_id] = output
                progress.update()
                tokens = counts.num_generated_tokens - begin
                seconds = max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{tokens / seconds:.1f} output tokens/s")
        return [done[group.request_id] for group, _ in requests]

    def beam_search(
        self,
        prompts: Prompt | Seq[Prompt],
        params: BeamSearchParams | Seq[BeamSearchParams],
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Searches the most likely completions of prompts, as one batch.

        Args:
          prompts: see `generate`.
          params: one for all, or one per prompt.
          use_tqdm: see `generate`.

        Returns:
          One output per prompt, in the order of the prompts. Its `num_return` completions are
          sorted by their `score`, best first.

        Raises:
          ValueError: see `generate`; or params of another kind.
        """
        for one in params if isinstance(params, list | tuple) else [params]:
            if not isinstance(one, BeamSearchParams):
                raise ValueError(f"params={one!r:.80} must be BeamSearchParams; see `generate`")
        return self.generate(prompts, params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: Params | Seq[Params] | None = None,
        priority: Seq[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes prompts like `generate`, and yields each output whenever it has grown.

        The last output of a request has `finished` set. What is wrong with a prompt is raised
        before this returns; the requests run while the result is iterated over, together with
        those of other iterations. Leaving the iteration early aborts what has not finished.
        A beam search is yielded once, when it is over.
        """
        return self._run(self._check_all(prompts, sampling_params, priority), self.announce)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: Params | Seq[Params] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Seq[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Seq[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several as one batch.

        Args:
          messages: a conversation, `[{"role": ..., "content": ...}, ...]`, or a list of them. A
            content is a string or a list of `{"type": "text", "text": ...}`; templates that do not
            loop over the list get the texts joined by newlines.
          sampling_params: see `generate`.
          use_tqdm: see `generate`.
          chat_template: a Jinja template, or the name of one of the tokenizer's; None is its only
            one, or of several "tool_use" if there are tools, else "default".
          add_generation_prompt: end the prompt where the assistant's answer begins.
          continue_final_message: let the model go on with the last message instead; needs
            `add_generation_prompt=False`.
          tools: functions that the model may call, as JSON schemas or as Python functions with type
            hints and a docstring; what it answers is text, as always.
          chat_template_kwargs: further variables of the template, such as `enable_thinking`.
          priority: see `generate`; one number per conversation.

        Raises:
          ValueError: there is no tokenizer or no such template, the template does not accept the
            messages, or as for `generate`.
        """
        prompts = [
            self._prompts.from_chat(
                conversation,
                name,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for name, conversation in split_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    def chat_prompt(
        self,
        messages: Seq[Message],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Seq[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Returns the prompt that `chat` makes of one conversation."""
        return self._prompts.from_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )

    def abort(self, request_id: str) -> None:
        """Ends a request that `stream` is running; unknown and finished ones are ignored.

        Raises:
          ValueError: `request_id` is no string.
        """
        if not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r:.80} must be a string: abort one by one")
        with self._turns:
            self.engine.abort(request_id)

    def pin_prefix(self, prompt: Prompt) -> int:
        """Computes a prefix, such as a system prompt, and keeps it until `unpin_prefix`.

        Requests that begin with these tokens find them computed, however little memory there is.
        Pinned blocks count against the pool. A failed step loses them, as it loses all cached ones.

        Returns:
          How many tokens are kept: those in full blocks.

        Raises:
          ValueError: the prompt is not usable, shorter than a block, or so long that a request
            which is running could not end beside it; prefix caching is off.
          RuntimeError: it could not be computed; the message says why.
        """
        ids, salt = self._prefix(prompt)
        once = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        request: Prompt = {"prompt_token_ids": ids}
        if salt is not None:
            request = {"prompt_token_ids": ids, "cache_salt": salt}
        while not self._pin(ids, salt):
            (output,) = self.generate(request, once, use_tqdm=False)
            if output.outputs[0].finish_reason == "abort":
                reason = output.outputs[0].stop_reason
                raise RuntimeError(f"prompt={prompt!r:.80} was not computed: {reason}")
        return len(ids)

    def _pin(self, token_ids: tuple[int, ...], salt: str | None) -> bool:
        with self._turns:
            return self.engine.pin(token_ids, salt)

    def unpin_prefix(self, prompt: Prompt) -> None:
        """Lets a pinned prefix go; it stays cached until its memory is needed.

        Raises:
          ValueError: the prefix is not pinned.
        """
        prefix = self._prefix(prompt)
        with self._turns:
            was_pinned = self.engine.unpin(*prefix)
        if not was_pinned:
            raise ValueError(f"prompt={prompt!r:.80} is not pinned; `pin_prefix` was never called")

    def _prefix(self, prompt: Prompt) -> tuple[tuple[int, ...], str | None]:
        """Returns the tokens of a prompt's full blocks, and its salt."""
        if not self.config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=False keeps no prefix; turn it on to pin one")
        _, ids = self._prompts.read(prompt)
        num_full = len(ids) // self.config.block_size
        if not num_full:
            raise ValueError(
                f"a prefix of {len(ids)} tokens fills no block of {self.config.block_size}; pin a "
                "longer one, or use a smaller block_size"
            )
        return tuple(ids[: num_full * self.config.block_size]), cache_salt(prompt)

    def kv_stats(self) -> KVStats:
        """Returns what the blocks of the KV pool hold now, and counts since the engine began."""
        with self._turns:
            return self.engine.kv_stats()

    def get_metrics(self) -> list[Metric]:
        """Returns gauges and counters by the names of vLLM, see `pallas_paged.engine.metrics`."""
        with self._turns:
            engine = self.engine
            stats = engine.kv_stats()
            return metrics(engine.scheduler, stats, engine.counts, self.config.model)

    def reset_prefix_cache(self) -> bool:
        """Forgets the cached blocks that no request uses and nobody has pinned.

        Returns:
          Whether those are all; otherwise call it again when the running requests have ended.
        """
        with self._turns:
            return self.engine.reset_prefix_cache()

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer, as transformers made it.

        Raises:
          ValueError: the folder has none.
        """
        return require_tokenizer(self.tokenizer, self.config.model).implementation

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns `SamplingParams` with what the model's `generation_config.json` advises.

        These are its temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens, where
        it has them; see `pallas_paged.models.load_sampling_defaults`.

        Raises:
          ValueError: one of them is not usable; requests then have to bring their own.
        """
        defaults: dict[str, Any] = dict(load_sampling_defaults(self.config.model))
        try:
            return SamplingParams(**defaults)
        except ValueError as error:
            raise ValueError(
                f"the generation_config.json of {self.config.model}: {error}; or pass "
                "sampling_params"
            ) from error

    @property
    def kv_cache_usage(self) -> float:
        """The share of the pool's blocks that sequences hold, in [0, 1]."""
        stats = self.kv_stats()
        return stats.num_allocated_blocks / stats.num_blocks

    def _check_all(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: Params | Seq[Params] | None,
        priority: Seq[int] | None,
    ) -> list[tuple[SequenceGroup, str | None]]:
        """Returns a group for each prompt, and the prompt's text; queues nothing yet."""
        split = split_prompts(prompts)
        priorities = self._priorities(priority, len(split))
        most_tokens = None
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
            most_tokens = sampling_params.max_tokens
            sampling_params = dataclasses.replace(sampling_params, max_tokens=None)
        params = broadcast_params(sampling_params, len(split))

        def read(prompt: Prompt) -> tuple[str | None, Seq[int], str | None]:
            return *self._prompts.read(prompt), cache_salt(prompt)

        prompts_read = [self._named(index, split, read, each) for index, each in enumerate(split)]
        checked = []
        with self._turns, self.engine.all_or_none():
            for index, (text, ids, salt) in enumerate(prompts_read):
                make = functools.partial(self.engine.make_group, cache_salt=salt)
                group = self._named(index, split, make, ids, params[index])
                group.priority = priorities[index]
                if most_tokens is not None:
                    group.max_tokens = min(group.max_tokens, most_tokens)
                checked.append((group, text))
        return checked

    @staticmethod
    def _named[T](index: int, split: list[Prompt], function: Callable[..., T], *args: Any) -> T:
        """Calls the function; what it raises says which of several prompts is meant."""
        try:
            return function(*args)
        except ValueError as error:
            if len(split) == 1:
                raise
            raise ValueError(f"prompts[{index}]: {error}") from error

    def _priorities(self, priority: Seq[int] | None, count: int) -> Seq[int]:
        """Returns each prompt's priority; 0 without any."""
        if priority is None:
            return [0] * count
        if self.config.scheduling_policy != "priority":
            raise ValueError(
                f"priority={priority!r:.80} needs scheduling_policy='priority', and this engine "
                f"has {self.config.scheduling_policy!r}"
            )
        is_list = isinstance(priority, list | tuple) and len(priority) == count
        if not is_list or not all(type(p) is int for p in priority):
            raise ValueError(
                f"priority={priority!r:.80} must be a list of one integer for each of {count} "
                "prompts"
            )
        return priority

    def _run(
        self,
        requests: list[tuple[SequenceGroup, str | None]],
        announce: Callable[[str], object],
        *,
        final_only: bool = False,
    ) -> Iterator[RequestOutput]:
        """Queues the requests and steps the engine until they are done.

        Several iterations may be under way, also in several threads: each step's outputs are left
        for whoever waits. `announce` is told of compilations.
        """
        unfinished = {group.request_id for group, _ in requests}
        try:
            with self._turns:
                self._awaited |= unfinished
                for group, text in requests:
                    self.engine.add(group, text, final_only=final_only)
            while unfinished:
                with self._turns:
                    ready = self._next_outputs(unfinished, announce)
                for output in ready:
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
        finally:
            if self._turns.is_here:
                with self._turns:
                    self._leave(unfinished)

    def _next_outputs(
        self, request_ids: set[str], announce: Callable[[str], object]
    ) -> list[RequestOutput]:
        """Returns what there is of these requests, after a step if there is nothing."""
        self._file_outputs()  # those that an interrupt kept from it
        if request_ids.isdisjoint(self._outputs):
            assert self.engine.has_unfinished, f"nothing will come for {request_ids}"
            self.runner.programs.announce = announce
            self.engine.advance()
            self._file_outputs()
        ready = [self._outputs.pop(each) for each in sorted(request_ids & self._outputs.keys())]
        self._awaited -= {output.request_id for output in ready if output.finished}
        return ready

    def _file_outputs(self) -> None:
        """Puts the engine's outputs where those who wait for them look; may be begun again."""
        for output in self.engine.undelivered:
            if output.request_id in self._awaited:
                self._outputs[output.request_id] = output
        self.engine.undelivered.clear()

    def _leave(self, unfinished: set[str]) -> None:
        """Ends what an iteration leaves behind; nobody waits for it any more.

        The collector of garbage may close an iteration in the middle of a call of this thread, and
        a step that is under way is no time for another one.
        """
        self._awaited -= unfinished  # first and at once: what is interrupted here is not kept
        for request_id in unfinished:
            self._outputs.pop(request_id, None)
            self.engine.abort(request_id)
        if not self._awaited and not self._turns.is_nested:
            self.engine.drain()


def _warn_of_slow_types(dtype: jnp.dtype, cache_dtype: jnp.dtype) -> None:
    """Says what XLA does not have on a CPU, so that every step converts or copies all of it."""
    if target_device().platform != "cpu":
        return
    if dtype == jnp.float16:
        logger.warning(
            "a CPU multiplies no float16: every step converts the weights; use dtype='float32'"
        )
    if cache_dtype == jnp.float8_e4m3fn:
        logger.warning(
            "a CPU has no float8_e4m3fn: every step copies the KV cache; use kv_cache_dtype='int8'"
        )


def _recovery(config: EngineConfig, plan: PoolPlan) -> ChooseRecovery:
    """Returns the policy that `preemption_mode` names."""
    if config.preemption_mode == "recompute" or not config.swap_space:
        return always_recompute
    if config.preemption_mode == "swap":
        return always_swap
    return CheaperRecovery(
        seconds_per_token=plan.weight_bytes / _COMPUTED_BYTES_PER_S,
        seconds_per_block=plan.block_bytes / _COPIED_BYTES_PER_S,
        seconds_per_swap=_SWAP_OVERHEAD_S,
        block_size=config.block_size,
    )


def _choose_attention(config: EngineConfig, shape: ModelConfig, dtype: Any, cache: KVCache) -> str:
    """Returns which attention a model of that shape and dtype runs with."""
    q = jax.ShapeDtypeStruct((1, shape.num_q_heads, shape.head_dim), dtype)
    return attention_implementation(
        config.attention_implementation, q, cache.k, deterministic=config.deterministic
    )


def _choose_writes(config: EngineConfig, shape: ModelConfig, dtype: Any, cache: KVCache) -> str:
    """Returns what writes such a model's keys and values."""
    k = jax.ShapeDtypeStruct((1, shape.num_kv_heads, shape.head_dim), dtype)
    return write_implementation(config.cache_implementation, k, cache)
