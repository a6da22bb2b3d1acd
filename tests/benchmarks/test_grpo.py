"""The plain GRPO loop: it learns what it is rewarded for, on log-probabilities that agree."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks.grpo_loop import make_batch
from pallas_paged.engine import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tests.programs import run_program

SEED = 0
RISE = 0.5
"""Of the mean reward, from the first five steps to the last five; for each of eight seeds 0.65."""


def output(prompt: tuple[int, ...], *completions: tuple[int, ...]) -> RequestOutput:
    """Returns an output whose tokens' log-probabilities are their negative ids."""
    outputs = tuple(
        CompletionOutput(i, None, tokens, logprobs=tuple({t: Logprob(-t, 1)} for t in tokens))
        for i, tokens in enumerate(completions)
    )
    return RequestOutput("request-0", None, prompt, outputs, True, RequestMetrics(0.0))


def test_rows_are_padded_behind_and_figures_stand_where_tokens_are_predicted() -> None:
    groups = [output((1, 2, 3), (4,), (5, 6)), output((7,), (8, 9), ())]
    batch = make_batch(groups, np.array([[0.5, -0.5], [1.0, -1.0]], np.float32), max_tokens=2)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 0],
        [1, 2, 3, 5, 6],
        [7, 8, 9, 0, 0],
        [7, 0, 0, 0, 0],
    ]
    assert batch.logprobs.tolist() == [
        [0, 0, -4, 0],
        [0, 0, -5, -6],
        [-8, -9, 0, 0],
        [0, 0, 0, 0],
    ]
    assert batch.is_sampled.tolist() == (np.asarray(batch.logprobs) != 0).tolist()
    assert batch.advantages.tolist() == [[0.5], [-0.5], [1.0], [-1.0]]


@pytest.mark.slow
def test_the_reward_rises(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "figures.json"
    done = run_program("benchmarks.grpo", "--steps=30", f"--seed={SEED}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 31
    steps = json.loads(file.read_text())
    rewards = [step["reward"] for step in steps]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + RISE
    assert max(step["difference"] for step in steps) < 1e-4
