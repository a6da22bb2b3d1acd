"""Rotary position embeddings (Su et al., 2021); those for longer sequences: `rope_scaling`."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_paged.models.config import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Unscaled: pair `i` of the `D / 2` turns by `rope_theta^(-2i / D)` per position.

    Fields, here and in the scaled forms, have the names of Hugging Face's `rope_parameters`. A
    position turns by the same angles in every sequence and at every time: keys lie in the cache as
    they were turned, and sequences share them.
    """

    rope_type: ClassVar[str] = "default"

    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_positive(self, "rope_theta")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each pair, f32[D / 2].

        Raises:
          ValueError: the scaling is made for another `head_dim`.
        """
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return np.float32(1.0) / np.power(np.float32(self.rope_theta), exponent)

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        return 1.0

    def max_model_len(self, max_position_embeddings: int) -> int:
        """Returns the most tokens a sequence may have, from that field of the `config.json`."""
        return max_position_embeddings

    def default_max_model_len(self, max_position_embeddings: int) -> int:
        """Returns the same where nobody says how long sequences are to be."""
        return self.max_model_len(max_position_embeddings)

    def for_length(self, max_model_len: int) -> "Rope":
        """Returns the embedding for sequences of up to so many tokens; mostly it is this one."""
        return self


def rotation(
    rope: Rope, positions: Int32[Array, "T"], head_dim: int
) -> tuple[Float32[Array, "T half"], Float32[Array, "T half"]]:
    """Returns the cosines and sines by which the heads of tokens at `positions` are turned."""
    angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(rope.inv_freq(head_dim)))
    cos_sin = rope.magnitude * jnp.cos(angles), rope.magnitude * jnp.sin(angles)
    # Without the barrier, XLA would compute them anew in each layer, for each use.
    return lax.optimization_barrier(cos_sin)
