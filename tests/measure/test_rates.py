"""Shares and intervals, against published values and the equation that Wilson's interval solves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure.rates import Z, interval, metric, percent, rate, wilson
from llama2cli.text.records import validate


@pytest.mark.parametrize(
    "k, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(k: int, n: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), Table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n).map(lambda k: k / 2), st.just(n))))
def test_wilson_solves_its_equation(given: tuple[float, int]) -> None:
    """At both ends the observed share is z standard errors away, by the error that the end itself implies."""
    k, n = given
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(k / n - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)


def test_a_share_of_nothing_is_an_error() -> None:
    for k, n in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="share"):
            rate(k, n)


def test_a_rate_as_record_and_as_text() -> None:
    share = rate(81, 263)
    record = metric("rm.accuracy", share, source="a", batch=None)
    assert validate("metric", record) == {"measure": "rm.accuracy", "source": "a", **share}
    assert (percent(share), interval(share)) == ("30.8", "25.5-36.6")
