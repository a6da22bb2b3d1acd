"""What the core knows of a grammar that outputs have to follow: which tokens may come next."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

NUM_MASKS = 16
"""Rows of one edit of masks, see `StepPlan.mask_edits`."""


class Matcher(Protocol):
    """How far one sequence has come in its grammar."""

    @property
    def num_taken(self) -> int:
        """Output tokens that it was given."""

    @property
    def fault(self) -> str | None:
        """Why it cannot go on; None while it can. Never taken back."""

    @property
    def may_end(self) -> bool:
        """Whether the tokens that it was given are a whole output."""

    @property
    def is_over(self) -> bool:
        """Whether they are one behind which nothing may follow, or whose end was among them."""

    def take(self, token_ids: Sequence[int]) -> None:
        """Goes on by tokens; one that may not follow is a `fault`."""


class Grammar(Protocol):
    """What the outputs of a request have to follow."""

    def start(self) -> Matcher:
        """Returns a matcher that was given no token yet."""


type FindMasks = Callable[[Sequence[Matcher]], np.ndarray]
"""Returns which tokens may come next in each of K sequences: i32[K, `num_words`].

Token t is bit t % 32 of word t // 32; bits of tokens that the model does not have mean nothing.
Where a matcher has a fault, or gets it by this, all are 0.
"""


def num_words(vocab_size: int) -> int:
    """Returns how many int32 a mask of so many tokens has."""
    return -(-vocab_size // 32)
