"""What an engine's compiled step takes of a device that need not be here: memory and launches."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_paged.collectives import Collective, collectives
from pallas_paged.deviceless import compile_with_schedule, target_devices
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.logprobs import width_for
from pallas_paged.engine.device.implementations import resolve_kv_cache_dtype
from pallas_paged.engine.device.placement import BY_HEAD, Placement, share_shapes
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.launches import Launches, Schedule, launches
from pallas_paged.models import ModelConfig, abstract_model
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.rope import Rope
from pallas_paged.moves import moves

_HEAD_DIM = 128


def _llama(num_layers: int, *, hidden_size: int, intermediate_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_q_heads=hidden_size // _HEAD_DIM,
        num_kv_heads=8,
        head_dim=_HEAD_DIM,
        max_position_embeddings=8192,
        rope=Rope(rope_theta=500000.0),
        rms_norm_eps=1e-5,
    )


def _opt(num_layers: int, *, hidden_size: int) -> OPTConfig:
    num_heads = hidden_size // _HEAD_DIM
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size,
        num_layers=num_layers,
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=2048,
        word_embed_proj_dim=hidden_size,
        tie_word_embeddings=True,
    )


SHAPES: Mapping[str, ModelConfig] = {
    "llama-8b": _llama(32, hidden_size=4096, intermediate_size=14336),
    "llama-70b": _llama(80, hidden_size=8192, intermediate_size=28672),
    "opt-13b": _opt(40, hidden_size=5120),
    "opt-66b": _opt(64, hidden_size=9216),
    "opt-175b": _opt(96, hidden_size=12288),
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
    """Compiles one step of a model of that shape for GPUs named `target`, as many as share it."""
    num_devices = config.tensor_parallel_size
    placement = Placement.on(*target_devices(target, num_devices))
    shape = shape.for_devices(num_devices)
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
        placement=placement,
    )
    with placement.as_target():
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
