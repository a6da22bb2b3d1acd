"""What an engine's compiled step takes of a GPU that need not be here: memory and launches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.deviceless import compile_with_schedule, target_device
from pallas_paged.engine.config import EngineConfig, resolve_kv_cache_dtype
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.logprobs import width_for
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.launches import Launches, Schedule, launches
from pallas_paged.models import ModelConfig
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.registry import FAMILIES
from pallas_paged.moves import moves

SHAPES: Mapping[str, ModelConfig] = {
    "llama-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    ),
    "opt-13b": OPTConfig(
        vocab_size=50272,
        hidden_size=5120,
        ffn_dim=20480,
        num_layers=40,
        num_q_heads=40,
        num_kv_heads=40,
        head_dim=128,
        max_position_embeddings=2048,
        word_embed_proj_dim=5120,
        tie_word_embeddings=True,
    ),
}
"""Models by name, as their published configurations have them."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a compiled step takes.

    Attributes:
      bucket: the step's shape.
      weight_bytes, cache_bytes: of the parameters and of the caches.
      in_place_bytes: of the arguments that the step overwrites.
      temporary_bytes: of everything beside its arguments and results.
      launches: what it launches.
      schedule: which of that is in command buffers.
      moves: instructions that write a weight, or an array of a cache, anew; see `moves`.
    """

    bucket: Bucket
    weight_bytes: int
    cache_bytes: int
    in_place_bytes: int
    temporary_bytes: int
    launches: Launches
    schedule: Schedule
    moves: tuple[str, ...]


def compile_step(
    shape: ModelConfig,
    config: EngineConfig,
    bucket: Bucket,
    target: str,
    *,
    num_blocks: int,
) -> StepReport:
    """Compiles one step of a model of that shape for the GPU named `target`."""
    model_class: Any = FAMILIES[shape.architecture].model
    dtype = jnp.dtype(config.dtype)
    model = nnx.eval_shape(lambda: model_class(shape, dtype=dtype, rngs=nnx.Rngs(0)))
    cache_dtype = resolve_kv_cache_dtype(config, dtype)
    specs = shape.cache_specs(config.block_size, cache_dtype)
    caches = tuple(spec.shapes(num_blocks) for spec in specs)
    programs = StepPrograms(
        model,
        caches,
        config.max_num_seqs,
        max(bucket.table_width, blocks_for(shape.max_model_len, config.block_size)),
        width_for(config.max_logprobs, shape.vocab_size),
        config.attention_implementation,
        config.cache_implementation,
    )
    with jax.default_device(target_device(target)):
        compiled, schedule = compile_with_schedule(programs.lower(bucket))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None, "XLA gave no memory analysis of a compiled program"
    return StepReport(
        bucket,
        weight_bytes=num_bytes(nnx.state(model)),
        cache_bytes=num_bytes(caches),
        in_place_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        launches=launches(text),
        schedule=schedule,
        moves=tuple(moves(text, jax.tree.leaves((nnx.state(model), caches)))),
    )
