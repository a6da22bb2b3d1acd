"""What an engine's compiled step takes of a device that need not be here: memory and launches."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_paged.collectives import Collective, collectives
from pallas_paged.deviceless import compile_with_schedule, target_device
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.logprobs import width_for
from pallas_paged.engine.device.implementations import resolve_kv_cache_dtype
from pallas_paged.engine.device.placement import BY_HEAD, share_shapes
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.launches import Launches, Schedule, launches
from pallas_paged.models import ModelConfig, abstract_model
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
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
      peak_bytes: the most that it takes at a time, weights and caches included.
      weight_bytes, cache_bytes: of the parameters and of the caches, on one device.
      in_place_bytes: of the arguments that the step overwrites.
      temporary_bytes: of everything beside its arguments and results.
      launches: what it launches; None on a CPU, as is the next one.
      schedule: which of that is in command buffers.
      moves: instructions that write a weight, or an array of a cache, anew; see `moves`.
      collectives: what it exchanges with the other devices that share the model.
    """

    bucket: Bucket
    peak_bytes: int
    weight_bytes: int
    cache_bytes: int
    in_place_bytes: int
    temporary_bytes: int
    launches: Launches | None
    schedule: Schedule | None
    moves: tuple[str, ...]
    collectives: tuple[Collective, ...]


def compile_step(
    shape: ModelConfig,
    config: EngineConfig,
    bucket: Bucket,
    target: str,
    *,
    num_blocks: int,
) -> StepReport:
    """Compiles one step of a model of that shape for the GPU named `target`."""
    model = abstract_model(shape, config.dtype)
    cache_dtype = resolve_kv_cache_dtype(config, jnp.dtype(config.dtype), shape, "gpu")
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
        return report_step(programs, bucket)


def report_step(programs: StepPrograms, bucket: Bucket) -> StepReport:
    """Compiles one step; says what it takes.

    Of a GPU that is not here the placement is one on `pallas_paged.deviceless.target_device`.
    """
    lowered = programs.lower(bucket)
    schedule, found = None, None
    device = programs.placement.device
    if device.platform == "cpu":
        compiled = lowered.compile()
    else:
        compiled, schedule = compile_with_schedule(lowered, device)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None, "XLA gave no memory analysis of a compiled program"
    if schedule is not None:
        found = launches(text)
    weights, caches = _shares(programs)
    return StepReport(
        bucket,
        peak_bytes=memory.peak_memory_in_bytes,
        weight_bytes=num_bytes(weights),
        cache_bytes=num_bytes(caches),
        in_place_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        launches=found,
        schedule=schedule,
        moves=tuple(moves(text, weights + caches)),
        collectives=tuple(collectives(text)),
    )


def _shares(
    programs: StepPrograms,
) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
    """Returns what one device has of the parameters, and of the caches."""
    placement, params, caches = programs.placement, programs.params, programs.kv_caches
    arrays, count = jax.tree.leaves(caches), placement.num_devices
    return (
        share_shapes(jax.tree.leaves(params), placement.parameter_specs(params), count),
        share_shapes(arrays, [BY_HEAD] * len(arrays), count),
    )
