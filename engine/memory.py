"""The scheduler's view of KV memory, and its implementation over the block tables."""

import collections.abc
from typing import Protocol

import numpy as np

from pallas_paged import block_tables


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

    def free_all(self) -> None:
        """Gives back every row and its blocks."""
        ...

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        ...


class BlockTableMemory:
    """`Memory` over the functional block tables, on NumPy.

    Attributes:
      state: the block tables, replaced by every verb. The arrays of a state never change, so a
        step's inputs may refer to the state that they were built from.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        """`num_blocks` counts the null block; one row for each of `max_num_seqs` sequences."""
        self.state = block_tables.create(
            num_blocks, max_num_seqs, -(-max_model_len // block_size), block_size
        )

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool, without the null block."""
        return len(self.state.ref_counts) - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks without references."""
        return int(self.state.num_free)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks a row of `num_tokens` tokens takes."""
        return -(-num_tokens // self.state.block_size)

    def admit(self, num_tokens: collections.abc.Sequence[int]) -> list[int]:
        """Gives each sequence the lowest empty row, with blocks for its tokens, at least one."""
        rows: list[int] = np.flatnonzero(self.state.seq_lens == 0)[: len(num_tokens)].tolist()
        assert len(rows) == len(num_tokens), f"no row for {len(num_tokens) - len(rows)} sequences"
        ok = self.append(rows, num_tokens)
        assert ok, f"{self.num_free_blocks} free blocks are too few for {num_tokens} tokens"
        return rows

    def append(
        self, rows: collections.abc.Sequence[int], num_tokens: collections.abc.Sequence[int]
    ) -> bool:
        """Allocates more tokens to the rows: all of them, or none, and then returns False."""
        num_new = np.zeros_like(self.state.seq_lens)
        num_new[rows] = num_tokens
        self.state, result = block_tables.append(self.state, num_new)
        assert not result.copy_dst.any(), "no block is shared, so none is copied on write"
        return bool(result.ok)

    def free(self, rows: collections.abc.Sequence[int]) -> None:
        """Gives back the rows and their blocks."""
        named = np.zeros(self.state.seq_lens.shape, bool)
        named[rows] = True
        self.state = block_tables.free(self.state, named)

    def free_all(self) -> None:
        """Gives back every row and its blocks."""
        self.state = block_tables.free(self.state, self.state.seq_lens > 0)

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        block_tables.check_invariants(self.state)
        in_use = np.flatnonzero(self.state.seq_lens).tolist()
        assert {row: int(self.state.seq_lens[row]) for row in in_use} == num_tokens
