"""The model families: a new one is a file beside this and a name in the tuple."""

from collections.abc import Mapping
from typing import Any

from pallas_paged.models import llama, mistral, opt, qwen2, qwen3
from pallas_paged.models.config import HFFields, ModelConfig
from pallas_paged.models.interface import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.config.architecture: module.FAMILY
    for module in (llama, opt, qwen2, qwen3, mistral)
}
"""By the name in the field `architectures` of a `config.json`."""

_BY_MODEL_TYPE = {
    architecture.removesuffix("ForCausalLM").lower(): architecture for architecture in FAMILIES
}
"""By the field `model_type`, for a file without `architectures`."""


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration that a parsed `config.json` holds.

    Raises:
      ValueError: an architecture we do not have, or a field that is missing, malformed or has a
        value that is not supported.
    """
    architectures = values.get("architectures") or [
        _BY_MODEL_TYPE.get(str(values.get("model_type")))
    ]
    match architectures:
        case [str(name), *_] if name in FAMILIES:
            return FAMILIES[name].config.from_hf(HFFields(values))
        case _:
            raise ValueError(
                f"config.json: architectures={values.get('architectures')!r} (model_type="
                f"{values.get('model_type')!r}) is not supported, only {', '.join(FAMILIES)}"
            )
