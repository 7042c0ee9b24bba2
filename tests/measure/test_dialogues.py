"""Flaws of fine-tuning data: each planted and found, nothing else found; outliers against another way to see them."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure import dialogues
from llama2cli.measure.dialogues import FLAWS, Survey
from llama2cli.text.records import validate
from llama2cli.text.streams import Place


def dialogue(*texts: str, **fields: Any) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **fields}


def survey(*records: dict[str, Any], same: int = 3, outlier: float = 3.5) -> Survey:
    """A finished survey of records, lengths in characters."""
    made = Survey(len, "characters", same, outlier)
    for i, record in enumerate(records, start=1):
        made.add(Place("f.jsonl", i), validate("dialogue", record))
    made.finish()
    return made


def flaws(*records: dict[str, Any], **settings: Any) -> list[list[str]]:
    return list(survey(*records, **settings).names())


GOOD = "An answer of a common length."


@pytest.mark.parametrize(
    "record, expected",
    [
        (dialogue("q", GOOD), []),
        (dialogue("q", GOOD, "more"), ["unanswered"]),
        (dialogue("q", " \n "), ["empty_answer"]),
        (dialogue("q", GOOD, "r", ""), ["empty_answer"]),
        (dialogue(" ", GOOD), ["empty_prompt"]),
        (dialogue("Say it again", " Say it again\n"), ["echo"]),
        (dialogue("", ""), ["empty_prompt", "empty_answer"]),
        (dialogue("q", f"{GOOD} [/INST] more"), ["tags"]),
        (dialogue("<<SYS>> q", GOOD), ["tags"]),
        (dialogue("q", f"{GOOD}</s>"), ["control"]),
        (dialogue("q", f"{GOOD} <|im_end|>"), ["control"]),
        (dialogue("q", f"{GOOD}\n### Response: x"), ["template"]),
        (dialogue("q", f"{GOOD}\n\nHuman: x"), ["template"]),
        (dialogue("q", f"{GOOD} caf\ufffd"), ["broken"]),
        # not flaws: a heading, a person that is spoken of, arithmetic, HTML, an array
        (dialogue("q", "### Results\nHumans: 5 < 6 |> f; <b>x</b>, a[INS]"), []),
        (dialogue("q", "The assistant said: <s1> and [inst]"), []),
    ],
)
def test_a_planted_flaw_is_found(record: dict[str, Any], expected: list[str]) -> None:
    assert flaws(record) == [expected]


def test_weight_0_is_not_trained_on() -> None:
    """So its emptiness is no flaw, but a tag in it would still be read."""
    record = dialogue("q", "", "r", GOOD)
    record["messages"][1]["weight"] = 0
    assert flaws(record) == [[]]
    record["messages"][1]["content"] = "[INST]"
    assert flaws(record) == [["tags"]]


def test_duplicates_are_those_after_the_first() -> None:
    """All before the last answer counts, white space around it does not; the answer may differ."""
    found = flaws(
        dialogue("q", GOOD),
        dialogue("q", "Another answer of that kind."),
        dialogue(" q\n", "A third answer of that kind."),
        dialogue("q", GOOD, "r", "A fourth one, of that kind."),
        dialogue("q", "Something else.", "r", "A fifth one, of that kind."),
        {"messages": [{"role": "system", "content": "s"}, *dialogue("q", "A sixth one, of that kind.")["messages"]]},
        dialogue("q"),
    )
    assert found == [[], ["duplicate"], ["duplicate"], [], [], [], ["unanswered"]]


def test_the_same_answer_may_be_given_so_often() -> None:
    """Only long ones count, and duplicates of a prompt do not count twice."""
    refusals = [dialogue(f"q{i}", "I cannot help you with that.") for i in range(5)]
    assert flaws(*refusals) == [[], [], [], ["repeated"], ["repeated"]]
    assert flaws(*refusals, same=5) == [[]] * 5
    assert flaws(*[dialogue(f"q{i}", "Yes.") for i in range(9)]) == [[]] * 9
    again = [refusals[0], refusals[0], refusals[0], refusals[0], refusals[1]]
    assert flaws(*again) == [[], ["duplicate"], ["duplicate"], ["duplicate"], []]


def test_outliers_by_hand() -> None:
    """Lengths 1, e^1 .. e^5 in logs: median 2.5 away from both ends, deviation 1.4826 x 1.5."""
    lengths = np.exp(np.arange(6.0))
    limit = 2.5 / (1.4826 * 1.5)
    for factor, expected in ((0.99, [True, *[False] * 5]), (1.01, [False] * 6)):
        short, long = dialogues.outliers(lengths, limit * factor)
        assert short.tolist() == expected and long.tolist() == expected[::-1]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.floats(0.5, 5))
def test_outliers_as_the_standard_library_sees_them(lengths: list[int], limit: float) -> None:
    """The definition in Python's own statistics; from a limit of 1 / 1.4826 on, at most half can be outliers."""
    short, long = dialogues.outliers(np.array(lengths), limit)
    logs = np.log(lengths).tolist()
    middle = statistics.median(logs)
    mad = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    assert (short | long).sum() <= len(lengths) / 2 or limit < 1 / 1.48
    if mad > 1e-9:
        far = [abs(x - middle) / mad for x in logs]
        much = [max(n / np.exp(middle), np.exp(middle) / n) for n in lengths]
        for out, f, factor in zip((short | long).tolist(), far, much):
            if abs(f - limit) > 1e-9 and abs(factor - 4) > 1e-9:
                assert out == (f > limit and factor > 4)
    assert not (short & long).any()


def test_an_outlier_among_equals_is_found() -> None:
    """More than half of the same length: their median deviation is 0, and one far off is still far off."""
    records = [dialogue(f"q{i}", f"{i:030}") for i in range(20)]
    assert flaws(*records, dialogue("r", "x" * 30000))[-1] == ["long"]
    assert flaws(*records, dialogue("r", "S"))[-1] == ["short"]
    assert flaws(*records) == [[]] * 20


def vendors() -> Survey:
    """A good vendor of 50, and a bad one of 20, of whose dialogues 10 are echoes and 1 has a tag."""
    good = [dialogue(f"q{i}", f"{GOOD} {i}", source="good") for i in range(50)]
    echo = [dialogue(f"The answer again, {i}", f"The answer again, {i}", source="bad") for i in range(10)]
    fine = [dialogue(f"r{i}", f"{GOOD} {i} [INST]" if i == 0 else f"{GOOD} {i}", source="bad") for i in range(10)]
    return survey(*good, *echo, *fine)


def test_the_bad_vendor_stands_first_and_out() -> None:
    made = dialogues.tables(vendors())
    title, columns, rows = made[1]
    assert title.endswith("* far more than the others") and columns == ["source", "any", "echo", "tags"]
    assert rows == [
        ["bad", "55.0", "50.0*", "5.0"],
        ["good", "0.0", "0.0", "0.0"],
        ["total", "15.7", "14.3", "1.4"],
    ]
    assert [row[:3] for row in made[2][2]] == [["echo", "10", "f.jsonl:51"], ["tags", "1", "f.jsonl:61"]]
    assert all(len(row) == len(columns) for _, columns, rows in made for row in rows)


def test_records() -> None:
    """Valid, one for each flaw and group; figures as counted."""
    made = [validate("metric", record) for record in dialogues.records(vendors())]
    found = {(r["measure"], r.get("source")): r for r in made}
    assert len(found) == len(made) == 3 * (5 + len(FLAWS))
    assert found["dialogues.total", "bad"]["value"] == 20
    assert (found["dialogues.echo", "bad"]["value"], found["dialogues.echo", "bad"]["n"]) == (0.5, 20)
    assert found["dialogues.flawed", None]["value"] == 11 / 70
    lengths = [len(f"{GOOD} {i}") for i in range(50)]
    assert found["dialogues.characters_per_answer.mean", "good"]["value"] == statistics.mean(lengths)
    assert found["dialogues.characters_per_answer.median", "good"]["value"] == statistics.median(lengths)


def test_nothing_wrong_and_nothing_answered() -> None:
    """One table where there is nothing to complain of; no lengths where there are no answers."""
    assert [title for title, _, _ in dialogues.tables(survey(dialogue("q", GOOD)))] == ["1 dialogues"]
    made = survey(dialogue("q"))
    assert dialogues.tables(made)[0][2] == [["total", "1", "1.0", "-", "-", "-", "-"]]
    assert not any("per_answer" in r["measure"] for r in dialogues.records(made))
