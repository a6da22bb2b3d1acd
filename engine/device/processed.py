"""What tokens were drawn from, as logits: for `logprobs_mode="processed"`.

That is the model's logits after the request's rules, divided by its temperature, and without the
tokens that min-p, top-k and top-p leave out (see `sampling`). A greedy row's are those after the
rules alone: it has no temperature, and its filters have no effect.

Each filter keeps a prefix of the tokens in order, and so do all of them together. Where that ends,
sums of weights round in other ways than those that the token was drawn by (see `prefixes`): a token
that was drawn is always inside, and with it all that come before it.

Sizes: B rows, V vocabulary; inside, the vocabulary is padded and split into N tiles of L tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged.engine.device.logprobs import pack
from pallas_paged.engine.device.order import Place, behind_all, place_of, precede, tiles_of
from pallas_paged.engine.device.prefixes import end_of_top_k, end_of_top_p, shifted
from pallas_paged.engine.device.sampling import SMALLEST, SamplingInputs, limit_of_top_p


def find_logprobs(
    logits: jax.Array,
    ruled: jax.Array,
    tokens: jax.Array,
    inputs: SamplingInputs,
    width: int,
    *,
    mode: str,
    looks: bool,
    filters: bool,
) -> jax.Array:
    """Returns `logprobs.pack` of the tokens i32[B] in the distribution that a mode names.

    Args:
      logits: f32[B, V], the model's own.
      ruled: f32[B, V], after the rules.
      tokens: i32[B], see `logprobs.pack`.
      inputs: how they were drawn, see `sample`, as are `looks` and `filters`.
      width: W.
      mode: see `EngineConfig.logprobs_mode`.
      looks: whether what no row needs is skipped when the program runs.
      filters: whether any row may have a top-k or a top-p.
    """
    if mode == "processed":
        logits = processed(ruled, tokens, inputs, looks=looks, filters=filters)
    return pack(logits, tokens, width)


def processed(
    logits: jax.Array, tokens: jax.Array, inputs: SamplingInputs, *, looks: bool, filters: bool
) -> jax.Array:
    """Returns f32[B, V]: logits, up to a constant in each row, of what the token was drawn from.

    Tokens that were left out have -inf. Greedy rows are returned as they are, bit for bit.

    Args:
      logits: f32[B, V], after the rules.
      tokens: i32[B], which were drawn from these by `inputs`.
      inputs: see `SamplingInputs`.
      looks: see `find_logprobs`, as is the next one.
      filters: likewise.
    """
    vocab_size = logits.shape[1]
    drawn = inputs.temperature >= SMALLEST
    temperature = jnp.where(drawn, inputs.temperature, 1.0)
    top_k, top_p = jnp.where(drawn, inputs.top_k, 0), jnp.where(drawn, inputs.top_p, 1.0)
    min_p = jnp.where(drawn, inputs.min_p, 0.0)
    top = jnp.max(logits, axis=-1)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # no token is left: nothing is drawn
    tiles = tiles_of(logits)

    def scaled() -> jax.Array:
        return shifted(tiles, top) / temperature[:, None, None]

    def filtered() -> jax.Array:
        values = scaled()
        weights = jnp.exp(values)
        kept = weights >= min_p[:, None, None]
        if filters:
            kept &= precede(shifted(tiles, top), end_of_top_k(tiles, top, top_k, looks=looks))
            end = _end_of_top_p(tiles, top, jnp.where(kept, weights, 0.0), top_p, looks=looks)
            kept &= precede(shifted(tiles, top), end) | (top_p == 1.0)[:, None, None]
        token = jnp.minimum(tokens, vocab_size - 1)
        value = place_of(shifted(tiles, top), token).value
        kept |= precede(shifted(tiles, top), Place(value, token + 1))
        return jnp.where(kept | ~drawn[:, None, None], values, -jnp.inf)

    if looks:
        is_cut = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        values = lax.cond(jnp.any(is_cut), filtered, scaled)
    else:
        values = filtered()
    values = values.reshape(len(logits), -1)[:, :vocab_size]
    return jnp.where(drawn[:, None], values, logits)


def _end_of_top_p(
    tiles: jax.Array, top: jax.Array, weights: jax.Array, top_p: jax.Array, *, looks: bool
) -> Place:
    """Returns where each row's top-p ends; behind all tokens, or anywhere, where it has none."""

    def search() -> Place:
        return end_of_top_p(tiles, top, weights, limit_of_top_p(weights, top_p), looks=looks)

    if not looks:
        return search()
    everything = behind_all(len(top_p), tiles.shape[1] * tiles.shape[2])
    return lax.cond(jnp.any(top_p < 1.0), search, lambda: everything)
