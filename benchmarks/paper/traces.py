"""What the figures serve: requests by data set, at Poisson arrivals, equal for equal seeds.

- `sharegpt`, `alpaca`: lengths of published files, or of `workloads.LENGTHS`; tokens are random.
- `translation`: of the WMT16 English-to-German task, with a common prefix of 80 or 341 tokens
  (Fig. 16). The prefixes are one and five examples, so that an example has about 65 tokens: half of
  that, 32, are the means of prompts and outputs here.
- `chat`: prompts are the last 1,024 tokens of a conversation, outputs have at most 1,024 (Fig. 17).
  A conversation has a geometric number of rounds, 4 on average, with ShareGPT's lengths.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib

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


_PIECE = 1024
"""Requests that are drawn from one stream: the first of many are those of few."""
_ROUNDS, _TOKENS = 2, 3
"""Streams beside that of the lengths, which `arrivals` must not share either."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where requests come from.

    Attributes:
      name: `sharegpt`, `alpaca`, `translation` or `chat`.
      prefix: tokens that all prompts begin with.
      lengths: file of i32[n, 2], tokens of prompts and outputs of a published data set, see
        `count_lengths`; None for drawn lengths.
      file: what that was made of.
    """

    name: str
    prefix: int = 0
    lengths: str | None = None
    file: str | None = None

    @property
    def source(self) -> str:
        """In words."""
        return "drawn lengths" if self.file is None else f"file {self.file}"


def draw(data: Data, num_requests: int, seed: int) -> list[Request]:
    """Returns requests; equal for equal arguments, and the first of those of larger numbers."""
    requests: list[Request] = []
    for number in range(-(-num_requests // _PIECE)):
        requests += _piece(data, int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    return requests[:num_requests]


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Returns the seconds at which they arrive; at another rate the same, stretched."""
    times: list[float] = arrival_times(num_requests, rate, 1.0, seed).tolist()
    return times


def count_lengths(path: str, tokenizer_folder: str, folder: pathlib.Path) -> Data:
    """Returns the data of a ShareGPT or Alpaca file, whose tokens it counts into `folder`.

    Only lengths are kept, under a name that holds a hash of both, so that another file or tokenizer
    is other data. What does not fit the model is left out.

    Raises:
      ValueError, FileNotFoundError: see `workloads.load`; or there is no such tokenizer.
    """
    tokenizer = require_tokenizer(load_tokenizer(tokenizer_folder), tokenizer_folder)
    digest = hashlib.sha256(pathlib.Path(path).read_bytes())
    for file in sorted(pathlib.Path(tokenizer_folder).glob("token*")):
        digest.update(file.read_bytes())
    lengths = folder / f"lengths-{digest.hexdigest()[:16]}.npy"
    if not lengths.exists():
        found = workloads.load(
            path, None, encode=tokenizer.encode, max_model_len=MAX_MODEL_LEN, seed=0
        )
        pairs = [(len(one.prompt_token_ids), one.num_output_tokens) for one in found.requests]
        np.save(lengths, np.array(pairs, np.int32))
    return Data("", lengths=str(lengths), file=os.path.basename(path))


@functools.lru_cache(maxsize=2)
def _all_lengths(path: str) -> np.ndarray:
    lengths: np.ndarray = np.load(path)
    return lengths


def _piece(data: Data, seed: int) -> list[Request]:
    """Returns `_PIECE` requests."""
    if data.name == "chat":
        return _chats(data, seed)
    if data.name == "translation":
        return _translations(data.prefix, seed)
    return _plain(data, _PIECE, seed)


def _plain(data: Data, num_requests: int, seed: int) -> list[Request]:
    if data.lengths is None:
        return workloads.draw(
            data.name,
            num_requests,
            scale=1.0,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            seed=seed,
        ).requests
    every, rng = _all_lengths(data.lengths), np.random.default_rng(seed)
    picked = every[rng.integers(0, len(every), num_requests)]
    return [
        Request(tuple(rng.integers(0, VOCAB_SIZE, prompt).tolist()), output)
        for prompt, output in picked.tolist()
    ]


def _translations(prefix: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(prefix).integers(0, VOCAB_SIZE, prefix).tolist()
    lengths = (np.maximum(1, np.rint(_TRANSLATION.draw(rng, _PIECE))).astype(int) for _ in range(2))
    return [
        Request((*common, *rng.integers(0, VOCAB_SIZE, prompt).tolist()), output)
        for prompt, output in zip(*(counts.tolist() for counts in lengths), strict=True)
    ]


def _chats(data: Data, seed: int) -> list[Request]:
    rounds = np.random.default_rng([seed, _ROUNDS]).geometric(1 / MEAN_ROUNDS, _PIECE)
    rng = np.random.default_rng([seed, _TOKENS])
    plain = dataclasses.replace(data, name="sharegpt")
    drawn = iter(_plain(plain, int(rounds.sum()), seed))
    requests = []
    for count in rounds.tolist():
        history: list[int] = []
        for number in range(count):
            prompt, num_output = next(drawn)
            history += prompt
            if number + 1 < count:
                history += rng.integers(0, VOCAB_SIZE, num_output).tolist()
        last = tuple(history[-CHAT_TOKENS:])
        room = min(CHAT_TOKENS, MAX_MODEL_LEN - len(last))
        requests.append(Request(last, min(num_output, room)))
    return requests
