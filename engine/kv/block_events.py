"""What is cached, as events about blocks that have the same names in every engine.

A block's name is a hash of its own tokens and of all that come before it, see `block_hash`. Engines
with the same block size give blocks of equal content the same name, and so does one engine before
and after a restart.
"""

import collections
import hashlib
import itertools
import json
import struct
from collections.abc import Sequence
from typing import NamedTuple, override

from pallas_paged.engine.kv.prefix_cache import BlockListener, First, Parent
from pallas_paged.engine.kv.sharing import Root


class BlockStored(NamedTuple):
    """Blocks are cached, each behind the one before it.

    Attributes:
      block_hashes: their hashes.
      parent_block_hash: that of the block before the first of them, which was stored before; None
        if there is none.
      token_ids: the tokens in all of them, one block's after the other's.
      block_size: tokens in each.
      root: of a sequence whose first block this stores; else None.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    root: Root


class BlockRemoved(NamedTuple):
    """Blocks with these hashes are cached no more."""

    block_hashes: list[int]


class AllBlocksCleared(NamedTuple):
    """No block is cached any more."""


type BlockEvent = BlockStored | BlockRemoved | AllBlocksCleared


def root_hash(root: Root) -> int:
    """Returns what stands for a root in the place of the hash of a block before a first one.

    It is BLAKE2b of the root as JSON.
    """
    return _hash(json.dumps(root).encode())


def block_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Returns the hash, 64 bits, of a block behind one with the hash `parent`, or a root with it.

    It is BLAKE2b of the parent's hash and the tokens, as little-endian integers of 8 and 4 bytes.
    """
    return _hash(struct.pack(f"<Q{len(token_ids)}I", parent, *token_ids))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class BlockEvents(BlockListener):
    """Makes events of what a `PrefixCache` tells, and keeps them until they are taken.

    The cache may tell in one thread while another one takes.
    """

    def __init__(self, block_size: int) -> None:
        """Knows no block; `block_size` is the cache's."""
        self._block_size = block_size
        self._hashes: dict[int, int] = {}  # of the blocks that are cached
        self._events: collections.deque[BlockEvent] = collections.deque()

    @override
    def stored(
        self, parent: Parent, blocks: Sequence[int], token_ids: Sequence[tuple[int, ...]]
    ) -> None:
        if isinstance(parent, First):
            root, parent_hash = parent.root, None
            before = root_hash(root)
        else:
            root, parent_hash = None, self._hashes[parent]
            before = parent_hash
        hashes: list[int] = []
        for block, tokens in zip(blocks, token_ids, strict=True):
            before = self._hashes[block] = block_hash(before, tokens)
            hashes.append(before)
        tokens_of_all = list(itertools.chain.from_iterable(token_ids))
        self._events.append(BlockStored(hashes, parent_hash, tokens_of_all, self._block_size, root))

    @override
    def removed(self, blocks: Sequence[int]) -> None:
        self._events.append(BlockRemoved([self._hashes.pop(block) for block in blocks]))

    @override
    def cleared(self) -> None:
        self._hashes.clear()
        self._events.append(AllBlocksCleared())

    def take(self) -> list[BlockEvent]:
        """Returns the events since it was called before, in their order."""
        return [self._events.popleft() for _ in range(len(self._events))]
