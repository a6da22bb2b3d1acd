"""From what who starts a server says of it to its options."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_paged.engine.serve.parsers.formats import TOOL_PARSERS, choose_format
from pallas_paged.engine.serve.parsers.reasoning import REASONING_PARSERS
from pallas_paged.engine.serve.service import ServeOptions
from pallas_paged.engine.serve.templates import choose_template
from pallas_paged.models.demo import DEMO_MODEL


def options_for(
    model: str,
    own_template: str | Mapping[str, str] | None,
    *,
    served_model_name: Sequence[str] | None = None,
    api_key: Sequence[str] | None = None,
    allowed_origin: Sequence[str] | None = None,
    chat_template: str | None = None,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    **others: Any,
) -> ServeOptions:
    """Returns the options of the server of a model.

    Args:
      model: its folder, whose name it has where no other is given.
      own_template: its chat template, or its templates by name; None has none.
      served_model_name: see `ServeOptions.served_model_names`.
      api_key: see `ServeOptions.api_keys`; the environment's PALLAS_PAGED_API_KEY is one too.
      allowed_origin: see `ServeOptions.allowed_origins`.
      chat_template: a file, a template, or the name of one of the model's; None is its own.
      tool_call_parser: the format of calls of tools; "auto" reads it off the template, "none" has
        none.
      reasoning_parser: what tells reasoning apart; "auto" does where the template has `<think>`.
      **others: further fields of `ServeOptions`.

    Raises:
      ValueError: there is no such chat template or parser.
    """
    chosen, template = choose_template(chat_template, own_template)
    for name, value, parsers in (
        ("tool_call_parser", tool_call_parser, TOOL_PARSERS),
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
    ):
        if value not in ("auto", "none", *parsers):
            raise ValueError(f"{name}={value!r} must be one of {['auto', 'none', *parsers]}")
    own = "demo" if model == str(DEMO_MODEL) else os.path.basename(os.path.normpath(model))
    keys = [*(api_key or ()), os.environ.get("PALLAS_PAGED_API_KEY", "")]
    tool_format = TOOL_PARSERS.get(tool_call_parser)
    if tool_call_parser == "auto":
        tool_format = choose_format(template)
    has_reasoning = reasoning_parser in REASONING_PARSERS
    if reasoning_parser == "auto":
        has_reasoning = "<think>" in (template or "")
    return ServeOptions(
        served_model_names=tuple(served_model_name or (own,)),
        api_keys=tuple(filter(None, keys)),
        allowed_origins=tuple(allowed_origin or ()),
        chat_template=chosen,
        tool_format=tool_format,
        has_reasoning=has_reasoning,
        **others,
    )


def log_requests(is_on: bool) -> None:
    """Prints a line of JSON for each request to standard output, where nothing else is, or none."""
    requests = logging.getLogger("pallas_paged.engine.serve.requests")
    requests.propagate = False
    if is_on:
        requests.addHandler(logging.StreamHandler(sys.stdout))
