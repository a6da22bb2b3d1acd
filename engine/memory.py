"""The scheduler's view of KV memory, and its implementation over the block tables."""

import collections.abc
from typing import Protocol

import numpy as np

from pallas_paged import block_tables
from pallas_paged.engine.groups import CopyPairs, RowPlan, blocks_for


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

    def blocks_taken(self, num_blocks: int, num_rows: int) -> int:
        """Returns how many blocks of the pool so many blocks in so many rows take."""
        ...

    def admit(self, plans: collections.abc.Sequence[RowPlan]) -> list[int]:
        """Gives each plan a free row with its blocks; the caller knows that they fit."""
        ...

    def append(
        self, rows: collections.abc.Sequence[int], num_tokens: collections.abc.Sequence[int]
    ) -> CopyPairs | None:
        """Allocates more tokens to the rows, all of them or none, and then returns None.

        Returns what must be copied before the new tokens are written.
        """
        ...

    def fork(self, parents: collections.abc.Sequence[int]) -> list[int]:
        """Gives each parent (one may come often) a child: a free row with all of its blocks."""
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
            num_blocks, max_num_seqs, blocks_for(max_model_len, block_size), block_size
        )

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool, without the null block."""
        return len(self.state.ref_counts) - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks without references."""
        return int(self.state.num_free)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.state.block_size

    def blocks_taken(self, num_blocks: int, num_rows: int) -> int:
        """Returns `num_blocks`: nothing is lost between rows."""
        return num_blocks

    def admit(self, plans: collections.abc.Sequence[RowPlan]) -> list[int]:
        """Gives each plan the lowest empty row, with its blocks."""
        rows = self._empty_rows(len(plans))
        blocks = [block for plan in plans for block in plan.blocks]
        if max(blocks) < 0 and len(set(blocks)) == len(blocks):  # the common case: nothing shared
            self._allocate(rows, [plan.num_tokens for plan in plans])
        else:
            self._admit_shared(rows, plans)
        return rows

    def append(
        self, rows: collections.abc.Sequence[int], num_tokens: collections.abc.Sequence[int]
    ) -> CopyPairs | None:
        """Allocates more tokens to the rows, all of them or none, and then returns None."""
        num_new = np.zeros_like(self.state.seq_lens)
        num_new[rows] = num_tokens
        self.state, result = block_tables.append(self.state, num_new)
        if not result.ok:
            return None
        copied = np.flatnonzero(result.copy_dst)
        return CopyPairs(np.asarray(result.copy_src)[copied], np.asarray(result.copy_dst)[copied])

    def fork(self, parents: collections.abc.Sequence[int]) -> list[int]:
        """Gives each parent (one may come often) the lowest empty row as a child."""
        children = self._empty_rows(len(parents))
        self.state = block_tables.fork(
            self.state, np.array(parents, np.int32), np.array(children, np.int32)
        )
        return children

    def free(self, rows: collections.abc.Sequence[int]) -> None:
        """Gives back the rows and their blocks."""
        self.state = block_tables.free(self.state, self._named(rows))

    def free_all(self) -> None:
        """Gives back every row and its blocks."""
        self.state = block_tables.free(self.state, self.state.seq_lens > 0)

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        block_tables.check_invariants(self.state)
        in_use = np.flatnonzero(self.state.seq_lens).tolist()
        assert {row: int(self.state.seq_lens[row]) for row in in_use} == num_tokens

    def _empty_rows(self, count: int) -> list[int]:
        rows: list[int] = np.flatnonzero(self.state.seq_lens == 0)[:count].tolist()
        assert len(rows) == count, f"no row for {count - len(rows)} sequences"
        return rows

    def _named(self, rows: collections.abc.Sequence[int]) -> np.ndarray:
        named = np.zeros(self.state.seq_lens.shape, bool)
        named[rows] = True
        return named

    def _allocate(
        self, rows: collections.abc.Sequence[int], num_tokens: collections.abc.Sequence[int]
    ) -> None:
        copies = self.append(rows, num_tokens)
        assert copies is not None, (
            f"{self.num_free_blocks} free blocks are too few for {num_tokens} tokens"
        )
        assert not len(copies.src), "an empty row shares no block"

    def _admit_shared(self, rows: list[int], plans: collections.abc.Sequence[RowPlan]) -> None:
        """Allocates the new blocks, each once, and shares out the rows' blocks in their order.

        The new blocks come as the tokens of the rows in which they are first named, and stay held
        while these rows are emptied again to begin with what the plans say.
        """
        S = self.block_size
        ids: dict[int, int] = {}
        first_named: list[list[int]] = []
        for plan in plans:
            first_named.append([b for b in plan.blocks if b < 0 and b not in ids])
            ids |= dict.fromkeys(first_named[-1], 0)
        counts = [len(named) for named in first_named]
        self._allocate(rows, [count * S for count in counts])
        for row, named in zip(rows, first_named, strict=True):
            ids |= zip(named, self.state.tables[row].tolist(), strict=False)
        new = np.array(list(ids.values()), np.int32)
        state = block_tables.hold(self.state, new)
        state = block_tables.free(
            state, self._named([row for row, count in zip(rows, counts, strict=True) if count])
        )
        blocks = np.zeros((len(plans), max(len(plan.blocks) for plan in plans)), np.int32)
        for given, plan in zip(blocks, plans, strict=True):
            given[: len(plan.blocks)] = [ids.get(block, block) for block in plan.blocks]
        state = block_tables.share(state, np.array(rows, np.int32), blocks)
        new_lens = state.seq_lens.copy()
        new_lens[rows] = [plan.num_tokens for plan in plans]
        state = block_tables.truncate(state, new_lens)
        self.state = block_tables.release(state, new)
