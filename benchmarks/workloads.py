"""What requests ask for: prompts and output lengths, from a published data set or drawn.

ShareGPT and Alpaca are read as their authors published them, one JSON list; nothing is downloaded.
Without a data set, lengths are drawn from mixtures of two log-normal distributions whose means are
those that the paper gives for the two sets (Kwon et al. 2023, section 6.1), "strongly skewed,
long-tailed". How far outputs scatter is chosen by what the paper shows of memory: Fig. 2 says that
Orca (Max) holds 457 tokens per running request, which will be 756, so that outputs, each counted as
often as it is long, have a mean of 598 tokens on ShareGPT; on Alpaca it is some 118, by the 72.75
requests that Orca (Oracle) runs in Fig. 13b. The rest of the mixtures is our choice. Drawn prompts
are random tokens.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Encode = Callable[[str], Sequence[int]]


class Request(NamedTuple):
    """One request: its prompt, and how many tokens it generates, EOS or not."""

    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int


class Workload(NamedTuple):
    """Requests, and in words where they come from."""

    requests: list[Request]
    source: str

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Mean tokens of prompts and of outputs."""
        prompts = [len(request.prompt_token_ids) for request in self.requests]
        outputs = [request.num_output_tokens for request in self.requests]
        return float(np.mean(prompts)), float(np.mean(outputs))


class LogNormal(NamedTuple):
    """A log-normal distribution by its mean, and the standard deviation of its logarithm."""

    mean: float
    sigma: float


class Mixture(NamedTuple):
    """A mean, and how a share `short_weight` of the lengths is shorter; the rest makes it up."""

    mean: float
    short_weight: float
    short: LogNormal
    long_sigma: float

    @property
    def long(self) -> LogNormal:
        """The other component, whose mean gives the mixture the mean that it is to have."""
        rest = self.mean - self.short_weight * self.short.mean
        return LogNormal(rest / (1 - self.short_weight), self.long_sigma)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns f64[count]."""
        is_short = rng.random(count) < self.short_weight
        mean = np.where(is_short, self.short.mean, self.long.mean)
        sigma = np.where(is_short, self.short.sigma, self.long.sigma)
        return np.exp(np.log(mean) - sigma**2 / 2 + sigma * rng.standard_normal(count))


class Lengths(NamedTuple):
    """The distributions of a data set's prompts and outputs."""

    prompts: Mixture
    outputs: Mixture


LENGTHS = {
    "sharegpt": Lengths(
        Mixture(161.31, 0.7, LogNormal(40.0, 1.0), 1.0),
        Mixture(337.99, 0.3, LogNormal(60.0, 0.8), 0.62),
    ),
    "alpaca": Lengths(
        Mixture(19.31, 0.85, LogNormal(14.0, 0.45), 0.8),
        Mixture(58.45, 0.4, LogNormal(18.0, 0.7), 0.65),
    ),
}
"""The means are the paper's, in tokens."""


def draw(
    name: str,
    num_requests: int,
    *,
    scale: float,
    max_model_len: int,
    vocab_size: int,
    seed: int,
) -> Workload:
    """Returns requests with lengths of `LENGTHS[name]`, times `scale`; equal for equal arguments.

    Lengths are clipped: a prompt to what leaves room for one token, an output to what is left.
    """
    rng = np.random.default_rng(seed)
    lengths = LENGTHS[name]
    prompts, outputs = (
        np.maximum(1, np.rint(scale * mixture.draw(rng, num_requests))).astype(int)
        for mixture in lengths
    )
    clipped = int(np.sum(prompts + outputs > max_model_len))
    prompts = np.minimum(prompts, max_model_len - 1)
    outputs = np.minimum(outputs, max_model_len - prompts)
    requests = [
        Request(tuple(rng.integers(0, vocab_size, prompt).tolist()), output)
        for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True)
    ]
    by = "" if scale == 1 else f", lengths times {scale:g}"
    return Workload(
        requests,
        f"synthetic: log-normal mixture with {name}'s means{by}, seed {seed}; "
        f"{clipped} of {num_requests} clipped at {max_model_len} tokens",
    )


def draw_equal(
    num_requests: int, prompt_len: int, output_len: int, *, vocab_size: int, seed: int
) -> Workload:
    """Returns requests of one length, random tokens; equal for equal arguments."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (num_requests, prompt_len)).tolist()
    return Workload(
        [Request(tuple(prompt), output_len) for prompt in prompts],
        f"synthetic: {prompt_len} tokens of prompt, {output_len} of output, seed {seed}",
    )


def load(
    path: str | os.PathLike[str],
    num_requests: int | None,
    *,
    encode: Encode,
    max_model_len: int,
    seed: int,
) -> Workload:
    """Returns requests drawn without repetition from a ShareGPT or Alpaca file; None: all that fit.

    Of a ShareGPT conversation the first human turn that an answer follows is used, of an Alpaca
    entry the instruction with the input below it. What has no such pair, or does not fit the model,
    is left out and counted; nothing is shortened.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no JSON or of another form, or holds fewer requests that fit.
    """
    entries = _read_list(path)
    form, extract = _form_of(path, entries)
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    without, too_long = 0, 0
    for index in rng.permutation(len(entries)).tolist():
        if len(requests) == num_requests:
            break
        pair = extract(path, index, entries[index])
        if pair is None:
            without += 1
            continue
        try:
            prompt, output = (tuple(encode(text)) for text in pair)
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        if not prompt or not output:
            without += 1
        elif len(prompt) + len(output) > max_model_len:
            too_long += 1
        else:
            requests.append(Request(prompt, len(output)))
    left_out = (
        f"left out {without} without prompt and answer, {too_long} over {max_model_len} tokens"
    )
    if len(requests) < (1 if num_requests is None else num_requests):
        raise ValueError(
            f"{path}: {len(requests)} of its {len(entries)} entries can be used ({left_out}), and "
            f"num_requests={num_requests}; ask for fewer, or use a model with a longer context"
        )
    return Workload(requests, f"{form} file {os.path.basename(path)}, seed {seed}; {left_out}")


Extract = Callable[[Any, int, Any], tuple[str, str] | None]


def _read_list(path: str | os.PathLike[str]) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        try:
            entries = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not one JSON document ({error}); ShareGPT and Alpaca are published as "
                "one list, so turn JSON Lines into a list first"
            ) from error
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else type(entries).__name__
        raise ValueError(f"{path} must hold a list of ShareGPT or Alpaca entries, not {what}")
    return entries


def _form_of(path: str | os.PathLike[str], entries: list[Any]) -> tuple[str, Extract]:
    first = entries[0]
    keys = set(first) if isinstance(first, dict) else set()
    if "conversations" in keys:
        return "ShareGPT", _from_sharegpt
    if {"instruction", "output"} <= keys:
        return "Alpaca", _from_alpaca
    raise ValueError(
        f"{path} is neither ShareGPT (entries with 'conversations') nor Alpaca ('instruction', "
        f"'input', 'output'): its first entry is {first!r:.120}"
    )


def _from_sharegpt(path: Any, index: int, entry: Any) -> tuple[str, str] | None:
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: entry {index} must hold 'conversations', a list of objects with 'from' and "
            f"'value', not {entry!r:.120}"
        ) from error
    for (asker, prompt), (answerer, answer) in itertools.pairwise(turns):
        if asker in ("human", "user") and answerer in ("gpt", "chatgpt", "bing", "bard"):
            return _texts(path, index, prompt, answer)
    return None


def _from_alpaca(path: Any, index: int, entry: Any) -> tuple[str, str] | None:
    try:
        instruction, output = entry["instruction"], entry["output"]
        below = entry.get("input", "")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: entry {index} must hold 'instruction' and 'output', not {entry!r:.120}"
        ) from error
    if not instruction or not output:
        return None
    instruction, output, below = _texts(path, index, instruction, output, below or "")
    return (f"{instruction}\n{below}" if below else instruction), output


def _texts(path: Any, index: int, *values: Any) -> tuple[Any, ...]:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{path}: entry {index} holds {value!r:.80} in the place of a text")
    return values


def check_scale(scale: float) -> float:
    """Returns `scale`; raises `ValueError` unless it is positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"length_scale={scale} must be positive and finite")
    return scale
