"""Verdicts by majority, shares and means: numbers worked by hand, and the paper's counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.measure.judgements import Item
from llama2cli.measure.violation import by_model, groups_of, judge, majority, records, tables
from llama2cli.text.records import validate
from llama2cli.text.streams import Place

HERE = Place("j.jsonl", 7)


def item(name: str, *scores: float, **groups: Any) -> Item:
    """An item with these ratings."""
    return Item(name, {f"r{i}": score for i, score in enumerate(scores)}, groups)


@pytest.mark.parametrize(
    "scores, violates",
    [
        ((1, 2, 5), True),
        ((2, 3, 3), False),
        ((2, 2, 2), True),
        ((3, 4, 5), False),
        ((2,), True),
        ((1, 1, 3, 3, 3), False),
        ((1, 1, 2, 3, 3), True),
    ],
)
def test_most_of_the_raters_decide(scores: tuple[int, ...], violates: bool) -> None:
    for tie in ("safe", "violation", "drop"):
        assert majority(scores, tie=tie) is violates


def test_a_split_is_decided_by_the_rule() -> None:
    assert (
        majority((1, 5)) is False and majority((1, 5), tie="violation") is True and majority((1, 5), tie="drop") is None
    )
    assert majority((3, 3, 4), at_most=3) is True
    with pytest.raises(ValueError):
        majority(())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_who_said_it_does_not_matter(scores: list[int], draw: random.Random) -> None:
    """The order of raters; and the mirrored scale has the opposite verdict, but for splits."""
    shuffled = draw.sample(scores, len(scores))
    assert majority(scores) is majority(shuffled)
    safe = majority([-s for s in scores], at_most=-3, tie="drop")
    verdict = majority(scores, tie="drop")
    assert safe is (None if verdict is None else not verdict)


def test_figures_by_hand() -> None:
    """Four items of one model: two violate; their means are 5/3, 2, 4 and 14/3."""
    rated = [
        item("a", 1, 2, 2, turn="single", category="x", model="m"),
        item("b", 1, 2, 3, turn="multi", category="y", model="m"),
        item("c", 3, 4, 5, turn="single", category="y", model="m"),
        item("d", 5, 5, 4, turn="single", category="y", model="m"),
        item("e", 1, 1, turn="single", category="y", model="m"),
    ]
    judged = judge(rated)
    assert judged.few == {2: 1} and judged.ties == 0 and len(judged.verdicts) == 4
    [model] = by_model(judged.verdicts)
    assert model.total.rate["value"] == 0.5 and model.total.rate["n"] == 4
    assert model.total.rating.value == pytest.approx((5 / 3 + 2 + 4 + 14 / 3) / 4)
    # Wilson's interval of 2 in 4, from the equation that it solves: |p - 1/2| = 1.959964 sqrt(p (1 - p) / 4)
    for p in (model.total.rate["low"], model.total.rate["high"]):
        assert abs(p - 0.5) == pytest.approx(1.959964 * (p * (1 - p) / 4) ** 0.5)
    assert model.groups["turn"]["single"].rate["value"] == pytest.approx(1 / 3)
    assert model.gap is not None and model.gap.value == pytest.approx(1 - 1 / 3)
    made = [validate("metric", r) for r in records([model])]
    values = {(r["measure"], r.get("turn"), r.get("category")): r["value"] for r in made}
    assert values["violation.rate", None, "y"] == pytest.approx(1 / 3)
    assert values["violation.mean_rating", "single", None] == pytest.approx((5 / 3 + 4 + 14 / 3) / 3)
    assert values["violation.multi_minus_single", None, None] == pytest.approx(2 / 3)
    assert all(len(columns) == len(row) for _, columns, rows in tables([model]) for row in rows)


def test_few_and_split_raters() -> None:
    rated = [item("a", 1, 5), item("b", 1, 1), item("c", 5, 5)]
    assert judge(rated).verdicts == [] and judge(rated).few == {2: 3}
    assert [v.violates for v in judge(rated, raters=2).verdicts] == [False, True, False]
    assert [v.violates for v in judge(rated, tie="violation", raters=2).verdicts] == [True, True, False]
    dropped = judge(rated, tie="drop", raters=2)
    assert [v.item.name for v in dropped.verdicts] == ["b", "c"] and dropped.ties == 1


@pytest.mark.parametrize(
    "record, turn",
    [
        ({"turns": 1}, "single"),
        ({"turns": 3}, "multi"),
        ({"turn": "multi"}, "multi"),
        ({"turn": 1}, "single"),
        ({}, None),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "single"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}, {"role": "user"}]}, "multi"),
    ],
)
def test_what_is_a_multi_turn_prompt(record: dict[str, Any], turn: str | None) -> None:
    assert groups_of(record, HERE).get("turn") == turn


@pytest.mark.parametrize(
    "record, words",
    [
        ({"turns": 0}, "j.jsonl:7: turns: expected a number of user turns from 1, got 0"),
        (
            {"turn": "several"},
            "j.jsonl:7: turn: expected a number of user turns from 1, single or multi, got 'several'",
        ),
        (
            {"category": "hatefull"},
            'j.jsonl:7: category: expected one of hateful, illicit, got "hatefull"; did you mean',
        ),
        ({"batch": 1.5}, "j.jsonl:7: batch: expected a word or a whole number"),
    ],
)
def test_bad_groups(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as e:
        groups_of(record, HERE, ("hateful", "illicit"))
    assert words in str(e.value)
