"""Qwen 2 and 2.5 (Yang et al., 2024): a Llama with biases before its heads."""

import dataclasses
from typing import ClassVar

from pallas_paged.models.config import FULL_ATTENTION, SLIDING_ATTENTION, HFFields
from pallas_paged.models.decoder import NAMES, Decoder, DecoderConfig, decoder_fields_from_hf
from pallas_paged.models.interface import Family

DEFAULTS = {"default_max_position_embeddings": 32768, "default_num_kv_heads": 32}
"""Of a Qwen 2 and 3, for `decoder_fields_from_hf`."""


def sliding_windows_from_hf(fields: HFFields, num_layers: int) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer of a Qwen, None for full attention.

    With `use_sliding_window`, layers from `max_window_layers` on have one, or those that
    `layer_types` names; without it none has.

    Raises:
      ValueError: `layer_types` has an unknown type or not one for each layer, or asks for a window
        where there is none.
    """
    window = fields.nullable_integer("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.integer("max_window_layers", 28)
    types = fields.layer_types(
        (FULL_ATTENTION, SLIDING_ATTENTION),
        [
            FULL_ATTENTION if window is None or layer < first else SLIDING_ATTENTION
            for layer in range(num_layers)
        ],
    )
    if window is None and SLIDING_ATTENTION in types:
        raise ValueError(
            f"config.json: layer_types has {SLIDING_ATTENTION!r}, but use_sliding_window is false "
            "or sliding_window null"
        )
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in types)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """The shape of a Qwen 2 or 2.5."""

    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    @classmethod
    def from_hf(cls, fields: HFFields) -> "Qwen2Config":
        """Returns the configuration in a `config.json`; `ValueError` for what is unsupported."""
        shared = decoder_fields_from_hf(fields, **DEFAULTS)
        config = cls(
            **shared,
            qkv_bias=True,
            sliding_windows=sliding_windows_from_hf(fields, shared["num_layers"]),
        )
        fields.finish()
        return config


FAMILY = Family(Qwen2Config, Decoder, NAMES)
