"""Reads one JSON object whose text arrives in pieces (RFC 8259), and tells its values apart."""

import json
import re

_WHITESPACE = " \t\n\r"
_DIGITS = "0123456789"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = {
    state: {char: after for chars, after in row.items() for char in chars}
    for state, row in {
        "start": {"-": "minus", "0": "zero", "123456789": "integer"},
        "minus": {"0": "zero", "123456789": "integer"},
        "zero": {".": "point", "eE": "e"},
        "integer": {_DIGITS: "integer", ".": "point", "eE": "e"},
        "point": {_DIGITS: "fraction"},
        "fraction": {_DIGITS: "fraction", "eE": "e"},
        "e": {"+-": "sign", _DIGITS: "exponent"},
        "sign": {_DIGITS: "exponent"},
        "exponent": {_DIGITS: "exponent"},
    }.items()
}
"""By how far a number is: what it may go on with, and how far it is then."""
_WHOLE_NUMBERS = ("zero", "integer", "fraction", "exponent")


class ObjectScanner:
    """Checks an object's characters, and says which of them are the values of its own keys.

    Control characters are let through in strings, as models write line breaks there that JSON
    wants escaped. All else is as strict as JSON is. Nothing recurses, however deep an object is.

    Attributes:
      key: the object's key whose value has been read, or is being read.
      num_values: how many of the object's own values have begun.
      is_value: whether what has just been taken is part of one.
      in_value: whether that value goes on, as far as is known.
      is_done: whether the object has ended.
    """

    def __init__(self) -> None:
        """Expects an object, with whitespace before it or without."""
        self.key = ""
        self.num_values = 0
        self.is_value = False
        self.in_value = False
        self.is_done = False
        self._state = "object"
        self._closings: list[str] = []  # of what is open, the innermost last
        self._is_key = False  # of the string that is being read
        self._key: list[str] = []
        self._left = ""  # of a literal
        self._num_hex = 0

    @property
    def in_string(self) -> bool:
        """Whether the next character is one of a string."""
        return self._state == "string"

    def take(self, text: str, start: int) -> int:
        """Takes one character from `start` on, or several of a string.

        Returns:
          Where the next one is; `start` if JSON cannot go on with this one, which is not taken.
        """
        if self._state == "string" and not self._is_key:
            run = _PLAIN.match(text, start)
            if run is not None:
                self.is_value = self.in_value
                return run.end()
        return start + 1 if self._accept(text[start]) else start

    def _accept(self, char: str) -> bool:
        """Goes on with a character; returns whether that is JSON."""
        self.is_value = self.in_value  # so that what closes a value is part of it
        state = self._state
        if state in _NUMBER:
            if char in _NUMBER[state]:
                self._state = _NUMBER[state][char]
                return True
            if state not in _WHOLE_NUMBERS:
                return False
            self._end_value()
            return self._accept(char)
        if state in ("string", "escape", "hex"):
            return self._accept_in_string(char)
        if state == "literal":
            if not self._left.startswith(char):
                return False
            self._left = self._left[1:]
            if not self._left:
                self._end_value()
            return True
        return char in _WHITESPACE or self._accept_between(char)

    def _accept_in_string(self, char: str) -> bool:
        if self._is_key and len(self._closings) == 1:
            self._key.append(char)
        if self._state == "hex":
            self._num_hex -= 1
            if self._num_hex == 0:
                self._state = "string"
            return char in "0123456789abcdefABCDEF"
        if self._state == "escape":
            self._state, self._num_hex = ("hex", 4) if char == "u" else ("string", 0)
            return char in '"\\/bfnrtu'
        if char == "\\":
            self._state = "escape"
        elif char == '"':
            self._end_string()
        return True

    def _accept_between(self, char: str) -> bool:
        """Goes on with a character that is in no string, number or literal, and no whitespace."""
        match self._state:
            case "object":
                if char == "{":
                    self._open("}")
                return char == "{"
            case "first key" | "key":
                if char == "}" and self._state == "first key":
                    self._close()
                    return True
                self._is_key, self._state = True, "string"
                self._key = ['"']
                return char == '"'
            case "colon":
                self._state = "value"
                return char == ":"
            case "first value" | "value":
                if char == "]" and self._state == "first value":
                    self._close()
                    return True
                return self._begin_value(char)
            case "comma":
                if char == self._closings[-1]:
                    self._close()
                    return True
                self._state = "key" if self._closings[-1] == "}" else "value"
                return char == ","
        return False

    def _begin_value(self, char: str) -> bool:
        if len(self._closings) == 1:
            self.num_values += 1
            self.in_value = self.is_value = True
        if char == '"':
            self._is_key, self._state = False, "string"
        elif char in "{[":
            self._open("}" if char == "{" else "]")
        elif char in _LITERALS:
            self._state, self._left = "literal", _LITERALS[char]
        elif char in _NUMBER["start"]:
            self._state = _NUMBER["start"][char]
        else:
            return False
        return True

    def _end_string(self) -> None:
        if not self._is_key:
            self._end_value()
            return
        self._state = "colon"
        if len(self._closings) == 1:
            self.key = json.loads("".join(self._key), strict=False)

    def _open(self, closing: str) -> None:
        self._closings.append(closing)
        self._state = "first key" if closing == "}" else "first value"

    def _close(self) -> None:
        self._closings.pop()
        self._end_value()

    def _end_value(self) -> None:
        self._state = "comma"
        if len(self._closings) == 1:
            self.in_value = False
        elif not self._closings:
            self.is_done = True
