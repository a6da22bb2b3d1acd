"""What clients send: OpenAI's requests, with the further fields that vLLM's users know.

The fields' ranges are checked where they are used, by `SamplingParams` and the engine; here they
stand for `/openapi.json`. A field that is not declared is refused by name, see `reading`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 2**14
"""Messages of a conversation, and parts of one of them."""
MAX_TOOLS = 1024
MAX_WORDS = 256
"""Stop strings, and bad words: all of them are looked for behind each token."""
MAX_BIASES = 2**17
MAX_CHOICES = 128
"""Completions that one request may ask for, over all its prompts."""
_MAX_INT = 2**31 - 1


class BadRequestError(ValueError):
    """A request that cannot be served, and the field that is the reason."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x <= _MAX_INT for x in value)


def _checked_prompt(value: Any) -> Any:
    """Returns one prompt or several as they came.

    By hand: of four types pydantic would try each, and make an error for each part.
    """
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and (
        all(isinstance(each, str) for each in value) or all(map(_is_ids, value))
    ):
        return value
    rule = "must be a string, a list of token ids, or a list of strings or of such lists"
    raise PydanticCustomError("prompt", f"{rule}; ids are integers from 0 to {_MAX_INT}")


def _checked_bias(value: Any) -> dict[int, float] | None:
    """Returns the bias of each token id; by hand for the same reason."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        rule = f"must be an object of token ids and numbers, at most {MAX_BIASES}"
        raise PydanticCustomError("logit_bias", rule)
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise PydanticCustomError("logit_bias", "has a key that is no token id")
        if type(bias) not in (int, float):
            raise PydanticCustomError("logit_bias", "has a value that is no number")
        biases[int(key)] = bias
    return biases


def _within(**limits: Any) -> Any:
    """Says in `/openapi.json` what is checked elsewhere."""
    return Field(json_schema_extra=limits)


_ID = {"type": "integer", "minimum": 0, "maximum": _MAX_INT}
_IDS = {"type": "array", "items": _ID}
_TEXT = {"type": "string"}
_SEVERAL = [{"type": "array", "items": each, "minItems": 1} for each in (_ID, _TEXT, _IDS)]
_BIASES = {
    "type": "object",
    "additionalProperties": {"type": "number"},
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "maxProperties": MAX_BIASES,
}

Prompts = Annotated[
    Any, PlainValidator(_checked_prompt), WithJsonSchema({"anyOf": [_TEXT, *_SEVERAL]})
]
Biases = Annotated[
    dict[int, float] | None,
    PlainValidator(_checked_bias),
    WithJsonSchema({"anyOf": [_BIASES, {"type": "null"}]}),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_INT)]], Field(fail_fast=True)]
Words = Annotated[
    list[Annotated[str, _within(minLength=1)]], Field(fail_fast=True, max_length=MAX_WORDS)
]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_MESSAGES)]
Count = Annotated[int, _within(minimum=1)]
NotNegative = Annotated[int, _within(minimum=0)]
Penalty = Annotated[float, _within(minimum=-2, maximum=2)]
Logprobs = Annotated[int, _within(minimum=-1)]


class Strict(BaseModel):
    """What is common to all requests: no number for a text, no text for a number."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={"additionalProperties": False},
        use_attribute_docstrings=True,
    )


class StreamOptions(Strict):
    """What a stream holds beside its text."""

    include_usage: bool | None = None
    """Send the usage in a piece of its own, at the end."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far in each piece."""


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
    """Of the type `json_schema`: its `schema` is needed."""


class StructuredOutputs(Strict):
    """What the answer has to be, by exactly one of the first five fields."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    """A JSON schema."""
    json_object: bool | None = None
    """True for any JSON object."""
    regex: str | None = None
    """A regular expression that matches the whole answer."""
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    """Strings of which the answer is one."""
    grammar: str | None = None
    """A grammar in llguidance's variant of Lark's syntax."""
    whitespace_pattern: str | None = None
    """A regular expression for the blanks between the tokens of JSON."""
    disable_any_whitespace: bool | None = None
    """Have no blanks between the tokens of JSON."""


class Sampling(Strict):
    """What both kinds of requests say of tokens; null is what the model's own defaults say."""

    model: str | None = None
    """A name that `/v1/models` lists; null is the model that is served."""
    n: Annotated[int, _within(minimum=1, maximum=MAX_CHOICES)] | None = None
    """Completions of each prompt; above 1 needs a temperature above 0."""
    temperature: Annotated[float, _within(minimum=0)] | None = None
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, _within(exclusiveMinimum=0, maximum=1)] | None = None
    """Keeps the fewest most likely tokens that have this mass."""
    top_k: Annotated[int, _within(minimum=-1, maximum=_MAX_INT)] | None = None
    """Keeps so many most likely tokens; 0 or -1 all."""
    min_p: Annotated[float, _within(minimum=0, maximum=1)] | None = None
    """Drops tokens less likely than this share of the most likely one's probability."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: Penalty | None = None
    """Subtracted for each time that the answer holds a token."""
    repetition_penalty: Annotated[float, _within(exclusiveMinimum=0)] | None = None
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer."""
    seed: Annotated[int, _within(minimum=-1, maximum=2**64 - 1)] | None = None
    """The same seed gives the same tokens; -1 is none."""
    stop: Annotated[str, _within(minLength=1)] | Words | None = None
    """Strings that end a completion when they appear in its text."""
    stop_token_ids: TokenIds | None = None
    """Tokens that end a completion."""
    ignore_eos: bool | None = None
    """Go on behind the token that ends a text."""
    max_tokens: NotNegative | None = None
    """Most tokens of a completion; 0 only with `echo`."""
    min_tokens: NotNegative | None = None
    """None of the first so many tokens ends a completion."""
    prompt_logprobs: Logprobs | None = None
    """Give the prompt's log-probabilities, with so many of the most likely tokens."""
    logit_bias: Biases = None
    """Added to the logits of token ids."""
    allowed_token_ids: Annotated[TokenIds, _within(minItems=1)] | None = None
    """The only tokens to choose from."""
    bad_words: Words | None = None
    """Strings never to generate."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text, as is done by default."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the text."""
    use_beam_search: bool | None = None
    """Search for the most likely completions, with `n` beams."""
    length_penalty: Annotated[float, _within(minimum=-10, maximum=10)] | None = None
    """Of a beam search: above 0 favours long results."""
    early_stopping: bool | Literal["never"] | None = None
    """Of a beam search: when it ends."""
    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    """Lower ones first, where the server was started with `--scheduling_policy=priority`."""
    cache_salt: str | None = None
    """Share cached blocks only with prompts of the same salt."""
    add_special_tokens: bool | None = None
    """Put in front of a prompt what its tokenizer does."""
    return_token_ids: bool | None = None
    """Give the tokens of the prompt and of the completions too."""


class CompletionRequest(Sampling):
    """`/v1/completions`: goes on with one prompt or several, of text or of tokens."""

    prompt: Prompts
    """One prompt or several, of text or of token ids."""
    best_of: Annotated[int, _within(minimum=1, maximum=MAX_CHOICES)] | None = None
    """Choose the `n` likeliest of so many completions; of a beam search, its beams."""
    echo: bool | None = None
    """Begin the text with the prompt."""
    logprobs: Logprobs | None = None
    """Give the log-probabilities of tokens, with so many of the most likely ones."""


class Message(BaseModel):
    """A message of a conversation; what else it holds goes to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | Objects | None = None
    tool_calls: Objects | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]


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


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class NamedFunction(Strict):
    """The function of a `NamedTool`."""

    name: str


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """`/v1/chat/completions`: answers a conversation, through the model's chat template."""

    messages: Annotated[Messages, _within(minItems=1)]
    """The conversation, oldest first."""
    max_completion_tokens: Count | None = None
    """Most tokens of an answer; also called `max_tokens`. Null is as many as fit."""
    logprobs: bool | None = None
    """Give the log-probabilities of tokens."""
    top_logprobs: NotNegative | None = None
    """With so many of the most likely ones; needs `logprobs`."""
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """Let an answer call several tools, as it may by default."""
    chat_template: str | None = None
    """A template, where the server was started with `--trust_request_chat_template`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the template."""
    add_generation_prompt: bool | None = None
    """End the prompt where an answer begins, as is done by default."""
    continue_final_message: bool | None = None
    """Go on with the last message."""
    include_reasoning: bool | None = None
    """Give what the model thinks, as is done by default."""


class TokenizeRequest(Strict):
    """`/tokenize`: the tokens of a text, or of a conversation's prompt."""

    model: str | None = None
    prompt: str | None = None
    """A text; this or `messages` is needed."""
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    """Give the text of each token too."""


class DetokenizeRequest(Strict):
    """`/detokenize`: the text of tokens."""

    model: str | None = None
    tokens: TokenIds
