"""Shares with their intervals, and the Metric records that carry them."""

from __future__ import annotations

import math
from typing import Any, TypedDict

from llama2cli.text.records import Record

Z = 1.959964  # of the normal distribution, for 95%


class Rate(TypedDict):
    """A share k / n and its 95% interval."""

    value: float
    n: int
    low: float
    high: float


def wilson(k: float, n: int, z: float = Z) -> tuple[float, float]:
    """The score interval of a share k / n: the p for which |k/n - p| <= z sqrt(p (1 - p) / n) (Wilson, 1927).

    k need not be whole (ties count half). It stays within 0 and 1, and has a width where k is 0 or n.
    Raises ValueError unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"expected a share, got {k} of {n}")
    p, spread = k / n, z * z / n
    centre = p + spread / 2
    half = z * math.sqrt((p * (1 - p) + spread / 4) / n)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return (0.0 if k == 0 else max(0.0, low)), (1.0 if k == n else min(1.0, high))


def rate(k: float, n: int) -> Rate:
    """k / n with its interval. Raises ValueError for n = 0: a share of nothing is no number, so leave it out."""
    low, high = wilson(k, n)
    return {"value": k / n, "n": n, "low": low, "high": high}


def metric(measure: str, share: Rate, **groups: Any) -> Record:
    """The Metric record of a share; groups are of `records.GROUPS`, None is left out."""
    given = {name: value for name, value in groups.items() if value is not None}
    return {"measure": measure, **share, **given}


def percent(share: Rate) -> str:
    """The share for a table: 63.2."""
    return f"{100 * share['value']:.1f}"


def interval(share: Rate) -> str:
    """Its interval for a table: 61.0-65.3."""
    return f"{100 * share['low']:.1f}-{100 * share['high']:.1f}"


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow: a logit on the scale of `help` and `safe`."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
