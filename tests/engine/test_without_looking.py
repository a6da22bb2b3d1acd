"""Engines whose programs never look at their inputs to decide what to skip, as on a GPU."""

from typing import Any

import numpy as np
import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.config import LOGPROBS_MODES
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device import placement, pool_size
from tests.engine.serving import assert_idle, make_llm, nothing_compiles

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 7},
    "top_k and logprobs": {"top_k": 40, "logprobs": 3},
    "own logprobs": {"temperature": 0.7, "logprobs": 0},
    "own logprobs and top_k": {"top_k": 5, "logprobs": 0},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "prompt_logprobs": 2},
    "bias": {"logit_bias": {5: 3.0}, "allowed_token_ids": [5, 6, 7, 9]},
}


def params_of(kind: str, seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=9, ignore_eos=True, **KINDS[kind])


def prompts_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt_token_ids": rng.integers(3, 60, rng.integers(2, 40)).tolist()}
        for _ in range(count)
    ]


@pytest.fixture
def looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (placement, pool_size):
        monkeypatch.setattr(module, "may_look", lambda platform: False)


OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_scheduler_steps": 4}


def outputs(kinds: list[str], mode: str) -> list[tuple[list[int], object, object]]:
    llm = make_llm("llama-mqa-linear", **OPTIONS, logprobs_mode=mode)
    prompts = prompts_of(len(kinds))
    done = llm.generate(prompts, [params_of(kind, i) for i, kind in enumerate(kinds)])
    assert_idle(llm)
    return [
        (list(one.outputs[0].token_ids), one.prompt_logprobs, one.outputs[0].logprobs)
        for one in done
    ]


def logprobs(found: object) -> list[float]:
    assert isinstance(found, tuple)
    return [entry.logprob for place in found if place for entry in place.values()]


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_the_same_tokens_as_with_looking(mode: str, request: pytest.FixtureRequest) -> None:
    kinds = [*KINDS, *reversed(KINDS), *["penalties"] * 6]  # rows are cleared for the next one
    expected = outputs(kinds, mode)
    request.getfixturevalue("looks_at_nothing")
    found = outputs(kinds, mode)
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in expected]
    for (_, *all_ours), (_, *all_theirs) in zip(found, expected, strict=True):
        for ours, theirs in zip(all_ours, all_theirs, strict=True):
            if theirs is not None:
                np.testing.assert_allclose(logprobs(ours), logprobs(theirs), rtol=1e-4, atol=1e-5)


def test_top_p_depends_on_no_company(looks_at_nothing: None) -> None:
    prompts = prompts_of(6, seed=1)
    params = [
        SamplingParams(seed=i, top_p=0.7, top_k=(0, 12)[i % 2], max_tokens=9, ignore_eos=True)
        for i in range(6)
    ]
    llm = make_llm("llama-mqa-linear", **OPTIONS)
    together = [one.outputs[0].token_ids for one in llm.generate(prompts, params)]
    alone = [
        llm.generate(prompt, one)[0].outputs[0].token_ids
        for prompt, one in zip(prompts, params, strict=True)
    ]
    assert together == alone


def test_what_a_step_does_not_need_is_left_out(looks_at_nothing: None) -> None:
    """By the programs that have run; and all that may are compiled ahead."""
    llm = make_llm("llama-mqa-linear", **OPTIONS)
    llm.warm_up()
    ran: list[Bucket] = []
    choose = llm.runner.choose
    llm.engine.core._planner._choose = lambda best, fits: ran.append(best) or choose(best, fits)
    with nothing_compiles(llm.runner):
        llm.generate(prompts_of(1), params_of("temperature", 1))
        assert ran
        assert not any(bucket.has_decodes for bucket in ran if not bucket.is_decode)
        assert not any(bucket.filters for bucket in ran if bucket.is_decode)
        ran.clear()
        llm.generate(prompts_of(1), params_of("top_k", 1))
        assert all(bucket.filters for bucket in ran if bucket.is_decode)
        ran.clear()
        short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        llm.generate(prompts_of(5, seed=2), [short] * 4 + [params_of("greedy", 0)])
        mixed = [bucket for bucket in ran if not bucket.is_decode]
        assert {bucket.has_decodes for bucket in mixed} == {False, True}
        for kind in KINDS:
            llm.generate(prompts_of(3), params_of(kind, 5))
