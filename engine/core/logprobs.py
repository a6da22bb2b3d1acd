"""Packed log-probabilities on the host: how wide they are, who may ask for them, how to read them.

The device packs them, see `pallas_paged.engine.device.logprobs`: per row of i32[P, 3 + 2 W] the
token, its log-probability and rank, and the W most likely tokens with theirs; floats keep their
bits. Where W is the whole vocabulary the tokens come in the order of their ids.
"""

import numpy as np

from pallas_paged.engine.core.core_output import TokenLogprobs

MIN_WIDTH = 32
"""W is at least this, whatever requests may ask for: searches of up to 31 beams and one EOS."""


NUM_OWN = 3
"""Columns of packed log-probabilities in front of those of the most likely tokens."""


def width_for(max_logprobs: int, vocab_size: int) -> int:
    """Returns W of an engine whose requests may ask for `max_logprobs` (-1: all) tokens."""
    if max_logprobs == -1:
        return vocab_size
    return min(max(MIN_WIDTH, max_logprobs), vocab_size)


def packed_width(width: int) -> int:
    """Returns the columns of packed log-probabilities."""
    return NUM_OWN + 2 * width


def read(packed: np.ndarray, num_top: int) -> TokenLogprobs:
    """Returns packed rows, i32[n, 3 + 2 W], with their `num_top` (-1: all) most likely tokens."""
    own = _floats(packed[:, 1:2])[:, 0], packed[:, 2]
    if num_top == 0:  # of every token, and nothing is sorted
        nobody = len(packed), 0
        return TokenLogprobs(*own, np.zeros(nobody, np.int32), np.zeros(nobody, np.float32))
    width = (packed.shape[1] - NUM_OWN) // 2
    ids, values = packed[:, NUM_OWN : NUM_OWN + width], _floats(packed[:, NUM_OWN + width :])
    order = np.argsort(-values, axis=1, kind="stable")[:, : width if num_top == -1 else num_top]
    return TokenLogprobs(
        *own, np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    )


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)


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
