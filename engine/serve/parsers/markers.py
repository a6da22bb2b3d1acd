"""Finds markers in a text that arrives in pieces, and holds back what may begin one."""

import re
from collections.abc import Collection


class Markers:
    """Strings that mean something in a model's text, none of them empty."""

    __slots__ = ("_first", "_markers", "_max_len")

    def __init__(self, markers: Collection[str]):
        """Looks for `markers`; of those that begin at one place the shortest counts."""
        self._markers = sorted(set(markers), key=len)
        if "" in self._markers:
            raise ValueError(f"markers={sorted(markers)!r:.80} must not be empty; leave '' out")
        self._max_len = max(map(len, self._markers), default=0)
        firsts = "".join(sorted({re.escape(marker[0]) for marker in self._markers}))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def split(self, text: str) -> tuple[str, str | None, str]:
        """Returns the text before the first marker, the marker, and the text behind it.

        Where there is no marker, it is None, and the last text is what may begin one, which is to
        be put in front of the next piece. Text cut anywhere is split at the same places.
        """
        for found in self._first.finditer(text):
            start = found.start()
            for marker in self._markers:
                if text.startswith(marker, start):
                    return text[:start], marker, text[start + len(marker) :]
            if len(text) - start < self._max_len:
                tail = text[start:]
                if any(marker.startswith(tail) for marker in self._markers):
                    return text[:start], None, tail
        return text, None, ""


class MarkerFilter:
    """Leaves markers out of a text that arrives in pieces."""

    __slots__ = ("_markers", "_rest")

    def __init__(self, markers: Collection[str]):
        """Leaves out `markers`, however they come about: spelled ones too."""
        self._markers = Markers(markers)
        self._rest = ""

    def feed(self, text: str) -> str:
        """Takes the next piece and returns what is settled."""
        pieces = []
        marker: str | None = ""
        self._rest += text
        while marker is not None:
            before, marker, self._rest = self._markers.split(self._rest)
            pieces.append(before)
        return "".join(pieces)

    def finish(self) -> str:
        """Returns what is still held back."""
        rest, self._rest = self._rest, ""
        return rest
