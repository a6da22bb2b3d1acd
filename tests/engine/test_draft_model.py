"""A small model guesses tokens: the same outputs, in fewer steps, whatever it guesses."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from pallas_paged.engine import LLM, BeamSearchParams, SamplingParams
from pallas_paged.engine.compiling import prepare
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.speculation import (
    DraftModelSettings,
    ModelProposer,
    Proposer,
    speculation_settings,
)
from pallas_paged.models import load_config
from tests.engine import bigram_model
from tests.engine.serving import assert_idle, make_llm
from tests.models.references import DATA

MODEL, OTHER = "llama-mqa-linear", "llama-mha-tied"
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, seed=5)


def drafted(name: str = MODEL, count: int = 3, **others: Any) -> dict[str, Any]:
    method = {"method": "draft_model", "model": str(DATA / name), "num_speculative_tokens": count}
    return method | others


LIMITS = {"max_num_seqs": 8, "max_model_len": 128}


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert_idle(llm)
    return [list(c.token_ids) for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def plain() -> LLM:
    """An engine where nobody guesses, with room for all, that makes one step at a time.

    What others must be equal to, whatever their memory, blocks and chunks.
    """
    return make_llm(MODEL, **LIMITS, num_scheduler_steps=1)


def proposer_of(llm: LLM) -> Proposer:
    proposer = llm.engine.core.scheduler.proposer
    assert proposer is not None
    return proposer


PROMPTS = [[3], [*range(4, 30)], [9, 8, 7], [*range(5, 70)]]


@pytest.mark.parametrize(
    ("params", "block_size"), [(GREEDY, 16), (SAMPLED, 4)], ids=["greedy", "sampled"]
)
def test_a_model_that_guesses_for_itself_is_always_right(
    plain: LLM, params: SamplingParams, block_size: int
) -> None:
    """So its keys and values are right at every place, and there are blocks for all of them."""
    llm = make_llm(MODEL, **LIMITS, speculative_config=drafted(), block_size=block_size)
    num_before = plain.engine.core.num_steps
    assert run(llm, PROMPTS, params) == run(plain, PROMPTS, params)
    proposer = proposer_of(llm)
    # There is no room yet for guesses behind a prompt that has just been admitted.
    most_wrong = 0 if block_size == 16 else 3 * len(PROMPTS)
    assert proposer.num_drafts > 100
    assert proposer.num_drafts - proposer.num_accepted <= most_wrong
    assert llm.engine.core.num_steps < 0.4 * (plain.engine.core.num_steps - num_before)


REQUESTS: list[tuple[list[int], Any]] = [
    ([3, 4], GREEDY),
    ([*range(4, 30)], dataclasses.replace(SAMPLED, n=3)),
    ([*range(4, 34)], dataclasses.replace(SAMPLED, seed=9, max_tokens=25)),
    ([5, 6, 7], dataclasses.replace(GREEDY, logprobs=2)),
    ([5, 6, 8], dataclasses.replace(GREEDY, repetition_penalty=1.3)),
    ([9] * 40, dataclasses.replace(GREEDY, max_tokens=1)),
    ([7, 8], dataclasses.replace(GREEDY, stop_token_ids=[5, 6, 7, 8, 9, 10], ignore_eos=False)),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (MODEL, {"num_blocks": 400}),
        (OTHER, {"num_blocks": 60, "block_size": 4}),
        (
            MODEL,
            {"num_blocks": 60, "block_size": 4, "swap_space": 0.01, "preemption_mode": "swap"},
        ),
        (OTHER, {"num_blocks": 400, "max_num_batched_tokens": 16, "async_scheduling": False}),
    ],
    ids=["itself, room", "another, recompute", "itself, swap", "another, chunks"],
)
def test_the_same_outputs_whoever_guesses(plain: LLM, name: str, options: dict[str, Any]) -> None:
    prompts, params = map(list, zip(*REQUESTS, strict=True))
    llm = make_llm(MODEL, **LIMITS | options, speculative_config=drafted(name, min_gain=0))
    assert run(llm, prompts, params) == run(plain, prompts, params)
    assert proposer_of(llm).num_accepted > 0
    if options["num_blocks"] == 60:
        assert llm.engine.core.scheduler.num_preemptions


def test_beside_beams(plain: LLM) -> None:
    other = make_llm(MODEL, **LIMITS, speculative_config=drafted())
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    beams = BeamSearchParams(beam_width=2, max_tokens=12, ignore_eos=True)
    for one in (plain, other):
        for index, prompt in enumerate(prompts):
            params = beams if index < 2 else GREEDY
            one.engine.add(
                one.engine.make_group(prompt["prompt_token_ids"], params, request_id=f"{index}")
            )
    found = []
    for one in (plain, other):
        done: dict[str, Any] = {}
        while one.engine.has_unfinished:
            for output in one.engine.step():
                done[output.request_id] = [list(c.token_ids) for c in output.outputs]
        found.append(done)
        one.engine.check_idle()
    assert found[0] == found[1]


def test_a_cached_prefix_has_the_small_models_keys_too() -> None:
    """The second time nothing of the prompt is computed, and the guesses are as good."""
    llm = make_llm(MODEL, max_num_seqs=2, speculative_config=drafted(), block_size=4)
    prompt = [{"prompt_token_ids": [*range(3, 60)]}]
    for _ in range(2):
        llm.generate(prompt, GREEDY, use_tqdm=False)
    proposer = proposer_of(llm)
    assert proposer.num_accepted == proposer.num_drafts > 0
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    assert metrics["vllm:prefix_cache_hits"] > 40


def test_who_gains_nothing_goes_on_without_the_small_model(plain: LLM) -> None:
    llm = make_llm(MODEL, **LIMITS, speculative_config=drafted(OTHER, min_gain=2.9))
    assert run(llm, PROMPTS[:2], SAMPLED) == run(plain, PROMPTS[:2], SAMPLED)
    buckets = llm.runner.programs.num_traces
    assert any(bucket.is_decode and bucket.num_steps > 1 for bucket in buckets)


def test_samples_are_drawn_from_the_same_distribution() -> None:
    """Of a small model that is another one: what is accepted, or comes instead, is the model's."""
    table, draft = bigram_model.make_table(1), bigram_model.make_table(1)
    draft += np.random.default_rng(3).standard_normal(draft.shape).astype(np.float32)
    proposer = ModelProposer(DraftModelSettings(3, "small", min_gain=0.0))
    engine = bigram_model.make_engine(table, proposer=proposer, draft=draft)
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=4, ignore_eos=True, detokenize=False)
        for seed in range(1200)
    ]
    outputs = bigram_model.run(engine, [[5, 6]] * len(params), params)
    chosen = [list(output.outputs[0].token_ids) for output in outputs]
    for tokens, one in zip(chosen[:40], params, strict=False):
        assert tokens == bigram_model.expected(table, [5, 6], one)
    distance = bigram_model.chi_square(table, 6, [tokens[3] for tokens in chosen], 4)
    assert distance < 60, "23 degrees of freedom: 60 is passed once in 40,000 times"
    # The same keys draw both: it agrees more often than two independent draws would.
    assert proposer.num_accepted > 0.4 * proposer.num_drafts > 400


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 160 tokens, and the model one of 128"):
        make_llm(MODEL, speculative_config=drafted("llama-gqa-llama3"), max_model_len=128)
    longest = load_config(DATA / OTHER).max_model_len
    assert load_config(DATA / MODEL).max_model_len > longest
    with pytest.raises(ValueError, match=f"serves {longest} tokens, fewer than max_model_len="):
        make_llm(MODEL, speculative_config=drafted(OTHER), max_model_len=longest + 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_llm(MODEL, speculative_config=drafted() | {"model": "nowhere"})


def test_its_programs_can_be_compiled_without_weights(tmp_path: pathlib.Path) -> None:
    config = EngineConfig(str(DATA / MODEL), speculative_config=drafted(), num_blocks=50, seed=0)
    prepared = prepare(load_config(DATA / MODEL), config, "cpu")
    llm = make_llm(MODEL, speculative_config=drafted(), num_blocks=50)
    shapes = [
        [(x.shape, x.dtype) for x in jax.tree.leaves((one.params, one.kv_caches))]
        for one in (prepared.programs, llm.runner.programs)
    ]
    assert shapes[0] == shapes[1]
    assert {b for b in prepared.buckets.all() if b.proposes}


def test_settings() -> None:
    assert speculation_settings(drafted()) == DraftModelSettings(3, str(DATA / MODEL), 0.25)
