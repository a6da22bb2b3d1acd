"""What all requests of a server share: the engine, the options, and what follows from them."""

import dataclasses
import time

from pallas_paged.engine.engine_client import EngineClient
from pallas_paged.engine.serve.http_errors import HttpError
from pallas_paged.engine.serve.parsers.formats import ToolFormat

REQUEST_TIMEOUT_HEADER = "x-request-timeout"


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a server answers.

    Attributes:
      served_model_names: what requests may call the model; answers have the first.
      api_keys: one of them is asked for; none asks for nothing.
      max_request_bytes: the most bytes of a request's body.
      body_timeout_s: seconds in which a body has to come.
      request_timeout_s: seconds that a request may take; None is no limit. A request may ask for
        less in the header `X-Request-Timeout`.
      stalled_client_s: seconds after which a client that reads nothing is given up.
      allowed_origins: of pages whose scripts may send requests; none by default.
      chat_template: of all conversations; None is the model's own.
      tool_format: the format in which the model writes calls of tools; None has none.
      has_reasoning: whether what the model thinks is told apart, `<think>` ... `</think>`.
      trust_request_chat_template: whether a request may bring its own, which is a program.
      metrics_prefix: of the metrics' names.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_request_bytes: int = 16 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    stalled_client_s: float = 120.0
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_format: ToolFormat | None = None
    has_reasoning: bool = False
    trust_request_chat_template: bool = False
    metrics_prefix: str = "vllm"


class Service:
    """The engine with the options of its server.

    Attributes:
      llm: as given, as is `options`.
      options: likewise.
      defaults: of sampling, as the model's `generation_config.json` advises.
      created: seconds since 1970, when it began.
    """

    def __init__(self, llm: EngineClient, options: ServeOptions):
        """Raises `ValueError` if the model's advice on sampling is not usable."""
        self.llm, self.options = llm, options
        self.defaults = llm.get_default_sampling_params()
        self.created = int(time.time())

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.options.served_model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raises `HttpError` (404) for a model that is not served; None is the one that is."""
        names = self.options.served_model_names
        if name is not None and name not in names:
            raise HttpError(404, f"model={name!r:.80} is not served; use {names[0]!r}", "model")

    def timeout_s(self, header: str | None) -> float | None:
        """Returns the seconds that a request may take, by what its header asks for.

        Raises:
          HttpError: it is no number above 0.
        """
        limit = self.options.request_timeout_s
        if header is None:
            return limit
        try:
            asked = float(header)
        except ValueError:
            asked = 0.0
        if not 0 < asked < float("inf"):
            raise HttpError(400, f"X-Request-Timeout={header!r:.40} must be seconds above 0")
        return asked if limit is None else min(asked, limit)
