"""`logprobs_mode="processed"`: how likely tokens were to be drawn, held against NumPy's float64."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import BeamSearchParams, RequestOutput, RequestOutputKind, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.prefixes import end_of_top_p
from pallas_paged.engine.device.processed import find_logprobs, processed
from pallas_paged.engine.device.sampling import SamplingInputs, sample
from tests.engine.bigram_model import VOCAB_SIZE, make_engine, make_table, ruled_logits, run

TABLE = make_table()
HELD = RequestOutputKind.FINAL_ONLY
BASE = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, detokenize=False, output_kind=HELD)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 1e-30},
    "min_p": {"temperature": 0.9, "min_p": 0.05},
    "top_k": {"top_k": 5},
    "one token": {"top_k": 1},
    "top_p": {"temperature": 1.4, "top_p": 0.8},
    "all filters": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
}


def oracle(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Returns float64 log-probabilities of what a token is drawn from, by sorting."""
    logits = logits.astype(np.float64)
    if params.temperature == 0:
        return special.log_softmax(logits)
    order = np.lexsort((np.arange(len(logits)), -logits))
    scaled = (logits - logits.max()) / params.temperature
    weights = np.exp(scaled[order])
    keeps = weights >= params.min_p
    keeps &= np.arange(len(order)) < (params.top_k or len(order))
    weights = np.where(keeps, weights, 0)
    before = np.cumsum(weights) - weights
    keeps &= (before < params.top_p * weights.sum()) | (params.top_p == 1)
    kept = np.full(len(logits), -np.inf)
    kept[order[keeps]] = scaled[order[keeps]]
    return special.log_softmax(kept)


def inputs_of(params: Sequence[SamplingParams]) -> SamplingInputs:
    def column(name: str, dtype: Any) -> jax.Array:
        return jnp.asarray([getattr(one, name) for one in params], dtype)

    count = len(params)
    return SamplingInputs(
        column("temperature", jnp.float32),
        column("top_k", jnp.int32),
        column("top_p", jnp.float32),
        column("min_p", jnp.float32),
        jnp.asarray([[0, one.seed] for one in params], jnp.uint32),
        jnp.zeros(count, jnp.int32),
        jnp.arange(count, dtype=jnp.int32),
    )


def draw_and_find(
    logits: np.ndarray, params: Sequence[SamplingParams], *, looks: bool, filters: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that are drawn, and what is found of them, i32[B, 3 + 2 V]."""
    inputs = inputs_of(params)
    options = {"looks": looks, "filters": filters}

    @jax.jit
    def step(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = sample(logits, inputs, **options)
        raw = jnp.full_like(logits, 7.0)  # not to be looked at
        width = logits.shape[1]
        return tokens, find_logprobs(
            raw, logits, tokens, inputs, width, mode="processed", **options
        )

    tokens, found = step(jnp.asarray(logits))
    return np.asarray(tokens), np.asarray(found)


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "does not look"])
@pytest.mark.parametrize("vocab_size", [24, 128, 700])
def test_what_a_token_is_drawn_from(vocab_size: int, looks: bool) -> None:
    rng = np.random.default_rng(vocab_size)
    params = [
        dataclasses.replace(BASE, seed=seed, **kind) for seed in range(4) for kind in KINDS.values()
    ]
    params += [dataclasses.replace(BASE, top_k=100, top_p=0.95)]  # more than are candidates
    logits = (rng.standard_normal((len(params), vocab_size)) * 3).astype(np.float32)
    logits[1::5] = np.round(logits[1::5])  # ties
    logits[2::7, ::2] = -np.inf  # excluded by rules
    logits[3::7] += 1e3
    tokens, packed = draw_and_find(logits, params, looks=looks)
    found = logprobs.read(packed, -1)
    assert (found.logprobs > -np.inf).all()
    for row, one in enumerate(params):
        expected = oracle(logits[row], one)
        own = np.full(vocab_size, np.nan)
        own[found.top_token_ids[row]] = found.top_logprobs[row]
        np.testing.assert_array_equal(np.isneginf(own), np.isneginf(expected), str(one))
        there = np.isfinite(expected)
        np.testing.assert_allclose(own[there], expected[there], rtol=2e-5, atol=2e-5)
        assert found.logprobs[row] == own[tokens[row]]
        assert found.top_token_ids[row][found.ranks[row] - 1] == tokens[row]


def test_what_no_row_has_is_left_out() -> None:
    """Without filters in the program nothing else changes, min-p included."""
    params = [dataclasses.replace(BASE, **KINDS[name]) for name in ("greedy", "hot", "min_p")]
    logits = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
    for looks in (True, False):
        whole = draw_and_find(logits, params, looks=looks)
        without = draw_and_find(logits, params, looks=looks, filters=False)
        np.testing.assert_array_equal(whole[0], without[0])
        np.testing.assert_array_equal(whole[1], without[1])


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "does not look"])
def test_a_drawn_token_is_never_left_out(looks: bool) -> None:
    """At an end where sums round in other ways: of equal tokens, and of one that is pushed out."""
    B, V = 256, 1000
    shares = np.linspace(0.001, 0.999, B)
    params = [dataclasses.replace(BASE, top_p=float(p), seed=i) for i, p in enumerate(shares)]
    rng = np.random.default_rng(0)
    for logits in (np.zeros((B, V)), rng.choice([0.0, -1e-3, 0.1], (B, V))):
        _, packed = draw_and_find(logits.astype(np.float32), params, looks=looks)
        found = logprobs.read(packed, 0)
        assert np.isfinite(found.logprobs).all()
        total = np.exp(logprobs.read(packed, -1).top_logprobs.astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(total, 1, atol=1e-4)
    row = np.array([5, 4, 3, 2, 1, 0, -1, -2], np.float32)
    inputs = inputs_of([dataclasses.replace(BASE, top_k=2), dataclasses.replace(BASE, top_p=0.3)])
    options = {"looks": looks, "filters": True}
    outside = jnp.asarray([3, 2], jnp.int32)
    found = np.asarray(processed(jnp.asarray([row, row]), outside, inputs, **options))
    assert np.isfinite(found).tolist() == [[True] * 4 + [False] * 4, [True] * 3 + [False] * 5]


def test_both_searches_end_in_the_same_place() -> None:
    rng = np.random.default_rng(3)
    logits = jnp.asarray(np.round(rng.standard_normal((64, 3, 128)) * 4).astype(np.float32) / 4)
    top = jnp.max(logits, axis=(1, 2))
    weights = jnp.exp(logits - top[:, None, None])
    # Whole numbers add up to the same in any order.
    counts = jnp.round(weights * 64)
    limit = rng.integers(1, 900, 64).astype(np.float32)
    # Every other one is met exactly by the tokens before some value.
    flat, amounts = np.asarray(logits).reshape(64, -1), np.asarray(counts).reshape(64, -1)
    values = np.sort(flat, axis=1)[np.arange(64), rng.integers(300, 380, 64)]
    sums = np.where(flat > values[:, None], amounts, 0).sum(axis=1)
    limit = jnp.asarray(np.where((np.arange(64) % 2 == 0) & (sums > 0), sums, limit))
    one, other = (end_of_top_p(logits, top, counts, limit, looks=looks) for looks in (True, False))
    np.testing.assert_array_equal(one.value, other.value)
    np.testing.assert_array_equal(one.token, other.token)


# ---- from end to end -----------------------------------------------------------------------------


def check(output: RequestOutput, params: SamplingParams) -> None:
    """Asserts that each token has the log-probability and the rank that it was drawn with."""
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        for place, (token, found) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        ):
            before = completion.token_ids[:place]
            last = [*prompt, *before][-1]
            expected = oracle(ruled_logits(TABLE[last], prompt, before, params), params)
            assert len(found) >= max(params.logprobs or 0, 1)
            for each, one in found.items():
                assert one.logprob == pytest.approx(expected[each], rel=1e-5, abs=3e-5)
            order = np.lexsort((np.arange(VOCAB_SIZE), -expected))
            assert order[found[token].rank - 1] == token
            assert np.isfinite(found[token].logprob)


RULES: dict[str, dict[str, Any]] = {
    "penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
    },
    "bias": {"logit_bias": {3: 4.0, 5: -100}},
    "allowed": {"allowed_token_ids": [2, 3, 5, 7, 11, 13]},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": [4, 6, 9]},
}


@pytest.mark.parametrize("num_blocks", [65, 18], ids=["plenty", "preempted"])
def test_cheap_steps_tell_what_they_drew_from(num_blocks: int, ran: list[Bucket]) -> None:
    engine = make_engine(
        TABLE,
        num_blocks=num_blocks,
        num_scheduler_steps=8,
        token_logprobs=True,
        logprobs_mode="processed",
    )
    params = [
        dataclasses.replace(BASE, seed=i, logprobs=0, **kind)
        for i, kind in enumerate(list(KINDS.values()) * 2)
    ]
    params = [
        dataclasses.replace(one, n=2, max_tokens=20) if one.temperature else one for one in params
    ]
    outputs = run(engine, [[5 + i % 3, 6, 7] for i in range(len(params))], params)
    for output, one in zip(outputs, params, strict=True):
        check(output, one)
    assert not any(bucket.is_full for bucket in ran)
    assert max(bucket.num_steps for bucket in ran) == 8
    preempted = sum(output.metrics.num_preemptions for output in outputs)
    assert (preempted > 0) == (num_blocks == 18)


@pytest.mark.parametrize("rule", RULES)
def test_full_steps_tell_what_they_drew_from(rule: str) -> None:
    engine = make_engine(TABLE, token_logprobs=True, logprobs_mode="processed")
    params = [
        dataclasses.replace(BASE, logprobs=asked, **kind, **RULES[rule])
        for kind in KINDS.values()
        for asked in (0, 4)
    ]
    outputs = run(engine, [[8, 5, 6]] * len(params), params)
    for output, one in zip(outputs, params, strict=True):
        check(output, one)


def test_everybody_gets_the_same_in_company() -> None:
    """Of plain steps and of full ones, in which rows without rules stand beside others."""
    make = {"token_logprobs": True, "logprobs_mode": "processed"}
    params = [dataclasses.replace(BASE, logprobs=0, **kind) for kind in KINDS.values()]
    prompts = [[4, i] for i in range(1, 1 + len(params))]
    alone = run(make_engine(TABLE, num_scheduler_steps=8, **make), prompts, params)
    others = [dataclasses.replace(BASE, logprobs=3, **rules) for rules in RULES.values()]
    prompts += [[9, i] for i in range(1, 1 + len(others))]
    together = run(make_engine(TABLE, **make), prompts, [*params, *others])
    for one, other in zip(alone, together, strict=False):
        (mine,), (its,) = one.outputs, other.outputs
        assert mine.token_ids == its.token_ids
        assert mine.token_logprobs == pytest.approx(its.token_logprobs, abs=1e-6)


def test_prompts_and_beams_keep_the_models_own() -> None:
    params: list[SamplingParams | BeamSearchParams] = [
        dataclasses.replace(BASE, temperature=0.5, top_k=3, logprobs=1, prompt_logprobs=2),
        BeamSearchParams(beam_width=3, max_tokens=6),
    ]
    prompts = [[5, 6, 7, 8], [9, 4]]
    raw, other = (
        run(make_engine(TABLE, logprobs_mode=mode), prompts, params)
        for mode in ("raw", "processed")
    )
    assert other[0].prompt_logprobs == raw[0].prompt_logprobs
    assert [one.token_ids for one in other[0].outputs] == [one.token_ids for one in raw[0].outputs]
    assert other[0].outputs[0].logprobs != raw[0].outputs[0].logprobs
    assert other[1].outputs == raw[1].outputs


@pytest.mark.parametrize(
    ("mode", "held"),
    [
        ("raw", "raw"),
        ("raw_logprobs", "raw"),
        ("processed", "processed"),
        ("processed_logprobs", "processed"),
    ],
)
def test_names(mode: str, held: str) -> None:
    assert EngineConfig("m", logprobs_mode=mode).logprobs_mode == held


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raw_logits", r"logprobs_mode='raw_logits' is not offered: .* \('raw', 'processed'\)"),
        ("processed_logits", "logprobs_mode='processed_logits' is not offered"),
        ("other", r"logprobs_mode='other' must be one of \('raw', 'processed'\)"),
        (None, "logprobs_mode=None must be one of"),
        (["raw"], r"logprobs_mode=\['raw'\] must be one of"),
    ],
)
def test_other_names_are_refused(mode: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("m", logprobs_mode=mode)
