"""`LLM.score` against log-probabilities that requests get, and against a dense forward pass."""

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models import CausalLM, load_model
from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.demo import DEMO_MODEL

OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "num_blocks": 129, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(DEMO_MODEL, "float32")


@pytest.fixture(scope="module")
def llm(model: CausalLM) -> LLM:
    return LLM.from_model(model, DEMO_MODEL, **OPTIONS)


def dense(
    model: CausalLM, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> np.ndarray:
    ids = jnp.array([*prompt, *completion], jnp.int32)
    caches = (None,) * model.config.num_layers
    hidden, _ = model(ids, dense_metadata(1, len(ids)), caches, attend=dense_attend)
    found = jax.nn.log_softmax(model.compute_logits(hidden) / temperature)[len(prompt) - 1 : -1]
    return np.asarray(found[jnp.arange(len(completion)), jnp.array(completion)])


def cases(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of all lengths around a chunk's, a block's, and the longest."""
    rng = np.random.default_rng(seed)
    sizes = [
        (1, 1),
        (1, 40),
        (40, 1),
        (16, 16),
        (63, 2),
        (64, 1),
        (65, 70),
        (130, 33),
        (512 - 9, 9),
    ]
    return [tuple(rng.integers(2, 2048, n).tolist() for n in pair) for pair in sizes]  # type: ignore[misc]


def test_scores_are_those_of_a_dense_forward_pass(llm: LLM, model: CausalLM) -> None:
    pairs = cases()
    found = llm.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, completion), mine in zip(pairs, found, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, dense(model, prompt, completion), rtol=0, atol=1e-4)
    llm.engine.check_idle()
    assert not llm.engine.memory.prefix_cache  # nothing is kept


def test_the_sampled_tokens_have_their_scores(llm: LLM) -> None:
    params = SamplingParams(temperature=1, n=4, seed=5, max_tokens=30, logprobs=0)
    (output,) = llm.generate("class Stack:\n    def push(", params, use_tqdm=False)
    completions = [list(one.token_ids) for one in output.outputs]
    found = llm.score([list(output.prompt_token_ids)] * 4, completions)
    for one, mine in zip(output.outputs, found, strict=True):
        assert one.logprobs is not None
        sampled = [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)]
        np.testing.assert_allclose(mine, sampled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2])
def test_a_temperature_divides_the_logits(llm: LLM, model: CausalLM, temperature: float) -> None:
    pairs = cases(2)[:4]
    found = llm.score([p for p, _ in pairs], [c for _, c in pairs], temperature=temperature)
    for pair, mine in zip(pairs, found, strict=True):
        np.testing.assert_allclose(mine, dense(model, *pair, temperature), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), "1"])
def test_no_temperature(llm: LLM, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature="):
        llm.score([[1]], [[2]], temperature=temperature)


def test_texts_are_split_and_one_pair_needs_no_list(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    text = "    return x + 1\n"
    (found,) = llm.score("def f(x):\n", text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    (again,) = llm.score(tokenizer.encode("def f(x):\n"), ids)
    np.testing.assert_array_equal(found, again)
    assert len(found) == len(ids)
    assert llm.score([], []) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a", "b"], ["c"], "2 prompts need as many completions, and there are 1"),
        (["a", "b"], ["c", ""], r"prompts\[1\]: completion='' has no tokens"),
        ([[1], [2]], [[1], [9999]], r"prompts\[1\]: .*9999"),
        ([[1], []], [[1], [2]], r"prompts\[1\]: "),
        ([[1] * 500], [[1] * 13], r"a prompt of 500 tokens and a completion of 13 are more than"),
    ],
)
def test_what_cannot_be_scored(llm: LLM, prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.score(prompts, completions)
    llm.engine.check_idle()


def test_scores_survive_preemption(llm: LLM, model: CausalLM) -> None:
    """Each position is scored once, however often its prompt is computed."""
    pairs = [(p[:200], c[:20]) for p, c in cases(1)]
    expected = [dense(model, *pair) for pair in pairs]
    llm.score([p for p, _ in pairs], [c for _, c in pairs])  # compiles
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(llm.score([p for p, _ in pairs], [c for _, c in pairs]))
    )
    before = llm.engine.core.scheduler.num_preemptions
    thread.start()
    while thread.is_alive():
        llm.update_weights(model, mode="keep")  # lets all that is under way start over
        time.sleep(0.02)
    thread.join()
    assert llm.engine.core.scheduler.num_preemptions > before
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
