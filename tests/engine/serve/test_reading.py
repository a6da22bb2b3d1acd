"""Bodies are read at a cost that does not depend on how much of them is wrong."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pallas_paged.engine.field_checks import strings
from pallas_paged.engine.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

MANY = 1000


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *[(CompletionRequest, "prompt", [bad] * MANY) for bad in (-1, [-1], None, {})],
        (CompletionRequest, "prompt", ["a", 1] * MANY),
        (CompletionRequest, "stop", [1] * MANY),
        (CompletionRequest, "stop", ["a"] * MANY),
        (CompletionRequest, "bad_words", ["a"] * MANY),
        (CompletionRequest, "stop_token_ids", [-1] * MANY),
        (CompletionRequest, "allowed_token_ids", ["a"] * MANY),
        (CompletionRequest, "logit_bias", {str(i): "a" for i in range(MANY)}),
        (CompletionRequest, "structured_outputs", {"choice": [1] * MANY}),
        (ChatRequest, "messages", [{}] * MANY),
        (ChatRequest, "messages", [{"role": "user", "content": [1] * MANY}]),
        (ChatRequest, "messages", [{"role": "user", "tool_calls": [1] * MANY}]),
        (ChatRequest, "tools", [{}] * MANY),
        (DetokenizeRequest, "tokens", [-1] * MANY),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_one_mistake_is_enough(kind: type[BaseModel], field: str, value: Any) -> None:
    """Millions of them, in the bytes that a body may have, would take minutes and gigabytes."""
    whole = {"prompt": "a"} if kind is CompletionRequest else {"messages": []}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(whole | {field: value}))
    assert caught.value.error_count() <= 4


def test_many_strings_are_not_shown_once_for_each() -> None:
    class Shown(list[str]):
        count = 0

        def __repr__(self) -> str:
            Shown.count += 1
            return super().__repr__()

    strings("stop", Shown(["a"] * MANY))
    assert Shown.count <= 1
