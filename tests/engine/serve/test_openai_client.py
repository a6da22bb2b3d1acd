"""The official client's completions are those of the engine, whole and in pieces."""

import asyncio
from typing import Any

import openai
import pytest

from pallas_paged.engine import BeamSearchParams
from tests.engine.serve.exact import MODEL, Exact, as_client_takes, logprob_columns

PROMPT = "def main(argv):\n    "
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": {"seed": 7, "temperature": 1.0},
    "nucleus": {"seed": 1, "temperature": 1.3, "top_p": 0.7},
    "n": {"seed": 3, "n": 3, "temperature": 1.0},
    "stop": {"seed": 2, "stop": ["\n", "self"]},
    "stop-in": {"seed": 2, "stop": "\n", "include_stop_str_in_output": True},
    "stop-token": {"temperature": 0, "stop_token_ids": [199, 200, 201, 202, 203, 10]},
    "penalties": {
        "temperature": 0,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "bias": {"temperature": 0, "logit_bias": {"70": 5.0, "71": -100.0}},
    "min-p": {"seed": 4, "temperature": 2.0, "min_p": 0.2},
    "top-k": {"seed": 4, "temperature": 2.0, "top_k": 3},
    "logprobs": {"seed": 5, "logprobs": 3},
    "logprobs-0": {"seed": 5, "logprobs": 0},
    "prompt-logprobs": {"temperature": 0, "prompt_logprobs": 1},
    "ignore-eos": {"temperature": 0, "logit_bias": {"1": 100.0}, "ignore_eos": True},
    "eos": {"temperature": 0, "logit_bias": {"1": 100.0}, "min_tokens": 3, "stop": None},
    "special": {"seed": 1, "allowed_token_ids": [2, 3, 70], "skip_special_tokens": False},
    "bad-words": {"temperature": 0, "bad_words": ["self", "return"]},
    "regex": {"seed": 6, "structured_outputs": {"regex": "[a-z]{3,9} = [0-9]{2}"}},
}


class Gathered:
    """The pieces of a choice, put together."""

    def __init__(self) -> None:
        self.text, self.finish_reason, self.stop_reason = "", None, None
        self.token_ids: list[int] = []
        self.logprobs: list[tuple] = []

    def add(self, choice: Any) -> None:
        assert self.finish_reason is None
        self.text += choice.text
        self.token_ids += choice.token_ids
        self.logprobs += columns(choice.logprobs)
        self.finish_reason, self.stop_reason = choice.finish_reason, choice.stop_reason


def columns(found: Any) -> list[tuple]:
    if found is None:
        return []
    return list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))


async def gathered(options: dict[str, Any], **request: Any) -> tuple[dict[int, Gathered], Any]:
    """Returns the choices of a stream, by index, and its usage."""
    choices: dict[int, Gathered] = {}
    usage = None
    async with openai.AsyncOpenAI(**options) as client:
        async for piece in await client.completions.create(**request, stream=True):
            assert len(piece.choices) <= 1
            assert usage is None
            usage = piece.usage
            for choice in piece.choices:
                choices.setdefault(choice.index, Gathered()).add(choice)
    return choices, usage


@pytest.mark.parametrize("name", CASES)
def test_a_completion_is_the_offline_one(name: str, exact: Exact, client: openai.OpenAI) -> None:
    fields = {"max_tokens": 20} | CASES[name]
    expected = exact.offline(PROMPT, **fields)
    fields |= {"return_token_ids": True}
    request = {"model": MODEL, "prompt": PROMPT, **as_client_takes(fields)}
    made: Any = client.completions.create(**request)
    streamed, usage = asyncio.run(
        gathered(exact.client_options, **request, stream_options={"include_usage": True})
    )
    assert len(made.choices) == len(streamed) == len(expected.outputs)
    for choice, one in zip(made.choices, expected.outputs, strict=True):
        piece = streamed[one.index]
        for found in (choice, piece):
            assert (found.text, found.token_ids) == (one.text, list(one.token_ids))
            assert (found.finish_reason, found.stop_reason) == (one.finish_reason, one.stop_reason)
        likely = logprob_columns(one) if "logprobs" in fields else []
        assert columns(choice.logprobs) == piece.logprobs == likely
    assert made.choices[0].prompt_token_ids == list(expected.prompt_token_ids)
    num_tokens = sum(len(one.token_ids) for one in expected.outputs)
    for found in (made.usage, usage):
        assert found.prompt_tokens == len(expected.prompt_token_ids)
        assert found.completion_tokens == num_tokens
        assert found.total_tokens == found.prompt_tokens + num_tokens


def test_all_at_once_are_what_they_are_alone(exact: Exact) -> None:
    fields = {name: {"max_tokens": 20} | case for name, case in CASES.items()}
    alone = [exact.offline(PROMPT, **case) for case in fields.values()]

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(**exact.client_options) as client:
            asked = [
                client.completions.create(model=MODEL, prompt=PROMPT, **as_client_takes(case))
                for case in fields.values()
            ]
            return await asyncio.gather(*asked)

    for made, one in zip(asyncio.run(ask()), alone, strict=True):
        assert [choice.text for choice in made.choices] == [part.text for part in one.outputs]


def test_best_of_is_the_likeliest_by_token(exact: Exact, client: openai.OpenAI) -> None:
    fields = {"seed": 6, "temperature": 1.2, "max_tokens": 12, "stop": "\n"}
    every = exact.offline(PROMPT, n=4, logprobs=0, **fields).outputs
    by_token = sorted(every, key=lambda one: -one.cumulative_logprob / len(one.token_ids))
    by_sum = sorted(every, key=lambda one: -one.cumulative_logprob)
    assert [one.index for one in by_token[:2]] not in ([0, 1], [one.index for one in by_sum[:2]])
    made = client.completions.create(model=MODEL, prompt=PROMPT, n=2, best_of=4, **fields)
    assert [choice.text for choice in made.choices] == [one.text for one in by_token[:2]]
    assert [choice.index for choice in made.choices] == [0, 1]
    assert made.choices[0].logprobs is None
    assert made.usage.completion_tokens == sum(len(one.token_ids) for one in every)
    with pytest.raises(openai.BadRequestError, match="best_of=2 chooses when all are done"):
        client.completions.create(model=MODEL, prompt="a", best_of=2, stream=True)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_a_beam_search_is_the_offline_one(
    early_stopping: Any, exact: Exact, client: openai.OpenAI
) -> None:
    options = {"length_penalty": 0.6, "early_stopping": early_stopping}
    params = BeamSearchParams(beam_width=3, num_return=2, max_tokens=9, **options)
    (expected,) = exact.llm.beam_search([PROMPT], params)
    made = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        n=2,
        best_of=3,
        max_tokens=9,
        extra_body=options | {"use_beam_search": True},
    )
    assert [choice.text for choice in made.choices] == [one.text for one in expected.outputs]


def test_prompts_are_texts_or_tokens_one_or_several(exact: Exact, client: openai.OpenAI) -> None:
    texts = ["def f(x):\n", "class A", "import "]
    tokens = [exact.llm.tokenizer.encode(text) for text in texts]
    fields = {"seed": 9, "max_tokens": 8, "n": 2}
    expected = [one.text for text in texts for one in exact.offline(text, **fields).outputs]

    def ask(prompt: Any) -> list[str]:
        made = client.completions.create(model=MODEL, prompt=prompt, **fields)
        assert [choice.index for choice in made.choices] == list(range(len(made.choices)))
        return [choice.text for choice in made.choices]

    assert ask(texts) == ask(tokens) == expected
    assert ask(texts[1]) == ask(tokens[1]) == expected[2:4]
    streamed, _ = asyncio.run(
        gathered(
            exact.client_options,
            model=MODEL,
            prompt=tokens,
            **fields,
            extra_body={"return_token_ids": True},
        )
    )
    assert [streamed[index].text for index in range(6)] == expected


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(
    max_tokens: int, as_tokens: bool, exact: Exact, client: openai.OpenAI
) -> None:
    prompt: Any = exact.llm.tokenizer.encode(PROMPT) if as_tokens else PROMPT
    fields = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
    offline = fields | {"max_tokens": max(1, max_tokens), "prompt_logprobs": 2}
    expected = exact.offline(prompt, **{k: v for k, v in offline.items() if k != "echo"})
    request = {"model": MODEL, "prompt": prompt, **fields}
    made = client.completions.create(**request)
    streamed, usage = asyncio.run(
        gathered(
            exact.client_options,
            **request,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
    )
    (choice,) = made.choices
    text = expected.outputs[0].text if max_tokens else ""
    assert choice.text == streamed[0].text == PROMPT + text
    assert choice.finish_reason == streamed[0].finish_reason == "length"
    assert usage.completion_tokens == made.usage.completion_tokens == max_tokens
    found = choice.logprobs
    assert columns(found) == streamed[0].logprobs
    assert len(found.tokens) == len(expected.prompt_token_ids) + max_tokens
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    behind = len(expected.prompt_token_ids)
    for place in range(1, behind):
        likely = expected.prompt_logprobs[place]
        assert found.token_logprobs[place] == likely[expected.prompt_token_ids[place]].logprob
        assert found.top_logprobs[place] == {o.decoded_token: o.logprob for o in likely.values()}
    if max_tokens:
        assert columns(found)[behind:] == logprob_columns(expected.outputs[0])
    # The first token is the one in front of all text, which is not shown.
    assert (found.tokens[0], found.text_offset[0], found.text_offset[1]) == ("<|bos|>", 0, 0)
    for token, offset in list(zip(found.tokens, found.text_offset, strict=True))[1:]:
        assert choice.text[offset:].startswith(token)


def test_prompt_logprobs_are_the_offline_ones(exact: Exact, client: openai.OpenAI) -> None:
    body = {"prompt_logprobs": 2, "return_token_ids": True}
    request = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "extra_body": body}
    expected = exact.offline(PROMPT, prompt_logprobs=2, max_tokens=2)
    (choice,) = client.completions.create(**request).choices
    (first, *_) = client.completions.create(**request, stream=True)
    assert choice.prompt_logprobs == first.choices[0].prompt_logprobs
    assert choice.prompt_logprobs[0] is None
    for found, likely in zip(choice.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert found == {
            str(token): {"logprob": o.logprob, "rank": o.rank, "decoded_token": o.decoded_token}
            for token, o in likely.items()
        }


def test_usage_may_come_with_every_piece(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options=options,
        )
    )
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-2:] == [9, 9]
    assert pieces[-1].choices == []


def test_the_second_equal_prompt_is_cached(client: openai.OpenAI) -> None:
    prompt = "# a prompt that no other test has, and which fills blocks\n" * 3
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0}
    first, second = (client.completions.create(**request) for _ in range(2))
    apart = client.completions.create(**request, extra_body={"cache_salt": "mine"})
    num_blocks = (first.usage.prompt_tokens - 1) // 16
    assert num_blocks > 2
    for made, expected in ((first, 0), (second, num_blocks * 16), (apart, 0)):
        assert made.usage.prompt_tokens_details.cached_tokens == expected
    assert first.choices[0].text == second.choices[0].text == apart.choices[0].text
