"""The shape that a model has in an engine: for its lengths, its devices, its projections."""

import dataclasses

from pallas_paged.engine.config import EngineConfig
from pallas_paged.models import ModelConfig


def engine_shape(config: EngineConfig, shape: ModelConfig) -> tuple[ModelConfig, int]:
    """Returns a model's shape in an engine, and the longest sequence that this serves, in tokens.

    Raises:
      ValueError: the model was made for shorter sequences, or cannot be split over the devices.
    """
    max_model_len = resolve_max_model_len(config, shape)
    shape = dataclasses.replace(shape, merges_projections=config.merge_projections)
    return shape.for_length(max_model_len).for_devices(config.tensor_parallel_size), max_model_len


def resolve_max_model_len(config: EngineConfig, shape: ModelConfig) -> int:
    """Returns the longest sequence the engine serves, in tokens, of a model of that shape.

    Raises:
      ValueError: `config.max_model_len` is more than the model was made for.
    """
    longest = shape.max_model_len
    if config.max_model_len is None:
        return shape.default_max_model_len
    if config.max_model_len > longest:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the {longest} tokens that the "
            "model was made for (max_position_embeddings in config.json, and what rope_scaling or "
            "rope_parameters make of it); choose at most that"
        )
    return config.max_model_len
