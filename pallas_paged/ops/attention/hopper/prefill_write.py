"""How the sm_90a prefill kernel hands over its results: rows of a tile become rows of tokens."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_parts import (
    COMPUTE_WARPGROUPS,
    WARPGROUP_ROWS,
    Barriers,
    Problem,
    Smem,
    meet,
)
from pallas_paged.ops.attention.hopper.prefill_plan import token_unit
from pallas_paged.ops.attention.hopper.prefill_softmax import State
from pallas_paged.ops.attention.hopper.prefill_walk import Tile
from pallas_paged.ops.attention.online_softmax import LN2, across


def write(
    problem: Problem,
    tile: Tile,
    state: State,
    out: Any,
    lse: Any,
    smem: Smem,
    barriers: Barriers,
) -> None:
    """Writes the tokens that the tile has, and the lse of all its rows.

    At the end all of it has left shared memory, but may not have arrived yet.
    """
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    factor = 1.0 / jnp.where(state.denominator > 0, state.denominator, 1.0)
    smem.lse[rows] = state.maximum * LN2 + jnp.log(state.denominator)
    for begin, width in problem.staged_columns:
        part = state.numerator[:, begin : begin + width]
        part = part * across(factor, part.shape)
        smem.staging[rows] = part.astype(problem.dtype)
        plgpu.commit_smem()
        meet(barriers.pair)  # a head's rows may lie in both halves

        @pl.loop(warpgroup, problem.group, step=COMPUTE_WARPGROUPS)
        def _(head: Any, begin: int = begin, width: int = width) -> None:
            target = out.at[:, tile.kv_head * problem.group + head, pl.ds(begin, width)]
            _write_tokens(problem, tile, smem.staging, head, target)

        if begin == 0:

            @pl.when(warpgroup == 0)
            def _() -> None:
                plgpu.copy_smem_to_gmem(smem.lse, lse.at[tile.index, tile.kv_head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        meet(barriers.pair)  # each copies rows of both


def _write_tokens(problem: Problem, tile: Tile, staging: Any, head: Any, target: Any) -> None:
    """Copies a head's rows of the tokens that the tile has to `target`, [T, width].

    A copy has a fixed size: they leave in pieces of 64, 32, ... tokens, as their number is made up.
    Every piece begins at a multiple of 128 bytes of shared memory, which it has to.
    """
    unit = token_unit(problem.head_dim)

    def copy(token: Any, size: int) -> None:
        plgpu.copy_smem_to_gmem(
            staging.at[pl.ds(head * problem.tokens + token, size)],
            target.at[pl.ds(tile.first_token + token, size)],
        )

    done = jnp.int32(0)
    size = 1 << (problem.tokens.bit_length() - 1)
    while size >= unit:
        pl.when((tile.num_tokens & size) != 0)(functools.partial(copy, done, size))
        done += tile.num_tokens & size
        size //= 2
    for size in range(1, unit):
        pl.when(tile.num_tokens - done == size)(functools.partial(copy, done, size))
