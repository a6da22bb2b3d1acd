"""Streams of servers: events cut anywhere, which chunks count, what is wrong with an answer."""

import json
from typing import Any

import pytest

from benchmarks.serving_client.answer import Answer, EventSplitter, error_message, http_problem
from benchmarks.serving_client.course import Course

STREAM = (
    b": a comment\n\ndata: one\n\nevent: x\nid: 3\ndata:two\ndata: lines\n\n\n"
    b"data: crlf\r\n\r\ndata:  \xc3\xa4 space\n\ndata: [DONE]\n\ndata: unfinished\n"
)
EVENTS = [b"one", b"two\nlines", b"crlf", b" \xc3\xa4 space", b"[DONE]"]


def test_events_cut_at_every_byte() -> None:
    for first in range(len(STREAM) + 1):
        for second in (first, first + 1, len(STREAM) - 1):
            splitter, second = EventSplitter(), max(first, second)
            pieces = STREAM[:first], STREAM[first:second], STREAM[second:]
            assert [data for piece in pieces for data in splitter.feed(piece)] == EVENTS


def test_events_one_byte_at_a_time() -> None:
    splitter = EventSplitter()
    found = [data for i in range(len(STREAM)) for data in splitter.feed(STREAM[i : i + 1])]
    assert found == EVENTS


def answer_of(*events: tuple[float, Any], done: bool = True) -> Course:
    """Returns the course of a request, due at 1 s, whose events come at these times."""
    answer = Answer()
    for now_s, data in events:
        text = data if isinstance(data, str) else json.dumps(data)
        answer.feed(f"data: {text}\n\n".encode(), now_s)
    if done:
        answer.feed(b"data: [DONE]\n\n", 9.0)
    return answer.course(1.0, 1.25, 10.0, 8, None)


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": content}], **more}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}
WHOLE = Course(1.0, 1.25, 10.0, (2.0, 3.0), 5, 4, 0, 8, None)


@pytest.mark.parametrize(
    "events",
    [
        [(2.0, text("a")), (3.0, text("b")), (4.0, USAGE)],
        [(2.0, text("a")), (3.0, text("b", usage=USAGE["usage"]))],
        [(1.5, text("")), (2.0, text("a")), (2.5, text("")), (3.0, text("b")), (4.0, USAGE)],
        [(1.5, delta(role="assistant", content="")), (2.0, delta(content="a")),
         (3.0, delta(content="b")), (3.5, delta()), (4.0, USAGE)],
        [(2.0, delta(reasoning_content="a")), (3.0, delta(tool_calls=[{}])), (4.0, USAGE)],
        [(2.0, text("a", usage={"prompt_tokens": 5, "completion_tokens": 1})), (3.0, text("b")),
         (4.0, USAGE)],
        [(2.0, text("a", error=None)), (3.0, text("b", usage=None)), (4.0, USAGE)],
    ],
)  # fmt: skip
def test_chunks_with_text_count_and_usage_says_how_many_tokens(events) -> None:
    assert answer_of(*events) == WHOLE


def test_output_without_text_came_with_its_last_chunk() -> None:
    found = answer_of((2.0, text("")), (3.0, text("")), (4.0, USAGE))
    assert found.chunk_times_s == (3.0,)
    assert found.problem is None


def test_cached_tokens_are_found() -> None:
    usage = USAGE["usage"] | {"prompt_tokens_details": {"cached_tokens": 2}}
    assert answer_of((2.0, text("a", usage=usage))).num_cached_tokens == 2
    usage |= {"prompt_tokens_details": None}
    assert answer_of((2.0, text("a", usage=usage))).num_cached_tokens == 0


@pytest.mark.parametrize(
    ("events", "done", "problem"),
    [
        ([(2.0, text("a")), (3.0, USAGE)], False, "without [DONE]"),
        ([(2.0, text("a"))], True, "no usage"),
        ([(2.0, USAGE)], True, "no token"),
        ([(2.0, text("a", usage={"completion_tokens": 0}))], True, "no token"),
        ([(2.0, {"error": {"message": "out of\nmemory"}})], True, "in the stream: out of memory"),
        ([(2.0, "{broken")], True, "'{broken' is no chunk"),
        ([(2.0, [1])], True, "is no chunk"),
        ([(2.0, {"choices": ["a"]})], True, "is no chunk"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(events, done, problem) -> None:
    assert problem in (answer_of(*events, done=done).problem or "")


def test_a_problem_before_the_stream_is_the_one() -> None:
    assert Answer().course(0.0, 0.0, 1.0, 8, "HTTP 500: no").problem == "HTTP 500: no"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too\\n long", "code": 400}}', "HTTP 400: too long"),
        (b'{"error": "plain"}', "HTTP 400: plain"),
        (b'{"message": "old style"}', "HTTP 400: old style"),
        (b"<html>\xff</html>", "HTTP 400: <html>\N{REPLACEMENT CHARACTER}</html>"),
        (b"[1]", "HTTP 400: [1]"),
        (b"", "HTTP 400: "),
    ],
)
def test_errors_are_read_in_every_form(body: bytes, message: str) -> None:
    assert http_problem(400, body) == message
    assert len(error_message("x" * 1000)) == 300
