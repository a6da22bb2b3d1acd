"""The scheduler's view of KV memory, and its implementation over the block tables."""

import collections
import collections.abc
from typing import Protocol

import numpy as np

from pallas_paged import block_tables
from pallas_paged.block_tables import BlockTables
from pallas_paged.engine.groups import CopyPairs, FullBlocks, RowPlan, blocks_for
from pallas_paged.engine.prefix_cache import Hit, PrefixCache, num_matchable
from pallas_paged.kv_cache import NULL_BLOCK


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
    def tables(self) -> np.ndarray:
        """The blocks of each row in order, i32[R, M]; never written to."""
        ...

    def blocks_taken(self, num_blocks: int, num_rows: int) -> int:
        """Returns how many blocks of the pool so many blocks in so many rows take."""
        ...

    def match(
        self,
        token_ids: collections.abc.Sequence[int],
        salt: str | None,
        known: list[Hit] | None = None,
    ) -> list[int]:
        """Returns the cached blocks that the tokens begin with, never one with the last token.

        `known` is what an earlier call for these tokens left in it, see `PrefixCache.match`.
        """
        ...

    def num_free_after(
        self,
        freed_rows: collections.abc.Sequence[int],
        rows: collections.abc.Sequence[int],
        num_tokens: collections.abc.Sequence[int],
    ) -> int:
        """Returns `num_free_blocks` as it would be after `free` and `append`; changes nothing.

        Negative by the blocks that `append` lacks. No row is both freed and appended to.
        """
        ...

    def num_unreferenced(
        self,
        blocks: collections.abc.Sequence[int],
        freed_rows: collections.abc.Sequence[int] = (),
    ) -> int:
        """Returns how many of these cached blocks no row uses: `num_free_blocks` counts them.

        Rows that are to be freed use none.
        """
        ...

    def count_query(self, num_tokens: int, num_hits: int) -> None:
        """Counts a prompt's tokens, and those of them that are cached, in the statistics."""
        ...

    def pin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Keeps the full blocks of these tokens; False, and no change, if one is not cached."""
        ...

    def unpin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Takes a `pin` back; False if there is none."""
        ...

    def num_pinned_for_others(self, blocks: collections.abc.Sequence[int]) -> int:
        """Returns how many pinned blocks are none of these."""
        ...

    def remember(self, full: collections.abc.Sequence[FullBlocks]) -> None:
        """Keeps full blocks for later requests that begin with the same tokens.

        A row that `merges` has the blocks that are kept already in place of its equal ones then.
        """
        ...

    def replace(self, blocks: collections.abc.Mapping[int, int]) -> None:
        """Lets every row that has one of the full blocks have the equal one that it maps to."""
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
        """Gives back every row and its blocks, also if a verb was cut short between any two lines.

        Nothing is cached or pinned afterwards.
        """
        ...

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        ...


class BlockTableMemory:
    """`Memory` over the functional block tables, on NumPy.

    Attributes:
      prefix_cache: the blocks kept for later requests; None keeps none.
      pins: how often each block is pinned.
      state: the block tables, replaced by every verb. The arrays of a state never change, so a
        step's inputs may refer to the state that they were built from.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_caching: bool = False,
    ) -> None:
        """`num_blocks` counts the null block; one row for each of `max_num_seqs` sequences."""
        self.prefix_cache = PrefixCache(num_blocks, block_size) if enable_prefix_caching else None
        self.pins: collections.Counter[int] = collections.Counter()
        self._pinned: collections.Counter[tuple[tuple[int, ...], str | None]]
        self._pinned = collections.Counter()
        self.state = block_tables.create(
            num_blocks, max_num_seqs, blocks_for(max_model_len, block_size), block_size
        )

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool, without the null block."""
        return len(self.state.ref_counts) - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks without references, but for those of the prefix cache."""
        return int(self.state.num_free) + self.num_evictable_blocks

    @property
    def num_evictable_blocks(self) -> int:
        """Cached blocks that no row uses and nobody has pinned."""
        return self._num_evictable(self.state)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.state.block_size

    @property
    def tables(self) -> np.ndarray:
        """The blocks of each row in order, i32[R, M]; never written to."""
        return np.asarray(self.state.tables)

    def blocks_taken(self, num_blocks: int, num_rows: int) -> int:
        """Returns `num_blocks`: nothing is lost between rows."""
        return num_blocks

    def match(
        self,
        token_ids: collections.abc.Sequence[int],
        salt: str | None,
        known: list[Hit] | None = None,
    ) -> list[int]:
        """Returns the cached blocks that the tokens begin with, never one with the last token."""
        if self.prefix_cache is None:
            return []
        num_blocks = num_matchable(len(token_ids), self.block_size)
        return self.prefix_cache.match(token_ids, salt, num_blocks, known)

    def num_free_after(
        self,
        freed_rows: collections.abc.Sequence[int],
        rows: collections.abc.Sequence[int],
        num_tokens: collections.abc.Sequence[int],
    ) -> int:
        """Returns `num_free_blocks` as it would be after `free` and `append`; changes nothing."""
        state = self._without(freed_rows)
        num_new = np.zeros_like(state.seq_lens)
        num_new[list(rows)] = num_tokens
        needed = int(block_tables.num_blocks_needed(state, num_new))
        return int(state.num_free) + self._num_evictable(state) - needed

    def num_unreferenced(
        self,
        blocks: collections.abc.Sequence[int],
        freed_rows: collections.abc.Sequence[int] = (),
    ) -> int:
        """Returns how many of these cached blocks no row uses, but those that are to be freed."""
        ref_counts = np.asarray(self._without(freed_rows).ref_counts)
        return int(np.count_nonzero(ref_counts[list(set(blocks))] == 1))

    def count_query(self, num_tokens: int, num_hits: int) -> None:
        """Counts a prompt's tokens, and those of them that are cached, in the statistics."""
        if self.prefix_cache is not None:
            self.prefix_cache.num_queried_tokens += num_tokens
            self.prefix_cache.num_hit_tokens += num_hits

    def pin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Holds the full blocks of these tokens; False, and no change, if one is not cached."""
        blocks = self._cached(token_ids, salt)
        if blocks is None:
            return False
        self.state = block_tables.hold(self.state, np.array(blocks, np.int32))
        self.pins.update(blocks)
        self._pinned[tuple(token_ids), salt] += 1
        return True

    def unpin(self, token_ids: collections.abc.Sequence[int], salt: str | None) -> bool:
        """Releases what `pin` held; False if there is nothing."""
        blocks, prefix = self._cached(token_ids, salt), (tuple(token_ids), salt)
        if blocks is None or prefix not in self._pinned:
            return False
        self.state = block_tables.release(self.state, np.array(blocks, np.int32))
        self.pins -= collections.Counter(blocks)  # forgets a block that is not pinned any more
        self._pinned -= collections.Counter([prefix])
        return True

    def reset_prefix_cache(self) -> bool:
        """Forgets the cached blocks that no row uses and nobody has pinned.

        Returns whether the pinned ones are all that is left.
        """
        if self.prefix_cache is None:
            return True
        evicted = self.prefix_cache.evict(self.num_evictable_blocks, self._ref_counts)
        self.state = block_tables.release(self.state, np.array(evicted, np.int32))
        return len(self.prefix_cache) == len(self.pins)

    def num_pinned_for_others(self, blocks: collections.abc.Sequence[int]) -> int:
        """Returns how many pinned blocks are none of these."""
        return len(self.pins.keys() - set(blocks))

    def _cached(
        self, token_ids: collections.abc.Sequence[int], salt: str | None
    ) -> list[int] | None:
        """Returns the full blocks of these tokens, or None if not all of them are cached."""
        num_full = len(token_ids) // self.block_size
        if self.prefix_cache is None:
            return None
        blocks = self.prefix_cache.match(token_ids, salt, num_full)
        return blocks if len(blocks) == num_full else None

    def remember(self, full: collections.abc.Sequence[FullBlocks]) -> None:
        """Enters full blocks into the prefix cache, holds the new ones and replaces the others."""
        if self.prefix_cache is None:
            return
        entered: list[int] = []
        replaced: dict[int, int] = {}
        for item in full:
            blocks = self.tables[item.row, max(item.first - 1, 0) : item.end].tolist()
            blocks = [replaced.get(block, block) for block in blocks]
            new, others = self.prefix_cache.enter(item, blocks)
            entered += new
            replaced |= others
        if entered:
            self.state = block_tables.hold(self.state, np.array(entered, np.int32))
        self.replace(replaced)

    def replace(self, blocks: collections.abc.Mapping[int, int]) -> None:
        """Lets every row that has one of the full blocks have the equal one that it maps to.

        Steps in flight read the old ones still: they have tables of their own, and whoever takes
        the blocks next writes in a later step.
        """
        if not blocks:
            return
        old, new = (np.array(list(ids), np.int32) for ids in (blocks.keys(), blocks.values()))
        if self.prefix_cache is not None:
            assert not self.prefix_cache.is_cached[old].any(), f"{old} are cached"
        self.state = block_tables.replace(self.state, old, new)

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
        return self._append(rows, num_tokens, keep=())

    def _append(
        self,
        rows: collections.abc.Sequence[int],
        num_tokens: collections.abc.Sequence[int],
        keep: collections.abc.Iterable[int],
    ) -> CopyPairs | None:
        """Appends as `append` does; evicts cached blocks first, none of `keep`, if that helps."""
        num_new = np.zeros_like(self.state.seq_lens)
        num_new[rows] = num_tokens
        most = sum(num_tokens) // self.block_size + 2 * len(rows)
        if self.prefix_cache is not None and most > self.state.num_free:
            keep = set(keep)
            needed = int(block_tables.num_blocks_needed(self.state, num_new))
            missing = needed - int(self.state.num_free)
            if 0 < missing <= self.num_evictable_blocks - self.num_unreferenced(list(keep)):
                evicted = self.prefix_cache.evict(missing, self._ref_counts, keep)
                self.state = block_tables.release(self.state, np.array(evicted, np.int32))
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
        """Gives back the rows and their blocks; cached ones stay."""
        if self.prefix_cache is not None:
            blocks = self.tables[list(rows)]
            self.prefix_cache.touch(blocks[blocks != NULL_BLOCK])
        self.state = block_tables.free(self.state, self._named(rows))

    def free_all(self) -> None:
        """Begins with new block tables, and an empty prefix cache that goes on counting.

        Of the old ones only the sizes are read: a verb that was cut short, between entering a block
        and holding it, say, leaves them at odds with each other.
        """
        num_blocks, (num_rows, width) = len(self.state.ref_counts), self.state.tables.shape
        self.state = block_tables.create(num_blocks, num_rows, width, self.block_size)
        self.pins, self._pinned = collections.Counter(), collections.Counter()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, with so many tokens each."""
        block_tables.check_invariants(self.state, self._held())
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()
        in_use = np.flatnonzero(self.state.seq_lens).tolist()
        assert {row: int(self.state.seq_lens[row]) for row in in_use} == num_tokens

    @property
    def _ref_counts(self) -> np.ndarray:
        return np.asarray(self.state.ref_counts)

    def _without(self, rows: collections.abc.Sequence[int]) -> BlockTables:
        """Returns the state as it would be without these rows."""
        return block_tables.free(self.state, self._named(rows)) if rows else self.state

    def _num_evictable(self, state: BlockTables) -> int:
        if self.prefix_cache is None:
            return 0
        return int(np.count_nonzero(self.prefix_cache.evictable(np.asarray(state.ref_counts))))

    def _held(self) -> list[int]:
        """Returns the block of each reference that is not a row's."""
        cached = () if self.prefix_cache is None else np.flatnonzero(self.prefix_cache.is_cached)
        return [*(int(block) for block in cached), *self.pins.elements()]

    def _empty_rows(self, count: int) -> list[int]:
        rows: list[int] = np.flatnonzero(self.state.seq_lens == 0)[:count].tolist()
        assert len(rows) == count, f"no row for {count - len(rows)} sequences"
        return rows

    def _named(self, rows: collections.abc.Sequence[int]) -> np.ndarray:
        named = np.zeros(self.state.seq_lens.shape, bool)
        named[list(rows)] = True
        return named

    def _allocate(
        self,
        rows: collections.abc.Sequence[int],
        num_tokens: collections.abc.Sequence[int],
        keep: collections.abc.Iterable[int] = (),
    ) -> None:
        copies = self._append(rows, num_tokens, keep)
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
        existing = {block for plan in plans for block in plan.blocks if block > 0}
        self._allocate(rows, [count * S for count in counts], keep=existing)
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
