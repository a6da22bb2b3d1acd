"""OPT, 125M to 175B (Zhang et al., 2022), and Galactica, which shares its architecture."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.models.attend import paged_attend
from pallas_paged.models.config import (
    HFFields,
    ModelConfig,
    check_positive,
    checkpoint_dtype_from_hf,
    head_dim_from_hidden,
)
from pallas_paged.models.interface import Attend, CheckpointNames, Context, Family, Wanted
from pallas_paged.models.kv_scales import kv_cache_dtype_from_hf, options_for, static_scale
from pallas_paged.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    attend_to_wanted,
    chosen,
    logits,
    qkv_projection,
    separate_qkv,
    wanted_by_layer,
)

POSITION_OFFSET = 2
"""Position 0 has row 2 of the table of positions: the first two were padding in training."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """The shape of an OPT.

    Attributes:
      word_embed_proj_dim: features of the token embeddings; where it is not `hidden_size`, two
        projections lie between (350M).
      do_layer_norm_before: norms stand before attention and MLP, and one after the last layer;
        else they stand behind each sum (350M).
      remove_final_layer_norm: leaves out the norm after the last layer all the same.
    """

    architecture: ClassVar[str] = "OPTForCausalLM"
    must_split = ("num_q_heads", "ffn_dim")

    ffn_dim: int
    word_embed_proj_dim: int
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "ffn_dim", "word_embed_proj_dim")
        if self.activation_function not in _ACTIVATIONS:
            raise ValueError(
                f"activation_function={self.activation_function!r} must be one of "
                f"{', '.join(_ACTIVATIONS)}"
            )

    @property
    def embedding_size(self) -> int:
        """See `ModelConfig.embedding_size`."""
        return self.word_embed_proj_dim

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm follows the last layer."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_hf(cls, fields: HFFields) -> "OPTConfig":
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        config = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            ffn_dim=fields.integer("ffn_dim"),
            word_embed_proj_dim=fields.integer("word_embed_proj_dim", hidden_size),
            num_layers=fields.integer("num_hidden_layers"),
            num_q_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim_from_hidden(hidden_size, num_heads),
            max_position_embeddings=fields.integer("max_position_embeddings", 2048),
            activation_function=fields.choice("activation_function", tuple(_ACTIVATIONS), "relu"),
            do_layer_norm_before=fields.flag("do_layer_norm_before", True),
            remove_final_layer_norm=fields.flag("_remove_final_layer_norm", False),
            enable_bias=fields.flag("enable_bias", True),
            layer_norm_elementwise_affine=fields.flag("layer_norm_elementwise_affine", True),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            checkpoint_dtype=checkpoint_dtype_from_hf(fields),
            kv_cache_dtype=kv_cache_dtype_from_hf(fields),
        )
        fields.finish()
        return config


class OPTAttention(nnx.Module):
    """Multi-head self-attention; positions are in its input."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.scaled_dtype = config.kv_cache_dtype
        self.k_scale, self.v_scale = static_scale(config), static_scale(config)
        bias = config.enable_bias
        self.merges = config.merges_projections
        if self.merges:
            self.qkv_proj = qkv_projection(config, bias=bias, dtype=dtype, rngs=rngs)
        else:
            self.q_proj, self.k_proj, self.v_proj = separate_qkv(
                config, bias=bias, dtype=dtype, rngs=rngs
            )
        self.out_proj = Linear(
            config.num_q_heads * config.head_dim,
            config.hidden_size,
            axes=("embed", "heads"),
            bias=bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "T E"],
        metadata: AttentionMetadata,
        kv_cache: KVCache | None,
        attend: Attend,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, "T E"] | Float[Array, "L E"], KVCache | None]:
        """Returns the attention's output, of the `wanted` tokens, and the layer's updated cache."""
        if self.merges:
            projected = self.qkv_proj(x)
        else:
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.reshape(x.shape[0], -1, self.head_dim) for y in projected)
        options = {} if context is None else {"context": context}
        options |= options_for(kv_cache, self.scaled_dtype, self.k_scale, self.v_scale)
        out, kv_cache = attend_to_wanted(attend, wanted, q, k, v, kv_cache, metadata, **options)
        return self.out_proj(out.reshape(len(out), -1)), kv_cache


class OPTDecoderLayer(nnx.Module):
    """Attention and MLP, each added to its input, with the norms before or behind."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm_first = config.do_layer_norm_before
        self.activation_function = config.activation_function
        affine = config.layer_norm_elementwise_affine
        hidden_size, bias = config.hidden_size, config.enable_bias
        self.self_attn = OPTAttention(config, dtype=dtype, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(hidden_size, affine=affine, dtype=dtype)
        self.fc1 = Linear(
            hidden_size, config.ffn_dim, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs
        )
        self.fc2 = Linear(
            config.ffn_dim, hidden_size, axes=("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs
        )
        self.final_layer_norm = LayerNorm(hidden_size, affine=affine, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "T E"],
        metadata: AttentionMetadata,
        kv_cache: KVCache | None,
        attend: Attend,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, "T E"] | Float[Array, "L E"], KVCache | None]:
        """Returns the layer's output, of the `wanted` tokens, and its updated cache."""
        attn_in = self.self_attn_layer_norm(x) if self.norm_first else x
        attended, kv_cache = self.self_attn(attn_in, metadata, kv_cache, attend, context, wanted)
        x = chosen(x, wanted) + attended
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        mlp_in = self.final_layer_norm(x) if self.norm_first else x
        x = x + self.fc2(_ACTIVATIONS[self.activation_function](self.fc1(mlp_in)))
        return x if self.norm_first else self.final_layer_norm(x), kv_cache


class OPTDecoder(nnx.Module):
    """Embeddings, layers, final norm and projections."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        hidden_size, word_size = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = Embedding(
            config.vocab_size, word_size, axes=("vocab", "embed"), dtype=dtype, rngs=rngs
        )
        self.embed_positions = Embedding(
            config.max_position_embeddings + POSITION_OFFSET,
            hidden_size,
            axes=("positions", "embed"),
            dtype=dtype,
            rngs=rngs,
        )
        if word_size != hidden_size:
            axes = ("embed", "word_embed")
            self.project_in = Linear(word_size, hidden_size, axes=axes, dtype=dtype, rngs=rngs)
            self.project_out = Linear(
                hidden_size, word_size, axes=axes[::-1], dtype=dtype, rngs=rngs
            )
        self.layers = nnx.List(
            OPTDecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        if config.has_final_layer_norm:
            affine = config.layer_norm_elementwise_affine
            self.final_layer_norm = LayerNorm(hidden_size, affine=affine, dtype=dtype)


class OPTModel(nnx.Module):
    """The level that checkpoints call `model`."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.decoder = OPTDecoder(config, dtype=dtype, rngs=rngs)


class OPT(nnx.Module):
    """An OPT with freshly initialised weights; `load_model` builds one from a checkpoint.

    Args:
      config: the shape.
      dtype: of all parameters, and of the activations between norms.
      rngs: the `params` stream draws the weights.
    """

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.model = OPTModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.word_embed_proj_dim,
                config.vocab_size,
                axes=("vocab", "embed"),
                dtype=dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        input_ids: Int32[Array, "T"],
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache | None],
        *,
        attend: Attend = paged_attend,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, "T E"] | Float[Array, "L E"], tuple[KVCache | None, ...]]:
        """Runs a step's T tokens through all layers, see `CausalLM`; returns (hidden, caches)."""
        decoder = self.model.decoder
        x = decoder.embed_tokens(input_ids)
        if self._has_projections:
            x = decoder.project_in(x)
        x = x + decoder.embed_positions(metadata.positions + POSITION_OFFSET)
        updated = []
        by_layer = wanted_by_layer(wanted, self.config.num_layers, context)
        for layer, kv_cache, of_layer in zip(decoder.layers, kv_caches, by_layer, strict=True):
            x, kv_cache = layer(x, metadata, kv_cache, attend, context, of_layer)
            updated.append(kv_cache)
        if self.config.has_final_layer_norm:
            x = decoder.final_layer_norm(x)
        return x, tuple(updated)

    def compute_logits(self, hidden: Float[Array, "*n E"]) -> Float32[Array, "*n V"]:
        """Returns the float32 logits of those hidden states that need them."""
        decoder = self.model.decoder
        if self._has_projections:
            hidden = decoder.project_out(hidden)
        output = decoder.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return logits(hidden, output.weight[...], self.config.vocab_size)

    @property
    def _has_projections(self) -> bool:
        return self.config.word_embed_proj_dim != self.config.hidden_size


FAMILY = Family(
    OPTConfig,
    OPT,
    CheckpointNames(
        embedding="model.decoder.embed_tokens.weight",
        prefixes=(("decoder.", "model.decoder."),),
    ),
)
