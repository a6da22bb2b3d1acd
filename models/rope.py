"""Rotary position embeddings (Su et al., 2021) and the scalings that Llama checkpoints use."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Rope:
    """Unscaled: the pair `i` of `head_dim / 2` turns by `theta^(-2i / head_dim)` per position."""

    theta: float = 10000.0

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[head_dim / 2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return np.float32(1.0) / np.power(np.float32(self.theta), exponent)


@dataclasses.dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al., 2023): all angles divided by `factor`."""

    factor: float = 1.0

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[head_dim / 2]."""
        return super().inv_freq(head_dim) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a blend between.

    Wavelengths are long above `original_max_position_embeddings / low_freq_factor` and short below
    `original_max_position_embeddings / high_freq_factor`.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[head_dim / 2]."""
        plain = super().inv_freq(head_dim)
        turns = self.original_max_position_embeddings * plain / np.float32(2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return (1 - kept) * plain / np.float32(self.factor) + kept * plain


def rotation(
    rope: Rope, positions: Int32[Array, "T"], head_dim: int
) -> tuple[Float32[Array, "T half"], Float32[Array, "T half"]]:
    """Returns the cosines and sines by which the heads of tokens at `positions` are turned."""
    angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(rope.inv_freq(head_dim)))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "T H D"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float[Array, "T H D"]:
    """Returns `x` turned: dimension i is paired with i + D/2, as in Hugging Face's weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
