"""What parsers find in a model's text, piece by piece, and the message that the pieces make."""

import dataclasses
import secrets
from collections.abc import Iterable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a tool begins.

    Attributes:
      index: which of the answer's calls it is.
      id: names the call in later messages.
      name: the tool's.
    """

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """The next piece of the JSON text of a call's arguments; all of them are one JSON object.

    Attributes:
      index: which of the answer's calls it is.
      text: characters of the model's own.
    """

    index: int
    text: str


type Event = ContentDelta | ReasoningDelta | CallBegins | ArgumentsDelta


class ToolCall(NamedTuple):
    """A call of a tool, its arguments being JSON text."""

    id: str
    name: str
    arguments: str


class ParsedMessage(NamedTuple):
    """An answer; content and reasoning are None where there is no text of the kind."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]


def random_call_id() -> str:
    """Returns a new id of a call, "call_" and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def add_event(events: list[Event], event: Event) -> None:
    """Appends an event; text that goes on with the last event's is appended to that one.

    An event without text is left out.
    """
    if not isinstance(event, CallBegins) and not event.text:
        return
    match events[-1:], event:
        case [ContentDelta(before)], ContentDelta(text):
            events[-1] = ContentDelta(before + text)
        case [ReasoningDelta(before)], ReasoningDelta(text):
            events[-1] = ReasoningDelta(before + text)
        case [ArgumentsDelta(last, before)], ArgumentsDelta(index, text) if last == index:
            events[-1] = ArgumentsDelta(index, before + text)
        case _:
            events.append(event)


def fold(events: Iterable[Event]) -> ParsedMessage:
    """Returns the message that events make together."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[CallBegins] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ContentDelta():
                content.append(event.text)
            case ReasoningDelta():
                reasoning.append(event.text)
            case CallBegins():
                calls.append(event)
                arguments.append([])
            case ArgumentsDelta():
                arguments[event.index].append(event.text)
    tool_calls = [
        ToolCall(call.id, call.name, "".join(pieces))
        for call, pieces in zip(calls, arguments, strict=True)
    ]
    return ParsedMessage("".join(content) or None, "".join(reasoning) or None, tool_calls)
