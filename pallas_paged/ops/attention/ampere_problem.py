"""What the sm_80 attention kernel is specialised for, and the shared memory that it takes."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.decode_problem import DecodeProblem
from pallas_paged.ops.attention.work_list import SequenceField

PIECE_KEYS = 32
"""Keys of a tile that are multiplied at a time; with more of them registers spill."""


class AmpereProblem(DecodeProblem):
    """What the kernel is specialised for; `max_tokens` are the tokens of a run."""

    @property
    def rows(self) -> int:
        """M: the query rows of a run on one KV head, padded to what the tensor cores multiply."""
        fewest = 16 if self.head_dim % 32 == 0 else 32
        return max(fewest, 1 << (self.group * self.max_tokens - 1).bit_length())

    @property
    def columns(self) -> int:
        """What configurations are looked up by, as for other chips: the same as `rows`."""
        return self.rows

    @property
    def chunks(self) -> tuple[Any, ...]:
        """Slices of head_dim: what is loaded and multiplied at a time, to need few registers."""
        width = next(w for w in (64, 32, 16) if self.head_dim % w == 0)
        return tuple(pl.ds(begin, width) for begin in range(0, self.head_dim, width))

    @property
    def query_field(self) -> int:
        """The column of `WorkList.sequences` that says where a run's packed queries are."""
        return SequenceField.FIRST_TOKEN if self.max_tokens == 1 else SequenceField.RUN

    def layout(self, kind: str) -> Any:
        """Returns the layout "ACC", "LHS" or "RHS" of the products' operands in registers."""
        layout = getattr(plgpu.Layout, f"MMA_{kind}")
        return layout(jnp.dtype(self.dtype), m_warps=self.rows // 16)

    @property
    def row_layout(self) -> Any:
        """The layout of one number per row."""
        return self.layout("ACC").reduce(1)


def tokens_per_run(group: int, head_dim: int, max_query_len: int) -> int:
    """Returns the tokens of a run: those of a sequence, if the rows that registers hold suffice."""
    return min(max_query_len, (64 if head_dim <= 128 else 32) // group)


def scratch_types(problem: DecodeProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the shared memory of one CTA, by the kernel's parameter names."""
    assert isinstance(problem, AmpereProblem)
    _, copy_rows = problem.copies(config.tile)
    tiles = (config.num_stages, config.tile, problem.head_dim)
    swizzle = swizzle_bytes(problem, copy_rows)
    return {
        "p_smem": _operand((problem.rows, config.tile), problem.dtype, 2 * PIECE_KEYS),
        "k_smem": _operand(tiles, problem.dtype, swizzle),
        "v_smem": _operand(tiles, problem.dtype, swizzle),
    }


def _operand(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Returns shared memory that ldmatrix reads without conflicts, in tiles of 8 rows."""
    tiling: Any = plgpu.TilingTransform  # mypy takes these two for abstract
    swizzled: Any = plgpu.SwizzleTransform
    transforms: tuple[Any, ...] = (tiling((8, swizzle // jnp.dtype(dtype).itemsize)),)
    if swizzle > 16:  # else a tile has rows of 16 bytes, and nothing to swizzle
        transforms += (swizzled(swizzle),)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def swizzle_bytes(problem: AmpereProblem, copy_rows: int) -> int:
    """Returns the bytes of a tile's row: the most with which four warps share a copy's tiles."""
    row_bytes = problem.head_dim * jnp.dtype(problem.dtype).itemsize
    least = 1 if copy_rows % 32 == 0 else 32 // copy_rows  # tiles beside each other
    return next(swizzle for swizzle in (128, 64, 32, 16) if row_bytes % (swizzle * least) == 0)
