"""What Tunix's models are to this engine: their shapes, and the names and layouts of their weights.

Nothing here imports Tunix: a model is known by the name of its class, and read by its attributes.
Sizes: D hidden, N query heads, K KV heads, H of a head, F intermediate, V vocabulary.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.models import ModelConfig
from pallas_paged.models.decoder import DecoderConfig
from pallas_paged.models.given import NameMapping, Transform
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.qwen2 import Qwen2Config
from pallas_paged.models.qwen3 import Qwen3Config
from pallas_paged.models.rope import Rope

logger = logging.getLogger(__name__)


def transposed(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [in, out] as [out, in]."""
    return kernel.T


def from_heads(kernel: jax.Array) -> jax.Array:
    """Returns the kernel [N, H, D] of the heads' outputs as [D, N H]."""
    return kernel.reshape(-1, kernel.shape[2]).T


def to_heads(kernel: jax.Array) -> jax.Array:
    """Returns the kernel [D, N, H] of a projection to heads as [N H, D]."""
    return kernel.reshape(kernel.shape[0], -1).T


_OUTPUT = {"lm_head.w": ("lm_head.weight", transposed)}
_LAYER = "layers.*", "model.layers.*"


def _in_layers(names: NameMapping) -> dict[str, str | tuple[str, Transform]]:
    theirs, ours = _LAYER
    return {
        f"{theirs}.{name}": f"{ours}.{to}" if isinstance(to, str) else (f"{ours}.{to[0]}", to[1])
        for name, to in names.items()
    }


LLAMA: NameMapping = {
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm.w": "model.norm.weight",
    **_in_layers(
        {
            "input_layernorm.w": "input_layernorm.weight",
            "post_attention_layernorm.w": "post_attention_layernorm.weight",
            "attn.q_proj.w": ("self_attn.q_proj.weight", to_heads),
            "attn.k_proj.w": ("self_attn.k_proj.weight", to_heads),
            "attn.v_proj.w": ("self_attn.v_proj.weight", to_heads),
            "attn.o_proj.w": ("self_attn.o_proj.weight", from_heads),
            "mlp.gate_proj.kernel": ("mlp.gate_proj.weight", transposed),
            "mlp.up_proj.kernel": ("mlp.up_proj.weight", transposed),
            "mlp.down_proj.kernel": ("mlp.down_proj.weight", transposed),
        }
    ),
}
"""Of Tunix's Llama 3, but for the output embedding of one that is not tied."""
QWEN2: NameMapping = {
    **LLAMA,
    **_in_layers({f"attn.{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkv"}),
}
QWEN3: NameMapping = {
    **LLAMA,
    **_in_layers({f"attn.{part}_norm.w": f"self_attn.{part}_norm.weight" for part in "qk"}),
}

_FAMILIES: Mapping[str, tuple[type[DecoderConfig], NameMapping, dict[str, Any]]] = {
    "tunix.models.llama3.model.Llama3": (LlamaConfig, LLAMA, {}),
    "tunix.models.qwen2.model.Qwen2": (Qwen2Config, QWEN2, {"qkv_bias": True}),
    "tunix.models.qwen3.model.Qwen3": (Qwen3Config, QWEN3, {"qk_norm": True}),
}
"""By class: our configuration, the mapping, and what all models of the family have."""


def _family(model: Any) -> tuple[type[DecoderConfig], NameMapping, dict[str, Any]]:
    for kind in type(model).__mro__:
        found = _FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    raise NotImplementedError(
        f"a trainer's model of {type(model)} is not known here, only {', '.join(_FAMILIES)}; pass "
        "config= and mapping= for another"
    )


def mapping_of(model: Any) -> NameMapping:
    """Returns where the weights of one of Tunix's models belong.

    Raises:
      NotImplementedError: it is of another class.
    """
    _, mapping, _ = _family(model)
    return mapping if _is_tied(model.config) else {**mapping, **_OUTPUT}


def config_of(model: Any, max_position_embeddings: int) -> ModelConfig:
    """Returns the shape of one of Tunix's models: that of what it computes.

    Args:
      model: of Tunix's.
      max_position_embeddings: the most tokens of a sequence, which Tunix's models do not limit.

    Raises:
      NotImplementedError: it is of another class, or has experts.
    """
    kind, _, fields = _family(model)
    config = model.config
    if getattr(config, "num_experts", None) is not None:
        raise NotImplementedError(
            f"num_experts={config.num_experts}: models with experts are not supported, only dense "
            "ones"
        )
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.hidden_dim,
        num_layers=config.num_layers,
        num_q_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max_position_embeddings,
        rope=Rope(rope_theta=float(_rope_theta(model))),
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=_is_tied(config),
        **fields,
    )


def dtype_of(model: Any) -> jnp.dtype:
    """Returns what one of Tunix's models computes in: its `config.dtype`, or its weights' dtype."""
    found = getattr(model.config, "dtype", None)
    return jnp.dtype(model.embedder.input_embedding.dtype if found is None else found)


def _is_tied(config: Any) -> bool:
    name = "weight_tying" if hasattr(config, "weight_tying") else "use_tied_embedding"
    tied: bool = getattr(config, name)
    return tied


def _rope_theta(model: Any) -> float:
    """Returns by which the model turns its heads, whatever its configuration says.

    In Tunix 0.1.7 `Attention.block` of Llama 3 and Qwen 3 leaves `apply_rope` its default theta.
    """
    theta: float = model.config.rope_theta
    kind = type(model.layers[0].attn)
    functions = [inspect.unwrap(each) for each in (type(model).__call__, kind.block)]
    if any("rope_theta" in function.__code__.co_names for function in functions):
        return theta
    apply_rope = functions[1].__globals__["apply_rope"]
    used: float = inspect.signature(apply_rope).parameters["rope_theta"].default
    if used != theta:
        logger.warning(
            "%s turns its heads by rope_theta=%s, whatever its configuration says (%s): so does "
            "this engine, but what others make of a checkpoint differs",
            type(model).__name__,
            used,
            theta,
        )
    return used
