"""What all model configurations share, and the strict reading of a `config.json`."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
"""The parameter dtypes models can have."""

_REQUIRED: Any = object()

_BOOKKEEPING = "_name_or_path architectures model_type transformers_version torchscript use_cache"
_TRAINING = "attention_dropout activation_dropout dropout layerdrop initializer_range init_std"
_TOKENS = "bos_token_id eos_token_id pad_token_id prefix"  # for tokenizers and generation defaults
_WITHOUT_EFFECT = frozenset(f"{_BOOKKEEPING} {_TRAINING} {_TOKENS}".split())
"""Fields that change no logit; any other field that nobody reads is reported."""

_NEUTRAL: dict[str, Any] = {
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "layer_types": None,
}
"""Fields of any architecture that we support at one value only, unless the family reads them."""


class HFFields:
    """The fields of a `config.json`, or of an object in one, read by name.

    A field that is null counts as absent, as it does for transformers.

    Args:
      values: the parsed JSON object.
      source: what errors call it.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json"):
        self._values = values
        self._source = source
        self._read: set[str] = set()

    def _get(self, name: str, kinds: tuple[type, ...], default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self._source} has no {name!r}, which the model needs")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self._source}: {name}={value!r} must be of type {expected}")
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """Returns an integer field; `default` where it is absent, `ValueError` without one."""
        return self._get(name, (int,), default)

    def nullable_integer(self, name: str, default: int) -> int | None:
        """Returns an integer field, None where it is null, and `default` where it is absent."""
        return self.integer(name, None if name in self._values else default)

    def strings(self, name: str, supported: Sequence[str], default: Sequence[str]) -> list[str]:
        """Returns a field that is a list, each entry one of the strings `supported`."""
        values = self._get(name, (list,), list(default))
        if unsupported := [value for value in values if value not in supported]:
            raise ValueError(
                f"{self._source}: {name} has {unsupported[0]!r}, which is not supported, only "
                f"{' or '.join(supported)}"
            )
        return values

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Returns a real-valued field as a float."""
        value = self._get(name, (int, float), default)
        return value if value is default else float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns a boolean field."""
        return self._get(name, (bool,), default)

    def section(self, name: str) -> Mapping[str, Any] | None:
        """Returns a field that is an object itself, or None."""
        return self._get(name, (dict,), None)

    def choice(self, name: str, supported: Sequence[str], default: Any = _REQUIRED) -> Any:
        """Returns a field that must be one of the strings `supported`."""
        value = self._get(name, (str,), default)
        if value is not default and value not in supported:
            raise ValueError(
                f"{self._source}: {name}={value!r} is not supported, only {' or '.join(supported)}"
            )
        return value

    def only(self, name: str, supported: Any) -> None:
        """Raises `ValueError` if the field is there with another value than `supported`."""
        self._read.add(name)
        value = self._values.get(name)
        if value is not None and value != supported:
            raise ValueError(
                f"{self._source}: {name}={value!r} is not supported, only {supported!r}"
            )

    def unread(self) -> list[str]:
        """Returns the names of the fields that nobody asked for and that are not null."""
        return sorted(k for k, v in self._values.items() if v is not None and k not in self._read)

    def finish(self) -> None:
        """Refuses what no architecture supports; logs the fields that have no effect here."""
        for name in _NEUTRAL.keys() - self._read:
            self.only(name, _NEUTRAL[name])
        without_effect = [name for name in self.unread() if name not in _WITHOUT_EFFECT]
        if without_effect:
            logger.warning(
                "%s: no effect here have the fields %s", self._source, ", ".join(without_effect)
            )


def checkpoint_dtype_from_hf(fields: HFFields) -> str | None:
    """Returns the dtype `config.json` gives for the weights, under its new name or its old one."""
    dtype = fields.choice("dtype", DTYPES, None)
    return dtype if dtype is not None else fields.choice("torch_dtype", DTYPES, None)


def head_dim_from_hidden(hidden_size: int, num_heads: int) -> int:
    """Returns the size of heads that share `hidden_size` among them, all of it."""
    if hidden_size <= 0 or num_heads <= 0 or hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}, for "
            "config.json gives no head_dim"
        )
    return hidden_size // num_heads


def check_positive(config: Any, *names: str) -> None:
    """Raises `ValueError` for the first of the attributes `names` that is not above zero."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the engine needs to know of any model; each family adds its own fields.

    Attributes:
      architecture: the name in the field `architectures` of a `config.json`.
      max_position_embeddings: the most tokens a sequence may have.
      checkpoint_dtype: one of `DTYPES`, or None where the checkpoint's config gives none.
    """

    architecture: ClassVar[str]

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    checkpoint_dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_q_heads", "num_kv_heads")
        check_positive(self, *sizes, "head_dim", "max_position_embeddings")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be divisible by "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.checkpoint_dtype not in (None, *DTYPES):
            raise ValueError(
                f"checkpoint_dtype={self.checkpoint_dtype!r} must be None or one of {DTYPES}"
            )
