"""What all model configurations share, and the strict reading of a `config.json`."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from jax.typing import DTypeLike

from pallas_paged.cache_spec import CacheSpec

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
"""The parameter dtypes models can have."""

MAX_INTEGER = 2**31 - 1
"""The largest integer of a `config.json`: what the device counts with has 32 bits."""
_MAX_FLOAT32 = 3.4028234e38  # what the device computes with

_REQUIRED: Any = object()

_BOOKKEEPING = "_name_or_path architectures model_type transformers_version torchscript use_cache"
_TRAINING = "attention_dropout activation_dropout dropout layerdrop initializer_range init_std"
_TOKENS = "bos_token_id eos_token_id pad_token_id prefix"  # for tokenizers and generation defaults
_OUTPUTS = "output_hidden_states output_attentions return_dict"  # of transformers' functions
_CLASSIFIERS = "id2label label2id problem_type num_labels"
_WITHOUT_EFFECT = frozenset(
    f"{_BOOKKEEPING} {_TRAINING} {_TOKENS} {_OUTPUTS} {_CLASSIFIERS}".split()
)
"""Fields that change no logit; any other field that nobody reads is reported."""

_NEUTRAL: dict[str, Any] = {
    "quantization_config": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
"""Fields that we support at one value only, or null, where an architecture does not read them."""
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
"""What a layer can be in the field `layer_types`."""


def is_finite(value: object) -> bool:
    """Returns whether a value of a JSON file is a number, and one that float32 can hold."""
    # NaN is within nothing; an integer too large for a float does not overflow here.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= _MAX_FLOAT32
    )


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
        value = self._get(name, (int,), default)
        if value is not default and abs(value) > MAX_INTEGER:
            raise ValueError(f"{self._source}: {name}={value!r:.80} must be at most {MAX_INTEGER}")
        return value

    def nullable_integer(self, name: str, default: int | None) -> int | None:
        """Returns an integer field, None where it is null, and `default` where it is absent."""
        return self.integer(name, None if name in self._values else default)

    def layer_types(self, supported: Sequence[str], default: Sequence[str]) -> list[str]:
        """Returns what each layer is by the field `layer_types`, one of the strings `supported`.

        Raises:
          ValueError: another string, or not as many as there are in `default`.
        """
        name = "layer_types"
        values = self._get(name, (list,), list(default))
        if len(values) != len(default):
            raise ValueError(
                f"{self._source}: {name} has {len(values)} entries for num_hidden_layers="
                f"{len(default)}"
            )
        if unsupported := [value for value in values if value not in supported]:
            raise ValueError(
                f"{self._source}: {name} has {unsupported[0]!r}, which is not supported, only "
                f"{' or '.join(supported)}"
            )
        return values

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Returns a real-valued field as a float; `ValueError` where float32 cannot hold it."""
        value = self._get(name, (int, float), default)
        return value if value is default else self._finite(name, value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a field that is a list of finite numbers."""
        values = self._get(name, (list,), _REQUIRED)
        return tuple(self._finite(name, value) for value in values)

    def _finite(self, name: str, value: Any) -> float:
        if not is_finite(value):
            raise ValueError(
                f"{self._source}: {name} has {value!r:.80}, which is no finite number of 32 bits"
            )
        return float(value)

    def flag(self, name: str, default: bool, null: bool | None = None) -> bool:
        """Returns a boolean field; where it is null `null`, or without that `default`."""
        if null is not None and name in self._values:
            default = null
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
        """Refuses what no architecture supports; logs the fields that nobody read."""
        for name, neutral in _NEUTRAL.items():
            if name not in self._read:
                self.only(name, neutral)
        if "layer_types" not in self._read:
            num_layers = self.integer("num_hidden_layers")
            self.layer_types((FULL_ATTENTION,), (FULL_ATTENTION,) * num_layers)
        without_effect = [name for name in self.unread() if name not in _WITHOUT_EFFECT]
        if without_effect:
            logger.warning(
                "%s: ignoring fields that no model here uses: %s",
                self._source,
                ", ".join(without_effect),
            )


def checkpoint_dtype_from_hf(fields: HFFields) -> str | None:
    """Returns the dtype `config.json` gives for the weights, under its new name or its old one.

    None where it gives none, or "auto", which leaves it to the tensors.
    """
    new, old = (fields.choice(name, (*DTYPES, "auto"), None) for name in ("dtype", "torch_dtype"))
    dtype = old if new is None else new
    return None if dtype == "auto" else dtype


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
      must_split: the fields that have to be multiples of a number of devices, see `for_devices`.
      architecture: the name in the field `architectures` of a `config.json`.
      max_position_embeddings: of `config.json`; see `max_model_len` for the most tokens that a
        sequence may have.
      num_kv_heads: with their copies, if there are any.
      checkpoint_dtype: one of `DTYPES`, or None where the checkpoint's config gives none.
      kv_cache_dtype: of the quantised KV cache that the checkpoint brings scales for, "int8" or
        "float8_e4m3fn"; None without.
      kv_head_copies: how many times in a row each KV head of a checkpoint stands in the model, each
        time for its share of the query heads; see `for_devices`.
      merges_projections: whether projections of the same input are one product, with one parameter
        for all of them, and not each a parameter of its own, as checkpoints have them.
    """

    must_split: ClassVar[tuple[str, ...]] = ("num_q_heads",)
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
    kv_cache_dtype: str | None = None
    kv_head_copies: int = 1
    merges_projections: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_q_heads", "num_kv_heads")
        check_positive(self, *sizes, "head_dim", "max_position_embeddings", "kv_head_copies")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be divisible by "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.num_kv_heads % self.kv_head_copies:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} counts the copies, so it must be divisible by "
                f"kv_head_copies={self.kv_head_copies}"
            )
        if self.kv_head_copies > 1 and not self.merges_projections:
            raise ValueError(
                f"kv_head_copies={self.kv_head_copies} needs merges_projections=True: use no more "
                "devices than KV heads, or merge the projections"
            )
        if self.checkpoint_dtype not in (None, *DTYPES):
            raise ValueError(
                f"checkpoint_dtype={self.checkpoint_dtype!r} must be None or one of {DTYPES}"
            )

    @property
    def embedding_size(self) -> int:
        """Features of a token's embedding."""
        return self.hidden_size

    @property
    def max_model_len(self) -> int:
        """The most tokens a sequence may have, its prompt and its output together."""
        return self.max_position_embeddings

    @property
    def default_max_model_len(self) -> int:
        """The same where nobody says how long sequences are to be; see `for_length`."""
        return self.max_model_len

    def sliding_window(self, layer: int) -> int | None:
        """Returns how many tokens a query sees in a layer, itself included; None for all."""
        return None

    def cache_specs(self, block_size: int, dtype: DTypeLike) -> tuple[CacheSpec, ...]:
        """Returns what each layer keeps in blocks of `block_size` tokens, as numbers of `dtype`."""
        return tuple(
            CacheSpec.attention(
                self.num_kv_heads,
                block_size,
                self.head_dim,
                dtype,
                sliding_window=self.sliding_window(layer),
            )
            for layer in range(self.num_layers)
        )

    def share(self, num_devices: int) -> Self:
        """Returns the shape of the attention of one of so many devices, each with its own heads."""
        q_heads, kv_heads = self.num_q_heads // num_devices, self.num_kv_heads // num_devices
        return dataclasses.replace(
            self, num_q_heads=q_heads, num_kv_heads=kv_heads, kv_head_copies=1
        )

    def first_layers(self, num_layers: int) -> Self:
        """Returns the configuration of a model with only the first of these layers."""
        return dataclasses.replace(self, num_layers=num_layers)

    def for_length(self, max_model_len: int) -> Self:
        """Returns the configuration for sequences of up to so many tokens.

        It is another one only where what the model computes depends on that: `DynamicRope`,
        `LongRope`.
        """
        return self

    def for_devices(self, num_devices: int) -> Self:
        """Returns the configuration for weights that are split over so many devices.

        Where there are fewer KV heads than devices, each is there several times, so that every
        device has one, next to the query heads that read it. A vocabulary that cannot be split
        stays whole.

        Raises:
          ValueError: heads, or one of `must_split`, cannot be split over so many devices.
        """
        if num_devices < 1:
            raise ValueError(f"num_devices={num_devices} must be positive")
        wrong = self._not_split(num_devices)
        if wrong is not None:
            usable = [n for n in range(1, self.num_q_heads + 1) if self._not_split(n) is None]
            raise ValueError(
                f"{wrong}={getattr(self, wrong)} cannot be split over {num_devices} devices; with "
                f"this model tensor_parallel_size can be {', '.join(map(str, usable))}"
            )
        if self.num_kv_heads % num_devices == 0:
            return self
        copies = self.kv_head_copies * (num_devices // self.num_kv_heads)
        return dataclasses.replace(self, num_kv_heads=num_devices, kv_head_copies=copies)

    def _not_split(self, num_devices: int) -> str | None:
        """Returns the name of a field that cannot be split over so many devices, or None."""
        for name in self.must_split:
            if getattr(self, name) % num_devices:
                return name
        heads = self.num_kv_heads
        return "num_kv_heads" if heads % num_devices and num_devices % heads else None
