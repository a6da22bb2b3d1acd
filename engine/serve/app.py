"""The ASGI application: paths, who may ask, and how errors are answered."""

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Coroutine, Mapping
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pallas_paged.engine.errors import EngineError
from pallas_paged.engine.serve.answers import EventStream, json_answer
from pallas_paged.engine.serve.chat import ChatCall
from pallas_paged.engine.serve.completions import CompletionCall
from pallas_paged.engine.serve.exchange import ClientGoneError, Exchange, read_body, until_gone
from pallas_paged.engine.serve.http_errors import HttpError, answer_to, error_body
from pallas_paged.engine.serve.openapi import document
from pallas_paged.engine.serve.page import page_answer
from pallas_paged.engine.serve.prometheus import CONTENT_TYPE, EngineMetrics
from pallas_paged.engine.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pallas_paged.engine.serve.reading import parse
from pallas_paged.engine.serve.responses import Health, Model, Models, Version, encode
from pallas_paged.engine.serve.service import REQUEST_TIMEOUT_HEADER, Service
from pallas_paged.engine.serve.tokens import detokenize, tokenize

logger = logging.getLogger(__name__)

_OPEN_PATHS = {"/", "/health", "/ping", "/version", "/metrics"}
"""What needs no API key."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def make_app(service: Service) -> FastAPI:
    """Returns the application that serves an engine.

    Its `state.service` is the service. Whoever runs it shuts the engine down.
    """
    app = FastAPI(title="pallas-paged", version=version(), openapi_url=None)
    app.state.service = service
    _add_errors(app)
    _add_generation(app, service)
    _add_state(app, service)
    app.add_middleware(Gate, api_keys=service.options.api_keys)
    if service.options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def version() -> str:
    """Returns this package's version."""
    return metadata.version("pallas-paged")


class Gate:
    """Gives each request an id, and lets in who brings a key.

    The id is the client's `X-Request-Id` if that is 1 to 128 visible characters of ASCII, or a new
    one; the answer has it too.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]):
        """Asks for none of them if there is none."""
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        if self._is_let_in(scope, headers.get(b"authorization", b"")):
            await self._app(scope, receive, send_with_id)
            return
        text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        answer = json_answer(error_body(401, text), 401, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send_with_id)

    def _is_let_in(self, scope: Scope, authorization: bytes) -> bool:
        if not self._digests or scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # All of them, whichever it is: the time that it takes tells nothing.
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path, text = request.url.path, str(error.detail)
        if error.status_code == 404:
            text = f"there is nothing at {path}"
        elif error.status_code == 405:
            text = f"{path} takes no {request.method}; use {(error.headers or {}).get('Allow')}"
        body = error_body(error.status_code, text)
        return json_answer(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        return _error_answer(error)


def _error_answer(error: Exception, names: Mapping[str, str] | None = None) -> Response:
    answer = answer_to(error, names)
    if answer.status == 500:
        logger.error("%s", error, exc_info=error)
    return json_answer(answer.body, answer.status, answer.headers)


type Serve = Callable[[Exchange, Any, Request], Coroutine[Any, Any, Response]]


def _add_generation(app: FastAPI, service: Service) -> None:
    """Adds the paths that take a body."""

    async def completions(
        exchange: Exchange, request: CompletionRequest, http: Request
    ) -> Response:
        return await _serve(
            service,
            exchange,
            CompletionCall(service, exchange, request),
            bool(request.stream),
            http,
        )

    async def chat(exchange: Exchange, request: ChatRequest, http: Request) -> Response:
        call = ChatCall(service, exchange, request)
        return await _serve(service, exchange, call, bool(request.stream), http)

    async def tokens_of(exchange: Exchange, request: TokenizeRequest, http: Request) -> Response:
        return json_answer(await tokenize(service, request))

    async def text_of(exchange: Exchange, request: DetokenizeRequest, http: Request) -> Response:
        return json_answer(await detokenize(service, request))

    for path, kind, serve in (
        ("/v1/completions", CompletionRequest, completions),
        ("/v1/chat/completions", ChatRequest, chat),
        ("/tokenize", TokenizeRequest, tokens_of),
        ("/detokenize", DetokenizeRequest, text_of),
    ):
        _add_post(app, service, path, kind, serve)


def _add_post(
    app: FastAPI, service: Service, path: str, kind: type[BaseModel], serve: Serve
) -> None:
    options = service.options

    async def endpoint(http: Request) -> Response:
        exchange = Exchange(http.state.request_id, path)
        try:
            body = await read_body(http, options.max_request_bytes, options.body_timeout_s)
            request: Any = parse(kind, body)
            service.check_model(request.model)
            answer = await serve(exchange, request, http)
        except ClientGoneError:
            exchange.close()
            exchange.log(499)
            return Response(status_code=499)
        except Exception as error:
            exchange.close()
            answer = _error_answer(error, exchange.names)
            exchange.log(answer.status_code, error=str(error))
            return answer
        except BaseException:  # the server ends
            exchange.close()
            raise
        if not isinstance(answer, EventStream):
            exchange.log(200)
        return answer

    app.add_api_route(path, endpoint, methods=["POST"], response_model=None)


async def _serve(
    service: Service,
    exchange: Exchange,
    call: CompletionCall | ChatCall,
    streams: bool,
    http: Request,
) -> Response:
    """Answers a call whole, or as a stream; a client that goes aborts it."""
    timeout_s = service.timeout_s(http.headers.get(REQUEST_TIMEOUT_HEADER))
    await until_gone(http.receive, call.begin(timeout_s))
    if streams:
        return EventStream(exchange, call.pieces(), service.options.stalled_client_s)
    return json_answer(await until_gone(http.receive, call.whole()))


def _add_state(app: FastAPI, service: Service) -> None:
    """Adds the paths that say what is served, and how it is."""
    llm, options = service.llm, service.options
    figures = EngineMetrics(llm, service.model_name, options.metrics_prefix)

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            return Response(await figures.text(), media_type=CONTENT_TYPE)
        except EngineError as error:
            return _error_answer(error)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return page_answer()

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        try:
            llm.check_accepts()
        except EngineError as error:
            return _error_answer(error)
        return json_answer(encode(Health("ok")))

    @app.get("/version")
    async def version_of() -> Response:
        return json_answer(encode(Version(version())))

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_answer(encode(document(version(), has_keys=bool(options.api_keys))))

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_model(service, name) for name in options.served_model_names]
        return json_answer(encode(Models("list", data)))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            service.check_model(name)
        except HttpError as error:
            return _error_answer(error)
        return json_answer(encode(_model(service, name)))


def _model(service: Service, name: str) -> Model:
    return Model(
        id=name,
        object="model",
        created=service.created,
        owned_by="pallas-paged",
        root=service.llm.config.model,
        parent=None,
        max_model_len=service.llm.max_model_len,
    )
