"""What an engine chooses for a model and a device, before it knows how large its pool will be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.drafted import share_of
from pallas_paged.engine.device.implementations import (
    choose_attention,
    choose_writes,
    resolve_kv_cache_dtype,
)
from pallas_paged.engine.device.kernel_check import KernelCheck, kernel_checks
from pallas_paged.engine.device.placement import Placement
from pallas_paged.models import CausalLM, ModelConfig


class Choices(NamedTuple):
    """What programs and caches are made of.

    Attributes:
      dtype: of weights and activations.
      cache_dtype: of keys and values.
      specs: of the layers' caches, as all devices together have them.
      share: the shape of the model that one device sees, see `ModelConfig.share`.
      share_specs: of the caches that one device has.
      attention: the implementation of attention, see `choose_attention`.
      writes: those of the writes, see `choose_writes`.
      checks: of the kernels among them.
    """

    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    specs: tuple[CacheSpec, ...]
    share: ModelConfig
    share_specs: tuple[CacheSpec, ...]
    attention: str
    writes: str
    checks: tuple[KernelCheck, ...]


def choose(config: EngineConfig, network: CausalLM, placement: Placement) -> Choices:
    """Returns the choices for a model, whose arrays may be shapes; call it as the target.

    Raises:
      NotImplementedError: a named implementation cannot do this here.
    """
    shape, platform = network.config, placement.device.platform
    dtype = jax.tree.leaves(nnx.state(network))[0].dtype
    cache_dtype = resolve_kv_cache_dtype(config, dtype, shape, platform)
    share = share_of(network, placement.num_devices)
    specs, share_specs = (
        part.cache_specs(config.block_size, cache_dtype) for part in (shape, share.config)
    )
    attention = choose_attention(config, share.config, dtype, share_specs)
    writes = choose_writes(config, dtype, share_specs)
    checks = kernel_checks(
        config, share, share_specs, dtype, attention=attention, writes=writes, platform=platform
    )
    return Choices(dtype, cache_dtype, specs, share.config, share_specs, attention, writes, checks)
