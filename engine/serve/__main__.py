"""Serves a model over HTTP with OpenAI's API.

  python -m pallas_paged.engine.serve --model=FOLDER --port=8000
  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 32}'

Without --model the demo model that comes with the package is served. A page to try it is at the
server's address, in a browser. The first signal ends the requests that run and then the server, a
second one ends it at once.
"""

import asyncio
import importlib.util
import logging
import sys
from collections.abc import Mapping
from typing import Any

_NEEDED = ("fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop")
if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    lack = ", ".join(lacking)
    print(f"error: the server needs {lack}: pip install 'pallas-paged[serve]'", file=sys.stderr)
    sys.exit(2)

import uvloop
from absl import flags

from pallas_paged.engine import distributed_flags, engine_flags
from pallas_paged.engine.async_llm import MAX_QUEUED_REQUESTS, AsyncLLM
from pallas_paged.engine.engine_client import EngineClient
from pallas_paged.engine.replicas import ReplicatedLLM
from pallas_paged.engine.serve import server
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.options_for import log_requests, options_for
from pallas_paged.engine.serve.parsers.formats import TOOL_PARSERS
from pallas_paged.engine.serve.parsers.reasoning import REASONING_PARSERS
from pallas_paged.engine.serve.service import ServeOptions, Service
from pallas_paged.engine.watching_flags import watching_options
from pallas_paged.models import command_line

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 is every one.")
_PORT = flags.DEFINE_integer(
    "port",
    8000,
    "Port to listen at; 0 is any that is free.",
    lower_bound=0,
    upper_bound=65535,
)
_SERVED_MODEL_NAME = flags.DEFINE_multi_string(
    "served_model_name",
    None,
    "What requests call the model, by default the folder's name; may be repeated.",
)
_API_KEY = flags.DEFINE_multi_string(
    "api_key",
    None,
    "Asked for as 'Authorization: Bearer KEY'; may be repeated. Other users of the machine see "
    "flags: the environment's PALLAS_PAGED_API_KEY is one too.",
)
_MAX_QUEUED_REQUESTS = flags.DEFINE_integer(
    "max_queued_requests",
    MAX_QUEUED_REQUESTS,
    "Requests that may wait, at each replica; more are answered with 503 and Retry-After.",
)
_DATA_PARALLEL_SIZE = flags.DEFINE_integer(
    "data_parallel_size",
    1,
    "Replicas of the model, each on devices of its own; requests go where their prefix is cached.",
    lower_bound=1,
)
_REQUEST_TIMEOUT_S = flags.DEFINE_float(
    "request_timeout_s", None, "Seconds that a request may take; by default any number."
)
_MAX_REQUEST_BYTES = flags.DEFINE_integer("max_request_bytes", 16 << 20, "Most bytes of a body.")
_BODY_TIMEOUT_S = flags.DEFINE_float("body_timeout_s", 30.0, "Seconds in which a body must come.")
_STALLED_CLIENT_S = flags.DEFINE_float(
    "stalled_client_s", 120.0, "Seconds after which a client that reads nothing is given up."
)
_SHUTDOWN_GRACE_S = flags.DEFINE_float(
    "shutdown_grace_s", 30.0, "Seconds that requests have to end after a signal."
)
_ALLOWED_ORIGIN = flags.DEFINE_multi_string(
    "allowed_origin",
    None,
    "Origin of pages whose scripts may send requests, * for all; may be repeated. None by default.",
)
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "Jinja template of all chats: a file, the template itself, or the name of one of the folder's.",
)
_TRUST_REQUEST_CHAT_TEMPLATE = flags.DEFINE_bool(
    "trust_request_chat_template", False, "Let requests bring templates, which are programs."
)
_TOOL_CALL_PARSER = flags.DEFINE_enum(
    "tool_call_parser",
    "auto",
    ["auto", "none", *TOOL_PARSERS],
    "Format in which the model writes calls of tools; auto reads it off the chat template.",
)
_REASONING_PARSER = flags.DEFINE_enum(
    "reasoning_parser",
    "auto",
    ["auto", "none", *REASONING_PARSERS],
    "What tells a model's reasoning apart; auto does where the chat template has <think>.",
)
_METRICS_PREFIX = flags.DEFINE_string("metrics_prefix", "vllm", "In front of the metrics' names.")
_LOG_REQUESTS = flags.DEFINE_bool(
    "log_requests", True, "Print a line of JSON for each request to standard output."
)
for module in (engine_flags, distributed_flags):
    flags.adopt_module_key_flags(module)  # --help has them too


def main() -> None:
    """Loads the model and serves it."""
    logging.getLogger("pallas_paged").setLevel(logging.INFO)
    log_requests(_LOG_REQUESTS.value)
    check_limits()
    if distributed_flags.has_followed():
        return
    bound = server.bound_socket(_HOST.value, _PORT.value)  # first: loading takes longer
    options = engine_flags.engine_options() | watching_options()
    llm = make_llm(_DATA_PARALLEL_SIZE.value, options)
    own = None if llm.tokenizer is None else llm.tokenizer.implementation.chat_template
    app = make_app(Service(llm, serve_options(options["model"], own)))
    logging.getLogger("pallas_paged.engine.serve").info(
        "serving %s at %s", options["model"], server.url_of(bound)
    )

    async def serve() -> int:
        stopping = asyncio.Event()
        server.stop_at_signals(stopping)
        return await server.run(llm, app, bound, stopping, _SHUTDOWN_GRACE_S.value)

    if status := uvloop.run(serve()):
        sys.exit(status)


def make_llm(data_parallel_size: int, options: Mapping[str, Any]) -> EngineClient:
    """Loads the model, once for each replica."""
    limits: dict[str, Any] = {"max_queued_requests": _MAX_QUEUED_REQUESTS.value}
    if data_parallel_size == 1:
        return AsyncLLM(**limits, **options)
    return ReplicatedLLM(data_parallel_size=data_parallel_size, **limits, **options)


def check_limits() -> None:
    """Raises `ValueError` for a limit that is none."""
    for flag in (_REQUEST_TIMEOUT_S, _BODY_TIMEOUT_S, _STALLED_CLIENT_S, _MAX_REQUEST_BYTES):
        if flag.value is not None and not flag.value > 0:
            raise ValueError(f"--{flag.name}={flag.value} must be above 0")
    if not _SHUTDOWN_GRACE_S.value >= 0:
        raise ValueError(f"--shutdown_grace_s={_SHUTDOWN_GRACE_S.value} must be at least 0")


def serve_options(model: str, own_template: str | Mapping[str, str] | None) -> ServeOptions:
    """Returns what the flags say of the server of a model with this chat template, or these.

    Raises:
      ValueError: there is no such chat template.
    """
    return options_for(
        model,
        own_template,
        served_model_name=_SERVED_MODEL_NAME.value,
        api_key=_API_KEY.value,
        allowed_origin=_ALLOWED_ORIGIN.value,
        chat_template=_CHAT_TEMPLATE.value,
        tool_call_parser=_TOOL_CALL_PARSER.value,
        reasoning_parser=_REASONING_PARSER.value,
        max_request_bytes=_MAX_REQUEST_BYTES.value,
        body_timeout_s=_BODY_TIMEOUT_S.value,
        request_timeout_s=_REQUEST_TIMEOUT_S.value,
        stalled_client_s=_STALLED_CLIENT_S.value,
        trust_request_chat_template=_TRUST_REQUEST_CHAT_TEMPLATE.value,
        metrics_prefix=_METRICS_PREFIX.value,
    )


if __name__ == "__main__":
    command_line.run(main)
