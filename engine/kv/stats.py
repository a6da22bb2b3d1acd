"""What the blocks of the KV pool hold."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.host_pool import HostPool


@dataclasses.dataclass(frozen=True)
class KVStats:
    """The KV pool at one moment, and counts since the engine began.

    A block is allocated if a sequence's table names it; cached blocks that no sequence uses are
    counted apart. `num_allocated_blocks + num_cached_blocks + num_free_blocks == num_blocks`.

    Attributes:
      num_blocks: blocks of the pool, without the null block.
      block_size: slots of a block.
      num_allocated_blocks: blocks that sequences hold.
      num_shared_blocks: those of them that several sequences hold.
      num_cached_blocks: blocks of the prefix cache that no sequence holds.
      num_pinned_blocks: blocks that pinned prefixes keep, in use or not.
      num_free_blocks: blocks that nobody refers to.
      num_table_entries: blocks that the sequences would hold if none were shared.
      num_token_slots: slots of allocated blocks that hold a token's keys and values, those that
        the step in flight computes included.
      num_queried_tokens: prompt tokens of admitted requests that read the prefix cache.
      num_hit_tokens: those of them that were found there.
      num_swapped_blocks: host memory that preempted requests take, in blocks.
      num_recomputations: times a request lost its blocks to be computed again.
      num_swaps: times a request's blocks were swapped out.
    """

    num_blocks: int
    block_size: int
    num_allocated_blocks: int
    num_shared_blocks: int
    num_cached_blocks: int
    num_pinned_blocks: int
    num_free_blocks: int
    num_table_entries: int
    num_token_slots: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_swapped_blocks: int
    num_recomputations: int
    num_swaps: int

    @property
    def num_wasted_slots(self) -> int:
        """Slots of allocated blocks without a token."""
        return self.num_allocated_blocks * self.block_size - self.num_token_slots

    @property
    def token_share(self) -> float:
        """The share of the allocated slots that hold a token; 1 where nothing is allocated."""
        slots = self.num_allocated_blocks * self.block_size
        return self.num_token_slots / slots if slots else 1.0

    @property
    def saved_share(self) -> float:
        """The share of the blocks that sharing saves, of those needed without; 0 if none is."""
        if not self.num_table_entries:
            return 0.0
        return 1 - self.num_allocated_blocks / self.num_table_entries

    @property
    def hit_rate(self) -> float:
        """`num_hit_tokens` of `num_queried_tokens`; 0 before the first query."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


class BlockUser(Protocol):
    """Who uses a memory: what a scheduler knows of it and the memory does not."""

    host_pool: HostPool
    num_preemptions: int

    @property
    def row_lens(self) -> Mapping[int, int]:
        """The tokens of each row in use that are computed, or will be by the step in flight."""
        ...


def kv_stats(memory: BlockTableMemory, user: BlockUser) -> KVStats:
    """Returns the statistics of a memory and its scheduler."""
    row_lens, host_pool = user.row_lens, user.host_pool
    state, cache, S = memory.state, memory.prefix_cache, memory.block_size
    num_blocks = memory.num_usable_blocks
    rows = list(row_lens)
    tables = np.asarray(state.tables)[rows]
    users = np.bincount(tables.ravel(), minlength=num_blocks + 1)
    users[0] = 0
    lens = np.array([row_lens[row] for row in rows], np.int64)
    filled = np.clip(lens[:, None] - np.arange(tables.shape[1]) * S, 0, S)
    tokens = np.zeros(num_blocks + 1, np.int64)
    np.maximum.at(tokens, tables, filled)
    tokens[0] = 0
    num_allocated, num_free = int(np.count_nonzero(users)), int(state.num_free)
    return KVStats(
        num_blocks=num_blocks,
        block_size=S,
        num_allocated_blocks=num_allocated,
        num_shared_blocks=int(np.count_nonzero(users > 1)),
        num_cached_blocks=num_blocks - num_free - num_allocated,
        num_pinned_blocks=len(memory.pins),
        num_free_blocks=num_free,
        num_table_entries=int(users.sum()),
        num_token_slots=int(tokens.sum()),
        num_queried_tokens=cache.num_queried_tokens if cache is not None else 0,
        num_hit_tokens=cache.num_hit_tokens if cache is not None else 0,
        num_swapped_blocks=host_pool.num_used,
        num_recomputations=user.num_preemptions - host_pool.num_swaps,
        num_swaps=host_pool.num_swaps,
    )
