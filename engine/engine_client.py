"""What a server needs of an engine, be it one `AsyncLLM` or several of them."""

from collections.abc import Sequence
from typing import Any, Protocol

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.prompts import Message, Params, Prompt
from pallas_paged.engine.text.tokenizer import Tokenizer


class EngineClient(Protocol):
    """Takes requests of one event loop. Methods are those of `AsyncLLM`."""

    @property
    def config(self) -> EngineConfig:
        """What each engine is like."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engines'; None where the folder has none."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""

    @property
    def vocab_size(self) -> int:
        """V; token ids are below it."""

    @property
    def replicas(self) -> Sequence[AsyncLLM]:
        """The engines, each of which counts for itself."""

    @property
    def is_running(self) -> bool:
        """Whether steps can run, in one of the engines at least."""

    @property
    def errored(self) -> bool:
        """Whether an engine has ended by an error."""

    def check_accepts(self) -> None:
        """Raises what a health check should fail with; see `AsyncLLM.check_accepts`."""

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Takes a request in, and returns the stream of its outputs."""

    async def chat_prompt(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """Returns the prompt of a conversation."""

    async def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns a text's tokens."""

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what requests without parameters get."""

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Ends the engines and their threads; what is unfinished after `drain_s` seconds fails."""
