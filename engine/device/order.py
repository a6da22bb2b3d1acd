"""The tokens of a vocabulary in the order in which sampling sees them, and how rows are searched.

From the most to the least likely one, equally likely ones by id. Every filter of
`pallas_paged.engine.device.sampling` keeps a prefix of that order, which a `Place` ends.

Sizes: B rows, V vocabulary; the vocabulary is padded and split into N tiles of L tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

TILE = 128


class Place(NamedTuple):
    """A place in the order of the tokens: just before `token`, whose value is `value`."""

    value: Array  # f32[B]
    token: Array  # i32[B]


def behind_all(num_rows: int, num_tokens: int) -> Place:
    """Returns the place that all tokens precede."""
    return Place(
        jnp.full(num_rows, -jnp.inf, jnp.float32), jnp.full(num_rows, num_tokens, jnp.int32)
    )


def tiles_of(values: Array) -> Array:
    """Returns [B, V] as [B, N, L], padded with -inf."""
    padding = -values.shape[1] % TILE
    values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return values.reshape(values.shape[0], -1, TILE)


def take_tile(values: Array, tile: Array) -> Array:
    """Returns [B, L] of [B, N, L], of each row one tile."""
    return jnp.take_along_axis(values, tile[:, None, None], axis=1)[:, 0]


def place_of(values: Array, token: Array) -> Place:
    """Returns the place just before each row's token."""
    lanes = take_tile(values, token // TILE)
    return Place(jnp.take_along_axis(lanes, token[:, None] % TILE, axis=1)[:, 0], token)


def precede(values: Array, place: Place) -> Array:
    """Returns which tokens [B, N, L] come before a place: larger values first, then lower ids."""
    value, token = (x[:, None, None] for x in place)
    ids = lax.broadcasted_iota(jnp.int32, (1, *values.shape[1:]), 1) * TILE
    ids += lax.broadcasted_iota(jnp.int32, (1, *values.shape[1:]), 2)
    return (values > value) | ((values == value) & (ids < token))


def first_above(weights: Array, target: Array) -> Array:
    """Returns the first index in each row [B, n] at which the running sum exceeds the target.

    Never the index of a zero while there is a positive weight, whatever the rounding: the running
    sum is not computed from left to right, so that it may move where nothing is added.
    """
    n = weights.shape[1]
    index = index_like(weights)
    above = jnp.cumsum(weights, axis=-1, dtype=weights.dtype) > target[:, None]
    # Where rounding leaves no positive weight above the target, the last positive one is nearest.
    rank = jnp.where(above, index, 2 * n - index)
    rank = jnp.min(jnp.where(weights > 0, rank, 2 * n), axis=-1)
    return jnp.where(rank < n, rank, 2 * n - rank)


def first_true(mask: Array) -> Array:
    """Returns the first true index in each row [B, n], the last index where there is none."""
    return jnp.min(jnp.where(mask, index_like(mask), mask.shape[1] - 1), axis=-1)


def index_like(values: Array) -> Array:
    """Returns i32[B, n], the index of each number in its row [B, n]."""
    return lax.broadcasted_iota(jnp.int32, values.shape, 1)


def select(mask: Array, on_true: Place, on_false: Place) -> Place:
    """Returns for each row one of two places."""
    return Place(*(jnp.where(mask, a, b) for a, b in zip(on_true, on_false, strict=True)))


def nth(ones: Array, n: Array) -> Array:
    """Returns the token of the n-th (from 0) one in each row of zeros and ones [B, N, L]."""
    sums = jnp.sum(ones, axis=-1, dtype=jnp.int32)
    tile = first_above(sums, n)
    before = jnp.where(index_like(sums) < tile[:, None], sums, 0)
    num_before = jnp.sum(before, axis=-1, dtype=jnp.int32)
    return tile * TILE + first_above(take_tile(ones, tile), n - num_before)
