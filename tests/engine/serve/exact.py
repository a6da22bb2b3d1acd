"""A server, and an engine beside it that answers the same without one."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai

from pallas_paged.engine import LLM, AsyncLLM
from pallas_paged.engine.outputs import CompletionOutput, RequestOutput
from pallas_paged.engine.serve.parsers.formats import HERMES
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from tests.engine.serve.chat_folder import chat_folder
from tests.engine.serve.live import SMALL, Live, live_server

MODEL = "chatty"
API_KEY = "open sesame"
OPTIONS = SMALL | {"dtype": "float32", "deterministic": True}
"""A request's answer does not depend on what runs beside it."""
OPENAI_FIELDS = {
    *("n", "best_of", "stop", "seed", "temperature", "top_p", "max_tokens", "logprobs", "echo"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "max_completion_tokens"),
    *("top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls"),
    *("user", "metadata", "stream_options"),
}


class Exact(NamedTuple):
    """A server and an engine with the same model and options.

    Attributes:
      live: the server.
      llm: the engine.
      folder: of the model.
    """

    live: Live
    llm: LLM
    folder: Path

    @property
    def client_options(self) -> dict[str, Any]:
        """What a client of OpenAI is made of."""
        return {"base_url": f"{self.live.url}/v1", "api_key": API_KEY, "max_retries": 0}

    def client(self) -> openai.OpenAI:
        """Returns a client; it is closed by its caller."""
        return openai.OpenAI(**self.client_options)

    def offline(self, prompt: Any, **fields: Any) -> RequestOutput:
        """Returns what the engine gives with the fields' sampling parameters."""
        form = fields.get("structured_outputs")
        if isinstance(form, dict):
            fields["structured_outputs"] = StructuredOutputsParams(**form)
        if bias := fields.get("logit_bias"):
            fields["logit_bias"] = {int(token): value for token, value in bias.items()}
        defaults = self.llm.get_default_sampling_params()
        params = dataclasses.replace(defaults, **fields)
        (output,) = self.llm.generate(prompt, params, use_tqdm=False)
        return output

    def offline_chat(self, messages: Any, *, template: Any = None, **fields: Any) -> RequestOutput:
        """Returns what the engine answers; `template` has options of `LLM.chat_prompt`."""
        prompt = self.llm.chat_prompt(messages, **(template or {}))
        return self.offline(prompt, **fields)


@contextlib.contextmanager
def exact_pair(folder: Path) -> Iterator[Exact]:
    """Runs a server of a new model in an empty folder, and an engine beside it."""
    model = chat_folder(folder)
    llm = LLM(str(model), **OPTIONS)
    with live_server(
        AsyncLLM(str(model), **OPTIONS),
        served_model_names=(MODEL, "also/chatty"),
        api_keys=(API_KEY,),
        tool_format=HERMES,
        has_reasoning=True,
    ) as live:
        yield Exact(live, llm, model)


def as_client_takes(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a request's fields as the client's methods take them: others in `extra_body`."""
    body = {name: value for name, value in fields.items() if name not in OPENAI_FIELDS}
    known = {name: value for name, value in fields.items() if name in OPENAI_FIELDS}
    return known | ({"extra_body": body} if body else {})


def logprob_columns(output: CompletionOutput) -> list[tuple[str, float, dict[str, float]]]:
    """Returns token, log-probability and the likely tokens, as `/v1/completions` has them."""
    assert output.logprobs is not None
    return [
        (
            likely[token].decoded_token or "",
            likely[token].logprob,
            {one.decoded_token or "": one.logprob for one in likely.values()},
        )
        for token, likely in zip(output.token_ids, output.logprobs, strict=True)
    ]
