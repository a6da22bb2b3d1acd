"""What Tunix asks of a rollout as this engine's requests; Tunix itself is in `tests/with_tunix`."""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import pytest

from pallas_paged.engine import LLM
from pallas_paged.engine.tunix_requests import (
    Group,
    grouped,
    left_padded,
    rows_of,
    sampling_params,
    seed_of,
    without_pads,
)
from pallas_paged.models.demo import DEMO_MODEL


@dataclasses.dataclass
class RolloutConfig:
    """The fields of Tunix's that are read, with its defaults."""

    max_tokens_to_generate: int = 64
    temperature: float = 0.9
    top_p: float | None = 1.0
    top_k: int | None = None
    seed: Any = None
    return_logprobs: bool = False


def test_equal_prompts_are_one_group_in_the_order_of_the_first() -> None:
    assert grouped([[1], [2, 3], [1], [1], [2, 3]], 8) == [
        Group((1,), (0, 2, 3)),
        Group((2, 3), (1, 4)),
    ]


def test_a_group_is_not_larger_than_what_runs_at_once() -> None:
    assert [group.places for group in grouped([[1]] * 5, 2)] == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize(
    ("prompts", "length", "padded"),
    [
        ([[5], [6, 7]], 3, [[0, 0, 5], [0, 6, 7]]),
        ([[5], [6, 7]], 2, [[0, 5], [6, 7]]),
        ([[5, 6, 7], [8]], 2, [[0, 5, 6, 7], [0, 0, 0, 8]]),
        ([[5, 6, 7, 8]], None, [[5, 6, 7, 8]]),
    ],
)
def test_prompts_are_padded_on_the_left_and_never_cut(
    prompts: list[list[int]], length: int | None, padded: list[list[int]]
) -> None:
    found = left_padded(prompts, length, 0)
    assert found.dtype == np.int32
    assert found.tolist() == padded


def test_pad_tokens_are_left_out_of_prompts() -> None:
    assert without_pads([1, 5, 1, 6], 1) == [5, 6]
    with pytest.raises(ValueError, match=r"last token, 1, is the tokenizer's pad token"):
        without_pads([5, 1], 1)


def test_rows_lose_their_padding() -> None:
    prompts, completions = np.array([[0, 0, 5], [6, 7, 8]]), np.array([[9, 3, 0, 0], [9, 9, 9, 9]])
    first, second = rows_of(prompts, completions, pad_id=0, eos_id=3)
    assert (first.prompt, first.completion, first.columns.tolist()) == ([5], [9, 3], [0, 1])
    assert (second.prompt, second.completion) == ([6, 7, 8], [9, 9, 9, 9])


@pytest.mark.parametrize(
    ("completion", "kept", "columns"),
    [
        ([9, 3, 3, 3], [9, 3], [0, 1]),
        ([9, 9, 9, 9], [9, 9, 9, 9], [0, 1, 2, 3]),
        ([9, 9, 9, 3], [9, 9, 9, 3], [0, 1, 2, 3]),
        ([3, 3, 3, 3], [3], [0]),
        ([9, 3, 9, 3], [9, 9, 3], [0, 2, 3]),
    ],
)
def test_one_eos_stays_where_padding_is_eos(
    completion: list[int], kept: list[int], columns: list[int]
) -> None:
    (row,) = rows_of(np.array([[5]]), np.array([completion]), pad_id=3, eos_id=3)
    assert (row.completion, row.columns.tolist()) == (kept, columns)


def test_seeds_are_of_the_request_and_of_all_kinds_of_seeds() -> None:
    kinds = [0, 7, 2**63, jax.random.PRNGKey(7), jax.random.key(8), np.array([1, 2], np.uint32)]
    found = [seed_of(seed, index) for seed in kinds for index in range(3)]
    assert len(set(found)) == len(found)
    assert all(isinstance(seed, int) and 0 <= seed < 2**64 for seed in found)
    assert seed_of(jax.random.key(7), 1) == seed_of(jax.random.PRNGKey(7), 1)
    assert seed_of(None, 0) is None


def test_what_a_rollout_config_asks_for() -> None:
    config = RolloutConfig(temperature=1.0, top_p=0.8, top_k=5, seed=3, return_logprobs=True)
    params = sampling_params(config, [1, 2], n=4, index=0)
    assert (params.n, params.temperature, params.top_p, params.top_k) == (4, 1.0, 0.8, 5)
    assert (params.max_tokens, params.logprobs, params.seed) == (64, 0, seed_of(3, 0))
    assert (params.ignore_eos, params.stop_token_ids, params.detokenize) == (True, (1, 2), False)
    plain = sampling_params(RolloutConfig(top_k=-1), [1], n=4, index=0)
    assert (plain.temperature, plain.top_k, plain.logprobs, plain.seed) == (0.9, 0, None, None)


@pytest.mark.parametrize("top_p", [None, 1.0, 0.5])
def test_equal_greedy_completions_are_computed_once(top_p: float | None) -> None:
    params = sampling_params(RolloutConfig(temperature=0.0, top_p=top_p), [1], n=4, index=0)
    assert (params.n, params.temperature) == (1, 0)


def test_what_is_not_clear_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_p=None with temperature=0.9.*use top_p=1.0"):
        sampling_params(RolloutConfig(top_p=None), [1], n=1, index=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        str(DEMO_MODEL),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_blocks=100,
        max_model_len=128,
        block_size=4,
    )


def test_a_group_shares_its_prompt_and_each_sample_differs(llm: LLM) -> None:
    """A request of four computes its prompt once, and holds the full blocks of it once."""
    prompt = list(range(10, 31))
    groups = grouped([prompt] * 4, llm.config.max_num_seqs)
    params = [
        sampling_params(RolloutConfig(max_tokens_to_generate=6, seed=1), [1], len(g.places), i)
        for i, g in enumerate(groups)
    ]
    before = llm.engine.core.num_generated_tokens
    most, outputs = 0, []
    for output in llm.stream([{"prompt_token_ids": list(groups[0].prompt)}], params):
        most = max(most, llm.kv_stats().num_allocated_blocks)
        outputs.append(output)
    output = outputs[-1]
    assert len(groups) == 1
    assert len({each.token_ids for each in output.outputs}) == 4
    assert llm.engine.core.num_generated_tokens - before == sum(
        len(each.token_ids) for each in output.outputs
    )
    full, own = len(prompt) // 4, -(-(len(prompt) % 4 + 6) // 4)
    assert 0 < most <= full + 4 * own


def test_without_tunix_an_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tunix", None)
    monkeypatch.delitem(sys.modules, "pallas_paged.engine.tunix", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'pallas-paged\[tunix\]'"):
        __import__("pallas_paged.engine.tunix")
