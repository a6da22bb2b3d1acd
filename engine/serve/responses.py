"""What the server answers: OpenAI's bodies, as structs that msgspec writes."""

from typing import Any

import msgspec

encode = msgspec.json.Encoder().encode


class CachedTokens(msgspec.Struct):
    """Of the prompt's tokens, those whose keys and values were in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """How many tokens a request had."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Logprobs(msgspec.Struct):
    """A completion's log-probabilities, in columns."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class Choice(msgspec.Struct, omit_defaults=True):
    """A completion, or what is new of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(msgspec.Struct, omit_defaults=True):
    """The answer to a completion request, or a piece of its stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    object: str = msgspec.field(default_factory=lambda: "text_completion")


class TopLogprob(msgspec.Struct):
    """One of the likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token that was chosen, and the likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """The log-probabilities of a message's tokens."""

    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct, omit_defaults=True):
    """The function of a call; of a stream, what is new of it."""

    arguments: str
    name: str | None = None


class ToolCall(msgspec.Struct, omit_defaults=True):
    """A call of a tool; of a stream, its `index`, and what is new of it."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None
    index: int | None = None


class ChatMessage(msgspec.Struct):
    """The model's answer."""

    role: str
    content: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    """What is new of the model's answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    """An answer, or what is new of it."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    message: ChatMessage | msgspec.UnsetType = msgspec.UNSET
    delta: Delta | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    """The answer to a chat request, or a piece of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Model(msgspec.Struct):
    """A name of the model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(msgspec.Struct):
    """All names of the model."""

    object: str
    data: list[Model]


class Health(msgspec.Struct):
    """That requests are taken."""

    status: str


class Version(msgspec.Struct):
    """The server's version."""

    version: str


class Tokens(msgspec.Struct, omit_defaults=True):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """The text of tokens."""

    prompt: str


class ErrorDetail(msgspec.Struct):
    """What is wrong with a request, or went wrong with it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct):
    """The body of an answer that is an error."""

    error: ErrorDetail


def usage_of(num_prompt: int, num_completion: int, num_cached: int) -> Usage:
    """Returns the usage of a request with so many tokens."""
    return Usage(num_prompt, num_completion, num_prompt + num_completion, CachedTokens(num_cached))


def event(struct: Any) -> bytes:
    """Returns a struct as an event of a stream."""
    return b"data: " + encode(struct) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""
