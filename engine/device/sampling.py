"""Chooses each row's next token on the device: greedy, temperature, top-k, top-p, min-p.

The filters are defined on the tokens ordered from the most to the least likely, equally likely
ones by id, and each of them keeps a prefix of that order:

- temperature divides the logits first;
- min-p keeps the tokens at least `min_p` times as likely as the most likely one;
- top-k keeps the first k tokens, never more, whatever ties there are;
- top-p keeps, of what the other two left and renormalised, the smallest prefix whose mass reaches
  `top_p`: a token stays if and only if the mass before it is below `top_p`.

Top-p needs no threshold on a CPU. A token is drawn as if there were no top-p; if the mass before it
shows that it lies outside the prefix, the next draw is among the tokens before it, until one is
inside. What is refused never belongs to the prefix, so every token inside keeps its share of the
chance, and each round costs one pass over the vocabulary (rejection with a shrinking pivot, see
https://flashinfer.ai/2025/03/10/sampling.html). On a GPU the host would have to look after each
round, and wait for all that the device has to do before it: there the prefix's end is searched, in
as many passes for any row, and one draw is enough. Both are exact, but with top-p they do not draw
the same token of a seed. See `pallas_paged.engine.device.prefixes`.

The random numbers of a row are a function of (request seed, sample index, position of the new
token) and nothing else: neither its neighbours, nor its row, nor the bucket, nor a preemption
changes them.

Sizes: B rows, V vocabulary; inside, the vocabulary is padded and split into N tiles of L tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int32, UInt32

from pallas_paged.engine.device.order import (
    TILE,
    Place,
    behind_all,
    first_above,
    first_true,
    place_of,
    precede,
    select,
    take_tile,
    tiles_of,
)
from pallas_paged.engine.device.prefixes import end_of_top_k, end_of_top_p, shifted

SMALLEST = float(np.finfo(np.float32).tiny)  # of the floats that no device flushes to zero


class SamplingInputs(NamedTuple):
    """How the next token of each row is chosen.

    Attributes:
      temperature: f32[B], >= 0; 0 is greedy, and the other fields then have no effect.
      top_k: i32[B], >= 0; 0 is off.
      top_p: f32[B], in (0, 1]; 1 is off.
      min_p: f32[B], in [0, 1]; 0 is off.
      seeds: u32[B, 2], the request's seed; see `step_inputs.seed_words`.
      sample_index: i32[B], which of the request's completions the row is.
      positions: i32[B], position in the sequence of the token to choose.
    """

    temperature: Float[Array, "B"]
    top_k: Int32[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seeds: UInt32[Array, "B 2"]
    sample_index: Int32[Array, "B"]
    positions: Int32[Array, "B"]


Draw = Callable[[jax.Array, SamplingInputs], jax.Array]
"""Returns the next tokens i32[B] from logits f32[B, V], see `sample`."""


def sample(
    logits: Float[Array, "B V"],
    inputs: SamplingInputs,
    *,
    looks: bool = True,
    filters: bool = True,
) -> Int32[Array, "B"]:
    """Returns the next token of each row.

    Greedy rows get the token of the largest logit, of equal ones the lowest id.

    Args:
      logits: f32, finite or -inf (never chosen), at least one finite in each row. A greedy row,
        such as one that is padding, may hold anything.
      inputs: see `SamplingInputs`.
      looks: whether the program looks at the inputs as it runs, and skips what no row needs: the
        draws, top-k, the search for a large k, top-p. If not, it has no branches and no loops, and
        a GPU never waits for the host.
      filters: False is the caller's word that no row has a top-k or a top-p, so that neither is
        computed.
    """
    tiles = tiles_of(logits)
    tile_top = jnp.max(tiles, axis=-1)
    top = jnp.max(tile_top, axis=-1)
    tile = first_true(tile_top == top[:, None])
    greedy = tile * TILE + first_true(take_tile(tiles, tile) == top[:, None])
    # A temperature that the device may flush to zero is zero.
    drawn = inputs.temperature >= SMALLEST

    def draw(inputs: SamplingInputs) -> Array:
        tokens = _draw(tiles, top, drawn, inputs, looks=looks, filters=filters)
        return jnp.where(drawn, tokens, greedy)

    if looks:
        words = _words(inputs)
        tokens = lax.cond(jnp.any(drawn), lambda: draw(_from_words(words, inputs)), lambda: greedy)
    else:
        tokens = draw(inputs)
    return jnp.minimum(tokens, logits.shape[1] - 1)  # a row of NaN may end up in the padding


def cannot_sample(logits: jax.Array) -> jax.Array:
    """Returns which rows of logits [B, V] have a NaN, an infinity, or nothing but -infinities."""
    # Not by the maximum of the logits: on a CPU it may leave out a NaN.
    grades = jnp.where(logits == -jnp.inf, 0, jnp.where(logits < jnp.inf, jnp.int32(1), 2))
    return jnp.max(grades, axis=-1) != 1


def _words(inputs: SamplingInputs) -> Int32[Array, "W B"]:
    """Returns the inputs as one array, the fields' rows below each other.

    A branch takes its operands from memory: each of the inputs would be a launch to put it there.
    """
    rows = [jnp.atleast_2d(field.T) for field in inputs]
    words = jnp.concatenate([lax.bitcast_convert_type(row, jnp.int32) for row in rows])
    return lax.optimization_barrier(words)


def _from_words(words: Int32[Array, "W B"], like: SamplingInputs) -> SamplingInputs:
    """Returns the inputs that `_words` put into one array; of `like` shapes and dtypes are read."""
    fields, first = [], 0
    for field in like:
        rows = lax.slice_in_dim(words, first, first + field[..., None].shape[1])
        rows = lax.bitcast_convert_type(rows, field.dtype)
        fields.append(rows[0] if field.ndim == 1 else rows.T)
        first += len(rows)
    return SamplingInputs(*fields)


def _draw(
    tiles: Array,
    top: Array,
    drawn: Array,
    inputs: SamplingInputs,
    *,
    looks: bool,
    filters: bool,
) -> Array:
    """Returns a token for each row in `drawn`, from logits [B, N, L] whose maximum is `top` [B]."""
    top_k, top_p = jnp.where(drawn, inputs.top_k, 0), jnp.where(drawn, inputs.top_p, 1.0)
    end = end_of_top_k(tiles, top, top_k, looks=looks) if filters else None
    temperature = jnp.where(drawn, inputs.temperature, 1.0)
    weights = jnp.exp(shifted(tiles, top) / temperature[:, None, None])
    kept = weights >= inputs.min_p[:, None, None]
    if end is not None:
        kept &= precede(shifted(tiles, top), end)
    weights = jnp.where(kept, weights, 0.0)
    keys = _keys(inputs)
    if filters and looks:
        return _draw_until_inside(weights, top_p, keys)
    if filters:
        limit = limit_of_top_p(weights, top_p)
        end = end_of_top_p(tiles, top, weights, limit, looks=looks)
        inside = precede(shifted(tiles, top), end) | (top_p == 1.0)[:, None, None]
        weights = jnp.where(inside, weights, 0.0)
    return _draw_token(weights, jnp.sum(weights, axis=-1), keys, 0)


def limit_of_top_p(weights: Array, top_p: Array) -> Array:
    """Returns f32[B]: top-p keeps a token if the weight before it is less than that."""
    return jnp.maximum(top_p * jnp.sum(weights, axis=(1, 2)), SMALLEST)


def _draw_until_inside(weights: Array, top_p: Array, keys: tuple[Array, Array]) -> Array:
    """Returns a token of each row's top-p prefix, drawn in proportion to `weights` [B, N, L]."""
    limit = limit_of_top_p(weights, top_p)

    def draw(state: tuple[Array, Place, Array]) -> tuple[Array, Place, Array]:
        num_draws, end, open_rows = state
        before = jnp.where(precede(weights, end), weights, 0.0)
        sums = jnp.sum(before, axis=-1)
        # The first draw is among all tokens, a later one among those before a token that lies
        # outside. NaN compares false and ends the search: no row can hang the others.
        outside = (num_draws == 0) | (jnp.sum(sums, axis=-1) >= limit)
        open_rows = open_rows & outside
        token = _draw_token(before, sums, keys, num_draws)
        end = select(open_rows, place_of(weights, token), end)
        return num_draws + 1, end, open_rows & (top_p < 1.0)

    everything = behind_all(len(weights), weights.shape[1] * weights.shape[2])
    state = (jnp.int32(0), everything, jnp.full(len(weights), True))
    return lax.while_loop(lambda state: jnp.any(state[2]), draw, state)[1].token


def _draw_token(
    weights: Array, sums: Array, keys: tuple[Array, Array], num_draws: Array | int
) -> Array:
    """Returns a token per row by inverting the running sum, over the tiles and then inside one.

    Two uniforms, so that neither the number of tiles nor a small tile coarsens the other's steps.
    """

    first, second = _uniforms(keys, num_draws)
    tile = first_above(sums, first * jnp.sum(sums, axis=-1))
    lanes = take_tile(weights, tile)
    lane = first_above(lanes, second * jnp.sum(lanes, axis=-1))
    return tile * TILE + lane


def _keys(inputs: SamplingInputs) -> tuple[Array, Array]:
    """Returns two key words per row: a function of seed, sample index and position only."""
    seeds = inputs.seeds[:, 0], inputs.seeds[:, 1]
    return _threefry(*seeds, inputs.sample_index, inputs.positions)


def _uniforms(keys: tuple[Array, Array], num_draws: Array | int) -> tuple[Array, Array]:
    """Returns two numbers in [0, 1) per row, multiples of 2**-24, for its draw `num_draws`."""
    counter = jnp.full(keys[0].shape, num_draws, jnp.int32)
    words = _threefry(*keys, counter, jnp.zeros_like(counter))
    first, second = ((word >> 8).astype(jnp.float32) * 2.0**-24 for word in words)
    return first, second


def _threefry(key0: Array, key1: Array, count0: Array, count1: Array) -> tuple[Array, Array]:
    """Returns two u32[B]: Threefry-2x32 (Salmon et al., 2011), a key and a counter per row.

    One block per row where `jax.random` under `vmap` takes several: every block adds to the time
    that each step takes to compile.
    """
    counts = count0.astype(jnp.uint32), count1.astype(jnp.uint32)
    return threefry2x32_p.bind(key0, key1, *counts)
