"""Requests to a server over a socket of one's own, whatever they look like."""

import http.client
import json
import socket
import struct
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.engine.serve.live import MODEL

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TIMEOUT_S = 60


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    url: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str | bytes] | None = None,
    method: str = "POST",
) -> Answer:
    """Sends one request, with a body of JSON unless it is bytes, and returns its answer."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    try:
        connection.request(method, path, body, dict(headers or {}))  # type: ignore[arg-type]
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, response.read())
    finally:
        connection.close()


def complete(url: str, prompt: Any = "def ", **fields: Any) -> str:
    """Returns the text of one completion."""
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
    answer = send(url, COMPLETIONS, request)
    assert answer.status == 200, answer
    text: str = answer.json["choices"][0]["text"]
    return text


def connected(url: str, receive_bytes: int | None = None) -> socket.socket:
    """Returns a socket that is connected to a server, with a receive buffer of this size."""
    address = urllib.parse.urlsplit(url)
    mine = socket.socket()
    mine.settimeout(TIMEOUT_S)
    if receive_bytes is not None:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    mine.connect((address.hostname, address.port))
    return mine


def head(path: str, *lines: str, length: int | None = None, method: str = "POST") -> bytes:
    """Returns the head of a request, its last empty line included."""
    fields = ["Host: here", *lines]
    if length is not None:
        fields.append(f"Content-Length: {length}")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode()


def whole(path: str, body: Any, *lines: str) -> bytes:
    """Returns a request as it is on the wire."""
    encoded = json.dumps(body).encode()
    return head(path, *lines, length=len(encoded)) + encoded


def received(mine: socket.socket) -> Answer:
    """Returns the answer that comes on a socket."""
    response = http.client.HTTPResponse(mine)
    response.begin()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, names, response.read())


def reset(mine: socket.socket) -> None:
    """Ends a connection at once, as a client that was killed."""
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    mine.close()


def events(body: bytes) -> Iterator[Any]:
    """Yields the events of a stream that has ended properly."""
    *lines, last, end = body.split(b"\n\n")
    assert (last, end) == (b"data: [DONE]", b"")
    for line in lines:
        assert line.startswith(b"data: ")
        yield json.loads(line[6:])


def assert_error(answer: Answer, status: int, param: str | None = None) -> str:
    """Asserts that an answer is OpenAI's error body with this field; returns its message."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["param"] == param, error
    assert error["type"].endswith("Error")
    assert 0 < len(error["message"]) < 1000
    message: str = error["message"]
    return message
