"""What the warpgroups of the sm_90a prefill kernel share: the problem, memory, barriers."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_plan import TILE_ROWS, tile_tokens
from pallas_paged.ops.attention.hopper.quantised import scale_slots, scales_values
from pallas_paged.ops.attention.online_softmax import logits_factor
from pallas_paged.ops.attention.smem import swizzled
from pallas_paged.quantisation import is_quantised

WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the kernel is specialised for; C = `tuning.tile_keys`."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: Any  # of queries and the result
    cache_dtype: Any  # of keys and values: the same, or a quantised one
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    tuning: PrefillTuning

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values have scales, and have to be converted."""
        return is_quantised(self.cache_dtype)

    @property
    def stages(self) -> int:
        """Steps whose keys and values are in shared memory, ready to be multiplied."""
        return self.tuning.converted if self.is_quantised else self.tuning.stages

    @property
    def logits_factor(self) -> float:
        """What products of queries and keys are multiplied by, for `exp2`: also the soft cap's."""
        return logits_factor(self.scale, self.logits_soft_cap)

    @property
    def folds_scale(self) -> bool:
        """Whether `logits_factor` can be left to the multiply-add before `exp2`.

        The largest logit is looked for before that, which a factor below 0 would make the least.
        """
        return self.logits_soft_cap is None and self.logits_factor > 0

    @property
    def loaders(self) -> int:
        """Warpgroups that bring keys and values; two of them one kind each."""
        return self.tuning.converters if self.is_quantised else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of each loading warpgroup and of each computing one.

        Together no more than the 504 that three warpgroups begin with, or the 512 of four: an
        increase waits for them.
        """
        if self.loaders > 1:
            return 72, 184
        return (56, 224) if self.is_quantised else (40, 232)

    @property
    def scales_values(self) -> bool:
        """Whether quantised values are scaled as they are converted, else the weights are.

        At large head_dims the computing warpgroups have no registers for that.
        """
        return scales_values(self.dtype) or self.head_dim > 128

    @property
    def piece_rows(self) -> int:
        """Rows of a quantised tile that are converted at a time: found by compiling."""
        return {192: 32, 256: 16}.get(self.head_dim, 64)

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return tile_tokens(self.group, self.head_dim)

    @property
    def block_rows(self) -> int:
        """Keys that one copy brings: a block, or the part of it that fits into a step."""
        return min(self.block_size, self.tuning.tile_keys)

    @property
    def staged_columns(self) -> tuple[tuple[int, int], ...]:
        """(begin, width) of the parts of head_dim that lie in the staging buffer one by one."""
        width = self.head_dim if self.head_dim <= 128 else 64
        return tuple((begin, width) for begin in range(0, self.head_dim, width))


class Inputs(NamedTuple):
    """The kernel's arguments in global memory, the result among them."""

    q: Any  # [T, Hq, D]
    cache: KVCache
    block_tables: Any  # i32[B, M]
    tiles: Any  # i32[X, 6]
    num_tiles: Any  # i32[1], how many of them there are
    slopes: Any  # f32[Hk, 128], or None
    sinks: Any  # f32[Hk, 128], or None
    out: Any  # [T, Hq, D], written


class Tiles(NamedTuple):
    """Of some steps C keys, C values, C keys and so on, in shared memory.

    The last three if they are quantised.
    """

    numbers: Any  # [2 * stages, C, D], what is multiplied
    scales: Any  # f32[2 * stages, C]; of values of no use where the numbers have been scaled
    stored: Any  # [2 * tuning.stages, C, D], as they come from the cache
    stored_scales: Any  # f32[2 * tuning.stages, scale_slots]


class Smem(NamedTuple):
    """Shared memory."""

    q: Any  # [128, D]
    tiles: Tiles
    weights: Any  # [2, 64, C], or None
    staging: Any  # [128, width], a part of the columns of the next tile's q, at the end of a tile
    # of its result's; not swizzled, so that a copy may begin at any token
    lse: Any  # f32[128]


class TilesBarriers(NamedTuple):
    """What is said about each of the places in `Tiles`."""

    arrived: Any  # the stored ones are there; None unless quantised
    filled: Any  # the numbers are there
    consumed: Any  # both computing warpgroups are done with them


class Barriers(NamedTuple):
    """`pair` holds the two computing warpgroups together."""

    q: Any
    staging_free: Any
    tiles: TilesBarriers
    pair: Any
    turns: Any  # one for each computing warpgroup; None if they take no turns


def scratch_types(problem: Problem) -> dict[str, Any]:
    """Returns the shared memory and the barriers of a thread block."""
    tuning, dim, dtype = problem.tuning, problem.head_dim, problem.dtype
    weights = None
    if not tuning.in_registers:
        weights = swizzled((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, tuning.tile_keys), dtype)
    return {
        "smem": Smem(
            q=swizzled((TILE_ROWS, dim), dtype),
            tiles=_tiles(problem),
            weights=weights,
            staging=plgpu.SMEM((TILE_ROWS, problem.staged_columns[0][1]), dtype),
            lse=plgpu.SMEM((TILE_ROWS,), jnp.float32),
        ),
        "barriers": Barriers(
            q=plgpu.Barrier(num_arrivals=problem.group),
            staging_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            tiles=_tiles_barriers(problem),
            pair=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            turns=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS) if tuning.turns else None,
        ),
    }


def meet(pair: Any) -> None:
    """Waits until both computing warpgroups are here."""
    plgpu.barrier_arrive(pair)
    plgpu.barrier_wait(pair)


def _tiles(problem: Problem) -> Tiles:
    size, dim, slots = problem.tuning.tile_keys, problem.head_dim, 2 * problem.tuning.stages
    numbers = swizzled((2 * problem.stages, size, dim), problem.dtype)
    if not problem.is_quantised:
        return Tiles(numbers, None, None, None)
    return Tiles(
        numbers,
        plgpu.SMEM((2 * problem.stages, size), jnp.float32),
        plgpu.SMEM((slots, size, dim), problem.cache_dtype),
        plgpu.SMEM((slots, scale_slots(size, problem.block_rows)), jnp.float32),
    )


def _tiles_barriers(problem: Problem) -> TilesBarriers:
    copies, slots = problem.tuning.tile_keys // problem.block_rows, 2 * problem.stages
    consumed = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots)
    if not problem.is_quantised:
        filled = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
        return TilesBarriers(None, filled, consumed)
    arrived = plgpu.Barrier(num_arrivals=2 * copies, num_barriers=2 * problem.tuning.stages)
    return TilesBarriers(arrived, plgpu.Barrier(num_barriers=slots), consumed)
