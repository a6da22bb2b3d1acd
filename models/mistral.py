"""Mistral 7B, Nemo, Small and Large (Jiang et al., 2023): a Llama, some with a sliding window."""

import dataclasses
from typing import ClassVar

from pallas_paged.models.config import FULL_ATTENTION, SLIDING_ATTENTION, HFFields
from pallas_paged.models.decoder import NAMES, Decoder, DecoderConfig, decoder_fields_from_hf
from pallas_paged.models.interface import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """The shape of a Mistral."""

    architecture: ClassVar[str] = "MistralForCausalLM"

    @classmethod
    def from_hf(cls, fields: HFFields) -> "MistralConfig":
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""
        shared = decoder_fields_from_hf(
            fields, default_max_position_embeddings=131072, default_num_kv_heads=8
        )
        window = fields.nullable_integer("sliding_window", 4096)  # a file without it means 4096
        kind = FULL_ATTENTION if window is None else SLIDING_ATTENTION
        fields.layer_types((kind,), (kind,) * shared["num_layers"])  # all alike
        config = cls(
            **shared,
            sliding_windows=(window,) * shared["num_layers"],
        )
        fields.finish()
        return config


FAMILY = Family(MistralConfig, Decoder, NAMES)
