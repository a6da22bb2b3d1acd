"""The engine over a mock device: order of events, errors, aborts; all plans go through bytes."""

import dataclasses

import numpy as np
import pytest

from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.engine.core import intake
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.outputs import RequestOutput
from tests.engine.mock_model import (
    VOCAB_SIZE,
    device_of,
    make_mock_llm,
    make_whole_engine,
    next_token,
)

MAX_MODEL_LEN = 64
GREEDY = SamplingParams(temperature=0, max_tokens=10, detokenize=False)


def make_engine(num_blocks: int = 65, **options: object) -> Engine:
    return make_whole_engine(
        num_blocks=num_blocks, max_num_batched_tokens=32, watermark_blocks=None, **options
    )


def add(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> None:
    for prompt in prompts:
        engine.add(engine.make_group(prompt, params))


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id] = output
    engine.check_idle()
    return outputs


def collect_finished(engine: Engine, finished: list[RequestOutput]) -> None:
    while engine.has_unfinished:
        finished += [output for output in engine.step() if output.finished]


def expected(prompt: list[int], count: int = 10) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(1, 50)).tolist() for _ in range(count)]


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("num_blocks", [17, 24, 65])
def test_packed_steps_give_the_tokens_computed_by_hand(
    num_blocks: int, async_scheduling: bool
) -> None:
    engine = make_engine(num_blocks, async_scheduling=async_scheduling)
    requests = prompts(40)
    add(engine, requests)
    outputs = run(engine)
    assert [o.outputs[0].token_ids for o in outputs.values()] != []
    for index, prompt in enumerate(requests):
        assert outputs[f"request-{index}"].outputs[0].token_ids == expected(prompt)
    if num_blocks == 17:
        assert engine.core.scheduler.num_preemptions > 0


def test_the_next_step_is_dispatched_before_the_last_is_collected() -> None:
    engine = make_engine()
    add(engine, prompts(3))
    run(engine)
    events = [*device_of(engine).events]
    last = int(events[-1].split()[1])
    assert last > 5
    for n in range(last):
        assert events.index(f"dispatch {n + 1}") < events.index(f"collect {n}")
    assert [e for e in events if e.startswith("collect")] == [
        f"collect {n}" for n in range(last + 1)
    ]


def test_without_async_scheduling_nothing_is_in_flight() -> None:
    engine = make_engine(async_scheduling=False)
    add(engine, prompts(3))
    run(engine)
    events = [*device_of(engine).events]
    pairs = zip(events[::2], events[1::2], strict=True)
    assert all(a.split()[1] == b.split()[1] for a, b in pairs)


@pytest.mark.parametrize("failing", ["dispatch 0", "dispatch 3", "collect 0", "collect 4"])
def test_a_failing_step_fails_every_request_and_the_engine_serves_on(failing: str) -> None:
    engine = make_engine()
    requests = prompts(12)

    def fail(event: str) -> None:
        if event == failing:
            device_of(engine).before = lambda event: None
            raise OSError("the device is gone")

    device_of(engine).before = fail
    add(engine, requests)
    finished: list[RequestOutput] = []
    with pytest.raises(OSError, match="the device is gone"):
        collect_finished(engine, finished)
    last = engine.step()
    assert {o.outputs[0].finish_reason for o in last} == {"abort"}
    assert {o.outputs[0].stop_reason for o in last} == {"OSError: the device is gone"}
    assert len(finished) + len(last) == len(requests)
    engine.check_idle()

    add(engine, requests)
    outputs = run(engine)
    for index, prompt in enumerate(requests):
        output = outputs[f"request-{len(requests) + index}"]
        assert output.outputs[0].token_ids == expected(prompt)


@pytest.mark.parametrize("max_tokens", [1, 10])
def test_logits_that_are_not_finite_end_only_their_request(max_tokens: int) -> None:
    engine = make_engine()
    device_of(engine).token = VOCAB_SIZE  # what the step returns for such a row
    add(engine, [[1, 2, 3]], dataclasses.replace(GREEDY, max_tokens=max_tokens))
    (output,) = run(engine).values()
    assert output.outputs[0].token_ids == ()
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].stop_reason == "logits are not finite"


@pytest.mark.parametrize("after_steps", range(6))
def test_abort_returns_the_blocks_in_every_state(after_steps: int) -> None:
    engine = make_engine(num_blocks=20)
    requests = prompts(12, seed=after_steps)
    add(engine, requests)
    seen: dict[str, RequestOutput] = {}
    for _ in range(after_steps):
        seen |= {o.request_id: o for o in engine.step()}
    for victim in ("request-0", "request-5", "request-11"):
        engine.abort(victim)
        engine.abort(victim)
    engine.abort("nobody")
    seen |= run(engine)
    for index, prompt in enumerate(requests):
        completion = seen[f"request-{index}"].outputs[0]
        whole = expected(prompt)
        if index in (0, 5, 11) and completion.finish_reason == "abort":
            assert completion.token_ids == whole[: len(completion.token_ids)]
        else:
            assert (completion.token_ids, completion.finish_reason) == (whole, "length")


def test_metrics_are_in_order() -> None:
    engine = make_engine()
    add(engine, prompts(10))
    for output in run(engine).values():
        m = output.metrics
        assert m.arrival_time_s <= m.first_scheduled_time_s
        assert m.first_scheduled_time_s <= m.first_token_time_s <= m.finish_time_s


def test_each_delta_has_the_metrics_of_its_moment() -> None:
    engine = make_engine(num_blocks=17)
    for prompt in prompts(12):
        group = engine.make_group(prompt, GREEDY)
        engine.add(group, output_kind=RequestOutputKind.DELTA)
    counts: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.metrics.first_token_time_s is not None
            counts.setdefault(output.request_id, []).append(output.metrics.num_preemptions)
    assert all(each == sorted(each) for each in counts.values())
    # With the first token behind the preemption, and not with the last of all.
    assert any(0 < each.index(each[-1]) < len(each) - 1 for each in counts.values())
    assert engine.core.scheduler.num_preemptions == sum(each[-1] for each in counts.values())


# ---- outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_who_wants_the_last_output_only_gets_no_other(num_seqs: int, logprobs: int | None) -> None:
    engine = make_whole_engine(max_num_seqs=9)
    params = dataclasses.replace(GREEDY, temperature=1, n=num_seqs, logprobs=logprobs)
    final, stream = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
    for request_id, kind in (("stream", stream), ("final", final), ("aborted", final)):
        group = engine.make_group([1, 2, 3], params, request_id)
        engine.add(group, output_kind=kind)
    outputs = [output for _ in range(3) for output in engine.step()]
    engine.abort("aborted")
    while engine.has_unfinished:
        outputs += engine.step()
    by_id = {name: [o for o in outputs if o.request_id == name] for name in ("stream", "final")}
    assert len(by_id["stream"]) >= 10
    (final,) = by_id["final"]
    assert final.outputs == by_id["stream"][-1].outputs
    (aborted,) = (o for o in outputs if o.request_id == "aborted")
    tokens = aborted.outputs[0].token_ids
    assert 0 < len(tokens) < 10
    assert tokens == final.outputs[0].token_ids[: len(tokens)]


def refuse(prompt: object, **params: object) -> str:
    engine = make_engine(num_blocks=9)
    with pytest.raises(ValueError, match=r".") as error:
        engine.make_group(prompt, dataclasses.replace(GREEDY, **params))
    assert not engine.has_unfinished
    return str(error.value)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, VOCAB_SIZE], {}, f"holds {VOCAB_SIZE}, which is outside the vocabulary"),
        ([1, -1], {}, "holds -1, which is outside the vocabulary"),
        ([1.5], {}, "must be a flat list of integers"),
        ([[1], [2]], {}, "must be a flat list of integers"),
        ([[1], [2, 3]], {}, "must be a flat list of integers"),
        ("text", {}, "must be a flat list of integers"),
        ([True], {}, "must be a flat list of integers"),
        ([1] * MAX_MODEL_LEN, {}, f"max_model_len={MAX_MODEL_LEN}"),
        ([1] * 60, {"max_tokens": 5}, "max_tokens=5"),
        ([1] * 30, {"max_tokens": 10}, "the KV cache has 8"),
        ([1] * 40, {"max_tokens": None}, "the KV cache has 8"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids holds 61"),
        ([1], {"stop": "x", "detokenize": True}, "stop=('x',) needs"),
    ],
)
def test_bad_requests_are_refused(prompt: object, params: dict, message: str) -> None:
    assert message in refuse(prompt, **params)


def test_max_tokens_none_means_as_many_as_fit() -> None:
    engine = make_engine()
    assert engine.make_group([1] * 10, SamplingParams(max_tokens=None)).max_tokens == 54
    small = make_engine(num_blocks=6)
    assert small.make_group([1] * 10, SamplingParams(max_tokens=None)).max_tokens == 10


def test_more_sequences_than_run_together_are_refused_before_any_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would have a copy of the prompt."""
    engine = make_engine()
    monkeypatch.setattr(intake, "SequenceGroup", lambda **options: pytest.fail("made"))
    with pytest.raises(ValueError, match="16384 sequences run together, and max_num_seqs=8"):
        engine.make_group([1] * 50, SamplingParams(n=16384))


def pinned_engine(prefix: list[int], num_blocks: int) -> Engine:
    """An engine that has computed and pinned the full blocks of a prefix."""
    engine = make_whole_engine(num_blocks=num_blocks, enable_prefix_caching=True)
    add(engine, [[*prefix, 1]], dataclasses.replace(GREEDY, max_tokens=1))
    engine.drain()
    assert engine.pin(prefix, None)
    return engine


@pytest.mark.parametrize(
    ("prompt", "params", "max_tokens"),
    [
        ([7] * 10, {}, 4 * 8 - 10),  # of 11 blocks 3 are pinned
        ([*range(1, 13), 9, 9], {}, 4 * 11 - 14),  # it begins with them
        ([*range(1, 13)], {}, 4 * 10 - 12),  # but for the last, whose last token is computed
        ([*range(1, 9), 9, 9], {}, 4 * 10 - 10),
        ([*range(1, 13), 9, 9], {"skip_reading_prefix_cache": True}, 4 * 8 - 14),
        ([7] * 10, {"n": 2, "temperature": 1}, 4 * 5 - 10),
        ([*range(1, 13), 9, 9], {"n": 2, "temperature": 1}, 4 * 7 - 14),
        ([7] * 28, {}, 4),
    ],
)
def test_max_tokens_none_means_as_many_as_fit_beside_what_is_pinned(
    prompt: list[int], params: dict, max_tokens: int
) -> None:
    engine = pinned_engine([*range(1, 13)], num_blocks=12)
    longest = dataclasses.replace(GREEDY, max_tokens=None, **params)
    group = engine.make_group(prompt, longest)
    assert group.max_tokens == max_tokens
    engine.add(group)
    outputs = [output for _ in range(80) for output in engine.step() if output.finished]
    assert [len(c.token_ids) for c in outputs[0].outputs] == [max_tokens] * group.num_seqs
    engine.check_idle()
    with pytest.raises(ValueError, match="lower max_tokens"):
        engine.make_group(prompt, dataclasses.replace(longest, max_tokens=max_tokens + 1))


def test_a_prompt_without_room_beside_what_is_pinned_is_refused() -> None:
    engine = pinned_engine([*range(1, 13)], num_blocks=12)
    with pytest.raises(ValueError, match="has 8 besides 3 pinned for other prompts"):
        engine.make_group([7] * 32, dataclasses.replace(GREEDY, max_tokens=None))


@pytest.mark.parametrize("verb", ["generate", "stream"])
@pytest.mark.parametrize(
    "bad", [[1, VOCAB_SIZE], [], [1] * 64, [1] * 40], ids=["token", "empty", "long", "large"]
)
def test_a_refused_batch_leaves_no_trace(verb: str, bad: list[int]) -> None:
    """It is refused as a whole, by the index of what is wrong, and nothing has been drawn."""
    good = [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    usual, drawn = noting_llm()
    usual.generate(good, GREEDY, use_tqdm=False)
    llm, drawn_here = noting_llm()
    with pytest.raises(ValueError, match=r"^prompts\[2\]: "):
        getattr(llm, verb)([*good, {"prompt_token_ids": bad}], GREEDY)
    with pytest.raises(ValueError, match=r"."):
        getattr(llm, verb)({"prompt_token_ids": bad}, GREEDY)
    with pytest.raises(ValueError, match="priority"):
        llm.generate(good, GREEDY, priority=[1])
    assert not drawn_here
    assert llm.engine.core.num_steps == 0
    llm.generate(good, GREEDY, use_tqdm=False)
    assert drawn_here == drawn
    assert len(dict(drawn)) == 2


def noting_llm() -> tuple[LLM, list[tuple[str, int]]]:
    """Returns an `LLM`, and a list of the ids and seeds of all requests that it will queue."""
    llm, drawn = make_mock_llm(num_blocks=10, seed=3), []
    add_to_engine = llm.engine.add

    def add_and_note(group: SequenceGroup, *args: object, **options: object) -> None:
        drawn.append((group.request_id, group.sampling_params.seed))
        add_to_engine(group, *args, **options)

    llm.engine.add = add_and_note
    return llm, drawn


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(engine.make_group([1], GREEDY, request_id="a"))
    with pytest.raises(ValueError, match="'a'"):
        engine.add(engine.make_group([1], GREEDY, request_id="a"))
    run(engine)
    engine.add(engine.make_group([1], GREEDY, request_id="a"))


def test_requests_without_a_seed_get_different_ones() -> None:
    engine = make_engine(seed=7)
    seeds = [engine.make_group([1], GREEDY).sampling_params.seed for _ in range(100)]
    assert len(set(seeds)) == 100
    again = make_engine(seed=7)
    assert seeds == [again.make_group([1], GREEDY).sampling_params.seed for _ in range(100)]
