"""Rotary position embeddings (Su et al., 2021) and the scalings that Llama checkpoints use."""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_paged.models.config import HFFields, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Unscaled: pair `i` of the `D / 2` turns by `rope_theta^(-2i / D)` per position.

    Fields, here and in the scaled forms, have the names of Hugging Face's `rope_parameters`.
    """

    rope_type: ClassVar[str] = "default"

    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return np.float32(1.0) / np.power(np.float32(self.rope_theta), exponent)

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        return 1.0


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
    over the pairs between. Cosines and sines grow by `attention_factor`,
    `0.1 log(factor) + 1` where it is None.
    """

    rope_type: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta", "factor", "original_max_position_embeddings")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must lie between 0 and beta_fast={self.beta_fast}"
            )
        if self.attention_factor is not None:
            check_positive(self, "attention_factor")

    def _pair_turning(self, num_turns: float, head_dim: int) -> float:
        wavelength = self.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2]."""
        plain = super().inv_freq(head_dim)
        first = max(math.floor(self._pair_turning(self.beta_fast, head_dim)), 0)
        last = min(math.ceil(self._pair_turning(self.beta_slow, head_dim)), head_dim - 1)
        pair = np.arange(head_dim // 2, dtype=np.float32)
        stretched = np.clip((pair - first) / max(last - first, 0.001), 0, 1).astype(np.float32)
        return stretched * plain / np.float32(self.factor) + (1 - stretched) * plain

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


_ROPES = {rope.rope_type: rope for rope in (Rope, LinearRope, Llama3Rope, YarnRope)}


def rope_from_hf(fields: HFFields) -> Rope:
    """Returns the rotary embedding that a `config.json` asks for.

    Reads `rope_parameters`, as transformers 5 writes them, or `rope_scaling` and `rope_theta`.

    Raises:
      ValueError: an unsupported type, or a parameter that is missing, malformed or unsupported.
    """
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new is not None and old is not None and new != old:
        raise ValueError(
            f"config.json has rope_parameters={new} and rope_scaling={old}: remove one of them"
        )
    name = "rope_parameters" if new is not None else "rope_scaling"
    parameters = HFFields(new or old or {}, source=f"config.json, {name}")
    rope_type = parameters.choice("type", tuple(_ROPES), "default")  # the oldest spelling
    rope = _ROPES[parameters.choice("rope_type", tuple(_ROPES), rope_type)]
    parameters.only("partial_rotary_factor", 1.0)
    fields.only("partial_rotary_factor", 1.0)
    fields.only("original_max_position_embeddings", None)
    values: dict[str, Any] = {"rope_theta": fields.number("rope_theta", Rope.rope_theta)}
    for field in dataclasses.fields(rope):
        default = values.get(field.name, field.default)
        required = default is dataclasses.MISSING
        read = parameters.integer if field.type is int else parameters.number
        values[field.name] = read(field.name) if required else read(field.name, default)
    if unread := parameters.unread():
        raise ValueError(
            f"config.json, {name}: {', '.join(unread)} not supported with rope type "
            f"{rope.rope_type!r}"
        )
    return rope(**values)


def rotation(
    rope: Rope, positions: Int32[Array, "T"], head_dim: int
) -> tuple[Float32[Array, "T half"], Float32[Array, "T half"]]:
    """Returns the cosines and sines by which the heads of tokens at `positions` are turned."""
    angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(rope.inv_freq(head_dim)))
    return rope.magnitude * jnp.cos(angles), rope.magnitude * jnp.sin(angles)


def rotate(
    x: Float[Array, "T H D"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float[Array, "T H D"]:
    """Returns `x` turned: dimension i is paired with i + D/2, as in Hugging Face's weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
