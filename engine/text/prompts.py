"""Turns what callers pass as prompts into text and token ids."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_paged.engine.core.intake import checked_token_ids
from pallas_paged.engine.sampling_params import BeamSearchParams, SamplingParams
from pallas_paged.engine.text.tokenizer import Tokenizer, require_tokenizer
from pallas_paged.engine.valid_text import check_text

Prompt = str | Mapping[str, Any] | Sequence[int] | np.ndarray
"""A string, token ids, `{"prompt": str}` or `{"prompt_token_ids": [int]}`.

Token ids are a list, a tuple or an array of integers. Beside `prompt_token_ids`, `prompt` is a
label. `"cache_salt": str` in a mapping keeps the prompt's cached blocks apart from those of prompts
with another salt, or none.
"""
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
Message = Mapping[str, Any]
Params = SamplingParams | BeamSearchParams


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts one by one; a list of numbers is one of them.

    Raises:
      ValueError: it is neither a prompt nor several.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = _as_numpy(prompts)
    try:
        several = list(prompts)
    except TypeError:
        several = None
    if several is None or isinstance(prompts, bytes | bytearray):
        raise ValueError(
            f"prompts={prompts!r:.80} must be a string, a list of token ids, a mapping, or a list "
            "of those"
        )
    is_one = bool(several) and isinstance(several[0], int | float | np.generic)
    return [several] if is_one and not isinstance(several[0], str) else several


def broadcast_params(params: Params | Sequence[Params] | None, count: int) -> list[Params]:
    """Returns the parameters of each of `count` prompts.

    Raises:
      ValueError: their number is another, or one is of another type.
    """
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams | BeamSearchParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        raise ValueError(
            f"sampling_params={params!r:.80} must be SamplingParams, BeamSearchParams, a list of "
            "them or None"
        )
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts; pass one per prompt, "
            "or a single one for all"
        )
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams | BeamSearchParams):
            raise ValueError(
                f"sampling_params[{index}]={one!r:.80} must be SamplingParams or BeamSearchParams"
            )
    return list(params)


def checked_priorities(priority: Sequence[int] | None, count: int, policy: str) -> Sequence[int]:
    """Returns the priority of each of `count` prompts; 0 without any.

    Raises:
      ValueError: the engine's scheduling `policy` has none, or these are not one integer each.
    """
    if priority is None:
        return [0] * count
    if policy != "priority":
        raise ValueError(
            f"priority={priority!r:.80} needs scheduling_policy='priority', and this engine has "
            f"{policy!r}"
        )
    is_list = isinstance(priority, list | tuple) and len(priority) == count
    if not is_list or not all(type(p) is int for p in priority):
        raise ValueError(
            f"priority={priority!r:.80} must be a list of one integer for each of {count} prompts"
        )
    return priority


@contextlib.contextmanager
def naming_prompt(index: int, prompts: list[Prompt]) -> Iterator[None]:
    """Lets a `ValueError` that is raised inside say which of several prompts is meant."""
    try:
        yield
    except ValueError as error:
        if len(prompts) == 1:
            raise
        raise ValueError(f"prompts[{index}]: {error}") from error


def cache_salt(prompt: Prompt) -> str | None:
    """Returns a prompt's salt, or None; `ValueError` if it is no text."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    return None if salt is None else _checked_string("cache_salt", salt)


class PromptReader:
    """Turns prompts into tokens of one model.

    Args:
      tokenizer: None reads token ids only.
      path: the model's folder, for what is raised.
      vocab_size: V; token ids are below it.
    """

    def __init__(self, tokenizer: Tokenizer | None, path: str, vocab_size: int):
        self._tokenizer = tokenizer
        self._path = path
        self._vocab_size = vocab_size

    def read(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        """Returns a prompt's text, if it has one, and its tokens.

        Raises:
          ValueError: it is no prompt, there is no tokenizer for its text, or the model has no such
            tokens.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif isinstance(_as_numpy(prompt), list | tuple | np.ndarray):
            prompt = {"prompt_token_ids": prompt}
        if not isinstance(prompt, Mapping) or not prompt or prompt.keys() - _PROMPT_KEYS:
            raise ValueError(
                f"a prompt is a string, a list of token ids, {{'prompt': str}} or "
                f"{{'prompt_token_ids': [int]}}, not {prompt!r:.80}"
            )
        if "prompt_token_ids" not in prompt:
            text = _checked_string("prompt", prompt.get("prompt"))
            return text, self.encode(text)
        label = prompt.get("prompt")
        if label is not None:
            label = _checked_string("prompt", label)
        return label, checked_token_ids(prompt["prompt_token_ids"], self._vocab_size)

    def read_completion(self, completion: Prompt) -> Sequence[int]:
        """Returns the tokens of what stands behind a prompt; text without special tokens.

        Raises:
          ValueError: as `read`, or there is no token.
        """
        if not isinstance(completion, str):
            return self.read(completion)[1]
        ids = self.encode(completion, add_special_tokens=False)
        if not ids:
            raise ValueError(f"completion={completion!r} has no tokens, so nothing to score")
        return ids

    def from_chat(
        self, messages: Sequence[Message], name: str = "messages", **options: Any
    ) -> Prompt:
        """Returns the prompt of one conversation; see `chat.render`."""
        tokenizer = require_tokenizer(self._tokenizer, self._path)
        text = tokenizer.render_chat(messages, name, **options)
        ids = self.encode(text, add_special_tokens=False)  # the template writes them
        return {"prompt_token_ids": ids, "prompt": text}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns a text's tokens, with the special ones that the tokenizer's config adds.

        Raises:
          ValueError: there is no tokenizer, it cannot split the text, or the model has not all of
            the tokens.
        """
        tokenizer = require_tokenizer(self._tokenizer, self._path)
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"prompt={text!r:.80} holds {tokenizer.decode_token(largest)!r}, which is token "
                f"{largest} of the tokenizer in {tokenizer.path}, and the model's vocabulary has "
                f"{self._vocab_size}; leave it out, or use the model's own tokenizer"
            )
        return ids


def split_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[tuple[str, Sequence[Message]]]:
    """Returns each conversation with what it is called; a list of messages is one of them.

    Raises:
      ValueError: it is neither a conversation nor several.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(
            f"messages={messages!r:.80} must be a list of messages, such as "
            '[{"role": "user", "content": "Hello"}], or a list of such lists'
        )
    conversations: Any = messages
    if messages and isinstance(messages[0], Mapping):
        return [("messages", conversations)]
    return [(f"messages[{index}]", one) for index, one in enumerate(conversations)]


def _as_numpy(value: Any) -> Any:
    """Returns an array of another library, such as JAX's, as NumPy's; anything else as it is."""
    return np.asarray(value) if hasattr(value, "__array__") else value


def _checked_string(name: str, value: Any) -> str:
    if isinstance(value, str):
        name = f"{name}={value!r:.80}"
    check_text(name, value)
    return value
