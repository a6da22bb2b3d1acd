"""The rule of beam search, without an engine, against the whole vocabulary and all sequences."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine.core.beam_search import BeamSearch, Candidates
from tests.engine import beam_oracle

VOCAB_SIZE = 12
PROMPT = [1, 2]


def random_model(seed: int) -> beam_oracle.NextLogprobs:
    """A model whose next token depends on the last two."""
    table = np.random.default_rng(seed).standard_normal((VOCAB_SIZE,) * 3) * 2
    table -= np.log(np.exp(table).sum(axis=-1, keepdims=True))
    return lambda tokens: table[tokens[-2], tokens[-1]]


def search(next_logprobs: beam_oracle.NextLogprobs, beams: BeamSearch) -> BeamSearch:
    """Runs a search to its end, as an engine would."""
    outputs: list[list[int]] = [[]]
    while not beams.is_done:
        candidates = []
        for output in outputs:
            logprobs = next_logprobs([*PROMPT, *output])
            order = np.argsort(-logprobs, kind="stable")[: beams.num_candidates]
            candidates.append(Candidates(order.tolist(), logprobs[order].tolist()))
        beams, parents, tokens = beams.advance(outputs, candidates)
        outputs = [[*outputs[p], t] for p, t in zip(parents, tokens, strict=True)]
    return beams


def settings() -> Iterator[dict[str, Any]]:
    for width, penalty, early, ending in itertools.product(
        (1, 2, 4, 6), (-1.0, 0.0, 0.7, 1.0, 2.0), (False, True, "never"), ((), (5,), (5, 6, 7))
    ):
        yield {
            "width": width,
            "length_penalty": penalty,
            "early_stopping": early,
            "ending_ids": frozenset(ending),
        }


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_equals_a_search_over_the_whole_vocabulary(max_tokens: int) -> None:
    lengths = set()
    for seed, options in enumerate(settings()):
        model = random_model(seed % 7)
        found = search(model, BeamSearch(max_tokens=max_tokens, **options))
        expected = beam_oracle.beam_search(model, PROMPT, max_tokens=max_tokens, **options)
        assert [h.token_ids for h in found.hypotheses] == [e.tokens for e in expected], options
        for hypothesis, wanted in zip(found.hypotheses, expected, strict=True):
            assert hypothesis.score == pytest.approx(wanted.score, abs=1e-12)
            assert hypothesis.cumulative_logprob == pytest.approx(wanted.cumulative_logprob)
        assert len(found.hypotheses) == options["width"]
        lengths |= {len(h.token_ids) for h in found.hypotheses}
    assert lengths == set(range(1, max_tokens + 1))


def test_every_setting_matters() -> None:
    """Else the test above could not tell a search that ignores one from a right one."""
    base = {"width": 4, "length_penalty": 1.0, "early_stopping": False, "max_tokens": 12}
    changes: list[dict[str, Any]] = [
        {"width": 2},
        {"length_penalty": 0.0},
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"early_stopping": "never"},
        {"ending_ids": frozenset()},
        {"max_tokens": 4},
    ]
    for change in changes:
        differ = 0
        for seed in range(40):
            model, ending = random_model(seed), {"ending_ids": frozenset({5, 6})}
            results = [
                search(model, BeamSearch(**(ending | base | c))).hypotheses[:2]
                for c in ({}, change)
            ]
            differ += results[0] != results[1]
        assert differ, change


def test_wide_enough_it_finds_the_best_of_all_sequences() -> None:
    model = random_model(3)

    def total(tokens: tuple[int, ...]) -> float:
        context = [*PROMPT, *tokens]
        return sum(model(context[: i + 2])[token] for i, token in enumerate(tokens))

    best = sorted(itertools.product(range(VOCAB_SIZE), repeat=3), key=total, reverse=True)
    found = search(model, BeamSearch(VOCAB_SIZE, max_tokens=3, num_results=5))
    assert found.results[0].token_ids == best[0]
    assert len(found.results) == 5
    scores = [h.score for h in found.hypotheses]
    assert scores == sorted(scores, reverse=True)
    assert found.results[0].score == pytest.approx(total(best[0]) / 3)


def test_equal_sums_keep_the_order_of_beams_and_candidates() -> None:
    beams = BeamSearch(width=2, max_tokens=3)
    beams, parents, tokens = beams.advance([[]], [Candidates([4, 9], [-1.0, -1.0])])
    assert (parents, tokens) == ((0, 0), (4, 9))
    same = Candidates([3, 8], [-2.0, -2.0])
    beams, parents, tokens = beams.advance([[4], [9]], [same, same])
    assert (parents, tokens) == ((0, 0), (3, 8))
    assert beams.cumulative_logprobs == (-3.0, -3.0)
    beams, parents, tokens = beams.advance([[4, 3], [4, 8]], [same, same])
    assert beams.is_done
    assert (parents, tokens) == ((), ())
    assert [h.token_ids for h in beams.results] == [(4, 3, 3)]
    assert beams.results[0].score == pytest.approx(-5 / 3)


def test_an_ending_token_behind_the_best_ends_nothing() -> None:
    """It is among the candidates only so that enough others are."""
    beams = BeamSearch(width=1, max_tokens=9, ending_ids=frozenset({0}))
    beams, parents, tokens = beams.advance([[]], [Candidates([7, 0], [-1.0, -1.1])])
    assert (parents, tokens, beams.hypotheses) == ((0,), (7,), ())
    beams, parents, tokens = beams.advance([[7]], [Candidates([0, 7], [-1.0, -1.5])])
    assert [h.token_ids for h in beams.hypotheses] == [(7, 0)]
    assert beams.is_done  # (-1 - 1.5) / 2 is worse than (-1 - 1) / 2
