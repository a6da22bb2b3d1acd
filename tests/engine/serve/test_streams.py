"""A stream is the whole in pieces: characters and stop strings that tokens split come out right."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from pallas_paged.engine import AsyncLLM
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.serve.live import SMALL, Live, live_server
from tests.engine.serve.wire import CHAT, COMPLETIONS, events, send

CHARACTERS = "é😀你ßΩ€\u0301"
"""Of two to four bytes, and an accent of its own. The demo model has most of them byte by byte."""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def seeds(count: int) -> list[Any]:
    """Returns seeds, all but the first two of which are for `make check`."""
    return [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, count))]


class Made(NamedTuple):
    """A completion, whole or put together of the pieces of a stream."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: Any


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """A server whose answers depend on nothing but the request."""
    options: dict[str, Any] = {"deterministic": True, "dtype": "float32"}
    with live_server(AsyncLLM(DEMO_MODEL, **SMALL | options), chat_template=TEMPLATE) as running:
        yield running
        running.assert_idle()


@pytest.fixture(scope="module")
def biases(server: Live) -> dict[str, float]:
    """Biases towards the tokens of single bytes of characters, whole or not."""
    asked = {"prompt": CHARACTERS, "add_special_tokens": False}
    tokens = send(server.url, "/tokenize", asked).json["tokens"]
    return {str(token): 9.0 for token in tokens}


def fields_of(path: str, prompt: str) -> dict[str, Any]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def whole(url: str, path: str, body: dict[str, Any]) -> list[Made]:
    answer = send(url, path, body | {"return_token_ids": True})
    assert answer.status == 200, answer
    return [
        Made(
            choice["message"]["content"] if path == CHAT else choice["text"],
            choice["token_ids"],
            choice["finish_reason"],
            choice["stop_reason"],
        )
        for choice in answer.json["choices"]
    ]


def streamed(
    url: str, path: str, body: dict[str, Any], pieces: list[str] | None = None
) -> list[Made]:
    """Returns the completions of a stream; notes the texts of all pieces."""
    answer = send(url, path, body | {"return_token_ids": True, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    made: dict[int, Made] = {}
    for event in events(answer.body):
        for choice in event["choices"]:
            before = made.get(choice["index"], Made("", [], None, None))
            assert before.finish_reason is None, "nothing comes behind the end"
            text = (choice["delta"].get("content") or "") if path == CHAT else choice["text"]
            if pieces is not None:
                pieces.append(text)
            made[choice["index"]] = Made(
                before.text + text,
                before.token_ids + (choice.get("token_ids") or []),
                choice["finish_reason"],
                choice["stop_reason"],
            )
    return [made[index] for index in sorted(made)]


def cut(text: str, stop: list[str]) -> tuple[str, str] | None:
    """Returns a text up to the stop string that completes first, and that string."""
    found = [(start + len(one), start, one) for one in stop if (start := text.find(one)) >= 0]
    if not found:
        return None
    _, start, one = min(found)
    return text[:start], one


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("seed", seeds(3))
def test_characters_are_whole(server: Live, path: str, seed: int) -> None:
    """All characters are of several tokens; no piece has half of one."""
    regex = {"regex": f"[{CHARACTERS}]{{6,15}}"}
    body = fields_of(path, "x = 'é'") | {"structured_outputs": regex, "temperature": 2.0}
    body |= {"seed": seed, "n": 2, "max_tokens": 40}
    made = whole(server.url, path, body)
    assert streamed(server.url, path, body) == made
    for one in made:
        end = one.text.rstrip("\ufffd")  # the last one, if there was no token left for it
        assert len(end) >= len(one.text) - (1 if one.finish_reason == "length" else 0)
        assert set(end) <= set(CHARACTERS)
    assert any(len(one.token_ids) > len(one.text) for one in made), "characters are split"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("seed", seeds(6))
def test_stop_strings_across_tokens(
    server: Live, biases: dict[str, float], path: str, seed: int
) -> None:
    """Stop strings are any parts of what comes without them: they begin and end inside tokens."""
    rng = random.Random(seed)
    prompt = rng.choice(["def f(", "# Größe: ", "你好 😀 ", "class "])
    body = fields_of(path, prompt) | {"seed": seed, "temperature": 1.3, "max_tokens": 30}
    if seed % 2:
        body["logit_bias"] = biases
    (free,) = whole(server.url, path, body)
    pieces: list[str] = []
    assert streamed(server.url, path, body, pieces) == [free]
    edges = [len("".join(pieces[:k])) for k in range(2, len(pieces)) if pieces[k]]
    for turn in range(3):
        edge = rng.choice(edges)  # a stop string of which all but a character is there before
        stop = [free.text[max(0, edge - rng.randint(1, 9)) : edge + 1]]
        begins = [rng.randrange(len(free.text) - 1) for _ in range(rng.randint(1, 2) * turn)]
        stop += [free.text[begin : begin + rng.randint(1, 9)] for begin in begins]
        stop += ["never there"][: turn // 2]
        asked = body | {"stop": stop}
        (made,) = whole(server.url, path, asked)
        expected = cut(free.text, stop)
        assert expected is not None
        assert (made.text, made.stop_reason) == expected
        assert made.finish_reason == "stop"
        assert streamed(server.url, path, asked) == [made]
        included = asked | {"include_stop_str_in_output": True}
        (kept,) = whole(server.url, path, included)
        assert kept.text == "".join(expected)
        assert streamed(server.url, path, included) == [kept]
