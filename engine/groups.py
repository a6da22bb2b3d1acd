"""What blocks a group of sequences needs: at its worst, and to come back after a preemption.

A group's sequences begin with the same prompt and may have more in common. Whatever full block of
tokens several of them begin with is one block of the pool.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.sequence import Sequence, SequenceGroup


class CopyPairs(NamedTuple):
    """Blocks to copy before a step writes: `dst[i]` becomes `src[i]`'s content. i32[K] each."""

    src: np.ndarray
    dst: np.ndarray

    def and_then(self, other: "CopyPairs") -> "CopyPairs":
        """Returns these pairs and the other ones; no block is in both."""
        return CopyPairs(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


NO_COPIES = CopyPairs(np.zeros(0, np.int32), np.zeros(0, np.int32))


class FullBlocks(NamedTuple):
    """Blocks of a row that computed tokens have filled.

    Attributes:
      row: the row.
      token_ids: at least the tokens in these blocks.
      first: how many full blocks the row had when this was told before.
      end: how many it has.
      salt: what keeps its request's blocks apart from others', or None.
      merges: whether the row may have other requests' equal blocks in place of its own.
    """

    row: int
    token_ids: Seq[int]
    first: int
    end: int
    salt: str | None
    merges: bool


class RowPlan(NamedTuple):
    """What a row of the block tables begins with.

    Attributes:
      num_tokens: tokens that the row has room for, at least 1.
      blocks: its ceil(num_tokens / S) blocks in order. A positive number is a block that has
        references already; a negative one is a block to allocate, the same one wherever the number
        comes in an admission.
    """

    num_tokens: int
    blocks: tuple[int, ...]


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


def longest_length(prompt_len: int, num_seqs: int, num_blocks: int, block_size: int) -> int:
    """Returns the `max_len` up to which `worst_case_blocks` is at most `num_blocks`."""
    common = prompt_len // block_size
    return (common + max(0, num_blocks - common) // num_seqs) * block_size


def plan_tree(token_ids: Seq[Seq[int]], hits: Seq[Seq[int]], block_size: int) -> list[Branch]:
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


def repeated_blocks(placed: Seq[Sequence], tables: np.ndarray, block_size: int) -> dict[int, int]:
    """Returns which full blocks of a group's rows repeat another one, and that one: {old: kept}.

    Blocks are equal that hold the same tokens behind equal blocks. Those before the first that is
    new since the memory was told (`num_remembered`) differ already, and one that it was told of is
    kept rather than a new one.
    """
    S = block_size
    num_full = [sequence.num_computed // S for sequence in placed]
    is_told = [s.num_remembered >= end for s, end in zip(placed, num_full, strict=True)]
    first = min(
        (s.num_remembered for s, told in zip(placed, is_told, strict=True) if not told),
        default=None,
    )
    kept: dict[int, int] = {}
    if first is None or len(placed) == 1:
        return kept
    owners: dict[tuple[int, tuple[int, ...]], int] = {}
    for index in sorted(range(len(placed)), key=lambda index: not is_told[index]):
        sequence = placed[index]
        blocks: list[int] = [0, *tables[sequence.row, : num_full[index]].tolist()]
        parent = blocks[first] if first < len(blocks) else 0
        for place in range(first, num_full[index]):
            key = kept.get(parent, parent), tuple(sequence.token_ids[place * S : (place + 1) * S])
            parent = blocks[place + 1]
            owner = owners.setdefault(key, parent)
            if owner != parent:
                kept[parent] = owner
    return kept


class Entry(NamedTuple):
    """How a waiting group comes into the block tables.

    Attributes:
      placed: the sequences that get a row now: all live ones, or before the first token only one.
      branches: one for each of them.
      num_new: blocks to allocate.
      num_needed: blocks that should be free: those, and what forked rows will copy on write.
    """

    placed: list[Sequence]
    branches: list[Branch]
    num_new: int
    num_needed: int


def sequences_to_place(group: SequenceGroup) -> list[Sequence]:
    """Returns the live sequences of a waiting group that need a row; before any output, one."""
    live = group.live
    return live if any(sequence.num_output_tokens for sequence in live) else live[:1]


def plan_entry(group: SequenceGroup, hits: Seq[Seq[int]], block_size: int) -> Entry:
    """Returns how a group starts, or starts again with all tokens it knows; changes nothing.

    `hits` are the cached blocks for each of `sequences_to_place`.
    """
    placed = sequences_to_place(group)
    branches = plan_tree([sequence.token_ids for sequence in placed], hits, block_size)
    num_new = -min(min(branch.blocks) for branch in branches)
    num_spares = 0
    if group.num_prompt_tokens % block_size:
        num_spares = group.num_rows - len(placed)
    return Entry(placed, branches, num_new, num_new + num_spares)
