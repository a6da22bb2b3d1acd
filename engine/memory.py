"""The scheduler's view of KV memory, and its implementation over the block tables."""

import collections.abc
from typing import Protocol


class Memory(Protocol):
    """Blocks of KV memory, owned by rows.

    A row is a sequence's place in the block tables, from its admission until it is freed. The
    scheduler calls each verb at most once per attempt to schedule, never once per sequence.
    Forking a row (and with it copy-on-write pairs as a result of `append`), sharing a cached
    prefix and swapping are verbs of their own that join this protocol with what needs them.
    """

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool, without the null block."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `admit` and `append` can take now."""
        ...

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks a row of `num_tokens` tokens takes."""
        ...

    def admit(self, num_tokens: collections.abc.Sequence[int]) -> list[int]:
        """Gives each sequence a free row with blocks for its tokens; the caller knows they fit."""
        ...

    def append(
        self, rows: collections.abc.Sequence[int], num_tokens: collections.abc.Sequence[int]
    ) -> bool:
        """Allocates more tokens to the rows: all of them, or none, and then returns False."""
        ...

    def free(self, rows: collections.abc.Sequence[int]) -> None:
        """Gives back the rows and their blocks."""
        ...

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        ...
