"""Several completions of one prompt: computed once, forked, and each with its own draws."""

import dataclasses

import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.core import step_inputs
from tests.engine.serving import assert_idle, make_llm, reference_requests

NAME = "llama-gqa-llama3"
PARAMS = SamplingParams(n=5, temperature=1.0, max_tokens=12, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(
        NAME, max_num_seqs=16, max_num_batched_tokens=64, block_size=4, deterministic=True
    )


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[tuple[int, ...]]]:
    """What each of the first prompts gets by itself."""
    prompts = reference_requests(NAME)[:8]
    return [tokens(llm, [prompt], PARAMS)[0] for prompt in prompts]


def tokens(llm: LLM, prompts: list, params: SamplingParams) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    for output in outputs:
        assert [completion.index for completion in output.outputs] == list(range(params.n))
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_completions_differ_and_repeat(llm: LLM, alone: list) -> None:
    assert len({len(set(completions)) for completions in alone}) == 1
    assert len(set(alone[0])) == 5
    assert tokens(llm, reference_requests(NAME)[:1], PARAMS)[0] == alone[0]


def test_a_completion_depends_on_seed_and_index_only(llm: LLM, alone: list) -> None:
    """Fewer completions are the first ones of many, and n=1 is the first."""
    prompts = reference_requests(NAME)[:3]
    for n in (1, 2, 16):
        several = tokens(llm, prompts, dataclasses.replace(PARAMS, n=n))
        for mine, reference in zip(several, alone, strict=False):
            assert mine[:5] == reference[:n]


def test_batched_groups_get_the_same_tokens(llm: LLM, alone: list) -> None:
    assert tokens(llm, reference_requests(NAME)[:8], PARAMS) == alone


def test_the_prompt_is_computed_once(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(5, 55))}
    computed = []
    dispatch = llm.runner.dispatch

    def counted(plan):
        inputs = step_inputs.views(plan.inputs, plan.bucket)
        computed.append(int(inputs.query_start_loc[-1]))
        return dispatch(plan)

    llm.runner.dispatch = counted
    try:
        tokens(llm, [prompt], dataclasses.replace(PARAMS, n=16, max_tokens=2))
    finally:
        del llm.runner.dispatch
    assert computed == [50, 16]


def test_a_stream_brings_every_completion_forward(llm: LLM, alone: list) -> None:
    seen = [()] * 5
    for output in llm.stream(reference_requests(NAME)[:1], PARAMS):
        for i, completion in enumerate(output.outputs):
            assert completion.token_ids[: len(seen[i])] == seen[i]
            seen[i] = completion.token_ids
        assert output.finished == all(c.finish_reason for c in output.outputs)
    assert seen == alone[0]


def test_some_completions_end_before_others(llm: LLM, alone: list) -> None:
    """A stop token of one completion leaves the rest alone."""
    stop = alone[0][1][3]
    params = dataclasses.replace(PARAMS, stop_token_ids=[stop])
    (output,) = llm.generate(reference_requests(NAME)[:1], params, use_tqdm=False)
    assert_idle(llm)
    for completion, whole in zip(output.outputs, alone[0], strict=True):
        cut = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert completion.token_ids == cut
        assert completion.finish_reason == ("stop" if stop in whole else "length")


def test_more_than_can_run_at_once_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="17 sequences run together, and max_num_seqs=16"):
        llm.generate([{"prompt_token_ids": [5]}], dataclasses.replace(PARAMS, n=17))
    small = make_llm(NAME, max_num_seqs=16, num_blocks=9, block_size=4, deterministic=True)
    with pytest.raises(ValueError, match=r"in each of 8 sequences, .* the KV cache has 8"):
        small.generate([{"prompt_token_ids": [5]}], dataclasses.replace(PARAMS, n=8))
    fitting = dataclasses.replace(PARAMS, n=8, max_tokens=None)
    (output,) = small.generate([{"prompt_token_ids": [5]}], fitting, use_tqdm=False)
    assert {len(completion.token_ids) for completion in output.outputs} == {3}


def test_nothing_compiles_after_warm_up() -> None:
    """Blocks are copied, and swapped, by programs that are there; test_llm.py sees to the steps."""
    llm = make_llm(
        NAME,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        block_size=4,
        num_blocks=30,
        deterministic=True,  # one shape
        swap_space=1e-3,
        preemption_mode="swap",
    )
    llm.warm_up()
    steps, blocks = dict(llm.runner.programs.num_traces), dict(llm.runner.block_programs.num_traces)
    rng = np.random.default_rng(0)
    for n in (1, 2, 2):
        prompts = [
            {"prompt_token_ids": rng.integers(5, 100, length).tolist()} for length in (1, 5, 18)
        ]
        tokens(llm, prompts, dataclasses.replace(PARAMS, n=n, max_tokens=6))
    assert llm.runner.programs.num_traces == steps
    assert llm.runner.block_programs.num_traces == blocks
    assert set(blocks.values()) == {1}
