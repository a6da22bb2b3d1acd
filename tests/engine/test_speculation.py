"""Guessed tokens: the same outputs, fewer steps, and an end where they gain nothing."""

import collections
import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine import LLM, BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.speculation import (
    NgramProposer,
    NgramSettings,
    num_right,
    speculation_settings,
)
from pallas_paged.engine.engine import Engine
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine import bigram_model, mock_model
from tests.engine.mock_model import VOCAB_SIZE, make_whole_engine, sampled_token
from tests.engine.serving import make_llm

NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)


def sequence(tokens: list[int]) -> TokenSequence:
    return SequenceGroup("r", tuple(tokens), 100).sequences[0]


# ---- guesses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 9, [3, 4, 5, 1]),  # what followed, at most four
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 9, [8, 1, 2]),  # the last time
        ([7, 1, 2, 9, 5, 1, 2, 8, 7, 1, 2], 9, [9, 5, 1, 2]),  # the longest beginning
        ([1, 2, 3], 9, []),
        ([2, 2], 9, []),
        ([2, 2, 2], 9, [2]),  # overlapping with itself
        ([1, 3, 2, 4, 2], 9, []),  # one token is not enough
        ([5], 9, []),
    ],
)
def test_what_followed_the_last_time(tokens: list[int], most: int, expected: list[int]) -> None:
    assert NgramProposer(NgramSettings(4)).propose(sequence(tokens), most) == expected
    growing, proposer = sequence(tokens[:1]), NgramProposer(NgramSettings(4))
    for token in tokens[1:]:
        proposer.propose(growing, most)
        growing.token_ids.append(token)
    assert proposer.propose(growing, most) == expected


def test_how_many_are_right() -> None:
    assert num_right([1, 2, 3], [1, 2, 3, 9]) == 3
    assert num_right([1, 2, 3], [1, 5, 3, 9]) == 1
    assert num_right([], [4]) == 0


# ---- the mock model -----------------------------------------------------------------------------


class Oracle(NgramProposer):
    """Knows the mock model, and errs at every fifth place."""

    def propose(self, sequence: TokenSequence, most: int) -> list[int]:
        tokens = list(sequence.token_ids)
        for _ in range(min(most, self.settings.num_speculative_tokens)):
            wrong = len(tokens) % 5 == 4
            tokens.append((sampled_token(tokens, sequence.index) + wrong) % VOCAB_SIZE)
        return tokens[len(sequence.token_ids) :]


def make_engine(num_drafts: int = 0, min_gain: float = 0.0, **options: Any) -> Engine:
    proposer = Oracle(NgramSettings(num_drafts, min_gain=min_gain)) if num_drafts else None
    return make_whole_engine(proposer=proposer, **options)


def serve(engine: Engine, requests: list[tuple[list[int], Any]]) -> tuple[dict[str, Any], int]:
    """Returns what each request gets, the pieces of streams joined, and the number of steps."""
    found: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(list))
    ends = {}
    for prompt, params in requests:
        engine.add(engine.make_group(prompt, params))
    while engine.has_unfinished:
        for output in engine.step():
            for one in output.outputs:
                found[output.request_id][one.index] += one.token_ids
                if one.finish_reason:
                    ends[output.request_id, one.index] = one.finish_reason, one.stop_reason
        engine.core.scheduler.check_invariants()
    engine.check_idle()
    return {name: dict(tokens) for name, tokens in found.items()} | ends, engine.core.num_steps


DELTA = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.DELTA)
FINAL = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
REQUESTS: list[tuple[list[int], Any]] = [
    ([1, 2, 3], DELTA),
    ([2, 2, 3, 4, 5], FINAL),
    ([3, 2], dataclasses.replace(DELTA, temperature=1.0, n=3)),
    ([4] * 9, dataclasses.replace(DELTA, max_tokens=1)),
    ([5] * 20, dataclasses.replace(DELTA, stop_token_ids=[7, 8, 9, 30])),
    ([6, 1], dataclasses.replace(FINAL, max_tokens=2)),
    ([7, 1], dataclasses.replace(DELTA, logprobs=1)),
    ([8, 1], dataclasses.replace(FINAL, presence_penalty=0.5)),
    ([9, 1, 2], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)),
]


@pytest.mark.parametrize("num_scheduler_steps", [1, 8])
@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 26}, {"enable_prefix_caching": True}])
def test_the_same_outputs(
    options: dict[str, Any], async_scheduling: bool, num_scheduler_steps: int
) -> None:
    options = options | {
        "async_scheduling": async_scheduling,
        "num_scheduler_steps": num_scheduler_steps,
        "max_num_seqs": 12,
    }
    plain, _ = serve(make_engine(**options), REQUESTS)
    engine = make_engine(4, **options)
    guessed, _ = serve(engine, REQUESTS)
    assert guessed == plain
    proposer = engine.core.scheduler.proposer
    assert proposer is not None
    assert 0 < proposer.num_accepted < proposer.num_drafts
    if "num_blocks" in options:
        assert engine.core.scheduler.num_preemptions


def test_fewer_steps() -> None:
    """Four of five drafts are right."""
    steps = []
    for num_drafts in (0, 4):
        engine = make_engine(num_drafts, async_scheduling=False)
        steps.append(serve(engine, REQUESTS[:2])[1])
    assert steps[0] == 24
    assert steps[1] < 12


def test_logits_that_are_not_finite_behind_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = mock_model.sampled_token

    def fails_there(token_ids: list[int], index: int, window: int | None = None) -> int:
        return VOCAB_SIZE if len(token_ids) == 11 else sampled(token_ids, index, window)

    monkeypatch.setattr(mock_model, "sampled_token", fails_there)
    requests: list[tuple[list[int], Any]] = [([1, 2, 3], DELTA), ([2, 3], FINAL)]
    plain, _ = serve(make_engine(), requests)
    guessed, _ = serve(make_engine(4), requests)
    assert guessed == plain
    assert guessed["request-0", 0] == ("abort", "logits are not finite")
    assert len(guessed["request-0"][0]) == 8


def test_who_gains_nothing_goes_on_without() -> None:
    """Its steps then overlap again, and several run in one program."""

    class Wrong(NgramProposer):
        def propose(self, sequence: TokenSequence, most: int) -> list[int]:
            return [(sampled_token(sequence.token_ids, sequence.index) + 1) % VOCAB_SIZE][:most]

    proposer = Wrong(NgramSettings(4))
    engine = make_whole_engine(proposer=proposer, num_scheduler_steps=8, max_model_len=64)
    group = engine.make_group([1, 2, 3], dataclasses.replace(FINAL, max_tokens=56))
    assert group.waits_for_host
    engine.add(group)
    while engine.has_unfinished:
        engine.step()
    assert not group.waits_for_host
    assert (proposer.num_drafts, proposer.num_accepted) == (23, 0)
    assert engine.core.num_steps < 24 + 10
    lucky = make_engine(4, min_gain=1.0)
    group = lucky.make_group([1, 2, 3], dataclasses.replace(FINAL, max_tokens=56))
    lucky.add(group)
    lucky.drain()
    assert group.waits_for_host


# ---- real devices -------------------------------------------------------------------------------


def test_samples_are_drawn_from_the_same_distribution() -> None:
    """Of drafts that are drawn at random: what is accepted, or comes instead, is the model's."""

    class Random(NgramProposer):
        rng = np.random.default_rng(0)

        def propose(self, sequence: TokenSequence, most: int) -> list[int]:
            return self.rng.integers(0, bigram_model.VOCAB_SIZE, min(most, 3)).tolist()

    table = bigram_model.make_table(1)
    settings = NgramSettings(3, min_gain=0.0)
    engine = bigram_model.make_engine(table, proposer=Random(settings))
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=3, ignore_eos=True, detokenize=False)
        for seed in range(1500)
    ]
    outputs = bigram_model.run(engine, [[5, 6]] * len(params), params)
    chosen = [list(output.outputs[0].token_ids) for output in outputs]
    for tokens, one in zip(chosen[:40], params, strict=False):
        assert tokens == bigram_model.expected(table, [5, 6], one)
    distance = bigram_model.chi_square(table, 6, [tokens[2] for tokens in chosen], 3)
    assert distance < 60, "23 degrees of freedom: 60 is passed once in 40,000 times"
    proposer = engine.core.scheduler.proposer
    assert proposer is not None
    assert proposer.num_accepted > 50


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_model_gives_the_same_tokens(temperature: float) -> None:
    base = SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True, detokenize=False)
    counts = [1, 2, 1, 2] if temperature else [1] * 4
    params = [dataclasses.replace(base, seed=i, n=count) for i, count in enumerate(counts)]
    prompts = [{"prompt_token_ids": [*range(3, 30 + i), 3, 4, 5]} for i in range(4)]
    found = []
    for config in (None, NGRAM):
        llm = make_llm("llama-mqa-linear", max_num_seqs=8, block_size=4, speculative_config=config)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([list(c.token_ids) for output in outputs for c in output.outputs])
    assert found[0] == found[1]
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_draft_tokens"] > 0
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > 0 or temperature


def test_stop_strings_end_in_the_middle_of_several_tokens() -> None:
    texts = []
    for config in (None, NGRAM | {"min_gain": 0}):
        llm = LLM(DEMO_MODEL, max_num_seqs=2, speculative_config=config, max_model_len=256)
        params = SamplingParams(temperature=0, max_tokens=60, stop=["self", "return"])
        outputs = llm.generate(["class Stack:\n    def ", "import os\n"], params, use_tqdm=False)
        texts.append([(o.outputs[0].text, o.outputs[0].stop_reason) for o in outputs])
    assert texts[0] == texts[1]


# ---- options ------------------------------------------------------------------------------------


def test_options() -> None:
    assert speculation_settings(None) is None
    assert speculation_settings(NGRAM) == NgramSettings(4, 4, 2, 0.25)
    chosen = NGRAM | {"prompt_lookup_max": 3, "prompt_lookup_min": 1, "min_gain": 0}
    assert speculation_settings(chosen) == NgramSettings(4, 3, 1, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ngram", "must be a dictionary or None"),
        ({"num_speculative_tokens": 3}, "must have a method, one of 'ngram', 'draft_model'"),
        ({"method": "eagle", "num_speculative_tokens": 3}, "must have a method, one of"),
        ({"method": "ngram"}, "must have num_speculative_tokens with the method 'ngram'"),
        (NGRAM | {"model": "x"}, "'ngram', and may have prompt_lookup_max, prompt_lookup_min, min"),
        (NGRAM | {"num_speculative_tokens": 0}, "an integer from 1 to 64 as num_speculative"),
        (NGRAM | {"method": "draft_model"}, "num_speculative_tokens and model with the method"),
        (NGRAM | {"method": "draft_model", "model": 3}, "must have a folder as model"),
        (NGRAM | {"prompt_lookup_min": 5}, "a minimum above the maximum"),
        (NGRAM | {"min_gain": -1}, "min_gain >= 0"),
    ],
)
def test_wrong_options(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("m", speculative_config=config)


def test_not_with_fixed_shapes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="must be None with deterministic=True"):
        EngineConfig("m", speculative_config=NGRAM, deterministic=True)
