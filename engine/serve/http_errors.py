"""From what goes wrong to OpenAI's error bodies and status codes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from pallas_paged.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineOverloadedError,
)
from pallas_paged.engine.serve.protocol import BadRequestError
from pallas_paged.engine.serve.responses import ErrorBody, ErrorDetail, encode
from pallas_paged.engine.structured_outputs import KINDS

_FIELD = re.compile(
    r"(?:prompts?\[\d+\]: )?(?:request \S+ )?"
    r"(?:a (?=prompt )|the (?=prompt )|(?:the prompt's )?\d+ (?:prompt )?(?:tokens and )?"
    r"|.*, so (?=messages cannot )|the .*chat template .* (?=messages(?:: | holds)))?"
    r"(\w+)(?:=|\[|: | must| holds| has| is missing| needs?| of| is| run| cannot)"
)
"""Finds the field that a message of the engine is about."""
_NAMES = {
    "sequences": "n",
    "prompt_token_ids": "prompt",
    "beam_width": "n",
    "num_return": "n",
    **dict.fromkeys((*KINDS, "whitespace_pattern"), "structured_outputs"),
    "disable_any_whitespace": "structured_outputs",
}
"""What requests call fields of the engine."""
_RETRY_DRAINING_S = 5

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class HttpError(Exception):
    """An error with a status code of its own."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


class ErrorAnswer(NamedTuple):
    """An error as it is answered.

    Attributes:
      status: of HTTP.
      body: JSON.
      headers: further ones.
    """

    status: int
    body: bytes
    headers: dict[str, str]


def answer_to(error: BaseException, names: Mapping[str, str] | None = None) -> ErrorAnswer:
    """Returns how an error is answered; one that is not known is the server's own fault.

    `names` are those of the request for what others call otherwise; see `Exchange`.
    """
    param, headers = None, {}
    if isinstance(error, HttpError):
        status, param = error.status, error.param
        if status == 408:  # what still comes of the body is nobody's
            headers = {"Connection": "close"}
    elif isinstance(error, BadRequestError):
        status, param = 400, error.param
    elif isinstance(error, NotImplementedError):
        status = 501
    elif isinstance(error, ValueError):
        match = _FIELD.match(str(error))
        status, param = 400, match and match.group(1)
        param = param and _named(param, names or {})
    elif isinstance(error, EngineOverloadedError):
        status, headers = 503, {"Retry-After": str(error.retry_after_s)}
    elif isinstance(error, EngineDrainingError):
        status, headers = 503, {"Retry-After": str(_RETRY_DRAINING_S)}
    elif isinstance(error, EngineDeadError):
        status = 503
    elif isinstance(error, DeadlineExceededError):
        status = 504
    else:
        status = 500
    is_ours = status == 500 and not isinstance(error, EngineError | HttpError)
    message = "an internal error; the server's log has it" if is_ours else str(error)
    return ErrorAnswer(status, error_body(status, message, param), headers)


def _named(field: str, names: Mapping[str, str]) -> str:
    if field in names:
        return names[field]
    general = _NAMES.get(field, field)
    return names.get(general, general)


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """Returns the body of an error."""
    clean = message.encode("utf-8", "replace").decode()
    return encode(ErrorBody(ErrorDetail(clean, _TYPES.get(status, "Error"), param, status)))
