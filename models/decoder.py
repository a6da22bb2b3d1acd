"""The decoder that Llama, Qwen and Mistral are; a family's file says which options it uses.

RMS norms before each part, rotary positions, grouped query heads, SwiGLU. The modules have the
names of Hugging Face's, so that the path of a parameter is the name of its tensor; but `qkv_proj`
is three of those modules and `gate_up_proj` two (see `pallas_paged.models.tensors`), unless the
configuration keeps them apart.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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
from pallas_paged.models.interface import Attend, CheckpointNames, Context, Rotary, Wanted
from pallas_paged.models.kv_scales import kv_cache_dtype_from_hf, options_for, static_scale
from pallas_paged.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    attend_to_wanted,
    chosen,
    gate_up_projection,
    logits,
    qkv_projection,
    separate_qkv,
    wanted_by_layer,
)
from pallas_paged.models.rope import Rope, rotation
from pallas_paged.models.rope_scaling import rope_from_hf
from pallas_paged.ops.rotary import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The shape of such a decoder; a family's class adds its name and `from_hf`.

    Attributes:
      qkv_bias: whether the projections to queries, keys and values have biases.
      output_bias: whether the projection of the heads' outputs has one.
      mlp_bias: whether the three projections of the MLP have them.
      qk_norm: RMS norms over each head's query and key, before they are rotated.
      sliding_windows: by layer, how many tokens a query sees, itself included, None for all of
        them; empty means None in every layer.
    """

    must_split = ("num_q_heads", "intermediate_size")

    intermediate_size: int
    rope: Rope = dataclasses.field(default_factory=Rope)
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "intermediate_size", "rms_norm_eps")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        self.rope.inv_freq(self.head_dim)  # or it raises
        if self.max_model_len < 2:
            raise ValueError(f"{self.rope} leaves max_model_len={self.max_model_len} tokens")
        windows = self.sliding_windows
        if windows and len(windows) != self.num_layers:
            raise ValueError(
                f"sliding_windows={windows} must have one entry for each of the {self.num_layers} "
                "layers, or none"
            )
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"sliding_windows={windows} must be positive, or None for no limit")

    @property
    def max_model_len(self) -> int:
        """See `ModelConfig.max_model_len`: scaled positions reach further than unscaled ones."""
        return self.rope.max_model_len(self.max_position_embeddings)

    @property
    def default_max_model_len(self) -> int:
        """See `ModelConfig.default_max_model_len`."""
        return self.rope.default_max_model_len(self.max_position_embeddings)

    def for_length(self, max_model_len: int) -> "DecoderConfig":
        """See `ModelConfig.for_length`."""
        return dataclasses.replace(self, rope=self.rope.for_length(max_model_len))

    def first_layers(self, num_layers: int) -> "DecoderConfig":
        """See `ModelConfig.first_layers`."""
        windows = self.sliding_windows[:num_layers]
        return dataclasses.replace(self, num_layers=num_layers, sliding_windows=windows)

    def sliding_window(self, layer: int) -> int | None:
        """See `ModelConfig.sliding_window`."""
        return self.sliding_windows[layer] if self.sliding_windows else None


def decoder_fields_from_hf(
    fields: HFFields,
    *,
    default_max_position_embeddings: int,
    default_num_kv_heads: int | None = None,
    default_head_dim: int | None = None,
) -> dict[str, Any]:
    """Returns the arguments of `DecoderConfig` that all families read alike from a `config.json`.

    Args:
      fields: of the file.
      default_max_position_embeddings: where the file does not say.
      default_num_kv_heads: where the field is absent; None, and a field that is null, mean as many
        as query heads.
      default_head_dim: where it names none; None lets the heads share `hidden_size`.

    Raises:
      ValueError: a field is missing, malformed or has a value that is not supported.
    """
    fields.choice("hidden_act", ("silu", "swish"), "silu")  # two names of one function
    hidden_size = fields.integer("hidden_size")
    num_q_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.nullable_integer("num_key_value_heads", default_num_kv_heads)
    head_dim = fields.integer("head_dim", default_head_dim)
    max_position_embeddings = fields.integer(
        "max_position_embeddings", default_max_position_embeddings
    )
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_q_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": (
            head_dim_from_hidden(hidden_size, num_q_heads) if head_dim is None else head_dim
        ),
        "max_position_embeddings": max_position_embeddings,
        "rope": rope_from_hf(fields, max_position_embeddings),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "checkpoint_dtype": checkpoint_dtype_from_hf(fields),
        "kv_cache_dtype": kv_cache_dtype_from_hf(fields),
    }


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.sliding_window = config.sliding_window(layer)
        self.scaled_dtype = config.kv_cache_dtype
        self.k_scale, self.v_scale = static_scale(config), static_scale(config)
        self.merges = config.merges_projections
        how: dict[str, Any] = {"bias": config.qkv_bias, "dtype": dtype, "rngs": rngs}
        if self.merges:
            self.qkv_proj = qkv_projection(config, **how)
        else:
            self.q_proj, self.k_proj, self.v_proj = separate_qkv(config, **how)
        self.o_proj = Linear(
            config.num_q_heads * config.head_dim,
            config.hidden_size,
            axes=("embed", "heads"),
            bias=config.output_bias,
            dtype=dtype,
            rngs=rngs,
        )
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, eps=config.rms_norm_eps, axis="head_dim", dtype=dtype)
                for _ in range(2)
            )

    def __call__(
        self,
        x: Float[Array, "T E"],
        cos_sin: Rotary,
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
        rotary: Rotary | None = cos_sin
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
            # XLA norms and rotates in one launch; a kernel would only rotate.
            q, k, rotary = rotate(q, *cos_sin), rotate(k, *cos_sin), None
        asked = {"sliding_window": self.sliding_window, "context": context, "rotary": rotary}
        options = {name: value for name, value in asked.items() if value is not None}
        options |= options_for(kv_cache, self.scaled_dtype, self.k_scale, self.v_scale)
        out, kv_cache = attend_to_wanted(attend, wanted, q, k, v, kv_cache, metadata, **options)
        return self.o_proj(out.reshape(len(out), -1)), kv_cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020), the same in every layer."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.merges = config.merges_projections
        how: dict[str, Any] = {"bias": bias, "dtype": dtype, "rngs": rngs}
        if self.merges:
            self.gate_up_proj = gate_up_projection(*sizes, **how)
        else:
            self.gate_proj, self.up_proj = (
                Linear(*sizes, axes=("mlp", "embed"), **how) for _ in range(2)
            )
        self.down_proj = Linear(
            *sizes[::-1], axes=("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "T E"], context: Context = None) -> Float[Array, "T E"]:
        """Returns `down(silu(gate(x)) * up(x))`, whatever the context."""
        gate, up = self.gate_up_proj(x) if self.merges else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(jax.nn.silu(gate) * up)


MakeMLP = Callable[..., Any]
"""`make_mlp(config, layer, *, dtype, rngs) -> mlp`: what stands in the place of a layer's MLP.

A module, whose parameters are named as a checkpoint names them below `mlp`, and which is called as
`mlp(x, context)` with the T tokens' hidden states `[T, E]` and returns what is added to them.
"""


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after its norm and added to its input."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        make_mlp: MakeMLP,
    ):
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.mlp = make_mlp(config, layer, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "T E"],
        cos_sin: Rotary,
        metadata: AttentionMetadata,
        kv_cache: KVCache | None,
        attend: Attend,
        context: Context = None,
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, "T E"] | Float[Array, "L E"], KVCache | None]:
        """Returns the layer's output, of the `wanted` tokens, and its updated cache."""
        attended, kv_cache = self.self_attn(
            self.input_layernorm(x), cos_sin, metadata, kv_cache, attend, context, wanted
        )
        x = chosen(x, wanted) + attended
        return x + self.mlp(self.post_attention_layernorm(x), context), kv_cache


class DecoderModel(nnx.Module):
    """The decoder without the output embedding."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        make_mlp: MakeMLP,
    ):
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            axes=("vocab", "embed"),
            dtype=dtype,
            rngs=rngs,
        )
        self.layers = nnx.List(
            DecoderLayer(config, layer, dtype=dtype, rngs=rngs, make_mlp=make_mlp)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class Decoder(nnx.Module):
    """A decoder with freshly initialised weights; `load_model` builds one from a checkpoint.

    Args:
      config: the shape.
      dtype: of all parameters, and of the activations between norms.
      rngs: the `params` stream draws the weights.
      make_mlp: see `MakeMLP`; a family of another MLP names `functools.partial(Decoder, make_mlp=)`
        as its model.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        make_mlp: MakeMLP = MLP,
    ):
        self.config = config
        self.model = DecoderModel(config, dtype=dtype, rngs=rngs, make_mlp=make_mlp)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
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
        cos_sin = rotation(self.config.rope, metadata.positions, self.config.head_dim)
        x = self.model.embed_tokens(input_ids)
        updated = []
        by_layer = wanted_by_layer(wanted, self.config.num_layers, context)
        for layer, kv_cache, of_layer in zip(self.model.layers, kv_caches, by_layer, strict=True):
            x, kv_cache = layer(x, cos_sin, metadata, kv_cache, attend, context, of_layer)
            updated.append(kv_cache)
        return self.model.norm(x), tuple(updated)

    def compute_logits(self, hidden: Float[Array, "*n E"]) -> Float32[Array, "*n V"]:
        """Returns the float32 logits of those hidden states that need them."""
        tied = self.config.tie_word_embeddings
        output = self.model.embed_tokens if tied else self.lm_head
        return logits(hidden, output.weight[...], self.config.vocab_size)


NAMES = CheckpointNames(embedding="model.embed_tokens.weight", derived=(".rotary_emb.inv_freq",))
"""The checkpoints of all these families have the modules' own names."""
