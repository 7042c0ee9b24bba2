"""Judging answers about dated events: pairs of answers by hand, shares and the interval of their mean."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure.temporal import Survey, balanced, denies, gives, records, tables, words
from llama2cli.text.records import validate
from llama2cli.text.temporal import NOT_YET


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It was Ann Bell, of course.", ["Ann Bell"], True),
        ("IT WAS ANN  BELL", ["ann bell"], True),
        ("It was the Grey Hill", ["Grey Hill"], True),
        ("It was Grey Hill", ["The Grey Hill"], True),
        ("It was Ann and Bell", ["Ann Bell"], False),
        ("Annabel", ["Ann"], False),
        ("Bell Ann", ["Ann Bell"], False),
        ("in 1969.", ["1969"], True),
        ("in 19691", ["1969"], False),
        ("Bob did", ["Ann", "Bob"], True),
        ("", ["Ann"], False),
        ("the", ["the"], False),  # nothing is left to look for
        ("Zürich", ["zürich"], True),
        ("J. Moss wrote it", ["J Moss"], True),
    ],
)
def test_giving_an_answer(answer: str, gold: list[str], expected: bool) -> None:
    assert gives(answer, gold) is expected


@pytest.mark.parametrize(
    "answer",
    [
        NOT_YET.format(now="it is the year 852."),
        "It has not happened yet.",
        "That hasn't yet happened",
        "That hasn’t taken place.",
        "The election has not been held.",
        "I do not know.",
        "I don't know who that is",
        "Sorry, I cannot say.",
        "As of 852, there is no such thing.",
        "No information about it is available.",
        "The winner is yet to be named.",
        "That lies in the future.",
        "Unknown.",
        "He was never born.",
    ],
)
def test_denials(answer: str) -> None:
    assert denies(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Ann Bell won it.",
        "It happened in 2020.",
        "You know Ann!",
        "Nobody but Ann knew the future",
        "Not Bob, but Ann.",
        "",
    ],
)
def test_what_is_no_denial(answer: str) -> None:
    assert not denies(answer)


def test_a_pattern_of_ones_own() -> None:
    assert denies("ich weiß es nicht", re.compile("weiß es nicht")) and not denies("not yet", re.compile("nicht"))


@pytest.mark.parametrize(
    ("answer", "after", "right"),
    [
        ("Ann.", True, True), ("Bob.", True, False), ("That has not happened yet.", True, False),
        ("That has not happened yet; Ann.", True, False), ("Ann.", False, False), ("Bob.", False, False),
        ("That has not happened yet.", False, True), ("It has not happened yet, but Ann will win.", False, False),
    ],
)  # fmt: skip
def test_right_on_either_side(answer: str, after: bool, right: bool) -> None:
    assert Survey().add(answer, ["Ann"], after) is right


def test_the_measures_by_hand() -> None:
    """Ten after the event: 7 right, 2 denied, 1 wrong. Five before it: 3 right, 1 told, 1 neither."""
    survey = Survey()
    for answer in (*["Ann"] * 7, "Not yet.", "I do not know", "Bob"):
        survey.add(answer, ["Ann"], True, "races")
    for answer in (*["Not yet."] * 3, "Ann", "Bob"):
        survey.add(answer, ["Ann"], False)
    got = list(records(survey, model="m"))
    for record in got:
        validate("metric", record)
    mine = {(r["measure"], r.get("task")): r for r in got if "source" not in r}
    assert mine["temporal.correct", "after"]["value"] == 0.7 and mine["temporal.correct", "before"]["value"] == 0.6
    assert mine["temporal.leaks", "before"]["value"] == 0.2 and mine["temporal.denies", "after"]["value"] == 0.2
    both = mine["temporal.balanced", None]
    assert both["value"] == pytest.approx(0.65) and both["n"] == 15 and both["model"] == "m"
    # Wilson's intervals of 7/10 and 3/5 are 0.3968-0.8922 and 0.2307-0.8824.
    assert both["low"] == pytest.approx(0.65 - math.hypot(0.7 - 0.39678, 0.6 - 0.23072) / 2, abs=1e-4)
    assert both["high"] == pytest.approx(0.65 + math.hypot(0.89221 - 0.7, 0.88238 - 0.6) / 2, abs=1e-4)
    races = {(r["measure"], r.get("task")): r["value"] for r in got if r.get("source") == "races"}
    assert races == {("temporal.correct", "after"): 0.7, ("temporal.denies", "after"): 0.2}  # nothing before
    [(_, _, rows)] = tables({"": survey})
    assert rows[0][:4] == ["all", "10", "70.0", "39.7-89.2"] and rows[1][0] == "races" and rows[1][-1] == ""


@given(st.lists(st.tuples(st.sampled_from(["Ann", "not yet", "Bob"]), st.booleans()), min_size=1, max_size=30))
def test_one_answer_for_all_is_half_right(pairs: list[tuple[str, bool]]) -> None:
    """A model that says the same on both sides is right on one of them at most: 50% balanced, whatever the shares."""
    for said in ("Ann", "not yet", "Bob"):
        survey = Survey()
        for _, after in pairs:
            survey.add(said, ["Ann"], after)
        both = balanced(survey.sides)
        if len({after for _, after in pairs}) < 2:
            assert both is None
        else:
            assert both["value"] == (0.0 if said == "Bob" else 0.5)
            assert both["low"] <= both["value"] <= both["high"]


def test_words() -> None:
    assert words("The  Grey-Hill, (a) book!") == ["grey", "hill", "book"] and words("¿?") == []
