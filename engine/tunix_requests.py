"""Between what Tunix asks of a rollout and this engine's requests.

Nothing here imports Tunix. For its models a token that equals the pad token is none, wherever it
stands: it is masked, and takes no position. So the engine never gets one. Sizes: B rows, P of
padded prompts, C of padded completions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_paged.engine.sampling_params import SamplingParams


class Group(NamedTuple):
    """Equal prompts, which are one request.

    Attributes:
      prompt: the tokens.
      places: where the prompts stand among all.
    """

    prompt: tuple[int, ...]
    places: tuple[int, ...]


class Row(NamedTuple):
    """A prompt and a completion without their padding.

    Attributes:
      prompt: the tokens.
      completion: likewise.
      columns: i32[n], where the completion's tokens stand in the padded row.
    """

    prompt: list[int]
    completion: list[int]
    columns: np.ndarray


def without_pads(prompt: Sequence[int], pad_id: int) -> list[int]:
    """Returns a prompt's tokens but those that equal the pad token.

    Raises:
      ValueError: its last one does, behind which Tunix's models compute something else.
    """
    if len(prompt) and prompt[-1] == pad_id:
        raise ValueError(
            f"a prompt's last token, {pad_id}, is the tokenizer's pad token, which Tunix's models "
            "leave out; give the tokenizer a pad_token of its own"
        )
    return [int(token) for token in prompt if token != pad_id]


def left_padded(prompts: Sequence[Sequence[int]], length: int | None, pad_id: int) -> np.ndarray:
    """Returns prompts as i32[B, P], padded on the left.

    P is `length`, or if a prompt is longer, or there is none, the least power of two that holds
    all: as Tunix's sampler has it.
    """
    longest = max(map(len, prompts))
    if length is None or length < longest:
        length = 1 << (longest - 1).bit_length()
    padded = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return padded


def grouped(prompts: Sequence[Sequence[int]], largest: int) -> list[Group]:
    """Returns groups of equal prompts, in the order of the first of each, `largest` in a group."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(place)
    return [
        Group(prompt, tuple(mine[begin : begin + largest]))
        for prompt, mine in places.items()
        for begin in range(0, len(mine), largest)
    ]


def seed_of(seed: Any, index: int) -> int | None:
    """Returns the seed of request `index` under a seed of Tunix's: an integer or one of JAX's keys.

    None if there is none: the engine then draws one.
    """
    if seed is None:
        return None
    if isinstance(seed, jax.Array) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    words = [int(word) % 2**64 for word in np.asarray(seed).ravel()]
    return int(np.random.SeedSequence([*words, index]).generate_state(1, np.uint64)[0])


def sampling_params(
    rollout_config: Any, ending_ids: Sequence[int], n: int, index: int
) -> SamplingParams:
    """Returns what a `RolloutConfig` asks of the request `index`, for `n` completions.

    Raises:
      ValueError: a field is out of its range; or there is a temperature and no `top_p`.
    """
    temperature, top_p = float(rollout_config.temperature), rollout_config.top_p
    if top_p is None and temperature > 0:
        raise ValueError(
            f"top_p=None with temperature={temperature}: of Tunix's own rollouts one is greedy "
            "then, and one samples; use top_p=1.0 to sample, or temperature=0.0"
        )
    return SamplingParams(
        n=1 if temperature == 0 else n,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(rollout_config.top_k or 0, 0),
        seed=seed_of(rollout_config.seed, index),
        max_tokens=rollout_config.max_tokens_to_generate,
        ignore_eos=True,
        stop_token_ids=ending_ids,
        logprobs=0 if rollout_config.return_logprobs else None,
        detokenize=False,
    )


def rows_of(prompts: np.ndarray, completions: np.ndarray, pad_id: int, eos_id: int) -> list[Row]:
    """Returns padded prompts and completions row by row.

    Where the pad token is EOS too, the first one behind a completion is taken for its EOS.

    Args:
      prompts: i32[B, P].
      completions: i32[B, C].
      pad_id: the pad token.
      eos_id: the EOS token.

    Raises:
      ValueError: see `without_pads`.
    """
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        is_real = completion != pad_id
        if pad_id == eos_id:
            end = len(is_real) - int(np.argmax(is_real[::-1])) if is_real.any() else 0
            is_real[end : end + 1] = True
        columns = np.flatnonzero(is_real)
        rows.append(Row(without_pads(prompt, pad_id), completion[columns].tolist(), columns))
    return rows
