"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Passes a text on until a stop string completes in it.

    Of several stop strings the one that completes first counts; of those that complete together,
    the one that starts first. While no stop string has completed, the last `max(len(stop)) - 1`
    characters are held back, because they may be the start of one.

    Attributes:
      stop_reason: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False):
        """Looks for `stop` (none of them empty) and cuts before, or after, the one it finds."""
        self._stop = tuple(stop)
        self._include_stop_str = include_stop_str
        self._num_held = max((len(s) for s in self._stop), default=1) - 1
        self._held = ""
        self._num_skipped = 0  # of the held characters, those before which no stop string ends
        self.stop_reason: str | None = None

    def append(self, text: str) -> str:
        """Takes the next piece and returns what is settled; after a stop string, nothing more."""
        if self.stop_reason is not None:
            return ""
        self._held += text
        match = self._first_match()
        if match is not None:
            start, stop = match
            self.stop_reason = stop
            end = start + len(stop) if self._include_stop_str else start
            return self._release(end)
        return self._release(max(len(self._held) - self._num_held, 0))

    def skip(self, text: str) -> str:
        """Takes the next piece like `append`, but no stop string ends in it."""
        if self.stop_reason is not None:
            return ""
        self._held += text
        self._num_skipped = len(self._held)
        return self._release(max(len(self._held) - self._num_held, 0))

    def finish(self) -> str:
        """Returns what is still held back; call it once, at the end of the text."""
        return "" if self.stop_reason is not None else self._release(len(self._held))

    def _first_match(self) -> tuple[int, str] | None:
        """Returns start and string of the first match, all of which end in the newest piece."""
        found = (
            (self._held.find(stop, max(self._num_skipped - len(stop) + 1, 0)), stop)
            for stop in self._stop
        )
        return min(
            (match for match in found if match[0] >= 0),
            key=lambda match: (match[0] + len(match[1]), match[0]),
            default=None,
        )

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        self._num_skipped = max(self._num_skipped - end, 0)
        return released
