"""Beam search through the engine: transformers' results, and the same ones whatever else runs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine import LLM, BeamSearchParams, RequestOutput, SamplingParams
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.step_inputs import views
from pallas_paged.engine.engine import Engine
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine import beam_oracle, bigram_model
from tests.engine.serving import MIN_MARGIN, assert_idle, make_llm
from tests.models.references import DATA

pytestmark = pytest.mark.usefixtures("optimised")

NAME = "llama-gqa-llama3"
RECORDED = Path(__file__).parent / "data"
PROMPT = {"prompt_token_ids": [5, 17, 99, 42, 7]}


def recorded_cases(name: str) -> list[dict[str, Any]]:
    """Returns what `record_beam_search.py` recorded."""
    cases = json.loads((RECORDED / f"beam-search-{name}.json").read_text())
    assert isinstance(cases, list)
    return cases


def prompt_of(case: dict[str, Any]) -> dict[str, list[int]]:
    return {"prompt_token_ids": case["prompt"]}


def params_of(case: dict[str, Any]) -> BeamSearchParams:
    return BeamSearchParams(
        case["width"],
        case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        num_return=case["num_return"],
        stop_token_ids=case["ending_ids"],
        ignore_eos=True,
    )


def check_as_recorded(
    outputs: Sequence[RequestOutput], cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Asserts that outputs equal the recorded ones; returns cases that parted at a close choice."""
    parted = []
    for output, case in zip(outputs, cases, strict=True):
        tokens = [list(completion.token_ids) for completion in output.outputs]
        if tokens != case["tokens"] and case["margin"] < MIN_MARGIN:
            parted.append(case)
            continue
        assert tokens == case["tokens"], case
        for completion, score in zip(output.outputs, case["scores"], strict=True):
            assert completion.score == pytest.approx(score, rel=1e-4, abs=1e-4)
            length = len(completion.token_ids)
            total = score * length ** case["length_penalty"]
            assert completion.cumulative_logprob == pytest.approx(total, rel=1e-4, abs=1e-4)
            ends = completion.token_ids[-1] in case["ending_ids"]
            assert completion.finish_reason == ("stop" if ends else "length")
            assert completion.stop_reason == (completion.token_ids[-1] if ends else None)
    return parted


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(
        NAME, max_num_seqs=16, max_num_batched_tokens=64, block_size=4, deterministic=True
    )


@pytest.mark.parametrize(
    "name", [NAME, "opt-prenorm", pytest.param("demo", marks=pytest.mark.slow)]
)
def test_results_are_those_of_transformers(name: str, llm: LLM) -> None:
    cases = recorded_cases(name)
    if name != NAME:
        llm = LLM(
            DEMO_MODEL if name == "demo" else DATA / name,
            num_blocks=400,
            compilation_cache_dir=None,
            dtype="float32",
            max_num_seqs=32,
            max_num_batched_tokens=64,
            block_size=8,
            deterministic=True,  # few programs
        )
    outputs = llm.beam_search(
        [prompt_of(case) for case in cases], [params_of(case) for case in cases], use_tqdm=False
    )
    assert_idle(llm)
    parted = check_as_recorded(outputs, cases)
    assert len(parted) <= 0.01 * len(cases), parted
    if llm.tokenizer is not None:
        for result in (result for output in outputs for result in output.outputs):
            shown = result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids
            assert result.text == llm.tokenizer.decode(shown, skip_special_tokens=True)


def texts_aside(output: RequestOutput) -> list[tuple]:
    return [(c.token_ids, c.score, c.finish_reason, c.stop_reason) for c in output.outputs]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """Some that fit into 16 sequences, of all widths and settings."""
    return recorded_cases(NAME)[::5]


@pytest.fixture(scope="module")
def alone(llm: LLM, cases: list[dict[str, Any]]) -> list[list[tuple]]:
    """What each case gives by itself."""
    outputs = []
    for case in cases:
        outputs += llm.beam_search(prompt_of(case), params_of(case), use_tqdm=False)
        assert_idle(llm)
    assert not check_as_recorded(outputs, cases)
    return [texts_aside(output) for output in outputs]


@pytest.mark.parametrize("overlaps", [True, False])
def test_batched_beams_get_the_same_results(
    llm: LLM, cases: list, alone: list, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.engine.core, "_async_scheduling", overlaps)
    outputs = llm.beam_search(
        [prompt_of(case) for case in cases], [params_of(case) for case in cases], use_tqdm=False
    )
    assert_idle(llm)
    assert [texts_aside(output) for output in outputs] == alone


def test_beams_and_samples_share_a_batch(llm: LLM, cases: list, alone: list) -> None:
    """Nobody's results depend on the others, and those who sample run in every step."""
    others = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1, n=3, seed=4, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=7, logprobs=2),
    ]
    expected = [llm.generate(PROMPT, params, use_tqdm=False)[0] for params in others]
    mixed: list[Any] = []
    for index, case in enumerate(cases):
        mixed += [(prompt_of(case), params_of(case)), (PROMPT, others[index % 3])]
    prompts, params = zip(*mixed, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    assert_idle(llm)
    assert [texts_aside(output) for output in outputs[::2]] == alone
    for index, output in enumerate(outputs[1::2]):
        for mine, wanted in zip(output.outputs, expected[index % 3].outputs, strict=True):
            assert mine == wanted
            assert mine.score is None


def test_others_go_on_while_beams_wait(llm: LLM) -> None:
    """Beams run in every second step at most, a greedy request beside them in each."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    beams = BeamSearchParams(3, 5, ignore_eos=True)
    groups = [llm.engine.make_group(PROMPT["prompt_token_ids"], p) for p in (greedy, beams)]
    for group in groups:
        llm.engine.add(group)
    dispatched: list[list[int]] = []
    dispatch = llm.runner.dispatch

    def counts_of(plan: StepPlan) -> list[int]:
        rows = set(views(plan.inputs, plan.bucket).rows.tolist())
        return [sum(s.row in rows for s in group.sequences) for group in groups]

    try:
        llm.runner.dispatch = lambda plan: dispatched.append(counts_of(plan)) or dispatch(plan)
        llm.engine.drain()
    finally:
        del llm.runner.dispatch
    assert [counts[0] for counts in dispatched[:12]] == [1] * 12
    assert [counts[1] for counts in dispatched[:12]] == [1, 0, 3, 0, 3, 0, 3, 0, 3, 0, 0, 0]


def test_an_abort_at_any_step_returns_every_block(llm: LLM) -> None:
    params = BeamSearchParams(5, 12, num_return=3, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    (whole,) = llm.generate(PROMPT, greedy, use_tqdm=False)
    lengths = set()
    for num_steps in range(26):
        group = llm.engine.make_group(list(range(5, 28)), params)
        other = llm.engine.make_group(PROMPT["prompt_token_ids"], greedy)
        llm.engine.add(group)
        llm.engine.add(other)
        outputs = {}
        for _ in range(num_steps):
            outputs |= {output.request_id: output for output in llm.engine.step()}
        llm.engine.abort(group.request_id)
        llm.engine.abort(group.request_id)
        while llm.engine.has_unfinished:
            outputs |= {output.request_id: output for output in llm.engine.step()}
        assert_idle(llm)
        assert outputs[other.request_id].outputs[0].token_ids == whole.outputs[0].token_ids
        output = outputs[group.request_id]
        assert output.finished
        scores = [c.score for c in output.outputs if c.score is not None]
        assert scores == sorted(scores, reverse=True)
        lengths.add(len(output.outputs[0].token_ids))
        if output.outputs[0].finish_reason == "abort":
            count = 3 if output.outputs[0].token_ids else 1
            assert [c.finish_reason for c in output.outputs] == ["abort"] * count
    assert lengths == set(range(13))


def test_an_error_ends_a_search_and_the_engine_goes_on(
    llm: LLM, cases: list, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = llm.engine.make_group(PROMPT["prompt_token_ids"], BeamSearchParams(4, 9, num_return=2))
    llm.engine.add(group)
    for _ in range(4):
        assert llm.engine.step() == []
    with monkeypatch.context() as patch:

        def fail(plan: StepPlan) -> None:
            raise OSError("no device")

        patch.setattr(llm.runner, "dispatch", fail)
        with pytest.raises(OSError, match="no device"):
            llm.engine.step()
    (output,) = llm.engine.step()
    assert [c.stop_reason for c in output.outputs] == ["OSError: no device"]
    assert [c.finish_reason for c in output.outputs] == ["abort"]
    assert_idle(llm)
    outputs = llm.beam_search(prompt_of(cases[0]), params_of(cases[0]), use_tqdm=False)
    assert texts_aside(outputs[0]) == alone[0]


def test_a_prefix_hit_gives_the_results_of_a_cold_run(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(40, 70))}
    params = BeamSearchParams(4, 10, ignore_eos=True)
    skipping = dataclasses.replace(
        params, skip_reading_prefix_cache=True, skip_writing_prefix_cache=True
    )
    (cold,) = llm.beam_search(prompt, skipping, use_tqdm=False)
    (first,) = llm.beam_search(prompt, params, use_tqdm=False)
    (warm,) = llm.beam_search(prompt, params, use_tqdm=False)
    assert [o.num_cached_tokens for o in (cold, first, warm)] == [0, 0, 28]
    assert texts_aside(cold) == texts_aside(first) == texts_aside(warm)
    # What a beam generated is found as well, if its blocks are full.
    longer = {"prompt_token_ids": [*prompt["prompt_token_ids"], *warm.outputs[0].token_ids]}
    (again,) = llm.beam_search(longer, params, use_tqdm=False)
    assert again.num_cached_tokens == 36
    assert_idle(llm)


def test_blocks_are_shared_at_each_step(llm: LLM) -> None:
    """The blocks in use are those that distinct prefixes take, and none is ever copied whole."""
    prompt = list(range(5, 48))
    group = llm.engine.make_group(prompt, BeamSearchParams(8, 24, ignore_eos=True))
    llm.engine.add(group)
    S, saved = 4, []
    tables = llm.engine.memory
    while llm.engine.has_unfinished:
        llm.engine.step()
        if not group.live or group.live[0].progress.num_computed < len(prompt):
            continue
        prefixes = {
            tuple(beam.token_ids[: min(end, beam.progress.num_reserved)])
            for beam in group.live
            for end in range(S, beam.progress.num_reserved + S, S)
        }
        blocks = np.unique(tables.tables[[beam.row for beam in group.live]])
        assert np.count_nonzero(blocks) <= len(prefixes)
        full = {prefix for prefix in prefixes if len(prefix) % S == 0}
        assert np.count_nonzero(blocks) >= len(full)
        saved.append(llm.kv_stats().saved_share)
    assert_idle(llm)
    assert np.mean(saved) > 0.6


def test_an_output_is_the_results_and_comes_once(llm: LLM) -> None:
    params = BeamSearchParams(6, 8, num_return=4, length_penalty=0.5, ignore_eos=True)
    (output,) = llm.stream(PROMPT, params)
    assert output.finished
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    scores = [c.score for c in output.outputs]
    assert scores == sorted(scores, reverse=True)
    for completion in output.outputs:
        assert len(completion.token_ids) == 8
        assert completion.text is None
        assert completion.logprobs is None
        assert completion.cumulative_logprob / 8**0.5 == pytest.approx(completion.score)
    metrics = output.metrics
    assert metrics.first_scheduled_time_s < metrics.first_token_time_s < metrics.finish_time_s
    (best,) = llm.beam_search(PROMPT, dataclasses.replace(params, num_return=1), use_tqdm=False)
    assert texts_aside(best) == texts_aside(output)[:1]


def test_one_beam_is_greedy(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
    (wanted,) = llm.generate(PROMPT, greedy, use_tqdm=False)
    (output,) = llm.beam_search(PROMPT, BeamSearchParams(1, 10, ignore_eos=True), use_tqdm=False)
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    total = wanted.outputs[0].cumulative_logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    table = bigram_model.make_table(3)
    table[:, bigram_model.EOS] += 2.0
    table[:, 23] = -30.0
    table[22, 23] = 9.0  # only behind 22 comes a token behind which no logits are finite
    table[23] = np.nan
    return table


@pytest.fixture(scope="module")
def engine(table: np.ndarray) -> Engine:
    return bigram_model.make_engine(table)


class TestBigram:
    """The model's own EOS, and logits that are not finite."""

    @pytest.mark.parametrize("ignore_eos", [False, True])
    def test_eos(self, engine: Engine, table: np.ndarray, ignore_eos: bool) -> None:
        logprobs = table - np.log(np.exp(table.astype(np.float64)).sum(-1, keepdims=True))
        prompts = [[1 + i, 2, 3] for i in range(6)]
        params = BeamSearchParams(3, 12, ignore_eos=ignore_eos, stop_token_ids=[9], num_return=2)
        outputs = bigram_model.run(engine, prompts, [params] * 6)
        for prompt, output in zip(prompts, outputs, strict=True):
            expected = beam_oracle.beam_search(
                lambda tokens: logprobs[tokens[-1]],
                prompt,
                width=3,
                max_tokens=12,
                ending_ids=[9] if ignore_eos else [9, bigram_model.EOS],
            )
            for result, wanted in zip(output.outputs, expected, strict=False):
                assert result.token_ids == wanted.tokens
                assert result.score == pytest.approx(wanted.score, abs=1e-5)
                last = result.token_ids[-1]
                stops = last == 9 or (last == bigram_model.EOS and not ignore_eos)
                assert result.finish_reason == ("stop" if stops else "length")
                assert result.stop_reason == (9 if last == 9 else None)
        ends = {o.outputs[0].token_ids[-1] for o in outputs}
        assert (bigram_model.EOS in ends) or ignore_eos

    def test_logits_that_are_not_finite_end_the_search_alone(self, engine: Engine) -> None:
        greedy = SamplingParams(temperature=0, max_tokens=1)
        outputs = bigram_model.run(engine, [[1, 2, 22], [7]], [BeamSearchParams(2, 12), greedy])
        assert len(outputs[0].outputs) == 2
        for result in outputs[0].outputs:
            assert result.finish_reason == "abort"
            assert result.stop_reason == "logits are not finite"
            assert len(result.token_ids) == 1
        assert outputs[1].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width=0 must be an integer >= 1"),
        ({"beam_width": True}, "beam_width=True must be an integer >= 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer >= 1"),
        ({"max_tokens": None}, "max_tokens=None must be an integer >= 1; a search needs"),
        ({"length_penalty": float("nan")}, r"length_penalty=nan must be a finite number in \[-10"),
        ({"length_penalty": 11}, r"length_penalty=11 must be a finite number in \[-10, 10\]"),
        ({"early_stopping": "always"}, "early_stopping='always' must be False, True or \"never\""),
        ({"early_stopping": 1}, "early_stopping=1 must be"),
        ({"num_return": 5}, "num_return=5 must be at most beam_width=4"),
        ({"num_return": 0}, "num_return=0 must be an integer >= 1 or None"),
        ({"temperature": 0.7}, "temperature=0.7 must be .* 0; use SamplingParams to sample"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"stop_token_ids": 3}, "stop_token_ids=3 must be a list of token ids"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 5} | fields))


def test_what_the_engine_cannot_do_is_refused_by_name(llm: LLM) -> None:
    def search(*args: Any, prompt: Any = PROMPT, **options: Any) -> None:
        llm.beam_search(prompt, BeamSearchParams(*args, **options), use_tqdm=False)

    with pytest.raises(ValueError, match="17 sequences run together, and max_num_seqs=16"):
        search(17, 5)
    with pytest.raises(ValueError, match=r"33 most likely tokens .* 32; .* max_logprobs=33"):
        search(31, 5)  # the model has two ending tokens
    with pytest.raises(ValueError, match="beam_width=159 and 2 ending tokens are more than the"):
        search(159, 5)
    with pytest.raises(ValueError, match=r"in each of 16 sequences, 497 blocks, .* has 399"):
        search(16, 123, ignore_eos=True)
    with pytest.raises(ValueError, match="max_tokens=200 are more than max_model_len=128"):
        search(2, 200)
    with pytest.raises(ValueError, match="stop_token_ids holds 999, which is outside"):
        search(2, 5, stop_token_ids=[999])
    with pytest.raises(ValueError, match=r"params=SamplingParams\(.* must be BeamSearchParams"):
        llm.beam_search(PROMPT, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompts\[1\]: the prompt is empty"):
        llm.beam_search([PROMPT, {"prompt_token_ids": []}], BeamSearchParams(2, 5))
    with pytest.raises(TypeError, match="top_p"):
        BeamSearchParams(2, 5, top_p=0.9)  # type: ignore[call-arg]
    assert_idle(llm)
