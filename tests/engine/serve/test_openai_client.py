"""The official client works unchanged, over a real socket."""

from collections.abc import Iterator

import openai
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.serve.live import MODEL, SMALL, Live


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_is_the_offline_one(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt="def main(", max_tokens=24, temperature=0)
    llm = LLM(DEMO_MODEL, **SMALL)
    (alone,) = llm.generate("def main(", SamplingParams(max_tokens=24, temperature=0))
    assert made.choices[0].text == alone.outputs[0].text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 24
    assert made.usage.prompt_tokens == len(alone.prompt_token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 5, "n": 3},
        {"seed": 1, "stop": ["\n", "e t"]},
        {"seed": 2, "logprobs": 2, "echo": True},
    ],
)
def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI, options: dict) -> None:
    request = {"model": MODEL, "prompt": ["def f(x):\n", "class "], "max_tokens": 20} | options
    whole = client.completions.create(**request)
    texts = [""] * len(whole.choices)
    logprobs: list[list] = [[] for _ in texts]
    reasons: list = [None] * len(texts)
    usage = None
    for piece in client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                logprobs[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = piece.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    if "logprobs" in options:
        assert logprobs == [choice.logprobs.tokens for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
