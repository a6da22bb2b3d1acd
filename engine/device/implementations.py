"""Which implementations an engine's programs are made of, and what caches they use."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.dispatch import target_device
from pallas_paged.engine.config import KV_CACHE_DTYPES, EngineConfig
from pallas_paged.engine.device.background import Background
from pallas_paged.engine.device.drafted import num_caches, parts_of
from pallas_paged.engine.device.placement import Placement
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import ModelConfig
from pallas_paged.ops.attention import api as attention
from pallas_paged.ops.kv_write.api import write_implementation
from pallas_paged.ops.product import api as product

logger = logging.getLogger(__name__)


def resolve_kv_cache_dtype(
    config: EngineConfig, model_dtype: jnp.dtype, shape: ModelConfig, platform: str
) -> jnp.dtype:
    """Returns the dtype that keys and values of a model are stored in, on devices of a platform."""
    if config.kv_cache_dtype != "auto":
        return jnp.dtype(KV_CACHE_DTYPES[config.kv_cache_dtype])
    if shape.kv_cache_dtype is None or (platform, shape.kv_cache_dtype) == ("cpu", "float8_e4m3fn"):
        return model_dtype
    return jnp.dtype(shape.kv_cache_dtype)


def warn_of_slow_types(dtype: jnp.dtype, cache_dtype: jnp.dtype) -> None:
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


def choose_attention(
    config: EngineConfig, shape: ModelConfig, dtype: Any, specs: Sequence[CacheSpec]
) -> str:
    """Returns which attention all layers of such a model run with: XLA's can serve any of them."""
    names = {_implementation(config, q, cache) for q, cache in _attentions(shape, dtype, specs)}
    if len(names) == 1:
        return names.pop()
    logger.warning("no attention of %s serves all layers: they run with 'xla'", sorted(names))
    return "xla"


def choose_writes(config: EngineConfig, dtype: Any, specs: Sequence[CacheSpec]) -> str:
    """Returns what writes such a model's keys and values; each layer chooses for itself."""
    names = set()
    for cache in (spec.shapes(2) for spec in dict.fromkeys(specs)):
        k = jax.ShapeDtypeStruct((1, cache.k.shape[1], cache.k.shape[3]), dtype)
        names.add(write_implementation(config.cache_implementation, k, cache))
    return ", ".join(sorted(names))


def register_kernels(
    implementation: str, shape: ModelConfig, dtype: Any, specs: Sequence[CacheSpec]
) -> None:
    """Makes XLA know what programs with that attention call, where none of them is traced."""
    product.register_for_loading(dtype)
    for q, cache in _attentions(shape, dtype, specs):
        attention.register_for_loading(implementation, q, cache.k, cache.v)


def compile_kernels_soon(config: EngineConfig, shape: ModelConfig, placement: Placement) -> None:
    """Lets a thread compile what programs on a CPU call: first of all, it takes the longest.

    Does nothing where the dtype of the weights is not known before they are read. Who traces a
    program that calls such a kernel waits for it.
    """
    name = shape.checkpoint_dtype if config.dtype == "auto" else config.dtype
    if name is None or placement.device.platform != "cpu":
        return
    dtype = jnp.dtype(name)
    cache_dtype = resolve_kv_cache_dtype(config, dtype, shape, placement.device.platform)
    shape = shape.share(placement.num_devices)
    specs = shape.cache_specs(config.block_size, cache_dtype)
    chosen = [
        (_implementation(config, q, cache), q, cache)
        for q, cache in _attentions(shape, dtype, specs)
    ]

    def compile_all(_: str) -> None:
        with placement.as_target():
            product.register_for_loading(dtype)
            for implementation, q, cache in chosen:
                attention.register_for_loading(implementation, q, cache.k, cache.v)

    Background(compile_all).start("what programs call")


def _implementation(config: EngineConfig, q: jax.ShapeDtypeStruct, cache: KVCache) -> str:
    return attention.attention_implementation(
        config.attention_implementation, q, cache.k, cache.v, deterministic=config.deterministic
    )


def _attentions(
    shape: ModelConfig, dtype: Any, specs: Sequence[CacheSpec]
) -> Iterator[tuple[jax.ShapeDtypeStruct, KVCache]]:
    """Yields each kind of attention in a model's layers: the shapes of queries and of a cache."""
    heads = [part.num_q_heads for part in parts_of(shape) for _ in range(num_caches(part))]
    for num_q_heads, spec in dict.fromkeys(zip(heads, specs, strict=True)):
        cache = spec.shapes(2)
        yield jax.ShapeDtypeStruct((1, num_q_heads, cache.k.shape[3]), dtype), cache
