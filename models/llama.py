"""Llama 1, 2 and 3.x (Touvron et al., 2023; Dubey et al., 2024)."""

import dataclasses
from typing import ClassVar

from pallas_paged.models.config import HFFields
from pallas_paged.models.decoder import NAMES, Decoder, DecoderConfig, decoder_fields_from_hf
from pallas_paged.models.interface import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama."""

    architecture: ClassVar[str] = "LlamaForCausalLM"

    @classmethod
    def from_hf(cls, fields: HFFields) -> "LlamaConfig":
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""
        fields.only("pretraining_tp", 1)
        shared = decoder_fields_from_hf(fields, default_max_position_embeddings=2048)
        bias = fields.flag("attention_bias", False)
        config = cls(
            **shared,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=fields.flag("mlp_bias", False),
        )
        fields.finish()
        return config


FAMILY = Family(LlamaConfig, Decoder, NAMES)
