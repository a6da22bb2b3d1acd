"""What few requests ask for, from end to end: alone, in company, preempted."""

import dataclasses

import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import LLM, RequestOutput, SamplingParams
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.text import open_request
from tests.engine.bigram_model import expected, make_table, run
from tests.engine.bigram_model import make_engine as make_bigram_engine
from tests.engine.serving import assert_idle, make_llm, nothing_compiles, reference_requests
from tests.models.references import load_reference

TABLE = make_table()
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


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Chunks of 8 tokens, and a pool that is soon full."""
    return make_bigram_engine(TABLE, num_blocks=22)


def test_steps_that_need_nothing_of_it_are_plain(llm: LLM, ran: list[Bucket]) -> None:
    llm.generate(PROMPTS[:2], PLAIN, use_tqdm=False)
    assert not any(bucket.is_full for bucket in ran)
    assert all(bucket.is_common for bucket in ran)
    ran.clear()
    params = [dataclasses.replace(PLAIN, max_tokens=3, logprobs=0), PLAIN]
    llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert not any(bucket.is_full for bucket in ran)
    assert 0 < sum(bucket.has_logprobs for bucket in ran) < 6
    ran.clear()
    params = [dataclasses.replace(PLAIN, max_tokens=3, logprobs=1), PLAIN]
    llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert 0 < sum(bucket.is_full for bucket in ran) < 6
    assert not any(bucket.has_logprobs for bucket in ran)


def test_what_full_steps_keep_is_not_there_before_the_first(llm: LLM) -> None:
    penalised = dataclasses.replace(PLAIN, temperature=0, repetition_penalty=1.5)
    for params in (dataclasses.replace(PLAIN, logprobs=1), penalised):
        llm.engine.core.reset()
        llm.generate(PROMPTS[:2], PLAIN, use_tqdm=False)
        assert llm.runner.row_state is None
        first, again = (llm.generate(PROMPTS[0], params, use_tqdm=False)[0] for _ in range(2))
        assert llm.runner.row_state is not None
        assert first.outputs == again.outputs


def test_nothing_compiles_after_warm_up(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    kinds: list[dict[str, object]] = [
        {},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
        {"logit_bias": {5: 1.0}, "min_tokens": 1},
        {"logprobs": 2, "presence_penalty": 0.1},
        {"prompt_logprobs": 1},
    ]
    prompts = [rng.integers(1, 24, rng.integers(1, 40)).tolist() for _ in range(60)]
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 1.0])),
            max_tokens=int(rng.integers(1, 20)),
            **kinds[rng.integers(len(kinds))],
        )
        for _ in prompts
    ]
    engine.core.executor.warm_up()
    with nothing_compiles(engine.core.executor):
        run(engine, prompts, params)


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
    params = dataclasses.replace(PLAIN, logprobs=2, prompt_logprobs=1)
    lengths, of_prompts = [], []
    for output in llm.stream(PROMPTS[:2], params):
        (completion,) = output.outputs
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        of_prompts.append(output.prompt_logprobs)
        assert len(completion.logprobs) == len(completion.token_ids)
        lengths.append(len(completion.logprobs))
    assert len(lengths) == 24
    assert len({id(found) for found in of_prompts}) == 2  # not copied for every token


def test_generate_makes_one_output_of_each_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[RequestOutput] = []

    def recorded(*args: object, **options: object) -> RequestOutput:
        outputs.append(RequestOutput(*args, **options))
        return outputs[-1]

    monkeypatch.setattr(open_request, "RequestOutput", recorded)
    done = llm.generate(PROMPTS[:3], dataclasses.replace(PLAIN, logprobs=1), use_tqdm=False)
    assert sorted(map(id, done)) == sorted(map(id, outputs))


def test_more_logprobs_than_the_engine_gives_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="logprobs=161 is more than the vocabulary of 160"):
        llm.generate(PROMPTS[:1], SamplingParams(logprobs=161), use_tqdm=False)


# ---- prompt_logprobs ---------------------------------------------------------------------------


def test_prompt_logprobs_are_those_of_transformers(llm: LLM) -> None:
    """In chunks, beside others, and preempted in the middle of a prompt."""
    reference = load_reference(NAME)
    count = len(reference.logits)
    params = [
        dataclasses.replace(PLAIN, prompt_logprobs=k % 4 if k % 3 else -1) for k in range(count)
    ]
    outputs = llm.generate(PROMPTS[:count], params, use_tqdm=False)
    assert_idle(llm)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output, logits, one in zip(outputs, reference.logits, params, strict=True):
        check_prompt(output, special.log_softmax(logits, axis=-1), one.prompt_logprobs, 2e-4)


def test_prompt_logprobs_read_no_prefix_cache(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(40, 80))}
    asked = dataclasses.replace(PLAIN, prompt_logprobs=3)
    kinds = [PLAIN, PLAIN, asked, asked]
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for params in kinds]
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[1] > 0
    assert cached[2:] == [0, 0]
    assert len(outputs[2].prompt_logprobs) == 40
    assert outputs[2].prompt_logprobs == outputs[3].prompt_logprobs


def check_prompt(output: RequestOutput, rows: np.ndarray, num_top: int, tolerance: float) -> None:
    """Holds the prompt's log-probabilities against those that the rows of a table predict."""
    ids, found = output.prompt_token_ids, output.prompt_logprobs
    assert len(found) == len(ids)
    assert found[0] is None
    for token, by_token, row in zip(ids[1:], found[1:], rows, strict=False):
        num = len(row) if num_top == -1 else num_top
        assert abs(by_token[token].logprob - row[token]) < tolerance
        assert len(by_token) in (num, num + 1)
        tops = [one.logprob for one in list(by_token.values())[:num]]
        np.testing.assert_allclose(tops, np.sort(row)[::-1][:num], atol=tolerance)


def test_prompt_logprobs_across_every_chunk_split(engine: Engine) -> None:
    """Requests share the chunks, which split prompts everywhere; none twice, none lost."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 24, rng.integers(1, 40)).tolist() for _ in range(40)]
    asked = [[None, 0, 3, 20][i] for i in rng.integers(0, 4, 40)]
    base = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    params = [dataclasses.replace(base, prompt_logprobs=k) for k in asked]
    outputs = run(engine, prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 3
    for output, prompt, k in zip(outputs, prompts, asked, strict=True):
        assert list(output.outputs[0].token_ids) == expected(TABLE, prompt, base)
        if k is None:
            assert output.prompt_logprobs is None
        else:
            check_prompt(output, special.log_softmax(TABLE[prompt], axis=-1), k, 1e-5)


def test_completions_of_one_request_have_their_own(engine: Engine) -> None:
    """Each is penalised for its own tokens; the prompt is computed once; also after preemptions."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, 24, length).tolist() for length in (9, 20, 1, 13, 5)]
    params = [
        SamplingParams(
            n=2, max_tokens=20, seed=i, ignore_eos=True, frequency_penalty=0.8, logprobs=1,
            repetition_penalty=1.2, prompt_logprobs=2,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    outputs = run(engine, prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output, prompt, one in zip(outputs, prompts, params, strict=True):
        check_prompt(output, special.log_softmax(TABLE[prompt], axis=-1), 2, 1e-5)
        for completion in output.outputs:
            tokens = completion.token_ids
            assert list(tokens) == expected(TABLE, prompt, one, sample_index=completion.index)
            rows = special.log_softmax(TABLE[[prompt[-1], *tokens[:-1]]], axis=-1)
            total = rows[np.arange(len(tokens)), tokens].sum()
            assert abs(completion.cumulative_logprob - total) < 1e-4


def test_more_prompt_logprobs_than_the_engine_gives_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs=21 is more than the engine's"):
        engine.make_group([1], SamplingParams(prompt_logprobs=21))


def test_what_an_aborted_request_has_of_its_prompt(engine: Engine) -> None:
    params = SamplingParams(prompt_logprobs=1)
    engine.add(engine.make_group([1] * 30, params, request_id="a"))
    for _ in range(3):  # of which two were taken in
        engine.step()
    engine.abort("a")
    (output,) = engine.step()
    assert output.outputs[0].token_ids == ()
    assert len(output.prompt_logprobs) == 1 + 16
