"""KV memory over the functional block tables: the engine's only owner of block-table state."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import override

import numpy as np

from pallas_paged import block_tables
from pallas_paged.block_tables import BlockTables
from pallas_paged.engine.kv.interface import CountedSpace, Memory, Need, Numbers, Space
from pallas_paged.engine.kv.prefix_cache import BlockListener, Hit, PrefixCache, num_matchable
from pallas_paged.engine.kv.sharing import CopyPairs, FullBlocks, Root, RowPlan, blocks_for
from pallas_paged.kv_cache import NULL_BLOCK


class BlockTableMemory(Memory):
    """`Memory` over the functional block tables, on NumPy.

    Attributes:
      prefix_cache: the blocks kept for later requests; None keeps none.
      pins: how often each block is pinned.
      pinned: how often each prefix is, which is tokens and a root.
      state: the block tables. Every verb uses the state up and puts another one in its place: who
        wants to keep an array of it copies that.
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
        self.pinned: collections.Counter[tuple[tuple[int, ...], Root]] = collections.Counter()
        width = blocks_for(max_model_len, block_size)
        self.state = block_tables.create(num_blocks, max_num_seqs, width, block_size, in_place=True)
        self._versions = np.zeros(max_num_seqs, np.int64)

    @property
    @override
    def num_usable_blocks(self) -> int:
        return len(self.state.ref_counts) - 1

    @property
    @override
    def num_free_blocks(self) -> int:
        return int(self.state.num_free) + self.num_evictable_blocks

    @property
    def num_evictable_blocks(self) -> int:
        """Cached blocks that no row uses and nobody has pinned."""
        return self._num_evictable(self.state)

    @property
    @override
    def block_size(self) -> int:
        return self.state.block_size

    @property
    @override
    def caches_prefixes(self) -> bool:
        return self.prefix_cache is not None

    @property
    @override
    def is_cached(self) -> np.ndarray:
        cache = self.prefix_cache
        return np.zeros_like(self._ref_counts, bool) if cache is None else cache.is_cached

    @property
    @override
    def tables(self) -> np.ndarray:
        return np.asarray(self.state.tables)

    @property
    @override
    def num_blocks(self) -> np.ndarray:
        return -(-np.asarray(self.state.seq_lens, np.int64) // self.block_size)

    @property
    @override
    def versions(self) -> np.ndarray:
        return self._versions

    @override
    def blocks_taken(self, need: Need) -> int:
        return need.num_blocks

    @override
    def match(
        self,
        token_ids: Sequence[int],
        root: Root,
        known: list[Hit] | None = None,
    ) -> list[int]:
        if self.prefix_cache is None:
            return []
        num_blocks = num_matchable(len(token_ids), self.block_size)
        return self.prefix_cache.match(token_ids, root, num_blocks, known)

    @override
    def space(
        self,
        freed_rows: Sequence[int] = (),
        rows: Numbers = (),
        num_tokens: Numbers = (),
    ) -> Space:
        if not len(freed_rows) and not len(rows):
            return CountedSpace(self.num_free_blocks)
        state = self._without(freed_rows)
        num_new = np.zeros_like(state.seq_lens)
        num_new[np.asarray(rows, np.int32)] = num_tokens
        needed = int(block_tables.num_blocks_needed(state, num_new))
        return CountedSpace(int(state.num_free) + self._num_evictable(state) - needed)

    @override
    def num_unreferenced(
        self,
        blocks: Sequence[int],
        freed_rows: Sequence[int] = (),
    ) -> int:
        ref_counts = np.asarray(self._without(freed_rows).ref_counts)
        return int(np.count_nonzero(ref_counts[list(set(blocks))] == 1))

    @override
    def count_query(self, num_tokens: int, num_hits: int) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.num_queried_tokens += num_tokens
            self.prefix_cache.num_hit_tokens += num_hits

    @override
    def pin(self, token_ids: Sequence[int], root: Root) -> bool:
        blocks = self._cached(token_ids, root)
        if blocks is None:
            return False
        self.state = block_tables.hold(self.state, np.array(blocks, np.int32))
        self.pins.update(blocks)
        self.pinned[tuple(token_ids), root] += 1
        return True

    @override
    def unpin(self, token_ids: Sequence[int], root: Root) -> bool:
        blocks, prefix = self._cached(token_ids, root), (tuple(token_ids), root)
        if blocks is None or prefix not in self.pinned:
            return False
        self.state = block_tables.release(self.state, np.array(blocks, np.int32))
        self.pins -= collections.Counter(blocks)  # forgets a block that is not pinned any more
        self.pinned -= collections.Counter([prefix])
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

    @override
    def num_pinned_for_others(self, blocks: Sequence[int]) -> int:
        return len(self.pins.keys() - set(blocks))

    def _cached(self, token_ids: Sequence[int], root: Root) -> list[int] | None:
        """Returns the full blocks of these tokens, or None if not all of them are cached."""
        num_full = len(token_ids) // self.block_size
        if self.prefix_cache is None:
            return None
        blocks = self.prefix_cache.match(token_ids, root, num_full)
        return blocks if len(blocks) == num_full else None

    @override
    def remember(self, full: Sequence[FullBlocks]) -> None:
        if self.prefix_cache is None or not full:
            return
        entered: list[int] = []
        replaced: dict[int, int] = {}
        for item, blocks in zip(full, self._blocks_of(full), strict=True):
            if replaced:
                blocks = [replaced.get(block, block) for block in blocks]
            new, others = self.prefix_cache.enter(item, blocks)
            entered += new
            if others:
                replaced |= others
        if entered:
            self.state = block_tables.hold(self.state, np.array(entered, np.int32))
        self.replace(replaced)

    def _blocks_of(self, full: Sequence[FullBlocks]) -> Iterator[list[int]]:
        """Yields the new full blocks of each item, behind the one before them if there is one."""
        begins = [max(item.first - 1, 0) for item in full]
        counts = [item.end - begin for item, begin in zip(full, begins, strict=True)]
        rows = np.repeat([item.row for item in full], counts)
        ends = np.cumsum(counts)
        places = np.arange(len(rows)) + np.repeat(begins - (ends - counts), counts)
        blocks = self.tables[rows, places].tolist()
        for end, count in zip(ends.tolist(), counts, strict=True):
            yield blocks[end - count : end]

    @override
    def listen(self, listener: BlockListener) -> None:
        assert self.prefix_cache is not None, "nothing is kept: enable_prefix_caching=False"
        assert not self.prefix_cache, "blocks are cached that it was not told of"
        self.prefix_cache.listener = listener

    @override
    def replace(self, blocks: Mapping[int, int]) -> None:
        # Steps in flight still read the old blocks: the device's tables change with the next step,
        # and whoever takes the blocks writes in a later one, too.
        if not blocks:
            return
        old, new = (np.array(list(ids), np.int32) for ids in (blocks.keys(), blocks.values()))
        assert not self.is_cached[old].any(), f"{old} are cached"
        self.state = block_tables.replace(self.state, old, new)
        self._versions += 1  # it is rare, and any row may have one of the old blocks

    @override
    def admit(self, plans: Sequence[RowPlan]) -> list[int]:
        rows = self._empty_rows(len(plans))
        blocks = np.zeros((len(plans), max(len(plan.blocks) for plan in plans)), np.int32)
        for given, plan in zip(blocks, plans, strict=True):
            given[: len(plan.blocks)] = plan.blocks
        num_tokens = np.array([plan.num_tokens for plan in plans], np.int32)
        self._evict(-int(blocks.min()), keep=set(blocks[blocks > 0].tolist()))
        self.state, ok = block_tables.admit(self.state, np.array(rows), num_tokens, blocks)
        assert ok, f"{self.num_free_blocks} free blocks are too few for {num_tokens} tokens"
        self._versions[rows] += 1
        return rows

    @override
    def append(self, rows: Numbers, num_tokens: Numbers) -> CopyPairs | None:
        num_new = np.zeros_like(self.state.seq_lens)
        num_new[rows] = num_tokens
        most = int(num_new.sum()) // self.block_size + 2 * len(rows)
        if self.prefix_cache is not None and most > self.state.num_free:
            self._evict(int(block_tables.num_blocks_needed(self.state, num_new)))
        num_before = self.num_blocks
        self.state, result = block_tables.append(self.state, num_new)
        if not result.ok:
            return None
        self._versions += (self.num_blocks > num_before) | (np.asarray(result.copy_dst) > 0)
        copied = np.flatnonzero(result.copy_dst)
        return CopyPairs(np.asarray(result.copy_src)[copied], np.asarray(result.copy_dst)[copied])

    def _evict(self, needed: int, keep: Collection[int] = ()) -> None:
        """Frees cached blocks, none of `keep`, until so many blocks are free; if that helps."""
        missing = needed - int(self.state.num_free)
        if self.prefix_cache is None or missing <= 0:
            return
        if missing <= self.num_evictable_blocks - self.num_unreferenced(list(keep)):
            evicted = self.prefix_cache.evict(missing, self._ref_counts, keep)
            self.state = block_tables.release(self.state, np.array(evicted, np.int32))

    @override
    def fork(self, parents: Sequence[int]) -> list[int]:
        children = self._empty_rows(len(parents))
        self.state = block_tables.fork(
            self.state, np.array(parents, np.int32), np.array(children, np.int32)
        )
        self._versions[children] += 1
        return children

    @override
    def truncate(self, rows: Sequence[int], num_tokens: Sequence[int]) -> None:
        assert all(count > 0 for count in num_tokens), "an empty row is nobody's; `free` it"
        new_lens = np.array(self.state.seq_lens)
        new_lens[list(rows)] = num_tokens
        if self.prefix_cache is not None:
            for row, count in zip(rows, num_tokens, strict=True):
                blocks = self.tables[row, blocks_for(count, self.block_size) :]
                self.prefix_cache.touch(blocks[blocks != NULL_BLOCK])
        self.state = block_tables.truncate(self.state, new_lens)

    @override
    def drop_front(self, num_blocks: Mapping[int, int]) -> None:
        counts = np.zeros_like(self.state.seq_lens)
        counts[list(num_blocks)] = list(num_blocks.values())
        if self.prefix_cache is not None:
            for row, count in num_blocks.items():
                blocks = self.tables[row, :count]
                self.prefix_cache.touch(blocks[blocks != NULL_BLOCK])
        self.state = block_tables.drop_front(self.state, counts)
        self._versions += counts > 0

    @override
    def free(self, rows: Sequence[int]) -> None:
        if self.prefix_cache is not None:
            blocks = self.tables[list(rows)]
            self.prefix_cache.touch(blocks[blocks != NULL_BLOCK])
        self.state = block_tables.free(self.state, self._named(rows))

    @override
    def free_all(self) -> None:
        # Of the old tables only the sizes are read: a verb that was cut short, between entering a
        # block and holding it, say, leaves them at odds with each other.
        num_blocks, (num_rows, width) = len(self.state.ref_counts), self.state.tables.shape
        self.state = block_tables.create(
            num_blocks, num_rows, width, self.block_size, in_place=True
        )
        self.pins, self.pinned = collections.Counter(), collections.Counter()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    @override
    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        block_tables.check_invariants(self.state, self._held())
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()
        in_use = np.flatnonzero(self.state.seq_lens).tolist()
        assert {row: int(self.state.seq_lens[row]) for row in in_use} == num_tokens

    @property
    def _ref_counts(self) -> np.ndarray:
        return np.asarray(self.state.ref_counts)

    def _without(self, rows: Sequence[int]) -> BlockTables:
        """Returns the state as it would be without these rows."""
        if not rows:
            return self.state
        kept = dataclasses.replace(self.state, in_place=False)
        return block_tables.free(kept, self._named(rows))

    def _num_evictable(self, state: BlockTables) -> int:
        if self.prefix_cache is None:
            return 0
        return int(np.count_nonzero(self.prefix_cache.evictable(np.asarray(state.ref_counts))))

    def _held(self) -> list[int]:
        """Returns the block of each reference that is not a row's."""
        return [*np.flatnonzero(self.is_cached).tolist(), *self.pins.elements()]

    def _empty_rows(self, count: int) -> list[int]:
        rows: list[int] = np.flatnonzero(self.state.seq_lens == 0)[:count].tolist()
        assert len(rows) == count, f"no row for {count - len(rows)} sequences"
        return rows

    def _named(self, rows: Sequence[int]) -> np.ndarray:
        named = np.zeros(self.state.seq_lens.shape, bool)
        named[list(rows)] = True
        return named
