"""What a model is to the engine, attention to a model, and a family to the loader."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.models.config import HFFields, ModelConfig

Attend = Callable[..., tuple[Array, Any]]
"""`attend(q, k, v, kv_cache, metadata, **options) -> (out, kv_cache)`: a step's attention.

Takes the step's queries `[T, Hq, D]`, keys `[T, Hk, D]` and values `[T, Hk, Dv]`, the layer's
cache, or None for an attention that keeps none, and the metadata that places the T tokens. Returns
the output `[T, Hq, Dv]` and the cache with the new keys and values in it. Options are those of
`pallas_paged.ops.attention.api.paged_attention`; a model passes only those that it needs. With the
option `rotary`, cosines and sines, queries and keys are still to be rotated, as
`pallas_paged.ops.rotary.rotate(q, *rotary)` does it; an attention that leaves this out attends to
tokens without positions. By the option `static_scales`, `pallas_paged.kv_cache.StaticScales`, keys
and values are quantised. A step that has a `Context` gives it as the option `context`. Where only
some tokens' outputs are needed, `q` is `[L, Hq, D]`, their metadata is the option `queries`, and
there is no `rotary`.
"""

Rotary = tuple[Float32[Array, "T half"], Float32[Array, "T half"]]
"""For each of T tokens and each pair of dimensions the cosine and the sine of the angle."""

Context = Any
"""What a step brings to a model beside its tokens, for all layers: a pytree of arrays, or None.

Such as which adapter each of the T tokens uses. What is in it is between whoever makes the step and
the modules that read it; the others pass it on.
"""


class Wanted(NamedTuple):
    """Those of a step's tokens whose hidden states are wanted.

    Attributes:
      places: i32[L], where they are among the step's T tokens.
      metadata: of a step that has these tokens alone, in that order, if there is one: those of a
        sequence must be its last ones. With it the last layer's attention leaves the others out;
        without it, what comes behind that attention does.
    """

    places: Int32[Array, "L"]
    metadata: AttentionMetadata | None = None


class CausalLM(Protocol):
    """A decoder-only language model: a Flax `nnx.Module` with these members."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape, and what its layers' caches are (`cache_specs`)."""

    def __call__(
        self,
        input_ids: Int32[Array, "T"],
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache | None],
        *,
        attend: Attend = ...,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, "T E"] | Float[Array, "L E"], tuple[KVCache | None, ...]]:
        """Runs a step's T tokens through all layers.

        Args:
          input_ids: the tokens; where each stands is in `metadata`.
          metadata: the tokens' places; the models read `positions`, the rest is for `attend`.
          kv_caches: one per layer, as `config.cache_specs` has them; or whatever `attend` takes.
          attend: the attention, by default the paged one.
          context: reaches every layer, see `Context`.
          wanted: the L tokens whose hidden states are returned, in that order; None for all. The
            last layer leaves the others out, as llama.cpp's does (its `inp_out_ids`). Not together
            with a context.

        Returns:
          The hidden states, for `compute_logits`; and the updated caches, which take the place of
          `kv_caches` (donate those to have the update in place).
        """

    def compute_logits(self, hidden: Float[Array, "*n E"]) -> Float32[Array, "*n V"]:
        """Returns the float32 logits of those hidden states that need them."""


class ConfigFromHF(Protocol):
    """The class of a family's configuration."""

    architecture: str

    def from_hf(self, fields: HFFields) -> ModelConfig:
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""


class BuildModel(Protocol):
    """The class of a family's model."""

    def __call__(  # noqa: D102
        self, config: Any, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class CheckpointNames:
    """How a family's checkpoints name tensors that the model's own modules name otherwise.

    A tensor's name is the one in `pallas_paged.models.tensors`, unless this says otherwise.

    Attributes:
      embedding: the input embedding, which is the output embedding too where those are tied.
      output: the output embedding; a tied model's checkpoint may have it instead of, or equal to,
        `embedding`.
      prefixes: (prefix in a checkpoint, prefix in the model) pairs; the first that fits is used.
      derived: suffixes of tensors that hold what the model computes from its configuration.
    """

    embedding: str
    output: str = "lm_head.weight"
    prefixes: tuple[tuple[str, str], ...] = ()
    derived: tuple[str, ...] = ()


class Family(NamedTuple):
    """An architecture: its configuration, its model, its checkpoints."""

    config: ConfigFromHF
    model: BuildModel
    names: CheckpointNames
