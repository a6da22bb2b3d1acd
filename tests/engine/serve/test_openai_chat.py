"""The official client's chats are those of the engine, whole and in pieces."""

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from pallas_paged.engine import BeamSearchParams
from tests.engine.serve.chat_folder import END_OF_THINKING
from tests.engine.serve.exact import MODEL, Exact, as_client_takes

ASK = [{"role": "user", "content": "Write a loop."}]
TALK = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "A loop?"},
    {"role": "assistant", "content": "for x in y:"},
    {"role": "user", "content": "Another."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}
]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "n": {"seed": 3, "n": 3, "temperature": 1.0},
    "stop": {"seed": 2, "stop": ["\n", "self"]},
    "penalties": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"temperature": 0, "logit_bias": {"70": 5.0}},
    "top-k": {"seed": 4, "temperature": 2.0, "top_k": 3, "min_p": 0.01},
    "choice": {"seed": 4, "structured_outputs": {"choice": ["a/b", "c\nd", 'e"']}},
    "grammar": {"seed": 4, "structured_outputs": {"grammar": 'start: "x" "y"~2 /[0-9]/'}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how it is",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"days": 3}}\n</tool_call>'
FIXED = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["so", "not"]}}}


class Gathered:
    """The pieces of an answer, put together."""

    def __init__(self) -> None:
        self.content = self.reasoning = ""
        self.calls: list[list[str]] = []
        self.logprobs: list[Any] = []
        self.token_ids: list[int] = []
        self.finish_reason = None

    def add(self, choice: Any) -> None:
        assert self.finish_reason is None
        delta = choice.delta
        self.content += delta.content or ""
        self.reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert (call.index, call.type) == (len(self.calls), "function")
                self.calls.append([call.id, call.function.name, ""])
            self.calls[call.index][2] += call.function.arguments
        if choice.logprobs:
            self.logprobs += choice.logprobs.content
        self.token_ids += getattr(choice, "token_ids", None) or []
        self.finish_reason = choice.finish_reason


def streamed(client: openai.OpenAI, **request: Any) -> list[Gathered]:
    found: dict[int, Gathered] = {}
    begun = set()
    for piece in client.chat.completions.create(model=MODEL, **request, stream=True):
        (choice,) = piece.choices
        assert (choice.delta.role == "assistant") == (choice.index not in begun)
        begun.add(choice.index)
        found.setdefault(choice.index, Gathered()).add(choice)
    return [found[index] for index in range(len(found))]


def both(client: openai.OpenAI, **request: Any) -> Any:
    """Returns an answer's message and finish reason, the same in pieces, its calls as they are."""
    choice: Any = client.chat.completions.create(model=MODEL, **request).choices[0]
    (pieces,) = streamed(client, **request)
    message = choice.message
    assert pieces.content == (message.content or "")
    assert pieces.reasoning == (message.reasoning_content or "")
    assert pieces.finish_reason == choice.finish_reason
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert [tuple(call[1:]) for call in pieces.calls] == calls
    assert len({call.id for call in message.tool_calls or ()}) == len(calls)
    return message, choice.finish_reason, calls


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_the_offline_one(name: str, exact: Exact, client: openai.OpenAI) -> None:
    fields = {"max_tokens": 16} | CASES[name]
    expected = exact.offline_chat(TALK, **fields).outputs
    request = {"messages": TALK, **as_client_takes(fields)}
    made = client.chat.completions.create(model=MODEL, **request)
    assert [choice.message.content for choice in made.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in made.choices] == [e.finish_reason for e in expected]
    pieces = streamed(client, **request)
    assert [piece.content for piece in pieces] == [one.text for one in expected]
    assert made.usage.completion_tokens == sum(len(one.token_ids) for one in expected)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (PARTS, {}),
        (TALK[:3], {"continue_final_message": True, "add_generation_prompt": False}),
        (TALK[:3], {"add_generation_prompt": False}),
        (ASK, {"chat_template_kwargs": {"think": False}}),
    ],
)
def test_the_template_gets_what_was_sent(
    messages: Any, options: dict, exact: Exact, client: openai.OpenAI
) -> None:
    expected = exact.offline_chat(messages, template=options, temperature=0, max_tokens=8)
    made: Any = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_completion_tokens=8,
        extra_body=options | {"return_token_ids": True},
    )
    assert made.prompt_token_ids == list(expected.prompt_token_ids)
    assert made.choices[0].message.content == expected.outputs[0].text
    assert made.choices[0].token_ids == list(expected.outputs[0].token_ids)


def test_a_message_goes_on_without_a_choice_of_its_prompt(client: openai.OpenAI) -> None:
    request: Any = {"messages": TALK[:3], "temperature": 0, "max_tokens": 4}
    alone = both(client, **request, extra_body={"continue_final_message": True})
    named = {"continue_final_message": True, "add_generation_prompt": False}
    assert alone[0].content == both(client, **request, extra_body=named)[0].content


@pytest.mark.parametrize("num_top", [None, 0, 3])
def test_log_probabilities_are_the_offline_ones(
    num_top: int | None, exact: Exact, client: openai.OpenAI
) -> None:
    fields = {"seed": 5, "temperature": 1.5, "max_tokens": 8}
    (expected,) = exact.offline_chat(ASK, logprobs=num_top or 0, **fields).outputs
    request = {"messages": ASK, "logprobs": True, **fields}
    if num_top is not None:
        request["top_logprobs"] = num_top
    (choice,) = client.chat.completions.create(model=MODEL, **request).choices
    (pieces,) = streamed(client, **request)
    assert choice.logprobs.content == pieces.logprobs
    assert len(pieces.logprobs) == 8
    for found, token, likely in zip(
        pieces.logprobs, expected.token_ids, expected.logprobs, strict=True
    ):
        assert (found.token, found.logprob) == (likely[token].decoded_token, likely[token].logprob)
        assert bytes(found.bytes).decode() == found.token
        top = [(one.decoded_token, one.logprob) for one in likely.values()][: num_top or 0]
        assert [(one.token, one.logprob) for one in found.top_logprobs] == top


def test_prompt_logprobs_and_cached_tokens(exact: Exact, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "what no other test asks: " + "1 2 3 " * 20}]
    request: Any = {"model": MODEL, "messages": messages, "max_tokens": 2, "temperature": 0}
    expected = exact.offline_chat(messages, prompt_logprobs=0, max_tokens=1).prompt_logprobs
    made: Any = client.chat.completions.create(**request, extra_body={"prompt_logprobs": 0})
    (first, *_) = client.chat.completions.create(
        **request, extra_body={"prompt_logprobs": 0}, stream=True
    )
    assert first.prompt_logprobs == made.prompt_logprobs
    found = [None if o is None else next(iter(o.values()))["logprob"] for o in made.prompt_logprobs]
    assert found == [None if o is None else next(iter(o.values())).logprob for o in expected]
    assert made.usage.prompt_tokens_details.cached_tokens == 0  # such a request reads none
    again = client.chat.completions.create(**request).usage
    assert again.prompt_tokens_details.cached_tokens == (again.prompt_tokens - 1) // 16 * 16 > 0


def test_usage_comes_at_the_end_of_a_stream_or_all_along(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": ASK, "max_tokens": 7, "temperature": 0}
    usage = client.chat.completions.create(**request).usage
    for more in ({}, {"continuous_usage_stats": True}):
        options: Any = {"include_usage": True, **more}
        *pieces, last = client.chat.completions.create(
            **request, stream=True, stream_options=options
        )
        assert last.choices == []
        for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(last.usage, field) == getattr(usage, field)
        counts = [piece.usage and piece.usage.completion_tokens for piece in pieces]
        assert counts == (sorted(counts) if more else [None] * len(pieces))
    assert last.usage.completion_tokens == 7


def test_a_beam_search_is_the_offline_one(exact: Exact, client: openai.OpenAI) -> None:
    prompt = exact.llm.chat_prompt(ASK)
    params = BeamSearchParams(beam_width=2, max_tokens=6, length_penalty=0.5)
    (expected,) = exact.llm.beam_search([prompt], params)
    made = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        n=2,
        max_tokens=6,
        extra_body={"use_beam_search": True, "length_penalty": 0.5},
    )
    texts = [choice.message.content for choice in made.choices]
    assert texts == [one.text for one in expected.outputs]


class Answer(pydantic.BaseModel):
    """What the model has to say."""

    color: Literal["red", "green"]
    count: int = pydantic.Field(ge=0, le=9)


def test_an_answer_is_parsed(client: openai.OpenAI) -> None:
    # The small model would write nothing but blanks, where they are not unlikely enough.
    request: Any = {"messages": ASK, "response_format": Answer, "seed": 1, "temperature": 2.0}
    request |= {"model": MODEL, "max_tokens": 200}
    made = client.chat.completions.parse(**request)
    assert isinstance(made.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(**request) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == made.choices[0].message.parsed


@pytest.mark.parametrize(
    ("form", "is_meant"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: json.loads(text) is not None),
        ({"response_format": FIXED}, lambda text: json.loads(text) in ("so", "not")),
        ({"structured_outputs": {"json": {"const": 5}}}, lambda text: text == "5"),
        ({"structured_outputs": {"regex": "a/b[0-9]"}}, lambda text: text[:3] == "a/b"),
        ({"structured_outputs": {"choice": ["a/b", "x\ty"]}}, lambda text: text in ("a/b", "x\ty")),
        ({"structured_outputs": {"grammar": 'start: "{" "}"'}}, lambda text: text == "{}"),
        (
            {
                "structured_outputs": {
                    "json": {"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3},
                    "disable_any_whitespace": True,
                }
            },
            lambda text: text == "[1,1,1]",
        ),
    ],
)
@pytest.mark.parametrize("think", [False, True])
def test_an_answer_has_the_form_that_is_asked_for(
    form: dict, is_meant: Any, think: bool, client: openai.OpenAI
) -> None:
    fields = {
        "chat_template_kwargs": {"think": think},
        "logit_bias": {str(END_OF_THINKING): 10.0},
        "max_tokens": 200,
        "seed": 2,
        "temperature": 1.0,
    }
    message, reason, _ = both(client, messages=ASK, **as_client_takes(fields | form))
    assert reason == "stop"
    assert is_meant(message.content), message.content
    assert bool(message.reasoning_content) == think


def forced(text: str, **fields: Any) -> dict[str, Any]:
    """Returns a request whose answer is a text."""
    form = {"choice": [text]}
    return {"messages": ASK, "max_tokens": 150, "extra_body": {"structured_outputs": form} | fields}


def test_reasoning_is_told_apart(client: openai.OpenAI) -> None:
    message, reason, _ = both(client, **forced("<think>\nWhy?\n</think>\n\nSo."))
    assert (message.reasoning_content, message.content) == ("Why?\n", "So.")
    assert reason == "stop"
    message, _, _ = both(client, **forced("<think>Why?</think>So.", include_reasoning=False))
    assert (message.reasoning_content, message.content) == (None, "So.")


def test_calls_are_found_where_tools_are_free_to_use(client: openai.OpenAI) -> None:
    request = {"tools": [TOOL, OTHER], "tool_choice": "auto"}
    message, reason, calls = both(client, **forced(f"So.\n{CALL}\n{CALL}"), **request)
    assert message.content.strip() == "So."
    assert calls == [("weather", '{"days": 3}')] * 2
    assert reason == "tool_calls"
    request = {"tools": [TOOL], "parallel_tool_calls": False}
    _, _, calls = both(client, **forced(f"{CALL}\n{CALL}"), **request)
    assert calls == [("weather", '{"days": 3}')]
    message, reason, calls = both(client, **forced(CALL), tools=[TOOL], tool_choice="none")
    assert (message.content, reason, calls) == (CALL, "stop", [])
    thought = f"<think>{CALL}</think>{CALL}"
    message, _, calls = both(client, **forced(thought), tools=[TOOL])
    assert (message.reasoning_content, message.content, len(calls)) == (CALL, None, 1)


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_calls_are_made_where_they_have_to_be(
    choice: Any, names: set[str], think: bool, client: openai.OpenAI
) -> None:
    tools = [TOOL] if choice == "required" else [OTHER, TOOL]
    fields = {
        "chat_template_kwargs": {"think": think},
        "logit_bias": {str(END_OF_THINKING): 10.0},
        "max_tokens": 200,
        "seed": 2,
        "temperature": 1.0,
    }
    request = as_client_takes(fields) | {"messages": ASK, "tools": tools, "tool_choice": choice}
    message, _, calls = both(client, **request, parallel_tool_calls=False)
    assert message.content is None
    ((name, arguments),) = calls
    assert name in names
    assert set(json.loads(arguments)) == {"days"}
    assert bool(message.reasoning_content) == think


def test_a_conversation_goes_on_with_what_a_tool_said(exact: Exact, client: openai.OpenAI) -> None:
    function = {"name": "weather", "arguments": '{"days": 3}'}
    call = {"id": "call-1", "type": "function", "function": function}
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "rain"},
    ]
    made: Any = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=[TOOL],
        max_tokens=3,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    text = exact.llm.tokenizer.decode(made.prompt_token_ids)
    assert f"[assistant]\n{CALL}\n[tool]\nrain" in text
    assert '"description": "Says how it is"' in text


def test_many_chats_at_once_are_what_they_are_alone(exact: Exact) -> None:
    cases = [{"max_tokens": 12} | case for case in CASES.values()]
    alone = [exact.offline_chat(ASK, **case).outputs[0].text for case in cases]

    async def one(client: openai.AsyncOpenAI, case: dict) -> str:
        request = {"model": MODEL, "messages": ASK, **as_client_takes(case)}
        pieces = await client.chat.completions.create(**request, stream=True)
        chosen = [piece.choices[0] async for piece in pieces]
        return "".join(c.delta.content or "" for c in chosen if c.index == 0)

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(**exact.client_options) as client:
            return await asyncio.gather(*[one(client, case) for case in cases])

    assert asyncio.run(ask()) == alone
