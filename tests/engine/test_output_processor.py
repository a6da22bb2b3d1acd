"""The output processor alone: outputs of the core written by hand, and what callers get."""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_paged.engine import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from pallas_paged.engine.core.core_output import (
    BeamFigures,
    CoreOutput,
    FinishReason,
    NewTokens,
    RequestStats,
    TokenLogprobs,
)
from pallas_paged.engine.text.output_processor import Ending, OutputProcessor, Processed
from pallas_paged.engine.text.tokenizer import Tokenizer, load_tokenizer
from pallas_paged.models.demo import DEMO_MODEL

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
KINDS = (CUMULATIVE, DELTA, FINAL_ONLY)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
PROMPT = (5, 6, 7)
FILES = tuple(
    f"/text/{name}.py"
    for name in ("output_processor", "open_request", "completion", "stop", "logprobs")
)
TOOL = 3
"""A number of `sys.monitoring` that nobody else uses."""
STATS = RequestStats(1.0, 1.5, 2, 3)
CODE = "def read(path):\n    return open(path).read()\n"


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["whole", "tokens"])
def whether_tokens_come_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs every test twice: what says no more than a token comes as it, or as a whole output."""
    process = OutputProcessor.process

    def apart(
        made: OutputProcessor,
        step: Iterable[CoreOutput],
        into: list[RequestOutput] | None = None,
    ) -> Processed:
        others: list[CoreOutput] = []
        tokens = NewTokens([], [], [])
        for one in step:
            if len(one.token_ids) == 1 and one == says_only(one):
                tokens.request_ids.append(one.request_id)
                tokens.indices.append(one.index)
                tokens.token_ids.append(one.token_ids[0])
            else:
                others.append(one)
        return process(made, others, tokens, into)

    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(OutputProcessor, "process", apart)
        yield


class Letters:
    """Token 0 is "a", 1 is "b"; token 25 cannot be decoded."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if 25 in token_ids:
            raise OSError("no z")
        return "".join(chr(ord("a") + token) for token in token_ids)

    def decode_token(self, token_id: int) -> str:
        return self.decode([token_id])

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Any:
        return Letter(self)


class Letter:
    """Makes text of a letter at once."""

    def __init__(self, letters: Letters):
        self.append = letters.decode_token

    def finish(self) -> str:
        return ""


LETTERS = Letters()


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def core(
    tokens: str | Sequence[int],
    finish_reason: FinishReason | None = None,
    *,
    name: str = "r",
    index: int = 0,
    is_last: bool | None = None,
    stop_reason: int | str | None = None,
    **fields: Any,
) -> CoreOutput:
    return CoreOutput(
        name,
        index,
        ids(tokens) if isinstance(tokens, str) else tokens,
        finish_reason,
        stop_reason,
        finish_reason is not None if is_last is None else is_last,
        STATS,
        **fields,
    )


def says_only(one: CoreOutput) -> CoreOutput:
    """Returns what says the same tokens and nothing else."""
    return core(one.token_ids, name=one.request_id, index=one.index)


def logprobs_of(tokens: str) -> TokenLogprobs:
    """The most likely tokens are "d" and "e"; another has -(its id) / 2 and the rank 3."""
    found, n = ids(tokens), len(tokens)
    return TokenLogprobs(
        np.array([{3: -0.25, 4: -0.5}.get(token, -token / 2) for token in found], np.float32),
        np.full(n, 3, np.int32),
        np.full((n, 2), [3, 4], np.int32),
        np.full((n, 2), [-0.25, -0.5], np.float32),
    )


def processor(
    params: SamplingParams | None = None,
    kind: RequestOutputKind = CUMULATIVE,
    *,
    tokenizer: Any = LETTERS,
    names: Iterable[str] = "r",
    num_seqs: int = 1,
    is_beam_search: bool = False,
    prompt_token_ids: Sequence[int] = PROMPT,
) -> OutputProcessor:
    made = OutputProcessor(tokenizer)
    for name in names:
        made.add(
            name,
            prompt_token_ids,
            params or SamplingParams(),
            prompt="fgh",
            num_seqs=num_seqs,
            is_beam_search=is_beam_search,
            arrival_time_s=0.5,
            output_kind=kind,
        )
    return made


def texts(processed: Processed) -> list[list[str | None]]:
    return [[completion.text for completion in one.outputs] for one in processed.outputs]


def play(
    made: OutputProcessor, steps: Iterable[Iterable[CoreOutput]], kind: RequestOutputKind
) -> tuple[RequestOutput, list[Ending]]:
    """Returns the last output, deltas put together, and the endings; the others only grow."""
    last: RequestOutput | None = None
    endings: list[Ending] = []
    for step in steps:
        processed = made.process(step)
        assert not processed.faults
        endings += processed.endings
        for output in processed.outputs:
            assert last is None or (not last.finished and kind is not FINAL_ONLY)
            if last is not None and kind is CUMULATIVE:
                for earlier, later in zip(last.outputs, output.outputs, strict=True):
                    assert (later.text or "").startswith(earlier.text or "")
                    assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
            last = output if last is None or kind is not DELTA else last.merged_with(output)
    assert last is not None
    assert last.finished == ("r" not in made)
    return last, endings


@every_kind
def test_tokens_become_text_and_an_end(kind: RequestOutputKind) -> None:
    made = processor(kind=kind)
    assert "r" in made
    assert list(made.request_ids) == ["r"]
    output, endings = play(made, [[core("a")], [core("bc")], [core("d", "length")]], kind)
    assert not endings
    assert not made.request_ids
    assert output.outputs == (CompletionOutput(0, "abcd", (0, 1, 2, 3), finish_reason="length"),)
    assert (output.prompt, output.prompt_token_ids, output.num_cached_tokens) == ("fgh", PROMPT, 2)
    metrics = output.metrics
    assert (metrics.arrival_time_s, metrics.first_scheduled_time_s) == (0.5, 1.0)
    assert metrics.num_preemptions == 3
    assert metrics.first_token_time_s == 1.5
    assert metrics.finish_time_s is not None
    assert metrics.finish_time_s >= metrics.first_token_time_s


def test_what_each_kind_gives_at_each_step() -> None:
    steps = [[core("a")], [core("")], [core("bc")], [core("d", "length")]]
    given = {
        kind: [
            [(one.text, one.token_ids) for out in made.process(step).outputs for one in out.outputs]
            for step in steps
        ]
        for kind in KINDS
        for made in [processor(kind=kind)]
    }
    assert given == {
        CUMULATIVE: [[("a", (0,))], [], [("abc", (0, 1, 2))], [("abcd", (0, 1, 2, 3))]],
        DELTA: [[("a", (0,))], [], [("bc", (1, 2))], [("d", (3,))]],
        FINAL_ONLY: [[], [], [], [("abcd", (0, 1, 2, 3))]],
    }


def test_metrics_follow_the_core() -> None:
    made = processor()
    (first,) = made.process([core("a")]).outputs
    (second,) = made.process([core("b")]).outputs
    assert first.metrics == second.metrics
    assert first.metrics.finish_time_s is None
    made = processor()
    later = dataclasses.replace(core("", "abort"), stats=RequestStats(num_preemptions=1))
    *_, aborted = made.process([core("a"), later]).outputs
    assert aborted.metrics.num_preemptions == 1
    assert aborted.metrics.first_token_time_s is None


def test_a_request_has_one_output_per_step() -> None:
    made = processor(names="rs", num_seqs=2)
    step = [core("a"), core("b", name="s"), core("c", index=1), core("d", index=1)]
    processed = made.process(step)
    assert [one.request_id for one in processed.outputs] == ["r", "s"]
    assert texts(processed) == [["a", "cd"], ["b", ""]]


def test_a_delta_leaves_out_what_has_no_news() -> None:
    made = processor(kind=DELTA, num_seqs=3)
    (output,) = made.process([core("b", index=2), core("a")]).outputs
    assert [(one.index, one.text) for one in output.outputs] == [(0, "a"), (2, "b")]
    (output,) = made.process([core("", "abort", index=1, is_last=False)]).outputs
    assert output.outputs == (CompletionOutput(1, "", (), finish_reason="abort"),)
    (output,) = made.process([core("c", "length", is_last=False)]).outputs
    (last,) = made.process([core("d", "length", index=2)]).outputs
    assert [(one.index, one.text) for one in last.outputs] == [(2, "d")]
    merged = output.merged_with(last)
    assert (merged.finished, merged.metrics) == (True, last.metrics)
    assert [(one.index, one.text) for one in merged.outputs] == [(0, "c"), (2, "d")]


# --- stop strings -------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_a_sequence(kind: RequestOutputKind, include: bool) -> None:
    params = SamplingParams(stop=["cd", "x"], include_stop_str_in_output=include)
    made = processor(params, kind)
    output, endings = play(made, [[core("a")], [core("b")], [core("c")], [core("d")]], kind)
    assert endings == [Ending("r", 0, "cd")]
    assert output.outputs == (
        CompletionOutput(
            0, "abcd" if include else "ab", (0, 1, 2, 3), finish_reason="stop", stop_reason="cd"
        ),
    )
    late = made.process([core("e"), core("f", "length")])
    assert late == Processed([], [], {})


@every_kind
def test_tokens_behind_a_stop_string_are_dropped(kind: RequestOutputKind) -> None:
    params = SamplingParams(stop="cd", logprobs=0)
    made = processor(params, kind, num_seqs=2)
    steps = [
        [core("abcdef", "stop", stop_reason=5, is_last=False, logprobs=logprobs_of("abcdef"))],
        [core("g"), core("b", index=1, logprobs=logprobs_of("b"))],
        [core("e", "length", index=1, logprobs=logprobs_of("e"))],
    ]
    output, endings = play(made, steps, kind)
    assert not endings  # the core has ended it itself
    first, second = output.outputs
    assert (first.text, first.token_ids, first.stop_reason) == ("ab", (0, 1, 2, 3), "cd")
    assert first.logprobs is not None
    assert len(first.logprobs) == 4
    assert first.cumulative_logprob == -(0 + 1 + 2) / 2 - 0.25
    assert (second.text, second.finish_reason) == ("be", "length")


@every_kind
@pytest.mark.parametrize(
    ("end", "stop_reason", "expected"),
    [
        ("length", None, ("a", "stop", "bc")),
        ("stop", 2, ("ab", "stop", 2)),  # the stop token has no text
        ("abort", "why", ("a", "abort", "why")),
    ],
)
def test_the_last_token_may_complete_a_stop_string(
    kind: RequestOutputKind, end: FinishReason, stop_reason: Any, expected: Any
) -> None:
    made = processor(SamplingParams(stop="bc"), kind)
    steps = [[core("a")], [core("b")], [core("c", end, stop_reason=stop_reason)]]
    output, endings = play(made, steps, kind)
    (one,) = output.outputs
    assert (one.text, one.finish_reason, one.stop_reason) == expected
    assert not endings


def test_a_stop_string_ends_a_request_when_the_others_have_ended() -> None:
    made = processor(SamplingParams(stop="c"), num_seqs=2)
    made.process([core("a", "length", index=1, is_last=False)])
    (output,) = made.process([core("b")]).outputs
    assert not output.finished
    processed = made.process([core("c")])
    assert processed.outputs[0].finished
    assert processed.endings == [Ending("r", 0, "c")]


@every_kind
def test_stop_strings_are_not_looked_for_in_the_first_tokens(kind: RequestOutputKind) -> None:
    made = processor(SamplingParams(stop=["b", "c", "cd"], min_tokens=3), kind)
    output, endings = play(made, [[core("ab")], [core("c")], [core("d")]], kind)
    assert endings == [Ending("r", 0, "cd")]
    assert output.outputs[0].text == "ab"
    made = processor(SamplingParams(stop=["b", "c"], min_tokens=2), kind)
    output, endings = play(made, [[core("ab")], [core("c")]], kind)
    assert endings == [Ending("r", 0, "c")]


@pytest.mark.parametrize("include", [False, True])
@every_kind
def test_the_token_that_ended_it_is_text_only_if_asked_for(
    kind: RequestOutputKind, include: bool
) -> None:
    made = processor(SamplingParams(include_stop_str_in_output=include), kind)
    output, _ = play(made, [[core("a")], [core("b", "stop", stop_reason=1)]], kind)
    (one,) = output.outputs
    assert (one.text, one.token_ids, one.stop_reason) == ("ab" if include else "a", (0, 1), 1)


def test_what_a_stop_string_holds_back_comes_out_when_it_ends() -> None:
    made = processor(SamplingParams(stop="bcd"), DELTA)
    given = [made.process([output]) for output in (core("ab"), core("c"), core("", "abort"))]
    assert [texts(processed) for processed in given] == [[[""]], [["a"]], [["bc"]]]


# --- log-probabilities ----------------------------------------------------------------------------


@every_kind
def test_logprobs_are_by_token_and_summed(kind: RequestOutputKind) -> None:
    made = processor(SamplingParams(logprobs=2), kind)
    steps = [
        [core("b", logprobs=logprobs_of("b"))],
        [core("dc", "length", logprobs=logprobs_of("dc"))],
    ]
    output, _ = play(made, steps, kind)
    (one,) = output.outputs
    tops = {3: Logprob(-0.25, 1, "d"), 4: Logprob(-0.5, 2, "e")}
    assert one.logprobs == (
        {**tops, 1: Logprob(-0.5, 3, "b")},
        tops,
        {**tops, 2: Logprob(-1.0, 3, "c")},
    )
    assert one.cumulative_logprob == -0.5 - 0.25 - 1.0


def test_cumulative_logprob_is_that_of_all_tokens_in_a_delta_too() -> None:
    made = processor(SamplingParams(logprobs=0), DELTA)
    sums, lengths = [], []
    for token in "bbb":
        (output,) = made.process([core(token, logprobs=logprobs_of(token))]).outputs
        sums.append(output.outputs[0].cumulative_logprob)
        lengths.append(len(output.outputs[0].logprobs or ()))
    assert (sums, lengths) == ([-0.5, -1.0, -1.5], [1, 1, 1])


@every_kind
def test_prompt_logprobs_wait_for_the_first_token(kind: RequestOutputKind) -> None:
    made = processor(SamplingParams(prompt_logprobs=0), kind)
    assert not made.process([core("", prompt_logprobs=logprobs_of("g"))]).outputs
    steps = [[core("a", prompt_logprobs=logprobs_of("h"))], [core("b")], [core("c", "length")]]
    given = [output for step in steps for output in made.process(step).outputs]
    second, third = ({3, 4, token} for token in (6, 7))
    for place, output in enumerate(given):
        if kind is DELTA and place:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs is not None
        none, *found = output.prompt_logprobs
        assert none is None
        assert [set(one) for one in found if one is not None] == [second, third]
    if kind is DELTA:
        merged = functools.reduce(RequestOutput.merged_with, given)
        assert merged.prompt_logprobs == given[0].prompt_logprobs
    if kind is CUMULATIVE:
        assert len({id(output.prompt_logprobs) for output in given}) == 1  # not copied


def test_logprobs_are_made_for_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Letters()
    made = processor(SamplingParams(logprobs=2), FINAL_ONLY, tokenizer=tokenizer)
    monkeypatch.setattr(tokenizer, "decode_token", None)
    monkeypatch.setattr(tokenizer, "decode", None)
    for token in "abc":
        made.process([core(token, logprobs=logprobs_of(token))])
    monkeypatch.undo()
    made = processor(SamplingParams(logprobs=2), FINAL_ONLY)
    (output,) = made.process([core("a", "length", logprobs=logprobs_of("a"))]).outputs
    assert output.outputs[0].logprobs is not None


@every_kind
@pytest.mark.parametrize("detokenize", [True, False])
def test_without_a_tokenizer_or_detokenize_there_is_no_text(
    kind: RequestOutputKind, detokenize: bool
) -> None:
    params = SamplingParams(detokenize=detokenize, logprobs=1)
    made = processor(params, kind, tokenizer=None if detokenize else Letters())
    output, _ = play(made, [[core("bc", "length", logprobs=logprobs_of("bc"))]], kind)
    (one,) = output.outputs
    assert one.text is None
    assert one.logprobs is not None
    assert {found.decoded_token for by in one.logprobs for found in by.values()} == {None}


# --- beams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seqs", [1, 2, 3])
def test_the_results_of_a_beam_search_are_one_output(num_seqs: int) -> None:
    made = processor(SamplingParams(logprobs=4), CUMULATIVE, num_seqs=num_seqs, is_beam_search=True)
    step = [
        core("ab", "length", is_last=False, beam=BeamFigures(-1.0, -0.5)),
        core("ac", "stop", index=1, stop_reason=2, beam=BeamFigures(-2.0, -1.0)),
    ]
    assert not made.process(step[:1]).outputs
    (output,) = made.process(step[1:]).outputs
    assert output.finished
    assert output.outputs == (
        CompletionOutput(0, "ab", (0, 1), -1.0, None, "length", None, -0.5),
        CompletionOutput(1, "a", (0, 2), -2.0, None, "stop", 2, -1.0),
    )
    assert "r" not in made


def test_a_beam_search_that_fails_says_why() -> None:
    made = processor(num_seqs=3, is_beam_search=True)
    output = made.fail("r", "why")
    assert output.outputs == (
        CompletionOutput(0, "", (), finish_reason="abort", stop_reason="why"),
    )


# --- faults ---------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("stop", [(), ("q",)])
def test_a_fault_in_one_text_ends_that_request_alone(
    kind: RequestOutputKind, stop: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = processor(SamplingParams(stop=stop), kind, names="rst")
    made.process([core("a", name=name) for name in "rst"])
    processed = made.process(
        [
            core("b"),
            core("z", "length", name="s"),
            core("e", name="s"),
            core("c", "length", name="t"),
        ]
    )
    assert processed.faults == {"s": "OSError: no z"}
    by_name = {output.request_id: output for output in processed.outputs}
    assert by_name["s"].finished
    (one,) = by_name["s"].outputs
    assert (one.finish_reason, one.stop_reason) == ("abort", "OSError: no z")
    assert by_name["t"].outputs[0].finish_reason == "length"
    assert list(made.request_ids) == ["r"]
    assert ("r" in by_name) == (kind is not FINAL_ONLY)
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert record.exc_info is not None
    output, _ = play(made, [[core("d", "length")]], kind)
    assert output.outputs[0].text == ("d" if kind is DELTA else "abd")


@every_kind
def test_a_fault_in_one_of_several_completions_ends_them_all(kind: RequestOutputKind) -> None:
    made = processor(kind=kind, num_seqs=2)
    step = [core("ab", is_last=False), core("cz", "length", index=1, is_last=False)]
    processed = made.process(step)
    (output,) = processed.outputs
    assert output.finished
    assert processed.faults == {"r": "OSError: no z"}
    read = kind is not FINAL_ONLY  # which makes text of what has ended
    assert [(one.text, one.token_ids, one.finish_reason) for one in output.outputs] == [
        ("ab" if read else "", (0, 1), "abort"),
        ("c" if read else "", () if read else (2, 25), "abort"),
    ]
    assert "r" not in made


@every_kind
def test_a_fault_in_a_logprobs_text_is_one_too(kind: RequestOutputKind) -> None:
    made = processor(SamplingParams(logprobs=0), kind, names="rs")
    found = logprobs_of("a")._replace(top_token_ids=np.array([[25, 1]], np.int32))
    step = [core("a", "length", logprobs=found), core("b", "length", name="s")]
    processed = made.process(step)
    assert processed.faults == {"r": "OSError: no z"}
    bad, good = sorted(processed.outputs, key=lambda one: one.request_id)
    assert good.outputs[0].finish_reason == "length"
    (one,) = bad.outputs
    assert one.text == "a"
    assert one.logprobs is not None
    assert set(one.logprobs[0]) == {25, 1, 0}


def test_an_interrupt_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> str:
        raise KeyboardInterrupt

    tokenizer = Letters()
    made = processor(tokenizer=tokenizer, names="rs")
    monkeypatch.setattr(tokenizer, "decode_token", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.process([core("a"), core("b", name="s")])
    assert set(made.request_ids) == {"r", "s"}


# --- fail -----------------------------------------------------------------------------------------


@every_kind
def test_what_fails_keeps_what_it_had(kind: RequestOutputKind) -> None:
    made = processor(SamplingParams(stop="bcd", logprobs=0), kind, num_seqs=2)
    made.process([core("a", "length", is_last=False, logprobs=logprobs_of("a"))])
    made.process([core("ab", index=1, logprobs=logprobs_of("ab"))])
    output = made.fail("r", "why")
    assert output.finished
    assert "r" not in made
    ended = [one for one in output.outputs if one.index == 0]
    (cut,) = (one for one in output.outputs if one.index == 1)
    assert (cut.finish_reason, cut.stop_reason) == ("abort", "why")
    if kind is DELTA:  # both have been given out; but not the text that may begin a stop string
        assert (ended, cut.text, cut.token_ids, cut.logprobs) == ([], "ab", (), ())
        return
    assert (ended[0].text, ended[0].finish_reason, ended[0].stop_reason) == ("a", "length", None)
    assert (cut.text, cut.token_ids) == ("ab", (0, 1))
    assert cut.logprobs is not None
    assert [set(by_token) for by_token in cut.logprobs] == [{3, 4, 0}, {3, 4, 1}]


def test_failing_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        tokenizer = Letters()
        made = processor(SamplingParams(logprobs=2), kind, tokenizer=tokenizer)
        if kind is FINAL_ONLY:
            made.process([core("a", logprobs=logprobs_of("a"))])
        for method in ("decode", "decode_token", "detokenizer"):
            monkeypatch.setattr(tokenizer, method, None)
        (one,) = made.fail("r", None).outputs
        assert one.finish_reason == "abort"
        assert len(one.logprobs or ()) == len(one.token_ids)
        monkeypatch.undo()


def test_an_output_is_in_the_list_before_its_request_is_forgotten() -> None:
    made = processor(names="rs")
    into: list[RequestOutput] = []
    processed = made.process([core("a", "length"), core("b", name="s")], into=into)
    assert processed.outputs is into
    assert [one.request_id for one in into] == ["r", "s"]
    made.fail("s", "why", into)
    assert [(one.request_id, one.finished) for one in into] == [
        ("r", True),
        ("s", False),
        ("s", True),
    ]


@contextlib.contextmanager
def interrupted_before_line(number: int) -> Iterator[None]:
    """Raises KeyboardInterrupt before that line which is run of the processor's files."""
    left = number

    def count(code: CodeType, _: int) -> None:
        nonlocal left
        if code.co_filename.endswith(FILES):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    events = sys.monitoring
    events.use_tool_id(TOOL, "output processor")
    events.register_callback(TOOL, events.events.LINE, count)
    events.set_events(TOOL, events.events.LINE)
    try:
        yield
    finally:
        events.set_events(TOOL, 0)
        events.register_callback(TOOL, events.events.LINE, None)
        events.free_tool_id(TOOL)


def test_a_fault_in_a_stream_ends_that_one_alone() -> None:
    made = processor(kind=DELTA, names="rst")
    made.process([core("a", name=name) for name in "rst"])
    processed = made.process([core("b"), core("z", name="s"), core("c", name="t")])
    assert processed.faults == {"s": "OSError: no z"}
    assert [one.finished for one in processed.outputs] == [False, True, False]
    assert texts(processed) == [["b"], [""], ["c"]]
    assert list(made.request_ids) == ["r", "t"]


@every_kind
def test_an_interrupt_anywhere_leaves_what_can_be_failed(kind: RequestOutputKind) -> None:
    """In a step, and in failing the requests after it: each has one last output, cut short."""
    number = 0
    while True:
        number += 1
        params = SamplingParams(stop="cdc", logprobs=1, prompt_logprobs=0)
        made = processor(params, kind, names="rs", num_seqs=2)
        given: list[RequestOutput] = []
        made.process(
            [
                core("a", name="s", prompt_logprobs=logprobs_of("gh"), logprobs=logprobs_of("a")),
                core("cb", name="s", index=1, logprobs=logprobs_of("cb")),
                core("cb", logprobs=logprobs_of("cb"), prompt_logprobs=logprobs_of("g")),
            ],
            into=given,
        )
        step = [
            core("cdc", name="s", logprobs=logprobs_of("cdc")),
            core("cd", logprobs=logprobs_of("cd"), prompt_logprobs=logprobs_of("h")),
            core("c", "length", name="s", index=1, logprobs=logprobs_of("c")),
        ]
        interrupts = 0
        try:
            with interrupted_before_line(number):
                made.process(step, into=given)
                for name in list(made.request_ids):
                    made.fail(name, "why", given)
        except KeyboardInterrupt:
            interrupts += 1
        for name in list(made.request_ids):
            made.fail(name, "why", given)
        for name, whole in (("r", ["cbcd", ""]), ("s", ["acdc", "cbc"])):
            check_cut(name, whole, [one for one in given if one.request_id == name], kind)
        if not interrupts:
            return


def test_an_interrupt_anywhere_cuts_a_token_stream_short() -> None:
    for number in range(1, 200):
        made = processor(kind=DELTA, names="rs")
        given: list[RequestOutput] = []
        made.process([core("a"), core("x", name="s")], into=given)
        interrupts = 0
        try:
            with interrupted_before_line(number):
                made.process([core("b"), core("y", name="s")], into=given)
        except KeyboardInterrupt:
            interrupts += 1
        for name in "rs":
            made.fail(name, "why", given)
        for name, whole in (("r", "ab"), ("s", "xy")):
            mine = [one for one in given if one.request_id == name]
            assert [one.finished for one in mine] == [False] * (len(mine) - 1) + [True]
            (one,) = functools.reduce(RequestOutput.merged_with, mine).outputs
            assert one.token_ids == tuple(ids(whole))[: len(one.token_ids)]
            assert one.text is not None
            assert whole[: len(one.token_ids)] in (one.text, one.text[:-1])
        if not interrupts:
            return
    raise AssertionError("it never ends")


def check_cut(
    name: str, whole: Sequence[str], given: Sequence[RequestOutput], kind: RequestOutputKind
) -> None:
    """Holds a request's outputs against the tokens of its completions."""
    assert [one.finished for one in given] == [False] * (len(given) - 1) + [True]
    last = given[-1]
    if kind is DELTA:
        last = functools.reduce(RequestOutput.merged_with, given)
    if last.prompt_logprobs is not None:
        places = zip(last.prompt_logprobs[1:], (6, 7), strict=False)
        assert all(by_token is not None and token in by_token for by_token, token in places)
        assert len(last.prompt_logprobs) <= 3
    for one in last.outputs:
        assert one.token_ids == tuple(ids(whole[one.index]))[: len(one.token_ids)], name
        assert one.text is not None
        assert whole[one.index].startswith(one.text)
        assert one.logprobs is not None
        assert len(one.logprobs) == len(one.token_ids)
        for token, by_token in zip(one.token_ids, one.logprobs, strict=True):
            assert token in by_token
        assert (one.stop_reason == "why") == (one.finish_reason == "abort")


# --- all kinds give the same ----------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    text=st.text("abc", min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 3), max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
    end=st.sampled_from(["stop", "length"]),
)
def test_all_kinds_end_alike(
    text: str, cuts: list[int], stop: list[str], min_tokens: int, include: bool, end: FinishReason
) -> None:
    params = SamplingParams(stop=stop, min_tokens=min_tokens, include_stop_str_in_output=include)
    steps, begin = [], 0
    for size in [*cuts, len(text)]:
        piece = text[begin : begin + size]
        begin += size
        is_end = begin >= len(text)
        steps.append([core(piece, end if is_end else None, stop_reason=9 if is_end else None)])
        if is_end:
            break
    last = [play(processor(params, kind), steps, kind) for kind in KINDS]
    assert [(output.outputs, endings) for output, endings in last] == [
        (last[0][0].outputs, last[0][1])
    ] * 3


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    return tokenizer


@every_kind
@pytest.mark.parametrize("size", [1, 4])
def test_text_behind_a_prompt_of_the_demo_model(
    demo: Tokenizer, kind: RequestOutputKind, size: int
) -> None:
    tokens = demo.encode(CODE + "😀 é", add_special_tokens=False)
    prompt, answer = tokens[:5], tokens[5:]
    made = processor(kind=kind, tokenizer=demo, prompt_token_ids=prompt)
    steps = [[core(answer[i : i + size])] for i in range(0, len(answer), size)]
    output, _ = play(made, [*steps, [core([], "length")]], kind)
    assert output.outputs[0].text == demo.decode(tokens)[len(demo.decode(prompt)) :]
    assert output.outputs[0].token_ids == tuple(answer)
