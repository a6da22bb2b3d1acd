"""The forms of rotary embeddings for sequences longer than a model was first trained on."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from pallas_paged.models.config import HFFields, check_positive
from pallas_paged.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al., 2023): all angles divided by `factor`."""

    rope_type: ClassVar[str] = "linear"

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta", "factor")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        return super().inv_freq(head_dim) / np.float32(self.factor)

    def max_model_len(self, max_position_embeddings: int) -> int:
        """Returns `factor` times as many."""
        return int(self.factor * max_position_embeddings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRope(Rope):
    """NTK-aware scaling (bloc97 and emozilla, 2023): `rope_theta` grows with the longest sequence.

    `rope_theta` is multiplied by `(factor L / M - (factor - 1))^(D / (D - 2))`, where M is
    `max_position_embeddings` and L the length of a sequence that is longer than M. transformers
    computes this again whenever a sequence grows; keys that lie in the cache were then turned by
    other angles. Here L is the longest length that is served, for all sequences: what transformers
    computes for a prompt of that length. By default it is `factor M`, as in vLLM; with no more than
    M nothing is scaled.

    Attributes:
      longest: L; None for the default.
    """

    rope_type: ClassVar[str] = "dynamic"

    factor: float
    max_position_embeddings: int
    longest: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta", "factor", "max_position_embeddings")

    def for_length(self, max_model_len: int) -> "DynamicRope":
        """See `Rope.for_length`."""
        return dataclasses.replace(self, longest=max_model_len)

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        if head_dim < 4:
            raise ValueError(f"head_dim={head_dim} must be at least 4 for rope type 'dynamic'")
        M = self.max_position_embeddings
        longest = self.factor * M if self.longest is None else self.longest
        stretch = self.factor * max(longest / M, 1.0) - (self.factor - 1)
        theta = self.rope_theta * stretch ** (head_dim / (head_dim - 2))
        return Rope(rope_theta=theta).inv_freq(head_dim)

    def max_model_len(self, max_position_embeddings: int) -> int:
        """Returns `factor` times as many."""
        return int(self.factor * max_position_embeddings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a blend between.

    Wavelengths are long above `original_max_position_embeddings / low_freq_factor` and short below
    `original_max_position_embeddings / high_freq_factor`.
    """

    rope_type: ClassVar[str] = "llama3"

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta", "factor", "original_max_position_embeddings")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must lie between 0 and "
                f"high_freq_factor={self.high_freq_factor}"
            )

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        plain = super().inv_freq(head_dim)
        turns = self.original_max_position_embeddings * plain / np.float32(2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - kept) * plain / np.float32(self.factor) + kept * plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (Peng et al., 2023): pairs that turn often are kept, those that turn little stretched.

    A pair that turns `beta_fast` times or more within `original_max_position_embeddings` keeps its
    angle, one that turns `beta_slow` times or less has it divided by `factor`, with a linear blend
    over the pairs between, whose ends are rounded outwards with `truncate`.

    Cosines and sines grow by `attention_factor`. Where it is None they grow by `m(mscale) /
    m(mscale_all_dim)` if both are given and not 0, else by `m(1)`; `m(s) = 0.1 s log(factor) + 1`.
    """

    rope_type: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta", "factor", "original_max_position_embeddings")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must lie between 0 and beta_fast={self.beta_fast}"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be more than 1 for YaRN")
        if self.attention_factor is not None:
            check_positive(self, "attention_factor")

    def _pair_turning(self, num_turns: float, head_dim: int) -> float:
        wavelength = self.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        plain = super().inv_freq(head_dim)
        first, last = (
            self._pair_turning(turns, head_dim) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001
        pair = np.arange(head_dim // 2, dtype=np.float32)
        stretched = np.clip((pair - first) / (last - first), 0, 1).astype(np.float32)
        return stretched * plain / np.float32(self.factor) + (1 - stretched) * plain

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def max_model_len(self, max_position_embeddings: int) -> int:
        """Returns `factor` times as many as before the stretching."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
    """LongRoPE (Ding et al., 2024): each pair's angle divided by a number of its own.

    transformers divides by `short_factor` in sequences of up to `original_max_position_embeddings`
    tokens and by `long_factor` in longer ones; keys that lie in the cache when a sequence grows
    longer were turned by the short ones. Here, as in vLLM, one set is for all sequences: the long
    one if sequences longer than the original ones are to be served, which is to be asked for: by
    default the longest sequence is an original one.

    Cosines and sines grow by `attention_factor`, `sqrt(1 + log(factor) / log(original))` where it
    is None.

    Attributes:
      longest: the longest sequence that is served; None for the default.
    """

    rope_type: ClassVar[str] = "longrope"

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        names = ("max_position_embeddings", "original_max_position_embeddings", "factor")
        check_positive(self, "rope_theta", *names)
        if self.attention_factor is not None:
            check_positive(self, "attention_factor")
        if self.original_max_position_embeddings == 1:
            raise ValueError("original_max_position_embeddings=1 must be more than 1 for LongRoPE")
        for name in ("short_factor", "long_factor"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        for name in ("short_factor", "long_factor"):
            length = len(getattr(self, name))
            if length != head_dim // 2:
                raise ValueError(
                    f"{name} has {length} numbers, but heads have {head_dim // 2} pairs "
                    f"(head_dim={head_dim})"
                )
        is_long = (self.longest or 0) > self.original_max_position_embeddings
        divisors = np.array(self.long_factor if is_long else self.short_factor, np.float32)
        return super().inv_freq(head_dim) / divisors

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )

    def default_max_model_len(self, max_position_embeddings: int) -> int:
        """Returns the length of the original sequences."""
        return min(self.original_max_position_embeddings, max_position_embeddings)

    def for_length(self, max_model_len: int) -> "LongRope":
        """See `Rope.for_length`."""
        return dataclasses.replace(self, longest=max_model_len)


_ROPES = {
    rope.rope_type: rope for rope in (Rope, LinearRope, DynamicRope, Llama3Rope, YarnRope, LongRope)
}
_WITHOUT_EFFECT = ("type", "finetuned")  # beside `rope_type`; said of YaRN models
_ORIGINAL = "original_max_position_embeddings"


def rope_from_hf(fields: HFFields, max_position_embeddings: int) -> Rope:
    """Returns the rotary embedding that a `config.json` asks for.

    Reads `rope_parameters`, as transformers 5 writes them, or `rope_scaling` and `rope_theta`. What
    is left out has transformers' meaning: `original_max_position_embeddings` is then
    `max_position_embeddings`, and the `factor` of YaRN and LongRoPE the ratio of the two.

    Args:
      fields: of the file.
      max_position_embeddings: what it says, or the family's default.

    Raises:
      ValueError: an unsupported type, or a parameter that is missing, malformed or unsupported.
    """
    new, old = (fields.section(name) or None for name in ("rope_parameters", "rope_scaling"))
    if new is not None and old is not None and new != old:
        raise ValueError(
            f"config.json has rope_parameters={new} and rope_scaling={old}: remove one of them"
        )
    name = "rope_parameters" if new is not None else "rope_scaling"
    parameters = HFFields(new or old or {}, source=f"config.json, {name}")
    rope_type = parameters.choice("rope_type", tuple(_ROPES), None)
    if rope_type is None:
        rope_type = parameters.choice("type", tuple(_ROPES), Rope.rope_type)  # its first name
    rope = _ROPES[rope_type]
    parameters.only("partial_rotary_factor", 1.0)
    fields.only("partial_rotary_factor", 1.0)
    values = _values(rope, fields, parameters, max_position_embeddings)
    if unread := [name for name in parameters.unread() if name not in _WITHOUT_EFFECT]:
        raise ValueError(
            f"config.json, {name}: {', '.join(unread)} not supported with rope type {rope_type!r}"
        )
    return rope(**values)


def _values(
    rope: type[Rope], fields: HFFields, parameters: HFFields, max_position_embeddings: int
) -> dict[str, Any]:
    """Returns the arguments of the class `rope`."""
    own = dataclasses.fields(rope)
    names = {field.name for field in own} - {"longest"}  # not of the file
    defaults = {f.name: f.default for f in own if f.default is not dataclasses.MISSING}
    defaults["rope_theta"] = fields.number("rope_theta", Rope.rope_theta)
    values: dict[str, Any] = {}
    if "max_position_embeddings" in names:
        values["max_position_embeddings"] = max_position_embeddings
    if _ORIGINAL in names:
        inside = parameters.integer(_ORIGINAL, max_position_embeddings)
        values[_ORIGINAL] = fields.integer(_ORIGINAL, inside)
        if rope in (YarnRope, LongRope):
            defaults["factor"] = max_position_embeddings / max(values[_ORIGINAL], 1)
    else:
        parameters.only(_ORIGINAL, max_position_embeddings)
    for name in sorted(names - values.keys()):
        if name in ("short_factor", "long_factor"):
            values[name] = parameters.numbers(name)
        elif name == "truncate":
            values[name] = parameters.flag(name, True, null=False)
        elif name in defaults:
            values[name] = parameters.number(name, defaults[name])
        else:
            values[name] = parameters.number(name)
    return values
