"""Thousands of random traces through the scheduler, the block tables and the mock model.

Each trace is a function of its seed: `run_trace(random_trace(seed))` repeats it.
"""

import collections
import dataclasses
import random
from collections.abc import Iterator

import jaxtyping
import pytest

from pallas_paged.engine.groups import worst_case_blocks
from pallas_paged.engine.policies import (
    ChooseRecovery,
    Order,
    PriorityOrder,
    Recovery,
    always_recompute,
    always_swap,
)
from pallas_paged.engine.sequence import SequenceGroup, SequenceStatus
from tests.engine.mock_model import VOCAB_SIZE, MockEngine, generate_alone, make_engine

NUM_TRACES = 1200


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: the turn of the loop in which it comes, and in which it is aborted, if it is."""

    turn: int
    group: SequenceGroup
    abort_turn: int | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """All that happens in a run."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark_blocks: int
    enable_prefix_caching: bool
    num_host_blocks: int
    choose_recovery: ChooseRecovery
    order: Order
    overlap: tuple[bool, ...]  # turn by turn, again and again
    arrivals: tuple[Arrival, ...]
    pins: tuple[tuple[int, tuple[int, ...]], ...]  # the turn, and the tokens to pin then

    @property
    def max_turns(self) -> int:
        """A bound on the turns with work: the earliest request makes progress in each of them.

        Once it is the earliest it is never preempted again. It is computed from the start at most
        once, then token by token; a turn more passes while its earlier life's step is in flight,
        and one while its last token is.
        """
        urgent = isinstance(self.order, PriorityOrder)
        return (len(self.arrivals) if urgent else 1) * sum(
            g.num_seqs * (-(-(g.num_prompt_tokens + g.max_tokens) // self.max_num_batched_tokens))
            + g.max_tokens * -(-g.num_seqs // self.max_num_batched_tokens)
            + 2
            for g in (arrival.group for arrival in self.arrivals)
        )


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """The block tables' own tests check shapes; here that would be four fifths of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def host_stop(output_token_ids: list[int]) -> bool:
    """A "stop string" of two tokens."""
    return len(output_token_ids) >= 2 and sum(output_token_ids[-2:]) % 29 == 0


def mixed_recovery(group: SequenceGroup) -> Recovery:
    """Some of each."""
    return "swap" if sum(s.num_computed for s in group.live) % 3 else "recompute"


def random_trace(seed: int) -> Trace:
    rng = random.Random(seed)
    crowded = rng.random() < 0.6  # many requests at once, which begin small and grow
    max_model_len = rng.randint(10 if crowded else 2, 40)
    block_size = rng.choice([1, 2, 3, 4] if crowded else [1, 2, 3, 4, 8, 16])
    max_num_seqs = rng.randint(2, 6) if crowded else rng.randint(1, 6)
    swaps = rng.random() < 0.5
    order = PriorityOrder() if rng.random() < 0.3 else Order()
    grouped = rng.random() < 0.4
    prefix = [rng.randrange(VOCAB_SIZE) for _ in range(max_model_len)]
    arrivals = []
    turn = 0
    for i in range(rng.randint(3, 8) if crowded else rng.randint(1, 8)):
        turn += rng.choice([0, 0, 1]) if crowded else rng.choice([0, 1, 5, 20])
        prompt_len = rng.randint(1, 6 if crowded and rng.random() < 0.8 else max_model_len - 1)
        num_common = rng.choice([0, prompt_len // 2, prompt_len])
        group = SequenceGroup(
            f"request-{i}",
            tuple(prefix[:num_common])
            + tuple(rng.randrange(VOCAB_SIZE) for _ in range(prompt_len - num_common)),
            max_tokens=rng.randint(5, 25) if crowded else rng.randint(1, rng.choice([3, 25])),
            stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1]))),
            eos_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 2]))),
            cache_salt=rng.choice([None, None, None, "a"]),
            reads_cache=rng.random() < 0.9,
            writes_cache=rng.random() < 0.9,
            priority=rng.choice([0, 0, 1, 2]),
            num_seqs=min(rng.choice([1, 2, 2, 3, 6]), max_num_seqs) if grouped else 1,
        )
        abort_turn = turn + rng.randint(0, 20) if rng.random() < 0.15 else None
        arrivals.append(Arrival(turn, group, abort_turn))
    worst = max(
        worst_case_blocks(
            g.num_prompt_tokens,
            g.num_seqs,
            min(g.num_prompt_tokens + g.max_tokens, max_model_len),
            block_size,
        )
        for g in (arrival.group for arrival in arrivals)
    )
    return Trace(
        num_blocks=1 + worst + rng.choice([0, 0, 1, 2, 10]),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([1, 2, 3, 5, 8, 16, 64]),
        max_model_len=max_model_len,
        enable_prefix_caching=rng.random() < 0.6,
        num_host_blocks=rng.choice([8, 8, 40]) if swaps else 0,
        choose_recovery=rng.choice([always_swap, mixed_recovery]) if swaps else always_recompute,
        order=order,
        watermark_blocks=rng.choice([0, 0, 0, 1, 3]),
        overlap=rng.choice([(True,), (True,), (False,), (True, True, False)]),
        arrivals=tuple(arrivals),
        pins=tuple(
            (rng.randint(0, 40), tuple(prefix[: block_size * rng.randint(1, 3)]))
            for _ in range(rng.choice([0, 2, 4]))
        ),
    )


def check_first_come_first_served(engine: MockEngine, arrived: list[SequenceGroup]) -> None:
    """The running groups are the earliest unfinished ones."""
    states = [g.status is SequenceStatus.RUNNING for g in arrived if not g.is_finished]
    assert states == sorted(states, reverse=True)


def check_sharing(engine: MockEngine, arrived: list[SequenceGroup]) -> None:
    """No two full blocks of one group hold the same tokens behind the same tokens."""
    state = engine.runner.memory.state
    S = state.block_size
    for group in arrived:
        if group.num_seqs == 1:
            continue
        owner: dict[tuple[int, ...], int] = {}
        for sequence in group.live:
            for end in range(S, sequence.num_dispatched + 1, S):
                prefix = tuple(sequence.token_ids[:end])
                if len(prefix) == end:  # else its last token is on the device
                    block = state.tables[sequence.row, end // S - 1].item()
                    assert owner.setdefault(prefix, block) == block


def unpin_all(engine: MockEngine, pinned: list[tuple[int, ...]]) -> None:
    for tokens in pinned:
        assert engine.scheduler.unpin(tokens, None)
    pinned.clear()


def run_trace(trace: Trace) -> tuple[MockEngine, collections.Counter[str]]:
    """Runs a trace, checking every turn, and returns what happened in it."""
    options = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace)}
    del options["overlap"], options["arrivals"], options["pins"]
    engine = make_engine(**options, host_stop=host_stop)
    scheduler = engine.scheduler
    arrivals = collections.deque(trace.arrivals)
    arrived: list[SequenceGroup] = []
    pinned: list[tuple[int, ...]] = []
    seen: collections.Counter[str] = collections.Counter()
    turn = busy_turns = 0
    while arrivals or scheduler.has_unfinished:
        while arrivals and arrivals[0].turn == turn:
            arrived.append(arrivals.popleft().group)
            try:
                scheduler.add(arrived[-1])
            except ValueError:  # it does not fit beside the pins; alone it does
                seen["refused beside pins"] += 1
                unpin_all(engine, pinned)
                scheduler.add(arrived[-1])
        for tokens in (tokens for when, tokens in trace.pins if when == turn):
            try:
                if scheduler.pin(tokens, None):
                    pinned.append(tokens)
                    seen["pin"] += 1
            except ValueError:
                seen["pin refused"] += 1
        for arrival in trace.arrivals:
            if arrival.abort_turn == turn:
                seen[f"abort while {arrival.group.status.name}"] += 1
                seen["abort in flight"] += any(s.num_in_flight for s in arrival.group.live)
                scheduler.abort(arrival.group.request_id)
        busy_turns += scheduler.has_unfinished
        assert busy_turns <= trace.max_turns, "livelock"
        held = engine.in_flight[0].scheduled if engine.in_flight else ()
        step = engine.step(trace.overlap[turn % len(trace.overlap)])
        scheduler.check_invariants()
        if not isinstance(trace.order, PriorityOrder):
            check_first_come_first_served(engine, arrived)
        check_sharing(engine, arrived)
        if step is not None:
            assert 0 < step.num_tokens <= trace.max_num_batched_tokens
            assert len(step.scheduled) <= trace.max_num_seqs
            for share in step.scheduled:
                seen["late token"] += share.sequence.is_finished
                seen["forked"] += share.num_tokens == 0
                seen["chunk"] += not share.samples
                seen["input on device"] += share.input_on_device
            preempted_in_flight = {share.sequence.group for share in held} & set(step.preempted)
            seen["preempted in flight"] += len(preempted_in_flight)
            seen["finished while preempted"] += sum(
                s.is_finished for g in preempted_in_flight for s in g.sequences
            )
            seen["swapped out"] += len(step.swap_outs)
            seen["swapped in"] += len(step.swap_ins)
            seen["copy on write"] += len(step.copies.src)
            seen["recomputed tree"] += sum(
                share.sequence.leader is not None for share in step.scheduled
            )
            seen["several preempted"] += len(step.preempted) > 1
        turn += 1
    engine.drain()
    unpin_all(engine, pinned)
    assert scheduler.num_waiting == scheduler.num_running == 0
    assert scheduler.memory.num_free_blocks == scheduler.memory.num_usable_blocks
    seen["prefix hit"] += sum(g.num_cached_tokens > 0 for g in arrived)
    seen["preemption"] = scheduler.num_preemptions
    seen.update(f"finish by {s.finish_reason}" for g in arrived for s in g.sequences)
    return engine, seen


def check_outputs(trace: Trace) -> None:
    """Every request has its own tokens alone; an aborted one the first of them."""
    for sequence in (s for arrival in trace.arrivals for s in arrival.group.sequences):
        expected = generate_alone(sequence, trace.max_model_len, host_stop)
        if sequence.finish_reason == "abort":
            assert expected[0][: sequence.num_output_tokens] == sequence.output_token_ids
            assert sequence.num_output_tokens < len(expected[0])
        else:
            actual = sequence.output_token_ids, sequence.finish_reason, sequence.stop_reason
            assert actual == expected


@pytest.mark.usefixtures("unchecked_shapes")
def test_random_traces() -> None:
    seen: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_TRACES):
        trace = random_trace(seed)
        try:
            seen += run_trace(trace)[1]
            check_outputs(trace)
        except BaseException as error:
            error.add_note(f"seed={seed}")
            raise
    for event in (
        "chunk",
        "forked",
        "prefix hit",
        "pin",
        "pin refused",
        "refused beside pins",
        "swapped out",
        "swapped in",
        "abort while SWAPPED",
        "copy on write",
        "recomputed tree",
        "input on device",
        "late token",
        "preemption",
        "several preempted",
        "preempted in flight",
        "finished while preempted",
        "abort while WAITING",
        "abort while RUNNING",
        "abort while FINISHED",
        "abort in flight",
        "finish by stop",
        "finish by length",
        "finish by abort",
    ):
        assert seen[event], f"the traces do not test {event!r}: {seen}"
