"""What the figures serve: requests by data set, at Poisson arrivals, equal for equal seeds.

- `sharegpt`, `alpaca`: published files, or lengths of `workloads.LENGTHS`.
- `translation`: of the WMT16 English-to-German task, with a common prefix of 80 or 341 tokens
  (Fig. 16). The prefixes are one and five examples, so that an example has about 65 tokens: half of
  that, 32, are the means of prompts and outputs here.
- `chat`: prompts are the last 1,024 tokens of a conversation, outputs have at most 1,024 (Fig. 17).
  A conversation has a geometric number of rounds, 4 on average, with ShareGPT's lengths.
"""

import dataclasses
import functools

import numpy as np

from benchmarks import workloads
from benchmarks.arrivals import arrival_times
from benchmarks.workloads import LogNormal, Mixture, Request
from pallas_paged.engine.text.tokenizer import load_tokenizer, require_tokenizer

MAX_MODEL_LEN = 2048
VOCAB_SIZE = 32_000
MEAN_ROUNDS = 4
CHAT_TOKENS = 1024
_TRANSLATION = Mixture(32.0, 0.5, LogNormal(24.0, 0.4), 0.4)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where requests come from.

    Attributes:
      name: `sharegpt`, `alpaca`, `translation` or `chat`.
      prefix: tokens that all prompts begin with.
      path: a published file, or None for drawn lengths.
      tokenizer: the folder of the tokenizer that counts the file's tokens.
    """

    name: str
    prefix: int = 0
    path: str | None = None
    tokenizer: str | None = None

    @property
    def source(self) -> str:
        """In words."""
        return "drawn lengths" if self.path is None else f"file {self.path.rsplit('/', 1)[-1]}"


def draw(data: Data, num_requests: int, seed: int) -> list[Request]:
    """Returns requests; equal for equal arguments."""
    if data.name == "chat":
        return _chats(data, num_requests, seed)
    if data.path is not None:
        every = _loaded(data)
        picked = np.random.default_rng(seed).integers(0, len(every), num_requests)
        return [every[index] for index in picked.tolist()]
    if data.name == "translation":
        return _translations(data.prefix, num_requests, seed)
    return workloads.draw(
        data.name,
        num_requests,
        scale=1.0,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        seed=seed,
    ).requests


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Returns the seconds at which they arrive."""
    times: list[float] = arrival_times(num_requests, rate, 1.0, seed).tolist()
    return times


@functools.cache
def _loaded(data: Data) -> list[Request]:
    """Returns all requests of a file that fit."""
    assert data.path is not None
    assert data.tokenizer is not None
    tokenizer = require_tokenizer(load_tokenizer(data.tokenizer), data.tokenizer)
    return workloads.load(
        data.path, None, encode=tokenizer.encode, max_model_len=MAX_MODEL_LEN, seed=0
    ).requests


def _translations(prefix: int, num_requests: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB_SIZE, prefix).tolist()
    lengths = (
        np.maximum(1, np.rint(_TRANSLATION.draw(rng, num_requests))).astype(int) for _ in range(2)
    )
    return [
        Request((*common, *rng.integers(0, VOCAB_SIZE, prompt).tolist()), output)
        for prompt, output in zip(*(counts.tolist() for counts in lengths), strict=True)
    ]


def _chats(data: Data, num_requests: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    rounds = rng.geometric(1 / MEAN_ROUNDS, num_requests)
    plain = dataclasses.replace(data, name="sharegpt")
    drawn = iter(draw(plain, int(rounds.sum()), seed))
    requests = []
    for count in rounds.tolist():
        history: list[int] = []
        for number in range(count):
            prompt, num_output = next(drawn)
            history += prompt
            if number + 1 < count:
                history += rng.integers(0, VOCAB_SIZE, num_output).tolist()
        prompt = tuple(history[-CHAT_TOKENS:])
        requests.append(Request(prompt, min(num_output, CHAT_TOKENS, MAX_MODEL_LEN - len(prompt))))
    return requests
