"""Turns a conversation into the text of a prompt, by a chat template of the tokenizer's folder."""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_paged.engine.valid_text import check_text

_LOOP_OVER_CONTENT = re.compile(
    r"""\{%-?\s*for\s+\w+\s+in\s+(?:[\w.\[\]]*[.\[])?['"]?content['"]?\]?"""
    r"""\s*(?:(?:\||if\b)[^%]*)?-?%\}"""
)
"""`{% for part in message.content %}`, with the message under any name, filtered or not."""


def render(
    implementation: Any,
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    name: str = "messages",
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of a conversation, special tokens included.

    Args:
      implementation: a transformers tokenizer.
      folder: where it is from.
      messages: oldest first; each a mapping with a "role" and a "content", which is a string or a
        list of `{"type": "text", "text": str}`. A message with "tool_calls" needs no content.
        A template gets the list if it loops over the content, else the texts joined by newlines.
      name: of the messages in what is raised.
      chat_template: a Jinja template, or the name of one of the folder's. None: the folder's only
        one, or of several "tool_use" if there are tools, else "default".
      add_generation_prompt: end where the model's answer begins.
      continue_final_message: end with the last message, for the model to go on with it; excludes
        `add_generation_prompt`.
      tools: functions for the model to call, as JSON schemas or as Python functions with type hints
        and a docstring.
      chat_template_kwargs: further variables of the template.

    Raises:
      ValueError: there is no such template, it does not accept the messages, or an argument is
        of the wrong type.
    """
    _check_flags(add_generation_prompt, continue_final_message)
    tools = _checked_tools(tools)
    variables = _checked_variables(implementation, chat_template_kwargs)
    template = _choose_template(implementation.chat_template, folder, chat_template, tools)
    loops = _LOOP_OVER_CONTENT.search(template) is not None
    conversation = _checked_messages(messages, name, joins=not loops)
    try:
        text = implementation.apply_chat_template(
            conversation,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **variables,
        )
    except Exception as error:  # a template is a program: it raises whatever it does
        own = implementation.chat_template is None or chat_template == template
        source = f"chat_template={chat_template!r:.80}" if own else f"the chat template of {folder}"
        is_jinja = type(error).__module__.startswith("jinja2")
        reason = str(error) if is_jinja else f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} does not accept these {name}: {reason}") from error
    check_text(f"the text that the chat template makes of {name}", text)
    return text


def _choose_template(
    templates: str | Mapping[str, str] | None,
    folder: Path,
    chosen: str | None,
    tools: list[Any] | None,
) -> str:
    """Returns the template that `chosen` is or names, or the folder's own."""
    by_name = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    names = f"its templates are {', '.join(sorted(by_name))}" if by_name else "it has none"
    if chosen is None:
        if not by_name:
            raise ValueError(
                f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), so messages cannot be turned into a prompt; send the "
                "prompt as text, or a chat_template"
            )
        if len(by_name) == 1:
            return next(iter(by_name.values()))
        name = "tool_use" if tools is not None and "tool_use" in by_name else "default"
        if name not in by_name:
            raise ValueError(
                f"{folder} has no default chat template; name one in chat_template: {names}"
            )
        return by_name[name]
    if not isinstance(chosen, str):
        raise ValueError(f"chat_template={chosen!r:.80} must be a string or None")
    if chosen in by_name:
        return by_name[chosen]
    if not any(sign in chosen for sign in ("{{", "{%", "{#")):
        raise ValueError(
            f"chat_template={chosen!r:.80} is neither a Jinja template nor the name of one in "
            f"{folder}: {names}"
        )
    return chosen


def _checked_messages(
    messages: Sequence[Mapping[str, Any]], name: str, *, joins: bool
) -> list[dict[str, Any]]:
    """Returns the messages, with text parts joined if `joins`."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"{name}={messages!r:.80} must be a list of at least one message, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    checked = []
    for index, message in enumerate(messages):
        label = f"{name}[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{label}={message!r:.80} must be a mapping with "role" and "content", and the '
                "role a string"
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f'{label}={message!r:.80} has no "content"')
        content = _checked_content(message.get("content"), label, joins=joins)
        checked.append({**message, "content": content})
    return checked


def _checked_content(content: Any, label: str, *, joins: bool) -> str | list[dict[str, Any]] | None:
    if content is None:
        return None
    if isinstance(content, str):
        check_text(f"{label}['content']", content)
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{label}['content']={content!r:.80} must be a string or a list of text parts, such "
            'as [{"type": "text", "text": "Hello"}]'
        )
    for index, part in enumerate(content):
        where = f"{label}['content'][{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in (None, "text"):
            raise ValueError(f"{where} is of type {kind!r:.80}; models here read text only")
        if kind is None or not isinstance(part.get("text"), str):
            raise ValueError(f'{where}={part!r:.80} must be {{"type": "text", "text": str}}')
        check_text(where, part["text"])
    if joins:
        return "\n".join(part["text"] for part in content)
    return [dict(part) for part in content]


def _check_flags(add_generation_prompt: bool, continue_final_message: bool) -> None:
    for name, value in (
        ("add_generation_prompt", add_generation_prompt),
        ("continue_final_message", continue_final_message),
    ):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r:.80} must be True or False")
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message=True goes on with the last message, and "
            "add_generation_prompt=True begins a new one; set add_generation_prompt=False"
        )


def _checked_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools={tools!r:.80} must be a list of JSON schemas or functions")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ValueError(f"tools[{index}]={tool!r:.80} must be a JSON schema or a function")
    return [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools]


def _checked_variables(
    implementation: Any, variables: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise ValueError(f"chat_template_kwargs={variables!r:.80} must be a mapping of names")
    arguments = {"messages", *inspect.signature(implementation.apply_chat_template).parameters}
    for key in variables:
        if key in arguments - {"documents"}:
            raise ValueError(
                f"chat_template_kwargs holds {key!r}, which is no variable of the template's own; "
                "leave it out"
            )
    return variables
