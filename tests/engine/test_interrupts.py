"""An interrupt between any two lines leaves an engine that is whole, empty and fit for work.

TRACES=1 takes every line of all files, and not only of the memory's, and a visit to each from the
middle of the run.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from types import CodeType

import pytest

from pallas_paged.engine import LLM, BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.core.policies import PriorityOrder, Recovery
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.text.detokenizer import Detokenizer, WindowDetokenizer
from tests.engine.mock_model import (
    device_of,
    generate_alone,
    make_mock_llm,
    make_whole_engine,
    search_alone,
)

Line = tuple[CodeType, int]
FILES = {
    "memory": ("block_memory.py", "prefix_cache.py", "block_tables.py"),
    "scheduling": (
        "scheduler.py",
        "admission.py",
        "queues.py",
        "forks.py",
        "committer.py",
        "common_prefixes.py",
        "token_plan.py",
        "row_columns.py",
        "request.py",
    ),
    "plans": ("planner.py", "table_edits.py"),
    "delivery": (
        "engine.py",
        "engine_core.py",
        "step_outputs.py",
        "output_processor.py",
        "open_request.py",
        "completion.py",
    ),
}
ALL = "TRACES" in os.environ
TOOL = 4
"""A number of `sys.monitoring` that nobody else uses."""


class Letters:
    """A tokenizer: each token is a letter."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("A") + token) for token in token_ids)

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        return WindowDetokenizer(self, context, skip_special_tokens=skip_special_tokens)

    def decode_token(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


def mixed_recovery(group: SequenceGroup) -> Recovery:
    """One kind is computed again, the others are swapped out."""
    return "recompute" if group.num_seqs == 1 else "swap"


def make_engine() -> Engine:
    return make_whole_engine(
        num_blocks=19,
        block_size=2,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        max_model_len=24,
        enable_prefix_caching=True,
        num_host_blocks=30,
        order=PriorityOrder(),
        choose_recovery=mixed_recovery,
        tokenizer=Letters(),
    )


PREFIX = (5, 9, 2, 40)
SAMPLED = SamplingParams(temperature=1, max_tokens=6, seed=1)
HELD = dataclasses.replace(SAMPLED, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)


class Life:
    """One use of an engine: every verb that changes what it holds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.groups: list[SequenceGroup] = []
        self.outputs: dict[str, RequestOutput] = {}

    def add(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams | BeamSearchParams,
        *,
        priority: int = 0,
        salt: str | None = None,
    ) -> SequenceGroup:
        group = self.engine.make_group(prompt, params, cache_salt=salt)
        group.priority = priority
        self.groups.append(group)
        self.engine.add(group)
        return group

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.outputs |= {output.request_id: output for output in self.engine.step()}

    def drain(self) -> None:
        for _ in range(60):
            if not self.engine.has_unfinished:
                return
            self.steps(1)
        raise AssertionError("it never ends")

    def run(self) -> None:
        """Hits, merges, forks, copies, evictions, preemptions of both kinds, pins and aborts."""
        logged = SamplingParams(temperature=1, n=3, max_tokens=7, logprobs=1, seed=2)
        self.add((*PREFIX, 7), SAMPLED)
        self.add((*PREFIX, 7), SamplingParams(temperature=1, max_tokens=9, seed=3), priority=3)
        self.steps(3)
        self.engine.pin(PREFIX, None)
        self.add((*PREFIX, 8, 8, 8), logged, priority=2)
        self.steps(3)
        self.add(tuple(range(12)), SAMPLED, priority=1, salt="a")
        self.steps(4)
        aborted = self.add((*PREFIX, 30), SAMPLED)
        beams = BeamSearchParams(beam_width=2, max_tokens=3, num_return=1)
        self.add((3, 1, 4), beams)
        self.add((9, 4), HELD)
        self.steps(2)
        self.engine.abort(aborted.request_id)
        self.engine.unpin(PREFIX, None)
        stop = "".join(chr(ord("A") + token) for token in self.alone((50, 51))[1:3])
        self.add((50, 51), SamplingParams(temperature=1, max_tokens=6, seed=1, stop=stop))
        self.drain()

    def alone(self, prompt: tuple[int, ...]) -> list[int]:
        return generate_alone(SequenceGroup("", prompt, 6).sequences[0], 24)[0]

    def check(self, is_whole: bool) -> None:
        """Every request that arrived has its last output, and none has a wrong token."""
        for group in self.groups:
            if not is_whole and group.request_id not in self.outputs:
                assert group.request_id not in self.engine._processor
                continue  # the interrupt struck in `add`, or took with it what `step` returned
            output = self.outputs[group.request_id]
            assert output.finished or not is_whole
            if group.beams is not None:
                self.check_beams(group, output)
                continue
            for sequence, completion in zip(group.sequences, output.outputs, strict=True):
                wanted, reason, _ = generate_alone(sequence, 24)
                num_tokens = len(completion.token_ids)
                assert completion.token_ids == tuple(wanted[:num_tokens])
                if completion.logprobs is not None:
                    assert len(completion.logprobs) == num_tokens
                if completion.finish_reason == reason == "length":
                    assert num_tokens == len(wanted)
                    assert completion.text == Letters().decode(wanted, skip_special_tokens=True)
                if is_whole and completion.finish_reason == "stop":
                    assert num_tokens == 3
                    assert completion.text == chr(ord("A") + wanted[0])

    def check_beams(self, group: SequenceGroup, output: RequestOutput) -> None:
        if output.outputs[0].finish_reason != "abort":
            expected = [ended.tokens for ended in search_alone(group)]
            assert [completion.token_ids for completion in output.outputs] == expected


@contextlib.contextmanager
def monitored(callback: Callable[[CodeType, int], object]) -> Iterator[None]:
    """Calls back before each line of Python; what that raises is raised there."""
    sys.monitoring.use_tool_id(TOOL, "interrupts")
    sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, callback)
    try:
        yield
    finally:
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, None)
        sys.monitoring.free_tool_id(TOOL)


def lines_of(run: Callable[[], None], files: Sequence[str]) -> collections.Counter[Line]:
    """Returns how often `run`, which may be interrupted, comes to each line of the files."""
    found: collections.Counter[Line] = collections.Counter()

    def note(code: CodeType, line: int) -> None:
        if code.co_filename.endswith(tuple(f"/{name}" for name in files)):
            found[code, line] += 1

    with monitored(note), contextlib.suppress(KeyboardInterrupt):
        sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)
        try:
            run()
        finally:
            sys.monitoring.set_events(TOOL, 0)
    return found


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_at(
    target: Line, visit: int, run: Callable[[], None], strike: Callable[[], None] = interrupt
) -> bool:
    """Runs, and strikes before that visit to a line; returns whether it got there."""
    visits = 0

    def count(code: CodeType, line: int) -> None:
        nonlocal visits
        visits += (code, line) == target
        if visits == visit and (code, line) == target:
            strike()

    with monitored(count), contextlib.suppress(KeyboardInterrupt):
        sys.monitoring.set_local_events(TOOL, target[0], sys.monitoring.events.LINE)
        try:
            run()
        finally:
            sys.monitoring.set_local_events(TOOL, target[0], 0)
    return visits >= visit


@pytest.mark.parametrize("part", FILES)
def test_an_interrupt_before_any_line(part: str) -> None:
    """Before the first visit to some, before a later one to others."""
    engine = make_engine()
    engine.check_idle()  # as before each life below: it comes to lines that they then do not
    lines = [*lines_of(Life(engine).run, FILES[part]).items()]
    assert len(lines) > 100
    for (code, line), visits in lines if ALL or part == "memory" else lines[::2]:
        life = Life(engine)
        visit = 1 + 7 * line % visits if ALL or line % 16 == 0 else 1
        assert interrupted_at((code, line), visit, life.run), f"{code}: {line}"
        life.drain()
        engine.check_idle()
        life.check(is_whole=False)
    life = Life(engine)
    life.run()
    life.check(is_whole=True)
    engine.check_idle()


def test_a_second_interrupt_before_any_line_of_the_recovery() -> None:
    engine = make_engine()
    files = [*FILES["memory"], *FILES["scheduling"], *FILES["delivery"]]
    usual = lines_of(Life(engine).run, files)

    def fail() -> None:
        device_of(engine).fails_in = 12
        life.run()

    life = Life(engine)
    recovery = lines_of(fail, files).keys() - usual.keys()
    life.drain()
    assert len(recovery) > 40
    targets = sorted(recovery, key=lambda line: (line[0].co_filename, line[1]))
    for target in targets if ALL else targets[::2]:
        life = Life(engine)
        assert interrupted_at(target, 1, fail), target
        life.drain()
        engine.check_idle()
        life.check(is_whole=False)
        assert life.groups[0].request_id in life.outputs


def test_a_recovery_that_was_cut_short_is_the_first_thing_of_the_next_call() -> None:
    engine = make_engine()
    life = Life(engine)
    life.add((*PREFIX, 7), SAMPLED)
    life.drain()
    assert engine.pin(PREFIX, None)
    life.add((1, 2, 3), SAMPLED)
    memory = engine.memory
    memory.free_all, free_all = interrupt, memory.free_all
    device_of(engine).fails_in = 1
    with pytest.raises(KeyboardInterrupt):
        life.steps(2)
    memory.free_all = free_all
    assert engine.has_unfinished
    engine.make_group((30,), SAMPLED)
    engine.core.scheduler.check_invariants()
    assert not engine.memory.pins
    life.add((30, 31), SAMPLED)
    life.drain()
    engine.check_idle()
    life.check(is_whole=True)
    reasons = [life.outputs[group.request_id].outputs[0].finish_reason for group in life.groups]
    assert reasons == ["length", "abort", "length"]


def test_an_abort_in_the_middle_of_a_step_waits_for_the_next_one() -> None:
    """As when the collector of garbage closes a stream that nobody reads any more."""
    first = Life(make_engine())
    first.add((4, 5), SAMPLED)
    for target in [*lines_of(lambda: first.steps(2), ["scheduler.py"])][::4]:
        engine = make_engine()
        life = Life(engine)
        group, other = life.add((1, 2, 3), SAMPLED), life.add((4, 5), SAMPLED)

        def collect(engine: Engine = engine, request_id: str = group.request_id) -> None:
            engine.abort(request_id)

        assert interrupted_at(target, 1, functools.partial(life.steps, 2), collect)
        life.drain()
        engine.check_idle()
        life.check(is_whole=True)
        assert life.outputs[group.request_id].outputs[0].finish_reason == "abort"
        assert life.outputs[other.request_id].outputs[0].finish_reason == "length"


def test_a_stream_at_its_end_is_closed_in_the_middle_of_another_call() -> None:
    """By the collector of garbage: nothing is left to be done, and above all no step."""
    prefix, prompt = {"prompt_token_ids": [*range(20, 30)]}, {"prompt_token_ids": [*range(1, 10)]}

    def make() -> tuple[LLM, Generator[RequestOutput]]:
        llm = make_mock_llm(enable_prefix_caching=True)
        llm.generate(prefix, SAMPLED, use_tqdm=False)
        stream = llm.stream(prompt, SAMPLED)
        assert isinstance(stream, Generator)
        while not next(stream).finished:
            pass
        return llm, stream

    def use(llm: LLM) -> None:
        assert llm.pin_prefix(prefix) == 8
        assert llm.kv_stats().num_pinned_blocks == 2
        llm.unpin_prefix(prefix)
        assert llm.reset_prefix_cache()

    lines = lines_of(functools.partial(use, make()[0]), [*FILES["memory"], "scheduler.py"])
    assert len(lines) > 60
    for line in [*lines][::3]:
        llm, stream = make()
        assert interrupted_at(line, 1, functools.partial(use, llm), stream.close)
        assert next(stream, None) is None
        llm.engine.check_idle()


def test_an_interrupted_stream_takes_no_output_of_another_along() -> None:
    def start(llm: LLM) -> Iterator[RequestOutput]:
        other = llm.stream({"prompt_token_ids": [*range(30, 36)]}, SAMPLED)
        next(other)
        return other

    def use(llm: LLM) -> None:
        collections.deque(llm.stream({"prompt_token_ids": [1, 2, 3]}, SAMPLED), maxlen=0)

    llm = make_mock_llm()
    other = start(llm)
    (*_, whole) = start(make_mock_llm())
    lines = lines_of(functools.partial(use, llm), ["streams.py", "engine.py"])
    reasons = collections.Counter()
    for line, visits in lines.items():
        llm = make_mock_llm()
        other = start(llm)
        assert interrupted_at(line, visits, functools.partial(use, llm)), line
        (*_, last) = other
        reasons[last.outputs[0].finish_reason] += 1
        if last.outputs[0].finish_reason == "length":
            assert last.outputs[0].token_ids == whole.outputs[0].token_ids
        llm.engine.drain()
        llm.engine.check_idle()
    assert reasons.keys() == {"length", "abort"}
