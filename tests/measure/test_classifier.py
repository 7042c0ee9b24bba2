"""Held-out figures of binary classifiers: by hand, and against counting every two dialogues."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.measure import classifier
from llama2cli.measure.rates import wilson


def test_by_hand() -> None:
    """Scores above 0 are called 1: right are 2, -1 and -3; called 1 are 2, 0.5 and 4; 0 is not above 0."""
    scores, labels = [2.0, 0.5, -1.0, -3.0, 0.0, 4.0], [1, 0, 0, 0, 1, 1]
    result = classifier.evaluate(scores, labels, ["a", "a", "b", None, "b", "a"])
    assert (result["accuracy"]["value"], result["accuracy"]["n"]) == (4 / 6, 6)
    assert (result["precision"]["value"], result["precision"]["n"]) == (2 / 3, 3)
    assert (result["recall"]["value"], result["recall"]["n"]) == (2 / 3, 3)
    assert result["positive"] == 3
    assert (result["accuracy"]["low"], result["accuracy"]["high"]) == wilson(4, 6)
    # of the nine pairs of a 1 and a 0, only 0.0 against 0.5 is in the wrong order
    assert result["auc"] == pytest.approx(8 / 9)
    shares = {name: (share["value"], share["n"]) for name, share in result["by_source"].items()}
    assert shares == {"": (1.0, 1), "a": (2 / 3, 3), "b": (0.5, 2)}
    json.dumps(result, allow_nan=False)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=25))
def test_the_area_is_the_share_of_pairs_in_order(scored: list[tuple[int, int]]) -> None:
    """Few different scores, so that there are many ties."""
    scores, labels = np.array([s for s, _ in scored], float), np.array([y for _, y in scored])
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    result = classifier.evaluate(scores, labels.tolist())
    assert ("auc" in result) == bool(pairs)
    if pairs:
        in_order = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
        assert result["auc"] == pytest.approx(in_order / len(pairs), abs=1e-12)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 1)), min_size=1, max_size=25))
def test_rates_are_those_of_the_table_of_four(scored: list[tuple[float, int]]) -> None:
    found = {(called, label): 0 for called in (True, False) for label in (0, 1)}
    for score, label in scored:
        found[score > 0, label] += 1
    result = classifier.evaluate([s for s, _ in scored], [y for _, y in scored])
    assert result["accuracy"]["value"] == pytest.approx((found[True, 1] + found[False, 0]) / len(scored))
    for name, among in (("precision", (True, 0)), ("recall", (False, 1))):
        n = found[True, 1] + found[among]
        assert (name in result) == (n > 0)
        if n:
            assert (result[name]["value"], result[name]["n"]) == (pytest.approx(found[True, 1] / n), n)


def test_what_cannot_be_said_is_missing() -> None:
    none_called = classifier.evaluate([-1.0, -2.0], [0, 1])
    assert "precision" not in none_called and none_called["recall"]["value"] == 0
    none_there = classifier.evaluate([1.0, -2.0], [0, 0])
    assert "recall" not in none_there and "auc" not in none_there
    for result in (none_called, none_there):
        assert "nan" not in json.dumps(result).lower()
        assert all(row[3] for _, _, rows in classifier.tables(result) for row in rows)
    with pytest.raises(DataError, match="no dialogues"):
        classifier.evaluate([], [])


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="dialogue 2"):
        classifier.evaluate([1.0, float("nan")], [0, 1])


def test_tables() -> None:
    result = classifier.evaluate([2.0, 0.5, -1.0, 4.0], [1, 0, 0, 1], ["x", "x", "y", "y"])
    (title, columns, rows), (by, _, each) = classifier.tables(result)
    assert title == "label 1: 2 of 4, area under the ROC curve 1.000"
    assert len(columns) == 4 and [(r[0], r[1], r[3]) for r in rows] == [
        ("accuracy", "75.0", "4"),
        ("precision", "66.7", "3"),
        ("recall", "100.0", "2"),
    ]
    assert by == "right, by source" and [(r[0], r[1], r[3]) for r in each] == [("x", "50.0", "2"), ("y", "100.0", "2")]
    assert len(classifier.tables(classifier.evaluate([1.0], [1], ["x"]))) == 1
