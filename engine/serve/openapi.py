"""`/openapi.json`: what the server answers, for people, clients and fuzzers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pallas_paged.engine.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pallas_paged.engine.serve.responses import (
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    Model,
    Models,
    Text,
    Tokens,
    Version,
)

_REF = "#/components/schemas/"
_ERRORS = {
    400: "The request is not usable; `param` is the field that is the reason, if it is one.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    500: "The request failed, by no fault of its own.",
    501: "The request asks for what is not implemented.",
    503: "No requests are taken now; `Retry-After` says when to try again, if that may help.",
    504: "The request was not done in time.",
}
_HEADERS = [
    (
        "X-Request-Id",
        {"type": "string", "pattern": "^[!-~]{1,128}$"},
        "Names the request in the answer and the log.",
    ),
    (
        "X-Request-Timeout",
        {"type": "number", "exclusiveMinimum": 0},
        "Seconds after which the request is given up, with 504.",
    ),
]
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
    "description": "Each event's data is a piece of the answer as JSON, or the body of an error; "
    "that of the last one is [DONE].",
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


class Operation(NamedTuple):
    """A path of the server.

    Attributes:
      method: of HTTP, in small letters.
      path: with its variables in braces.
      summary: what it does.
      errors: the statuses that it may answer beside 200.
      answer: the struct of its answer; None is plain text.
      request: the model of its body, if it takes one.
      is_open: whether it needs no API key.
      streams: whether its answer may come as server-sent events.
    """

    method: str
    path: str
    summary: str
    errors: Sequence[int]
    answer: type[msgspec.Struct] | None
    request: type[BaseModel] | None = None
    is_open: bool = False
    streams: bool = False


_OF_BODIES = (400, 401, 404, 408, 413, 500, 503)
_OF_TOKENS = (*_OF_BODIES, 501, 504)
OPERATIONS = (
    Operation(
        *("post", "/v1/completions", "Goes on with one prompt or several.", _OF_TOKENS),
        Completion,
        CompletionRequest,
        streams=True,
    ),
    Operation(
        *("post", "/v1/chat/completions", "Answers a conversation.", _OF_TOKENS),
        ChatCompletion,
        ChatRequest,
        streams=True,
    ),
    Operation(
        *("post", "/tokenize", "The tokens of a text or a conversation.", _OF_BODIES),
        Tokens,
        TokenizeRequest,
    ),
    Operation(*("post", "/detokenize", "The text of tokens.", _OF_BODIES), Text, DetokenizeRequest),
    Operation("get", "/v1/models", "The names of the model that is served.", (401,), Models),
    Operation("get", "/v1/models/{name}", "One name of the model.", (401, 404), Model),
    Operation("get", "/health", "Whether requests are taken.", (503,), Health, is_open=True),
    Operation("get", "/version", "The server's version.", (), Version, is_open=True),
    Operation(
        *("get", "/metrics", "The engine's figures, for Prometheus.", (503,)), None, is_open=True
    ),
)


def document(version: str, *, has_keys: bool) -> dict[str, Any]:
    """Returns the OpenAPI document of a server, which asks for API keys or not."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, has_keys)
    components: dict[str, Any] = {"schemas": _schemas()}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pallas-paged", "version": version},
        "paths": paths,
        "components": components,
    }


def _described(operation: Operation, has_keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    of_error = {"application/json": {"schema": _ref(ErrorBody)}}
    responses = {"200": {"description": "The answer.", "content": content}} | {
        str(status): {"description": _ERRORS[status], "content": of_error}
        for status in operation.errors
        if status != 401 or has_keys
    }
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.request is not None:
        body = {"application/json": {"schema": _ref(operation.request)}}
        described["requestBody"] = {"required": True, "content": body}
        described["parameters"] = [
            {"name": name, "in": "header", "schema": schema, "description": text}
            for name, schema, text in _HEADERS
        ]
    if "{name}" in operation.path:
        described["parameters"] = [_NAME]
    if has_keys and not operation.is_open:
        described["security"] = [{"key": []}]
    return described


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REF + kind.__name__}


def _schemas() -> dict[str, Any]:
    """Returns the schemas of all that is sent and answered, by name."""
    requests: list[Any] = [(op.request, "validation") for op in OPERATIONS if op.request]
    _, sent = models_json_schema(requests, ref_template=_REF + "{model}")
    answers = [operation.answer for operation in OPERATIONS if operation.answer is not None]
    _, answered = msgspec.json.schema_components(
        [*answers, ErrorBody], ref_template=_REF + "{name}"
    )
    schemas: dict[str, Any] = sent["$defs"] | answered
    return schemas
