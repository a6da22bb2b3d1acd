"""What the sm_90a decode kernel is specialised for, and the shared memory that follows from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.mosaic_gpu_quantised import scale_slots
from pallas_paged.ops.attention.work_list import SequenceField
from pallas_paged.quantisation import is_quantised


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """What the kernel is specialised for.

    Attributes:
      num_q_heads, num_kv_heads, head_dim, block_size: Hq, Hk, D, S.
      dtype: of queries and the output.
      cache_dtype: of keys and values: the same, or a quantised one, and then they have scales.
      max_tokens: the most query tokens of a sequence that the kernel takes.
      scale, sliding_window, logits_soft_cap: options of `paged_attention`.
      has_alibi, has_sinks: whether slopes and sinks are given.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: Any
    cache_dtype: Any
    max_tokens: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """N: the query rows of a KV head, padded to what the tensor core multiplies."""
        return -(-self.group * self.max_tokens // 8) * 8

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values have scales, and have to be converted."""
        return is_quantised(self.cache_dtype)

    @property
    def query_row(self) -> int:
        """The column of `WorkList.sequences` that says where a sequence's packed queries are."""
        return SequenceField.FIRST_TOKEN if self.max_tokens == 1 else SequenceField.ROW

    @property
    def value_rows(self) -> int:
        """Rows of O^T: head_dim, padded to whole tiles of 64. Those behind head_dim are garbage."""
        return -(-self.head_dim // 64) * 64

    @property
    def swizzle(self) -> int:
        """Bytes of the swizzle in shared memory: the largest that divides a row of queries."""
        row_bytes = self.head_dim * jnp.dtype(self.dtype).itemsize
        return next(swizzle for swizzle in (128, 64, 32) if row_bytes % swizzle == 0)

    def copies(self, tile: int) -> tuple[int, int]:
        """Returns (copies per tile, rows of each) of the keys: one per block or part of one."""
        rows = min(tile, self.block_size)
        return tile // rows, rows

    def value_copy_rows(self, tile: int) -> int:
        """Returns the rows of one copy of values.

        TMA writes what is contiguous in shared memory. Where head_dim fills only a part of a row,
        that is a row of swizzle tiles: 8 rows. Quantised values come as they are.
        """
        is_contiguous = self.is_quantised or self.value_rows == self.head_dim
        return self.copies(tile)[1] if is_contiguous else 8


def scratch_types(problem: DecodeProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the shared memory and the barriers of one CTA, by the kernel's parameter names."""
    columns, stages, tile = problem.columns, config.num_stages, config.tile
    num_copies, copy_rows = problem.copies(tile)
    swizzle_elements = problem.swizzle // jnp.dtype(problem.dtype).itemsize

    def operand(*shape: int) -> Any:
        tiling: Any = plgpu.TilingTransform  # mypy takes these two for abstract
        swizzle: Any = plgpu.SwizzleTransform
        transforms = (tiling((8, swizzle_elements)), swizzle(problem.swizzle))
        return plgpu.SMEM(shape, problem.dtype, transforms=transforms)

    # Quantised tiles are in flight as bytes; the one that is computed is converted.
    tiles = 1 if problem.is_quantised else stages
    scratch = {
        # Each of the tiles in flight may begin an item, besides the one that is computed.
        "q_smem": operand(stages + 1, columns, problem.head_dim),
        "k_smem": operand(tiles, tile, problem.head_dim),
        "v_smem": operand(tiles, tile, problem.value_rows),
        "p_smem": operand(columns, tile),
        **output_scratch(problem),
        "q_barriers": plgpu.Barrier(num_arrivals=1, num_barriers=stages + 1),
    }
    num_scale_copies = num_copies if problem.is_quantised else 0
    for name, num_value_copies in (
        ("k", num_copies),
        ("v", tile // problem.value_copy_rows(tile)),
    ):
        scratch[f"{name}_barriers"] = plgpu.Barrier(
            num_arrivals=num_value_copies + num_scale_copies, num_barriers=stages
        )
        if problem.is_quantised:
            bytes_shape = (stages, tile, problem.head_dim)
            scratch[f"{name}_stored"] = plgpu.SMEM(bytes_shape, problem.cache_dtype)
            scales_shape = (stages, scale_slots(tile, copy_rows))
            scratch[f"{name}_scales"] = plgpu.SMEM(scales_shape, jnp.float32)
    return scratch


def output_scratch(problem: DecodeProblem) -> dict[str, Any]:
    """Returns the shared memory that results leave by; the merge has no other."""
    return {
        "out_smem": plgpu.SMEM((problem.columns, problem.value_rows), problem.dtype),
        "lse_smem": plgpu.SMEM((problem.columns,), jnp.float32),
    }
