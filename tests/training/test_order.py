"""Random numbers computed from a position."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.training.order import mix, name_key, shuffled, splitmix

GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: output i of a generator is a function of seed + i * GOLDEN


def test_splitmix_gives_the_published_sequence() -> None:
    # The reference outputs for seed 1234567, as Rosetta Code prints them ("Pseudo-random numbers/Splitmix64").
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [(1234567 + i * GOLDEN) % 2**64 for i in range(5)]
    assert [splitmix(s) for s in states] == known
    assert splitmix(np.array(states, np.uint64)).tolist() == known


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_shuffle_is_a_permutation(n: int, key: int) -> None:
    assert sorted(shuffled(i, n, key) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_every_place_is_reached_equally_often(n: int) -> None:
    trials = 1500
    counts = Counter((i, shuffled(i, n, key)) for key in range(trials) for i in range(n))
    expected = trials / n
    chi2 = sum((counts[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n))
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 + 1


def test_neighbours_do_not_stay_together() -> None:
    n = 1000
    order = [shuffled(i, n, 7) for i in range(n)]
    assert sum(b == a + 1 for a, b in pairwise(order)) < 8  # about one is expected


def test_mix_depends_on_every_word_and_on_their_order() -> None:
    assert len({mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(1), mix(2), mix(0, 1)}) == 6
    tenths = Counter(mix(3, i) * 10 >> 64 for i in range(10000))
    assert all(abs(tenths[k] - 1000) < 150 for k in range(10))


def test_the_key_of_a_name_is_its_sha256() -> None:
    assert name_key("") == 0xE3B0C44298FC1C14  # the first bytes of sha256 of nothing, by definition of SHA-256
