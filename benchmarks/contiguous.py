"""The memory that paging replaces: a sequence has one piece, reserved when it comes in.

FasterTransformer reserved the longest length for each sequence of a static batch. Orca schedules by
iterations, and its memory is taken to be a buddy allocator's (Kwon et al. 2023, section 6.1), which
reserves as much as the engine can know: the longest length ("Max"), the prompt and the output's
length rounded up to a power of two ("Pow2"), or exactly what will be needed ("Oracle"). The last
two know how long an output will be, which no real system does.

The device sees ordinary block tables, of blocks that lie one behind the other: model, kernels and
steps are those of the paged engine, and what differs is how many sequences fit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.buddies import Buddies, order_of
from pallas_paged import block_tables
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.interface import CountedSpace, Need, Numbers, Space
from pallas_paged.engine.kv.sharing import NO_COPIES, CopyPairs, RowPlan, blocks_for

Reserve = Literal["max", "pow2", "oracle"]
RESERVES: tuple[Reserve, ...] = ("max", "pow2", "oracle")


class Place(NamedTuple):
    """A sequence's piece.

    Attributes:
      begin: where its piece begins, in units.
      num_units: asked for; the piece is the power of two that these fit into.
      num_reserved: tokens that it may grow to there.
      max_length: tokens at which it ends.
    """

    begin: int
    num_units: int
    num_reserved: int
    max_length: int


class Shares(NamedTuple):
    """What the slots of a pool hold, as shares of all: the parts of the paper's Fig. 2.

    Attributes:
      tokens: keys and values.
      reserved: nothing yet, but a token of the sequence will.
      internal: reserved, and no token will ever be there.
      external: outside of all reservations: what rounding up, and the pieces between, leave.
    """

    tokens: float
    reserved: float
    internal: float
    external: float


class ContiguousSpace(Space):
    """Free pieces, to be given away in their order."""

    def __init__(self, memory: "ContiguousMemory") -> None:
        self._buddies, self._units_of = memory.buddies.copy(), memory.units_of
        self._places_left = memory.num_free_rows

    def take(self, need: Need, num_spared: int) -> bool:
        """Takes a piece for each row; nobody grows beyond what is reserved: none is spared."""
        units = self._units_of(need.num_tokens, need.max_length)
        before = self._buddies.copy()
        if need.num_rows <= self._places_left and all(
            self._buddies.take(units) is not None for _ in range(need.num_rows)
        ):
            self._places_left -= need.num_rows
            return True
        self._buddies = before
        return False


class ContiguousMemory(BlockTableMemory):
    """`Memory` that gives each sequence one piece, and never moves it.

    Every method keeps the contract of `pallas_paged.engine.kv.interface.Memory`, but that sequences
    share nothing: `fork` is not for it, nor is a prefix cache.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        reserve: Reserve = "max",
    ) -> None:
        """Takes what `BlockTableMemory` takes, and how much is reserved for a sequence.

        Raises:
          ValueError: not even one sequence of `max_model_len` tokens fits.
        """
        super().__init__(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self.reserve, self._max_model_len = reserve, max_model_len
        self._width = self.state.tables.shape[1]
        # Pieces that are all equally long need not be powers of two.
        self._unit = self._width if reserve == "max" else 1
        if (num_blocks - 1) // self._width < 1:
            raise ValueError(
                f"num_blocks={num_blocks} has no room for one sequence of max_model_len="
                f"{max_model_len} tokens in one piece, {self._width} blocks; lower "
                "max_model_len or raise num_blocks"
            )
        self.buddies = Buddies((num_blocks - 1) // self._unit)
        self._lens = np.zeros(max_num_seqs, np.int32)
        self._places: dict[int, Place] = {}

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool that pieces are made of."""
        return self.buddies.num_units * self._unit

    @property
    def num_free_blocks(self) -> int:
        """Blocks outside of all pieces that sequences have."""
        return self.buddies.num_free * self._unit

    @property
    def num_free_rows(self) -> int:
        """Sequences that there are rows for."""
        return len(self._lens) - len(self._places)

    @property
    def max_places(self) -> int:
        """The most sequences that fit if each reserves the longest length."""
        return min(len(self._lens), self.num_usable_blocks // self._width)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._lens.sum())

    @property
    def num_reserved_slots(self) -> int:
        """Slots of the pieces that sequences have."""
        units = sum(self._piece_units(place.num_units) for place in self._places.values())
        return units * self._unit * self.state.block_size

    def shares(self, lens: Mapping[int, int]) -> Shares:
        """Returns what the pool's slots hold, with so many computed tokens in each row."""
        num_slots = (len(self.state.ref_counts) - 1) * self.state.block_size
        tokens = sum(lens.values())
        final = sum(place.max_length for place in self._places.values())
        reserved = sum(max(p.num_reserved, p.max_length) for p in self._places.values())
        parts = (tokens, final - tokens, reserved - final, num_slots - reserved)
        return Shares(*(part / num_slots for part in parts))

    def num_reserved_for(self, num_tokens: int, max_length: int) -> int:
        """Returns how many tokens are reserved for a sequence that comes with `num_tokens`."""
        if self.reserve == "max":
            return self._max_model_len
        if self.reserve == "oracle":
            return max_length
        rounded = num_tokens + (1 << order_of(max(1, max_length - num_tokens)))
        return min(rounded, self._max_model_len)

    def units_of(self, num_tokens: int, max_length: int) -> int:
        """Returns the units that a sequence asks for."""
        if self.reserve == "max":
            return 1
        return blocks_for(self.num_reserved_for(num_tokens, max_length), self.state.block_size)

    def blocks_taken(self, need: Need) -> int:
        """A sequence takes a whole piece; what is longer than the longest never fits."""
        fits = need.num_blocks <= need.num_rows * self._width
        units = self._piece_units(self.units_of(need.num_tokens, need.max_length))
        return need.num_rows * units * self._unit if fits else self.num_usable_blocks + 1

    def space(
        self,
        freed_rows: Sequence[int] = (),
        rows: Numbers = (),
        num_tokens: Numbers = (),
    ) -> Space:
        """A sequence grows into what it has reserved, so that growth takes nothing."""
        if not len(freed_rows):
            return ContiguousSpace(self)
        free = sum(self._piece_units(self._places[row].num_units) for row in freed_rows)
        return CountedSpace(self.num_free_blocks + free * self._unit)

    def admit(self, plans: Sequence[RowPlan]) -> list[int]:
        """Gives each sequence a piece, and the lowest free row."""
        rows: list[int] = np.flatnonzero(self._lens == 0)[: len(plans)].tolist()
        assert len(rows) == len(plans), f"no row for {len(plans) - len(rows)} sequences"
        for row, plan in zip(rows, plans, strict=True):
            longest = plan.max_length or self._max_model_len
            units = self.units_of(plan.num_tokens, longest)
            begin = self.buddies.take(units)
            assert begin is not None, f"no piece of {units} units for {plan}"
            reserved = self.num_reserved_for(plan.num_tokens, longest)
            self._places[row] = Place(begin, units, reserved, longest)
            self._lens[row] = plan.num_tokens
            self._occupy(row)
        return rows

    def append(self, rows: Numbers, num_tokens: Numbers) -> CopyPairs | None:
        """Grows into what is reserved; a sequence never leaves its piece."""
        rows = np.asarray(rows)
        lens = self._lens[rows] + np.asarray(num_tokens, np.int32)
        room = np.asarray(self.state.seq_lens)[rows]
        if (lens > room).any():
            return None
        self._lens[rows] = lens
        return NO_COPIES

    def drop_front(self, num_blocks: Mapping[int, int]) -> None:
        """Does nothing: a piece goes back whole."""

    def fork(self, parents: Sequence[int]) -> list[int]:
        """Is not for it.

        Raises:
          NotImplementedError: always; let each sample be a request.
        """
        raise NotImplementedError(
            "sequences in contiguous memory share nothing: let each sample be a request"
        )

    def free(self, rows: Sequence[int]) -> None:
        """Gives back the rows' pieces."""
        assert (self._lens[list(rows)] > 0).all(), f"free a row once: {list(rows)}"
        for row in rows:
            place = self._places.pop(row)
            self.buddies.give_back(place.begin, place.num_units)
        self._lens[list(rows)] = 0
        super().free(rows)

    def free_all(self) -> None:
        """Gives back every piece."""
        super().free_all()
        self.buddies = Buddies(self.buddies.num_units)
        self._places.clear()
        self._lens[:] = 0

    def check_invariants(self, num_tokens: dict[int, int]) -> None:
        """Asserts that exactly these rows are in use, each with a piece of its own."""
        block_tables.check_invariants(self.state)
        rows = np.flatnonzero(self._lens).tolist()
        assert {row: int(self._lens[row]) for row in rows} == num_tokens
        assert sorted(self._places) == rows
        used = sum(self._piece_units(place.num_units) for place in self._places.values())
        assert used + self.buddies.num_free == self.buddies.num_units, "pieces are lost"
        for row, place in self._places.items():
            count = int(self.num_blocks[row])
            assert (np.diff(self.state.tables[row, :count]) == 1).all(), "not in one piece"
            assert place.begin * self._unit == self.state.tables[row, 0] - 1

    def _piece_units(self, num_units: int) -> int:
        return 1 << order_of(num_units)

    def _occupy(self, row: int) -> None:
        """Lets a row of the block tables be its piece: all blocks that a sequence may use of it."""
        place, state = self._places[row], self.state
        count = min(place.num_units * self._unit, self._width)
        blocks = 1 + place.begin * self._unit + np.arange(count, dtype=np.int32)
        tables, seq_lens, ref_counts = (
            np.array(array) for array in (state.tables, state.seq_lens, state.ref_counts)
        )
        tables[row, :count] = blocks
        seq_lens[row] = count * state.block_size
        ref_counts[blocks] = 1
        free = np.flatnonzero(ref_counts[1:] == 0) + 1
        free_blocks = np.zeros_like(state.free_blocks)
        free_blocks[: len(free)] = free
        num_free = np.asarray(len(free), np.int32)
        self._versions[row] += 1
        self.state = dataclasses.replace(
            state,
            tables=tables,
            seq_lens=seq_lens,
            ref_counts=ref_counts,
            free_blocks=free_blocks,
            num_free=num_free,
        )
