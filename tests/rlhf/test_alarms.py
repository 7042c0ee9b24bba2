"""Alarms: when they come, and that they do not come otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.rlhf import alarms


@pytest.mark.parametrize(
    ("length", "first", "factor", "alarmed"),
    [
        (100, 100, 2, False),
        (200, 100, 2, False),  # the bound itself is within
        (201, 100, 2, True),
        (50, 100, 2, False),
        (49, 100, 2, True),
        (100.5, 100, 1, True),
        (1, 100, 1000, False),
    ],
)
def test_length_drift(length: float, first: float, factor: float, alarmed: bool) -> None:
    told = alarms.length_drift(length, first, factor)
    assert (told is not None) == alarmed
    if told:
        assert f"{length:.0f} tokens" in told and told.endswith(f"they had {first:.0f}")


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(1, 10))
def test_length_drift_is_the_same_in_both_directions(a: float, b: float, factor: float) -> None:
    assert (alarms.length_drift(a, b, factor) is None) == (alarms.length_drift(b, a, factor) is None)


@pytest.mark.parametrize(("kl", "alarmed"), [(0, False), (-3, False), (10, False), (10.01, True), (1e9, True)])
def test_far(kl: float, alarmed: bool) -> None:
    told = alarms.far(kl, 10)
    assert (told is not None) == alarmed
    if told:
        assert f"KL {kl:.3g} nats" in told and "the bound is 10" in told


def told(reward: float, judge: float, error: float = 0.1) -> dict[str, float]:
    return {"reward": reward, "judge": judge, "judge_error": error}


@pytest.mark.parametrize(
    ("now", "alarmed"),
    [
        (told(2, 0.5), True),  # both as they are when a reward model is gamed
        (told(2, 0.95), False),  # the judge's fall is within its error
        (told(2, 0.95, 0.01), True),
        (told(2, 1.5), False),  # both rise
        (told(0.5, 0.5), False),  # both fall: it is worse, and it is not gaming
        (told(1, 0.5), False),  # the reward has not risen
        (told(0.5, 1.5), False),
    ],
)
def test_gamed(now: dict[str, float], alarmed: bool) -> None:
    found = alarms.gamed(now, told(1, 1))
    assert (found is not None) == alarmed
    if found:
        assert f"reward 1 -> {now['reward']:.3g}, judge 1 -> {now['judge']:.3g}" in found


@pytest.mark.parametrize(("gap", "alarmed"), [(0, False), (0.01, False), (0.011, True)])
def test_rounding(gap: float, alarmed: bool) -> None:
    found = alarms.rounding(gap, 0.01)
    assert (found is not None) == alarmed
    if found:
        assert "--old-logprobs recomputed" in found
