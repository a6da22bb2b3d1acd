"""Sampling for a trainer in the same process: both find tokens as likely, whatever came between."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.demo_score import token_losses
from benchmarks.grpo_loop import make_batch, train_step
from pallas_paged.engine import LLM, RequestOutput, SamplingParams
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.models import load_model
from tests.engine.serving import assert_idle, reference_requests
from tests.models.references import DATA

TOLERANCE = 1e-4
MOVED = 0.1
"""What an update changes at least: a sampler without it, or with old keys, is found out."""
NUM_UPDATES = 2
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=20, logprobs=0, detokenize=False)
ENOUGH, TOO_FEW = {"num_blocks": 300}, {"num_blocks": 48}

Requests = Sequence[tuple[Sequence[int], Sequence[int]]]


def make_pair(name: str, **options: Any) -> tuple[LLM, Any]:
    """Returns an engine, and the trainer's model that it shares its weights with."""
    model: Any = load_model(DATA / name, dtype="float32")
    fixed = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "compilation_cache_dir": None,
        "background_compilation": False,
    }
    return LLM.from_model(model, **fixed | ENOUGH | options), model


def prompts_of(name: str) -> list[dict[str, list[int]]]:
    """Returns prompts of 3 to 18 tokens, three of which begin with the same blocks."""
    recorded = [r["prompt_token_ids"] for r in reference_requests(name)]
    some = [prompt for prompt in recorded if 3 <= len(prompt) <= 18][:5]
    longest = max(some, key=len)
    return [{"prompt_token_ids": p} for p in (*some, [*longest, 7], [*longest, 8, 9])]


def sampled(outputs: Sequence[RequestOutput]) -> tuple[Requests, list[np.ndarray]]:
    """Returns prompts and completions, and the sampler's log-probabilities of the latter."""
    pairs = [(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.outputs]
    logprobs = [np.array(c.token_logprobs, np.float32) for o in outputs for c in o.outputs]
    return pairs, logprobs


_losses = nnx.jit(token_losses)


def trainer_logprobs(model: Any, requests: Requests) -> list[np.ndarray]:
    """Returns the log-probabilities of each completion's tokens, by dense attention."""
    rows = np.zeros((len(requests), 48), np.int32)
    for row, (prompt, completion) in zip(rows, requests, strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    losses = np.asarray(_losses(model, jnp.asarray(rows)))
    return [
        -of_row[len(prompt) - 1 :][: len(completion)]
        for of_row, (prompt, completion) in zip(losses, requests, strict=True)
    ]


def difference(ours: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Returns the largest one between log-probabilities."""
    return max(float(abs(a - b).max()) for a, b in zip(ours, others, strict=True))


class Trainer:
    """Trains a model on what was sampled, and hands its weights to the engine."""

    def __init__(self, llm: LLM, model: Any):
        self.llm, self.model = llm, model
        self.optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def update(self, outputs: Sequence[RequestOutput]) -> None:
        """Makes one training step and updates the engine; asserts that this has moved weights."""
        requests, logprobs = sampled(outputs)
        advantages = np.where(np.arange(len(requests)) % 2, 1.0, -1.0).astype(np.float32)
        assert PARAMS.max_tokens is not None
        before = train_step(
            self.model, self.optimizer, make_batch(outputs, advantages, PARAMS.max_tokens)
        )
        assert float(before) < TOLERANCE
        assert difference(trainer_logprobs(self.model, requests), logprobs) > MOVED
        self.llm.update_weights(nnx.state(self.model))


def generate(llm: LLM, name: str) -> list[RequestOutput]:
    outputs = llm.generate(prompts_of(name), PARAMS, use_tqdm=False)
    assert_idle(llm)
    return outputs


def assert_agrees(llm: LLM, model: Any, outputs: Sequence[RequestOutput]) -> None:
    """Asserts that the trainer finds what was sampled as likely, and whose weights it came from."""
    requests, logprobs = sampled(outputs)
    assert difference(trainer_logprobs(model, requests), logprobs) < TOLERANCE
    versions = {version for o in outputs for c in o.outputs for version in c.weights_versions}
    assert versions == {llm.weights_version}


CASES = {
    "a step in a program": ("llama-gqa-llama3", {"num_scheduler_steps": 1}),
    "several steps in a program": ("llama-gqa-llama3", {"num_scheduler_steps": 4}),
    "recomputed": ("llama-gqa-llama3", {"num_scheduler_steps": 4, **TOO_FEW}),
    "swapped": ("llama-gqa-llama3", {"swap_space": 0.01, "preemption_mode": "swap", **TOO_FEW}),
    "not cached": ("mistral-sliding", {"enable_prefix_caching": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_sampler_and_trainer_agree_before_and_after_every_update(
    case: str, ran: list[Bucket]
) -> None:
    name, options = CASES[case]
    llm, model = make_pair(name, **options)
    trainer = Trainer(llm, model)
    preempted = hits = 0
    for turn in range(NUM_UPDATES + 1):
        for _ in range(2):  # the second time the prompts are cached
            outputs = generate(llm, name)
            assert_agrees(llm, model, outputs)
            preempted += sum(output.metrics.num_preemptions for output in outputs)
        hits += sum(output.num_cached_tokens for output in outputs)
        if turn < NUM_UPDATES:
            trainer.update(outputs)
    assert (preempted > 0) == (case in ("recomputed", "swapped"))
    assert (llm.kv_stats().num_swaps > 0) == (case == "swapped")
    assert (hits > 0) == (case != "not cached")
    assert any(bucket.num_steps > 1 for bucket in ran) == (case != "a step in a program")


@pytest.mark.parametrize("case", ["several steps in a program", "recomputed", "not cached"])
def test_scores_and_trainer_agree_before_and_after_every_update(case: str) -> None:
    name, options = CASES[case]
    llm, model = make_pair(name, **options)
    trainer = Trainer(llm, model)
    for turn in range(NUM_UPDATES + 1):
        outputs = generate(llm, name)
        requests, logprobs = sampled(outputs)
        scores = llm.score(*zip(*requests, strict=True))
        assert_idle(llm)
        assert all(score.dtype == np.float32 for score in scores)
        assert difference(scores, trainer_logprobs(model, requests)) < TOLERANCE
        assert difference(scores, logprobs) < TOLERANCE
        if turn < NUM_UPDATES:
            trainer.update(outputs)
            scores = llm.score(*zip(*requests, strict=True))  # of what older weights have sampled
            assert difference(scores, trainer_logprobs(model, requests)) < TOLERANCE
            assert difference(scores, logprobs) > MOVED
