"""Traffic of all kinds: every request that may be drawn is one that an engine takes."""

import numpy as np
import pytest

from benchmarks.traffic import KINDS, request


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_valid(kind: str) -> None:
    rng = np.random.default_rng(0)
    shortest = 100
    for _ in range(1000):
        prompt, params = request(rng, kind, vocab_size=50, max_len=64)
        assert 1 <= len(prompt) <= 32
        assert 1 <= params.max_tokens <= 16
        shortest = min(shortest, params.max_tokens)
    assert shortest < 4  # fewer tokens than some kinds would have at least
