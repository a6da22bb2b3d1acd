"""What the scheduler does, scenario by scenario.

`engine.step()` schedules and dispatches a step, then commits the one before: one step stays in
flight. With `overlap=False` nothing does. Blocks have 4 tokens unless a test says otherwise.
"""

from typing import Any

import numpy as np
import pytest

from pallas_paged.engine.core import token_plan
from pallas_paged.engine.core.policies import (
    CheaperRecovery,
    PriorityOrder,
    RecoveryCosts,
    always_swap,
)
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus, TokenSequence
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.core.scheduler import ScheduledStep, Scheduler
from tests.engine.mock_model import (
    MockEngine,
    generate_alone,
    make_engine,
    next_token,
    sampled_token,
)


def request(name: str, prompt_len: int, max_tokens: int = 8, **options: Any) -> TokenSequence:
    """The first sequence of a new group."""
    prompt = tuple(range(1, prompt_len + 1))
    return SequenceGroup(name, prompt, max_tokens, **options).sequences[0]


def add(engine: MockEngine, *sequences: TokenSequence) -> None:
    for sequence in sequences:
        engine.scheduler.add(sequence.group)


def shares(step: ScheduledStep | None) -> dict[str, tuple[int, int]]:
    """The (start, num_tokens) of every sequence in the step."""
    assert step is not None
    return {s.sequence.request_id: (s.start, s.num_tokens) for s in step.scheduled}


def blocks_in_use(engine: MockEngine) -> int:
    return engine.scheduler.memory.num_usable_blocks - engine.scheduler.memory.num_free_blocks


def order_of_admission(engine: MockEngine, *waiting: TokenSequence) -> list[TokenSequence]:
    """Runs to the end and returns the sequences as they got rows."""
    admitted: list[TokenSequence] = []
    while engine.scheduler.has_unfinished:
        engine.step()
        admitted += [s for s in waiting if s.row is not None and s not in admitted]
    engine.drain()
    return admitted


def assert_as_if_alone(engine: MockEngine, *sequences: TokenSequence) -> None:
    """All blocks are back, and each request ended as it does alone."""
    engine.scheduler.check_invariants()
    assert blocks_in_use(engine) == 0
    for s in sequences:
        expected = generate_alone(s, engine.scheduler.admission.max_model_len, engine.host_stop)
        assert (s.output_token_ids, s.finish_reason, s.stop_reason) == expected


class TestOneRequest:
    def test_prefill_then_decode(self) -> None:
        engine, a = make_engine(), request("a", 3, max_tokens=3)
        add(engine, a)
        prefill, decode, last = (engine.step() for _ in range(3))
        assert [shares(step) for step in (prefill, decode, last)] == [
            {"a": (0, 3)},
            {"a": (3, 1)},
            {"a": (4, 1)},
        ]
        assert prefill is not None
        assert decode is not None
        assert prefill.scheduled[0].samples
        assert not prefill.scheduled[0].input_on_device
        assert decode.scheduled[0].input_on_device
        engine.run()
        assert_as_if_alone(engine, a)

    def test_without_overlap_the_host_knows_every_input(self) -> None:
        engine, a = make_engine(), request("a", 3, max_tokens=3)
        add(engine, a)
        for _ in range(3):
            step = engine.step(overlap=False)
            assert step is not None
            assert not step.scheduled[0].input_on_device
        assert_as_if_alone(engine, a)

    def test_nothing_to_schedule(self) -> None:
        engine = make_engine()
        assert engine.step() is None

    def test_step_n_plus_1_is_dispatched_before_the_tokens_of_step_n_are_known(self) -> None:
        engine = make_engine()
        add(engine, request("a", 3, max_tokens=3))
        engine.run()
        assert engine.events == [
            "dispatch 0",
            "dispatch 1",
            "collect 0",
            "dispatch 2",
            "collect 1",
            "collect 2",
        ]

    @pytest.mark.parametrize("ending", ["length", "stop"])
    def test_a_step_may_give_several_tokens(self, ending: str) -> None:
        """The next step computes all of them; what comes after the end is dropped."""
        prompt = [1, 2, 3]
        output: list[int] = []
        while len(output) < 12:
            output.append(sampled_token([*prompt, *output], 0))
        stop = frozenset(output[4:5] if ending == "stop" else ())
        engine = make_engine()
        a = request("a", 3, max_tokens=8, stop_token_ids=stop, waits_for_host=True)
        add(engine, a)
        lengths = []
        while (step := engine.scheduler.schedule()) is not None:
            lengths.append(step.scheduled[0].num_tokens)
            first = engine.runner.collect(engine.runner.dispatch(step))
            begin = a.num_output_tokens
            assert first == output[begin : begin + 1]
            a.columns.has_told[a.row] = True  # so that a single token is told as a token alone
            committed = engine.scheduler.commit(step, [output[begin : begin + 3]])
            assert committed == (a.num_output_tokens - begin, [a], ([], [], []))
            engine.scheduler.check_invariants()
        assert lengths == [3, 3, 3][: 2 + (ending == "length")]
        assert_as_if_alone(engine, a)

    def test_a_group_that_waits_for_the_host_runs_in_every_second_step(self) -> None:
        """Its last token is known whenever it goes on; the others do not wait with it."""
        engine = make_engine()
        waiting = request("waits", 3, max_tokens=4, num_seqs=2, waits_for_host=True)
        other = request("other", 3, max_tokens=8)
        add(engine, waiting, other)
        steps = []
        while engine.scheduler.has_unfinished:
            step = engine.step()
            engine.scheduler.check_invariants()
            steps.append(step.scheduled if step is not None else [])
        engine.drain()
        mine = [[one for one in step if one.sequence.request_id == "waits"] for step in steps]
        assert [len(step) for step in mine[:8]] == [2, 0, 2, 0, 2, 0, 2, 0]
        assert not any(one.input_on_device for step in mine for one in step)
        assert all("other" in {one.sequence.request_id for one in step} for step in steps[:8])
        assert_as_if_alone(engine, *waiting.group.sequences, other)

    @pytest.mark.parametrize("num_host_blocks", [0, 20])
    def test_a_group_that_waits_for_the_host_may_lose_its_blocks(
        self, num_host_blocks: int
    ) -> None:
        engine = make_engine(
            num_blocks=9, num_host_blocks=num_host_blocks, choose_recovery=always_swap
        )
        both = [request(name, 5, max_tokens=18, waits_for_host=name == "b") for name in "ab"]
        add(engine, *both)
        while engine.scheduler.has_unfinished:
            engine.step()
            engine.scheduler.check_invariants()
        engine.drain()
        assert both[1].group.num_preemptions
        assert_as_if_alone(engine, *both)

    def test_counts_of_dispatched_computed_and_pending_tokens(self) -> None:
        engine, a = make_engine(), request("a", 6, max_tokens=4)
        add(engine, a)
        engine.step()
        assert (a.progress.num_dispatched, a.progress.num_computed, a.num_pending) == (6, 0, 1)
        assert (a.num_tokens, len(a.token_ids)) == (7, 6)
        engine.step()
        assert (a.progress.num_dispatched, a.progress.num_computed, a.num_pending) == (7, 6, 1)
        assert (a.num_tokens, len(a.token_ids)) == (8, 7)
        assert a.output_token_ids == [next_token([1, 2, 3, 4, 5, 6])]
        engine.drain()
        assert (a.progress.num_dispatched, a.progress.num_computed, a.num_pending) == (7, 7, 0)


class TestEnd:
    def test_max_tokens_never_dispatches_a_token_too_many(self) -> None:
        engine, a = make_engine(), request("a", 3, max_tokens=2)
        add(engine, a)
        engine.step()
        engine.step()
        assert engine.step() is None  # its last token is in flight
        assert a.finish_reason == "length"
        assert_as_if_alone(engine, a)

    def test_max_model_len_ends_by_length(self) -> None:
        engine, a = make_engine(max_model_len=10), request("a", 7, max_tokens=100)
        add(engine, a)
        engine.run()
        assert (a.num_output_tokens, a.finish_reason) == (3, "length")

    @pytest.mark.parametrize(
        ("options", "stop_reason"),
        [
            ({"eos_token_ids": {0}}, None),
            ({"stop_token_ids": {0}}, 0),
            ({"eos_token_ids": {0}, "stop_token_ids": {0}}, None),
        ],
        ids=["eos", "stop token", "both"],
    )
    def test_stop_reason(self, options: dict[str, Any], stop_reason: int | None) -> None:
        assert next_token([58]) == 0
        options = {k: frozenset(v) for k, v in options.items()}
        (a,) = SequenceGroup("a", (58,), 8, **options).sequences
        engine = make_engine()
        add(engine, a)
        engine.run()
        assert (a.output_token_ids, a.finish_reason, a.stop_reason) == ([0], "stop", stop_reason)

    def test_stop_token_in_the_last_place_is_a_stop(self) -> None:
        (a,) = SequenceGroup("a", (58,), 1, eos_token_ids=frozenset({0})).sequences
        engine = make_engine()
        add(engine, a)
        engine.run()
        assert a.finish_reason == "stop"

    def test_late_token_is_dropped_and_blocks_are_back_at_once(self) -> None:
        (a,) = SequenceGroup("a", (58,), 8, eos_token_ids=frozenset({0})).sequences
        engine = make_engine()
        add(engine, a)
        engine.step()
        engine.step()  # dispatches a step with `a`, then learns that `a` has ended
        assert a.status is SequenceStatus.FINISHED
        assert blocks_in_use(engine) == 0
        engine.drain()
        assert a.output_token_ids == [0]

    def test_freed_row_and_blocks_serve_the_next_step_while_the_late_one_is_in_flight(self) -> None:
        (a,) = SequenceGroup("a", (58,), 4, eos_token_ids=frozenset({0})).sequences
        b = request("b", 7, max_tokens=1)
        engine = make_engine(num_blocks=3, max_num_seqs=1)
        add(engine, a, b)
        engine.step()
        late = engine.step()
        assert late is not None
        step = engine.step()
        assert step is not None
        assert step.scheduled[0].sequence is b
        assert step.scheduled[0].row == late.scheduled[0].row
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_stop_string_found_by_the_host(self) -> None:
        a = request("a", 3)
        engine = make_engine(host_stop=lambda output: len(output) == 2)
        add(engine, a)
        engine.run()
        assert a.num_output_tokens == 2
        assert_as_if_alone(engine, a)

    def test_finish_leaves_a_finished_sequence_alone(self) -> None:
        engine, a = make_engine(), request("a", 3, max_tokens=1)
        add(engine, a)
        engine.run()
        engine.scheduler.finish(a, "abort")
        assert (a.finish_reason, a.stop_reason) == ("length", None)


class TestChunkedPrefill:
    def test_long_prompt_is_computed_within_the_budget_and_sampled_once(self) -> None:
        engine, a = make_engine(max_num_batched_tokens=4), request("a", 10, max_tokens=1)
        add(engine, a)
        steps = [engine.step() for _ in range(3)]
        assert [shares(step)["a"] for step in steps] == [(0, 4), (4, 4), (8, 2)]
        assert [step.scheduled[0].samples for step in steps if step] == [False, False, True]
        engine.run()
        assert_as_if_alone(engine, a)

    def test_decodes_come_first_and_the_prompt_gets_the_rest(self) -> None:
        engine = make_engine(max_num_batched_tokens=4)
        a, b, c = request("a", 3), request("b", 6), request("c", 2)
        add(engine, a, b, c)
        assert shares(engine.step()) == {"a": (0, 3), "b": (0, 1)}
        assert engine.scheduler.num_waiting == 1, "no blocks before there is a token to compute"
        assert shares(engine.step()) == {"a": (3, 1), "b": (1, 3)}
        assert shares(engine.step()) == {"a": (4, 1), "b": (4, 2), "c": (0, 1)}
        assert shares(engine.step()) == {"a": (5, 1), "b": (6, 1), "c": (1, 1)}
        engine.run()
        assert_as_if_alone(engine, a, b, c)

    def test_last_chunk_of_one_token_is_no_decode_of_a_pending_token(self) -> None:
        engine, a = make_engine(max_num_batched_tokens=4), request("a", 5, max_tokens=2)
        add(engine, a)
        engine.step()
        step = engine.step()
        assert step is not None
        assert shares(step) == {"a": (4, 1)}
        assert not step.scheduled[0].input_on_device
        assert blocks_in_use(engine) == 2
        engine.run()
        assert_as_if_alone(engine, a)


class TestAdmission:
    def test_takes_blocks_for_the_whole_prompt_though_it_is_computed_in_chunks(self) -> None:
        engine = make_engine(max_num_batched_tokens=4)
        add(engine, request("a", 10))
        engine.step()
        assert blocks_in_use(engine) == 3

    def test_bounded_by_rows(self) -> None:
        engine = make_engine(max_num_seqs=2)
        add(engine, *(request(name, 3) for name in "abc"))
        assert set(shares(engine.step())) == {"a", "b"}

    def test_bounded_by_blocks_and_nobody_overtakes(self) -> None:
        engine = make_engine(num_blocks=4)
        a, big, small = request("a", 8, 4), request("big", 8, 4), request("small", 1, 1)
        add(engine, a, big, small)
        assert set(shares(engine.step())) == {"a"}  # one block is left, enough for `small`
        engine.run()
        assert_as_if_alone(engine, a, big, small)

    def test_watermark_stays_free_unless_nothing_runs(self) -> None:
        engine = make_engine(num_blocks=5, watermark_blocks=2)
        a, b = request("a", 4, max_tokens=4), request("b", 5, max_tokens=8)
        add(engine, a, b)
        assert set(shares(engine.step())) == {"a"}  # leaves 3 blocks; with `b` it would be 1
        engine.run()
        c = request("c", 12, max_tokens=4)
        add(engine, c)
        assert set(shares(engine.step())) == {"c"}  # leaves 1, but runs alone
        engine.run()
        assert_as_if_alone(engine, a, b, c)

    def test_samples_wait_for_the_blocks_that_they_will_copy_to(self) -> None:
        engine = make_engine(num_blocks=5)
        a, b = request("a", 4, max_tokens=4), request("b", 6, max_tokens=2, num_seqs=3)
        add(engine, a, b)
        assert set(shares(engine.step())) == {"a"}  # leaves 3: the prompt's 2, and 1 of 2 copies
        engine.run()
        assert engine.scheduler.num_preemptions == 0
        assert_as_if_alone(engine, a, *b.group.sequences)

    def test_default_watermark(self) -> None:
        for num_blocks, expected in ((3, 1), (101, 1), (1001, 10)):
            engine = make_engine(num_blocks=num_blocks, watermark_blocks=None)
            assert engine.scheduler.watermark_blocks == expected

    def test_id_is_free_again_when_its_request_has_ended(self) -> None:
        engine, a = make_engine(), request("same", 3)
        add(engine, a)
        engine.step()
        engine.scheduler.abort("same")  # its step is still in flight
        b = request("same", 4)
        add(engine, b)
        engine.run()
        assert_as_if_alone(engine, b)
        assert a.output_token_ids == []

    @pytest.mark.parametrize(
        ("sequence", "message"),
        [
            (request("a", 0), r"'a': the prompt is empty; give at least one token"),
            (request("a", 1, max_tokens=0), r"'a': max_tokens=0 must be at least 1"),
            (request("a", 32), r"32 tokens leaves no room .* max_model_len=32; shorten the prompt"),
            (
                request("a", 10, max_tokens=11),
                r"10 prompt tokens and max_tokens=11 may take 21 tokens, 6 blocks, and the KV cache"
                r" has 5; lower max_tokens",
            ),
            (request("a", 31, max_tokens=100), r"may take 32 tokens, 8 blocks"),
            (request("taken", 3), r"request_id='taken' is taken by an unfinished request"),
        ],
        ids=["empty", "max_tokens", "too long", "too big", "too big when capped", "taken"],
    )
    def test_refuses_what_can_never_run(self, sequence: TokenSequence, message: str) -> None:
        engine = make_engine(num_blocks=6, max_model_len=32)
        taken = request("taken", 10, max_tokens=10)  # 5 blocks: just fits
        add(engine, taken)
        with pytest.raises(ValueError, match=message):
            engine.scheduler.add(sequence.group)
        engine.run()
        assert_as_if_alone(engine, taken)

    @pytest.mark.parametrize(
        "option", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "watermark_blocks"]
    )
    def test_refuses_impossible_settings(self, option: str) -> None:
        settings = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2}
        memory = make_engine().scheduler.memory
        with pytest.raises(ValueError, match=rf"{option}=-1 must be at least"):
            Scheduler(memory, **{**settings, option: -1})


class TestPreemption:
    def test_last_arrived_loses_its_blocks_and_comes_back_first(self) -> None:
        engine = make_engine(num_blocks=4)  # 3 blocks; `a` and `b` hold one each, and then grow
        a, b, c = request("a", 4), request("b", 4), request("c", 4, max_tokens=1)
        add(engine, a, b)
        engine.step(overlap=False)
        add(engine, c)
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (b.group,)
        assert shares(step) == {"a": (4, 1)}  # `c` may not take the block that is left
        assert (b.status, b.row, b.group.num_preemptions) == (SequenceStatus.WAITING, None, 1)
        assert engine.scheduler.num_preemptions == 1
        assert order_of_admission(engine, b, c) == [b, c]
        assert_as_if_alone(engine, a, b, c)

    def test_prompt_and_output_are_recomputed_as_one_prompt(self) -> None:
        engine = make_engine(num_blocks=4)
        a, b = request("a", 4, max_tokens=5), request("b", 3)
        add(engine, a, b)
        engine.step(overlap=False)
        engine.step(overlap=False)  # `b` has 2 output tokens, and no second block for the next
        assert engine.scheduler.num_preemptions == 0
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (b.group,)
        while b.row is None:
            step = engine.step(overlap=False)
        assert shares(step)["b"] == (0, 5)
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_several_keep_their_order(self) -> None:
        engine = make_engine(num_blocks=7, block_size=1)
        a, b, c = request("a", 2, max_tokens=4), request("b", 2, 4), request("c", 2, 4)
        add(engine, a, b, c)
        engine.step(overlap=False)
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (c.group,)
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (b.group,)
        assert engine.scheduler.num_waiting == 2
        assert order_of_admission(engine, b, c) == [b, c]
        assert_as_if_alone(engine, a, b, c)

    def test_token_in_flight_is_kept_and_its_computation_is_not(self) -> None:
        engine = make_engine(num_blocks=4)
        a, b = request("a", 4), request("b", 4)
        add(engine, a, b)
        engine.step()
        step = engine.scheduler.schedule()  # step 0, which samples the first tokens, is in flight
        assert step is not None
        assert step.preempted == (b.group,)
        assert (b.num_pending, b.group.is_in_flight, b.progress.num_dispatched) == (1, True, 0)
        assert engine.in_flight is not None
        batch = engine.runner.dispatch(step)
        engine.commit(*engine.in_flight)
        engine.in_flight = step, batch
        assert b.output_token_ids == [next_token([1, 2, 3, 4])]
        assert (b.num_pending, b.group.is_in_flight, b.progress.num_computed) == (0, False, 0)
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_token_in_flight_may_end_a_preempted_sequence(self) -> None:
        engine = make_engine(num_blocks=4)
        a = request("a", 4)
        b = request("b", 4, eos_token_ids=frozenset({next_token([1, 2, 3, 4])}))
        add(engine, a, b)
        engine.step()
        step = engine.step()
        assert step is not None
        assert step.preempted == (b.group,)
        assert (b.finish_reason, b.num_output_tokens) == ("stop", 1)
        assert engine.scheduler.num_waiting == 0
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_not_admitted_again_while_its_earlier_life_is_in_flight(self) -> None:
        engine = make_engine(num_blocks=3)
        a, b = request("a", 4, max_tokens=1), request("b", 4, max_tokens=4)
        add(engine, a, b)
        engine.step()
        assert engine.scheduler.schedule() is None  # `a` needs no more, `b` finds no block
        assert b.group.num_preemptions == 1
        engine.scheduler.abort("a")
        assert engine.scheduler.schedule() is None  # all blocks are free, but a step holds `b`
        engine.drain()
        assert shares(engine.step()) == {"b": (0, 5)}
        engine.run()
        assert_as_if_alone(engine, b)

    def test_the_earliest_runs_alone_before_it_would_be_preempted(self) -> None:
        engine = make_engine(num_blocks=5, block_size=1)
        a, b = request("a", 1, max_tokens=3), request("b", 1, max_tokens=3)
        add(engine, a, b)
        engine.run()
        assert a.group.num_preemptions == 0
        assert b.group.num_preemptions > 0
        assert_as_if_alone(engine, a, b)


class TestAbort:
    """Aborting twice, in whatever state: blocks are back at once, late tokens are dropped."""

    def check(self, engine: MockEngine, a: TokenSequence, num_output_tokens: int) -> None:
        used_by_others = blocks_in_use(engine) - (
            a.row is not None and -(-a.progress.num_reserved // 4)
        )
        for _ in range(2):
            engine.scheduler.abort("a")
            engine.scheduler.check_invariants()
        assert blocks_in_use(engine) == used_by_others
        engine.run()
        assert (a.finish_reason, a.num_output_tokens) == ("abort", num_output_tokens)
        assert blocks_in_use(engine) == 0

    def test_waiting(self) -> None:
        engine, a = make_engine(), request("a", 3)
        add(engine, a)
        self.check(engine, a, 0)

    def test_chunk_in_flight(self) -> None:
        engine, a = make_engine(max_num_batched_tokens=4), request("a", 10)
        add(engine, a)
        engine.step()
        self.check(engine, a, 0)

    def test_token_in_flight(self) -> None:
        engine, a, b = make_engine(), request("a", 3), request("b", 3)
        add(engine, a, b)
        engine.step()
        engine.step()
        self.check(engine, a, 1)

    def test_nothing_in_flight(self) -> None:
        engine, a = make_engine(), request("a", 3)
        add(engine, a)
        engine.step(overlap=False)
        self.check(engine, a, 1)

    def test_preempted_with_token_in_flight(self) -> None:
        engine = make_engine(num_blocks=4)
        b, a = request("b", 4), request("a", 4)
        add(engine, b, a)
        engine.step()
        step = engine.scheduler.schedule()
        assert step is not None
        assert step.preempted == (a.group,)
        assert a.num_pending == 1
        engine.scheduler.abort("a")
        assert engine.in_flight is not None
        first, engine.in_flight = engine.in_flight, (step, engine.runner.dispatch(step))
        engine.commit(*first)
        self.check(engine, a, 0)

    def test_finished(self) -> None:
        engine, a = make_engine(), request("a", 3, max_tokens=1)
        add(engine, a)
        engine.run()
        engine.scheduler.abort("a")
        assert a.finish_reason == "length"

    def test_unknown(self) -> None:
        make_engine().scheduler.abort("never added")

    def test_all_after_an_error_leaves_the_scheduler_empty_and_fit_for_work(self) -> None:
        engine = make_engine(max_num_seqs=2)
        sequences = [request(name, 3) for name in "abc"]
        add(engine, *sequences)
        engine.step()
        engine.step()
        assert engine.scheduler.abort_all() == [s.group for s in sequences]
        engine.in_flight = None  # its results never come
        engine.runner.queue.clear()
        assert blocks_in_use(engine) == 0
        d = request("d", 3)
        add(engine, d)
        engine.run()
        assert_as_if_alone(engine, d)


class TestOrderOfSteps:
    def test_a_third_step_is_not_scheduled_while_two_are_in_flight(self) -> None:
        engine = make_engine()
        add(engine, request("a", 3))
        engine.scheduler.schedule()
        engine.scheduler.schedule()
        with pytest.raises(AssertionError, match="at most one step may be in flight"):
            engine.scheduler.schedule()

    def test_steps_are_committed_in_order(self) -> None:
        engine = make_engine()
        add(engine, request("a", 3))
        engine.scheduler.schedule()
        second = engine.scheduler.schedule()
        assert second is not None
        with pytest.raises(AssertionError, match="committed in order"):
            engine.scheduler.commit(second, [1])

    def test_commit_returns_the_sequences_that_got_a_token(self) -> None:
        engine = make_engine(max_num_batched_tokens=4)
        a, b = request("a", 3, max_tokens=1), request("b", 6)
        add(engine, a, b)
        step = engine.scheduler.schedule()
        assert step is not None
        assert shares(step) == {"a": (0, 3), "b": (0, 1)}
        committed = engine.scheduler.commit(step, [7, -1])
        assert committed == (1, [a], ([], [], []))
        assert (a.output_token_ids, a.finish_reason) == ([7], "length")


class TestSwapping:
    def make_engine(self, **options: Any) -> MockEngine:
        return make_engine(choose_recovery=always_swap, **{"num_host_blocks": 16} | options)

    def test_committed_tokens_come_back_and_the_rest_is_computed(self) -> None:
        engine = self.make_engine(num_blocks=4)
        a, b = request("a", 4), request("b", 4)
        add(engine, a, b)
        engine.step(overlap=False)
        step = engine.step(overlap=False)
        assert step is not None
        assert [move.block_ids.tolist() for move in step.swap_outs] == [[2]]
        assert (b.status, b.num_swapped, b.row) == (SequenceStatus.SWAPPED, 4, None)
        assert engine.scheduler.host_pool.num_used == 3  # the pool is smaller than a chunk
        while b.row is None:
            step = engine.step(overlap=False)
        assert step is not None
        assert shares(step)["b"] == (4, 1)
        assert len(step.swap_ins) == 1
        assert engine.scheduler.host_pool.num_used == 0
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_a_group_is_copied_once_and_comes_back_shared(self) -> None:
        engine = self.make_engine(num_blocks=10, max_num_seqs=4)
        a, b = request("a", 8, max_tokens=20), request("b", 9, max_tokens=7, num_seqs=3)
        add(engine, a, b)
        while not b.group.num_preemptions:
            step = engine.step(overlap=False)
        assert step is not None
        (move,) = step.swap_outs
        assert len(move.block_ids) == 2 + 3
        engine.run()
        assert_as_if_alone(engine, a, *b.group.sequences)

    def test_no_room_on_the_host_means_recomputation(self) -> None:
        engine = self.make_engine(num_blocks=4, num_host_blocks=2)
        a, b = request("a", 4), request("b", 4)
        add(engine, a, b)
        engine.step(overlap=False)
        engine.step(overlap=False)
        assert b.status is SequenceStatus.WAITING
        engine.run()
        assert_as_if_alone(engine, a, b)

    def test_aborted_on_the_host(self) -> None:
        engine = self.make_engine(num_blocks=4)
        a, b = request("a", 4), request("b", 4)
        add(engine, a, b)
        engine.step(overlap=False)
        engine.step(overlap=False)
        assert b.status is SequenceStatus.SWAPPED
        engine.scheduler.abort("b")
        engine.scheduler.check_invariants()
        assert engine.scheduler.host_pool.num_used == 0
        engine.run()
        assert_as_if_alone(engine, a)

    def test_the_estimate_prefers_what_is_cheaper(self) -> None:
        a = request("a", 40)
        a.take_row(RowColumns(1), 0, Progress(40, 40, 40, 10))
        for seconds_per_token, expected in ((1.0, "swap"), (0.01, "recompute")):
            choose = CheaperRecovery(RecoveryCosts(seconds_per_token, 0.1, 0.5), lambda _: 10)
            assert choose(a.group) == expected


class TestPriority:
    def test_lower_numbers_first_and_equal_ones_in_order_of_arrival(self) -> None:
        engine = make_engine(order=PriorityOrder(), max_num_seqs=1)
        groups = [
            request(name, 3, 2, priority=p) for name, p in zip("abcd", (2, 1, 1, 0), strict=True)
        ]
        add(engine, *groups)
        a, b, c, d = groups
        assert order_of_admission(engine, *groups) == [d, b, c, a]
        assert_as_if_alone(engine, *groups)

    def test_an_urgent_request_takes_the_memory_of_others(self) -> None:
        engine = make_engine(order=PriorityOrder(), num_blocks=5)
        a, b = request("a", 9, 6, priority=1), request("b", 9, 4, priority=0)
        add(engine, a)
        engine.step(overlap=False)
        add(engine, b)
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (a.group,)
        assert shares(step) == {"b": (0, 9)}
        engine.run()
        assert_as_if_alone(engine, a, b)

    def check_displaced(
        self,
        running: list[TokenSequence],
        head: TokenSequence,
        expected: list[TokenSequence],
        overlap: bool = False,
        **options: Any,
    ) -> MockEngine:
        """Lets `head` arrive while the others run: just the expected ones give way, and it runs."""
        engine = make_engine(order=PriorityOrder(), **options)
        add(engine, *running)
        engine.step(overlap)
        assert engine.scheduler.num_running == len(running)
        add(engine, head)
        step = engine.step(overlap)
        assert step is not None
        assert step.preempted == tuple(sequence.group for sequence in expected)
        assert (head in [share.sequence for share in step.scheduled]) == bool(expected)
        engine.scheduler.check_invariants()
        return engine

    @pytest.mark.parametrize("overlap", [False, True])
    def test_nobody_gives_way_to_one_that_does_not_fit_even_so(self, overlap: bool) -> None:
        a, b = request("a", 7, 8, priority=0), request("b", 7, 4, priority=2)
        head = request("head", 13, 4, priority=1)  # four blocks; without `b` there are three
        engine = self.check_displaced([a, b], head, [], overlap, num_blocks=6)
        engine.run()
        assert b.group.num_preemptions <= 1
        assert_as_if_alone(engine, a, b, head)

    @pytest.mark.parametrize(
        ("prompt_len", "num_victims", "watermark_blocks"),
        [
            (2, 0, 0),
            (8, 1, 0),
            (12, 1, 0),
            (16, 2, 0),
            (20, 2, 0),
            (24, 3, 0),
            (8, 1, 1),
            (12, 2, 1),  # a block is left to the others
            (27, 3, 1),  # there are none
        ],
    )
    def test_just_as_many_give_way_as_it_takes(
        self, prompt_len: int, num_victims: int, watermark_blocks: int
    ) -> None:
        others = [request(name, 7, 4, priority=2) for name in "abc"]  # of 7 blocks two each
        head = request("head", prompt_len, 1, priority=1)
        engine = make_engine(order=PriorityOrder(), num_blocks=8, watermark_blocks=watermark_blocks)
        add(engine, *others)
        engine.step(overlap=False)
        add(engine, head)
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == tuple(s.group for s in [*reversed(others)][:num_victims])
        assert head in [share.sequence for share in step.scheduled]
        engine.run()
        assert_as_if_alone(engine, *others, head)

    def test_rows_count_as_blocks_do(self) -> None:
        others = [request("a", 3, priority=2), request("b", 3, priority=2, num_seqs=2)]
        head = request("head", 3, priority=1)
        self.check_displaced(others, head, [others[1]], max_num_seqs=3)
        self.check_displaced(
            [request("a", 3, priority=0, num_seqs=2), request("b", 3, priority=2)],
            request("head", 3, priority=1, num_seqs=2),
            [],
            max_num_seqs=3,
        )

    def test_what_the_others_grow_into_is_not_the_heads(self) -> None:
        a, b = request("a", 4, 8, priority=0), request("b", 3, 4, priority=2)
        head = request("head", 7, 1, priority=1)  # `b`'s block and the free one; `a` grows into it
        self.check_displaced([a, b], head, [], num_blocks=4)

    def test_nobody_gives_way_while_the_others_take_all_tokens(self) -> None:
        a, b = request("a", 20, 8, priority=0), request("b", 4, 4, priority=2)
        head = request("head", 8, 1, priority=1)
        engine = make_engine(order=PriorityOrder(), num_blocks=8, max_num_batched_tokens=8)
        add(engine, b)
        engine.step(overlap=False)
        add(engine, a)
        engine.step(overlap=False)
        add(engine, head)
        step = engine.step(overlap=False)
        assert shares(step) == {"a": (7, 8)}
        assert step is not None
        assert not step.preempted
        engine.run()
        assert_as_if_alone(engine, a, b, head)

    def test_blocks_that_others_share_do_not_become_free(self) -> None:
        """Nor do those that the head itself begins with: what goes is what nobody else has."""
        prompt = tuple(range(1, 14))  # three full blocks in common
        a, b, c = (
            SequenceGroup(name, prompt, 6, priority=p).sequences[0]
            for name, p in (("a", 0), ("b", 2), ("c", 2))
        )
        engine = make_engine(order=PriorityOrder(), num_blocks=8, enable_prefix_caching=True)
        add(engine, a)
        engine.step(overlap=False)
        add(engine, b, c)  # they take one block each; one is left
        engine.step(overlap=False)
        head = SequenceGroup("head", (*range(20, 36), 9), 1, priority=1).sequences[0]
        add(engine, head)  # five blocks; without `b` and `c` there are three
        step = engine.step(overlap=False)
        assert step is not None
        assert not step.preempted
        engine.scheduler.abort("head")
        head = SequenceGroup("head2", (*prompt[:12], *range(20, 27)), 1, priority=1).sequences[0]
        add(engine, head)  # five, of which three are shared; one more than there is
        step = engine.step(overlap=False)
        assert step is not None
        assert step.preempted == (c.group,)
        assert shares(step)["head2"] == (12, 7)
        engine.run()
        engine.scheduler.check_invariants()
        for sequence in (a, b, c, head):
            expected = generate_alone(sequence, 64)
            assert (sequence.output_token_ids, sequence.finish_reason, None) == expected

    def test_blocks_that_the_head_takes_over_are_not_free_for_it_too(self) -> None:
        prompt = tuple(range(1, 13))
        a = request("a", 1, 3, priority=0)
        b = SequenceGroup("b", (*prompt, 50), 3, priority=2).sequences[0]
        engine = make_engine(order=PriorityOrder(), num_blocks=6, enable_prefix_caching=True)
        add(engine, a, b)
        engine.step(overlap=False)
        head = SequenceGroup("head", (*prompt, *range(20, 27)), 1, priority=1).sequences[0]
        add(engine, head)  # three blocks of `b`'s and two more; `b` has one more, and none is free
        step = engine.step(overlap=False)
        assert step is not None
        assert not step.preempted
        engine.run()
        assert engine.scheduler.num_preemptions == 0
        assert head.group.num_cached_tokens == 12
        for sequence in (a, b, head):
            assert sequence.output_token_ids == generate_alone(sequence, 64)[0]

    def test_nobody_is_displaced_for_blocks_that_the_watermark_keeps_free(self) -> None:
        engine = make_engine(order=PriorityOrder(), num_blocks=7, watermark_blocks=2)
        stays, victim = request("stays", 5, 3, priority=0), request("victim", 5, 3, priority=2)
        head = request("head", 9, 3, priority=1)
        add(engine, stays, victim)
        engine.step(overlap=False)
        add(engine, head)  # three blocks; without the victim there would be four
        step = engine.step(overlap=False)
        assert step is not None
        assert not step.preempted
        engine.run()
        assert_as_if_alone(engine, stays, victim, head)

    def test_without_the_policy_nobody_overtakes(self) -> None:
        engine = make_engine(max_num_seqs=1)
        a, b = request("a", 3, 2, priority=1), request("b", 3, 2, priority=0)
        add(engine, a, b)
        assert order_of_admission(engine, a, b) == [a, b]


def test_the_last_tokens_of_prompts_wait_where_fewer_are_worth_while() -> None:
    engine = make_engine(worth_while=lambda num_tokens, num_fixed: min(num_tokens, 10))
    a, b, c = request("a", 6), request("b", 7), request("c", 2)
    add(engine, a, b, c)
    assert shares(engine.scheduler.schedule()) == {"a": (0, 6), "b": (0, 4)}
    # Each has all its blocks already, and who would get no token stays in the queue.
    assert blocks_in_use(engine) == 2 + 2
    assert shares(engine.scheduler.schedule()) == {"a": (6, 1), "b": (4, 3), "c": (0, 2)}


def test_a_prompt_in_two_steps_forks_behind_the_second() -> None:
    engine = make_engine(worth_while=lambda num_tokens, _: 8 if num_tokens == 12 else num_tokens)
    group = SequenceGroup("a", tuple(range(1, 13)), 3, num_seqs=2)
    engine.scheduler.add(group)
    steps = [engine.step(), engine.step()]
    found = [[(s.start, s.num_tokens) for s in step.scheduled] for step in steps if step]
    assert found == [[(0, 8)], [(8, 4), (12, 0)]]


def test_those_that_decode_are_in_each_step() -> None:
    """However few tokens are worth while; and the first prompt has one in it, too."""
    asked: list[tuple[int, int]] = []

    def worth_while(num_tokens: int, num_fixed: int) -> int:
        asked.append((num_tokens, num_fixed))
        return max(min(num_tokens, 4), num_fixed + 1)

    engine = make_engine(worth_while=worth_while)
    first = [request(name, 1) for name in "abcd"]
    add(engine, *first)
    engine.step()
    add(engine, request("e", 3), request("f", 1))
    expected = dict.fromkeys("abcd", (1, 1))
    assert shares(engine.step()) == expected | {"e": (0, 1)}
    assert (64, 4) in asked


def test_what_waits_is_computed_and_read_in_order() -> None:
    """Sequences of a prompt in common fork when all of it is computed, and not before."""
    engine = make_engine(
        worth_while=lambda num_tokens, num_fixed: max(min(num_tokens, 3), num_fixed + 1)
    )
    forks = SequenceGroup("n", tuple(range(1, 9)), 5, num_seqs=2).sequences[0]
    alone = [request("a", 5), request("b", 9)]
    add(engine, forks, *alone)
    while engine.scheduler.has_unfinished:
        engine.step()
        engine.scheduler.check_invariants()
    engine.drain()
    assert_as_if_alone(engine, *alone)


def test_those_that_wait_for_the_host_are_computed_together() -> None:
    """Whose prompts were in different steps, too: else each would have every second step."""
    engine = make_engine(max_num_batched_tokens=8)
    a, b = (request(name, 8, waits_for_host=True) for name in "ab")
    add(engine, a, b)
    steps = []
    while engine.scheduler.has_unfinished:
        if (step := engine.step()) is not None:
            steps.append(shares(step))
    engine.drain()
    assert [set(step) for step in steps] == [{"a"}, {"b"}, *[{"a", "b"}] * 7]
    assert_as_if_alone(engine, a, b)


def test_nobody_waits_for_those_that_wait_for_the_host() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    a, b = request("a", 8, waits_for_host=True), request("b", 8)
    add(engine, a, b)
    steps = [shares(engine.step()) for _ in range(6)]
    assert [set(step) for step in steps] == [{"a"}, {"b"}, *[{"a", "b"}, {"b"}] * 2]


def test_nobody_waits_for_drafts_apart() -> None:
    """Of what is in flight with guessed tokens more is dispatched than is known."""
    columns = RowColumns(2)
    for row, progress in enumerate((Progress(9, 5, 9, 0), Progress(5, 5, 9, 0))):
        request(f"{row}", 6, waits_for_host=True).take_row(columns, row, progress)
    assert token_plan.better_together(columns, np.arange(2))
    columns.num_dispatched[0] = 5
    assert not token_plan.better_together(columns, np.arange(2))


@pytest.mark.parametrize("ended", [0, 1])
def test_the_others_compute_what_one_that_has_ended_has_not(ended: int) -> None:
    """Of a request whose completions are computed again, three that share their first blocks."""
    engine = make_engine(max_num_batched_tokens=24, num_blocks=60)
    group = SequenceGroup("a", tuple(range(1, 22)), 12, num_seqs=3)
    engine.scheduler.add(group)
    for _ in range(6):
        engine.step()
    engine.drain()
    engine.scheduler._preempt(group)
    engine.scheduler._size = token_plan.StepSize(64, lambda num_tokens, num_fixed: num_fixed + 6)
    engine.step()
    assert all(sequence.row is not None for sequence in group.live)
    followers = [s for s in group.live if s.leader is not None]
    assert any(s.num_shared > 6 for s in followers)
    engine.scheduler.finish(group.live[ended], "stop", "a stop string")
    while engine.scheduler.has_unfinished:
        engine.step()
        engine.scheduler.check_invariants()
    engine.drain()
    assert_as_if_alone(engine, *(s for s in group.sequences if s.stop_reason is None))
