"""Which blocks of the pool hold which tokens, so that a later request need not compute them again.

A full block's content depends on its own tokens and on all that come before it. An entry's key is
therefore the entry of the block before it together with its own tokens: a chain, in which equal
keys mean equal tokens from the start, for a dictionary compares keys and not only their hashes.
A first block has its request's root in the place of a block before it.

A sequence's block is only entered behind one of its own blocks. To that end a sequence whose block
turns out to be cached already, because two requests computed the same tokens at the same time,
takes the cached one in its place. So whoever uses a cached block uses all those before it, or has
given back the first of them, which have left its sliding window. Only in that case are there blocks
in use behind one that may be evicted; they are forgotten with it, for no prompt could find them any
more, and stay their sequence's.

Two computations of equal tokens may differ in their last bits, for they ran in batches of different
shapes: what is found here is another batch's result, whether before the prompt or in the middle.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pallas_paged.engine.kv.sharing import FullBlocks, Root, blocks_for


class First(NamedTuple):
    """Stands before a first block, and is none itself, whatever the root is."""

    root: Root


type Parent = int | First
"""What is before a block."""
type Key = tuple[Parent, tuple[int, ...]]


class Hit(NamedTuple):
    """A cached block that a sequence may begin with, and the entry by which it was found."""

    block: int
    key: Key


class BlockListener(Protocol):
    """Is told which blocks are cached, in the order in which that changes."""

    def stored(
        self, parent: Parent, blocks: Sequence[int], token_ids: Sequence[tuple[int, ...]]
    ) -> None:
        """Called with new blocks, each behind the one before it, and the tokens in each.

        `parent` is what stands before the first of them; if it is a block, it was stored before.
        """

    def removed(self, blocks: Sequence[int]) -> None:
        """Called with blocks that are cached no more."""

    def cleared(self) -> None:
        """Called when no block is cached any more."""


class PrefixCache:
    """Finds, enters and evicts blocks; whoever calls it holds and releases them.

    The cache has one reference to each of its blocks. A block that nobody else refers to may be
    evicted, the least recently used first, but never before those that come behind it and may be
    evicted too.

    Attributes:
      is_cached: bool[N].
      num_queried_tokens: prompt tokens of admitted requests that read the cache.
      num_hit_tokens: those of them that were found in it.
      listener: is told of each change, if there is one. When a verb is cut short it need not be;
        `clear` then brings it up to date with everything else.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Starts empty, over a pool of N `num_blocks`."""
        self.block_size = block_size
        self.num_queried_tokens = self.num_hit_tokens = 0
        self.listener: BlockListener | None = None
        self._num_blocks = num_blocks
        self.clear()

    def clear(self) -> None:
        """Forgets every block, whatever state they are in; the statistics go on."""
        self.is_cached = np.zeros(self._num_blocks, bool)
        self._num_children = np.zeros(self._num_blocks, np.int32)
        self._last_used = np.zeros(self._num_blocks, np.int64)
        self._clock = 0
        self._blocks: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        if self.listener is not None:
            self.listener.cleared()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(
        self,
        token_ids: Sequence[int],
        root: Root,
        num_blocks: int,
        known: list[Hit] | None = None,
    ) -> list[int]:
        """Returns the cached blocks that `token_ids` begin with under `root`, at most `num_blocks`.

        `known` is what a call for these tokens, or fewer of them, left in it. It is brought up to
        date, and only what is new is looked up.
        """
        S = self.block_size
        known = [] if known is None else known
        # A block stays as long as those behind it do, so the last one speaks for all before it.
        while known and self._keys.get(known[-1].block) is not known[-1].key:
            known.pop()
        parent: Parent = known[-1].block if known else First(root)
        for start in range(len(known) * S, num_blocks * S, S):
            block = self._blocks.get((parent, tuple(token_ids[start : start + S])))
            if block is None:
                break
            known.append(Hit(block, self._keys[block]))
            parent = block
        return [hit.block for hit in known[:num_blocks]]

    def enter(self, full: FullBlocks, blocks: Sequence[int]) -> tuple[list[int], dict[int, int]]:
        """Enters a row's full blocks from `full.first` to `full.end`.

        `blocks` are these, behind the one before them if there is one.

        Returns the blocks that are new here, and for those whose tokens another block holds already
        that block, for the row to take in their place. A row that does not merge keeps its own, and
        nothing behind them is entered; nor is anything behind a block that is forgotten.
        """
        S = self.block_size
        entered: list[int] = []
        replaced: dict[int, int] = {}
        parent: Parent = First(full.root)
        new = blocks
        if full.first:
            parent, new = blocks[0], blocks[1:]
            if not self.is_cached[parent]:
                return entered, replaced
        for index, block in zip(range(full.first, full.end), new, strict=True):
            key = parent, tuple(full.token_ids[index * S : (index + 1) * S])
            cached = self._blocks.setdefault(key, block)
            if cached != block:
                if not full.merges:
                    break
                replaced[block] = cached
            elif not self.is_cached[block]:
                self._keys[block] = key
                self.is_cached[block] = True
                if isinstance(parent, int):
                    self._num_children[parent] += 1
                entered.append(block)
            parent = cached
        self.touch(entered)
        if entered and self.listener is not None:
            # Nothing stands behind a new block, so that from the first one on all are new.
            keys = [self._keys[block] for block in entered]
            self.listener.stored(keys[0][0], entered, [token_ids for _, token_ids in keys])
        return entered, replaced

    def touch(self, blocks: Sequence[int] | np.ndarray) -> None:
        """Counts the blocks, cached or not, as used now."""
        self._clock += 1
        if len(blocks) < 8:  # else an array of them costs more
            for block in blocks:
                self._last_used[block] = self._clock
        else:
            self._last_used[np.asarray(blocks, np.int64)] = self._clock

    def evictable(self, ref_counts: np.ndarray) -> np.ndarray:
        """Returns which blocks, bool[N], nobody but the cache refers to."""
        return self.is_cached & (ref_counts == 1)

    def evict(self, count: int, ref_counts: np.ndarray, keep: Iterable[int] = ()) -> list[int]:
        """Forgets `count` of the evictable blocks, and returns all that it forgets.

        Those may be more: blocks in use behind an evicted one, which rows go on to use. None is of
        `keep`, which has with a block all cached ones before it.
        """
        candidates = self.evictable(ref_counts)
        kept = set(keep)
        candidates[list(kept)] = False
        leaves = np.flatnonzero(candidates & (self._num_children == 0)).tolist()
        queue = [(int(self._last_used[block]), block) for block in leaves]
        heapq.heapify(queue)
        forgotten: list[int] = []
        for _ in range(count):
            if not queue:  # all that are left have blocks in use behind them
                block, in_use = self._last_before_rows(candidates)
                assert kept.isdisjoint(in_use), f"{kept} lack what stands before {in_use}"
                for each in in_use:
                    self._forget(each)
                forgotten += in_use
                queue.append((int(self._last_used[block]), block))
            _, block = heapq.heappop(queue)
            forgotten.append(block)
            candidates[block] = False
            parent = self._forget(block)
            if isinstance(parent, int) and candidates[parent] and not self._num_children[parent]:
                heapq.heappush(queue, (int(self._last_used[parent]), parent))
        if forgotten and self.listener is not None:
            self.listener.removed(forgotten)
        return forgotten

    def _forget(self, block: int) -> Parent:
        """Forgets a block, and returns what stood before it."""
        key = self._keys.pop(block)
        del self._blocks[key]
        self.is_cached[block] = False
        parent = key[0]
        if isinstance(parent, int):
            self._num_children[parent] -= 1
        return parent

    def _last_before_rows(self, candidates: np.ndarray) -> tuple[int, list[int]]:
        """Returns the least recently used candidate with no other behind it, and what is behind."""
        children: dict[int, list[int]] = {}
        for block, (parent, _) in self._keys.items():
            if isinstance(parent, int):
                children.setdefault(parent, []).append(block)
        left: list[int] = np.flatnonzero(candidates).tolist()
        before: set[int] = set()  # all blocks before a candidate
        for block in left:
            parent = self._keys[block][0]
            while isinstance(parent, int) and parent not in before:
                before.add(parent)
                parent = self._keys[parent][0]
        last = min(set(left) - before, key=lambda block: (self._last_used[block], block))
        behind = list(children[last])
        for block in behind:  # which grows
            behind += children.get(block, ())
        return last, behind

    def check_invariants(self) -> None:
        """Asserts that the entries and what is derived from them agree."""
        assert {block: key for key, block in self._blocks.items()} == self._keys
        assert sorted(self._keys) == np.flatnonzero(self.is_cached).tolist()
        parents = [parent for parent, _ in self._blocks if isinstance(parent, int)]
        assert self.is_cached[parents].all()
        counts = np.bincount(parents, minlength=self._num_blocks)
        assert (counts == self._num_children).all()


def num_matchable(num_tokens: int, block_size: int) -> int:
    """Returns how many blocks a prompt may take from the cache: its last token is computed."""
    return blocks_for(num_tokens, block_size) - 1
