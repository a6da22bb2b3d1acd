"""What the sm_80 attention kernel is specialised for, and the shared memory that it takes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.problem import StepProblem
from pallas_paged.ops.attention.smem import swizzled

PIECE_KEYS = 32
"""Keys of a tile that are multiplied at a time; with more of them registers spill."""

FLAT_ROW = 256
"""Bytes of a row in what is copied flat; see `AmpereProblem.is_flat`."""

_SMALLEST_TILE = 32


class AmpereProblem(StepProblem):
    """What the kernel is specialised for; `max_tokens` are the tokens of a run."""

    @property
    def rows(self) -> int:
        """M: the query rows of a run on one KV head, padded to what the tensor cores multiply."""
        fewest = 16 if self.head_dim % 32 == 0 and self.piece_keys == PIECE_KEYS else 32
        return max(fewest, 1 << (self.group * self.max_tokens - 1).bit_length())

    @property
    def piece_keys(self) -> int:
        """Keys that are multiplied at a time. Those that have scales are in one block."""
        return min(PIECE_KEYS, self.block_size) if self.is_quantised else PIECE_KEYS

    @property
    def is_flat(self) -> bool:
        """Whether four warps cannot share what a copy brings: 16 rows of 80 bytes.

        Then rows of `FLAT_ROW` bytes are copied, all but the last of them and all but the first.
        """
        return _swizzle_bytes(self, self.copies(_SMALLEST_TILE)[1]) is None

    def layout(self, kind: str) -> Any:
        """Returns the layout "ACC", "LHS" or "RHS" of the products' operands in registers."""
        layout = getattr(plgpu.Layout, f"MMA_{kind}")
        return layout(jnp.dtype(self.dtype), m_warps=self.rows // 16)


def tokens_per_run(group: int, head_dim: int, max_query_len: int) -> int:
    """Returns the tokens of a run: those of a sequence, if the rows that registers hold suffice."""
    return min(max_query_len, (64 if head_dim <= 128 else 32) // group)


class Smem(NamedTuple):
    """The shared memory of one CTA."""

    k: Any  # [stages, T, D], as they come from the cache
    numbers: Any  # [T, D], what a tile of quantised keys, and then of values, becomes; else None
    weights: Any  # [M, T]
    v: Any  # like k


def scratch_types(problem: AmpereProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the shared memory of one CTA, by the kernel's parameter names."""
    _, copy_rows = problem.copies(config.tile)
    tile = (config.tile, problem.head_dim)
    swizzle = _swizzle_bytes(problem, copy_rows)
    ring: Any = plgpu.SMEM((config.num_stages, *tile), problem.cache_dtype)
    if swizzle is not None:
        ring = swizzled(ring.shape, problem.cache_dtype, swizzle)
    numbers = None
    if problem.is_quantised:
        numbers = swizzled(tile, problem.dtype, problem.number_swizzle)
    weights = swizzled((problem.rows, config.tile), problem.dtype, 2 * problem.piece_keys)
    return {"smem": Smem(ring, numbers, weights, ring)}


def swizzle_bytes(problem: AmpereProblem, copy_rows: int) -> int:
    """Returns the bytes of a row of the tiles that copies bring; not if they are flat."""
    swizzle = _swizzle_bytes(problem, copy_rows)
    assert swizzle is not None
    return swizzle


def _swizzle_bytes(problem: AmpereProblem, copy_rows: int) -> int | None:
    """Returns the most bytes of a tile's row with which four warps share a copy's tiles, if any."""
    row_bytes = problem.head_dim * jnp.dtype(problem.cache_dtype).itemsize
    least = 1 if copy_rows % 32 == 0 else 32 // copy_rows  # tiles beside each other
    # A chunk of quantised numbers, which are read at a time, is not less than a tile.
    sizes = (64, 32, 16) if problem.is_quantised else (128, 64, 32, 16)
    return next((size for size in sizes if row_bytes % (size * least) == 0), None)
