"""Divides a model's text into what it thinks, `<think>` ... `</think>`, and what it answers."""

from pallas_paged.engine.serve.parsers.events import ContentDelta, Event, ReasoningDelta, add_event
from pallas_paged.engine.serve.parsers.markers import Markers

OPENING = "<think>"
CLOSING = "</think>"


def starts_inside(prompt: str) -> bool:
    """Returns whether a rendered prompt ends in an open block, so that an answer begins in it."""
    return prompt.rstrip().endswith(OPENING)


class ThinkParser:
    """Reads one block of reasoning where a text begins; all behind it is content.

    The block may be empty, or missing: then all is content. One that does not end is reasoning to
    the text's end. Whitespace in front of `<think>`, and newlines behind both tags, are dropped;
    all other characters are kept. Tags behind the block are content.

    Attributes:
      markers: the tags. If one is a special token, skip_special_tokens must be False.
    """

    markers = (OPENING, CLOSING)

    def __init__(self, *, starts_inside: bool = False):
        """Expects a text's beginning.

        Args:
          starts_inside: whether the prompt has opened the block. The text may then open it again.
        """
        self._is_open = starts_inside
        self._closings = Markers((CLOSING,))
        self._events: list[Event] = []
        self._rest = ""  # not read yet
        self._state = "beginning"

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the text and returns what it settles."""
        self._rest += text
        while self._rest and self._read():
            pass
        return self._pop_events()

    def finish(self) -> list[Event]:
        """Returns what is still held back, at the end of the text."""
        if self._state == "beginning" and self._is_open:
            self._rest = self._rest.lstrip("\n")
        if self._is_open:
            add_event(self._events, ReasoningDelta(self._rest))
        else:
            add_event(self._events, ContentDelta(self._rest))
        self._rest = ""
        return self._pop_events()

    def _read(self) -> bool:
        """Reads on; returns whether there may be more to read."""
        match self._state:
            case "beginning":
                return self._read_beginning()
            case "newlines":
                self._rest = self._rest.lstrip("\n")
                if self._rest:
                    self._state = "block" if self._is_open else "content"
                return bool(self._rest)
            case "block":
                before, marker, self._rest = self._closings.split(self._rest)
                add_event(self._events, ReasoningDelta(before))
                if marker is not None:
                    self._is_open, self._state = False, "newlines"
                return marker is not None
        add_event(self._events, ContentDelta(self._rest))
        self._rest = ""
        return False

    def _read_beginning(self) -> bool:
        text = self._rest.lstrip()
        if text.startswith(OPENING):
            self._rest = text.removeprefix(OPENING)
            self._is_open, self._state = True, "newlines"
        elif OPENING.startswith(text):
            return False
        else:
            self._state = "newlines" if self._is_open else "content"
        return True

    def _pop_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


REASONING_PARSERS = {"think": ThinkParser, "deepseek_r1": ThinkParser, "qwen3": ThinkParser}
"""The parsers by the names that a user gives them; all three mean the same tags."""
