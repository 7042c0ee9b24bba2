"""The best of N: brute force over all subsets, exact fractions, known distributions; rounds and ties by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from statistics import mean, median

import numpy as np
import pytest

from llama2cli.rlhf import best_of
from llama2cli.rlhf.best_of import best, competes, expected_max, expected_median


def rewards(K: int, seed: int = 0, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, K))


@pytest.mark.parametrize("K", [1, 2, 3, 7, 10])
def test_brute_force_over_all_subsets(K):
    x = rewards(K, K).round(1)  # with ties
    subsets = [list(combinations(x.tolist(), n)) for n in range(1, K + 1)]
    np.testing.assert_allclose(expected_max(x), [mean(map(max, s)) for s in subsets], rtol=1e-12)
    np.testing.assert_allclose(expected_median(x), [mean(map(median, s)) for s in subsets], rtol=1e-12, atol=1e-14)


def test_by_hand():
    """1, 2, 6: two of them have the largest 2, 6, 6."""
    assert expected_max(np.array([6.0, 1, 2])).tolist() == pytest.approx([3, 14 / 3, 6])
    assert expected_median(np.array([6.0, 1, 2])).tolist() == pytest.approx([3, 3, 2])


def test_exact_at_a_thousand():
    """Against integers of any length; the sum of positive weights hides nothing."""
    K = 1000
    made = best_of.max_weights(K)
    middle = best_of.median_weights(K)
    assert np.isfinite(made).all() and (made >= 0).all() and np.isfinite(middle).all()
    np.testing.assert_allclose(made.sum(1), 1, rtol=1e-14)
    for n in (1, 2, 10, 100, 333, 500, 999, 1000):
        ways = math.comb(K, n)
        for i in (n, n + 1, (n + K) // 2, K):
            if i <= K:
                exact = float(Fraction(math.comb(i - 1, n - 1), ways))
                assert made[n - 1, i - 1] == pytest.approx(exact, rel=1e-10, abs=1e-300)
        j = (n + 1) // 2
        for i in (j, 500, K - n + j):
            first, second = (
                math.comb(i - 1, r - 1) * math.comb(K - i, n - r) if K - i >= n - r else 0
                for r in ((n + 1) // 2, n // 2 + 1)
            )
            exact = float(Fraction(first + second, 2 * ways))
            assert middle[n - 1, i - 1] == pytest.approx(exact, rel=1e-10, abs=1e-300)
    x = rewards(K)
    assert expected_max(x)[-1] == x.max() and expected_max(x)[0] == pytest.approx(x.mean())
    assert expected_median(x)[-1] == pytest.approx(np.median(x), rel=1e-12)


def test_of_a_known_distribution():
    """The largest of N uniforms is N / (N + 1) in the mean: unbiased from 40 samples of each of 4000 prompts."""
    x = np.random.default_rng(0).random((4000, 40))
    got, error = expected_max(x).mean(0), expected_max(x).std(0) / math.sqrt(4000)
    want = np.arange(1, 41) / np.arange(2, 42)
    assert (np.abs(got - want) < 4 * error).all()
    assert (np.abs(expected_median(x).mean(0) - 0.5) < 4 * expected_median(x).std(0) / math.sqrt(4000)).all()


def test_shapes_and_order():
    x = rewards(9, 1, 2, 3)
    assert expected_max(x).shape == expected_median(x).shape == (2, 3, 9)
    np.testing.assert_allclose(expected_max(x)[1, 2], expected_max(x[1, 2]))
    largest = expected_max(x)
    assert (np.diff(largest, axis=-1) >= -1e-12).all()  # more samples are never worse
    np.testing.assert_allclose(expected_max(x[..., ::-1]), largest)
    np.testing.assert_allclose(expected_max(3 * x + 1), 3 * largest + 1)


# --- rounds and the best ------------------------------------------------------------------------------------------


def test_rounds():
    samples = [{"n": 0, "round": 1}, {"n": 1, "round": 3}, {"n": 2}, {"n": 3, "round": 2}, {"n": 4, "round": 3}]
    for mode, newest, want in (("last", 3, [1, 4]), ("all", 3, [0, 1, 2, 3, 4]), ("last", 4, [])):
        assert [s["n"] for s in samples if competes(s, mode, newest)] == want
    with pytest.raises(ValueError, match="last, all"):
        competes(samples[0], "newest", 3)


def test_the_best():
    assert best([1.0, 3.0, 2.0, 3.0]) == 1
    assert best([-5.0]) == 0
    assert best([]) is None
    assert best([1.0, 3.0, 2.0], [False, True, False]) == 2
    assert best([1.0, 3.0], [True, True]) is None
