"""Beam searches among other requests through the scheduler, the block tables and the mock model.

Each trace is a function of its seed: `run_trace(random_trace(seed))` repeats it.
"""

import collections
import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine.beam_search import BeamSearch
from pallas_paged.engine.groups import worst_case_blocks
from pallas_paged.engine.policies import (
    Order,
    PriorityOrder,
    Recovery,
    always_recompute,
    always_swap,
)
from pallas_paged.engine.scheduled import ScheduledStep
from pallas_paged.engine.sequence import Sequence, SequenceGroup
from tests.engine.mock_model import (
    VOCAB_SIZE,
    MockEngine,
    generate_alone,
    make_engine,
    search_alone,
)

NUM_TRACES = 300


def mixed_recovery(group: SequenceGroup) -> Recovery:
    """Some of each."""
    return "swap" if sum(s.num_computed for s in group.live) % 3 else "recompute"


@dataclasses.dataclass(frozen=True)
class Trace:
    """All that happens in a run."""

    options: dict[str, Any]
    overlap: tuple[bool, ...]  # turn by turn, again and again
    arrivals: tuple[tuple[int, SequenceGroup, int | None], ...]  # turn, request, turn of its abort


def beam_group(
    name: str, prompt: tuple[int, ...], max_tokens: int, **options: Any
) -> SequenceGroup:
    """A request for a beam search; options are those of the search but for its ending tokens."""
    eos = frozenset(options.pop("eos_token_ids", ()))
    stop = frozenset(options.pop("stop_token_ids", ()))
    beams = BeamSearch(max_tokens=max_tokens, ending_ids=eos | stop, **options)
    return SequenceGroup(
        name,
        prompt,
        max_tokens,
        num_seqs=beams.width,
        eos_token_ids=eos,
        stop_token_ids=stop,
        beams=beams,
    )


def random_group(rng: random.Random, name: str, max_model_len: int, width: int) -> SequenceGroup:
    prompt_len = rng.randint(1, min(max_model_len - 1, rng.choice([3, 3, 40])))
    common = rng.choice([0, prompt_len // 2, prompt_len])
    prompt = (*range(common), *(rng.randrange(VOCAB_SIZE) for _ in range(prompt_len - common)))
    max_tokens = rng.randint(1, max_model_len - prompt_len)
    eos = rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 3, 8]))
    stop = rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 2]))
    if rng.random() < 0.4:
        return SequenceGroup(
            name,
            prompt,
            max_tokens,
            num_seqs=rng.randint(1, width),
            eos_token_ids=frozenset(eos),
            stop_token_ids=frozenset(stop),
        )
    width = rng.randint(1, width)
    return beam_group(
        name,
        prompt,
        max_tokens,
        width=width,
        num_results=rng.randint(1, width),
        length_penalty=rng.choice([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=rng.choice([False, True, "never"]),
        eos_token_ids=eos,
        stop_token_ids=stop,
    )


def random_trace(seed: int) -> Trace:
    rng = random.Random(seed)
    max_model_len, block_size = rng.randint(4, 20), rng.choice([1, 1, 2, 2, 3, 4, 8])
    max_num_seqs = rng.randint(3, 9)
    width = rng.randint(1, rng.choice([3, max_num_seqs]))  # narrow ones run and grow together
    arrivals = []
    turn = worst = 0
    for i in range(rng.randint(2, 6)):
        turn += rng.choice([0, 0, 1, 3])
        group = random_group(rng, f"request-{i}", max_model_len, width)
        group.priority = rng.randint(0, 2)
        group.reads_cache, group.writes_cache = rng.random() < 0.9, rng.random() < 0.9
        length = group.num_prompt_tokens + group.max_tokens
        needed = worst_case_blocks(group.num_prompt_tokens, group.num_seqs, length, block_size)
        worst = max(worst, needed)
        abort = turn + rng.randint(0, 25) if rng.random() < 0.2 else None
        arrivals.append((turn, group, abort))
    swaps = rng.random() < 0.5
    return Trace(
        {
            "num_blocks": 1 + worst + rng.choice([0, 0, 0, 1, 4]),
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": rng.choice([1, 3, 5, 8, 16, 64]),
            "max_model_len": max_model_len,
            "enable_prefix_caching": rng.random() < 0.6,
            "num_host_blocks": rng.choice([8, 40, 200]) if swaps else 0,
            "choose_recovery": rng.choice([always_swap, mixed_recovery])
            if swaps
            else always_recompute,
            "order": PriorityOrder() if rng.random() < 0.3 else Order(),
            "watermark_blocks": rng.choice([0, 0, 1]),
        },
        rng.choice([(True,), (True,), (False,), (True, True, False)]),
        tuple(arrivals),
    )


def check_sharing(engine: MockEngine, groups: list[SequenceGroup]) -> None:
    """No two full blocks of one search hold the same tokens behind the same tokens.

    And so its blocks are as many as a count of distinct prefixes says, but for last ones.
    """
    state = engine.scheduler.memory.state
    S = state.block_size
    for group in groups:
        placed = [] if group.beams is None else [s for s in group.placed if s.row is not None]
        owner: dict[tuple[int, ...], int] = {}
        for sequence in placed:
            for end in range(S, sequence.num_reserved + 1, S):
                block = state.tables[sequence.row, end // S - 1].item()
                assert owner.setdefault(tuple(sequence.token_ids[:end]), block) == block
        assert len(set(owner.values())) == len(owner)
        partial = [s.num_reserved for s in placed if s.num_reserved % S]
        blocks = np.unique(state.tables[[s.row for s in placed]]) if placed else np.zeros(1)
        most = worst_case_blocks(
            group.num_prompt_tokens,
            group.num_seqs,
            group.num_prompt_tokens + group.max_tokens,
            S,
        )
        assert np.count_nonzero(blocks) <= min(len(owner) + len(partial), most)


def count_events(step: ScheduledStep, seen: collections.Counter[str]) -> None:
    beams = [share for share in step.scheduled if share.sequence.group.beams is not None]
    by_group: dict[SequenceGroup, list[Sequence]] = collections.defaultdict(list)
    for share in beams:
        by_group[share.sequence.group].append(share.sequence)
        seen["chunk"] += not share.samples
        seen["recomputed tree"] += share.sequence.leader is not None
    seen["beams in several steps"] += any(len(s) < len(s[0].group.live) for s in by_group.values())
    seen["mixed with others"] += 0 < len(beams) < len(step.scheduled)
    seen["copy on write"] += len(step.copies.src) if len(beams) == len(step.scheduled) else 0
    for group in step.preempted:
        if group.beams is not None:
            seen["preempted"] += 1
            seen["swapped out"] += group.swapped is not None


def run_trace(trace: Trace) -> collections.Counter[str]:
    """Runs a trace, checking every turn, and returns what happened in it."""
    engine = make_engine(**trace.options)
    scheduler = engine.scheduler
    arrivals = collections.deque(trace.arrivals)
    arrived: list[SequenceGroup] = []
    seen: collections.Counter[str] = collections.Counter()
    turn = 0
    while arrivals or scheduler.has_unfinished:
        while arrivals and arrivals[0][0] == turn:
            arrived.append(arrivals.popleft()[1])
            scheduler.add(arrived[-1])
        for _, group, abort_turn in trace.arrivals:
            if abort_turn == turn and group.beams is not None:
                seen[f"abort while {group.status.name}"] += 1
                seen["abort in flight"] += any(s.num_in_flight for s in group.live)
                seen["abort of a beam that waits"] += any(s.candidates for s in group.live)
            if abort_turn == turn:
                scheduler.abort(group.request_id)
        waiting = {g for g in arrived if any(s.candidates for s in g.live)}
        flying = {g for g in arrived if g.beams and any(s.num_in_flight for s in g.live)}
        step = engine.step(trace.overlap[turn % len(trace.overlap)])
        scheduler.check_invariants()
        check_sharing(engine, arrived)
        if step is not None:
            assert step.num_tokens <= trace.options["max_num_batched_tokens"]
            count_events(step, seen)
            seen["preempted while a beam waits"] += len(waiting & set(step.preempted))
            seen["preempted in flight"] += len(flying & set(step.preempted))
        turn += 1
        assert turn < 3000, "livelock"
    engine.drain()
    scheduler.check_invariants()
    assert scheduler.memory.num_free_blocks == scheduler.memory.num_usable_blocks
    searches = [group for group in arrived if group.beams is not None]
    seen["prefix hit"] += sum(g.num_cached_tokens > 0 for g in searches)
    seen.update(f"finish by {s.finish_reason}" for g in searches for s in g.sequences)
    return seen


def check_outputs(trace: Trace) -> None:
    """Every request has its own results alone."""
    for _, group, _ in trace.arrivals:
        finished = [s for s in group.sequences if s.finish_reason != "abort"]
        if group.beams is None:
            for sequence in finished:
                expected = generate_alone(sequence, trace.options["max_model_len"])
                actual = sequence.output_token_ids, sequence.finish_reason, sequence.stop_reason
                assert actual == expected
        elif finished:
            expected_results = search_alone(group)
            assert [tuple(s.output_token_ids) for s in finished] == [
                ended.tokens for ended in expected_results
            ]
            scores = [hypothesis.score for hypothesis in group.beams.results]
            assert scores == pytest.approx([ended.score for ended in expected_results])
            for sequence in finished:
                last = sequence.token_ids[-1]
                ends = last in group.eos_token_ids | group.stop_token_ids
                assert sequence.finish_reason == ("stop" if ends else "length")
                is_stop = last in group.stop_token_ids - group.eos_token_ids
                assert sequence.stop_reason == (last if is_stop else None)


@pytest.mark.usefixtures("unchecked_shapes")
def test_random_traces() -> None:
    seen: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_TRACES):
        trace = random_trace(seed)
        try:
            seen += run_trace(trace)
            check_outputs(trace)
        except BaseException as error:
            error.add_note(f"seed={seed}")
            raise
    for event in (
        "chunk",
        "recomputed tree",
        "beams in several steps",
        "mixed with others",
        "copy on write",
        "preempted",
        "preempted in flight",
        "preempted while a beam waits",
        "swapped out",
        "prefix hit",
        "abort while WAITING",
        "abort while RUNNING",
        "abort while SWAPPED",
        "abort in flight",
        "abort of a beam that waits",
        "finish by stop",
        "finish by length",
        "finish by abort",
    ):
        assert seen[event], f"the traces do not test {event!r}: {seen}"
