"""Grammars that make a model write calls of tools, in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from pallas_paged.engine.serve.parsers.formats import ToolFormat
from pallas_paged.engine.serve.parsers.reasoning import CLOSING
from pallas_paged.engine.valid_text import check_text


def grammar_for(
    tool_format: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any] | None,
    *,
    parallel_tool_calls: bool = True,
    marker_ids: Mapping[str, int] | None = None,
    starts_inside: bool = False,
) -> str | None:
    """Returns the grammar of the answers that a choice of tools allows; None if it allows all.

    "required" allows one call or several of any tools, a named function one call of it, and nothing
    besides. What the grammar allows, a `ToolParser` of the format reads as calls. Arguments follow
    the tool's `parameters`, which are any object if missing, None or `{}`.

    Args:
      tool_format: how calls are written.
      tools: as in a request, `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
      tool_choice: "required", `{"type": "function", "function": {"name": ...}}`, "auto", "none" or
        None.
      parallel_tool_calls: whether "required" allows several calls.
      marker_ids: tokens by the markers that are one token of their own, of the format's `markers`
        and `</think>`. A model may write those by their token or spelled. llguidance takes a token
        that a tokenizer has added, special or not, for no text, so it must be named.
      starts_inside: whether the answer begins inside of reasoning, which it then ends first.

    Raises:
      ValueError: a tool, its parameters or the choice are not of such a form, or llguidance does
        not support the parameters' schema.
    """
    choice = _named(tool_choice)
    if choice is None and tool_choice != "required":
        return None
    functions = [_function(tool, index) for index, tool in enumerate(tools)]
    chosen = [i for i, function in enumerate(functions) if choice in (None, function["name"])]
    if not chosen:
        names = ", ".join(repr(function["name"]) for function in functions) or "none"
        raise ValueError(f"tool_choice={tool_choice!r:.200} needs a tool; tools has {names}")
    ids = marker_ids or {}
    several = choice is None and parallel_tool_calls
    rules = [
        f"start: {_beginning(tool_format, ids, starts_inside)}call"
        + (f" ({lark(tool_format.between)} call)*" if several else ""),
        f"call: {_call(tool_format, ids, [f'tool_{i}' for i in chosen])}",
    ]
    for i in chosen:
        name = json.dumps(functions[i]["name"], ensure_ascii=False)
        prefix = f'{{"name": {name}, "{tool_format.arguments_keys[0]}": '
        schema = _schema(functions[i].get("parameters"), f"tools[{i}].function.parameters")
        rules.append(f"tool_{i}: {lark(prefix)} %json {schema} {lark('}')}")
    if starts_inside:
        rules += reasoning_rules(ids)
    return "\n".join(rules) + "\n"


def _named(tool_choice: str | Mapping[str, Any] | None) -> str | None:
    """Returns the name of the function that a choice names, if it names one."""
    if tool_choice in (None, "auto", "none", "required"):
        return None
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f'tool_choice={tool_choice!r:.80} must be "auto", "none", "required" or '
            '{"type": "function", "function": {"name": str}}'
        )
    return name


def _function(tool: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Returns the function that a tool is."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'tools[{index}]={tool!r:.80} must be {{"type": "function", "function": {{...}}}}'
        )
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"tools[{index}].function.name={name!r:.80} must be a string that is not empty"
        )
    check_text(f"tools[{index}].function.name", name)
    return function


def _schema(parameters: Any, label: str) -> str:
    """Returns a schema as JSON, made one of objects."""
    schema = {} if parameters is None else parameters
    if not isinstance(schema, Mapping):
        raise ValueError(f"{label}={schema!r:.80} must be a JSON schema of an object")
    if schema.get("type", "object") != "object":
        raise ValueError(
            f'{label}.type={schema["type"]!r:.80} must be "object", as a tool\'s arguments are one'
        )
    try:
        text = json.dumps({**schema, "type": "object"}, allow_nan=False)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(
            LLMatcher.grammar_from_json_schema(text)
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{label} must be a JSON schema: {error}") from error
    if is_error:
        raise ValueError(f"{label} must be a JSON schema that llguidance supports: {messages[0]}")
    return text


def _beginning(tool_format: ToolFormat, ids: Mapping[str, int], starts_inside: bool) -> str:
    """Returns what is allowed in front of the first call."""
    thinking = "thinking " if starts_inside else ""
    is_optional = tool_format.is_bare and tool_format.opening in ids
    return thinking + (f"<[{ids[tool_format.opening]}]>? " if is_optional else "")


def _call(tool_format: ToolFormat, ids: Mapping[str, int], tool_rules: Sequence[str]) -> str:
    """Returns a call's right-hand side."""
    parts = [f"({' | '.join(tool_rules)})"]
    padding = [lark(tool_format.padding)] if tool_format.padding else []
    if not tool_format.is_bare:
        parts = [_marker(tool_format.opening, ids), *padding, *parts]
    if tool_format.closing is not None:
        parts += [*padding, _marker(tool_format.closing, ids)]
    return " ".join(parts)


def _marker(marker: str, ids: Mapping[str, int]) -> str:
    return f"(<[{ids[marker]}]> | {lark(marker)})" if marker in ids else lark(marker)


def reasoning_rules(ids: Mapping[str, int]) -> list[str]:
    """Returns the rules of text up to where reasoning ends, and of the newlines behind it."""
    tag = CLOSING.replace("/", r"\/")
    if CLOSING in ids:
        # The tag spelled would end the reasoning for the parser, and not for the grammar.
        text = rf"TEXT: /(?s:.*)/ & ~/(?s:.*){tag}(?s:.*)/"
        return [rf"thinking: TEXT <[{ids[CLOSING]}]> /\n{{0,2}}/", text]
    return [r"thinking: block /\n{0,2}/", rf"block[lazy]: /(?s:.*){tag}/"]


def lark(text: str) -> str:
    """Returns a string as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
