"""What the sm_100a attention kernel and the merge of its parts share: the state, and output."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.blackwell.problem import LANES, ROW_LAYOUT, BlackwellProblem
from pallas_paged.ops.attention.online_softmax import LOWEST, State, finished


def empty() -> tuple[jax.Array, jax.Array]:
    """Returns maximum and denominator before the first key."""
    lowest = jnp.full((LANES,), LOWEST, jnp.float32)
    zeros = jnp.zeros((LANES,), jnp.float32)
    return plgpu.layout_cast(lowest, ROW_LAYOUT), plgpu.layout_cast(zeros, ROW_LAYOUT)


def finished_rows(
    maximum: jax.Array, denominator: jax.Array, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns what the sums are to be multiplied by, and lse to the base 2."""
    ones = plgpu.layout_cast(jnp.ones((LANES,), jnp.float32), ROW_LAYOUT)
    state = State((ones,), maximum, denominator)
    (factor,), lse = finished(state, sink, lambda factor, _: factor)
    return factor, lse


def copy_rows(problem: BlackwellProblem, staged: Any, destination: Any) -> None:
    """Copies the M first rows, and waits until they may be overwritten."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, problem.rows)], destination)
    plgpu.wait_smem_to_gmem(0)
