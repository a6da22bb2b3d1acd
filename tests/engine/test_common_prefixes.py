"""Requests that run at the same time share their prefix from the dispatch on, and wait for it."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.common_prefixes import ComingPrefixes
from pallas_paged.engine.core.policies import PriorityOrder, always_swap
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.kv.block_events import BlockEvents, BlockStored
from tests.engine.mock_model import (
    MockEngine,
    device_of,
    generate_alone,
    make_engine,
    make_whole_engine,
)
from tests.engine.serving import assert_idle, make_llm
from tests.engine.sharing_oracle import check_sharing

PREFIX = tuple(range(1, 13))  # three blocks of 4
OVERLAP = pytest.mark.parametrize("overlap", [True, False])


def caching(**options: Any) -> MockEngine:
    return make_engine(**{"enable_prefix_caching": True, "step_cost": 9} | options)


def request(number: int, **options: Any) -> SequenceGroup:
    """A request with the prefix, and two tokens of its own."""
    return SequenceGroup(f"request {number}", (*PREFIX, 20 + number, 30), 5, **options)


def turn(engine: MockEngine, groups: Sequence[SequenceGroup], overlap: bool = True) -> list[tuple]:
    """Takes a step; returns who computes which tokens in it: the number, the first, how many."""
    step = engine.step(overlap)
    engine.scheduler.check_invariants()
    if engine.runner.window is None:
        check_sharing(engine.scheduler, groups)
    shares = step.scheduled if step is not None else ()
    return [(groups.index(s.sequence.group), s.start, s.num_tokens) for s in shares]


def finish(engine: MockEngine, groups: Sequence[SequenceGroup], overlap: bool = True) -> int:
    """Runs everything to its end, and checks the tokens; returns how many were computed."""
    num_computed = 0
    while engine.scheduler.has_unfinished:
        num_computed += sum(count for *_, count in turn(engine, groups, overlap))
    engine.drain()
    engine.scheduler.check_invariants()
    memory, window = engine.scheduler.memory, engine.runner.window
    assert memory.num_free_blocks == memory.num_usable_blocks
    for sequence in (s for group in groups for s in group.sequences):
        tokens, reason, _ = generate_alone(sequence, 64, window=window)
        if sequence.finish_reason == reason:
            assert sequence.output_token_ids == tokens
        else:
            assert sequence.output_token_ids == tokens[: sequence.num_output_tokens]
    return num_computed


@OVERLAP
def test_a_burst_computes_its_prefix_once(overlap: bool) -> None:
    engine, groups = caching(), [request(i) for i in range(6)]
    for group in groups:
        engine.scheduler.add(group)
    assert turn(engine, groups, overlap) == [(0, 0, 14)]
    assert turn(engine, groups, overlap) == [(0, 14, 1), *((i, 12, 2) for i in range(1, 6))]
    num_decoded = sum(group.max_tokens - 1 for group in groups)
    assert finish(engine, groups, overlap) + 25 <= 14 + 5 * 2 + num_decoded + 6 * overlap
    assert [group.num_cached_tokens for group in groups] == [0, 12, 12, 12, 12, 12]


@OVERLAP
@pytest.mark.parametrize("prompt_len", [40, 41, 44])
def test_each_waits_for_the_chunks_of_the_one_before(prompt_len: int, overlap: bool) -> None:
    """A long prompt takes several steps; of what is in no full block each computes its own."""
    engine = caching(max_num_batched_tokens=16, step_cost=4)
    prompt = tuple(i * i % 61 for i in range(prompt_len))
    groups = [SequenceGroup(name, (*prompt, i), 3) for i, name in enumerate("abc")]
    for group in groups:
        engine.scheduler.add(group)
    finish(engine, groups, overlap)
    num_found = prompt_len // 4 * 4
    assert [group.num_cached_tokens for group in groups] == [0, num_found, num_found]


def test_what_a_step_in_flight_fills_is_found() -> None:
    engine, groups = caching(step_cost=0), [request(i) for i in range(2)]
    engine.scheduler.add(groups[0])
    turn(engine, groups)
    assert engine.in_flight is not None
    engine.scheduler.add(groups[1])
    assert turn(engine, groups) == [(0, 14, 1), (1, 12, 2)]
    finish(engine, groups)


@pytest.mark.parametrize("window", [None, 4, 7])
@pytest.mark.parametrize("event", ["abort", "finish", "recompute", "swap", "nothing"])
@OVERLAP
def test_whatever_becomes_of_the_first(event: str, overlap: bool, window: int | None) -> None:
    """Before each step of its life; what it has filled, or a step in flight fills, is found."""
    for num_turns in itertools.count():
        options = {"choose_recovery": always_swap} if event == "swap" else {}
        engine = caching(
            max_num_batched_tokens=8,
            num_host_blocks=20,
            sliding_window=window,
            step_cost=1,
            **options,
        )
        first, second = groups = [request(i) for i in range(2)]
        engine.scheduler.add(first)
        for _ in range(num_turns):
            turn(engine, groups, overlap)
        if first.is_finished:
            break
        num_full = first.sequences[0].progress.num_dispatched // 4
        if event == "abort":
            engine.scheduler.abort(first.request_id)
        elif event == "finish":
            engine.scheduler.finish(first.sequences[0], "stop", "host")
        elif event in ("recompute", "swap") and num_turns:
            engine.scheduler._preempt(first)
        engine.scheduler.check_invariants()
        engine.scheduler.add(second)
        finish(engine, groups, overlap)
        if event in ("abort", "finish"):
            assert second.num_cached_tokens == 4 * min(num_full, 3)
        elif event == "nothing":
            assert second.num_cached_tokens == 12
    assert num_turns > 5


@pytest.mark.parametrize(
    "case",
    [
        "its own salt",
        "reads nothing",
        "the first writes nothing",
        "free steps",
        "dear steps",
        "other tokens",
        "no cache",
    ],
)
def test_nobody_waits_in_vain(case: str) -> None:
    cost = {"free steps": 0, "dear steps": 13}.get(case, 12)
    engine = caching(step_cost=cost, enable_prefix_caching=case != "no cache")
    first = request(0, writes_cache=case != "the first writes nothing")
    salt = "a" if case == "its own salt" else None
    second = request(1, cache_salt=salt, reads_cache=case != "reads nothing")
    if case == "other tokens":
        second = SequenceGroup("other", (*PREFIX[:11], 40, 41, 42), 5)
    for group in (first, second):
        engine.scheduler.add(group)
    assert turn(engine, [first, second]) == [(0, 0, 14), (1, 0, 14)]
    finish(engine, [first, second])


def test_nobody_overtakes_who_waits() -> None:
    engine = caching()
    groups = [request(0), request(1), SequenceGroup("other", (50, 51), 3)]
    for group in groups:
        engine.scheduler.add(group)
    assert turn(engine, groups) == [(0, 0, 14)]
    assert turn(engine, groups) == [(0, 14, 1), (1, 12, 2), (2, 0, 2)]
    finish(engine, groups)


def test_one_that_runs_is_waited_for_too() -> None:
    """Its last chunk leaves room in the step for one that has the same tokens before them."""
    engine = caching(max_num_batched_tokens=8)
    prompt = tuple(range(20))
    groups = [SequenceGroup(name, (*prompt, i), 3) for i, name in enumerate("ab")]
    engine.scheduler.add(groups[0])
    assert turn(engine, groups) == [(0, 0, 8)]
    engine.scheduler.max_num_batched_tokens = 32
    engine.scheduler._size = engine.scheduler._size._replace(max_num_tokens=32)
    engine.scheduler.add(groups[1])
    assert turn(engine, groups) == [(0, 8, 13)]
    assert turn(engine, groups) == [(0, 21, 1), (1, 20, 1)]
    finish(engine, groups)


def test_the_urgent_do_not_wait_for_others() -> None:
    engine = caching(order=PriorityOrder(), max_num_batched_tokens=8)
    groups = [request(0, priority=1), request(1, priority=0)]
    engine.scheduler.add(groups[0])
    assert turn(engine, groups) == [(0, 0, 8)]
    engine.scheduler._size = engine.scheduler._size._replace(max_num_tokens=64)
    engine.scheduler.max_num_batched_tokens = 64
    engine.scheduler._step_cost = 4
    engine.scheduler.add(groups[1])
    assert (1, 8, 6) in turn(engine, groups)
    finish(engine, groups)


def test_nobody_gives_way_for_one_that_waits() -> None:
    """The head would fit without the last one, but has a prefix in common with the first."""
    engine = caching(order=PriorityOrder(), max_num_batched_tokens=16, num_blocks=17)
    prompt = tuple(range(28))
    first = SequenceGroup("first", (*prompt, 1), 3)
    last = SequenceGroup("last", tuple(range(40, 60)), 9, priority=2)
    head = SequenceGroup("head", (*prompt, 2), 9, priority=1)
    groups = [first, last, head]
    engine.scheduler.add(last)
    engine.step(overlap=False)
    engine.step(overlap=False)
    engine.scheduler.add(first)
    engine.scheduler.add(head)
    while engine.scheduler.has_unfinished:
        step = engine.step()
        assert step is None or not step.preempted or head in step.admitted
    engine.drain()
    for group in groups:
        assert group.sequences[0].output_token_ids == generate_alone(group.sequences[0], 64)[0]


def test_the_head_of_a_long_queue_alone_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = caching(), []
    holds_back = ComingPrefixes.holds_back

    def counted(self: ComingPrefixes, group: SequenceGroup, hits: list[int]) -> bool:
        asked.append(group)
        return holds_back(self, group, hits)

    monkeypatch.setattr(ComingPrefixes, "holds_back", counted)
    groups = [request(i) for i in range(500)]
    for group in groups:
        engine.scheduler.add(group)
    assert turn(engine, groups) == [(0, 0, 14)]
    assert asked == groups[:2]


def test_a_step_that_fails_leaves_nothing() -> None:
    engine = make_whole_engine(enable_prefix_caching=True, block_size=4, max_num_seqs=4)
    device, memory = device_of(engine), engine.memory
    params = SamplingParams(temperature=0, max_tokens=3, detokenize=False)

    def run() -> None:
        while engine.has_unfinished:
            engine.step()

    def fail(event: str) -> None:
        if event.startswith("collect"):
            assert memory.match(PREFIX, None), "found in flight"
            raise RuntimeError("the device is gone")

    engine.add(engine.make_group(PREFIX, params))
    device.before = fail
    with pytest.raises(RuntimeError, match="the device is gone"):
        run()
    assert memory.match(PREFIX, None) == []
    device.before = lambda event: None
    group = engine.make_group(PREFIX, params)
    engine.add(group)
    run()
    assert group.num_cached_tokens == 0
    assert group.sequences[0].output_token_ids == generate_alone(group.sequences[0], 64)[0]


def test_events_tell_of_a_block_once_and_from_its_dispatch_on() -> None:
    engine, group = caching(), request(0)
    events = BlockEvents(4)
    engine.scheduler.memory.listen(events)
    engine.scheduler.add(group)
    engine.step()
    (stored,) = events.take()
    assert isinstance(stored, BlockStored)
    assert stored.token_ids == list(PREFIX)
    engine.drain()
    assert events.take() == []


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_the_tokens_are_those_without_a_cache(async_scheduling: bool) -> None:
    system = [5 + i * i % 40 for i in range(64)]
    prompts = [{"prompt_token_ids": [*system, 50 + i, 7]} for i in range(6)]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = []
    for enable_prefix_caching in (False, True):
        llm = make_llm(
            "llama-mha-tied",
            max_num_seqs=6,
            max_num_batched_tokens=256,
            block_size=4,
            num_blocks=200,
            async_scheduling=async_scheduling,
            enable_prefix_caching=enable_prefix_caching,
        )
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        found = [output.num_cached_tokens for output in outputs]
        assert found == ([0, *[64] * 5] if enable_prefix_caching else [0] * 6)
        assert_idle(llm)
    assert tokens[0] == tokens[1]
