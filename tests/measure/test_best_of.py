"""Means over prompts with their intervals, and what is told of them: against numpy, by hand, by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llama2cli.measure import best_of
from llama2cli.measure.best_of import Spread, Temperature
from llama2cli.text.records import validate


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_spread_of_batches_is_that_of_all_rows():
    x = rows(50, 5) + 1000
    made = Spread()
    for part in (x[:1], x[1:1], x[1:30], x[30:]):
        made.add(part)
    np.testing.assert_allclose(made.mean, x.mean(0), rtol=1e-14)
    half = 1.959964 * x.std(0, ddof=1) / math.sqrt(50)
    got = made.points()
    np.testing.assert_allclose([p.low for p in got], x.mean(0) - half, rtol=1e-12)
    np.testing.assert_allclose([p.high for p in got], x.mean(0) + half, rtol=1e-12)


def test_one_prompt_has_no_interval():
    made = Spread()
    made.add(rows(1, 3))
    assert [(p.low, p.high) for p in made.points()] == [(None, None)] * 3
    assert "±" not in made.points()[0].shown()


def test_intervals_hold_what_they_promise():
    """95% of 400 intervals of 60 prompts each hold the true mean of an exponential, 1 (skewed: a little fewer do)."""
    held = 0
    for x in np.random.default_rng(1).exponential(size=(400, 60, 1)):
        made = Spread()
        made.add(x)
        held += made.points()[0].low <= 1 <= made.points()[0].high
    assert 0.9 <= held / 400 <= 0.97


def filled(temperature: float, shift: float, k: int = 3, prompts: int = 4) -> Temperature:
    """Largest 1, 2, 3 and median 1, 1, 1 of every prompt, and the shift."""
    made = Temperature(temperature, k, answers=k * prompts, tokens=60, truncated=2, distinct=9, chosen=1)
    largest = np.tile([1.0, 2.0, 3.0], (prompts, 1)) + shift
    made.add(largest, np.ones((prompts, k)) + shift, np.full(prompts, 1.0 + shift))
    return made


def test_curves_records_and_tables():
    heat = [filled(0.8, 0), filled(1.2, 5)]
    curves = heat[1].curves()
    assert [p.value for p in curves["max"]] == [6, 7, 8] and [p.value for p in curves["gain"]] == [0, 1, 2]
    assert [p.value for p in curves["mean"]] == [6] and [p.value for p in curves["median"]] == [6, 6, 6]
    made = [validate("metric", r) for r in best_of.records(heat, 2, round=3)]
    assert len(made) == 2 * (3 * 3 + 1 + 3) and {r["round"] for r in made} == {3}
    [one] = [r for r in made if (r["measure"], r.get("k"), r["temperature"]) == ("reward.max", 3, 1.2)]
    assert (one["value"], one["low"], one["high"], one["n"]) == (8, 8, 8, 4)
    shares = {r["measure"]: r["value"] for r in made if r["temperature"] == 0.8 and r["measure"].startswith("samples")}
    assert shares == {"samples.truncated": 2 / 12, "samples.distinct": 0.75, "samples.chosen": 0.5}
    first, second = best_of.tables(heat, 2)
    assert first[2][1] == ["1.2", *(f"{x:.3f} ±0.000" for x in (6, 6, 8)), "75.0", "16.7", "50.0", "5"]
    assert [row[0] for row in second[2]] == ["1", "2", "3"] and {row[-1] for row in second[2]} == {"1.2"}
    assert "best not cut" not in first[1]
    alone = best_of.tables(heat[:1], 2)[1]
    assert alone[1] == ["n", "max", "median", "max - median"] and alone[2][2][3].startswith("2.000")


def test_the_best_that_was_not_cut():
    """Of two prompts one has such an answer at 0.8, with reward 2; none has at 1.2."""
    heat = [filled(0.8, 0), filled(1.2, 5)]
    heat[0].whole.add(np.array([[2.0]]))
    assert [r for r in best_of.records(heat, 2) if r["measure"] == "reward.whole"] == [
        {"measure": "reward.whole", "value": 2.0, "n": 1, "temperature": 0.8}
    ]
    _, columns, rows = best_of.by_temperature(heat, 2)
    assert [row[columns.index("best not cut")] for row in rows] == ["2.000", "-"]
    heat[0].whole.add(np.array([[5.0], [2.0]]))
    [whole] = [r for r in best_of.records(heat, 2, round=1) if r["measure"] == "reward.whole"]
    half = 1.959964 * math.sqrt(3 / 3)  # squared deviations 1 + 4 + 1 over two, over three
    assert (whole["value"], whole["n"], whole["round"]) == (3, 3, 1)
    assert (whole["low"], whole["high"]) == pytest.approx((3 - half, 3 + half))


@pytest.mark.parametrize(("k", "ladder"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_ladder(k, ladder):
    t = Temperature(1.0, k, answers=2 * k)
    t.add(rows(2, k), rows(2, k), rows(2))
    assert [row[0] for row in best_of.by_number([t])[2]] == [str(n) for n in ladder]


def test_state_keeps_every_digit():
    t = filled(1.1, 1 / 3)
    t.whole.add(rows(3, 1))
    t.add(rows(3, 3), rows(3, 3), rows(3))
    again = Temperature.of_state(json.loads(json.dumps(t.state())))
    for x in (t, again):
        x.add(rows(2, 3, seed=1), rows(2, 3, seed=2), rows(2, seed=3))
        x.whole.add(rows(2, 1, seed=4))
    assert again.state() == t.state() and again.curves() == t.curves()
    empty = Temperature.of_state(json.loads(json.dumps(Temperature(1.0, 3).state())))
    assert list(best_of.records([empty], 0)) == [] and best_of.tables([empty], 0) == []
