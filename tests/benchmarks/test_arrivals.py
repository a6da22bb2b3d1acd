"""Arrivals: the gaps' mean and variance, order, seeds."""

import math

import numpy as np
import pytest

from benchmarks.arrivals import arrival_times


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variance_of_the_gamma_distribution(burstiness):
    rate, count = 5.0, 40_000
    gaps = np.diff(arrival_times(count, rate, burstiness, seed=1), prepend=0.0)
    assert (gaps >= 0).all()
    # Five standard errors of the mean; the variance's own are wider for bursty gaps.
    error = 5 / math.sqrt(burstiness * count)
    assert gaps.mean() * rate == pytest.approx(1, abs=error)
    assert gaps.var() * rate**2 * burstiness == pytest.approx(1, abs=0.15)


def test_poisson_gaps_are_exponential():
    gaps = np.sort(np.diff(arrival_times(20_000, 2.0, 1.0, seed=2), prepend=0.0))
    empirical = (np.arange(len(gaps)) + 0.5) / len(gaps)
    # Kolmogorov-Smirnov, 0.1 % level.
    assert np.abs(empirical - (1 - np.exp(-2.0 * gaps))).max() < 1.95 / math.sqrt(len(gaps))


def test_a_seed_fixes_the_arrivals_and_the_rate_stretches_them():
    slow, fast = (arrival_times(50, rate, 0.5, seed=3) for rate in (1.0, 4.0))
    np.testing.assert_allclose(slow, 4 * fast)
    assert (arrival_times(50, 1.0, 0.5, seed=4) != slow).any()


def test_infinite_rate_is_now():
    np.testing.assert_array_equal(arrival_times(3, math.inf, 1.0, seed=0), 0)


@pytest.mark.parametrize(
    ("rate", "burstiness", "message"),
    [
        (0.0, 1.0, "request_rate=0.0"),
        (math.nan, 1.0, "request_rate=nan"),
        (1.0, 0.0, "burstiness=0.0"),
        (1.0, math.inf, "burstiness=inf"),
    ],
)
def test_wrong_rates_are_refused(rate, burstiness, message):
    with pytest.raises(ValueError, match=message):
        arrival_times(1, rate, burstiness, seed=0)


def test_gaps_are_not_what_a_workload_of_the_same_seed_is_drawn_from():
    """Else long prompts would come behind long pauses."""
    for seed in range(3):
        same = np.cumsum(np.random.default_rng(seed).gamma(1.0, 1.0, 20))
        assert not np.allclose(arrival_times(20, 1.0, 1.0, seed), same)
