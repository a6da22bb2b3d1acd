"""Random lives of a scheduler over the block tables and the mock model, checked at every step.

Requests of all kinds arrive, are aborted, preempted, recomputed and swapped, prefixes are pinned,
in pools down to the smallest that admits the request at all. After every step the scheduler's, the
memory's and the block tables' invariants hold, and sharing is what `sharing_oracle` makes of the
tokens. With a sliding window, rows hold as many blocks as `WindowMachine` expects. When no more
requests come, all of them end within a bounded number of steps, each with the tokens that it gets
alone, and every block is back.

TRACES=3000 runs that many lives, new ones every time, instead of the same few.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pallas_paged.engine.core.beam_search import BeamSearch
from pallas_paged.engine.core.committer import Committed
from pallas_paged.engine.core.common_prefixes import ComingPrefixes
from pallas_paged.engine.core.policies import (
    ChooseRecovery,
    Order,
    PriorityOrder,
    Recovery,
    always_recompute,
    always_swap,
)
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.core.speculation import NgramProposer, NgramSettings
from pallas_paged.engine.kv.host_pool import DROPPED
from pallas_paged.engine.kv.sharing import longest_length, worst_case_blocks
from pallas_paged.engine.kv.stats import kv_stats
from tests.engine.mock_model import (
    VOCAB_SIZE,
    generate_alone,
    make_engine,
    sampled_token,
    search_alone,
)
from tests.engine.sharing_oracle import check_sharing

NUM_TRACES = int(os.environ.get("TRACES", "0"))


def host_stop(output_token_ids: list[int]) -> bool:
    """A "stop string" of two tokens."""
    return len(output_token_ids) >= 2 and sum(output_token_ids[-2:]) % 29 == 0


def mixed_recovery(group: SequenceGroup) -> Recovery:
    """Some of each."""
    return "swap" if sum(s.progress.num_computed for s in group.live) % 3 else "recompute"


class Guesses(NgramProposer):
    """Guesses that are often right: the mock model's own tokens, and now and then another."""

    def __init__(self, num_ahead: int) -> None:
        super().__init__(NgramSettings(5, min_gain=1.0))
        self.num_ahead = num_ahead

    def propose(self, sequence: TokenSequence, most: int) -> list[int]:
        tokens = list(sequence.token_ids)
        for place in range(min(most, 1 + len(tokens) % 5)):
            wrong = (len(tokens) + place) % 4 == 3
            tokens.append((sampled_token(tokens, sequence.index) + wrong) % VOCAB_SIZE)
        return tokens[len(sequence.token_ids) :]


@dataclasses.dataclass(frozen=True)
class Setting:
    """An engine, and how large a request it has just room for."""

    block_size: int
    largest: tuple[int, int]  # tokens, sequences
    spare_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    watermark_blocks: int
    enable_prefix_caching: bool
    num_host_blocks: int
    recovery: ChooseRecovery
    urgent: bool
    num_scheduler_steps: int
    speculates: bool
    worth_while: int  # tokens of a step with prompts
    step_cost: int  # tokens that a group waits for
    sliding_window: int | None = None

    @property
    def num_usable_blocks(self) -> int:
        """Just what the largest request takes, without a prompt in common, and the spare ones."""
        length, num_seqs = self.largest
        return num_seqs * -(-length // self.block_size) + self.spare_blocks


SETTING: dict[str, Any] = {
    "block_size": st.sampled_from([1, 2, 3, 4, 4, 8]),
    "largest": st.tuples(st.integers(8, 24), st.sampled_from([1, 1, 2])),
    "spare_blocks": st.sampled_from([0, 0, 0, 1, 2, 14]),
    "max_num_seqs": st.integers(3, 6),
    "max_num_batched_tokens": st.sampled_from([64, 64, 16, 8, 5, 3, 1]),
    "watermark_blocks": st.sampled_from([0, 0, 1, 3]),
    "enable_prefix_caching": st.sampled_from([True, True, True, False]),
    "num_host_blocks": st.sampled_from([40, 8, 0]),
    "recovery": st.sampled_from([always_recompute, always_swap, mixed_recovery]),
    "urgent": st.sampled_from([False, False, True]),
    "num_scheduler_steps": st.sampled_from([1, 3, 8, 8]),
    "speculates": st.booleans(),
    "worth_while": st.sampled_from([64, 64, 64, 9, 3]),
    "step_cost": st.sampled_from([0, 1, 1, 1, 4]),
}
SETTINGS = st.builds(Setting, **SETTING)
WINDOW_SETTINGS = st.builds(
    Setting, **SETTING, sliding_window=st.sampled_from([1, 2, 3, 4, 5, 8, 11])
)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request but for its tokens: a prefix that others have too, and a tail of its own."""

    num_common: int
    num_own: int
    max_tokens: int
    num_seqs: int
    priority: int
    salt: str | None
    reads_cache: bool
    writes_cache: bool
    num_ending: int  # tokens of the vocabulary that end it
    is_bold: bool  # asks for `max_tokens`, whether there is room or not
    is_held: bool  # nobody waits for single tokens, and no stop string ends it
    beams: dict[str, Any] | None  # how a beam search ends, if it is one


REQUESTS = st.builds(
    Request,
    num_common=st.sampled_from([0, 0, 2, 5, 8, 11, 12, 12]),
    num_own=st.sampled_from([0, 0, 1, 2, 5]),
    max_tokens=st.integers(6, 24),
    num_seqs=st.sampled_from([1, 1, 2, 2, 3, 6]),
    priority=st.integers(0, 2),
    salt=st.sampled_from([None, None, None, "a"]),
    reads_cache=st.sampled_from([True, True, True, False]),
    writes_cache=st.sampled_from([True, True, True, False]),
    num_ending=st.sampled_from([0, 0, 1, 3]),
    is_bold=st.sampled_from([False, False, False, True]),
    is_held=st.sampled_from([False, True, True]),
    beams=st.one_of(
        st.none(),
        st.none(),
        st.fixed_dictionaries(
            {
                "num_results": st.integers(1, 3),
                "length_penalty": st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
                "early_stopping": st.sampled_from([False, True, "never"]),
            }
        ),
    ),
)
ALIKE: dict[str, Any] = {"num_common": 12, "salt": None, "reads_cache": True, "writes_cache": True}
OVERLAPS = st.lists(st.sampled_from([True, True, True, False]), max_size=10)
MAX_MODEL_LEN = 32
PREFIX = tuple((7 * i * i + 3) % VOCAB_SIZE for i in range(12))


class SchedulerMachine(RuleBasedStateMachine):
    """One life; what happened in all of them is counted in `seen`."""

    seen: collections.Counter[str]

    @initialize(setting=SETTINGS)
    def start(self, setting: Setting) -> None:
        self.begin(setting)

    def begin(self, setting: Setting) -> None:
        """Begins a life."""
        self.setting = setting
        self.engine = make_engine(
            num_blocks=setting.num_usable_blocks + 1,
            block_size=setting.block_size,
            max_num_seqs=setting.max_num_seqs,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            watermark_blocks=setting.watermark_blocks,
            host_stop=host_stop,
            enable_prefix_caching=setting.enable_prefix_caching,
            num_host_blocks=setting.num_host_blocks,
            order=PriorityOrder() if setting.urgent else Order(),
            choose_recovery=setting.recovery,
            sliding_window=setting.sliding_window,
            num_scheduler_steps=setting.num_scheduler_steps,
            proposer=Guesses(setting.spare_blocks % 4) if setting.speculates else None,
            worth_while=self.worth_while,
            step_cost=setting.step_cost,
        )
        self.scheduler = self.engine.scheduler
        self.displace, self.scheduler._displace = self.scheduler._displace, self.displace_for_head
        self.displacer: SequenceGroup | None = None  # in the step that is being scheduled
        self.coming, self.scheduler._coming = self.scheduler._coming, self.coming_prefixes
        self.arrived: list[SequenceGroup] = []
        self.pinned: list[tuple[int, ...]] = []

    def worth_while(self, num_tokens: int, num_fixed: int) -> int:
        most = max(self.setting.worth_while, num_fixed + 1)
        self.seen["fewer are worth while"] += most < num_tokens
        return min(num_tokens, most)

    @rule(
        requests=st.lists(REQUESTS, min_size=1, max_size=4),
        are_alike=st.sampled_from([False, False, True]),
        overlaps=OVERLAPS,
    )
    def arrive(self, requests: list[Request], are_alike: bool, overlaps: list[bool]) -> None:
        if are_alike:
            requests = [dataclasses.replace(request, **ALIKE) for request in requests]
        for request in requests:
            group = self.make_group(request)
            length = min(group.num_prompt_tokens + group.max_tokens, MAX_MODEL_LEN)
            needed = worst_case_blocks(
                group.num_prompt_tokens, group.num_seqs, length, self.setting.block_size
            )
            fits = needed <= self.setting.num_usable_blocks
            fits &= group.num_seqs <= self.setting.max_num_seqs
            if not fits:
                with pytest.raises(ValueError, match=r"blocks|sequences run together"):
                    self.scheduler.add(group)
                self.seen["refused"] += 1
                continue
            try:
                self.scheduler.add(group)
            except ValueError:  # it does not fit beside the pins; alone it does
                while self.pinned:
                    self.unpin()
                self.scheduler.add(group)
            self.arrived.append(group)
        self.step(overlaps)

    def make_group(self, request: Request) -> SequenceGroup:
        number = len(self.arrived)
        own = tuple((5 * number + 11 * i) % VOCAB_SIZE for i in range(request.num_own))
        ending = [(13 * number + 17 * i) % VOCAB_SIZE for i in range(request.num_ending)]
        prompt = (PREFIX[: request.num_common] + own) or (number % VOCAB_SIZE,)
        num_seqs, max_tokens = request.num_seqs, request.max_tokens
        if not request.is_bold:  # takes what just fits
            if self.longest(len(prompt), num_seqs) <= len(prompt):
                num_seqs = 1
            max_tokens = min(max_tokens, max(1, self.longest(len(prompt), num_seqs) - len(prompt)))
        if request.beams is not None:
            max_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
            num_results = min(request.beams["num_results"], num_seqs)
            options = request.beams | {"width": num_seqs, "num_results": num_results}
            beams = BeamSearch(max_tokens=max_tokens, ending_ids=frozenset(ending), **options)
        group = SequenceGroup(
            f"request-{number}",
            prompt,
            max_tokens,
            beams=None if request.beams is None else beams,
            stop_token_ids=frozenset(ending[1:]),
            eos_token_ids=frozenset(ending[:1]),
            cache_salt=request.salt,
            reads_cache=request.reads_cache,
            writes_cache=request.writes_cache,
            priority=request.priority,
            num_seqs=num_seqs,
        )
        group.is_held = request.is_held and group.beams is None
        if self.setting.speculates and number % 3:
            group.waits_for_host = True
        return group

    def longest(self, prompt_len: int, num_seqs: int) -> int:
        """Returns the tokens of a sequence up to which the request fits."""
        usable, S = self.setting.num_usable_blocks, self.setting.block_size
        return longest_length(prompt_len, num_seqs, usable, S)

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(overlaps=OVERLAPS)
    def step(self, overlaps: list[bool]) -> None:
        for overlap in overlaps:
            self.turn(overlap)

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(place=st.integers(0, 5))
    def abort(self, place: int) -> None:
        live = [group for group in self.arrived if place == 0 or not group.is_finished]
        waiting = [g for g in live if g.swapped is not None or any(s.candidates for s in g.live)]
        group = (waiting or live)[place % len(waiting or live)]
        self.seen[f"abort while {group.status.name}"] += 1
        self.seen["abort in flight"] += any(
            sequence.group is group
            for step in self.scheduler._in_flight
            for sequence in step.batch.sequences
        )
        for _ in range(2):
            self.scheduler.abort(group.request_id)
        assert group.is_finished

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(place=st.integers(0, 5))
    def end_one(self, place: int) -> None:
        """Ends one of several completions, as a stop string does."""
        several = [g for g in self.arrived if len(g.live) > 1 and g.beams is None]
        running = [g for g in several if g.is_forked]
        for group in [g for g in running if any(s.leader for s in g.live)] or running:
            self.seen["one of several ended"] += 1
            self.scheduler.finish(group.live[place % len(group.live)], "abort")
            break

    @precondition(lambda self: self.setting.enable_prefix_caching)
    @rule(num_blocks=st.sampled_from([1, 1, 1, 2, 3]))
    def pin(self, num_blocks: int) -> None:
        tokens = PREFIX[: num_blocks * self.setting.block_size]
        with contextlib.suppress(ValueError):  # a request could not end beside it
            if self.scheduler.pin(tokens, None):
                self.pinned.append(tokens)
                self.seen["pin"] += 1

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        assert self.scheduler.unpin(self.pinned.pop(), None)

    @invariant()
    def everything_agrees(self) -> None:
        self.scheduler.check_invariants()
        self.check_blocks()

    def check_blocks(self) -> None:
        """Checks which blocks the rows have."""
        self.seen["blocks saved"] += check_sharing(self.scheduler, self.arrived)

    def displace_for_head(self) -> list[SequenceGroup]:
        """Notes for whom others give way."""
        head = next(iter(self.scheduler.queues.waiting), None)
        displaced = self.displace()
        self.displacer = head if displaced else None
        self.seen["displaced"] += len(displaced)
        return displaced

    def coming_prefixes(self) -> ComingPrefixes:
        """Notes who waits for blocks that another one fills."""
        coming = self.coming()
        holds_back = coming.holds_back

        def noted(group: SequenceGroup, hits: Sequence[int]) -> bool:
            waits = holds_back(group, hits)
            self.seen["waits for a prefix"] += waits
            return waits

        coming.holds_back = noted  # type: ignore[method-assign]
        return coming

    def turn(self, overlap: bool) -> None:
        """Turns the engine's loop once."""
        held = self.engine.in_flight[0].scheduled if self.engine.in_flight else ()
        S, tables = self.setting.block_size, self.scheduler.memory.tables
        written = {
            int(tables[one.row, place // S])
            for one in held
            if one.sequence.row is not None
            for place in range(one.start, one.start + one.num_tokens)
        }
        self.displacer = None
        step = self.engine.step(overlap)
        if self.displacer is not None:
            assert step is not None
            assert self.displacer in step.admitted, "preempted for nothing"
            assert self.displacer not in step.preempted
        self.everything_agrees()
        if not self.setting.urgent:
            states = [g.status is SequenceStatus.RUNNING for g in self.arrived if not g.is_finished]
            assert states == sorted(states, reverse=True), "somebody overtook"
        if step is not None:
            found = [s for g in step.admitted for s in g.live if s.row is not None]
            begins = (self.scheduler.memory.tables[s.row, : s.num_shared // S] for s in found)
            self.seen["hit in flight"] += any(not written.isdisjoint(b.tolist()) for b in begins)
            self.count(step, {share.sequence.group for share in held})

    def count(self, step: ScheduledStep, in_flight: set[SequenceGroup]) -> None:
        """Checks a step's size, and counts what is special about it."""
        assert 0 < step.num_tokens <= self.setting.max_num_batched_tokens
        assert len(step.scheduled) <= self.setting.max_num_seqs
        seen = self.seen
        for share in step.scheduled:
            seen["late token"] += share.sequence.is_finished
            seen["forked"] += share.num_tokens == 0
            seen["chunk"] += not share.samples
            seen["input on device"] += share.input_on_device
            seen["several steps"] += share.num_steps > 1
            seen["drafts"] += share.num_drafts
            seen["late tokens"] += share.num_steps > 1 and share.sequence.is_finished
            seen["recomputed tree"] += share.sequence.leader is not None
        beams = [s.sequence for s in step.scheduled if s.sequence.group.beams is not None]
        seen["beams with others"] += 0 < len(beams) < len(step.scheduled)
        for group in {beam.group for beam in beams}:
            here = [beam for beam in beams if beam.group is group]
            seen["beams in several steps"] += len(here) < len(group.live) == group.num_seqs
        seen["beams preempted"] += sum(group.beams is not None for group in step.preempted)
        seen["preempted in flight"] += len(in_flight & set(step.preempted))
        seen["preemption"] += len(step.preempted)
        seen["swapped out"] += len(step.swap_outs)
        seen["swapped in"] += len(step.swap_ins)
        seen["copy on write"] += len(step.copies.src)

    def max_turns(self) -> int:
        """A bound on the turns that are left: the earliest request makes progress in each of them.

        Once it is the earliest it is never preempted again. It is computed from the start at most
        once, then token by token; a turn more passes while its earlier life's step is in flight,
        and one while its last token is. Beams wait a turn for each token's candidates, as do others
        that wait for the host. If fewer tokens are worth while, one of a prompt is.
        """
        budget = self.setting.max_num_batched_tokens
        budget = 1 if self.setting.worth_while < budget else budget
        left = [group for group in self.arrived if not group.is_finished]
        return (len(left) if self.setting.urgent else 1) * sum(
            g.num_seqs * -(-(g.num_prompt_tokens + g.max_tokens) // budget)
            + g.max_tokens * (-(-g.num_seqs // budget) + g.waits_for_host)
            + 2
            for g in left
        )

    def teardown(self) -> None:
        """No more arrivals: everybody finishes."""
        if not hasattr(self, "engine"):
            return
        for _ in range(self.max_turns()):
            if not self.scheduler.has_unfinished:
                break
            self.turn(overlap=True)
        assert not self.scheduler.has_unfinished, "livelock"
        self.engine.drain()
        for tokens in self.pinned:
            assert self.scheduler.unpin(tokens, None)
        self.scheduler.check_invariants()
        memory = self.scheduler.memory
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert memory.num_free_blocks == memory.num_usable_blocks
        assert self.scheduler.host_pool.num_used == 0
        for group in self.arrived:
            if group.beams is not None:
                check_beams(group, self.setting.sliding_window)
        self.seen["prefix hit"] += sum(g.num_cached_tokens > 0 for g in self.arrived)
        for sequence in (s for group in self.arrived for s in group.sequences):
            self.seen[f"finish by {sequence.finish_reason}"] += 1
            if sequence.group.beams is not None:
                continue
            window = self.setting.sliding_window
            stop = None if sequence.group.is_held else host_stop
            tokens, *ending = generate_alone(sequence, MAX_MODEL_LEN, stop, window)
            if sequence.finish_reason == "abort":
                assert tokens[: sequence.num_output_tokens] == sequence.output_token_ids
                assert sequence.num_output_tokens < len(tokens)
            else:
                assert tokens == sequence.output_token_ids
                assert ending == [sequence.finish_reason, sequence.stop_reason]


class WindowMachine(SchedulerMachine):
    """Lives in which rows give back the blocks that have left a sliding window.

    A row drops its first blocks in the commit that fills one, and then has dropped all full ones
    but as many as hold a window. Nothing else changes how many it has dropped.
    """

    @initialize(setting=WINDOW_SETTINGS)
    def start(self, setting: Setting) -> None:
        self.begin(setting)
        self.memory = self.engine.runner.memory
        self.dropped: dict[TokenSequence, int] = {}
        self.commit, self.scheduler.commit = self.scheduler.commit, self.commit_and_check
        cache = self.memory.prefix_cache
        if cache is not None:
            self.find_last, cache._last_before_rows = cache._last_before_rows, self.note_forgotten

    def placed(self) -> list[TokenSequence]:
        live = [s for group in self.arrived for s in group.live]
        return [sequence for sequence in live if sequence.row is not None]

    def num_dropped(self, sequence: TokenSequence) -> int:
        """Returns how many entries in front of the row's first block are empty."""
        table = self.memory.tables[sequence.row]
        num_dropped = int(np.argmax(table > 0))
        num_blocks = -(-sequence.progress.num_reserved // self.setting.block_size)
        assert np.count_nonzero(table) == num_blocks - num_dropped > 0
        return num_dropped

    def commit_and_check(self, step: ScheduledStep, results: list[Any]) -> Committed:
        before = {s: (s.progress.num_remembered, self.num_dropped(s)) for s in self.placed()}
        committed = self.commit(step, results)
        assert self.setting.sliding_window is not None
        kept = -(-self.setting.sliding_window // self.setting.block_size)
        for sequence in self.placed():
            if sequence not in before:
                continue  # a beam that continues another one
            num_told, expected = before[sequence]
            if sequence.progress.num_remembered > num_told:
                expected = max(0, sequence.progress.num_remembered - kept)
                self.seen["dropped"] += expected
            assert self.num_dropped(sequence) == expected
        return committed

    def note_forgotten(self, candidates: np.ndarray) -> tuple[int, list[int]]:
        block, behind = self.find_last(candidates)
        self.seen["in use and forgotten"] += len(behind)
        return block, behind

    def check_blocks(self) -> None:
        """Whatever no row names and nobody has pinned can be taken."""
        rows = [sequence.row for sequence in self.placed()]
        used = set(np.unique(self.memory.tables[rows]).tolist()) - {0}
        num_taken = len(used | set(self.memory.pins))
        assert self.memory.num_free_blocks == self.memory.num_usable_blocks - num_taken
        stats = kv_stats(self.memory, self.scheduler)
        assert stats.num_allocated_blocks == len(used)
        assert stats.num_token_slots <= len(used) * self.setting.block_size
        slots = [s.swapped_slots for g in self.arrived for s in g.live if g.swapped is not None]
        self.seen["swapped without the first"] += any(each[:1] == (DROPPED,) for each in slots)


def check_beams(group: SequenceGroup, window: int | None) -> None:
    """A search that was not aborted has the results of the same search alone."""
    assert group.beams is not None
    if group.sequences[0].finish_reason == "abort":
        return
    expected = search_alone(group, window)
    assert [tuple(s.output_token_ids) for s in group.sequences] == [e.tokens for e in expected]
    scores = [hypothesis.score for hypothesis in group.beams.results]
    assert scores == pytest.approx([ended.score for ended in expected])
    for sequence in group.sequences:
        last = sequence.token_ids[-1]
        ends = last in group.eos_token_ids | group.stop_token_ids
        assert sequence.finish_reason == ("stop" if ends else "length")
        is_stop = last in group.stop_token_ids - group.eos_token_ids
        assert sequence.stop_reason == (last if is_stop else None)


def live(machine: type[SchedulerMachine], num_lives: int) -> collections.Counter[str]:
    """Returns what happened in so many lives."""
    seen: collections.Counter[str] = collections.Counter()
    run_state_machine_as_test(
        type("Machine", (machine,), {"seen": seen}),
        settings=settings(
            max_examples=NUM_TRACES or num_lives,
            stateful_step_count=15,
            deadline=None,
            derandomize=not NUM_TRACES,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return seen


def test_random_lives_with_a_sliding_window() -> None:
    seen = live(WindowMachine, 280)
    for event in (
        "dropped",
        "in use and forgotten",
        "swapped without the first",
        "swapped in",
        "prefix hit",
        "hit in flight",
        "pin",
        "chunk",
        "forked",
        "recomputed tree",
        "preempted in flight",
        "copy on write",
        "beams preempted",
        "several steps",
        "drafts",
    ):
        assert seen[event], f"the lives do not test {event!r}: {seen}"


def test_random_lives() -> None:
    seen = live(SchedulerMachine, 240)
    for event in (
        "chunk",
        "forked",
        "blocks saved",
        "prefix hit",
        "hit in flight",
        "waits for a prefix",
        "pin",
        "refused",
        "swapped out",
        "swapped in",
        "abort while SWAPPED",
        "copy on write",
        "recomputed tree",
        "input on device",
        "several steps",
        "drafts",
        "late token",
        "late tokens",
        "preemption",
        "preempted in flight",
        "displaced",
        "abort while WAITING",
        "abort while RUNNING",
        "abort while FINISHED",
        "abort in flight",
        "beams in several steps",
        "beams with others",
        "beams preempted",
        "finish by stop",
        "finish by length",
        "finish by abort",
    ):
        assert seen[event], f"the lives do not test {event!r}: {seen}"
