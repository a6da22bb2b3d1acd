"""Several decode steps in one program: when, the same tokens, and what ends them early."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine import RequestOutputKind, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.request import MAX_ENDING_IDS
from pallas_paged.engine.core.step_inputs import views
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.resolved import resolve_num_scheduler_steps
from tests.engine import bigram_model, mock_model
from tests.engine.mock_model import VOCAB_SIZE, device_of, make_whole_engine, next_token
from tests.engine.serving import make_llm

HELD = RequestOutputKind.FINAL_ONLY
GREEDY = SamplingParams(
    temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, output_kind=HELD
)


def steps_of(plan: StepPlan) -> list[int]:
    """Returns how many steps each sequence of a plan makes."""
    x = views(plan.inputs, plan.bucket)
    count = int(np.count_nonzero(x.seq_lens))
    return [1] * count if x.many is None else x.many.num_steps[:count].tolist()


def watch(engine: Engine) -> list[list[int]]:
    """Returns a list to which each dispatched step adds `steps_of`."""
    seen: list[list[int]] = []
    dispatch = engine.core.executor.dispatch

    def watched(plan: StepPlan) -> Any:
        seen.append(steps_of(plan))
        return dispatch(plan)

    engine.core.executor.dispatch = watched  # type: ignore[method-assign]
    return seen


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        engine.core.scheduler.check_invariants()
    engine.check_idle()
    return outputs


def told(outputs: dict[str, RequestOutput]) -> dict[str, Any]:
    """Returns what outputs say, times aside."""
    return {
        name: [(list(o.token_ids), o.finish_reason, o.stop_reason) for o in output.outputs]
        for name, output in outputs.items()
    }


def serve(params: list[SamplingParams], num_scheduler_steps: int, **options: Any) -> Any:
    """Returns what the mock device's requests get, and the steps of each dispatch."""
    engine = make_whole_engine(num_scheduler_steps=num_scheduler_steps, **options)
    seen = watch(engine)
    for index, one in enumerate(params):
        engine.add(engine.make_group([1 + index, 2, 3], one))
    return told(run(engine)), seen


def expected(count: int) -> list[int]:
    """Returns the tokens of the first request, prompt and output."""
    tokens = [1, 2, 3]
    while len(tokens) < 3 + count:
        tokens.append(next_token(tokens))
    return tokens


# ---- how many -----------------------------------------------------------------------------------


def test_a_request_that_nobody_waits_for_is_asked_about_once_in_eight_steps() -> None:
    outputs, seen = serve([GREEDY], 8)
    assert seen == [[1], [8], [8], [3]]
    assert outputs == serve([GREEDY], 1)[0]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"output_kind": RequestOutputKind.CUMULATIVE}, {}),
        ({"output_kind": RequestOutputKind.DELTA}, {}),
        ({"logprobs": 1}, {}),
        ({"presence_penalty": 0.5}, {}),
        ({"stop_token_ids": list(range(MAX_ENDING_IDS + 1))}, {}),
        ({"max_tokens": 1}, {}),
    ],
)
def test_one_step_at_a_time(change: dict[str, Any], options: dict[str, Any]) -> None:
    """Somebody waits for each token, or the host has to see it; also if only one request does."""
    for others in ([], [GREEDY]):
        one = dataclasses.replace(GREEDY, **change)
        _, seen = serve([one, *others], 8, **options)
        mine = [steps for steps in seen if len(steps) > len(others)]
        assert all(steps == [1] * len(steps) for steps in mine)


def test_as_many_as_three_in_four_have_left() -> None:
    lengths = [4, 9, 9, 9]
    params = [dataclasses.replace(GREEDY, max_tokens=length) for length in lengths]
    outputs, seen = serve(params, 8)
    assert seen == [[1] * 4, [3, 8, 8, 8]]
    params = [dataclasses.replace(GREEDY, max_tokens=length) for length in (4, 6, 9, 9)]
    _, seen = serve(params, 8)
    assert seen == [[1] * 4, [3, 5, 5, 5], [3, 3]]
    assert outputs == serve([dataclasses.replace(GREEDY, max_tokens=n) for n in lengths], 1)[0]


def test_who_waits_gets_the_place_of_the_first_to_end() -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=length) for length in (4, 12, 9)]
    outputs, seen = serve(params, 8, max_num_seqs=2)
    assert seen[:2] == [[1, 1], [3, 3]]
    assert outputs == serve(params, 1, max_num_seqs=2)[0]


def test_with_room_for_who_waits_nothing_is_put_off() -> None:
    """Too few blocks are free for the second: it comes as soon as there are enough."""
    engine = make_whole_engine(num_scheduler_steps=8, num_blocks=10, block_size=4)
    seen = watch(engine)
    engine.add(engine.make_group([1, 2, 3], GREEDY))
    engine.add(engine.make_group(list(range(34)), dataclasses.replace(GREEDY, max_tokens=2)))
    run(engine)
    assert seen[:20] == [[1]] * 20


def test_nobody_is_preempted_for_steps_to_come() -> None:
    """Eight tokens more for each need more blocks than there are; one more does not."""
    params = [dataclasses.replace(GREEDY, max_tokens=9)] * 2
    options = {"num_blocks": 7, "block_size": 4, "max_model_len": 12}
    engine = make_whole_engine(num_scheduler_steps=8, **options)
    seen = watch(engine)
    for index, one in enumerate(params):
        engine.add(engine.make_group([1 + index, 2, 3], one))
    run(engine)
    assert engine.core.scheduler.num_preemptions == 0
    assert seen == [[1, 1], [8, 8]]
    tight = make_whole_engine(num_scheduler_steps=8, **(options | {"num_blocks": 6}))
    seen = watch(tight)
    for index, one in enumerate(params):
        tight.add(tight.make_group([1 + index, 2, 3], one))
    run(tight)
    assert seen[1] == [1, 1], "a step at a time, as long as that fits"


# ---- what ends them -----------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("place", range(1, 18))
def test_an_ending_token_in_the_middle(place: int, async_scheduling: bool) -> None:
    """Whatever comes behind it in the same program, or in the next one, is dropped."""
    stop = expected(20)[3 + place]
    params = [dataclasses.replace(GREEDY, stop_token_ids=[stop]), GREEDY]
    many, _ = serve(params, 8, async_scheduling=async_scheduling, enable_prefix_caching=True)
    alone, _ = serve(params, 1, async_scheduling=async_scheduling, enable_prefix_caching=True)
    assert many == alone


@pytest.mark.parametrize("place", range(1, 18))
def test_only_blocks_of_tokens_are_cached(place: int) -> None:
    """What lies in the place of the last token, and behind it, is in none of them."""
    tokens = expected(20)
    engine = make_whole_engine(num_scheduler_steps=8, enable_prefix_caching=True, block_size=4)
    params = dataclasses.replace(GREEDY, stop_token_ids=tokens[3 + place : 4 + place])
    engine.add(engine.make_group(tokens[:3], params))
    (output,) = run(engine).values()
    length = 3 + len(output.outputs[0].token_ids)
    cache = engine.memory.prefix_cache
    assert cache is not None
    assert len(cache) == (length - 1) // 4, "the last token is in no block that is computed"


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("place", range(3, 20))
def test_logits_that_are_not_finite_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, place: int, async_scheduling: bool
) -> None:
    """The tokens before them are the request's; the others know nothing of it."""
    sampled = mock_model.sampled_token

    def fails_there(token_ids: list[int], index: int, window: int | None = None) -> int:
        if token_ids[0] == 1 and len(token_ids) == place:
            return VOCAB_SIZE
        return sampled([t % VOCAB_SIZE for t in token_ids], index, window)

    monkeypatch.setattr(mock_model, "sampled_token", fails_there)
    params = [GREEDY, GREEDY]
    many, _ = serve(params, 8, async_scheduling=async_scheduling)
    alone, _ = serve(params, 1, async_scheduling=async_scheduling)
    assert many == alone
    (output,) = alone["request-0"]
    assert output[1:] == ("abort", "logits are not finite")
    assert len(output[0]) == place - 3
    assert alone["request-1"][0][1] == "length"


def test_an_abort_between_two_programs() -> None:
    engine = make_whole_engine(num_scheduler_steps=8)
    for index in range(2):
        engine.add(engine.make_group([1 + index, 2, 3], GREEDY))
    for _ in range(3):
        engine.step()
    engine.abort("request-0")
    outputs = told(run(engine))
    tokens, reason, _ = outputs["request-0"][0]
    whole = serve([GREEDY, GREEDY], 1)[0]
    assert reason == "abort"
    assert tokens == whole["request-0"][0][0][: len(tokens)]
    assert len(tokens) == 9
    assert outputs["request-1"] == whole["request-1"]


# ---- on a real device ---------------------------------------------------------------------------


def test_the_tokens_computed_in_numpy() -> None:
    """Greedy and sampled, to the end of their length, by the model's EOS and by a stop token."""
    table = bigram_model.make_table(3)
    engine = bigram_model.make_engine(table, num_scheduler_steps=5)
    seen = watch(engine)
    base = SamplingParams(temperature=0, max_tokens=25, detokenize=False, output_kind=HELD)
    params = [
        base,
        dataclasses.replace(base, ignore_eos=True),
        *(dataclasses.replace(base, temperature=1.0, seed=seed, top_p=0.9) for seed in range(8)),
        *(
            dataclasses.replace(base, temperature=1.5, seed=seed, stop_token_ids=[4, 5])
            for seed in range(8)
        ),
    ]
    prompts = [[1 + i % 20, 2, 3] for i in range(len(params))]
    outputs = bigram_model.run(engine, prompts, params)
    lengths = set()
    for output, prompt, one in zip(outputs, prompts, params, strict=True):
        wanted = bigram_model.expected(table, prompt, one)
        assert list(output.outputs[0].token_ids) == wanted
        lengths.add(len(wanted))
    assert len(lengths) > 5, "they end at different places"
    assert max(map(max, seen)) == 5


def test_a_sequence_that_has_ended_runs_no_further() -> None:
    """Without a live sequence the loop is left, also by the step that was in flight meanwhile."""
    table = np.full((bigram_model.VOCAB_SIZE,) * 2, -1.0, np.float32)
    for token in range(1, bigram_model.VOCAB_SIZE):
        table[token, (token + 1) % bigram_model.VOCAB_SIZE] = 1.0
    engine = bigram_model.make_engine(table, num_scheduler_steps=16)
    results = []
    collect = engine.core.executor.collect

    def collected(in_flight: Any) -> Any:
        results.append(collect(in_flight))
        return results[-1]

    engine.core.executor.collect = collected  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=40, detokenize=False, output_kind=HELD)
    (output,) = bigram_model.run(engine, [[18]], [params])
    assert list(output.outputs[0].token_ids) == [19, 20, 21, 22, 23, 0]
    first, second, third = (result.tokens[0].tolist() for result in results)
    assert first[0] == 19
    assert second == [20, 21, 22, 23, 0] + [0] * 11
    assert third == [0] * 16


def test_the_same_outputs_with_and_without() -> None:
    """Of a real model: prompts in chunks, samples of one prompt, prefixes cached from before."""
    params = [
        SamplingParams(temperature=0, max_tokens=23, detokenize=False),
        SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=19, detokenize=False),
        SamplingParams(temperature=0.7, seed=6, top_k=5, max_tokens=40, detokenize=False),
    ]
    prompts = [{"prompt_token_ids": [*range(3, 40), 7 + i]} for i in range(3)]
    found = []
    for num_steps in (1, 8):
        llm = make_llm(
            "llama-mqa-linear", num_scheduler_steps=num_steps, max_num_seqs=8, block_size=4
        )
        seen = watch(llm.engine)
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([list(c.token_ids) for output in outputs for c in output.outputs])
        assert max(map(max, seen)) == num_steps
        assert llm.kv_stats().num_hit_tokens
    assert found[0] == found[1] == found[2] == found[3]


def test_how_many_by_default() -> None:
    default = EngineConfig("m")
    assert [resolve_num_scheduler_steps(default, name) for name in ("cpu", "gpu")] == [8, 1]
    chosen = EngineConfig("m", num_scheduler_steps=3)
    assert [resolve_num_scheduler_steps(chosen, name) for name in ("cpu", "gpu")] == [3, 3]
    fixed = EngineConfig("m", deterministic=True)
    assert resolve_num_scheduler_steps(fixed, "cpu") == 1
    with pytest.raises(ValueError, match=r"num_scheduler_steps=0 must be None or an integer >= 1"):
        EngineConfig("m", num_scheduler_steps=0)
    with pytest.raises(ValueError, match="deterministic=True, where every step has the same shape"):
        EngineConfig("m", num_scheduler_steps=2, deterministic=True)
    assert device_of(make_whole_engine()).token is None
