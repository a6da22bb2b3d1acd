"""Chooses each row's next token on the device: greedy, temperature, top-k, top-p, min-p.

The filters are defined on the tokens ordered from the most to the least likely, equally likely
ones by id, and each of them keeps a prefix of that order:

- temperature divides the logits first;
- min-p keeps the tokens at least `min_p` times as likely as the most likely one;
- top-k keeps the first k tokens, never more, whatever ties there are;
- top-p keeps, of what the other two left and renormalised, the smallest prefix whose mass reaches
  `top_p`: a token stays if and only if the mass before it is below `top_p`.

Top-p needs no threshold. A token is drawn as if there were no top-p; if the mass before it shows
that it lies outside the prefix, the next draw is among the tokens before it, until one is inside.
What is refused never belongs to the prefix, so every token inside keeps its share of the chance,
and each round costs one pass over the vocabulary (rejection with a shrinking pivot, see
https://flashinfer.ai/2025/03/10/sampling.html). Top-k finds its end among 64 candidates, or, for a
larger k, by bisection over the bits of the logits; both are exact.

The random numbers of a row are a function of (request seed, sample index, position of the new
token) and nothing else: neither its neighbours, nor its row, nor the bucket, nor a preemption
changes them.

Sizes: B rows, V vocabulary; inside, the vocabulary is padded and split into N tiles of L tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int32, UInt32

TILE = 128
NUM_CANDIDATES = 64
CANDIDATE_TILE = 32
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


def sample(logits: Float[Array, "B V"], inputs: SamplingInputs) -> Int32[Array, "B"]:
    """Returns the next token of each row.

    Greedy rows get the token of the largest logit, of equal ones the lowest id. What no row needs
    is skipped when the program runs: the draws, top-k, the search for a large k, top-p.

    Args:
      logits: f32, finite or -inf (never chosen), at least one finite in each row. A greedy row,
        such as one that is padding, may hold anything.
      inputs: see `SamplingInputs`.
    """
    tiles = _tiles(logits)
    tile_top = jnp.max(tiles, axis=-1)
    top = jnp.max(tile_top, axis=-1)
    tile = _first(tile_top == top[:, None])
    greedy = tile * TILE + _first(_take_tile(tiles, tile) == top[:, None])
    # A temperature that the device may flush to zero is zero.
    drawn = inputs.temperature >= SMALLEST
    words = _words(inputs)
    tokens = lax.cond(
        jnp.any(drawn),
        lambda: jnp.where(
            drawn, _draw_filtered(tiles, top, drawn, _from_words(words, inputs)), greedy
        ),
        lambda: greedy,
    )
    return jnp.minimum(tokens, logits.shape[1] - 1)  # a row of NaN may end up in the padding


def first_tokens(logits: Float[Array, "B V"], k: int) -> tuple[Array, Array]:
    """Returns values and ids [B, k] of the k first tokens in order, k at most V."""
    return _candidates(_tiles(logits), k)


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


class _Place(NamedTuple):
    """A place in the order of the tokens: just before `token`, whose value is `value`."""

    value: Array  # f32[B]
    token: Array  # i32[B]


def _draw_filtered(tiles: Array, top: Array, drawn: Array, inputs: SamplingInputs) -> Array:
    """Returns a token for each row in `drawn`, from logits [B, N, L] whose maximum is `top` [B]."""
    end = _end_of_top_k(tiles, top, jnp.where(drawn, inputs.top_k, 0))
    temperature = jnp.where(drawn, inputs.temperature, 1.0)
    weights = jnp.exp(_shifted(tiles, top) / temperature[:, None, None])
    kept = _precede(_shifted(tiles, top), end) & (weights >= inputs.min_p[:, None, None])
    weights = jnp.where(kept, weights, 0.0)
    return _draw_top_p(weights, jnp.where(drawn, inputs.top_p, 1.0), _keys(inputs))


def _shifted(tiles: Array, top: Array) -> Array:
    """Returns logits at most 0, in which 0 is never -0.

    Called at each use: where it is computed inside a branch, no other branch pays for storing it.
    """
    return tiles - top[:, None, None]


# ---- top-p -------------------------------------------------------------------------------------


def _draw_top_p(weights: Array, top_p: Array, keys: tuple[Array, Array]) -> Array:
    """Returns a token of each row's top-p prefix, drawn in proportion to `weights` [B, N, L]."""
    B, num_tokens = weights.shape[0], weights.shape[1] * weights.shape[2]
    limit = jnp.maximum(top_p * jnp.sum(weights, axis=(1, 2)), SMALLEST)

    def draw(state: tuple[Array, _Place, Array]) -> tuple[Array, _Place, Array]:
        num_draws, end, open_rows = state
        before = jnp.where(_precede(weights, end), weights, 0.0)
        sums = jnp.sum(before, axis=-1)
        # The first draw is among all tokens, a later one among those before a token that lies
        # outside. NaN compares false and ends the search: no row can hang the others.
        outside = (num_draws == 0) | (jnp.sum(sums, axis=-1) >= limit)
        open_rows = open_rows & outside
        token = _draw_token(before, sums, keys, num_draws)
        end = _select(open_rows, _place_of(weights, token), end)
        return num_draws + 1, end, open_rows & (top_p < 1.0)

    everything = _Place(jnp.full(B, -jnp.inf, jnp.float32), jnp.full(B, num_tokens, jnp.int32))
    state = (jnp.int32(0), everything, jnp.full(B, True))
    return lax.while_loop(lambda state: jnp.any(state[2]), draw, state)[1].token


def _draw_token(
    weights: Array, sums: Array, keys: tuple[Array, Array], num_draws: Array | int
) -> Array:
    """Returns a token per row by inverting the running sum, over the tiles and then inside one.

    Two uniforms, so that neither the number of tiles nor a small tile coarsens the other's steps.
    """

    first, second = _uniforms(keys, num_draws)
    tile = _first_above(sums, first * jnp.sum(sums, axis=-1))
    lanes = _take_tile(weights, tile)
    lane = _first_above(lanes, second * jnp.sum(lanes, axis=-1))
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


# ---- top-k -------------------------------------------------------------------------------------


def _end_of_top_k(tiles: Array, top: Array, top_k: Array) -> _Place:
    """Returns the place in each row that exactly the `top_k` [B] first tokens precede.

    Where `top_k` is 0, or not below the number of tokens, every token precedes it.
    """
    num_tokens = tiles.shape[1] * tiles.shape[2]
    everything = _Place(
        jnp.full(top_k.shape, -jnp.inf, jnp.float32), jnp.full(top_k.shape, num_tokens, jnp.int32)
    )
    limited = (top_k > 0) & (top_k < num_tokens)
    large = limited & (top_k > NUM_CANDIDATES)

    def among_candidates() -> _Place:
        values, tokens = _candidates(_shifted(tiles, top), NUM_CANDIDATES)
        last = jnp.clip(top_k - 1, 0, NUM_CANDIDATES - 1)[:, None]
        value, token = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (values, tokens))
        return _Place(value, token + 1)

    def by_bisection() -> _Place:
        return _bisect_top_k(_shifted(tiles, top), jnp.where(large, top_k, 1))

    small_end = lax.cond(jnp.any(limited & ~large), among_candidates, lambda: everything)
    large_end = lax.cond(jnp.any(large), by_bisection, lambda: everything)
    return _select(large, large_end, _select(limited, small_end, everything))


def _candidates(tiles: Array, k: int) -> tuple[Array, Array]:
    """Returns values and ids [B, k] of the k first tokens in order, without sorting all of them.

    They lie in the k short tiles that come first by (largest value, id): any other short tile has
    k tokens before its first one. Both steps of `lax.top_k` put the lower index first.
    """
    values = tiles.reshape(tiles.shape[0], -1, CANDIDATE_TILE)
    if values.shape[1] <= k:
        return lax.top_k(values.reshape(values.shape[0], -1), k)
    _, chosen = lax.top_k(jnp.max(values, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # back to the order of ids, which decides between ties
    values = jnp.take_along_axis(values, chosen[:, :, None], axis=1)
    values, index = lax.top_k(values.reshape(values.shape[0], -1), k)
    tile = jnp.take_along_axis(chosen, index // CANDIDATE_TILE, axis=1)
    return values, tile * CANDIDATE_TILE + index % CANDIDATE_TILE


def _bisect_top_k(tiles: Array, top_k: Array) -> _Place:
    """Returns `_end_of_top_k` for any `top_k` of at least 1, by bisection over float32 bits.

    The values are at most 0, and the bits of a non-negative float order like the float: the k-th
    largest value is minus the smallest float that k values' distances from 0 do not exceed.
    """

    def value_at(bits: Array) -> Array:
        return -lax.bitcast_convert_type(bits, jnp.float32)

    def count(mask: Array) -> Array:
        # Floats are what XLA adds up fast on a CPU; they are exact below 2**24.
        return jnp.sum(mask.astype(jnp.float32), axis=(1, 2)).astype(jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # fewer than k values at low, at least k at high
        middle = low + (high - low) // 2
        enough = count(tiles >= value_at(middle)[:, None, None]) >= top_k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    infinity = jnp.full_like(top_k, 0x7F800000)
    _, bits = lax.fori_loop(0, 31, halve, (jnp.full_like(top_k, -1), infinity))
    value = value_at(bits)
    num_tied = top_k - count(tiles > value[:, None, None])
    tied = (tiles == value[:, None, None]).astype(jnp.int32)
    return _Place(value, _nth(tied, num_tied - 1) + 1)


def _nth(ones: Array, n: Array) -> Array:
    """Returns the token of the n-th (from 0) one in each row of zeros and ones [B, N, L]."""
    sums = jnp.sum(ones, axis=-1, dtype=jnp.int32)
    tile = _first_above(sums, n)
    before = jnp.where(_index_like(sums) < tile[:, None], sums, 0)
    num_before = jnp.sum(before, axis=-1, dtype=jnp.int32)
    return tile * TILE + _first_above(_take_tile(ones, tile), n - num_before)


# ---- rows of values ----------------------------------------------------------------------------


def _tiles(values: Array) -> Array:
    """Returns [B, V] as [B, N, L], padded with -inf."""
    padding = -values.shape[1] % TILE
    values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return values.reshape(values.shape[0], -1, TILE)


def _take_tile(values: Array, tile: Array) -> Array:
    return jnp.take_along_axis(values, tile[:, None, None], axis=1)[:, 0]


def _place_of(values: Array, token: Array) -> _Place:
    lanes = _take_tile(values, token // TILE)
    return _Place(jnp.take_along_axis(lanes, token[:, None] % TILE, axis=1)[:, 0], token)


def _precede(values: Array, place: _Place) -> Array:
    """Returns which tokens [B, N, L] come before a place: larger values first, then lower ids."""
    value, token = (x[:, None, None] for x in place)
    ids = lax.broadcasted_iota(jnp.int32, (1, *values.shape[1:]), 1) * TILE
    ids += lax.broadcasted_iota(jnp.int32, (1, *values.shape[1:]), 2)
    return (values > value) | ((values == value) & (ids < token))


def _first_above(weights: Array, target: Array) -> Array:
    """Returns the first index in each row [B, n] at which the running sum exceeds the target.

    Never the index of a zero while there is a positive weight, whatever the rounding: the running
    sum is not computed from left to right, so that it may move where nothing is added.
    """
    n = weights.shape[1]
    index = _index_like(weights)
    above = jnp.cumsum(weights, axis=-1, dtype=weights.dtype) > target[:, None]
    # Where rounding leaves no positive weight above the target, the last positive one is nearest.
    rank = jnp.where(above, index, 2 * n - index)
    rank = jnp.min(jnp.where(weights > 0, rank, 2 * n), axis=-1)
    return jnp.where(rank < n, rank, 2 * n - rank)


def _first(mask: Array) -> Array:
    """Returns the first true index in each row [B, n], the last index where there is none."""
    return jnp.min(jnp.where(mask, _index_like(mask), mask.shape[1] - 1), axis=-1)


def _index_like(values: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, values.shape, 1)


def _select(mask: Array, on_true: _Place, on_false: _Place) -> _Place:
    return _Place(*(jnp.where(mask, a, b) for a, b in zip(on_true, on_false, strict=True)))
