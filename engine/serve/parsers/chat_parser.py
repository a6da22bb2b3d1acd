"""Reads an answer of a chat: reasoning first, then calls of tools in what is left."""

from collections.abc import Collection

from pallas_paged.engine.serve.parsers.events import ContentDelta, Event, add_event
from pallas_paged.engine.serve.parsers.markers import MarkerFilter
from pallas_paged.engine.serve.parsers.reasoning import ThinkParser
from pallas_paged.engine.serve.parsers.tools import ToolParser


class ChatParser:
    """Turns an answer's text into events; without parsers, into content as it is.

    The events are the same, apart from where text is cut, however the text is cut into pieces. So
    an answer that is not streamed is `fold(parser.feed(text) + parser.finish())`. A call inside of
    reasoning is reasoning.
    """

    def __init__(
        self,
        reasoning: ThinkParser | None = None,
        tools: ToolParser | None = None,
        *,
        dropped_markers: Collection[str] = (),
    ):
        """Expects an answer's beginning, and parsers that have read nothing.

        Args:
          reasoning: finds reasoning.
          tools: finds calls.
          dropped_markers: left out of the text, those aside that a parser reads: for a request with
            skip_special_tokens=False, the tokenizer's special tokens, or the format's
            `end_markers`. A text that spells one loses it too.
        """
        kept = {
            *(reasoning.markers if reasoning is not None else ()),
            *(tools.markers if tools is not None else ()),
        }
        self._filter = MarkerFilter(set(dropped_markers) - kept)
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the answer and returns what it settles."""
        return self._find_reasoning(self._filter.feed(text))

    def finish(self) -> list[Event]:
        """Returns what is still held back, at the end of the answer."""
        events = self._find_reasoning(self._filter.finish())
        if self._reasoning is not None:
            events += self._find_calls(self._reasoning.finish())
        if self._tools is not None:
            events += self._tools.finish()
        return _joined(events)

    def _find_reasoning(self, text: str) -> list[Event]:
        if self._reasoning is not None:
            return self._find_calls(self._reasoning.feed(text))
        return self._find_calls(_joined([ContentDelta(text)]))

    def _find_calls(self, events: list[Event]) -> list[Event]:
        """Returns the events with what the content holds in the content's place."""
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, ContentDelta):
                found += self._tools.feed(event.text)
            else:
                found.append(event)
        return found


def _joined(events: list[Event]) -> list[Event]:
    """Returns the events with text that belongs together in one; none without text."""
    joined: list[Event] = []
    for event in events:
        add_event(joined, event)
    return joined
