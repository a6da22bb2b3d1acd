"""Finds stop strings in a text that arrives in pieces, and holds back what may begin one."""

from collections.abc import Sequence


class StopMatcher:
    """Passes a text on until a stop string completes in it.

    Of several stop strings the one that completes first counts; of those that complete together,
    the one that starts first. While no stop string has completed, the last `max(len(stop)) - 1`
    characters are held back, because they may be the start of one.

    Attributes:
      stop_reason: the stop string that was found, or None.
    """

    __slots__ = ("_held", "_include_stop_str", "_num_held", "_num_skipped", "_stop", "stop_reason")

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False):
        """Looks for `stop` (none of them empty) and cuts before, or after, the one it finds."""
        self._stop = tuple(stop)
        self._include_stop_str = include_stop_str
        self._num_held = max((len(s) for s in self._stop), default=1) - 1
        self._held = ""
        self._num_skipped = 0  # so many of the held characters end no stop string
        self.stop_reason: str | None = None

    def append(self, text: str) -> str:
        """Takes the next piece and returns what is settled; after a stop string, nothing more."""
        if self.stop_reason is not None or not text:
            return ""
        self._held += text
        match = self._first_match()
        if match is None:
            return self._release(len(self._held) - self._num_held)
        end, start, self.stop_reason = match
        return self._release(end if self._include_stop_str else start)

    def skip(self, text: str) -> str:
        """Takes the next piece like `append`, but no stop string ends in it."""
        if self.stop_reason is not None:
            return ""
        self._held += text
        self._num_skipped = len(self._held)
        return self._release(len(self._held) - self._num_held)

    def finish(self) -> str:
        """Returns what is still held back; call it once, at the end of the text."""
        return "" if self.stop_reason is not None else self._release(len(self._held))

    def _first_match(self) -> tuple[int, int, str] | None:
        """Returns end, start and string of the first match; all end in the newest piece."""
        first = None
        for stop in self._stop:
            start = self._held.find(stop, max(self._num_skipped - len(stop) + 1, 0))
            if start >= 0 and (first is None or (start + len(stop), start) < first[:2]):
                first = start + len(stop), start, stop
        return first

    def _release(self, end: int) -> str:
        """Lets go of the first `end` of the held characters, if `end` is above 0."""
        if end <= 0:
            return ""
        released, self._held = self._held[:end], self._held[end:]
        if self._num_skipped:
            self._num_skipped = max(self._num_skipped - end, 0)
        return released
