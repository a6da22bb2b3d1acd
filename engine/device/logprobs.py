"""Log-probabilities of the model's tokens, for `logprobs` and `prompt_logprobs`.

They are those of the model itself: the log-softmax of its logits before bias, masks, penalties
and temperature, and whatever filters the token was drawn through; or, if the engine was told so,
of the logits after all of these (`processed`). What the device computes is
packed into one int32 array per step, so that one copy brings it to the host; floats keep their
bits. Where all rows want the tokens' own alone, W is 0, and nothing is searched.

Sizes: B rows, V vocabulary, W `width`, the most likely tokens that the device reports.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged.engine.device.prefixes import first_tokens


def pack(logits: jax.Array, tokens: jax.Array, width: int) -> jax.Array:
    """Returns i32[B, 3 + 2 W]: per row the token, its log-probability and rank, the W first tokens.

    Where W is V the tokens come in the order of their ids, so that nothing is sorted here.

    Args:
      logits: f32[B, V].
      tokens: i32[B], reported as they are; one that is no token has no meaningful figures.
      width: W.
    """
    top = jnp.max(logits, axis=-1)
    total = jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)) + top
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    chosen = jnp.max(jnp.where(ids == tokens[:, None], logits, -jnp.inf), axis=-1)
    ahead = (logits > chosen[:, None]) | ((logits == chosen[:, None]) & (ids < tokens[:, None]))
    rank = 1 + jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    own = tokens[:, None], _bits(chosen - total)[:, None], rank[:, None]
    if width == 0:
        return jnp.concatenate(own, axis=1)
    if width == logits.shape[1]:
        values, first = logits, ids
    else:
        values, first = first_tokens(logits, width)
    return jnp.concatenate((*own, first, _bits(values - total[:, None])), axis=1)


def _bits(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)
