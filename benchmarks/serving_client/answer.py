"""Reads the stream that answers one request: server-sent events, chunks, usage.

A chunk counts from its first character of text: one that only names a role, or why the output has
ended, is no output. So it does not matter to the figures whether a server sends empty chunks.
"""

import json
from typing import Any

from benchmarks.serving_client.course import Course

_DONE = b"[DONE]"
_IN_DELTA = ("content", "reasoning_content", "reasoning", "tool_calls")
"""Where the delta of a chat may have what was generated."""


class EventSplitter:
    """Finds the data of events in bytes that come in pieces of any size.

    Lines end in LF or CRLF, an event in an empty line. Comments and fields other than `data` are
    left out, several lines of data are joined.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Returns the data of the events that end in this piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Answer:
    """What has come of one stream.

    Attributes:
      chunk_times_s: when each chunk with text came.
      usage: what the server counted, of the last chunk that says so.
    """

    def __init__(self) -> None:
        self.chunk_times_s: list[float] = []
        self.usage: dict[str, Any] = {}
        self._events = EventSplitter()
        self._last_s: float | None = None
        self._is_done = False
        self._problem: str | None = None

    def feed(self, piece: bytes, now_s: float) -> None:
        """Takes in bytes that came at `now_s`."""
        for data in self._events.feed(piece):
            if data == _DONE:
                self._is_done = True
            else:
                self._take(data, now_s)

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                self._problem = f"in the stream: {error_message(chunk)}"
            if isinstance(usage := chunk.get("usage"), dict):
                self.usage = usage
            for choice in chunk.get("choices", ()):
                self._last_s = now_s
                if has_text(choice):
                    self.chunk_times_s.append(now_s)
        except (ValueError, TypeError, AttributeError):
            self._problem = f"in the stream: {data[:200]!r} is no chunk of a completion"

    def course(
        self, due_s: float, sent_s: float, end_s: float, max_tokens: int, problem: str | None
    ) -> Course:
        """Returns the request's course; an output without any text came with its last chunk.

        Args:
          due_s: when it was due.
          sent_s: when it was sent.
          end_s: when its stream had ended.
          max_tokens: how many tokens it asked for.
          problem: why it failed, if it did otherwise than in its stream.
        """
        times = self.chunk_times_s or ([] if self._last_s is None else [self._last_s])
        details: dict[str, Any] = self.usage.get("prompt_tokens_details") or {}
        num_output_tokens = self.usage.get("completion_tokens") or 0
        return Course(
            due_s,
            sent_s,
            end_s,
            tuple(times),
            self.usage.get("prompt_tokens") or 0,
            num_output_tokens,
            details.get("cached_tokens") or 0,
            max_tokens,
            problem or self._what_is_wrong(bool(times), num_output_tokens),
        )

    def _what_is_wrong(self, has_chunks: bool, num_output_tokens: int) -> str | None:
        if self._problem:
            return self._problem
        if not self._is_done:
            return "the stream ended without [DONE]"
        if not self.usage:
            return "the stream has no usage, although stream_options.include_usage asks for it"
        if not has_chunks or not num_output_tokens:
            return "the output has no token"
        return None


def has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk holds something that was generated."""
    if choice.get("text"):
        return True
    delta: dict[str, Any] = choice.get("delta") or {}
    return any(delta.get(name) for name in _IN_DELTA)


def error_message(body: Any) -> str:
    """Returns what a server's answer says that went wrong, in one line, or the answer itself."""
    message = body
    if isinstance(body, dict):
        error = body.get("error", body)
        message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def http_problem(status: int, body: bytes) -> str:
    """Returns why a request failed that was not answered with status 200."""
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = error_message(body.decode(errors="replace"))
    return f"HTTP {status}: {message}"
