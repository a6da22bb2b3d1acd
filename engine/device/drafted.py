"""A model together with a small one that guesses its tokens, as one model with both caches.

Both compute a step's tokens, and their keys and values lie in the same blocks: of each block the
small model has its own part. So whatever happens to a sequence's blocks, copies, swaps, sharing,
happens to both. Decode steps alone leave the small model out: nothing is guessed behind them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.speculation import DraftModelSettings, speculation_settings
from pallas_paged.engine.device.sampling import SamplingInputs
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.models import CausalLM, ModelConfig, abstract_model, load_config
from pallas_paged.models.attend import paged_attend
from pallas_paged.models.interface import Attend, Context, Wanted


@dataclasses.dataclass(frozen=True)
class DraftedConfig(ModelConfig):
    """The shape of a model with a draft model: its own, and the caches of both.

    Attributes:
      target: the model's own.
      draft: the small one's.
    """

    target: ModelConfig | None = None
    draft: ModelConfig | None = None

    @classmethod
    def of(cls, target: ModelConfig, draft: ModelConfig) -> "DraftedConfig":
        """Returns the shape of the two.

        Raises:
          ValueError: they cannot work together.
        """
        if draft.vocab_size != target.vocab_size:
            raise ValueError(
                f"the draft model has a vocabulary of {draft.vocab_size} tokens, and the model "
                f"one of {target.vocab_size}: it must be a model of the same family"
            )
        fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(ModelConfig)}
        return cls(**fields, target=target, draft=draft)

    @property
    def parts(self) -> tuple[ModelConfig, ModelConfig]:
        """The two."""
        assert self.target is not None
        assert self.draft is not None
        return self.target, self.draft

    def cache_specs(self, block_size: int, dtype: DTypeLike) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`: those of the model, then those of the draft model."""
        return tuple(spec for part in self.parts for spec in part.cache_specs(block_size, dtype))


def parts_of(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """Returns the shapes of the models that a configuration is of: one, or two."""
    return config.parts if isinstance(config, DraftedConfig) else (config,)


def draft_model_of(
    config: EngineConfig, shape: ModelConfig, max_model_len: int
) -> tuple[str, ModelConfig] | None:
    """Returns the folder and the shape of a configuration's draft model, or None if it has none.

    Raises:
      ValueError: it does not go with a model of that `shape`; the message says why.
      FileNotFoundError: there is none in the folder.
    """
    settings = speculation_settings(config.speculative_config)
    if not isinstance(settings, DraftModelSettings):
        return None
    draft = load_config(settings.model)
    if draft.max_model_len < max_model_len:
        raise ValueError(
            f"the draft model in {settings.model} serves {draft.max_model_len} tokens, fewer than "
            f"max_model_len={max_model_len}"
        )
    try:
        draft = draft.for_length(max_model_len).for_devices(config.tensor_parallel_size)
    except ValueError as error:
        raise ValueError(f"the draft model in {settings.model}: {error}") from error
    DraftedConfig.of(shape, draft)
    return settings.model, draft


def abstract_network(config: EngineConfig, shape: ModelConfig, max_model_len: int) -> CausalLM:
    """Returns an engine's model, with its draft model if it has one, without arrays.

    Raises:
      ValueError, FileNotFoundError: as `draft_model_of`; ValueError: as `abstract_model`.
    """
    model = abstract_model(shape, config.dtype)
    draft = draft_model_of(config, shape, max_model_len)
    if draft is None:
        return model
    dtype = jax.tree.leaves(nnx.state(model))[0].dtype
    return Drafted(model, abstract_model(draft[1], dtype))


def share_of(network: CausalLM, num_devices: int) -> CausalLM:
    """Returns a model with the attention that one of so many devices has of `network`'s.

    Without arrays, but for one device, which has it all.
    """
    if num_devices == 1:
        return network
    dtype = jax.tree.leaves(nnx.state(network))[0].dtype
    models = [abstract_model(part.share(num_devices), dtype) for part in parts_of(network.config)]
    return models[0] if len(models) == 1 else Drafted(*models)


def num_caches(config: ModelConfig) -> int:
    """Returns how many caches a model has: not all layers need have one of their own."""
    return len(config.cache_specs(1, jnp.float32))


class Drafted(nnx.Module):
    """Computes both models, and is the first of them to who asks."""

    def __init__(self, target: CausalLM, draft: CausalLM):
        self.config = DraftedConfig.of(target.config, draft.config)
        self.target = target
        self.draft = draft

    def split(self, kv_caches: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the caches of the model and those of the draft model."""
        count = num_caches(self.config.parts[0])
        return tuple(kv_caches[:count]), tuple(kv_caches[count:])

    def __call__(
        self,
        input_ids: jax.Array,
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache | None],
        *,
        attend: Attend = paged_attend,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[jax.Array, tuple[KVCache | None, ...]]:
        """See `CausalLM`; the hidden states are the model's own."""
        own, others = self.split(kv_caches)
        options = {} if context is None else {"context": context}
        hidden, own = self.target(input_ids, metadata, own, attend=attend, wanted=wanted, **options)
        if metadata.max_query_len > 1:
            _, others = self.draft(input_ids, metadata, others, attend=attend)
        return hidden, (*own, *others)

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """See `CausalLM`."""
        return self.target.compute_logits(hidden)


class Last(NamedTuple):
    """The last token of each of B sequences, behind which tokens are guessed.

    Attributes:
      tokens: i32[B].
      positions: i32[B].
      is_there: bool[B]; nothing is guessed of the others.
    """

    tokens: jax.Array
    positions: jax.Array
    is_there: jax.Array


def propose(
    model: Drafted,
    last: Last,
    block_tables: jax.Array,
    kv_caches: tuple[KVCache, ...],
    sampling: SamplingInputs,
    attend: Attend,
    draw: Callable[[jax.Array, SamplingInputs], jax.Array],
    num_tokens: int,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Guesses the next tokens with the draft model, as it draws them with the requests' own keys.

    Args:
      model: the two models.
      last: where the sequences are.
      block_tables: i32[B, M]. Where a sequence has no block, what it writes is lost, and its
        further guesses are bad ones.
      kv_caches: of both models.
      sampling: of the sequences; the positions are not used.
      attend: the attention.
      draw: see `step.Draw`.
      num_tokens: how many to guess of each.

    Returns:
      i32[B, `num_tokens`], 0 for sequences that are not there; and the caches.
    """
    block_size = kv_caches[0].k.shape[2]
    places = jnp.arange(len(last.tokens), dtype=jnp.int32)
    own, others = model.split(kv_caches)
    width = block_tables.shape[1]

    def guess(
        i: jax.Array, state: tuple[jax.Array, jax.Array, tuple[KVCache, ...]]
    ) -> tuple[jax.Array, jax.Array, tuple[KVCache, ...]]:
        tokens, guesses, caches = state
        positions = last.positions + i
        column = jnp.minimum(positions // block_size, width - 1)
        fits = last.is_there & (positions < width * block_size)
        slots = block_tables[places, column] * block_size + positions % block_size
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=jnp.where(fits, slots, 0),
            block_tables=block_tables,
            seq_lens=jnp.where(fits, positions + 1, 0),
            query_start_loc=jnp.arange(len(tokens) + 1, dtype=jnp.int32),
            max_query_len=1,
        )
        hidden, updated = model.draft(tokens, metadata, caches, attend=attend)
        logits = model.draft.compute_logits(hidden)
        drawn = draw(logits, sampling._replace(positions=positions + 1))
        drawn = jnp.where(last.is_there, jnp.clip(drawn, 0, logits.shape[-1] - 1), 0)
        return drawn, guesses.at[:, i].set(drawn), cast(tuple[KVCache, ...], updated)

    guesses = jnp.zeros((len(last.tokens), num_tokens), jnp.int32)
    state = jax.lax.fori_loop(0, num_tokens, guess, (last.tokens, guesses, others))
    return state[1], (*own, *state[2])
