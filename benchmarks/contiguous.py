"""The memory that paging replaces: every sequence reserves the longest one's place, in one piece.

So did FasterTransformer, which also ran static batches, and Orca in the paper's variant "Orca
(Max)" (Kwon et al. 2023, section 6.1). The device sees ordinary block tables, of blocks that lie
one behind the other: model, kernels and steps are those of the paged engine, and what differs is
how many sequences fit.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pallas_paged import block_tables
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.interface import Numbers
from pallas_paged.engine.kv.sharing import NO_COPIES, CopyPairs, RowPlan


class ContiguousMemory(BlockTableMemory):
    """`Memory` that is cut once into places for sequences of `max_model_len` tokens.

    Every method keeps the contract of `pallas_paged.engine.kv.interface.Memory`. What is left of
    the pool behind the last place is lost, as is what a sequence never grows into; `num_tokens` of
    `num_reserved_slots` slots hold keys and values.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        """Takes what `BlockTableMemory` takes, and may have fewer places than `max_num_seqs`.

        Raises:
          ValueError: not even one sequence of `max_model_len` tokens fits.
        """
        super().__init__(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self.blocks_per_place = self.state.tables.shape[1]
        self.num_places = min(max_num_seqs, (num_blocks - 1) // self.blocks_per_place)
        if not self.num_places:
            raise ValueError(
                f"num_blocks={num_blocks} has no room for one sequence of max_model_len="
                f"{max_model_len} tokens in one piece, {self.blocks_per_place} blocks; lower "
                "max_model_len or raise num_blocks"
            )
        self._lens = np.zeros(max_num_seqs, np.int32)

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of all places."""
        return self.num_places * self.blocks_per_place

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the places that no sequence has."""
        return (self.num_places - int(np.count_nonzero(self._lens))) * self.blocks_per_place

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._lens.sum())

    @property
    def num_reserved_slots(self) -> int:
        """Slots that sequences have reserved."""
        return int(np.count_nonzero(self._lens)) * self.blocks_per_place * self.state.block_size

    def blocks_taken(self, num_blocks: int, num_rows: int) -> int:
        """A sequence takes a whole place, however short; what does not fit one never fits."""
        fits = num_blocks <= num_rows * self.blocks_per_place
        return num_rows * self.blocks_per_place if fits else self.num_usable_blocks + 1

    def num_free_after(self, freed_rows: Sequence[int], rows: Numbers, num_tokens: Numbers) -> int:
        """Counts the freed rows' places; a sequence grows into what it has reserved."""
        return self.num_free_blocks + len(freed_rows) * self.blocks_per_place

    def admit(self, plans: Sequence[RowPlan]) -> list[int]:
        """Gives each sequence the lowest free place."""
        rows: list[int] = np.flatnonzero(self._lens[: self.num_places] == 0).tolist()
        rows = rows[: len(plans)]
        assert len(rows) == len(plans), f"no place for {len(plans) - len(rows)} sequences"
        self._lens[rows] = [plan.num_tokens for plan in plans]
        self._reserve()
        return rows

    def append(self, rows: Numbers, num_tokens: Numbers) -> CopyPairs | None:
        """Grows into what is reserved; a sequence never leaves its place."""
        lens = self._lens[list(rows)] + np.asarray(num_tokens, np.int32)
        if (lens > self.blocks_per_place * self.state.block_size).any():
            return None
        self._lens[list(rows)] = lens
        return NO_COPIES

    def drop_front(self, num_blocks: Mapping[int, int]) -> None:
        """Does nothing: a place goes back in one piece."""

    def free(self, rows: Sequence[int]) -> None:
        """Gives back the rows' places."""
        assert (self._lens[list(rows)] > 0).all(), f"free a row once: {list(rows)}"
        self._lens[list(rows)] = 0
        self._reserve()

    def free_all(self) -> None:
        """Gives back every place."""
        self._lens[:] = 0
        self._reserve()

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, each with a place in one piece of its own."""
        block_tables.check_invariants(self.state)
        rows = np.flatnonzero(self._lens).tolist()
        assert {row: int(self._lens[row]) for row in rows} == num_tokens
        assert np.flatnonzero(self.state.seq_lens).tolist() == rows
        assert (np.diff(self.state.tables[rows]) == 1).all(), "a place is not in one piece"

    def _reserve(self) -> None:
        """Replaces the block tables by those of the rows in use: each has its place whole."""
        num_blocks, M = len(self.state.ref_counts), self.blocks_per_place
        in_use = np.flatnonzero(self._lens)
        self._versions += 1
        tables = np.zeros_like(self.state.tables)
        tables[in_use] = 1 + in_use[:, None] * M + np.arange(M)
        seq_lens, ref_counts, free_blocks = (
            np.zeros_like(array)
            for array in (self.state.seq_lens, self.state.ref_counts, self.state.free_blocks)
        )
        seq_lens[in_use] = M * self.state.block_size
        ref_counts[tables[in_use]] = 1
        free = 1 + np.flatnonzero(ref_counts[1:num_blocks] == 0)
        free_blocks[: len(free)] = free
        self.state = dataclasses.replace(
            self.state,
            tables=tables,
            seq_lens=seq_lens,
            ref_counts=ref_counts,
            free_blocks=free_blocks,
            num_free=np.asarray(len(free), np.int32),
        )
