"""GRPO in plain JAX, for any model of the package: a batch, a training step, and the loop.

They follow Shao et al., 2024 (arXiv:2402.03300), but nothing keeps the policy near a reference, and
all tokens of a batch count the same, as in Yu et al., 2025 (arXiv:2503.14476).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.demo_score import token_losses
from pallas_paged.engine import LLM, CompletionOutput, RequestOutput, SamplingParams

EPOCHS = 2
"""Times a batch is trained on. The first time its ratios are 1, but for rounding."""
CLIP = 0.2
"""How far from 1 a ratio may go and still give a gradient."""


class Batch(NamedTuple):
    """Completions, one in each row, padded behind.

    Attributes:
      tokens: i32[rows, length], prompt and completion.
      logprobs: f32[rows, length - 1], the sampler's of `tokens[:, 1:]` where they are sampled.
      is_sampled: bool[rows, length - 1], where that is.
      advantages: f32[rows, 1].
    """

    tokens: jax.Array
    logprobs: jax.Array
    is_sampled: jax.Array
    advantages: jax.Array


class Step(NamedTuple):
    """What a step of the loop did.

    Attributes:
      reward: mean of its completions.
      difference: the largest between the sampler's and the trainer's log-probability of a token,
        before the weights change.
      sample_s: seconds of sampling.
      train_s: of training.
      update_s: of handing the weights over.
    """

    reward: float
    difference: float
    sample_s: float
    train_s: float
    update_s: float


def make_batch(groups: Sequence[RequestOutput], advantages: np.ndarray, max_tokens: int) -> Batch:
    """Returns groups, and f32[groups, completions], in one shape for prompts of such lengths."""
    rows = [(group.prompt_token_ids, c) for group in groups for c in group.outputs]
    length = max(len(prompt) for prompt, _ in rows) + max_tokens
    tokens = np.zeros((len(rows), length), np.int32)
    logprobs = np.zeros((len(rows), length - 1), np.float32)
    is_sampled = np.zeros((len(rows), length - 1), bool)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion.token_ids)
        tokens[row, :end] = prompt + completion.token_ids  # causal: nothing sees what is behind
        logprobs[row, len(prompt) - 1 : end - 1] = completion.token_logprobs
        is_sampled[row, len(prompt) - 1 : end - 1] = True
    return Batch(*map(jnp.asarray, (tokens, logprobs, is_sampled, advantages.reshape(-1, 1))))


@nnx.jit  # donates nothing: until `update_weights` the engine samples with these very arrays
def train_step(model: Any, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    """Trains `model`; returns how far its log-probabilities were from the sampler's."""

    def loss_of(model: Any) -> tuple[jax.Array, jax.Array]:
        change = -token_losses(model, batch.tokens) - batch.logprobs
        change = jnp.where(batch.is_sampled, change, 0.0)
        ratio = jnp.exp(change)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        gain = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)
        return -gain.mean(where=batch.is_sampled), jnp.abs(change).max()

    gradients, difference = nnx.grad(loss_of, has_aux=True)(model)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        optimizer.update(model, gradients)
    return difference


def grpo(
    llm: LLM,
    model: Any,
    optimizer: nnx.Optimizer,
    prompts: Sequence[str],
    reward: Callable[[CompletionOutput], float],
    params: SamplingParams,
    num_steps: int,
) -> Iterator[Step]:
    """Trains `model`, whose weights `llm` has, and yields what each step did."""
    assert params.max_tokens is not None
    for _ in range(num_steps):
        times = [time.monotonic()]
        groups = llm.generate(prompts, params, use_tqdm=False)
        times.append(time.monotonic())
        rewards = np.array([[reward(c) for c in group.outputs] for group in groups], np.float32)
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        advantages = centred / (rewards.std(axis=1, keepdims=True) + 1e-4)
        batch = make_batch(groups, advantages, params.max_tokens)
        differences = [float(train_step(model, optimizer, batch)) for _ in range(EPOCHS)]
        times.append(time.monotonic())
        llm.update_weights(nnx.state(model))
        times.append(time.monotonic())
        yield Step(float(rewards.mean()), differences[0], *np.diff(times).tolist())
