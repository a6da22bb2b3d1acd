"""Puts reasoning in front of what an output has to look like."""

import json
import re
from collections.abc import Mapping

from pallas_paged.engine.serve.parsers.grammar import lark, reasoning_rules
from pallas_paged.engine.structured_outputs import StructuredOutputsParams

_SLASHES = re.compile(r"\\.|/", re.DOTALL)


def after_thinking(
    params: StructuredOutputsParams, marker_ids: Mapping[str, int]
) -> StructuredOutputsParams:
    """Returns the form of answers that end their reasoning, and then have the form of `params`.

    Args:
      params: what is to follow `</think>` and at most two newlines.
      marker_ids: has the token `</think>`, if it is one of its own.

    Raises:
      ValueError: it becomes too long.
    """
    rules = [f"start: thinking answer\n{_answer(params)}", *reasoning_rules(marker_ids)]
    return StructuredOutputsParams(grammar="\n".join(rules) + "\n")


def _answer(params: StructuredOutputsParams) -> str:
    """Returns the rule of what follows the reasoning."""
    if params.grammar is not None:
        return f"answer: %lark {{\n{params.grammar}\n}}"
    if params.regex is not None:
        # Two slashes begin a comment.
        escaped = _SLASHES.sub(lambda found: r"\/" if found[0] == "/" else found[0], params.regex)
        return f"answer: ANSWER\nANSWER: /{escaped}/" if params.regex else 'answer: ""'
    if params.choice is not None:
        # In one terminal: the parser has a limit for rules with alternatives.
        return f"answer: ANSWER\nANSWER: {' | '.join(map(lark, params.choice))}"
    assert isinstance(params.json, str | None)
    schema = {"type": "object"} if params.json is None else json.loads(params.json)
    if params.whitespace_pattern is not None:
        schema["x-guidance"] = {"whitespace_pattern": params.whitespace_pattern}
    elif params.disable_any_whitespace:
        schema["x-guidance"] = {"whitespace_flexible": False}
    return f"answer: %json {json.dumps(schema, ensure_ascii=False)}"
