"""Which implementations an engine's programs are made of."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.drafted import num_caches, parts_of
from pallas_paged.kv_cache import KVCache
from pallas_paged.models import ModelConfig
from pallas_paged.ops.attention import api as attention
from pallas_paged.ops.kv_write.api import write_implementation
from pallas_paged.ops.product import api as product

logger = logging.getLogger(__name__)


def choose_attention(
    config: EngineConfig, shape: ModelConfig, dtype: Any, specs: Sequence[CacheSpec]
) -> str:
    """Returns which attention all layers of such a model run with: XLA's can serve any of them."""
    names = {
        attention.attention_implementation(
            config.attention_implementation,
            q,
            cache.k,
            cache.v,
            deterministic=config.deterministic,
        )
        for q, cache in _attentions(shape, dtype, specs)
    }
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


def _attentions(
    shape: ModelConfig, dtype: Any, specs: Sequence[CacheSpec]
) -> Iterator[tuple[jax.ShapeDtypeStruct, KVCache]]:
    """Yields each kind of attention in a model's layers: the shapes of queries and of a cache."""
    heads = [part.num_q_heads for part in parts_of(shape) for _ in range(num_caches(part))]
    for num_q_heads, spec in dict.fromkeys(zip(heads, specs, strict=True)):
        cache = spec.shapes(2)
        yield jax.ShapeDtypeStruct((1, num_q_heads, cache.k.shape[3]), dtype), cache
