"""Intervals against published tables, definitions computed otherwise, and simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure.intervals import at_most, bootstrap_ratio, difference, incomplete_beta, mean, poisson, student_t


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (30, 2.04227), (120, 1.97993)]
)
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=5e-5)


def test_students_t_ends_at_the_normal() -> None:
    assert student_t(10**7) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-6)
    with pytest.raises(ValueError):
        student_t(0)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.001, 0.999))
def test_the_incomplete_beta_function_is_a_binomial_tail(a: int, b: int, x: float) -> None:
    """I_x(a, b) for whole a, b: the chance of a successes or more in a + b - 1 trials."""
    n = a + b - 1
    tail = math.fsum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))
    assert incomplete_beta(a, b, x) == pytest.approx(tail, abs=1e-12)
    assert incomplete_beta(a, b, 0.0) == 0 and incomplete_beta(a, b, 1.0) == 1


@pytest.mark.parametrize(
    "count, low, high",
    [
        (0, 0, 3.689),
        (1, 0.025, 5.572),
        (2, 0.242, 7.225),
        (5, 1.623, 11.668),
        (10, 4.795, 18.390),
        (100, 81.364, 121.627),
    ],
)
def test_the_exact_poisson_interval_is_that_of_the_tables(count: int, low: float, high: float) -> None:
    """Garwood (1936); the tables of Ulm (1990) have the same."""
    assert poisson(count) == pytest.approx((low, high), abs=6e-4)


@given(st.integers(0, 3000))
def test_the_ends_of_a_poisson_interval_have_their_tails(count: int) -> None:
    low, high = poisson(count)
    assert low <= count <= high
    assert at_most(count, high) == pytest.approx(0.025, abs=1e-9)
    if count:
        assert 1 - at_most(count - 1, low) == pytest.approx(0.025, abs=1e-9)


def test_a_count_below_zero_is_none() -> None:
    with pytest.raises(ValueError):
        poisson(-1)


@pytest.mark.parametrize(
    "counts, low, high",
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((10, 10, 0, 20), 0.6791, 1.0),
        ((0, 10, 0, 20), -0.1611, 0.2775),
    ],
)
def test_newcombes_own_examples(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    """Newcombe (1998), table II, method 10."""
    found = difference(*counts)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.value == pytest.approx(counts[0] / counts[1] - counts[2] / counts[3])


def test_a_mean_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, deviation sqrt(5/3), t 3.18245."""
    found = mean([1, 2, 3, 4])
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-4)
    assert mean([7]) == (7, 1, None, None)
    with pytest.raises(ValueError):
        mean([])


def test_the_bootstrap_covers_and_repeats() -> None:
    """Of 150 samples of 40 people, nine of ten intervals or more hold the true rate; the same seed gives the same."""
    draw = np.random.default_rng(0)
    held = 0
    for seed in range(150):
        hours = draw.uniform(0.5, 3, 40)
        hits = draw.poisson(draw.gamma(2, 0.5, 40) * hours)  # people differ; the mean of their rates is 1
        found = bootstrap_ratio(hits.tolist(), hours.tolist(), per_thing=False, seed=seed, resamples=400)
        assert found is not None
        held += found[0] <= 1 <= found[1]
    assert held >= 132
    again = bootstrap_ratio([1, 2, 3], [1, 1, 2], per_thing=True, seed=3)
    assert again == bootstrap_ratio([1, 2, 3], [1, 1, 2], per_thing=True, seed=3) is not None
    assert bootstrap_ratio([1], [1], per_thing=True, seed=0) is None
    assert bootstrap_ratio([0, 0], [1, 1], per_thing=False, seed=0) is None
