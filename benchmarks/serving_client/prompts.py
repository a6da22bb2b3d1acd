"""Makes requests for servers out of workloads, other ones for each run.

A server that keeps prefixes would find the prompts of an earlier run in its cache. So runs get
other entries of a data set; and drawn prompts get other tokens, in the same lengths.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving_client.load import Outgoing
from benchmarks.workloads import Request
from pallas_paged.engine.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROOM = {"tokens": 0, COMPLETIONS: 8, CHAT: 64}
"""Tokens that a server may add to a prompt: to token ids, to a text, to the message of a chat."""


class Supply(NamedTuple):
    """Requests of runs.

    Attributes:
      requests: one run's, or those of all runs and of the warm-up, one behind the other.
      num_prompts: how many each run has.
      vocab_size: tokens to draw from anew for each run; None: prompts stay as they are.
      is_same: whether all runs have the same ones.
      seed: of what is drawn.
    """

    requests: Sequence[Request]
    num_prompts: int
    vocab_size: int | None = None
    is_same: bool = False
    seed: int = 0

    def of_run(self, index: int) -> list[Request]:
        """Returns the requests of a run, the same ones for the same index."""
        if self.vocab_size is not None and not self.is_same:
            seed = (self.seed, 1 + index)
            return redraw(self.requests[: self.num_prompts], self.vocab_size, seed)
        first = 0 if self.is_same else index * self.num_prompts
        return list(self.requests[first : first + self.num_prompts])

    def of_warm_up(self, count: int) -> list[Request]:
        """Returns requests that no run has, unless all have the same ones."""
        if self.vocab_size is None and not self.is_same:
            return list(self.requests[len(self.requests) - count :])
        chosen = [self.requests[i % self.num_prompts] for i in range(count)]
        if self.vocab_size is None:
            return chosen
        return redraw(chosen, self.vocab_size, (self.seed, 0))


def redraw(requests: Sequence[Request], vocab_size: int, seed: Sequence[int]) -> list[Request]:
    """Returns requests of the same lengths with random tokens."""
    rng = np.random.default_rng(seed)
    return [
        request._replace(
            prompt_token_ids=tuple(
                rng.integers(0, vocab_size, len(request.prompt_token_ids)).tolist()
            )
        )
        for request in requests
    ]


def text_of(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns a text of about so many tokens, special ones included; exactly, if they are a text's.

    Random tokens make a text that is split in another way, mostly into more: it is cut to the same
    number.
    """
    text = tokenizer.decode(token_ids)
    found = tokenizer.encode(text)
    return text if len(found) <= len(token_ids) else tokenizer.decode(found[: len(token_ids)])


def outgoing(
    prompt: str | Sequence[int],
    num_output_tokens: int,
    *,
    endpoint: str,
    model: str,
    options: Mapping[str, Any],
) -> Outgoing:
    """Returns a request for a stream.

    Args:
      prompt: a text, or token ids for `COMPLETIONS`.
      num_output_tokens: as `max_tokens`, which more servers know than its successors.
      endpoint: `COMPLETIONS` or `CHAT`, where the prompt is the message of a user.
      model: its name.
      options: more fields.
    """
    fields: dict[str, Any] = {"model": model, "prompt": prompt}
    if endpoint == CHAT:
        fields = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    fields |= {
        "max_tokens": num_output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    return Outgoing(json.dumps(fields, separators=(",", ":")).encode(), num_output_tokens)
