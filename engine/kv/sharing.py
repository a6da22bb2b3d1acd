"""What blocks a group of sequences needs: at its worst, and to come back after a preemption.

A group's sequences begin with the same prompt and may have more in common. Whatever full block of
tokens several of them begin with is one block of the pool.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

GIVEN_BACK = 0
"""In a row of the block tables: a block that the row does not have any more; the null block."""


type Root = Hashable | None
"""What blocks depend on beside their tokens, or what keeps a caller's apart from all others'."""


class CopyPairs(NamedTuple):
    """Blocks to copy before a step writes: `dst[i]` becomes `src[i]`'s content. i32[K] each."""

    src: np.ndarray
    dst: np.ndarray

    def and_then(self, other: "CopyPairs") -> "CopyPairs":
        """Returns these pairs and the other ones; no block is in both."""
        return CopyPairs(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


NO_COPIES = CopyPairs(np.zeros(0, np.int32), np.zeros(0, np.int32))


class FullBlocks(NamedTuple):
    """Blocks of a row that computed tokens have filled, or will in a step that is dispatched.

    Attributes:
      row: the row.
      token_ids: at least the tokens in these blocks.
      first: how many full blocks the row had when this was told before.
      end: how many it has.
      root: blocks of unequal roots are never shared.
      merges: whether the row may have other requests' equal blocks in place of its own now.
    """

    row: int
    token_ids: Sequence[int]
    first: int
    end: int
    root: Root
    merges: bool


class RowPlan(NamedTuple):
    """What a row of the block tables begins with.

    Attributes:
      num_tokens: tokens that the row has room for, at least 1.
      blocks: its ceil(num_tokens / S) blocks in order. A positive number is a block that has
        references already; a negative one is a block to allocate, the same one wherever the number
        comes in an admission; `GIVEN_BACK`, in front only, is one that the row never gets back.
      max_length: tokens at which its sequence ends, for a memory that never moves it; 0: unknown.
    """

    num_tokens: int
    blocks: tuple[int, ...]
    max_length: int = 0


class Branch(NamedTuple):
    """How a sequence's part of a group's tree is computed.

    Attributes:
      blocks: see `RowPlan`.
      leader: index of the sequence that computes the last block shared with it, or None.
      num_shared: tokens at the start that it does not compute; always fewer than it has.
    """

    blocks: tuple[int, ...]
    leader: int | None
    num_shared: int


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Returns how many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def worst_case_blocks(prompt_len: int, num_seqs: int, max_len: int, block_size: int) -> int:
    """Returns the most blocks a group can hold: the prompt's full ones, and each sequence's rest.

    Copy on write needs none beside them, because the last of the rows that share a block keeps it.
    """
    common = prompt_len // block_size
    return common + num_seqs * (blocks_for(max_len, block_size) - common)


def window_blocks(sliding_window: int, block_size: int) -> int:
    """Returns how many of its last full blocks a row keeps where no query sees further back.

    The query of a row's last computed token is among them: a beam that lost its blocks meanwhile
    computes it again.
    """
    return blocks_for(sliding_window, block_size)


def most_blocks(max_len: int, sliding_window: int | None, block_size: int) -> int:
    """Returns the most blocks of a sequence that decodes up to `max_len` tokens, its prompt aside.

    Behind the full blocks that it keeps there may be one that the step in flight fills, and one
    for the step after that. A prompt has all its blocks until it is computed.
    """
    num_blocks = blocks_for(max_len, block_size)
    if sliding_window is None:
        return num_blocks
    return min(num_blocks, window_blocks(sliding_window, block_size) + 2)


def longest_length(prompt_len: int, num_seqs: int, num_blocks: int, block_size: int) -> int:
    """Returns the `max_len` up to which `worst_case_blocks` is at most `num_blocks`."""
    common = prompt_len // block_size
    return (common + max(0, num_blocks - common) // num_seqs) * block_size


def plan_tree(
    token_ids: Sequence[Sequence[int]], hits: Sequence[Sequence[int]], block_size: int
) -> list[Branch]:
    """Returns the blocks of sequences that begin with full blocks of the same tokens: a tree.

    New blocks are numbered -1, -2, ... A sequence shares no block with its own last token, because
    somebody has to compute that one; nor may `hits`, the cached blocks that each begins with,
    reach that far.
    """
    S = block_size
    if len(token_ids) == 1:  # nobody to share with, and prompts may be long
        (ids,), (cached,) = token_ids, hits
        num_new = blocks_for(len(ids), S) - len(cached)
        return [Branch((*cached, *range(-1, -num_new - 1, -1)), None, len(cached) * S)]
    owners: dict[tuple[int, tuple[int, ...]], tuple[int, int | None]] = {}
    branches: list[Branch] = []
    num_new = 0
    for index, (ids, cached) in enumerate(zip(token_ids, hits, strict=True)):
        assert len(cached) * S < len(ids), "a hit of the last token, which is to be computed"
        blocks: list[int] = []
        leader, num_shared = None, 0
        for start in range(0, len(ids), S):
            parent = blocks[-1] if blocks else 0
            key = parent, tuple(ids[start : start + S])
            if len(blocks) < len(cached):
                owners.setdefault(key, (cached[len(blocks)], None))
            if key in owners and start + S < len(ids):
                block, leader = owners[key]
                num_shared = start + S
            else:
                num_new += 1
                block = -num_new
                if start + S <= len(ids):
                    owners.setdefault(key, (block, index))
            blocks.append(block)
        branches.append(Branch(tuple(blocks), leader, num_shared))
    return branches
