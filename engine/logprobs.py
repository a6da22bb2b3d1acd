"""Log-probabilities of the model's tokens, for `logprobs` and `prompt_logprobs`.

They are those of the model itself: the log-softmax of its logits before bias, masks, penalties
and temperature, and whatever filters the token was drawn through. What the device computes is
packed into one int32 array per step, so that one copy brings it to the host; floats keep their
bits.

Sizes: B rows, V vocabulary, W `width`, the most likely tokens that the device reports.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged.engine.sampling import first_tokens

MIN_WIDTH = 32
"""W is at least this, whatever requests may ask for: searches of up to 31 beams and one EOS."""


class TokenLogprobs(NamedTuple):
    """What the model thought of one place in a sequence.

    Attributes:
      logprob: of the token that stands there.
      rank: the token's place among all tokens, 1 for the most likely; of equals the lower id first.
      top_token_ids: the most likely tokens, in that order, as many as were asked for.
      top_logprobs: theirs.
    """

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


def width_for(max_logprobs: int, vocab_size: int) -> int:
    """Returns W of an engine whose requests may ask for `max_logprobs` (-1: all) tokens."""
    if max_logprobs == -1:
        return vocab_size
    return min(max(MIN_WIDTH, max_logprobs), vocab_size)


def packed_width(width: int) -> int:
    """Returns the columns of what `pack` returns."""
    return 3 + 2 * width


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
    if width == logits.shape[1]:
        values, first = logits, ids
    else:
        values, first = first_tokens(logits, width)
    columns = (
        tokens[:, None],
        _bits(chosen - total)[:, None],
        rank[:, None],
        first,
        _bits(values - total[:, None]),
    )
    return jnp.concatenate(columns, axis=1)


def read(packed: np.ndarray, num_top: int) -> TokenLogprobs:
    """Returns a row of what `pack` returned, with its `num_top` most likely tokens."""
    width = (len(packed) - 3) // 2
    ids, values = packed[3 : 3 + width], packed[3 + width :].view(np.float32)
    order = np.argsort(-values, kind="stable")[:num_top]
    return TokenLogprobs(
        float(packed[1:2].view(np.float32)[0]),
        int(packed[2]),
        ids[order].tolist(),
        values[order].tolist(),
    )


def check(field: str, asked: int | None, max_logprobs: int, vocab_size: int) -> None:
    """Refuses a request for more log-probabilities than the engine gives.

    Raises:
      ValueError: `asked` of the field is more than `max_logprobs` or the vocabulary.
    """
    if asked is None or max_logprobs == -1 >= asked:
        return
    if asked == -1 or (asked > max_logprobs and max_logprobs != -1):
        raise ValueError(
            f"{field}={asked} is more than the engine's max_logprobs={max_logprobs}; ask for at "
            "most that, or build the engine with a larger max_logprobs (-1: the whole vocabulary)"
        )
    if asked > vocab_size:
        raise ValueError(
            f"{field}={asked} is more than the vocabulary of {vocab_size} tokens; ask for at most "
            "that"
        )


def check_beams(beam_width: int, num_candidates: int, max_logprobs: int, vocab_size: int) -> None:
    """Refuses a beam search that needs more candidates per beam than the engine reports.

    Raises:
      ValueError: `num_candidates` are more than W or the vocabulary.
    """
    width = width_for(max_logprobs, vocab_size)
    num_ending = num_candidates - beam_width
    if num_candidates > vocab_size:
        raise ValueError(
            f"beam_width={beam_width} and {num_ending} ending tokens are more than the vocabulary "
            f"of {vocab_size} tokens; use fewer beams"
        )
    if num_candidates > width:
        raise ValueError(
            f"beam_width={beam_width} with {num_ending} ending tokens needs the {num_candidates} "
            f"most likely tokens of each beam, and the engine reports {width}; use fewer beams, or "
            f"build the engine with max_logprobs={num_candidates}"
        )


def _bits(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)
