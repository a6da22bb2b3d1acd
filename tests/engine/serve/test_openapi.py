"""`/openapi.json` describes what is served, and nothing else."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.openapi import OPERATIONS, document
from pallas_paged.engine.serve.protocol import CompletionRequest
from pallas_paged.engine.serve.service import ServeOptions, Service
from tests.engine.async_serving import make, run

NOT_DESCRIBED = {("get", "/"), ("get", "/ping"), ("get", "/openapi.json")}


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, dict | list) else ():
        yield from walk(part)


def test_all_paths_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    async def served() -> set[tuple[str, str]]:
        llm = make()
        monkeypatch.setattr(llm, "get_default_sampling_params", SamplingParams)
        app = make_app(Service(llm, ServeOptions(("demo",))))
        await llm.shutdown()
        return {
            (method.lower(), re.sub(r":\w+}", "}", route.path))
            for route in app.routes
            for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
        }

    described = {(operation.method, operation.path) for operation in OPERATIONS}
    assert run(served()) == described | NOT_DESCRIBED


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_document_is_whole(has_keys: bool) -> None:
    made = document("1.2.3", has_keys=has_keys)
    schemas = made["components"]["schemas"]
    refs = {part["$ref"] for part in walk(made) if "$ref" in part}
    assert refs <= {f"#/components/schemas/{name}" for name in schemas}
    assert not any("$defs" in part for part in walk(made))
    assert ("securitySchemes" in made["components"]) == has_keys
    for path, methods in made["paths"].items():
        for operation in methods.values():
            is_open = path in ("/health", "/version", "/metrics")
            assert ("security" in operation) == (has_keys and not is_open)
            assert ("401" in operation["responses"]) == (has_keys and not is_open)
            assert "422" not in operation["responses"]
            for status, answer in operation["responses"].items():
                if status != "200":
                    (content,) = answer["content"].values()
                    assert content["schema"]["$ref"].endswith("/ErrorBody")


def test_fields_say_what_they_are() -> None:
    schema = document("1", has_keys=False)["components"]["schemas"]["CompletionRequest"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["prompt"]
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    known = {"stream_options", "response_format", "structured_outputs"}
    for name, field in schema["properties"].items():
        assert name in known or field["description"], name
    assert schema["properties"]["top_p"]["anyOf"][0]["maximum"] == 1
