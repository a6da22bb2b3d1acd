"""What clients send: OpenAI's requests, with the further fields that vLLM's users know.

The fields' ranges are checked where they are used, by `SamplingParams` and the engine. A field that
is not declared here is refused by name, see `refuse_unknown`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]

_SILENT = {
    "user": None,  # names who asks, for a provider's own books
    "safety_identifier": None,
    "metadata": None,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
"""Fields that change nothing here, with the values for which that is true; None is every value."""
_ELSEWHERE = {
    "guided_json": 'structured_outputs={"json": ...}',
    "guided_regex": 'structured_outputs={"regex": ...}',
    "guided_choice": 'structured_outputs={"choice": ...}',
    "guided_grammar": 'structured_outputs={"grammar": ...}',
    "functions": "tools",
    "function_call": "tool_choice",
    "truncate_prompt_tokens": "a prompt that is short enough; nothing is cut off",
    "suffix": "a prompt that holds the text behind it, as the model was trained for",
}
"""Fields that have another name here, or a way around them."""


class Strict(BaseModel):
    """What is common to all requests: no number for a text, no text for a number."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"additionalProperties": False}
    )


class StreamOptions(Strict):
    """What a stream holds beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Strict):
    """A schema for the answer."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """What the answer has to be; see `StructuredOutputsParams`."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None


class Sampling(Strict):
    """What both kinds of requests say of tokens; None is what the model's own defaults say."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None


class CompletionRequest(Sampling):
    """`/v1/completions`: goes on with one prompt or several, of text or of tokens."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class Message(BaseModel):
    """A message of a conversation; what else it holds goes to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Function(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function of a `NamedTool`."""

    name: str


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """`/v1/chat/completions`: answers a conversation, through the model's chat template."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None


class TokenizeRequest(Strict):
    """`/tokenize`: the tokens of a text, or of a conversation's prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`/detokenize`: the text of tokens."""

    model: str | None = None
    tokens: TokenIds


class BadRequestError(ValueError):
    """A request that cannot be served, and the field that is the reason."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


def parse[R: BaseModel](kind: type[R], body: bytes) -> R:
    """Returns the request that a body holds.

    Raises:
      BadRequestError: it is no JSON, a field is missing, of the wrong type, or not known.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _translated(error) from None
    refuse_unknown(request)
    return request


def refuse_unknown(request: BaseModel, path: str = "") -> None:
    """Raises `BadRequestError` for a field that is not declared, unless it changes nothing."""
    if isinstance(request, Message):
        return
    for name, value in (request.model_extra or {}).items():
        if value is None:
            continue
        if name in _SILENT and not path:
            accepted = _SILENT[name]
            if accepted is None or value in accepted:
                continue
        known = _ELSEWHERE.get(name)
        way_out = f"use {known}" if known else "leave it out"
        raise BadRequestError(
            f"{path}{name}={value!r:.80} is not supported; {way_out}", path + name
        )
    for name in type(request).model_fields:
        value = getattr(request, name)
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, BaseModel):
                place = f"[{index}]" if isinstance(value, list) else ""
                refuse_unknown(part, f"{path}{name}{place}.")


def _translated(error: ValidationError) -> BadRequestError:
    """Returns the first thing that is wrong, by the field's name."""
    first = error.errors(include_url=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return BadRequestError(f"the body is no JSON: {first['ctx']['error']}")
    # Of a union's alternatives the place holds the types too; the field alone is what helps.
    param = next((part for part in place if isinstance(part, str)), None)
    if param is None:
        return BadRequestError("the body must be a JSON object")
    if kind == "missing" and len(place) == 1:
        return BadRequestError(f"{param} is missing", param)
    where = ".".join(str(part) for part in place if not _is_type(part))
    message = str(first["msg"])
    reason = f"{where}={first['input']!r:.80}: {message[0].lower()}{message[1:]}"
    return BadRequestError(reason, param)


def _is_type(part: Any) -> bool:
    """Whether a part of a place names an alternative's type and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "bool"))
