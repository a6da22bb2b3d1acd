"""What the official client sees beside answers: errors, models, ids, and streams that it leaves."""

import asyncio
from typing import Any

import openai
import pytest

from tests.engine.serve.exact import MODEL, Exact

ASK = [{"role": "user", "content": "Write a loop."}]


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK} | fields)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": "a"} | fields)


@pytest.mark.parametrize(
    ("ask", "fields", "param", "said"),
    [
        (complete, {"temperature": -1}, "temperature", "temperature=-1"),
        (complete, {"n": 0}, "n", "n=0"),
        (complete, {"n": 129}, "n", "128"),
        (complete, {"n": 5}, None, "max_num_seqs=4"),
        (complete, {"max_tokens": 0}, "max_tokens", "max_tokens=0"),
        (complete, {"logprobs": 21}, "logprobs", "max_logprobs"),
        (complete, {"best_of": 1, "n": 2}, "best_of", "best_of=1"),
        (complete, {"suffix": "b"}, "suffix", "suffix='b' is not supported"),
        (complete, {"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        (complete, {"prompt": "a " * 600}, None, "512"),
        (complete, {"prompt": []}, "prompt", "empty"),
        (complete, {"prompt": [5000]}, None, "5000"),
        (complete, {"extra_body": {"guided_json": {}}}, "guided_json", "structured_outputs"),
        (complete, {"extra_body": {"length_penalty": 1.0}}, "length_penalty", "use_beam_search"),
        (complete, {"extra_body": {"use_beam_search": True}, "stream": True}, None, "no stream"),
        (complete, {"extra_body": {"structured_outputs": {"regex": "("}}}, None, "regex"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        (chat, {"messages": []}, None, "at least one message"),
        (chat, {"tool_choice": "required"}, "tool_choice", "needs tools"),
        (chat, {"functions": []}, "functions", "use tools"),
        (chat, {"response_format": {"type": "json_schema"}}, None, "json_schema.schema"),
        (chat, {"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template", "trust"),
        (chat, {"modalities": ["audio"]}, "modalities", "audio"),
    ],
)
def test_a_bad_request_is_refused_by_its_field(
    ask: Any, fields: dict, param: str | None, said: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as raised:
        ask(client, **fields)
    assert raised.value.status_code == 400
    assert raised.value.type == "BadRequestError"
    assert raised.value.body["code"] == 400
    if param is not None:
        assert raised.value.param == param


def test_a_model_that_is_not_there(client: openai.OpenAI) -> None:
    for ask in (chat, complete):
        with pytest.raises(openai.NotFoundError, match="model='gpt' is not served; use 'chatty'"):
            ask(client, model="gpt")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="there is nothing at /v1/embeddings"):
        client.embeddings.create(model=MODEL, input="a")


def test_the_models_have_all_names(exact: Exact, client: openai.OpenAI) -> None:
    found: Any = {model.id: model for model in client.models.list()}
    assert list(found) == [MODEL, "also/chatty"]
    assert found[MODEL].max_model_len == exact.llm.max_model_len
    for name in found:
        assert client.models.retrieve(name) == found[name]
        assert complete(client, model=name, max_tokens=1).model == MODEL


def test_a_wrong_key_is_refused(exact: Exact) -> None:
    with exact.client().with_options(api_key="wrong") as client:
        for ask in (lambda: complete(client), lambda: chat(client), client.models.list):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                ask()


def test_an_answer_has_the_id_that_it_was_given(client: openai.OpenAI) -> None:
    headers = {"X-Request-Id": "mine-1"}
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers=headers
    )
    assert raw.headers["x-request-id"] == "mine-1"
    made = raw.parse()
    assert (made.id, made._request_id) == ("cmpl-mine-1", "mine-1")
    answer = chat(client, max_tokens=1)
    assert answer.id == f"chatcmpl-{answer._request_id}"
    (first, *_) = chat(client, max_tokens=1, stream=True, extra_headers=headers)
    assert first.id == "chatcmpl-mine-1"


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_stream_that_is_left_is_aborted(kind: str, how: str, exact: Exact) -> None:
    long: dict[str, Any] = {"model": MODEL, "max_tokens": 400, "stream": True}
    long["extra_body"] = {"ignore_eos": True}

    async def begin(client: openai.AsyncOpenAI) -> Any:
        if kind == "chat":
            return await client.chat.completions.create(messages=ASK, **long)
        return await client.completions.create(prompt="a", n=2, **long)

    async def leave() -> None:
        async with openai.AsyncOpenAI(**exact.client_options) as client:
            stream = await begin(client)
            await anext(stream)
            if how == "close":
                await stream.close()
                return

            async def read() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = aborted(exact)
    asyncio.run(leave())
    exact.live.assert_idle()
    assert aborted(exact) == before + 1


def aborted(exact: Exact) -> float:
    """Returns how many requests have been aborted."""
    (count,) = [
        one.value
        for one in exact.live.call(exact.live.llm.get_metrics())
        if one.labels.get("finished_reason") == "abort"
    ]
    return count


def test_a_request_takes_no_longer_than_it_says(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        complete(client, max_tokens=400, extra_headers={"X-Request-Timeout": "0.001"})
    assert raised.value.status_code == 504


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_a_text_and_back(special: bool, exact: Exact) -> None:
    text, tokenizer = "def f(x):\n    return 'ü😀'", exact.llm.tokenizer
    with exact.client().with_options(base_url=exact.live.url) as client:

        def ask(path: str, **body: Any) -> Any:
            return client.post(path, body={"model": MODEL} | body, cast_to=object)

        found = ask("/tokenize", prompt=text, add_special_tokens=special, return_token_strs=True)
        assert found["tokens"] == tokenizer.encode(text, add_special_tokens=special)
        assert found["count"] == len(found["tokens"])
        assert found["max_model_len"] == exact.llm.max_model_len
        assert found["token_strs"] == [tokenizer.decode_token(token) for token in found["tokens"]]
        back = ask("/detokenize", tokens=found["tokens"])
        assert back == {"prompt": ("<|bos|>" if special else "") + text}
        options = {"chat_template_kwargs": {"think": True}}
        prompt: Any = exact.llm.chat_prompt(ASK, **options)
        found = ask("/tokenize", messages=ASK, **options)
        assert found["tokens"] == list(prompt["prompt_token_ids"])
