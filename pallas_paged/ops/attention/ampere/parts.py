"""What the sm_80 attention kernels share: items of the work list, logits, the state, output."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.ampere.problem import AmpereProblem
from pallas_paged.ops.attention.online_softmax import (
    LN2,
    LOG2E,
    LOWEST,
    State,
    across,
    along,
    capped,
    finished,
    logits_factor,
    raised,
)
from pallas_paged.ops.attention.problem import StepProblem
from pallas_paged.ops.attention.work_list import SequenceField
from pallas_paged.ops.mosaic_gpu import store


class Item(NamedTuple):
    """A run on one KV head: a record of the work list, read."""

    run: jax.Array  # of the packed queries
    head: jax.Array
    row: jax.Array  # of the block table
    num_tiles: jax.Array
    first_tile: jax.Array
    length: jax.Array
    num_tokens: jax.Array


def read_item(problem: StepProblem, sequences: Any, item: jax.Array) -> Item:
    """Returns item number `item`."""
    heads = jnp.int32(problem.num_kv_heads)
    index = lax.div(item, heads)
    return Item(
        run=sequences[index, problem.query_field],
        head=lax.rem(item, heads),
        row=sequences[index, SequenceField.ROW],
        num_tiles=sequences[index, SequenceField.NUM_TILES],
        first_tile=sequences[index, SequenceField.FIRST_TILE],
        length=sequences[index, SequenceField.LENGTH],
        num_tokens=sequences[index, SequenceField.NUM_TOKENS],
    )


def finish_logits(
    problem: StepProblem,
    products: jax.Array,
    scales: jax.Array | None,
    last_key: jax.Array,
    slope: jax.Array | None,
) -> jax.Array:
    """Scales, caps, slopes and masks; returns the logits of a piece times log2(e).

    `scales` are of the keys. `last_key` is each row's own position, counted from the first key.
    """
    shape = products.shape
    cap = problem.logits_soft_cap
    factor: Any = logits_factor(problem.scale / problem.unit, cap)
    if scales is not None:
        factor = along(scales * factor, shape)
    logits = products * factor
    if cap is not None:
        logits = capped(logits, cap)
    # A vector first: the compiler keeps these numbers in registers.
    columns = problem.layout("ACC").reduce(0)
    keys = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=columns)
    distances = along(keys, shape) - across(last_key, shape)
    if slope is not None:
        logits += across(slope * LOG2E, shape) * distances.astype(jnp.float32)
    visible = distances <= 0
    if problem.sliding_window is not None:
        visible &= distances > -problem.sliding_window
    return jnp.where(visible, logits, -jnp.inf)


def update(state: State, logits: list[jax.Array]) -> tuple[State, list[jax.Array]]:
    """Returns the state rescaled to the new maximum, and the weights [M, T] of the new keys.

    Logits and weights are in pieces of some keys.
    """
    largest = functools.reduce(jnp.maximum, logits).max(axis=1)
    maximum, correction = raised(state.maximum, largest)
    weights = [jnp.exp2(some - across(maximum, some.shape)) for some in logits]
    total = functools.reduce(jnp.add, weights).sum(axis=1)
    numerator = tuple(some * across(correction, some.shape) for some in state.numerator)
    return State(numerator, maximum, state.denominator * correction + total), weights


def zeros(problem: AmpereProblem, width: int) -> jax.Array:
    """Returns sums [M, width] of no products."""
    sums = jnp.zeros((problem.rows, width), jnp.float32)
    return plgpu.layout_cast(sums, problem.layout("ACC"))


def empty(problem: AmpereProblem) -> State:
    """Returns the state before the first key."""
    maximum = jnp.full((problem.rows,), LOWEST, jnp.float32)
    denominator = jnp.zeros((problem.rows,), jnp.float32)
    return State(
        tuple(zeros(problem, chunk.size) for chunk in problem.chunks),
        plgpu.layout_cast(maximum, problem.row_layout),
        plgpu.layout_cast(denominator, problem.row_layout),
    )


def write(
    problem: AmpereProblem, state: State, sink: jax.Array | None, item: Item, out: Any, lse: Any
) -> None:
    """Writes an item's result to its rows of the packed output."""
    values, item_lse = finished(state, sink, across)
    for some, chunk in zip(values, problem.chunks, strict=True):
        store(out.at[item.run, item.head, :, chunk], some.astype(problem.dtype))
    store(lse.at[item.run, item.head], item_lse * LN2)
