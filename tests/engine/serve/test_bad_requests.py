"""What is wrong with a request is named, with a 4xx, and touches nobody else."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pallas_paged.engine.serve.parsers.formats import HERMES
from tests.engine.serve.live import Live, live_server
from tests.engine.serve.wire import (
    CHAT,
    COMPLETIONS,
    Answer,
    assert_error,
    complete,
    connected,
    head,
    received,
    send,
    whole,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"
    "<|assistant|>"
)
MAX_BYTES = 400_000
BODY_TIMEOUT_S = 0.4


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """A server with a chat template and tools; what it answers usually is in `usual`."""
    options = {"max_request_bytes": MAX_BYTES, "body_timeout_s": BODY_TIMEOUT_S}
    with live_server(chat_template=TEMPLATE, tool_format=HERMES, **options) as running:
        yield running


@pytest.fixture(scope="module")
def usual(server: Live) -> str:
    return complete(server.url)


@pytest.fixture(autouse=True)
def untouched(server: Live, usual: str) -> Iterator[None]:
    """After each test nothing is left of its requests, and the usual answer is the usual one."""
    yield
    server.assert_idle()
    assert complete(server.url) == usual


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "def", "max_tokens": 2} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


BODIES = {
    "empty": b"",
    "blanks": b" " * 1000,
    "cut off": b'{"prompt": "a"',
    "two of them": b'{"prompt": "a"}{}',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "a string": b'"prompt"',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "half of a pair": b'{"prompt": "\\ud800"}',
    "halves the wrong way round": b'{"prompt": "\\udc00\\ud800"}',
    "half of a pair in a key": b'{"prompt": "a", "\\ud800": 1}',
    "a null byte": b"\x00",
    "a null byte in a string": b'{"prompt": "a\x00"}',
    "single quotes": b"{'prompt': 'a'}",
    "a comment": b'{"prompt": "a" /* b */}',
    "many brackets": b"[" * 100_000,
    "deep": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep where it is ignored": b'{"prompt": "a", "metadata":' + b"[" * 999 + b"]" * 999 + b"}",
    "a long number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request(server: Live, name: str) -> None:
    message = assert_error(send(server.url, COMPLETIONS, BODIES[name]), 400)
    assert message.startswith("the body ")


def test_what_json_allows_is_no_mistake(server: Live, usual: str) -> None:
    # Of two the last one counts, as in every library; a null byte is a character.
    body = b'{"prompt": "x", "prompt": "def ", "max_tokens": 8, "temperature": 0.0, "foo": null}'
    answer = send(server.url, COMPLETIONS, body)
    assert answer.json["choices"][0]["text"] == usual
    assert send(server.url, COMPLETIONS, completion(prompt="a\0b")).status == 200


HUGE = 10**30
WRONG_VALUES: list[tuple[str, Any]] = [
    *[("prompt", value) for value in (None, {}, True, 1, 1.5, [], [[]], [[], []], [[[1]]])],
    *[("prompt", value) for value in (["a", [1]], [1, "a"], [[1], "a"], [[1], ["a"]], [None])],
    *[("prompt", value) for value in ([-1], [2048], [2**31], [HUGE], [1.0], [True], [[True]])],
    *[("prompt", value) for value in ([1] * 513, ["a"] * 129, "a " * 600, "x" * 300_000)],
    *[("model", value) for value in (1, [], {})],
    *[("n", value) for value in (0, -1, 5, 129, HUGE, 1.0, True, "1")],
    *[("best_of", value) for value in (0, -1, 129, HUGE, "1")],
    *[("temperature", value) for value in (-1, "1", True, 1e39, [])],
    *[("top_p", value) for value in (0, -1, 1.1)],
    *[("top_k", value) for value in (-2, 2**31, 0.5)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0, -1)],
    *[("seed", value) for value in (-2, 2**64, 1.0)],
    *[("stop", value) for value in ("", [""], ["a", ""], [1], 1, {}, ["a"] * 257)],
    *[("stop_token_ids", value) for value in ([-1], [2048], [HUGE], 1, ["a"])],
    *[("max_tokens", value) for value in (0, -1, 512, HUGE, "1", 1.0)],
    *[("min_tokens", value) for value in (-1, 3)],
    *[("logprobs", value) for value in (-2, -1, 21, HUGE, True)],
    *[("prompt_logprobs", value) for value in (-2, -1, 21)],
    *[("logit_bias", {key: 1}) for key in ("", "a", "-1", "1.0", " 1", "²", "٣", "2048", "9" * 99)],
    *[("logit_bias", value) for value in ([], 1, {"1": "a"}, {"1": None}, {"1": True})],
    *[("allowed_token_ids", value) for value in ([], [-1], [2048], 1)],
    *[("bad_words", value) for value in ([""], [1], "a", ["a"] * 257)],
    *[("stream", value) for value in ("yes", 1)],
    *[("stream_options", value) for value in ([], {}, {"include_usage": True})],
    *[("priority", value) for value in (1, "1")],
    *[("cache_salt", value) for value in (1, [])],
    *[("echo", value) for value in ("x", 1)],
    *[("length_penalty", 1), ("early_stopping", True), ("early_stopping", "x")],
    *[("response_format", value) for value in ("json", {}, {"type": "x"}, {"type": "json_schema"})],
    *[("structured_outputs", value) for value in ([], {}, {"regex": "a", "choice": ["a"]})],
]


@pytest.mark.parametrize(("param", "value"), WRONG_VALUES, ids=lambda value: f"{value!r:.30}")
def test_a_wrong_value_is_named(server: Live, param: str, value: Any) -> None:
    assert_error(send(server.url, COMPLETIONS, completion(**{param: value})), 400, param)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("param", ["temperature", "top_p", "max_tokens", "seed", "n"])
def test_a_number_that_is_none(server: Live, param: str, number: str) -> None:
    body = f'{{"prompt": "a", "{param}": {number}}}'.encode()
    assert_error(send(server.url, COMPLETIONS, body), 400, param)


def test_a_bias_beyond_all_numbers_is_clamped_or_refused(server: Live) -> None:
    def biased(number: str) -> Answer:
        body = f'{{"prompt": "a", "max_tokens": 2, "logit_bias": {{"77": {number}}}}}'
        return send(server.url, COMPLETIONS, body.encode())

    assert biased("1e400").json["choices"][0]["text"] == biased("100").json["choices"][0]["text"]
    assert_error(biased("NaN"), 400, "logit_bias")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "best_of"),
        ({"prompt": ["a", "a" * 4000]}, "prompt"),
        ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
        ({"bad_words": ["a"], "allowed_token_ids": [68]}, "bad_words"),
        ({"use_beam_search": True, "stream": True}, "use_beam_search"),
        ({"use_beam_search": True, "logprobs": 1}, "logprobs"),
        ({"use_beam_search": True, "n": 5}, "n"),
        ({"use_beam_search": True, "n": 40}, "n"),
        ({"use_beam_search": True, "best_of": 40}, "best_of"),
        ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
        ({"structured_outputs": {"regex": "a"}, "stop": "b"}, "stop"),
        ({"functions": []}, "functions"),
        ({"suffix": "a"}, "suffix"),
        ({"guided_json": {}}, "guided_json"),
        ({"foo": 1}, "foo"),
        ({"": 1}, ""),
        ({"x" * 5000: 1}, "x" * 80),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
    ],
)
def test_fields_that_do_not_go_together(server: Live, fields: Any, param: str) -> None:
    assert_error(send(server.url, COMPLETIONS, completion(**fields)), 400, param)


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}}


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


WIDE = {f"p{i}": {"type": "string", "pattern": "(a|b){0,500}"} for i in range(1000)}
LOOP = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
BOMBS: list[tuple[dict[str, Any], str | None]] = [
    (schema({"type": "nope"}), "response_format"),
    (schema({"$ref": "http://127.0.0.1:1/schema"}), "response_format"),
    (schema({"$ref": "file:///etc/passwd"}), "response_format"),
    (schema({"$ref": "#/nowhere"}), "response_format"),
    (schema(LOOP), "response_format"),
    (schema({"type": "object", "properties": WIDE}), "response_format"),
    (schema(nested(500)), None),  # no body is read so deep
    (schema([]), "response_format"),
    *[
        ({"structured_outputs": fields}, "structured_outputs")
        for fields in (
            {"regex": "("},
            {"regex": "a" * 9000},
            {"regex": "(a{1000}){1000}"},
            {"regex": "(?=a)"},
            {"choice": []},
            {"choice": [""]},
            {"choice": ["x" * 300_000]},
            {"grammar": ""},
            {"grammar": "nope"},
            {"grammar": "start: start"},
            {"grammar": "start: missing"},
            {"json": "{"},
            {"json": "[]"},
            {"json": "[" * 100_000},
            {"json": {}, "whitespace_pattern": "x"},
            {"json_object": False},
        )
    ],
    ({"structured_outputs": {"foo": 1}}, "structured_outputs.foo"),
]


@pytest.mark.parametrize(("fields", "param"), BOMBS, ids=lambda value: f"{value!r:.50}")
def test_schemas_and_grammars_that_cannot_be(server: Live, fields: Any, param: str | None) -> None:
    begin = time.monotonic()
    for more in ({}, {"stream": True}):
        answer = send(server.url, COMPLETIONS, completion(**fields, **more))
        if answer.status == 200:  # it was found in the first step, behind the stream's head
            assert more
            error, done, _ = answer.body.split(b"\n\n")
            assert (json.loads(error[6:])["error"]["param"], done) == (param, b"data: [DONE]")
        else:
            assert_error(answer, 400, param)
    assert time.monotonic() - begin < 30


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "hi"}


def calls(*made: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": list(made)}]}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def tools(*made: Any, choice: Any = "required", **more: Any) -> dict[str, Any]:
    return {"tools": list(made), "tool_choice": choice} | more


CHATS: list[tuple[dict[str, Any], str]] = [
    *[({"messages": value}, "messages") for value in ([], None, "a", {}, [1], [None], [[]], [{}])],
    ({"messages": [{"role": 1, "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages"),
    ({"messages": [USER] * 9000}, "messages"),
    (content(1), "messages"),
    (content({}), "messages"),
    (content({"type": "text"}), "messages"),
    (content({"type": "text", "text": 1}), "messages"),
    (content({"type": ["text"], "text": "a"}), "messages"),
    (content({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}), "messages"),
    (calls(), "messages"),
    (calls(1), "messages"),
    (calls({}), "messages"),
    *[({"tools": value}, "tools") for value in (1, {}, [1], [{}], [{"type": "x"}], [TOOL] * 1025)],
    *[({"tools": [{"type": "function", "function": f}]}, "tools") for f in ({}, 1, {"name": 1})],
    ({"tools": [TOOL | {"x": 1}]}, "tools[0].x"),
    (tools({"type": "function", "function": {"name": "f", "parameters": []}}), "tools"),
    (tools({"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}), "tools"),
    (tools({"type": "function", "function": FUNCTION | {"parameters": {"$ref": "x"}}}), "tools"),
    (tools(*[{"type": "function", "function": {"name": f"f{i}"}} for i in range(1024)]), "tools"),
    *[(tools(TOOL, choice=value), "tool_choice") for value in ("x", 1, {}, {"type": "function"})],
    (tools(TOOL, choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    (tools(TOOL, response_format={"type": "json_object"}), "tool_choice"),
    (tools(TOOL, stop="a"), "stop"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    ({"logprobs": 1}, "logprobs"),
    *[({"logprobs": True, "top_logprobs": k}, "top_logprobs") for k in (-2, -1, 21, HUGE)],
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"n": 129}, "n"),
    ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
    ({"max_completion_tokens": 512, "max_tokens": 512}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    ({"max_tokens": None, "use_beam_search": True}, "max_tokens"),
    ({"prompt": "a"}, "prompt"),
    (schema({"type": "nope"}), "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("fields", "param"), CHATS, ids=lambda value: f"{value!r:.50}")
def test_a_conversation_that_cannot_be(server: Live, fields: Any, param: str) -> None:
    assert_error(send(server.url, CHAT, chat(**fields)), 400, param)


@pytest.mark.parametrize("arguments", ["{", "[" * 400, "NaN", '{"a": NaN}', "", "null"])
def test_arguments_of_old_calls_may_be_anything(server: Live, arguments: str) -> None:
    made = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    assert send(server.url, CHAT, chat(**calls(made))).status == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        *[("/detokenize", {"tokens": x}, "tokens") for x in ("a", None, [-1], [2048], [2**31])],
        *[("/detokenize", {"tokens": x}, "tokens") for x in ([[1]], [True], ["a"], [1.0])],
    ],
)
def test_tokens_that_cannot_be(server: Live, path: str, body: Any, param: str) -> None:
    assert_error(send(server.url, path, body), 400, param)


def test_a_wrong_path_method_or_model(server: Live) -> None:
    url = server.url
    assert "/nope" in assert_error(send(url, "/nope", method="GET"), 404)
    assert_error(send(url, "/v1/models/nope", method="GET"), 404, "model")
    assert_error(send(url, "/v1/models/%ff%00", method="GET"), 404, "model")
    assert_error(send(url, COMPLETIONS, completion(model="nope")), 404, "model")
    assert_error(send(url, COMPLETIONS, completion(model="")), 404, "model")
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        assert "POST" in assert_error(send(url, COMPLETIONS, method=method), 405)
    assert "GET" in assert_error(send(url, "/health"), 405)


@pytest.mark.parametrize("given", ["x", "0", "-1", "nan", "inf", "", "9" * 400, "1 s"])
def test_a_timeout_that_is_none(server: Live, given: str) -> None:
    answer = send(server.url, COMPLETIONS, completion(), {"X-Request-Timeout": given})
    assert "X-Request-Timeout" in assert_error(answer, 400)


@pytest.mark.parametrize("given", ["1e308", "1_0"])
def test_a_timeout_that_is_long(server: Live, given: str) -> None:
    headers = {"X-Request-Timeout": given}
    assert send(server.url, COMPLETIONS, completion(), headers).status == 200


@pytest.mark.parametrize("given", ["a", "x" * 128, "'\"\\{}%s"])
def test_a_request_id_comes_back(server: Live, given: str) -> None:
    answer = send(server.url, COMPLETIONS, completion(), {"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given
    assert answer.json["id"] == f"cmpl-{given}"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", b"\xff\xfe", "a\tb"])
def test_a_request_id_that_is_none_is_replaced(server: Live, given: str | bytes) -> None:
    answer = send(server.url, COMPLETIONS, completion(), {"X-Request-Id": given})
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.status == 200


def test_two_requests_may_have_one_id(server: Live) -> None:
    with connected(server.url) as first, connected(server.url) as second:
        for mine in (first, second):
            body = completion(prompt=["a", "b"], max_tokens=40, ignore_eos=True)
            mine.sendall(whole(COMPLETIONS, body, "X-Request-Id: same"))
        assert [received(mine).status for mine in (first, second)] == [200, 200]


def test_a_body_that_is_too_long(server: Live) -> None:
    with connected(server.url) as mine:  # refused by its head alone
        mine.sendall(head(COMPLETIONS, length=MAX_BYTES + 1))
        assert str(MAX_BYTES) in assert_error(received(mine), 413)
    with connected(server.url) as mine:
        mine.sendall(head(COMPLETIONS, length=10**30))
        assert received(mine).status in (400, 413)
    with connected(server.url) as mine:
        mine.sendall(head(COMPLETIONS, "Transfer-Encoding: chunked"))
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(MAX_BYTES // 0x10000 + 1):
            mine.sendall(part)
        assert_error(received(mine), 413)


def test_a_body_that_does_not_come(server: Live) -> None:
    with connected(server.url) as mine:
        mine.sendall(head(COMPLETIONS, length=100) + b"{")
        answer = received(mine)
        assert_error(answer, 408)
        assert answer.headers["connection"] == "close"
        assert mine.recv(1) == b""
    with connected(server.url) as mine:
        mine.sendall(head(COMPLETIONS, "Transfer-Encoding: chunked") + b"1\r\n{\r\n")
        assert_error(received(mine), 408)


def test_a_slow_body_is_not_waited_for_longer_than_allowed(server: Live) -> None:
    with connected(server.url) as mine:
        mine.sendall(head(COMPLETIONS, length=10_000))
        begin = time.monotonic()
        mine.settimeout(0.05)
        while time.monotonic() - begin < 20:
            try:
                mine.sendall(b" ")
                if mine.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        mine.settimeout(20)
        assert_error(received(mine), 408)


def test_a_wrong_content_length(server: Live) -> None:
    body = json.dumps(completion()).encode()
    with connected(server.url) as mine:  # what is behind a body is another request, and is none
        mine.sendall(head(COMPLETIONS, length=len(body) - 1) + body)
        assert received(mine).status == 400
    for length in (-1, "x", "1, 2"):
        with connected(server.url) as mine:
            mine.sendall(head(COMPLETIONS, f"Content-Length: {length}") + body)
            assert received(mine).status == 400


@pytest.mark.parametrize("begun", [b"", b"{", b'{"prompt": "a", "max_tokens": 400'])
def test_a_client_that_goes_before_its_body_has_come(server: Live, begun: bytes) -> None:
    for length in (1000, 10):
        with connected(server.url) as mine:
            mine.sendall(head(COMPLETIONS, length=length) + begun[: length - 1])
    with connected(server.url) as mine:
        mine.sendall(b"POST " + COMPLETIONS.encode())  # nor its head


def test_what_is_no_http(server: Live) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00",
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        with connected(server.url) as mine:
            mine.sendall(noise)
            mine.shutdown(socket.SHUT_WR)
            assert mine.recv(1000).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 400 Bad Request")
