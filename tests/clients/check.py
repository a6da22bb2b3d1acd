"""Asks a server through openai, litellm and llm, as their users do; `make clients` runs it.

It needs these three, and nothing of this package but the server that it starts: with the Python
that the environment variable SERVER_PYTHON names, or its own.
"""

import asyncio
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network when it is imported

import litellm
import openai

from tests.clients.server import KEY, MODEL, Server, running_server

ASK = [{"role": "user", "content": "Write a loop."}]
PROMPT = "def main(argv):\n    "
FIXED: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # the small model would write blanks only
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
CHOICE: Any = {"type": "function", "function": {"name": "paint"}}
THOUGHT = {"structured_outputs": {"choice": ["<think>Why?</think>So."]}}


class Checks:
    """What is asked of a server, with what the official client got for the same."""

    def __init__(self, server: Server):
        self.server = server
        self.client = openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0)
        chat = self.client.chat.completions.create(model=MODEL, messages=ASK, **FIXED)
        self.answer = chat.choices[0].message.content
        text = self.client.completions.create(model=MODEL, prompt=PROMPT, **FIXED)
        self.text = text.choices[0].text
        assert self.answer
        assert self.text

    # --- openai ---------------------------------------------------------------------------------

    def openai_streams(self) -> None:
        request: Any = {"model": MODEL, "stream": True, **FIXED}
        pieces = self.client.chat.completions.create(messages=ASK, **request)
        same("".join(p.choices[0].delta.content or "" for p in pieces), self.answer)
        texts = self.client.completions.create(prompt=PROMPT, **request)
        same("".join(piece.choices[0].text for piece in texts), self.text)

    def openai_lists_models(self) -> None:
        same([model.id for model in self.client.models.list()], [MODEL])

    # --- litellm --------------------------------------------------------------------------------

    def litellm_chats(self) -> None:
        for provider in ("openai", "hosted_vllm"):
            made = self.ask_litellm(provider, **FIXED)
            same(made.choices[0].message.content, self.answer)
            same(made.usage.completion_tokens, 60)
            pieces = list(
                self.ask_litellm(
                    provider, stream=True, stream_options={"include_usage": True}, **FIXED
                )
            )
            found = [p.choices[0].delta.content or "" for p in pieces if p.choices]
            same("".join(found), self.answer)
            same(pieces[-1].usage.completion_tokens, 60)

    def litellm_chats_async(self) -> None:
        async def ask() -> tuple[str, str]:
            options = self.options_of_litellm("openai") | FIXED
            whole = await litellm.acompletion(**options)
            stream = await litellm.acompletion(**options, stream=True)
            pieces = [piece.choices[0].delta.content or "" async for piece in stream]
            return whole.choices[0].message.content, "".join(pieces)

        same(asyncio.run(ask()), (self.answer, self.answer))

    def litellm_completes(self) -> None:
        request: Any = {"model": f"text-completion-openai/{MODEL}", "prompt": PROMPT, **FIXED}
        request |= {"api_base": self.server.base_url, "api_key": KEY}
        same(litellm.text_completion(**request).choices[0].text, self.text)
        pieces = litellm.text_completion(**request, stream=True)
        same("".join(piece.choices[0].text or "" for piece in pieces), self.text)

    def litellm_has_schemas_and_tools(self) -> None:
        made = self.ask_litellm("openai", response_format=FORM, **FIXED)
        is_of_schema(made.choices[0].message.content)
        asked: Any = {"tools": [TOOL], "tool_choice": CHOICE, **FIXED}
        choice = self.ask_litellm("openai", **asked).choices[0]
        (call,) = choice.message.tool_calls
        same((call.function.name, choice.finish_reason), ("paint", "tool_calls"))
        is_of_schema(call.function.arguments)
        pieces = list(self.ask_litellm("openai", stream=True, **asked))
        built = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
        same([one.function.arguments for one in built], [call.function.arguments])

    def litellm_tells_reasoning_apart(self) -> None:
        for provider in ("openai", "hosted_vllm"):
            message = self.ask_litellm(provider, extra_body=THOUGHT).choices[0].message
            same((message.reasoning_content, message.content), ("Why?", "So."))

    def litellm_translates_errors(self) -> None:
        for error, fields in (
            (litellm.BadRequestError, {"temperature": -1}),
            (litellm.NotFoundError, {"model": "openai/gpt"}),
            (litellm.AuthenticationError, {"api_key": "wrong"}),
        ):
            try:
                self.ask_litellm("openai", **fields)
            except error:
                continue
            raise AssertionError(f"{fields} is no {error.__name__}")

    def ask_litellm(self, provider: str, **fields: Any) -> Any:
        return litellm.completion(**self.options_of_litellm(provider) | fields)

    def options_of_litellm(self, provider: str) -> dict[str, Any]:
        options = {"model": f"{provider}/{MODEL}", "messages": ASK, "num_retries": 0}
        return options | {"api_base": self.server.base_url, "api_key": KEY}

    # --- llm ------------------------------------------------------------------------------------

    def llm_chats(self) -> None:
        for flags in ((), ("--no-stream",)):
            same(self.ask_llm("chatty", *flags, ASK[0]["content"], **FIXED), self.answer)

    def llm_completes(self) -> None:
        for flags in ((), ("--no-stream",)):
            same(self.ask_llm("chatty-text", *flags, PROMPT, **FIXED), self.text)

    def llm_has_schemas(self) -> None:
        schema = ("--schema", json.dumps(SCHEMA))
        for flags in (schema, ("--no-stream", *schema)):
            is_of_schema(self.ask_llm("chatty", *flags, "Which?", **FIXED))

    def ask_llm(self, model: str, *flags: str, **options: Any) -> str:
        """Returns what the command prints for a prompt, without the line's end."""
        with tempfile.TemporaryDirectory() as folder:
            chat = {"model_name": MODEL, "api_base": self.server.base_url, "api_key_name": "chatty"}
            models = [
                chat | {"model_id": "chatty", "supports_schema": True},
                chat | {"model_id": "chatty-text", "completion": True},
            ]
            # JSON is YAML.
            Path(folder, "extra-openai-models.yaml").write_text(json.dumps(models))
            Path(folder, "keys.json").write_text(json.dumps({"chatty": KEY}))
            given = [part for name, value in options.items() for part in ("-o", name, str(value))]
            done = subprocess.run(
                [sys.executable, "-m", "llm", "prompt", "-m", model, *given, *flags],
                env=os.environ | {"LLM_USER_PATH": folder},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")


def same(found: Any, expected: Any) -> None:
    assert found == expected, f"{found!r} instead of {expected!r}"


def is_of_schema(text: str) -> None:
    found = json.loads(text)
    assert found in ({"color": "red"}, {"color": "green"}), text


def main() -> int:
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("openai", "litellm", "llm")
    ]
    print(", ".join(versions))
    failures = 0
    with running_server() as server:
        checks = Checks(server)
        for name in (name for name in vars(Checks) if re.match("(openai|litellm|llm)_", name)):
            try:
                getattr(checks, name)()
            except Exception as error:
                failures += 1
                print(f"FAILED  {name}: {type(error).__name__}: {error}")
            else:
                print(f"ok      {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
