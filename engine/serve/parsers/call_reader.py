"""Reads the JSON object of one call of a tool while its text arrives."""

import json
from collections.abc import Collection

from pallas_paged.engine.serve.parsers.formats import ToolFormat
from pallas_paged.engine.serve.parsers.json_scanner import ObjectScanner


class CallReader:
    """Reads an object up to where it is known to be a call, and its arguments from there on.

    It is one as soon as its name is known and its arguments begin to be an object, in whichever
    order; without arguments when it ends, if the format lets them be missing. Of a key that comes
    twice the first value counts, and keys that say nothing of a call are skipped.

    Attributes:
      name: the tool's, once known.
      is_call: whether it is a call.
      is_refused: whether it is known to be none, though it is JSON so far.
      is_whole: whether all arguments have been read.
      is_done: whether the object has ended.
      is_broken: whether JSON cannot go on with the next character.
    """

    def __init__(self, tool_format: ToolFormat, tool_names: Collection[str] | None):
        """Expects an object of `tool_format`, whose name is one of `tool_names` if these are given.

        Args:
          tool_format: how the object is written.
          tool_names: None: any name.
        """
        self.name: str | None = None
        self.is_call = False
        self.is_refused = False
        self.is_whole = False
        self.is_broken = False
        self._format = tool_format
        self._tool_names = tool_names
        self._scanner = ObjectScanner()
        self._num_values = 0
        self._value = ""  # which one is being read: "name", "arguments" or another
        self._seen: set[str] = set()
        self._name: list[str] = []
        self._arguments: list[str] = []

    @property
    def is_done(self) -> bool:
        """Whether the object has ended."""
        return self._scanner.is_done

    def take(self, text: str) -> int:
        """Takes characters until the object ends or breaks; returns how many."""
        scanner, start = self._scanner, 0
        while start < len(text) and not scanner.is_done:
            end = scanner.take(text, start)
            if end == start:
                self.is_broken = True
                break
            if scanner.is_value and not self.is_refused:
                self._take_value(text[start:end])
            start = end
        if scanner.is_done and not self.is_refused and not self.is_call:
            self._end_without_arguments()
        return start

    def pop_arguments(self) -> str:
        """Returns what is new of the arguments' JSON text."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _take_value(self, piece: str) -> None:
        if self._scanner.num_values > self._num_values:
            self._num_values = self._scanner.num_values
            self._begin_value(piece)
        ends = not self._scanner.in_value
        if self._value == "name":
            self._name.append(piece)
            if ends:
                self._end_name()
        elif self._value == "arguments":
            # JSON has control characters in strings escaped only.
            is_raw = piece < " " and self._scanner.in_string
            self._arguments.append(json.dumps(piece)[1:-1] if is_raw else piece)
            self.is_whole = ends
        self.is_call = not self.is_refused and self.name is not None and "arguments" in self._seen

    def _begin_value(self, first: str) -> None:
        key = self._scanner.key
        self._value = "arguments" if key in self._format.arguments_keys else key
        if self._value in self._seen:
            self._value = ""
        elif self._value == "name":
            self.is_refused = first != '"'
        elif self._value == "arguments":
            self.is_refused = first != "{"
        elif not self.is_call and self._format.other_keys is not None:
            self.is_refused = key not in self._format.other_keys
        self._seen.add(self._value)

    def _end_name(self) -> None:
        name = json.loads("".join(self._name), strict=False)
        is_text = not any("\ud800" <= char <= "\udfff" for char in name)  # from escapes
        is_known = self._tool_names is None or name in self._tool_names
        self.name = name
        self.is_refused = not (name and is_text and is_known)

    def _end_without_arguments(self) -> None:
        self.is_refused = self.name is None or self._format.needs_arguments
        if not self.is_refused:
            self._arguments.append("{}")
            self.is_call = self.is_whole = True
