"""The offline API: a model and its engine in this process, for programs that wait for outputs."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pallas_paged.engine.build import Built, build, config_with_limits
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.engine import Pinned
from pallas_paged.engine.kv.sharing import Root
from pallas_paged.engine.kv.stats import KVStats
from pallas_paged.engine.metrics import Metric, metrics
from pallas_paged.engine.model_source import GivenSource, ModelSource
from pallas_paged.engine.offline import OfflineLLM
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.scoring_params import check_temperature, scoring_params, token_logprobs
from pallas_paged.engine.sleeping import WEIGHTS, Freed, Sleep
from pallas_paged.engine.text.prompts import Prompt
from pallas_paged.engine.watching import watch
from pallas_paged.engine.weights import Matched, WeightsUpdate, check_mode
from pallas_paged.models.given import NameMapping


class LLM(OfflineLLM):
    """A model, its KV cache and the engine that serves it from this process.

    Several threads may use it: their requests run in one batch, and a step runs in the thread that
    waits for it. If that is interrupted, or fails, it raises there, and the other threads' requests
    end with `finish_reason="abort"` and the error as `stop_reason`. A forked child cannot use it.

    Args:
      model: folder with a Hugging Face checkpoint: `config.json`, safetensors, and tokenizer files
        if text is to go in or out; or with what `pallas_paged.models.port` made of one.
        `from_model` takes a model that is in memory.
      **options: the other fields of `EngineConfig`.

    Attributes:
      announce: called with a line while a request waits for a compilation, after two seconds and
        where no progress bar says so; logs it, and may be replaced.
      kv_events: publishes what is cached, until its `close`; None without `kv_events_endpoint`.

    Raises:
      ValueError: an option or the checkpoint is not usable; the message names the field or tensor.
      FileNotFoundError: the folder or one of its files is missing.
    """

    def __init__(self, model: str | Path, **options: Any):
        self._begin(str(model), options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        state: Any = None,
        mapping: NameMapping | None = None,
        eos_token_ids: Sequence[int] = (),
        **options: Any,
    ) -> "LLM":
        """Returns an engine over a model that this program has, such as the one that it trains.

        Arrays that have the engine's dtype, lie on its devices and are divided as it divides them
        are used as they are: nothing is copied. So they must not be donated to another program
        while the engine may run, see `update_weights`.

        Args:
          model: a Flax NNX module of `pallas_paged.models`; or the configuration of a family, such
            as `LlamaConfig`, whose weights are `state`.
          tokenizer: one of transformers, or a folder with one; None takes and gives token ids only.
          state: the weights of a configuration, see `update_weights`; None with a module.
          mapping: from the names of the weights to ours, see there.
          eos_token_ids: tokens that end an output, beside the tokenizer's EOS.
          **options: fields of `EngineConfig`. `dtype` is by default that of the weights.

        Raises:
          ValueError: an option, the model or its weights are not usable; the message names them.
        """
        source = GivenSource(model, state, tokenizer, eos_token_ids, mapping)
        llm = cls.__new__(cls)
        llm._begin(source.name, options, source)
        return llm

    def _begin(
        self, model: str, options: dict[str, Any], source: ModelSource | None = None
    ) -> None:
        """Builds the engine."""
        config = config_with_limits(model, options)
        self._join(config, build(config, source=source))
        if config.compile_ahead:
            self.warm_up()

    def _join(self, config: EngineConfig, built: Built) -> None:
        """Takes an engine as its own."""
        super().__init__(config, built)
        self._profiler, self.kv_events = watch(self.engine.core, self.runner.programs, config)
        self._weights = built.weights
        self._sleep = Sleep(self.engine, self.runner, built.weights)

    # --- scores -------------------------------------------------------------------------------

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Prompt | Sequence[Prompt],
        temperature: float = 1.0,
        use_tqdm: bool = False,
    ) -> list[np.ndarray]:
        """Returns how likely the model finds given completions, token by token.

        They run as one batch through the programs of `generate`; nothing is taken from the prefix
        cache, and nothing is kept in it.

        Args:
          prompts: see `generate`; none of them empty.
          completions: one for each prompt, likewise; a text is split without special tokens.
          temperature: divides the logits; above 0. That of the sampling, if scores are to be held
            against what was drawn with it.
          use_tqdm: show progress on standard error.

        Returns:
          For each completion f32[n], the log-probabilities of its n tokens: the log-softmax of the
          model's logits, divided by the temperature, without penalties and filters.

        Raises:
          ValueError: a prompt or completion is not usable, or both together are longer than
            `max_model_len`; the message says which of several. Or the temperature is not above 0.
        """
        temperature = check_temperature(temperature)
        pairs = self._reader.read_pairs(prompts, completions)
        texts: list[Prompt] = [
            {"prompt_token_ids": [*ids, *completion][:-1]} for ids, completion in pairs
        ]
        params = [
            scoring_params([*ids, *completion], len(completion), temperature)
            for ids, completion in pairs
        ]
        outputs = self.generate(texts, params, use_tqdm) if texts else []
        return [
            token_logprobs(output, completion)
            for output, (_, completion) in zip(outputs, pairs, strict=True)
        ]

    # --- weights and memory -------------------------------------------------------------------

    @property
    def weights_version(self) -> int:
        """Of the weights that the next token comes from: 0, and 1 more for each update."""
        return self.engine.core.weights_version

    def update_weights(
        self, state: Any, mapping: NameMapping | None = None, *, mode: str = "wait"
    ) -> WeightsUpdate:
        """Puts other weights in the place of the model's; compiles no step, and forgets all caches.

        Arrays that have the layout, dtype and devices of the engine's parameters take their place
        as they are: the engine and the caller then share their memory. Who donates them to the next
        training step must call this again with its result before any other request; requests in
        between fail, and say so. Everything else is made by one compiled program, to which the
        engine donates its own arrays that it replaces; it is compiled once for each kind of state.

        Args:
          state: a module, an `nnx.State`, or a tree of arrays, of JAX or NumPy. Where an array
            stands in it, joined by dots, is its name: that of a tensor in a checkpoint of Hugging
            Face, or of one of our parameters, which may hold several tensors.
          mapping: from the names in `state` to such names, for those that differ. In a name `*`
            stands for one part between dots, and for the same in ours. In the place of our name can
            stand that and a function, which makes our array of the caller's; let it be the same
            function in each call, for it is compiled.
          mode: what becomes of unfinished requests, those of other threads or of a `stream`:
            "wait" finishes them first, with the old weights; "abort" ends them; "keep" lets them go
            on from the tokens that they have, whose keys and values are computed again.

        Returns:
          The new version, and what was cast, joined and moved. In outputs
          `CompletionOutput.weights_versions` tells for each token which weights it came from.

        Raises:
          ValueError: arrays are missing, unused, misshapen, of another dtype than float32, bfloat16
            or float16, or deleted; all are listed by name. Or a value is too large for float16.
            Nothing has changed.
        """
        check_mode(mode)
        with self._turns:
            matched = self._weights.match(state, mapping)
            if mode == "wait":
                self.engine.finish_requests()
            elif mode == "abort":
                self.engine.abort_requests()
            update, pinned = self.engine.change_device(lambda: self._take(matched))
            self._sleep.pinned += pinned
            self._pin_again([] if self.engine.asleep else self._sleep.take_pinned())
        return update

    def _take(self, matched: Matched) -> WeightsUpdate:
        """Takes new weights between two steps."""
        update = self._weights.take(matched, self.weights_version + 1)
        self.engine.core.note_new_weights()
        self.engine.asleep -= {WEIGHTS}
        return update

    @property
    def is_sleeping(self) -> bool:
        """Whether memory has been given back that requests need."""
        return bool(self.engine.asleep)

    def sleep(self, level: int = 1) -> Freed:
        """Gives memory back, until `wake_up`; programs stay compiled, and requests are refused.

        Prefixes are forgotten; those that are pinned are computed again on waking up.

        Args:
          level: 1, the KV pool; 2, that and the weights, of which no copy is kept: they come back
            by `update_weights`, or from the engine's folder by `wake_up`.

        Returns:
          The bytes that are free now, which are logged too.

        Raises:
          ValueError: there is no such level; the engine is of several processes.
          RuntimeError: requests are unfinished.
        """
        with self._turns:
            return self._sleep.begin(level)

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Gets back what `sleep` has given, from newly allocated memory.

        Args:
          tags: what of it, "kv_cache" or "weights"; None is all.

        Raises:
          ValueError: there is no such tag; the weights cannot be read, see `load_model`.
          RuntimeError: the weights were given by `from_model`: `update_weights` brings others.
        """
        with self._turns:
            self._sleep.end(tags)
            self._pin_again([] if self.engine.asleep else self._sleep.take_pinned())

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
        ids, salt = self._reader.read_prefix(prompt)
        self._pin_again([(ids, salt)])
        return len(ids)

    def _pin_again(self, prefixes: Sequence[Pinned]) -> None:
        """Pins prefixes, and computes those that are not there."""
        once = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        for ids, salt in prefixes:
            request: Prompt = {"prompt_token_ids": ids}
            if salt is not None:
                request = {"prompt_token_ids": ids, "cache_salt": str(salt)}
            while not self._pin(ids, salt):
                (output,) = self.generate(request, once, use_tqdm=False)
                if output.outputs[0].finish_reason == "abort":
                    reason = output.outputs[0].stop_reason
                    raise RuntimeError(f"the prefix {ids!r:.80} was not computed: {reason}")

    def _pin(self, token_ids: tuple[int, ...], salt: Root) -> bool:
        with self._turns:
            return self.engine.pin(token_ids, salt)

    def unpin_prefix(self, prompt: Prompt) -> None:
        """Lets a pinned prefix go; it stays cached until its memory is needed.

        Raises:
          ValueError: the prefix is not pinned.
        """
        prefix = self._reader.read_prefix(prompt)
        with self._turns:
            was_pinned = self.engine.unpin(*prefix)
        if not was_pinned:
            raise ValueError(f"prompt={prompt!r:.80} is not pinned; `pin_prefix` was never called")

    def kv_stats(self) -> KVStats:
        """Returns what the blocks of the KV pool hold now, and counts since the engine began."""
        with self._turns:
            return self.engine.kv_stats()

    def get_metrics(self) -> list[Metric]:
        """Returns gauges and counters by the names of vLLM, see `pallas_paged.engine.metrics`."""
        with self._turns:
            stats, counts = self.engine.kv_stats(), self.engine.counts
            return metrics(self.engine.core, stats, counts, self.config.model)

    def reset_prefix_cache(self) -> bool:
        """Forgets the cached blocks that no request uses and nobody has pinned.

        Returns:
          Whether those are all; otherwise call it again when the running requests have ended.
        """
        with self._turns:
            return self.engine.reset_prefix_cache()

    @property
    def kv_cache_usage(self) -> float:
        """The share of the pool's blocks that sequences hold, in [0, 1]."""
        stats = self.kv_stats()
        return stats.num_allocated_blocks / stats.num_blocks

    def start_profile(self) -> None:
        """Begins a trace of JAX's profiler into `profile_dir`, until `stop_profile`.

        Raises:
          RuntimeError: a trace is under way, or the engine has no `profile_dir`.
        """
        self._profiler.start()

    def stop_profile(self) -> None:
        """Ends the trace and writes it; `RuntimeError` if none is under way."""
        self._profiler.stop()
