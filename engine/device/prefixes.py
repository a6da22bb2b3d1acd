"""Where the prefixes end that top-k and top-p keep of the tokens in order.

In two ways, with the same result but for the rounding of sums of weights. A CPU looks at the rows:
it finds the end of top-k among 64 candidates, for a larger k by bisection over the bits of the
logits, and that of top-p, where it has to be known, likewise; and each only where a row asks for
it. A GPU would wait for the host to look: there a search of a fixed number of passes over the
vocabulary finds the end of either, whatever the rows ask for.

Sizes: B rows, V vocabulary; the vocabulary is padded and split into N tiles of L tokens.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_paged.engine.device.order import (
    Place,
    behind_all,
    nth,
    select,
    tiles_of,
)

NUM_CANDIDATES = 64
CANDIDATE_TILE = 32
_BITS = 31  # of a float that is not negative, which orders as they do
_BITS_PER_PASS = 4
_INFINITY, _MOST = 0x7F800000, 0x7FFFFFFF
_LEAST = float(np.finfo(np.float32).tiny)


def first_tokens(logits: Array, k: int) -> tuple[Array, Array]:
    """Returns values and ids [B, k] of the k first tokens of f32[B, V] in order, k at most V."""
    return _candidates(tiles_of(logits), k)


def shifted(tiles: Array, top: Array) -> Array:
    """Returns logits at most 0, in which 0 is never -0.

    Called at each use: where it is computed inside a branch, no other branch pays for storing it.
    """
    return tiles - top[:, None, None]


def end_of_top_k(tiles: Array, top: Array, top_k: Array, *, looks: bool) -> Place:
    """Returns the place in each row that exactly the first `top_k` tokens precede.

    Where `top_k` is 0, or not below the number of tokens, every token precedes it.

    Args:
      tiles: f32[B, N, L], logits.
      top: f32[B], the largest of each row.
      top_k: i32[B].
      looks: whether what no row needs is skipped when the program runs.
    """
    num_tokens = tiles.shape[1] * tiles.shape[2]
    everything = behind_all(len(top_k), num_tokens)
    limited = (top_k > 0) & (top_k < num_tokens)
    if not looks:
        k = jnp.where(limited, top_k, 1).astype(jnp.float32)  # exact below 2**24
        found = _end_by_search(tiles, top, jnp.ones_like(tiles), k)
        return select(limited, found, everything)
    large = limited & (top_k > NUM_CANDIDATES)

    def among_candidates() -> Place:
        values, tokens = _candidates(shifted(tiles, top), NUM_CANDIDATES)
        last = jnp.clip(top_k - 1, 0, NUM_CANDIDATES - 1)[:, None]
        value, token = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (values, tokens))
        return Place(value, token + 1)

    def by_bisection() -> Place:
        return _bisect_top_k(shifted(tiles, top), jnp.where(large, top_k, 1))

    small_end = lax.cond(jnp.any(limited & ~large), among_candidates, lambda: everything)
    large_end = lax.cond(jnp.any(large), by_bisection, lambda: everything)
    return select(large, large_end, select(limited, small_end, everything))


def end_of_top_p(tiles: Array, top: Array, weights: Array, limit: Array, *, looks: bool) -> Place:
    """Returns the place that the tokens precede before which there is less weight than the limit.

    Args:
      tiles: f32[B, N, L], logits.
      top: f32[B], the largest of each row.
      weights: f32[B, N, L], at least 0, equal where logits are; or 0 from some place on.
      limit: f32[B], above 0.
      looks: whether the program has loops: then many cheap passes find it instead of a few.
    """
    find = _end_by_bisection if looks else _end_by_search
    return find(tiles, top, weights, limit)


def _end_by_search(tiles: Array, top: Array, amounts: Array, limit: Array) -> Place:
    """Returns the place that the tokens precede before which amounts add up to less than `limit`.

    The value of the last of them is found four bits at a time: a pass adds up how much lies before
    each of 16 values. Of the tokens with that value it takes the first ones.
    """
    # Distances from the top: their bits order as they do.
    keys = lax.bitcast_convert_type(top[:, None, None] - tiles, jnp.int32)
    found = jnp.zeros(len(limit), jnp.int32)
    before = jnp.zeros(len(limit), jnp.float32)
    for shift in reversed(range(0, _BITS, _BITS_PER_PASS)):
        digits = np.arange(1 << _BITS_PER_PASS, dtype=np.int64) << shift
        tries = found[:, None] + jnp.asarray(np.minimum(digits, _MOST), jnp.int32)[None]  # [B, 16]
        is_before = keys[..., None] < tries[:, None, None]
        sums = jnp.sum(jnp.where(is_before, amounts[..., None], 0.0), axis=(1, 2))
        # The first value is that of the pass before, and has less before it than the limit.
        num_less = jnp.sum(sums[:, 1:] < limit[:, None], axis=1, keepdims=True, dtype=jnp.int32)
        found, before = (
            jnp.take_along_axis(array, num_less, axis=1)[:, 0] for array in (tries, sums)
        )
    return _end_among_tied(keys, amounts, limit, found, before)


def _end_by_bisection(tiles: Array, top: Array, amounts: Array, limit: Array) -> Place:
    """Returns what `_end_by_search` does, a bit at a time: a CPU adds up each try by itself."""
    keys = lax.bitcast_convert_type(top[:, None, None] - tiles, jnp.int32)

    def halve(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, found, before = state
        middle = found + bit
        sums = jnp.sum(jnp.where(keys < middle[:, None, None], amounts, 0.0), axis=(1, 2))
        is_less = sums < limit
        found, before = jnp.where(is_less, middle, found), jnp.where(is_less, sums, before)
        return bit >> 1, found, before

    state = jnp.int32(1 << (_BITS - 1)), jnp.zeros(len(limit), jnp.int32), jnp.zeros_like(limit)
    _, found, before = lax.fori_loop(0, _BITS, halve, state)
    return _end_among_tied(keys, amounts, limit, found, before)


def _end_among_tied(
    keys: Array, amounts: Array, limit: Array, found: Array, before: Array
) -> Place:
    """Returns the end among the tokens with the key `found`, before which lies `before`."""
    found = jnp.minimum(found, _INFINITY)  # where rounding has passed all tokens
    is_tied = keys == found[:, None, None]
    each = jnp.max(jnp.where(is_tied, amounts, 0.0), axis=(1, 2))
    num_tied = jnp.sum(is_tied, axis=(1, 2), dtype=jnp.int32)
    num_taken = jnp.ceil((limit - before) / jnp.maximum(each, _LEAST))
    num_taken = jnp.clip(jnp.minimum(num_taken, num_tied.astype(jnp.float32)), 1).astype(jnp.int32)
    token = nth(is_tied.astype(jnp.int32), num_taken - 1) + 1
    return Place(-lax.bitcast_convert_type(found, jnp.float32), token)


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


def _bisect_top_k(tiles: Array, top_k: Array) -> Place:
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

    infinity = jnp.full_like(top_k, _INFINITY)
    _, bits = lax.fori_loop(0, 31, halve, (jnp.full_like(top_k, -1), infinity))
    value = value_at(bits)
    num_tied = top_k - count(tiles > value[:, None, None])
    tied = (tiles == value[:, None, None]).astype(jnp.int32)
    return Place(value, nth(tied, num_tied - 1) + 1)
