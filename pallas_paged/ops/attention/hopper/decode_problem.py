"""What the sm_90a decode kernel is specialised for, and the shared memory that follows from it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.quantised import scale_slots
from pallas_paged.ops.attention.problem import AttentionProblem
from pallas_paged.ops.attention.smem import swizzled, widest_swizzle
from pallas_paged.ops.attention.work_list import SequenceField


class DecodeProblem(AttentionProblem):
    """What the kernel is specialised for; `max_tokens` of a sequence, others are not its own."""

    @property
    def columns(self) -> int:
        """N: the query rows of a KV head, padded to what the tensor core multiplies."""
        return -(-self.group * self.max_tokens // 8) * 8

    @property
    def query_row(self) -> int:
        """The column of `WorkList.sequences` that says where a sequence's packed queries are."""
        return SequenceField.FIRST_TOKEN if self.max_tokens == 1 else SequenceField.ROW

    @property
    def shares_rows(self) -> bool:
        """Whether N rows of queries as they lie are those of some KV heads, and read as they are.

        Else they are packed, each KV head's by themselves. What is computed of the other heads'
        rows is in columns of its own, and nobody takes it.
        """
        is_whole = self.columns % self.group == 0 and self.num_q_heads % self.columns == 0
        return self.max_tokens == 1 and is_whole

    def query_rows(self, row: Any, head: Any) -> Any:
        """Returns which N rows of queries hold those of a KV head; see `query_row` for `row`."""
        if self.shares_rows:
            return row * (self.num_q_heads // self.columns) + head * self.group // self.columns
        return row * self.num_kv_heads + head

    def first_column(self, head: Any) -> Any:
        """Returns where in these N rows the KV head's own begin."""
        return head * self.group % self.columns if self.shares_rows else 0

    @property
    def value_rows(self) -> int:
        """Rows of O^T: head_dim, padded to whole tiles of 64. Those behind head_dim are garbage."""
        return -(-self.head_dim // 64) * 64

    def value_copy_rows(self, tile: int) -> int:
        """Returns the rows of one copy of values.

        TMA writes what is contiguous in shared memory. Where head_dim fills only a part of a row,
        that is a row of swizzle tiles: 8 rows. Quantised values come as they are.
        """
        is_contiguous = self.is_quantised or self.value_rows == self.head_dim
        return self.copies(tile)[1] if is_contiguous else 8


class Tiles(NamedTuple):
    """Tiles of keys, or of values, in shared memory.

    All of those in flight; quantised ones are in flight as bytes, and the one that is computed is
    converted. Else the first and the last are None.
    """

    scales: Any  # f32[stages, scale_slots]
    numbers: Any  # [stages or 1, T, D], what is multiplied
    stored: Any  # [stages, T, D], as they come from the cache

    @property
    def arriving(self) -> Any:
        """Where TMA writes."""
        return self.numbers if self.stored is None else self.stored


class Results(NamedTuple):
    """The shared memory that results leave by."""

    lse: Any  # f32[N]
    out: Any  # [N, D], or some columns of it


class Smem(NamedTuple):
    """Shared memory."""

    k: Tiles
    results: Results
    weights: Any  # [N, T]
    q: Any  # [stages + 1, N, D]
    v: Tiles


class Barriers(NamedTuple):
    """What says that copies have arrived: one for each of the places in `Smem`."""

    k: Any
    q: Any
    v: Any


def scratch_types(problem: DecodeProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the shared memory and the barriers of one CTA, by the kernel's parameter names."""
    columns, stages, tile = problem.columns, config.num_stages, config.tile
    num_copies, _ = problem.copies(tile)
    # Of all operands that of the queries, whose rows may be the narrowest.
    swizzle = widest_swizzle(problem.head_dim, problem.dtype)
    num_scale_copies = num_copies if problem.is_quantised else 0
    num_value_copies = tile // problem.value_copy_rows(tile)

    def operand(*shape: int) -> Any:
        return swizzled(shape, problem.dtype, swizzle)

    def barriers(num_copies: int) -> Any:
        return plgpu.Barrier(num_arrivals=num_copies + num_scale_copies, num_barriers=stages)

    return {
        "barriers": Barriers(
            k=barriers(num_copies),
            q=plgpu.Barrier(num_arrivals=1, num_barriers=stages + 1),
            v=barriers(num_value_copies),
        ),
        "smem": Smem(
            k=_tiles(problem, config, operand, problem.head_dim),
            weights=operand(columns, tile),
            # Each of the tiles in flight may begin an item, besides the one that is computed.
            q=operand(stages + 1, columns, problem.head_dim),
            v=_tiles(problem, config, operand, problem.value_rows),
            results=results_scratch(problem, problem.value_rows),
        ),
    }


def _tiles(problem: DecodeProblem, config: DecodeConfig, operand: Any, width: int) -> Tiles:
    stages, tile = config.num_stages, config.tile
    if not problem.is_quantised:
        return Tiles(None, operand(stages, tile, width), None)
    slots = scale_slots(tile, problem.copies(tile)[1])
    return Tiles(
        plgpu.SMEM((stages, slots), jnp.float32),
        operand(1, tile, width),
        plgpu.SMEM((stages, tile, problem.head_dim), problem.cache_dtype),
    )


def results_scratch(problem: DecodeProblem, width: int) -> Results:
    """Returns the shared memory that `width` columns of results leave by."""
    return Results(
        lse=plgpu.SMEM((problem.columns,), jnp.float32),
        out=plgpu.SMEM((problem.columns, width), problem.dtype),
    )
