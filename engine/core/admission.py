"""Whether a group can run at all, whether it fits now, and how it gets its blocks."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pallas_paged.engine.core.entries import Entry, plan_entry, plan_return, sequences_to_place
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.core.swapping import swap_in
from pallas_paged.engine.kv.host_pool import DROPPED, BlockMove, HostPool
from pallas_paged.engine.kv.interface import Memory, Need, Space
from pallas_paged.engine.kv.sharing import (
    NO_COPIES,
    CopyPairs,
    Root,
    RowPlan,
    longest_length,
    worst_case_blocks,
)


class Arrival(NamedTuple):
    """A waiting group that fits: its blocks, and those of them that are cached."""

    group: SequenceGroup
    entry: Entry
    hits: list[list[int]]


class Room(NamedTuple):
    """What may be taken.

    Attributes:
      num_rows: rows.
      space: blocks.
      num_spared: blocks that are to be left.
      freed_rows: rows in use that are counted as free, with their blocks.
    """

    num_rows: int
    space: Space
    num_spared: int = 0
    freed_rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Admission:
    """Knows the limits of a scheduler, and none of its queues.

    Attributes:
      memory: whose rows and blocks the groups get.
      columns: of these rows.
      host_pool: where swapped groups wait.
      max_num_seqs: the most sequences that run at once.
      max_model_len: the most tokens of a sequence.
    """

    memory: Memory
    columns: RowColumns
    host_pool: HostPool
    max_num_seqs: int
    max_model_len: int

    def max_length(self, group: SequenceGroup) -> int:
        """Returns the tokens, prompt and output, at which a sequence of the group ends."""
        return min(group.num_prompt_tokens + group.max_tokens, self.max_model_len)

    def check(self, group: SequenceGroup) -> None:
        """Tells whether a group could run to its end if it had the whole pool for itself.

        Raises:
          ValueError: it could not, or it is empty.
        """
        name, prompt_len = group.request_id, group.num_prompt_tokens
        if prompt_len == 0:
            raise ValueError(f"request {name!r}: the prompt is empty; give at least one token")
        if group.max_tokens < 1:
            raise ValueError(f"request {name!r}: max_tokens={group.max_tokens} must be at least 1")
        if prompt_len >= self.max_model_len:
            raise ValueError(
                f"request {name!r}: a prompt of {prompt_len} tokens leaves no room for output in "
                f"max_model_len={self.max_model_len}; shorten the prompt or raise max_model_len"
            )
        self.check_num_seqs(name, group.num_seqs)
        num_blocks, others = self._worst_case(group), self._pinned_for_others(group)
        if num_blocks + others > self.memory.num_usable_blocks:
            pinned = f" besides {others} pinned for other prompts" if others else ""
            together = f" in each of {group.num_seqs} sequences" if group.num_seqs > 1 else ""
            raise ValueError(
                f"request {name!r}: {prompt_len} prompt tokens and max_tokens={group.max_tokens} "
                f"may take {self.max_length(group)} tokens{together}, {num_blocks} blocks, and the "
                f"KV cache has {self.memory.num_usable_blocks - others}{pinned}; lower max_tokens, "
                "shorten the prompt or enlarge the cache"
            )

    def check_num_seqs(self, request_id: str, num_seqs: int) -> None:
        """Tells whether so many sequences can run together.

        Raises:
          ValueError: they cannot.
        """
        if num_seqs > self.max_num_seqs:
            raise ValueError(
                f"request {request_id!r}: {num_seqs} sequences run together, and max_num_seqs="
                f"{self.max_num_seqs}; ask for fewer completions or raise max_num_seqs"
            )

    def longest_output(self, group: SequenceGroup) -> int:
        """Returns the largest `max_tokens` that `check` accepts; below 1 if there is none."""
        num_blocks = self.memory.num_usable_blocks - self._pinned_for_others(group)
        prompt_len, block_size = group.num_prompt_tokens, self.memory.block_size
        longest = longest_length(prompt_len, group.num_seqs, num_blocks, block_size)
        return min(longest, self.max_model_len) - prompt_len

    def pin(self, token_ids: Sequence[int], root: Root, groups: Iterable[SequenceGroup]) -> bool:
        """Keeps the full blocks of a prefix, however little memory there is.

        Returns False, and changes nothing, if not all of them are cached.

        Raises:
          ValueError: one of `groups`, which are unfinished, could not run to its end beside them.
        """
        if not self.memory.pin(token_ids, root):
            return False
        for group in groups:
            if not self.fits_beside_pins(group):
                self.memory.unpin(token_ids, root)
                raise ValueError(
                    f"pinning {len(token_ids) // self.memory.block_size} blocks would leave too "
                    f"few of {self.memory.num_usable_blocks} for request {group.request_id!r}; "
                    "pin fewer tokens, wait for the request's end, or enlarge the cache"
                )
        return True

    def fits_beside_pins(self, group: SequenceGroup) -> bool:
        """Whether a group that `check` accepted could still run to its end, alone."""
        needed = self._worst_case(group) + self._pinned_for_others(group)
        return needed <= self.memory.num_usable_blocks

    def arrival_of(self, group: SequenceGroup, room: Room) -> Arrival | None:
        """Returns how a waiting group would come in; None if the room does not suffice.

        What it needs is taken from `room.space`.
        """
        if group.num_rows > room.num_rows:
            return None
        hits = self.hits(group)
        entry = self._entry(group, hits)
        needed = entry.num_needed
        needed += self.memory.num_unreferenced(list(itertools.chain(*hits)), room.freed_rows)
        num_tokens = max(len(sequence.token_ids) for sequence in entry.placed)
        need = Need(needed, group.num_rows, num_tokens, self.max_length(group))
        fits = room.space.take(need, room.num_spared)
        return Arrival(group, entry, hits) if fits else None

    def hits(self, group: SequenceGroup) -> list[list[int]]:
        """Returns the cached blocks that the sequences which need a row may begin with."""
        return [self._hits(sequence) for sequence in sequences_to_place(group)]

    def enter(self, arrival: Arrival) -> None:
        """Lets a group's sequences begin with what they share, found or kept."""
        group, entry = arrival.group, arrival.entry
        for sequence, branch in zip(entry.placed, entry.branches, strict=True):
            sequence.num_shared = branch.num_shared
            if branch.leader is not None:
                sequence.leader = entry.placed[branch.leader]
            sequence.hits.clear()
        group.planned_entry = None
        group.is_forked = len(entry.placed) == len(group.live)
        if group.num_preemptions == 0 and group.reads_cache:
            num_cached = entry.branches[0].num_shared
            group.stats = group.stats._replace(num_cached_tokens=num_cached)
            self.memory.count_query(group.num_prompt_tokens, group.num_cached_tokens)

    def give_blocks(self, arrivals: Sequence[Arrival]) -> tuple[tuple[BlockMove, ...], CopyPairs]:
        """Gives all arrivals their rows; returns what to copy from the host, and between blocks.

        For those that `enter` was called for, in this step.
        """
        if not arrivals:
            return (), NO_COPIES
        self._give_rows(arrivals)
        return self._bring_back([a for a in arrivals if a.group.swapped is not None])

    def _give_rows(self, arrivals: Sequence[Arrival]) -> None:
        """Allocates the rows of all arrivals at once."""
        placed: list[tuple[TokenSequence, Progress]] = []
        plans: list[RowPlan] = []
        num_new = 0
        for group, entry, hits in arrivals:
            for sequence, branch, cached in zip(entry.placed, entry.branches, hits, strict=True):
                blocks = tuple(b if b >= 0 else b - num_new for b in branch.blocks)
                num_shared, num_tokens = branch.num_shared, len(sequence.token_ids)
                num_first = num_tokens if group.swapped is None else num_shared
                plans.append(RowPlan(num_first, blocks, group.max_length))
                num_computed = num_shared if branch.leader is None else 0
                num_remembered = num_shared // self.memory.block_size
                if group.swapped and sequence.swapped_slots[0] != DROPPED:
                    num_remembered = len(cached)
                progress = Progress(num_shared, num_computed, num_tokens, num_remembered)
                placed.append((sequence, progress))
            num_new += entry.num_new
        for (sequence, progress), row in zip(placed, self.memory.admit(plans), strict=True):
            sequence.take_row(self.columns, row, progress)

    def _bring_back(self, swapped: Sequence[Arrival]) -> tuple[tuple[BlockMove, ...], CopyPairs]:
        """Says what to copy from the host, and lets the rows grow for what was not kept."""
        if not swapped:
            return (), NO_COPIES
        tables = self.memory.tables
        moves = tuple(swap_in(entry.placed, tables, hits) for _, entry, hits in swapped)
        growing = [sequence for _, entry, _ in swapped for sequence in entry.placed]
        copies = self.memory.append(
            [sequence.row for sequence in growing if sequence.row is not None],
            [len(sequence.token_ids) - sequence.num_shared for sequence in growing],
        )
        assert copies is not None, "admitted without the blocks to grow"
        for arrival in swapped:
            assert arrival.group.swapped is not None
            self.host_pool.give_back(arrival.group.swapped, is_read=True)
            arrival.group.forget_swapped()
        return moves, copies

    def _worst_case(self, group: SequenceGroup) -> int:
        """Returns the most blocks of the pool that the group can take."""
        num_tokens, num_seqs, longest = (
            group.num_prompt_tokens,
            group.num_seqs,
            self.max_length(group),
        )
        most = worst_case_blocks(num_tokens, num_seqs, longest, self.memory.block_size)
        return self.memory.blocks_taken(Need(most, num_seqs, num_tokens, longest))

    def _pinned_for_others(self, group: SequenceGroup) -> int:
        return self.memory.num_pinned_for_others(self._hits(group.sequences[0]))

    def _entry(self, group: SequenceGroup, hits: list[list[int]]) -> Entry:
        """Returns how a waiting group would come in; planned again only if something has changed.

        A group may wait for many steps, and to plan the entry of a long prompt takes longer than
        all the rest of a step.
        """
        lengths = [(s, len(s.token_ids)) for s in sequences_to_place(group)]
        basis = group.swapped, group.num_rows, lengths, hits
        if group.planned_entry is None or group.planned_entry[0] != basis:
            plan = plan_entry if group.swapped is None else plan_return
            group.planned_entry = basis, plan(group, hits, self.memory.block_size)
        return group.planned_entry[1]

    def _hits(self, sequence: TokenSequence) -> list[int]:
        """Returns the cached blocks that the sequence may begin with."""
        group = sequence.group
        if not group.reads_cache:
            return []
        hits = self.memory.match(sequence.token_ids, group.cache_root, sequence.hits)
        if group.swapped is None:
            return hits
        # A group of which a sequence has no first block any more comes back as it left: a hit of
        # another one, and the group's own copy of that block, would be two blocks for one.
        if any(slot == DROPPED for other in group.live for slot in other.swapped_slots[:1]):
            return []
        return hits[: sequence.num_swapped // self.memory.block_size]  # nothing past what it kept
