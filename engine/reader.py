"""From what callers of `LLM` pass to groups: all of a call are checked before any is queued."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.prompts import (
    Params,
    Prompt,
    PromptReader,
    broadcast_params,
    cache_salt,
    checked_priorities,
    naming_prompt,
    split_prompts,
)
from pallas_paged.engine.turns import Turns


class RequestReader:
    """Makes the groups of one engine."""

    def __init__(
        self,
        engine: Engine,
        turns: Turns,
        prompts: PromptReader,
        config: EngineConfig,
        defaults: Callable[[], SamplingParams],
        max_model_len: int,
    ):
        """`prompts` reads with the model's tokenizer; `config` is the engine's.

        `defaults` gives the parameters of requests that bring none.
        """
        self._defaults, self._max_model_len = defaults, max_model_len
        self._engine = engine
        self._turns = turns
        self._prompts = prompts
        self._config = config

    def read(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None,
        priority: Sequence[int] | None,
    ) -> list[tuple[SequenceGroup, str | None]]:
        """Returns a group for each prompt, and the prompt's text; queues nothing yet.

        Raises:
          ValueError: see `LLM.generate`.
        """
        split = split_prompts(prompts)
        priorities = checked_priorities(priority, len(split), self._config.scheduling_policy)
        most_tokens = None
        if sampling_params is None:
            sampling_params = self._defaults()
            most_tokens = sampling_params.max_tokens
            sampling_params = dataclasses.replace(sampling_params, max_tokens=None)
        params = broadcast_params(sampling_params, len(split))
        contents = []
        for index, prompt in enumerate(split):
            with naming_prompt(index, split):
                contents.append((*self._prompts.read(prompt), cache_salt(prompt)))
        requests = []
        with self._turns, self._engine.all_or_none():
            for index, (text, ids, salt) in enumerate(contents):
                with naming_prompt(index, split):
                    group = self._engine.make_group(ids, params[index], cache_salt=salt)
                group.priority = priorities[index]
                if most_tokens is not None:
                    group.max_tokens = min(group.max_tokens, most_tokens)
                requests.append((group, text))
        return requests

    def read_pairs(
        self, prompts: Prompt | Sequence[Prompt], completions: Prompt | Sequence[Prompt]
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Returns the tokens of prompts and of their completions.

        Raises:
          ValueError: see `LLM.score`.
        """
        split, behind_each = split_prompts(prompts), split_prompts(completions)
        if len(behind_each) != len(split):
            raise ValueError(
                f"{len(split)} prompts need as many completions, and there are {len(behind_each)}"
            )
        pairs = []
        for index, (prompt, completion) in enumerate(zip(split, behind_each, strict=True)):
            with naming_prompt(index, split):
                _, ids = self._prompts.read(prompt)
                behind = self._prompts.read_completion(completion)
                total = len(ids) + len(behind)
                if total > self._max_model_len:
                    raise ValueError(
                        f"a prompt of {len(ids)} tokens and a completion of {len(behind)} are more "
                        f"than max_model_len={self._max_model_len}; shorten one of them"
                    )
            pairs.append((ids, behind))
        return pairs

    def read_prefix(self, prompt: Prompt) -> tuple[tuple[int, ...], str | None]:
        """Returns the tokens of a prompt's full blocks, and its salt.

        Raises:
          ValueError: see `LLM.pin_prefix`.
        """
        if not self._config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=False keeps no prefix; turn it on to pin one")
        _, ids = self._prompts.read(prompt)
        block_size = self._config.block_size
        num_full = len(ids) // block_size
        if not num_full:
            raise ValueError(
                f"a prefix of {len(ids)} tokens fills no block of {block_size}; pin a longer one, "
                "or use a smaller block_size"
            )
        return tuple(ids[: num_full * block_size]), cache_salt(prompt)
