"""Finds calls of tools in a model's text while it arrives."""

from collections.abc import Callable, Collection

from pallas_paged.engine.serve.parsers.call_reader import CallReader
from pallas_paged.engine.serve.parsers.events import (
    ArgumentsDelta,
    CallBegins,
    ContentDelta,
    Event,
    add_event,
    random_call_id,
)
from pallas_paged.engine.serve.parsers.formats import ToolFormat
from pallas_paged.engine.serve.parsers.markers import Markers

_WHITESPACE = " \t\n\r"


class ToolParser:
    """Divides an answer into text and calls, each as early as it is known to be one.

    A call is given out when its name is known and its arguments have begun to be an object; from
    there on each character of the arguments at once, the model's own but for control characters in
    strings, which are escaped. What looks like a call and is none, also because the text ends
    before it is known, is text in full, its markers included: broken JSON, no name or an unknown
    one, arguments that are no object. Text inside of it is no call either as long as it is JSON.

    Once a call is given out it stands. Where its arguments end early or break, they stay as they
    are, and text goes on with the character at which they broke. What comes in the object behind
    whole arguments is dropped; a missing brace or closing marker behind them does not matter.

    Whitespace in front of an answer's first call is dropped if no other text is there, as are
    whitespace and separators behind a call unless text follows.

    Attributes:
      markers: what must be in the text. If one is a special token, skip_special_tokens must be
        False.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        tool_names: Collection[str] | None = None,
        *,
        parallel_tool_calls: bool = True,
        new_id: Callable[[], str] = random_call_id,
    ):
        """Expects an answer's beginning.

        Args:
          tool_format: how calls are written.
          tool_names: of the tools that there are; None: any name is one.
          parallel_tool_calls: if False, only the first call is given out, later ones are dropped.
          new_id: returns an id for a call.
        """
        self.markers = tool_format.markers
        self._format = tool_format
        self._tool_names = None if tool_names is None else frozenset(tool_names)
        self._parallel = parallel_tool_calls
        self._new_id = new_id
        self._openings = Markers((tool_format.opening,))
        self._events: list[Event] = []
        self._rest = ""  # not read yet
        self._pending: list[str] = []  # read, and text if no call comes of it
        self._num_calls = 0
        self._is_dropped = False  # the call that is being read
        self._at_edge = True  # no text since the beginning, or since a call
        self._separators = _WHITESPACE
        self._reader: CallReader | None = None
        self._is_closing = False

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the answer and returns what it settles."""
        self._rest += text
        while self._rest and self._read():
            pass
        return self._pop_events()

    def finish(self) -> list[Event]:
        """Returns what is still held back, at the end of the answer."""
        if self._reader is not None:
            if not self._reader.is_call:
                self._give_text("")
        elif not self._is_closing and (self._rest or self._num_calls == 0):
            self._give_text(self._rest)
        self._rest = ""
        self._pending.clear()
        return self._pop_events()

    def _read(self) -> bool:
        """Reads on; returns whether there may be more to read."""
        if self._reader is not None:
            return self._read_call(self._reader)
        return self._read_closing() if self._is_closing else self._read_text()

    def _read_text(self) -> bool:
        if self._at_edge:
            text = self._rest.lstrip(self._separators)
            self._pending.append(self._rest[: len(self._rest) - len(text)])
            self._rest = text
            if self._format.is_bare and text.startswith("{"):
                self._reader = CallReader(self._format, self._tool_names)
                return True
        before, marker, self._rest = self._openings.split(self._rest)
        if before:
            self._give_text(before)
        if marker is None:
            return False
        self._pending.append(marker)
        self._reader = CallReader(self._format, self._tool_names)
        return True

    def _read_call(self, reader: CallReader) -> bool:
        was_call = reader.is_call
        end = reader.take(self._rest)
        taken, self._rest = self._rest[:end], self._rest[end:]
        if reader.is_call:
            if not was_call:
                self._begin_call(reader.name or "")
            delta = ArgumentsDelta(self._num_calls - 1, reader.pop_arguments())
            if not self._is_dropped:
                add_event(self._events, delta)
        else:
            self._pending.append(taken)
            if reader.is_refused or reader.is_broken:
                self._give_text("")
        if not reader.is_done and not reader.is_broken:
            return False
        self._reader = None
        if reader.is_whole and reader.is_call:
            self._is_closing = self._format.closing is not None
            self._at_edge = True
            self._separators = _WHITESPACE + self._format.between.strip()
        return True

    def _read_closing(self) -> bool:
        closing = self._format.closing or ""
        text = self._rest.lstrip(_WHITESPACE)
        if text.startswith(closing):
            self._rest = text.removeprefix(closing)
        elif closing.startswith(text):
            return False
        self._is_closing = False
        return True

    def _begin_call(self, name: str) -> None:
        self._pending.clear()
        self._at_edge = False
        self._is_dropped = self._num_calls > 0 and not self._parallel
        if not self._is_dropped:
            add_event(self._events, CallBegins(self._num_calls, self._new_id(), name))
            self._num_calls += 1

    def _give_text(self, text: str) -> None:
        add_event(self._events, ContentDelta("".join(self._pending) + text))
        self._pending.clear()
        self._at_edge = False

    def _pop_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
