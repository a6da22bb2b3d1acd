"""Sampling: which tokens may be drawn, how often, and what the draw depends on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pallas_paged.engine.core.step_inputs import seed_words
from pallas_paged.engine.device import order, prefixes, sampling
from pallas_paged.engine.device.sampling import SamplingInputs

# Few programs draw many tokens, which is worth LLVM's time, see tests/conftest.py.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
WAYS = {
    "looking": fast_jit(sampling.sample),
    "fixed": fast_jit(functools.partial(sampling.sample, looks=False)),
}
sample = WAYS["looking"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Draws as CPUs do, by looking at the rows, or in the fixed passes that GPUs take."""
    monkeypatch.setitem(globals(), "sample", WAYS[request.param])
    return request.param


both_ways = pytest.mark.usefixtures("way")


@dataclasses.dataclass(frozen=True)
class Options:
    """One row's options, with the defaults of `SamplingParams`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0


def inputs_of(rows: list[Options]) -> SamplingInputs:
    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(row, name) for row in rows], dtype))

    return SamplingInputs(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        jnp.asarray(np.array([seed_words(row.seed) for row in rows], np.uint32)),
        column("sample_index", np.int32),
        column("position", np.int32),
    )


NUM_ROWS = 512
SIZES = (300, 3000)  # neither is a multiple of a tile; the second has more tiles than candidates


def draw(logits: np.ndarray, num: int, **options: float) -> np.ndarray:
    """Returns `num` tokens drawn from one row of logits, at as many positions.

    In few shapes, because each one compiles for seconds: the vocabulary is filled with -inf.
    """
    padding = next(size for size in SIZES if size >= len(logits)) - len(logits)
    logits = np.pad(logits.astype(np.float32), (0, padding), constant_values=-np.inf)
    rows = jnp.asarray(np.broadcast_to(logits, (NUM_ROWS, len(logits))))
    inputs = inputs_of([Options(**options)] * NUM_ROWS)
    tokens: list[np.ndarray] = []
    for start in range(0, num, NUM_ROWS):
        positions = jnp.arange(start, start + NUM_ROWS, dtype=jnp.int32)
        tokens.append(np.asarray(sample(rows, inputs._replace(positions=positions))))
    return np.concatenate(tokens)[:num]


def expected_probabilities(logits: np.ndarray, options: Options) -> tuple[np.ndarray, float]:
    """Returns the distribution to draw from, by sorting in float64, and how clear top-p's cut is.

    The order is by logit, then by id. Every filter keeps a prefix of it.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / options.temperature
    weights = np.exp(scaled)
    by_rank = np.lexsort((np.arange(len(logits)), -logits))
    kept = weights[by_rank] >= options.min_p
    if options.top_k > 0:
        kept[options.top_k :] = False
    in_order = np.where(kept, weights[by_rank], 0.0)
    margin = np.inf
    if options.top_p < 1:
        before = np.cumsum(in_order) - in_order
        limit = np.float32(options.top_p) * in_order.sum()
        margin = np.abs(before[1:] / limit - 1).min(initial=np.inf)
        in_order[before >= limit] = 0.0
    probabilities = np.zeros(len(logits))
    probabilities[by_rank] = in_order / in_order.sum()
    return probabilities, margin


# ---- greedy ------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("size", [1, 128, 3000])
def test_greedy_is_the_first_of_the_largest(size):
    logits = np.round(np.random.default_rng(size).standard_normal((64, size)) * 2) / 2
    tokens = sample(jnp.asarray(logits, jnp.float32), inputs_of([Options(temperature=0)] * 64))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@both_ways
def test_greedy_with_signed_zeros_and_masked_tokens():
    assert draw(np.array([-1, -0.0, 0.0, -2]), 1, temperature=0) == [1]
    assert draw(np.array([-np.inf, -np.inf, 3, 3]), 1, temperature=0) == [2]
    assert draw(np.array([-3.4e38, -np.inf, -3.4e38]), 1, temperature=0) == [0]


@both_ways
@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-39, 1e-45])
def test_a_very_low_temperature_is_greedy(temperature):
    logits = np.random.default_rng(0).standard_normal(500) * 60000
    assert set(draw(logits, 64, temperature=temperature)) == {logits.argmax()}


@both_ways
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_first_of_the_largest_is_all_that_a_filter_of_one_leaves(size, top_p):
    logits = np.round(np.random.default_rng(size).standard_normal(size))  # many ties at the top
    assert set(draw(logits, 64, top_k=1, top_p=top_p)) == {logits.argmax()}
    assert set(draw(logits, 64, top_p=1e-9)) == {logits.argmax()}
    assert set(draw(logits, 64, top_p=1e-45)) == {logits.argmax()}


# ---- which tokens ------------------------------------------------------------------------------

logit_values = {
    "spread": lambda rng, size: rng.standard_normal(size) * 2,
    "ties": lambda rng, size: np.round(rng.standard_normal(size) * 2),
    "flat": lambda rng, size: np.zeros(size),
    "masked": lambda rng, size: np.where(rng.random(size) < 0.7, -np.inf, rng.random(size)),
}


@both_ways
@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    kind=st.sampled_from(sorted(logit_values)),
    size=st.sampled_from([3, 130, 3000]),
    data_seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 63, 64, 65, 200, 2999, 3000, 10**6]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_draws_are_within_what_the_filters_keep_and_reach_all_of_it(
    kind, size, data_seed, temperature, top_k, top_p, min_p
):
    logits = logit_values[kind](np.random.default_rng(data_seed), size).astype(np.float32)
    logits[data_seed % size] = 1.0  # at least one is finite
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities, margin = expected_probabilities(logits, options)
    relative = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    assume(
        margin > 1e-5 and not np.any(np.abs(relative / max(min_p, 1e-30) - 1)[relative < 1] < 1e-5)
    )
    drawn = set(draw(logits, 512, **dataclasses.asdict(options)).tolist())
    assert drawn <= set(np.flatnonzero(probabilities).tolist())
    assert drawn >= set(np.flatnonzero(probabilities > 0.05).tolist())


@both_ways
@pytest.mark.parametrize("size", [8, 256])
@pytest.mark.parametrize("share", [0.125, 0.5, 0.75])
def test_top_p_keeps_exactly_the_first_of_equal_tokens(size, share):
    """All masses are exact in float32, so the border is, too: the mass before reaches it."""
    flat, num_kept = np.full(size, -7.0), int(share * size)
    drawn = draw(flat, 8 * size, top_p=share)
    assert drawn.max() < num_kept
    assert drawn.max() > 0.95 * num_kept - 1
    if size == 8:
        assert set(drawn) == set(range(num_kept))
        assert set(draw(flat, 256, top_p=share * (1 + 1e-6))) == set(range(num_kept + 1))


def kept_by_top_k(
    logits: np.ndarray, top_k: list[int], looks: bool = True, num_candidates: int = 64
) -> np.ndarray:
    """Returns which tokens the top-k of each row keeps, by the program's own search."""

    def search(rows: jax.Array, top_k: jax.Array) -> jax.Array:
        tiles = order.tiles_of(rows)
        top = jnp.max(tiles, axis=(1, 2))
        end = prefixes.end_of_top_k(tiles, top, top_k, looks=looks)
        return order.precede(prefixes.shifted(tiles, top), end).reshape(len(rows), -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "NUM_CANDIDATES", num_candidates)
        kept = fast_jit(search)(jnp.asarray(logits), jnp.asarray(top_k, jnp.int32))
    return np.asarray(kept)[:, : logits.shape[1]]


@pytest.mark.parametrize("size", [200, 3001])
def test_top_k_keeps_the_first_k_however_they_are_found(size):
    """Among candidates (k up to 64), by bisection, which a limit of one candidate forces, or by
    the search of a GPU."""
    rng = np.random.default_rng(size)
    logits, top_k = [], []
    for kind in logit_values.values():
        for k in (1, 2, 7, 63, 64, 65, 100, size - 1, size, 10**9, 0):
            logits.append(kind(rng, size).astype(np.float32))
            logits[-1][-1] = 5.0
            top_k.append(k)
    expected = np.zeros((len(logits), size), bool)
    for row, values, k in zip(expected, logits, top_k, strict=True):
        row[np.lexsort((np.arange(size), -values))[: k or size]] = True
    for how in ({}, {"num_candidates": 1}, {"looks": False}):
        np.testing.assert_array_equal(kept_by_top_k(np.stack(logits), top_k, **how), expected)


def test_the_token_does_not_depend_on_how_top_k_was_found(monkeypatch):
    rng = np.random.default_rng(5)
    logits = jnp.asarray(np.round(rng.standard_normal((64, 3000)) * 8) / 4, jnp.float32)
    rows = [Options(top_k=1 + i % 70, top_p=[1.0, 0.8][i % 2], seed=i) for i in range(64)]
    tokens = sample(logits, inputs_of(rows))
    monkeypatch.setattr(prefixes, "NUM_CANDIDATES", 1)
    by_bisection = fast_jit(lambda *args: sampling.sample(*args))
    np.testing.assert_array_equal(by_bisection(logits, inputs_of(rows)), tokens)


def test_both_ways_draw_the_same_token_where_top_p_refuses_none():
    """And so does the one that leaves out the filters, where there are none."""
    rng = np.random.default_rng(6)
    logits = jnp.asarray(np.round(rng.standard_normal((64, 3000)) * 8) / 4, jnp.float32)
    rows = [Options(top_k=i % 70, min_p=[0.0, 0.05][i % 2], seed=i) for i in range(64)]
    rows[5] = Options(temperature=0)
    looking, fixed = (WAYS[name](logits, inputs_of(rows)) for name in WAYS)
    np.testing.assert_array_equal(looking, fixed)
    unfiltered = inputs_of([dataclasses.replace(row, top_k=0) for row in rows])
    without = fast_jit(functools.partial(sampling.sample, looks=False, filters=False))
    np.testing.assert_array_equal(without(logits, unfiltered), WAYS["fixed"](logits, unfiltered))


# ---- how often ---------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(temperature=0.5),
        Options(temperature=2.5),
        Options(top_k=7),
        Options(top_k=70),
        Options(top_p=0.6),
        Options(top_p=0.05),
        Options(top_p=0.97),
        Options(min_p=0.1),
        Options(temperature=1.5, top_k=30, top_p=0.8, min_p=0.02),
        Options(temperature=1.5, top_k=90, top_p=0.5),
        Options(seed=2**63 + 12345),
    ],
    ids=str,
)
def test_frequencies(options):
    size = 300
    logits = np.random.default_rng(size).standard_normal(size) * 1.5
    probabilities, _ = expected_probabilities(logits.astype(np.float32), options)
    num = 20_000
    counts = np.bincount(draw(logits, num, **dataclasses.asdict(options)), minlength=size)
    assert counts[probabilities == 0].sum() == 0
    # Rare tokens together, so that the chi-squared approximation holds.
    rare = probabilities * num < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(probabilities[~rare], probabilities[rare].sum()) * num
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("field", ["seed", "sample_index"])
def test_frequencies_over_the_other_parts_of_the_key(field):
    logits = np.random.default_rng(1).standard_normal(20)
    tokens = np.concatenate([draw(logits, 10, **{field: i}) for i in range(400)])
    expected, _ = expected_probabilities(logits, Options())
    assert stats.chisquare(np.bincount(tokens, minlength=20), expected * 4000).pvalue > 1e-3


def test_a_flat_vocabulary_is_drawn_evenly_within_and_across_tiles():
    tokens = draw(np.zeros(3000), 60_000)
    assert stats.chisquare(np.bincount(tokens, minlength=3000)).pvalue > 1e-3


def test_a_weight_of_zero_is_never_picked_whatever_the_rounding():
    """At and beyond the ends of the running sum, which is not added up from left to right."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((200, 333)) < 0.7, 0, rng.random((200, 333))).astype(np.float32)
    sums = np.cumsum(weights, axis=1)
    first_above = fast_jit(order.first_above)
    for share in (0.0, 0.5, 1 - 2**-24, 1.0, 1.001):
        target = sums[:, -1] * np.float32(share)
        picked = np.asarray(first_above(jnp.asarray(weights), jnp.asarray(target)))[:, None]
        assert np.all(np.take_along_axis(weights, picked, axis=1) > 0)
        near = np.take_along_axis(sums, picked, axis=1)[:, 0]
        assert np.all(near > np.minimum(target, sums[:, -1]) - 1e-3)
        assert np.all(near - weights.max() < target + 1e-3)


# ---- what it depends on ------------------------------------------------------------------------


def mixed_rows(num: int) -> list[Options]:
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 80, "top_p": 0.9},
        {"temperature": 0.3, "top_k": 20, "top_p": 0.5, "min_p": 0.01},
    ]
    return [Options(seed=7 * i, position=i % 13, **kinds[i % len(kinds)]) for i in range(num)]


def test_a_row_is_drawn_alike_in_every_bucket_row_and_company():
    rng = np.random.default_rng(2)
    num = 512
    rows, logits = mixed_rows(num), rng.standard_normal((num, 300)).astype(np.float32) * 2
    together = np.asarray(sample(jnp.asarray(logits), inputs_of(rows)))
    for size in (1, 8, 64):
        shuffled = rng.permutation(num)
        for chunk in shuffled.reshape(-1, size)[:128]:
            tokens = sample(jnp.asarray(logits[chunk]), inputs_of([rows[i] for i in chunk]))
            np.testing.assert_array_equal(tokens, together[chunk])


@both_ways
def test_padding_does_not_touch_other_rows():
    rows, logits = mixed_rows(8), np.random.default_rng(3).standard_normal((8, 300))
    tokens = np.asarray(sample(jnp.asarray(logits, jnp.float32), inputs_of(rows)))
    poisoned = np.concatenate([logits, np.full((56, 300), np.nan)])
    rows += [Options(temperature=0)] * 56
    padded = np.asarray(sample(jnp.asarray(poisoned, jnp.float32), inputs_of(rows)))
    np.testing.assert_array_equal(padded[:8], tokens)
    assert 0 <= padded[8:].min() <= padded[8:].max() < 300


@both_ways
def test_a_broken_row_ends_and_leaves_the_others_alone():
    rows, logits = mixed_rows(8), np.random.default_rng(3).standard_normal((8, 300))
    tokens = np.asarray(sample(jnp.asarray(logits, jnp.float32), inputs_of(rows)))
    logits[3] = np.nan  # a top-p row
    np.testing.assert_array_equal(
        np.delete(sample(jnp.asarray(logits, jnp.float32), inputs_of(rows)), 3),
        np.delete(tokens, 3),
    )


@pytest.mark.parametrize("field", ["seed", "sample_index", "position"])
def test_another_key_draws_other_tokens(field):
    logits = np.zeros(1000)
    base = draw(logits, 64)
    if field == "position":
        assert len(set(base)) > 50
    else:
        other = draw(logits, 64, **{field: 1})
        assert np.mean(other == base) < 0.1


def test_both_words_of_the_seed_count():
    logits = np.zeros(1000)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({tuple(draw(logits, 8, seed=seed)) for seed in seeds}) == len(seeds)


def test_swapping_seed_index_and_position_draws_other_tokens():
    logits = jnp.zeros((64, 3000), jnp.float32)
    numbers = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)]
    rows = [Options(seed=a, sample_index=b, position=c) for a, b, c in numbers]
    rows += [Options(temperature=0)] * (64 - len(rows))
    assert len(set(np.asarray(sample(logits, inputs_of(rows)))[:6].tolist())) == 6


TOKENS_OF_42 = {
    "looking": [987, 983, 998, 997, 987, 955, 997, 982],
    "fixed": [988, 956, 998, 997, 988, 959, 997, 983],
}


def test_a_seed_gives_these_tokens(way):
    """Users keep seeds: the same ones in every version of this project and of jax."""
    logits = np.linspace(0, 3, 1000)
    assert draw(logits, 8, seed=42).tolist() == [610, 899, 763, 889, 97, 654, 890, 597]
    filtered = draw(logits, 8, seed=42, top_k=50, top_p=0.9).tolist()
    assert filtered == TOKENS_OF_42[way]


# ---- numbers at the edge -----------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    "values",
    [
        [3.4e38, -3.4e38, 0.0, 3.4e38],
        [65504.0, 65472.0, -65504.0, 0.0],
        [-np.inf, 1.0, -np.inf, -np.inf],
        [1e-45, -1e-45, 0.0, -0.0],
        [-1e30, -np.inf, -1e30, -np.inf],
    ],
)
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e30])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.999}]
)
def test_extreme_logits(values, temperature, filters):
    tokens = draw(np.array(values), 32, temperature=temperature, **filters)
    assert np.all(np.isfinite(np.array(values)[tokens]))


@both_ways
def test_a_high_temperature_is_nearly_even():
    counts = np.bincount(draw(np.array([50.0, 0.0, -50.0, -np.inf]), 3000, temperature=3e38))
    assert len(counts) == 3
    assert counts.min() > 900


@both_ways
def test_options_of_a_greedy_row_are_ignored():
    row = Options(temperature=0, top_k=3, top_p=0.1, min_p=0.9, seed=9)
    other = Options(temperature=1.0, seed=1)
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((8, 300)), jnp.float32)
    assert sample(logits, inputs_of([row] + [other] * 7))[0] == int(logits[0].argmax())
