"""This engine as the sampler of Tunix's learners, in their process.

A `ClusterConfig` takes the class, or a `functools.partial` of it with options:

  ClusterConfig(rollout_engine=PallasPagedRollout, ...)

Google's Tunix must be installed: the extra `tunix`. Nothing else imports this module.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

try:
    from tunix.generate.tokenizer_adapter import TokenizerAdapter
    from tunix.rl import common
    from tunix.rl.rollout import base_rollout
except ImportError as error:
    raise ImportError(
        "pallas_paged.engine.tunix needs Google's Tunix: pip install 'pallas-paged[tunix]'"
    ) from error

from pallas_paged.engine.llm import LLM
from pallas_paged.engine.outputs import CompletionOutput
from pallas_paged.engine.tunix_mappings import config_of, dtype_of, mapping_of
from pallas_paged.engine.tunix_requests import (
    grouped,
    left_padded,
    rows_of,
    sampling_params,
    without_pads,
)
from pallas_paged.models import ModelConfig
from pallas_paged.models.given import NameMapping

logger = logging.getLogger(__name__)

_NUM_CHECKED = 32
"""Tokens whose log-probabilities are compared at the start."""
_TOLERANCES = {"float32": 0.01}
"""Of their mean difference; of 16-bit types it is the next."""
_TOLERANCE = 0.1


class PallasPagedRollout(base_rollout.BaseRollout):
    """An `LLM` that samples for a learner, with the weights that it last got of it.

    Prompts that are equal, as GRPO repeats them, are one request: the prompt is computed once, and
    its completions share the blocks of its keys and values.

    Args:
      rollout_actor: the trainer's model: a Llama 3, Qwen 2 or Qwen 3 of Tunix's; one of ours; or
        another one, with `config` and `mapping`.
      tokenizer: of transformers, sentencepiece, or Tunix's adapter of one.
      mesh: of the devices that serve. Several share the model, as `tensor_parallel_size` says.
      rollout_config: of training. `kv_cache_size` is the most tokens of a sequence, `data_type` the
        engine's dtype (by default that in which the trainer's model computes).
      config: the model's shape; by default that of `rollout_actor`.
      mapping: the trainer's names of weights to ours, see `LLM.update_weights`; by default that of
        the class of `rollout_actor`.
      verify: compare log-probabilities of a few tokens with those of `rollout_actor`.
      **options: further ones of `LLM`, such as `max_num_seqs` and `kv_cache_memory_bytes`.

    Attributes:
      llm: the engine.

    Raises:
      ValueError: an option is not usable, weights are missing, unused or misshapen, or what the
        engine computes is not what `rollout_actor` computes.
      NotImplementedError: a model or a mesh that is not supported.
    """

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        rollout_config: base_rollout.RolloutConfig,
        *,
        config: ModelConfig | None = None,
        mapping: NameMapping | None = None,
        verify: bool = True,
        **options: Any,
    ):
        if not isinstance(tokenizer, TokenizerAdapter):
            tokenizer = TokenizerAdapter(tokenizer)
        _refuse_lora(nnx.state(rollout_actor, nnx.Param))
        _refuse_offloaded(nnx.state(rollout_actor, nnx.Param))
        self._tokenizer = tokenizer
        self._temperature = float(rollout_config.temperature)
        self._has_told_of_pads = False
        # Of what tokens are drawn from, which is what learners hold against their own.
        given = {"logprobs_mode": "processed"} | options
        options = _options(mesh, rollout_config) | given
        is_ours = isinstance(getattr(rollout_actor, "config", None), ModelConfig)
        self._mapping, model, state = mapping, rollout_actor, None
        if not is_ours:
            options = {"dtype": dtype_of(rollout_actor)} | options
            if mapping is None:
                self._mapping = mapping_of(rollout_actor)
            model = config or config_of(rollout_actor, options["max_model_len"])
            state = nnx.state(rollout_actor, nnx.Param)
        self.llm = LLM.from_model(
            model,
            state=state,
            mapping=self._mapping,
            eos_token_ids=[self.eos_id()],
            **options,
        )
        if verify and not is_ours:
            self._verify(rollout_actor)

    def generate(
        self, prompts: list[str], rollout_config: base_rollout.RolloutConfig, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        """Completes prompts, each once; equal ones differently.

        Args:
          prompts: texts, with whatever template they need.
          rollout_config: how. Without a `seed` no two calls give the same; with one, a call gives
            the same for the same prompts and weights.
          **kwargs: there are none.

        Returns:
          `text` is without the token that ended it, as Tunix's own sampler has it; `tokens` and
          `logprobs` are with it, as its vLLM rollout has them, so that a learner sees where its
          policy ends. Prompts are padded to `max_prompt_length`, or if one is longer, to a power of
          two; none is cut. `logits` is None.

        Raises:
          ValueError: a prompt with `max_tokens_to_generate` is longer than `kv_cache_size`, ends
            with the pad token, or a field is not usable.
          RuntimeError: the engine ended a request; the message says why.
        """
        if kwargs:
            raise ValueError(f"generate does not take {', '.join(kwargs)}")
        token_ids = [self._tokenize(prompt) for prompt in prompts]
        ending_ids = list(rollout_config.eos_tokens or [self.eos_id()])
        completions = self._complete(token_ids, rollout_config, ending_ids)
        tokens = [np.array(each.token_ids, np.int32) for each in completions]
        logprobs = None
        if rollout_config.return_logprobs:
            logprobs = [np.array(each.token_logprobs, np.float32) for each in completions]
        return base_rollout.RolloutOutput(
            text=[self._text(each, ending_ids) for each in tokens],
            logits=None,
            tokens=tokens,
            left_padded_prompt_tokens=left_padded(
                token_ids, rollout_config.max_prompt_length, self.pad_id()
            ),
            logprobs=logprobs,
        )

    def _tokenize(self, prompt: str) -> list[int]:
        """Returns a prompt's tokens as Tunix's sampler has them: with one BOS, unless that is 0."""
        bos_id = self._tokenizer.bos_id()
        token_ids = [bos_id] if bos_id else []
        token_ids = self._tokenizer.dedup_bos_ids(token_ids + list(self._tokenizer.encode(prompt)))
        return [int(token) for token in token_ids]

    def _complete(
        self,
        token_ids: Sequence[list[int]],
        rollout_config: base_rollout.RolloutConfig,
        ending_ids: list[int],
    ) -> list[CompletionOutput]:
        seen = [without_pads(prompt, self.pad_id()) for prompt in token_ids]
        if not self._has_told_of_pads and list(map(len, seen)) != list(map(len, token_ids)):
            self._has_told_of_pads = True
            logger.warning(
                "there are prompts with the pad token %d, which Tunix's models leave out, and so "
                "does this engine; give the tokenizer a pad_token of its own",
                self.pad_id(),
            )
        groups = grouped(seen, self.llm.config.max_num_seqs)
        params = [
            sampling_params(rollout_config, ending_ids, len(group.places), index)
            for index, group in enumerate(groups)
        ]
        requests = [{"prompt_token_ids": list(group.prompt)} for group in groups]
        found: dict[int, CompletionOutput] = {}
        for group, output in zip(
            groups, self.llm.generate(requests, params, use_tqdm=False), strict=True
        ):
            for index, place in enumerate(group.places):
                completion = output.outputs[index % len(output.outputs)]  # of a greedy one
                if completion.finish_reason == "abort":
                    raise RuntimeError(f"prompt {place} was aborted: {completion.stop_reason}")
                found[place] = completion
        return [found[place] for place in range(len(token_ids))]

    def _text(self, tokens: np.ndarray, ending_ids: Sequence[int]) -> str:
        end = len(tokens) - 1 if tokens[-1] in ending_ids else len(tokens)
        text: str = self._tokenizer.decode(tokens[:end].tolist())
        return text

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Returns the log-probability of each completion's token, f32[B, C]; 0 for padding.

        Logits are divided by the temperature of training first, unless that is 0, as Tunix's
        learners do it with those of the trainer's model.

        Args:
          prompt_tokens: i32[B, P], padded on the left.
          completion_tokens: i32[B, C], padded on the right.

        Raises:
          ValueError: a row is longer than `kv_cache_size`, or its prompt ends with the pad token.
        """
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        return jnp.asarray(self._score(prompts, completions, self._temperature or 1.0))

    def _score(
        self, prompts: np.ndarray, completions: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        rows = rows_of(prompts, completions, self.pad_id(), self.eos_id())
        scores = np.zeros(completions.shape, np.float32)
        places = [place for place, row in enumerate(rows) if row.completion]
        found = self.llm.score(
            [rows[place].prompt for place in places],
            [rows[place].completion for place in places],
            temperature,
        )
        for place, logps in zip(places, found, strict=True):
            scores[place, rows[place].columns] = logps
        return scores

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Serves these weights from now on, when the requests that run have ended.

        Args:
          params: all of the trainer's, as `nnx.state` gives them.
          filter_types: what they were chosen by.

        Raises:
          ValueError: some are missing, unused or misshapen, all are named; nothing has changed.
          NotImplementedError: they are LoRA's.
        """
        _refuse_lora(params, filter_types)
        report = self.llm.update_weights(params, self._mapping)
        logger.debug("weights of version %d: %s", report.version, report)

    def pad_id(self) -> int:
        """Returns the tokenizer's pad token; without one its EOS, as Tunix has it."""
        return int(self._tokenizer.pad_id())

    def eos_id(self) -> int:
        """Returns the tokenizer's EOS token."""
        return int(self._tokenizer.eos_id())

    def model(self) -> None:
        """Returns None, by which a learner knows that it has to call `update_params`.

        `ClusterConfig(offload_to_cpu=True)` moves a rollout's model, and cannot be used with this.
        """

    def _verify(self, rollout_actor: Any) -> None:
        """Raises `ValueError` if the engine computes something else than the trainer's model."""
        length = min(_NUM_CHECKED, self.llm.max_model_len)
        others = np.delete(np.arange(self.llm.model_config.vocab_size), self.pad_id())
        tokens = np.random.default_rng(0).choice(others, (1, length)).astype(np.int32)
        prompt, completion = np.split(tokens, [length // 2], axis=1)
        graphdef, state = nnx.split(rollout_actor)
        expected = common.compute_per_token_logps(
            graphdef,
            state,
            prompt_tokens=jnp.asarray(prompt),
            completion_tokens=jnp.asarray(completion),
            pad_id=self.pad_id(),
            eos_id=self.eos_id(),
        )
        difference = np.abs(self._score(prompt, completion) - np.asarray(expected)).mean()
        dtype = jax.tree.leaves(self.llm.runner.programs.params)[0].dtype
        if not difference <= (tolerance := _TOLERANCES.get(dtype.name, _TOLERANCE)):
            raise ValueError(
                f"the log-probabilities of the engine and of {type(rollout_actor).__name__} differ "
                f"by {difference:.3g} on average, and {tolerance} is tolerated in {dtype}: "
                f"{self.llm.model_config} is not what the trainer's model computes; pass config=, "
                "or mapping="
            )


def _options(mesh: jax.sharding.Mesh, rollout_config: base_rollout.RolloutConfig) -> dict[str, Any]:
    """Returns the options of `LLM` that Tunix's configuration says.

    Raises:
      NotImplementedError: a mesh or a parallelism that is not supported.
    """
    devices = list(mesh.devices.flat)
    asked = rollout_config.tensor_parallel_size
    for name, value, supported in (
        ("tensor_parallel_size", asked, (-1, len(devices))),
        ("data_parallel_size", rollout_config.data_parallel_size, (-1, 1)),
        ("expert_parallel_size", rollout_config.expert_parallel_size, (1,)),
    ):
        if value not in supported:
            raise NotImplementedError(
                f"{name}={value} on a mesh of {len(devices)} devices is not supported, only "
                f"{' or '.join(map(str, supported))}"
            )
    if devices != (first := jax.devices()[: len(devices)]):
        raise NotImplementedError(f"mesh of {devices}: the engine takes the first ones, {first}")
    dtype = rollout_config.data_type
    return {
        "max_model_len": rollout_config.kv_cache_size,
        "tensor_parallel_size": len(devices),
        **({} if dtype is None else {"dtype": dtype}),
    }


def _refuse_lora(params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    found = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if isinstance(leaf, nnx.LoRAParam)
    ]
    if found or nnx.LoRAParam in (filter_types or ()):
        raise NotImplementedError(
            f"LoRA's weights ({', '.join(found[:2])}, ...) are not served: merge them into the "
            "model's own and pass these to update_params, or train all weights"
        )


def _refuse_offloaded(state: nnx.State) -> None:
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    if "pinned_host" in kinds:
        raise NotImplementedError(
            "the trainer's weights are in pinned_host memory: Tunix's offload_to_cpu=True moves "
            "the rollout's model, of which this one is none; use offload_to_cpu=False"
        )
