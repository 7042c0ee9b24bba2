"""Statistics of comparisons: by hand, against sums made in another way, and in the shape of the paper's tables."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.measure import preferences
from llama2cli.text.records import validate

WORDS = lambda text: len(text.split())  # noqa: E731


def dialogue(*texts: str, roles: str = "ua") -> list[dict[str, str]]:
    """Messages of user and assistant in turn; roles: their first letters, which repeat."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[r], "content": t} for r, t in zip(itertools.cycle(roles), texts)]


def example() -> list[dict[str, Any]]:
    """Two comparisons of one turn and one of two."""
    two = dialogue("p p p", "r r r r", "p")
    return [
        {"prompt": dialogue("p p"), "chosen": dialogue("r r r", roles="a"), "rejected": dialogue("r", roles="a"),
         "rating": "better", "safety": "both_safe", "batch": 2, "source": "b"},
        {"prompt": dialogue("p p"), "chosen": dialogue("r", roles="a"), "rejected": dialogue("x", roles="a"),
         "rating": "slightly", "batch": 10, "source": "a"},
        {"prompt": two, "chosen": dialogue("r", roles="a"), "rejected": dialogue("r r r", roles="a"),
         "rating": "better", "safety": "chosen_safe", "source": "a"},
    ]  # fmt: skip


def values(records: list[dict[str, Any]], **groups: Any) -> dict[str, float]:
    """measure -> value of the records with exactly these groups."""
    plain = {"measure", "value", "n", "low", "high"}
    return {r["measure"]: r["value"] for r in records if {k: v for k, v in r.items() if k not in plain} == groups}


def test_by_hand() -> None:
    records = preferences.records(preferences.collect(example(), WORDS, "words"))
    for record in records:
        validate("metric", record)
    assert values(records) == {
        "preferences.comparisons": 3,
        "preferences.prompts": 2,
        "preferences.turns": (1 + 1 + 1 + 1 + 2 + 2) / 6,
        "preferences.words_per_example": (5 + 3 + 3 + 3 + 9 + 11) / 6,
        "preferences.words_per_prompt": (4 * 2 + 2 * 4) / 8,
        "preferences.words_per_response": (3 + 1 + 1 + 1 + 4 + 1 + 4 + 3) / 8,
        "preferences.chosen_longer": (1 + 0.5 + 0) / 3,
        "preferences.safety_share.chosen_safe": 1 / 2,
        "preferences.safety_share.both_safe": 1 / 2,
        "preferences.safety_share.both_unsafe": 0,
    }
    assert values(records, rating="better")["preferences.rating_share"] == 2 / 3
    assert values(records, rating="better", source="a")["preferences.rating_share"] == 1 / 2
    assert values(records, source="a")["preferences.comparisons"] == 2
    assert values(records, batch=2)["preferences.turns"] == 1
    assert "preferences.safety_share.both_safe" not in values(records, batch=10)


TEXTS = st.text(alphabet="ab ", max_size=12)


@given(st.lists(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), min_size=1, max_size=6))
def test_an_example_is_its_turns_times_prompt_and_response(dialogues: list[list[tuple[str, str]]]) -> None:
    """And all words are in some mean: what is counted is all of the contents, the prompt once for each answer."""
    comparisons = []
    for turns in dialogues:
        texts = [text for turn in turns for text in turn]
        comparisons.append({
            "prompt": dialogue(*texts[:-1]),
            "chosen": dialogue(texts[-1], roles="a"),
            "rejected": dialogue("other words", roles="a"),
        })  # fmt: skip
    found = preferences.collect(comparisons, WORDS)
    means = {name: value for name, (value, _) in preferences.means(found.total).items()}
    assert means["per_example"] == pytest.approx(means["turns"] * (means["per_prompt"] + means["per_response"]))
    words = [WORDS(m["content"]) for c in comparisons for side in ("chosen", "rejected") for m in c["prompt"] + c[side]]
    assert means["per_example"] == pytest.approx(sum(words) / len(comparisons) / 2)


def test_shares_are_of_those_that_have_a_label() -> None:
    """A pair without a rating is in no share of the ratings; how many have none is told in the table."""
    bare = {k: v for k, v in example()[1].items() if k in ("prompt", "chosen", "rejected")}
    found = preferences.collect([*example(), bare, bare], WORDS, "words")
    assert values(preferences.records(found), rating="better")["preferences.rating_share"] == 2 / 3
    assert values(preferences.records(found))["preferences.safety_share.both_safe"] == 1 / 2
    assert preferences.tables(found)[1][2][-1] == ["total", "0.0", "66.7", "33.3", "0.0", "3", "2"]


def test_a_system_prompt_belongs_to_the_first_turn() -> None:
    record = example()[0] | {"prompt": dialogue("s s s s s", "p", roles="su")}
    means = preferences.means(preferences.collect([record], WORDS).total)
    assert means["turns"] == (1, 2) and means["per_prompt"] == (6, 2)


def test_answers_of_several_messages_are_counted_whole() -> None:
    record = {"prompt": dialogue("p"), "chosen": dialogue("r r", "p p p", "r", roles="au"), "rejected": dialogue("r", roles="a")}  # fmt: skip  # noqa: E501
    means = preferences.means(preferences.collect([validate("comparison", record)], WORDS).total)
    assert means == {"turns": (1.5, 2), "per_example": (4.5, 2), "per_prompt": (5 / 3, 3), "per_response": (4 / 3, 3)}


def test_tables() -> None:
    """Sources in order with a total that counts the rest; batches as numbers; no table of what nobody has."""
    made = preferences.tables(preferences.collect(example(), WORDS, "words"))
    assert [title.partition(" (")[0] for title, _, _ in made] == [
        "comparisons by source", "ratings, %", "safety, %",
        "comparisons by batch; 1 without batch", "ratings, %", "safety, %",
    ]  # fmt: skip
    assert all(len(row) == len(columns) for _, columns, rows in made for row in rows)
    assert [row[0] for row in made[0][2]] == ["a", "b", "total"] and [row[0] for row in made[3][2]] == [
        "2",
        "10",
        "total",
    ]
    assert made[1][2][-1] == ["total", "0.0", "66.7", "33.3", "0.0", "3", "0"]
    assert made[2][2][-1] == ["total", "50.0", "50.0", "0.0", "2", "1"]
    bare = {k: v for k, v in example()[0].items() if k in ("prompt", "chosen", "rejected")}
    [(title, _, _)] = preferences.tables(preferences.collect([bare], WORDS))
    assert title.partition(" (")[0] == "comparisons"


def test_nothing_to_count() -> None:
    with pytest.raises(DataError, match="no comparisons"):
        preferences.collect([], WORDS)
