"""Qwen 3, the dense models (Yang et al., 2025): norms over each query and key, no biases."""

import dataclasses
from typing import ClassVar

from pallas_paged.models.config import HFFields
from pallas_paged.models.decoder import NAMES, Decoder, DecoderConfig, decoder_fields_from_hf
from pallas_paged.models.interface import Family
from pallas_paged.models.qwen2 import DEFAULTS, sliding_windows_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """The shape of a Qwen 3."""

    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    @classmethod
    def from_hf(cls, fields: HFFields) -> "Qwen3Config":
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""
        shared = decoder_fields_from_hf(fields, **DEFAULTS, default_head_dim=128)
        bias = fields.flag("attention_bias", False)
        config = cls(
            **shared,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            sliding_windows=sliding_windows_from_hf(fields, shared["num_layers"]),
        )
        fields.finish()
        return config


FAMILY = Family(Qwen3Config, Decoder, NAMES)
