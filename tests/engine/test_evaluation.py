"""What evaluations ask of an engine, against log-probabilities by hand; lm_eval is not needed."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import LLM, RequestOutput, SamplingParams
from pallas_paged.engine.evaluation import __main__ as program
from pallas_paged.engine.evaluation.scoring import (
    Completion,
    Continuation,
    adds_special_tokens,
    check_logprobs_mode,
    make_completion,
    make_continuation,
    read_score,
    read_text,
    run,
    scoring_request,
)
from tests.engine.bigram_model import MAX_MODEL_LEN, VOCAB_SIZE, make_engine, make_table
from tests.engine.serving import assert_idle, make_llm

TABLE = make_table()
LOGPROBS = special.log_softmax(TABLE.astype(np.float64), axis=1)


class BigramLLM:
    """As much of an `LLM` as evaluations use, over the model that is a table."""

    def __init__(self) -> None:
        self.engine = make_engine(TABLE)

    def stream(
        self, prompts: Sequence[dict[str, Any]], params: Sequence[SamplingParams]
    ) -> Iterator[RequestOutput]:
        for prompt, one in zip(prompts, params, strict=True):
            group = self.engine.make_group(prompt["prompt_token_ids"], one)
            self.engine.add(group, prompt["prompt"])
        while self.engine.has_unfinished:
            yield from self.engine.step()
        self.engine.check_idle()


def test_scores_are_sums_of_log_probabilities() -> None:
    rng = np.random.default_rng(3)
    max_length = MAX_MODEL_LEN - 1
    continuations, expected = [], []
    for num_context, num_scored in [(1, 1), (5, 1), (5, 3), (1, 40), (62, 1), (30, 34), (90, 63)]:
        context = rng.integers(1, VOCAB_SIZE, num_context).tolist()
        scored: list[int] = []
        for index in range(num_scored):  # some are greedy but for one in the middle
            last = [*context, *scored][-1]
            likely = int(TABLE[last].argmax())
            other = int(TABLE[last].argsort()[-2])
            scored.append(other if num_scored % 2 == 0 and index == num_scored // 2 else likely)
        continuations.append(make_continuation(context, scored, max_length))
        before = [*context, *scored][-num_scored - 1 : -1]
        pairs = list(zip(before, scored, strict=True))
        expected.append(
            (
                sum(LOGPROBS[pair] for pair in pairs),
                all(TABLE[last].argmax() == token for last, token in pairs),
            )
        )
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    outputs = dict(
        run(BigramLLM(), [scoring_request(c) for c in continuations], "", use_tqdm=False)
    )
    for number, (logprob, is_greedy) in enumerate(expected):
        score = read_score(continuations[number], outputs[number])
        assert score.is_greedy == is_greedy
        np.testing.assert_allclose(score.logprob, logprob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("num_context", "kept", "num_left_out"),
    [(1, 4, 0), (7, 10, 0), (8, 11, 0), (9, 11, 1), (30, 11, 22)],
)
def test_the_last_tokens_are_kept(num_context: int, kept: int, num_left_out: int) -> None:
    """A model that reads 10 tokens: 11 are left, the last of which is only scored."""
    found = make_continuation(range(num_context), [100, 101, 102], 10)
    whole = (*range(num_context), 100, 101, 102)
    assert found == Continuation(whole[-kept:], 3, num_left_out)
    prompt, params = scoring_request(found)
    assert prompt == found.token_ids[:-1]
    assert len(prompt) <= 10
    assert params.allowed_token_ids == (102,)


def test_what_alone_is_scored_may_come_from_the_prefix_cache() -> None:
    _, params = scoring_request(make_continuation([5, 6], [7], 10))
    assert params.prompt_logprobs is None
    _, params = scoring_request(make_continuation([5, 6], [7, 8], 10))
    assert params.prompt_logprobs == 0


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "a context of 0 tokens and a continuation of 1"),
        ([1], [], "a context of 1 tokens and a continuation of 0"),
        ([1], [1] * 11, "continuation of 11 tokens is longer than max_length=10"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    context: list[int], continuation: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_continuation(context, continuation, 10)
    make_continuation([1], [1] * 10, 10)


@pytest.mark.parametrize(
    ("text", "asked", "add_bos_token", "expected"),
    [
        ("x", None, None, True),
        ("x", None, True, True),
        ("x", None, False, False),
        ("<s>x", None, None, False),
        ("<s>x", None, True, False),
        ("<s>x", True, False, True),
        ("x", False, True, False),
    ],
)
def test_bos_stands_in_front_once(
    text: str, asked: bool | None, add_bos_token: bool | None, expected: bool
) -> None:
    assert adds_special_tokens(text, asked, add_bos_token, "<s>") is expected
    assert adds_special_tokens(text, None, None, "") is True


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "seed": 5, "top_k": None}, {"temperature": 0.7, "seed": 5}),
        ({"num_beams": 1, "do_sample": None}, {}),
        ({"until": ["\n", "", "def "]}, {"stop": ("\n", "def ")}),
    ],
)
def test_settings_of_a_completion(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    found = make_completion([1, 2, 3], {"until": [], "max_gen_toks": 4} | settings, 10)
    greedy = SamplingParams(temperature=0, max_tokens=4, skip_special_tokens=False)
    params = dataclasses.replace(found.params, output_kind=greedy.output_kind)
    assert params == dataclasses.replace(greedy, **expected)
    assert found.until == params.stop


def test_a_context_leaves_room_for_the_completion() -> None:
    settings = {"until": [], "max_gen_toks": 4}
    assert make_completion(range(6), settings, 10)[:2] == (tuple(range(6)), 0)
    assert make_completion(range(9), settings, 10)[:2] == (tuple(range(3, 9)), 3)


@pytest.mark.parametrize(
    ("context", "settings", "message"),
    [
        ([], {}, "the context of a completion has no tokens"),
        ([1], {"max_gen_toks": 10}, "max_gen_toks=10 leaves no room"),
        ([1], {"num_beams": 4}, "num_beams=4 is not supported"),
        ([1], {"max_length": 9}, "max_length=9 in generation_kwargs is not known; .* top_k"),
        ([1], {"n": 2}, "n=2 in generation_kwargs is not known"),
        ([1], {"temperature": -1}, "temperature=-1"),
    ],
)
def test_settings_are_refused_by_name(
    context: list[int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_completion(context, {"until": [], "max_gen_toks": 4} | settings, 10)


class Letters:
    """Decodes tokens as letters; token 0 is special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(".abcdefgh"[i] for i in token_ids if i or not skip_special_tokens)


@pytest.mark.parametrize(
    ("until", "text"),
    [((), "abcdbc"), (("cd",), "ab"), (("d", "b"), "a"), ((".",), "abcdbc"), (("ab",), "")],
)
def test_a_completion_ends_before_the_first_string(until: tuple[str, ...], text: str) -> None:
    completion = make_completion([1], {"until": list(until), "max_gen_toks": 4}, 10)
    output = output_of((1, 2, 3, 4, 2, 3, 0))
    assert read_text(completion, output, Letters()) == text


def output_of(token_ids: tuple[int, ...], **fields: Any) -> Any:
    """Returns an output that holds tokens."""
    (output,) = BigramLLM().stream(
        [{"prompt_token_ids": [1], "prompt": "0"}], [SamplingParams(max_tokens=1, seed=0)]
    )
    completion = dataclasses.replace(output.outputs[0], token_ids=token_ids, **fields)
    return dataclasses.replace(output, outputs=(completion,))


def test_scores_are_made_of_the_models_own_log_probabilities() -> None:
    check_logprobs_mode("raw")
    with pytest.raises(ValueError, match="logprobs_mode='processed' must be 'raw'"):
        check_logprobs_mode("processed")


def test_an_aborted_request_is_no_answer() -> None:
    output = output_of((1,), finish_reason="abort", stop_reason="the device is gone")
    completion = Completion((1,), 0, SamplingParams(), ())
    with pytest.raises(RuntimeError, match="was ended: the device is gone"):
        read_text(completion, output, Letters())
    with pytest.raises(RuntimeError, match="was ended: the device is gone"):
        read_score(make_continuation([1], [2], 10), output)


def test_no_requests_have_no_outputs() -> None:
    assert list(run(make_small_llm(), [], "", use_tqdm=False)) == []


def make_small_llm() -> LLM:
    return make_llm("llama-mha-tied", max_num_seqs=4, max_num_batched_tokens=32, block_size=8)


def test_scores_of_an_engine_are_those_of_whole_prompts() -> None:
    """What the last token is likely to be comes from its own step, and in the end from a cache."""
    llm = make_small_llm()
    longest = llm.max_model_len
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, n).tolist() for n in (2, 17, 40, longest - 1)]
    whole = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, whole, use_tqdm=False)  # type: ignore[arg-type]
    continuations = [
        make_continuation(prompt[:-n], prompt[-n:], longest - 1)
        for prompt in prompts
        for n in (1, min(6, len(prompt) - 1), len(prompt) - 1)
    ]
    requests = [scoring_request(continuation) for continuation in continuations]
    found = dict(run(llm, requests, "", use_tqdm=False))
    for number, continuation in enumerate(continuations):
        n = continuation.num_scored
        places = outputs[number // 3].prompt_logprobs
        pairs = zip(continuation.token_ids[-n:], places[-n:], strict=True)
        chosen = [place[token] for token, place in pairs]
        score = read_score(continuation, found[number])
        assert score.is_greedy == all(one.rank == 1 for one in chosen)
        total = sum(one.logprob for one in chosen)
        np.testing.assert_allclose(score.logprob, total, atol=1e-5 * n)
    assert found[9].num_cached_tokens > 0
    # One token more than a prompt may have.
    longer = make_continuation([5] * (longest + 7), [6, 7], longest - 1)
    assert (len(longer.token_ids), longer.num_left_out) == (longest, 9)
    ((_, output),) = run(llm, [scoring_request(longer)], "", use_tqdm=False)
    assert read_score(longer, output).logprob < 0
    assert_idle(llm)


def test_the_program_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        program.main()
    assert exit_info.value.code == 2
    expected = "error: lm_eval is not installed; pip install 'pallas-paged[eval]'\n"
    assert capsys.readouterr().err == expected
