"""Flax NNX models, and checkpoints: loading, porting to Orbax and back, parity."""

from pallas_paged.models.config import ModelConfig
from pallas_paged.models.generation_config import load_eos_token_ids, load_sampling_defaults
from pallas_paged.models.interface import Attend, CausalLM
from pallas_paged.models.loader import abstract_model, init_model, load_config, load_model

__all__ = [
    "Attend",
    "CausalLM",
    "ModelConfig",
    "abstract_model",
    "init_model",
    "load_config",
    "load_eos_token_ids",
    "load_model",
    "load_sampling_defaults",
]
