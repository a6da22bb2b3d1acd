"""The online softmax of the sm_90a prefill kernel: what one warpgroup knows of its 64 rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.prefill_parts import WARPGROUP_ROWS, Problem
from pallas_paged.ops.attention.hopper.tiles import ROW_LAYOUT, TILE_LAYOUT, iota
from pallas_paged.ops.attention.online_softmax import LOG2E, LOWEST, across, capped, raised


class State(NamedTuple):
    """Like `online_softmax.State`, of one warpgroup's rows, the numerator in one piece."""

    maximum: jax.Array  # f32[64]
    denominator: jax.Array  # f32[64]
    numerator: jax.Array  # f32[64, D]


class Softened(NamedTuple):
    """What the logits of C more keys make of a state, but for the numerator."""

    maximum: jax.Array  # f32[64]
    denominator: jax.Array  # f32[64]
    correction: jax.Array  # f32[64], what the numerator so far is to be multiplied by
    weights: jax.Array  # f32[64, C], of the new keys


def empty(head_dim: int) -> State:
    """Returns the state before the first key."""
    return State(
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROW_LAYOUT),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW_LAYOUT),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, head_dim), jnp.float32), TILE_LAYOUT),
    )


def finish_logits(
    problem: Problem,
    logits: jax.Array,  # [64, C]
    distance: jax.Array,  # [64]
    slope: jax.Array | None,  # [64]
    is_full: bool,
) -> jax.Array:
    """Caps, slopes and masks logits; with a cap or slopes they come times `logits_factor`.

    `distance` is that from each row's query to the first of the C keys.
    """
    size = problem.tuning.tile_keys
    cap = problem.logits_soft_cap
    if cap is not None:
        logits = capped(logits, cap, few_registers=True)
    if slope is None and is_full:
        return logits
    # Exact as floats below 2^24 tokens, and half the registers of integers beside floats. A thread
    # has the same columns of every 8: added in this order nothing but those is known before the
    # loop over the steps, and kept in registers meanwhile.
    key = iota((WARPGROUP_ROWS, size), 1)
    within_8 = key & 7
    shape = logits.shape
    distances = within_8.astype(jnp.float32) + across(distance.astype(jnp.float32), shape)
    distances = distances + (key - within_8).astype(jnp.float32)
    if slope is not None:
        logits = logits + across(slope * LOG2E, shape) * distances
    if not is_full:
        visible = distances <= 0
        if problem.sliding_window is not None:
            visible &= distances > -problem.sliding_window
        logits = jnp.where(visible, logits, -jnp.inf)
    return logits


def soften(
    maximum: jax.Array, denominator: jax.Array, logits: jax.Array, factor: float | None
) -> Softened:
    """Returns what logits, [64, C], make of the keys so far.

    `factor` > 0 is what they are still to be multiplied by, in the multiply-add that subtracts the
    maximum: a product less for each. None: they are in base 2.
    """
    largest = logits.max(axis=1)
    if factor is None:
        maximum, correction = raised(maximum, largest)
        exponents = logits - across(maximum, logits.shape)
    else:
        maximum, correction = raised(maximum, largest * factor)
        exponents = logits * factor - across(maximum, logits.shape)
    weights = jnp.exp2(exponents)
    return Softened(maximum, denominator * correction + weights.sum(axis=1), correction, weights)
