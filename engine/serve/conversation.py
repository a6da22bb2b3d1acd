"""From a chat request to its prompt, and to the parser of what the model answers."""

import json
from collections.abc import Callable
from typing import Any

from pallas_paged.engine.serve.params import structured_outputs
from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.formats import ToolFormat
from pallas_paged.engine.serve.parsers.grammar import grammar_for
from pallas_paged.engine.serve.parsers.reasoning import ThinkParser, starts_inside
from pallas_paged.engine.serve.parsers.thinking import after_thinking
from pallas_paged.engine.serve.parsers.tools import ToolParser
from pallas_paged.engine.serve.protocol import (
    BadRequestError,
    ChatRequest,
    Message,
    NamedTool,
    TokenizeRequest,
)
from pallas_paged.engine.serve.service import Service
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from pallas_paged.engine.text.prompts import Prompt

_NO_FORMAT = (
    "tool_choice={choice!r} needs a format of calls, and the chat template of this model shows "
    "none that is known; start the server with --tool_call_parser, or use tool_choice='none'"
)


async def chat_prompt(service: Service, request: ChatRequest | TokenizeRequest) -> Prompt:
    """Returns the prompt of a conversation, by the model's chat template.

    Raises:
      ValueError: there is no template, or it does not accept the messages.
    """
    template, tools = service.options.chat_template, request.tools
    if isinstance(request, ChatRequest):
        if request.chat_template is not None:
            if not service.options.trust_request_chat_template:
                raise BadRequestError(
                    "chat_template is a program, and this server runs none of its clients'; leave "
                    "it out, or start the server with --trust_request_chat_template",
                    "chat_template",
                )
            template = request.chat_template
        if request.tool_choice == "none":
            tools = None
    goes_on = bool(request.continue_final_message)
    begins = request.add_generation_prompt
    prompt = await service.llm.chat_prompt(
        [_plain(message) for message in request.messages or ()],
        chat_template=template,
        add_generation_prompt=not goes_on if begins is None else begins,
        continue_final_message=goes_on,
        tools=None if tools is None else [_as_sent(tool) for tool in tools],
        chat_template_kwargs=request.chat_template_kwargs,
    )
    salt = getattr(request, "cache_salt", None)
    assert isinstance(prompt, dict)
    return prompt if salt is None else prompt | {"cache_salt": salt}


class Answering:
    """How the answers to a chat request are made and read.

    Attributes:
      grammar: what an answer has to be where the choice of tools says that, or where it has to end
        its reasoning first; None where the request's own fields say it, or nothing does.
      keeps_special_tokens: whether a parser needs special tokens in the text.
    """

    def __init__(self, service: Service, request: ChatRequest, prompt_text: str):
        """Takes a request, and the prompt that `chat_prompt` has made of it.

        Raises:
          ValueError: its tools, or its choice of them, are not usable.
        """
        choice = request.tool_choice
        if request.tools is None and choice not in (None, "none"):
            raise BadRequestError(f"tool_choice={_named(choice)!r} needs tools", "tool_choice")
        uses_tools = bool(request.tools) and choice != "none"
        self._format = service.options.tool_format if uses_tools else None
        if uses_tools and self._format is None:
            raise BadRequestError(_NO_FORMAT.format(choice=_named(choice or "auto")), "tool_choice")
        self._request = request
        self._parallel = request.parallel_tool_calls is not False
        has_reasoning = service.options.has_reasoning and not request.continue_final_message
        self._starts_inside = has_reasoning and starts_inside(prompt_text)
        self._has_reasoning = has_reasoning
        special = _special_tokens(service)
        needed = {*self._format.markers} if self._format is not None else set()
        needed |= {*ThinkParser.markers} if has_reasoning else set()
        self.keeps_special_tokens = not needed.isdisjoint(special)
        self._dropped = special if self.keeps_special_tokens else {}
        self.grammar = self._form(service)

    def new_parser(self) -> ChatParser:
        """Returns what reads one answer."""
        reasoning = ThinkParser(starts_inside=self._starts_inside) if self._has_reasoning else None
        tools = None
        if self._format is not None:
            names = [tool.function.name for tool in self._request.tools or ()]
            tools = ToolParser(self._format, names, parallel_tool_calls=self._parallel)
        return ChatParser(reasoning, tools, dropped_markers=tuple(self._dropped))

    def _form(self, service: Service) -> StructuredOutputsParams | None:
        """Returns the form of answers where it is another than the request's fields say."""
        calls = None if self._format is None else self._grammar(service, self._format)
        if calls is not None or not self._starts_inside:
            return calls
        given = structured_outputs(self._request)
        if given is None:
            return None
        return after_thinking(given, _added_tokens(service, ThinkParser.markers))

    def _grammar(self, service: Service, tool_format: ToolFormat) -> StructuredOutputsParams | None:
        """Returns the form of answers that call tools, where they have to."""
        request, choice = self._request, self._request.tool_choice
        text = grammar_for(
            tool_format,
            [_as_sent(tool) for tool in request.tools or ()],
            _as_sent(choice) if isinstance(choice, NamedTool) else choice,
            parallel_tool_calls=self._parallel,
            marker_ids=_added_tokens(service, (*tool_format.markers, *ThinkParser.markers)),
            starts_inside=self._starts_inside,
        )
        if text is None:
            return None
        if request.structured_outputs is not None or (
            request.response_format is not None and request.response_format.type != "text"
        ):
            raise BadRequestError(
                f"tool_choice={_named(choice)!r} says what the answer has to be, and so does "
                "response_format or structured_outputs; choose one",
                "tool_choice",
            )
        return StructuredOutputsParams(grammar=text)


def _as_sent(model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = model.model_dump(exclude_unset=True)
    return fields


def _named(choice: Any) -> Any:
    return choice.function.name if isinstance(choice, NamedTool) else choice


def _plain(message: Message) -> dict[str, Any]:
    """Returns a message for a template, the arguments of its calls as objects."""
    fields = _as_sent(message)
    for call in fields.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                continue  # as it is: a model may have written it
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return fields


def _special_tokens(service: Service) -> dict[str, int]:
    """Returns the tokens that `skip_special_tokens` leaves out, by their text."""
    return _tokens(service, lambda token: token.special)


def _added_tokens(service: Service, texts: tuple[str, ...]) -> dict[str, int]:
    """Returns those of the texts that are one token of their own, which is not spelled."""
    return _tokens(service, lambda token: token.content in texts)


def _tokens(service: Service, is_meant: Callable[[Any], bool]) -> dict[str, int]:
    if service.llm.tokenizer is None:
        return {}
    added = service.llm.tokenizer.implementation.added_tokens_decoder
    return {token.content: token_id for token_id, token in added.items() if is_meant(token)}
