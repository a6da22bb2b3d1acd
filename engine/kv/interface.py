"""What a scheduler asks of KV memory, in blocks and rows; it may be anything that keeps this."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pallas_paged.engine.kv.prefix_cache import BlockListener, Hit
from pallas_paged.engine.kv.sharing import CopyPairs, FullBlocks, Root, RowPlan

type Numbers = np.ndarray | Sequence[int]
"""One of each row: its place, or tokens."""


class Need(NamedTuple):
    """What a group asks of a memory to come in.

    Attributes:
      num_blocks: blocks that should be free, of a memory that gives out single blocks.
      num_rows: its sequences.
      num_tokens: of each of them, as it comes in.
      max_length: tokens at which they end: what a memory that never moves a sequence has to keep.
    """

    num_blocks: int
    num_rows: int
    num_tokens: int
    max_length: int


class Space(Protocol):
    """What is free, to be given away group by group; nothing is allocated by that."""

    def take(self, need: Need, num_spared: int) -> bool:
        """Takes what a group needs, and returns whether it could.

        It could not, and nothing is taken, where fewer than `num_spared` blocks would be left.
        """
        ...


class CountedSpace(Space):
    """Blocks of which each is as good as any other."""

    def __init__(self, num_blocks: int) -> None:
        """Starts with so many free blocks."""
        self._num_blocks = num_blocks

    def take(self, need: Need, num_spared: int) -> bool:
        """Counts the blocks."""
        if need.num_blocks + num_spared > self._num_blocks:
            return False
        self._num_blocks -= need.num_blocks
        return True


class Memory(Protocol):
    """Blocks of KV memory, owned by rows.

    A row is a sequence's place in the block tables, from its admission or fork until it is freed.
    The scheduler calls each verb at most once per attempt to schedule, never once per sequence.
    """

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool, without the null block."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `admit` and `append` can take now."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def caches_prefixes(self) -> bool:
        """Whether full blocks are kept for later requests."""
        ...

    @property
    def is_cached(self) -> np.ndarray:
        """Which blocks are kept, bool[N]; only read by callers."""
        ...

    @property
    def tables(self) -> np.ndarray:
        """The blocks of each row in order, i32[R, M]; only read by callers.

        The next call that changes rows may change the array itself.
        """
        ...

    @property
    def num_blocks(self) -> np.ndarray:
        """How many entries of each row of `tables` count, i64[R]; only read by callers."""
        ...

    @property
    def versions(self) -> np.ndarray:
        """A number of each row, i64[R]; only read by callers.

        It grows whenever an entry that counts changes, or begins to count.
        """
        ...

    def blocks_taken(self, need: Need) -> int:
        """Returns how many blocks of the whole pool a group takes that needs this."""
        ...

    def match(
        self,
        token_ids: Sequence[int],
        root: Root,
        known: list[Hit] | None = None,
    ) -> list[int]:
        """Returns the cached blocks that the tokens begin with, never one with the last token.

        Only those that were remembered with an equal `root`, see `FullBlocks`.
        `known` is what an earlier call for these tokens left in it, see `PrefixCache.match`.
        """
        ...

    def space(
        self,
        freed_rows: Sequence[int] = (),
        rows: Numbers = (),
        num_tokens: Numbers = (),
    ) -> Space:
        """Returns what would be free after `free` and `append`; changes nothing.

        Nothing fits if `append` lacks blocks. No row is both freed and appended to.
        """
        ...

    def num_unreferenced(
        self,
        blocks: Sequence[int],
        freed_rows: Sequence[int] = (),
    ) -> int:
        """Returns how many of these cached blocks no row uses: `num_free_blocks` counts them.

        Rows that are to be freed use none.
        """
        ...

    def count_query(self, num_tokens: int, num_hits: int) -> None:
        """Counts a prompt's tokens, and those of them that are cached, in the statistics."""
        ...

    def pin(self, token_ids: Sequence[int], root: Root) -> bool:
        """Keeps the full blocks of these tokens; False, and no change, if one is not cached."""
        ...

    def unpin(self, token_ids: Sequence[int], root: Root) -> bool:
        """Takes a `pin` back; False if there is none."""
        ...

    def num_pinned_for_others(self, blocks: Sequence[int]) -> int:
        """Returns how many pinned blocks are none of these."""
        ...

    def remember(self, full: Sequence[FullBlocks]) -> None:
        """Keeps full blocks for later requests that begin with the same tokens.

        A row that `merges` has the blocks that are kept already in place of its equal ones then. Of
        another row none is kept from the first on that repeats one.
        """
        ...

    def listen(self, listener: BlockListener) -> None:
        """Tells it from now on which blocks are kept for later requests; none is yet."""
        ...

    def replace(self, blocks: Mapping[int, int]) -> None:
        """Lets every row that has one of the full blocks have the equal one that it maps to."""
        ...

    def admit(self, plans: Sequence[RowPlan]) -> list[int]:
        """Gives each plan a free row with its blocks; the caller knows that they fit."""
        ...

    def append(self, rows: Numbers, num_tokens: Numbers) -> CopyPairs | None:
        """Allocates more tokens to the rows, all of them or none, and then returns None.

        Returns what must be copied before the new tokens are written.
        """
        ...

    def fork(self, parents: Sequence[int]) -> list[int]:
        """Gives each parent (one may come often) a child: a free row with all of its blocks."""
        ...

    def truncate(self, rows: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Shortens each row to so many tokens, at least one, and gives back the blocks past them.

        A block that others have, or that is kept for later requests, stays theirs.
        """
        ...

    def drop_front(self, num_blocks: Mapping[int, int]) -> None:
        """Gives back the first blocks of rows, {row: how many}, those given back before included.

        For full blocks of tokens that no query of the row sees any more. The row's other blocks
        stay in their places, and 0 stands in those of the first ones.
        """
        ...

    def free(self, rows: Sequence[int]) -> None:
        """Gives back the rows and their blocks."""
        ...

    def free_all(self) -> None:
        """Gives back every row and its blocks, also if a verb was cut short between any two lines.

        Nothing is cached or pinned afterwards.
        """
        ...

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        ...
