"""What few requests ask for, from end to end: alone, in company, preempted."""

import dataclasses

import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.buckets import Bucket
from tests.engine.serving import assert_idle, make_llm, reference_requests

NAME = "llama-gqa-llama3"
VOCAB_SIZE = 160
PROMPTS = reference_requests(NAME)
PLAIN = SamplingParams(max_tokens=12, seed=1, temperature=0.9, top_k=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """One shape, so that two programs are all that compiles; a pool that is soon full."""
    return make_llm(
        NAME,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=4,
        num_blocks=33,
        max_logprobs=-1,
        deterministic=True,
    )


@pytest.fixture
def ran(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """Collects the programs that run."""
    buckets: list[Bucket] = []
    programs = llm.runner.programs

    def call(bucket: Bucket, *args: object) -> object:
        buckets.append(bucket)
        return programs(bucket, *args)

    monkeypatch.setattr(llm.runner, "programs", call)
    return buckets


def test_steps_that_need_nothing_of_it_are_plain(llm: LLM, ran: list[Bucket]) -> None:
    llm.generate(PROMPTS[:2], PLAIN, use_tqdm=False)
    assert not any(bucket.is_full for bucket in ran)
    params = [dataclasses.replace(PLAIN, max_tokens=3, logprobs=0), PLAIN]
    llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert 0 < sum(bucket.is_full for bucket in ran) < 6


# ---- logprobs ----------------------------------------------------------------------------------


def test_logprobs_of_the_whole_vocabulary_hold_what_fewer_give(llm: LLM) -> None:
    """In any company and preempted; tokens are what they are without them."""
    asked = [0, 5, None, 20, 1, None, 0, 20, 3]
    params = [dataclasses.replace(PLAIN, logprobs=k, seed=i) for i, k in enumerate(asked)]
    outputs = llm.generate(PROMPTS[:9], params, use_tqdm=False)
    assert_idle(llm)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    everything = [dataclasses.replace(one, logprobs=-1) for one in params]
    whole = llm.generate(PROMPTS[:9], everything, use_tqdm=False)
    plain = [dataclasses.replace(one, logprobs=None) for one in params]
    for output, full, bare, k in zip(
        outputs, whole, llm.generate(PROMPTS[:9], plain, use_tqdm=False), asked, strict=True
    ):
        (completion,), (reference,) = output.outputs, full.outputs
        assert completion.token_ids == reference.token_ids == bare.outputs[0].token_ids
        if k is None:
            assert completion.logprobs is completion.cumulative_logprob is None
            continue
        assert len(completion.logprobs) == len(completion.token_ids) == 12
        total = 0.0
        for token, found, wanted in zip(
            completion.token_ids, completion.logprobs, reference.logprobs, strict=True
        ):
            assert abs(sum(np.exp(one.logprob) for one in wanted.values()) - 1) < 1e-5
            assert [one.rank for one in wanted.values()] == list(range(1, VOCAB_SIZE + 1))
            assert found == {each: wanted[each] for each in [*list(wanted)[:k], token]}
            total += found[token].logprob
        assert completion.cumulative_logprob == pytest.approx(total)


def test_temperature_and_filters_do_not_change_logprobs(llm: LLM) -> None:
    first = []
    for options in ({"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 2}, {"min_p": 0.9}):
        params = dataclasses.replace(PLAIN, logprobs=20, max_tokens=1, **options)
        (completion,) = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs
        first.append(list(completion.logprobs[0].items())[:20])
    assert all(one == first[0] for one in first)


def test_a_stream_has_logprobs_for_every_token_it_has(llm: LLM) -> None:
    params = dataclasses.replace(PLAIN, logprobs=2)
    lengths = []
    for output in llm.stream(PROMPTS[:2], params):
        (completion,) = output.outputs
        assert len(completion.logprobs) == len(completion.token_ids)
        lengths.append(len(completion.logprobs))
    assert len(lengths) == 24


def test_more_logprobs_than_the_engine_gives_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="logprobs=161 is more than the vocabulary of 160"):
        llm.generate(PROMPTS[:1], SamplingParams(logprobs=161), use_tqdm=False)
