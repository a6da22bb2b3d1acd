"""What the sm_100a attention kernel is specialised for, and the memory that it takes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig, GpuLimits, fits
from pallas_paged.ops.attention.problem import StepProblem
from pallas_paged.ops.attention.smem import swizzled

LANES = 128
"""Rows of what the tensor cores multiply, and of tensor memory."""

LAYOUT = plgpu.Layout.TCGEN05
ROW_LAYOUT = LAYOUT.reduce(1)

SM100 = GpuLimits(227 * 1024, 228 * 1024, 1024, shared_stages=(4, 3, 2))
"""B200: compute capability 10.0."""

_TENSOR_COLUMNS = 512
_TILE = 64
_PIECE_KEYS = 32


class BlackwellProblem(StepProblem):
    """What the kernel is specialised for; `max_tokens` are the tokens of a run."""

    @property
    def rows(self) -> int:
        """M: the query rows of a run on one KV head, padded to what is copied at a time."""
        return max(16, 1 << (self.group * self.max_tokens - 1).bit_length())

    @property
    def piece_keys(self) -> int:
        """Keys whose logits are computed at a time. Those that have scales are in one block."""
        return min(_PIECE_KEYS, self.block_size)

    @property
    def part_width(self) -> int:
        """Columns of a partial result that are in registers at a time: they divide half of it."""
        return next(width for width in (32, 16, 8) if self.head_dim // 2 % width == 0)

    def layout(self, kind: str) -> Any:
        """Returns the layout of logits and sums in registers, which is "ACC"."""
        assert kind == "ACC"
        return LAYOUT


def tokens_per_run(group: int, max_query_len: int) -> int:
    """Returns the tokens of a run: those of a sequence, if there are rows for so many."""
    return min(max_query_len, LANES // group)


class Smem(NamedTuple):
    """The shared memory of one CTA."""

    rows: Any  # of queries [128, D], and then of results: 16-bit ones, or half of float32 ones
    k: Any  # [stages, T, D], as they come from the cache
    v: Any  # likewise
    k_numbers: Any  # [T, D], what a tile of quantised keys becomes; else None
    v_numbers: Any  # likewise


class Tmem(NamedTuple):
    """The tensor memory of one CTA."""

    logits: Any  # f32[128, T]
    weights: Any  # [128, T]
    sums: Any  # f32[128, D], the numerator


class Barriers(NamedTuple):
    """What says that copies have arrived, or that products are done."""

    q: Any
    k: Any  # of each stage
    v: Any  # likewise
    logits: Any
    sums: Any


def scratch_types(problem: BlackwellProblem, config: DecodeConfig) -> dict[str, Any]:
    """Returns the memory of one CTA, by the kernel's parameter names."""
    num_copies, _ = problem.copies(config.tile)
    tile = (config.tile, problem.head_dim)
    ring = (config.num_stages, *tile)
    if problem.is_quantised:
        stored: Any = plgpu.SMEM(ring, problem.cache_dtype)
        numbers: Any = swizzled(tile, problem.dtype, problem.number_swizzle)
    else:
        stored, numbers = swizzled(ring, problem.dtype, problem.number_swizzle), None
    stages = plgpu.Barrier(num_arrivals=num_copies, num_barriers=config.num_stages)
    done = plgpu.Barrier(orders_tensor_core=True)
    return {
        "smem": Smem(rows_scratch(problem), stored, stored, numbers, numbers),
        "tmem": Tmem(
            plgpu.TMEM((LANES, config.tile), jnp.float32),
            plgpu.TMEM((LANES, config.tile), problem.dtype, packed=True),
            plgpu.TMEM((LANES, problem.head_dim), jnp.float32),
        ),
        "barriers": Barriers(plgpu.Barrier(), stages, stages, done, done),
    }


def rows_scratch(problem: BlackwellProblem) -> Any:
    """Returns shared memory for rows, of queries or of results."""
    half = problem.head_dim // 2
    return plgpu.RefUnion(
        swizzled((LANES, problem.head_dim), problem.dtype, problem.number_swizzle),
        swizzled((LANES, half), jnp.float32),
    )


def shared_types(problem: BlackwellProblem, config: DecodeConfig) -> Any:
    """Returns what of it is shared memory."""
    scratch = scratch_types(problem, config)
    return scratch["smem"], scratch["barriers"]


def chosen_config(problem: BlackwellProblem) -> DecodeConfig:
    """Returns how the kernel cuts its work, by rule: CTAs that share an SM first, then stages."""
    columns = _TILE + _TILE // 2 + problem.head_dim  # of tensor memory, which is given out in
    together = _TENSOR_COLUMNS // (1 << (columns - 1).bit_length())  # powers of two
    for ctas_per_sm in range(min(together, 2), 0, -1):
        for num_stages in (4, 3, 2):
            config = DecodeConfig(_TILE, num_stages, ctas_per_sm)
            if fits(config, shared_types(problem, config), SM100):
                return config
    raise AssertionError(f"no configuration fits the shared memory for {problem}")
