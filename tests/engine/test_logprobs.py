"""Log-probabilities: what the device packs, what requests get, and what they may ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import Logprob
from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.core_output import TokenLogprobs
from pallas_paged.engine.device.logprobs import pack
from pallas_paged.engine.text.logprobs import logprobs_by_token

VOCAB_SIZE = 160


def expected(
    logits: np.ndarray, token: int, num_top: int
) -> tuple[float, int, np.ndarray, np.ndarray]:
    """By sorting in float64: larger logits first, of equal ones the lower id."""
    values = special.log_softmax(logits.astype(np.float64))
    order = np.lexsort((np.arange(len(logits)), -logits))
    rank = int(np.flatnonzero(order == token)[0]) + 1
    top = order[:num_top]
    return values[token], rank, top, values[top]


@pytest.mark.parametrize("width", [32, 100, 300])
def test_packed_figures_are_those_of_a_sort(width: int) -> None:
    rng = np.random.default_rng(width)
    logits = (rng.standard_normal((16, 300)) * 4).astype(np.float32)
    logits[3] = np.round(logits[3])  # ties
    logits[4] = 0
    logits[5, ::2] = -np.inf
    logits[6] += 1e4
    tokens = rng.integers(0, 150, 16, np.int32) * 2 + 1
    jitted = jax.jit(pack, static_argnums=2)
    packed = np.asarray(jitted(jnp.asarray(logits), jnp.asarray(tokens), width))
    assert packed[:, 0].tolist() == tokens.tolist()
    for num_top in (0, 1, 20, width, -1):
        found = logprobs.read(packed, num_top)
        for row, token, *figures in zip(logits, tokens.tolist(), *found, strict=True):
            logprob, rank, top, top_logprobs = expected(
                row, token, width if num_top == -1 else num_top
            )
            assert figures[1] == rank
            assert figures[2].tolist() == top.tolist()
            # A logit near 10000 has steps of 1e-3.
            tolerance = 1e-3 if abs(row[token]) > 1e3 else 1e-5
            np.testing.assert_allclose(figures[0], logprob, tolerance, tolerance)
            np.testing.assert_allclose(figures[3], top_logprobs, tolerance, tolerance)


@pytest.mark.parametrize(
    ("asked", "max_logprobs", "message"),
    [
        (21, 20, "logprobs=21 is more than the engine's max_logprobs=20; .* larger max_logprobs"),
        (-1, 20, "logprobs=-1 is more than the engine's max_logprobs=20; .*-1: the whole"),
        (41, 50, "logprobs=41 is more than the vocabulary of 40 tokens"),
        (41, -1, "logprobs=41 is more than the vocabulary of 40 tokens"),
    ],
)
def test_more_than_the_engine_gives_is_refused(asked: int, max_logprobs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs.check("logprobs", asked, max_logprobs, 40)


@pytest.mark.parametrize(("asked", "most"), [(None, 0), (0, 0), (20, 20), (-1, -1), (40, -1)])
def test_what_the_engine_gives_is_not_refused(asked: int | None, most: int) -> None:
    logprobs.check("logprobs", asked, most, 40)


@pytest.mark.parametrize(("most", "width"), [(0, 32), (20, 32), (33, 33), (999, 160), (-1, 160)])
def test_width(most: int, width: int) -> None:
    assert logprobs.width_for(most, VOCAB_SIZE) == width


def test_the_token_itself_is_always_there_and_has_its_text() -> None:
    found = TokenLogprobs(
        np.array([-3.0, -0.5], np.float32),
        np.array([7, 1], np.int32),
        np.array([[4, 9]] * 2, np.int32),
        np.array([[-0.5, -1.5]] * 2, np.float32),
    )
    assert logprobs_by_token([2, 4], found, lambda token: f"<{token}>") == [
        {4: Logprob(-0.5, 1, "<4>"), 9: Logprob(-1.5, 2, "<9>"), 2: Logprob(-3.0, 7, "<2>")},
        {4: Logprob(-0.5, 1, "<4>"), 9: Logprob(-1.5, 2, "<9>")},
    ]
    fewer = logprobs_by_token([4], found, None)
    assert fewer == [{4: Logprob(-0.5, 1), 9: Logprob(-1.5, 2)}]
