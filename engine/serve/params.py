"""From what a request says of its tokens to the engine's parameters."""

from typing import Any

from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.serve.protocol import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    Sampling,
)
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from pallas_paged.engine.text.prompts import Params

_DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's

_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that mean what those of `SamplingParams` do."""
_OF_BEAMS = {"ignore_eos", "stop_token_ids", "skip_special_tokens"}
_OF_BEAMS_ONLY = ("length_penalty", "early_stopping")


def completion_params(request: CompletionRequest, defaults: SamplingParams) -> Params:
    """Returns the parameters of each prompt of a completion request.

    Of `best_of` completions the caller chooses; an echo's log-probabilities are the prompt's.

    Args:
      request: as it came.
      defaults: what the model's `generation_config.json` advises.

    Raises:
      ValueError: a field is not usable; the message names it.
    """
    _check_stream(request)
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _DEFAULT_COMPLETION_TOKENS
    elif max_tokens == 0 and request.echo:
        if request.min_tokens:
            raise BadRequestError(
                f"min_tokens={request.min_tokens} must be at most max_tokens=0", "min_tokens"
            )
        max_tokens = 1  # the prompt alone; the token is not given out
    if request.use_beam_search:
        return _beam_params(request, max_tokens, request.best_of)
    changes: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": request.logprobs}
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        changes["prompt_logprobs"] = request.logprobs
    if request.best_of is not None:
        n = 1 if request.n is None else request.n
        if request.best_of < n:
            raise BadRequestError(
                f"best_of={request.best_of} must be at least n={n}, of which it is chosen",
                "best_of",
            )
        if request.best_of > n:
            if request.stream:
                raise BadRequestError(
                    f"best_of={request.best_of} chooses when all are done, which is no stream; "
                    "leave stream out, or best_of",
                    "best_of",
                )
            changes["n"] = request.best_of
            changes["logprobs"] = 0 if request.logprobs is None else request.logprobs
    return _sampling_params(request, changes, defaults)


def chat_params(
    request: ChatRequest,
    defaults: SamplingParams,
    grammar: StructuredOutputsParams | None,
    keeps_special_tokens: bool,
) -> Params:
    """Returns the parameters of a chat request; see `completion_params`.

    Args:
      request: as it came.
      defaults: see `completion_params`.
      grammar: in the place of what the request says of its output's form; None leaves that.
      keeps_special_tokens: whether special tokens have to be in the text, for a parser.
    """
    _check_stream(request)
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    elif request.max_tokens not in (None, max_tokens):
        raise BadRequestError(
            f"max_completion_tokens={max_tokens} and max_tokens={request.max_tokens} are two "
            "names of one thing; leave one of them out",
            "max_tokens",
        )
    if request.use_beam_search:
        if max_tokens is None:
            raise BadRequestError("use_beam_search needs max_tokens, where it ends", "max_tokens")
        return _beam_params(request, max_tokens, None)
    logprobs = None
    if request.logprobs:
        logprobs = 0 if request.top_logprobs is None else request.top_logprobs
        if logprobs < 0:
            raise BadRequestError(f"top_logprobs={logprobs} must be at least 0", "top_logprobs")
    elif request.top_logprobs is not None:
        raise BadRequestError(
            f"top_logprobs={request.top_logprobs} needs logprobs=true", "top_logprobs"
        )
    changes: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
    if grammar is not None:
        changes["structured_outputs"] = grammar
    if keeps_special_tokens:
        changes["skip_special_tokens"] = False
    return _sampling_params(request, changes, defaults)


def _sampling_params(
    request: Sampling, changes: dict[str, Any], defaults: SamplingParams
) -> SamplingParams:
    for field in _OF_BEAMS_ONLY:
        if getattr(request, field) is not None:
            raise BadRequestError(f"{field} needs use_beam_search=true", field)
    fields = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    fields |= {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.logit_bias is not None:
        fields["logit_bias"] = request.logit_bias
    if "structured_outputs" not in changes:
        fields["structured_outputs"] = structured_outputs(request)
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields | changes, output_kind=kind)


def _check_stream(request: Sampling) -> None:
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("stream_options need stream=true", "stream_options")


def structured_outputs(request: Sampling) -> StructuredOutputsParams | None:
    """Returns what a request's output has to be, by whichever field says it; None for anything.

    Raises:
      ValueError: it says it twice, or what it says is not usable.
    """
    given, asked = request.structured_outputs, request.response_format
    if given is not None:
        if asked is not None and asked.type != "text":
            raise BadRequestError(
                "response_format and structured_outputs are both given; choose one",
                "response_format",
            )
        return StructuredOutputsParams(**given.model_dump(by_alias=True, exclude_none=True))
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise BadRequestError(
            "response_format of type 'json_schema' needs json_schema.schema", "response_format"
        )
    return StructuredOutputsParams(json=asked.json_schema.schema_)


def _beam_params(request: Sampling, max_tokens: int, best_of: int | None) -> BeamSearchParams:
    if request.stream:
        raise BadRequestError(
            "use_beam_search has its results when it is over, which is no stream; leave stream out",
            "use_beam_search",
        )
    allowed = _OF_BEAMS | {"n", "temperature"}
    for field in (*_SAME, "logit_bias", "logprobs", "structured_outputs", "response_format"):
        value = getattr(request, field, None)
        if value not in (None, False) and field not in allowed:
            raise BadRequestError(f"{field}={value!r:.80} is nothing for use_beam_search", field)
    if request.temperature:
        raise BadRequestError(
            f"temperature={request.temperature} is nothing for use_beam_search; use 0",
            "temperature",
        )
    n = 1 if request.n is None else request.n
    fields: dict[str, Any] = {
        name: value
        for name in (*_OF_BEAMS, *_OF_BEAMS_ONLY)
        if (value := getattr(request, name)) is not None
    }
    width = n if best_of is None else best_of
    return BeamSearchParams(beam_width=width, max_tokens=max_tokens, num_return=n, **fields)
