"""Scales that a checkpoint was calibrated with for a quantised KV cache: one per tensor or KV head.

llm-compressor (compressed-tensors) and NVIDIA's ModelOpt write them, beside weights that need not
be quantised. Their semantics are vLLM's: stored = key / scale, after the rotation.
"""

import re
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_paged.kv_cache import KVCache, StaticScales
from pallas_paged.models.config import HFFields, ModelConfig
from pallas_paged.models.layers import parameter
from pallas_paged.quantisation import LARGEST

SCALES = (".k_scale", ".v_scale")
"""How the names of these parameters end."""
_METHODS = ("compressed-tensors", "modelopt")
_OF_MORE = (
    "config_groups",
    "quant_algo",
    "sparsity_config",
    "moe_sparsity_config",
    "transform_config",
)
"""What is not empty where more than the cache is quantised."""
_DTYPES = {"float": "float8_e4m3fn", "int": "int8"}
_SCHEMES = {None: None, "FP8": {"num_bits": 8, "type": "float"}}
"""By ModelOpt's field `kv_cache_quant_algo`."""
_OTHER_NAME = re.compile(r"(.*)\.([kv])_proj\.(?:output|\2)_scale")
"""ModelOpt's `k_proj.k_scale`, and `k_proj.output_scale` of older checkpoints of llm-compressor."""
_DRAWN_AMAX = 8.0
"""What keys and values of weights that are drawn, not read, seldom exceed."""


def kv_cache_dtype_from_hf(fields: HFFields) -> str | None:
    """Returns the dtype of the quantised cache that a checkpoint brings scales for; None without.

    Raises:
      ValueError: something else is quantised, or the cache in another way.
    """
    config = fields.section("quantization_config")
    if not config:
        return None
    if isinstance(inner := config.get("quantization"), dict):  # as in ModelOpt's own file
        config = {**config, **inner}
    algorithm, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    is_known = config.get("quant_method") in _METHODS and algorithm in tuple(_SCHEMES)
    if is_known and scheme is None:
        scheme = _SCHEMES[algorithm]
    has_more = any(config.get(name) and not _is_dense(config[name]) for name in _OF_MORE)
    if not is_known or has_more or not (scheme is None or _is_supported(scheme)):
        raise ValueError(
            f"config.json: quantization_config={config!r:.500} is not supported, only static "
            "scales per tensor or KV head for a KV cache of 8 bits, beside weights that are not "
            f"quantised, with the quant_method {' or '.join(_METHODS)}"
        )
    return None if scheme is None else _DTYPES[scheme["type"]]


def _is_dense(sparsity: Any) -> bool:
    """Whether this says no more than that nothing is sparse."""
    return isinstance(sparsity, dict) and sparsity.get("format") == "dense"


def _is_supported(scheme: Any) -> bool:
    return (
        isinstance(scheme, dict)
        and scheme.get("num_bits") == 8
        and scheme.get("type") in tuple(_DTYPES)
        and scheme.get("strategy") in (None, "tensor", "attn_head")
        and scheme.get("symmetric") is not False
        and not scheme.get("dynamic")
    )


def parameter_name(name: str) -> str:
    """Returns the name of `static_scale`'s parameter for a tensor of any of its names."""
    found = _OTHER_NAME.fullmatch(name)
    return name if found is None else f"{found[1]}.{found[2]}_scale"


def is_static_scale(name: str) -> bool:
    """Whether a tensor of that name, in a checkpoint, holds such scales."""
    return parameter_name(name).endswith(SCALES)


def static_scale(config: ModelConfig) -> nnx.Param | None:
    """Returns the parameter `k_scale` or `v_scale` of an attention, f32[Hk]; None without scales.

    Whatever dtype the others have. A tensor of one number stands for all heads; copies of a head
    have its scale.
    """
    if config.kv_cache_dtype is None:
        return None
    scale = _DRAWN_AMAX / LARGEST[jnp.dtype(config.kv_cache_dtype)]
    scales = jnp.full(config.num_kv_heads, scale, jnp.float32)
    copies = config.kv_head_copies
    return parameter(scales, ("kv_heads",), is_static_scale=True, copies=copies)


def options_for(
    kv_cache: KVCache | None, dtype: str | None, k: nnx.Param | None, v: nnx.Param | None
) -> dict[str, Any]:
    """Returns the option `static_scales` for an attention, if it writes a cache they are for.

    Args:
      kv_cache: of the layer.
      dtype: of the caches that the scales are for.
      k: of `static_scale`.
      v: likewise.
    """
    if kv_cache is None or k is None or v is None or kv_cache.k.dtype != dtype:
        return {}
    return {"static_scales": StaticScales(k[...], v[...])}
