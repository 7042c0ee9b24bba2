"""Facts with dates: what a date may mean against the calendar, the order of two, and the dialogues they become."""

from __future__ import annotations

import calendar
import json
from datetime import date, timedelta
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.text.formats import read_dialogues
from llama2cli.text.records import Wrong
from llama2cli.text.temporal import case_at, case_of, happened, read_date, read_facts

FACT = {"question": "Who won?", "answer": "Ann", "event_date": "2020-05", "query_date": "2021"}


# --- dates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "first", "last", "now"),
    [
        ("2023-07-18", date(2023, 7, 18), date(2023, 7, 18), "Today is 18 July 2023."),
        ("2024-02", date(2024, 2, 1), date(2024, 2, 29), "Today is February 2024."),
        ("1900-2", date(1900, 2, 1), date(1900, 2, 28), "Today is February 1900."),
        ("1999-12", date(1999, 12, 1), date(1999, 12, 31), "Today is December 1999."),
        ("852", date(852, 1, 1), date(852, 12, 31), "It is the year 852."),
        (2023, date(2023, 1, 1), date(2023, 12, 31), "It is the year 2023."),
        ("0852-03-09", date(852, 3, 9), date(852, 3, 9), "Today is 9 March 852."),
        (9999, date(9999, 1, 1), date(9999, 12, 31), "It is the year 9999."),
    ],
)
def test_what_a_date_may_mean(given_as: str | int, first: date, last: date, now: str) -> None:
    span = read_date(given_as, "event_date")
    assert (span.first, span.last, span.now()) == (first, last, now)


@given(st.integers(1, 9999), st.integers(1, 12))
def test_months_end_as_the_calendar_says(year: int, month: int) -> None:
    span = read_date(f"{year}-{month:02}", "x")
    assert span.last == date(year, month, calendar.monthrange(year, month)[1])
    assert span.said == f"{calendar.month_name[month]} {year}"


@pytest.mark.parametrize(
    "value", ["", "yesterday", "18.7.2023", "2023-7-18T00:00", "20230718", "2023-", -44, "12023", "2023-07-18-01"]
)
def test_what_is_no_date(value: str | int) -> None:
    with pytest.raises(Wrong) as error:
        read_date(value, "query_date")
    field, message = error.value.args
    assert field == "query_date" and "expected a date as 2023-07-18, 2023-07 or 2023" in message


@pytest.mark.parametrize("value", ["2023-13", "2023-02-29", "2023-00-01", 0, "0000-01-01"])
def test_dates_that_do_not_exist(value: str | int) -> None:
    with pytest.raises(Wrong, match="there is no such date"):
        read_date(value, "query_date")


# --- the order of two ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "query", "expected"),
    [
        ("2020", "2021", True), ("2021", "2020", False), ("2020", "2020", None), ("2020-05", "2020", None),
        ("2020-05-01", "2020-05", True),  # the month's first day: it has happened whatever day is meant
        ("2020-05-02", "2020-05", None), ("2020-05-02", "2020-06", True), ("2020-06", "2020-05-31", False),
        ("2020-05-31", "2020-05-31", True), ("2020-06-01", "2020-05-31", False), ("2020", "2020-12-31", True),
        ("2020", "2020-12-30", None), (852, 2023, True), (2023, 852, False), ("2020-01", "2020", None),
        ("2020-01-01", "2020", True),
    ],
)  # fmt: skip
def test_whether_it_has_happened(event: str | int, query: str | int, expected: bool | None) -> None:
    assert happened(read_date(event, "a"), read_date(query, "b")) is expected


days = st.integers(0, 900).map(lambda n: date(2019, 6, 1) + timedelta(n))
partial = st.tuples(days, st.sampled_from(["%Y", "%Y-%m", "%Y-%m-%d"])).map(lambda x: x[0].strftime(x[1]))


@given(partial, partial)
def test_the_order_is_that_of_all_days_that_may_be_meant(event: str, query: str) -> None:
    """By brute force: every day of the one against every day of the other."""
    a, b = read_date(event, "a"), read_date(query, "b")

    def all_days(span):
        n = (span.last - span.first).days
        return {span.first + timedelta(i) for i in ((0, n) if n < 1 else (0, 1, n - 1, n))}

    verdicts = {e <= q for e, q in product(all_days(a), all_days(b))}
    assert happened(a, b) is (verdicts.pop() if len(verdicts) == 1 else None)


# --- dialogues ----------------------------------------------------------------------------------------------------


def talk(system: str, question: str, answer: str) -> list[dict]:
    texts = (("system", system), ("user", question), ("assistant", answer))
    return [{"role": role, "content": text} for role, text in texts]


def test_the_dialogues_of_a_fact() -> None:
    after = case_of(FACT)
    assert after.dialogue() == talk("It is the year 2021.", "Who won?", "Ann") and after.after and after.gold == ["Ann"]
    before = case_of({**FACT, "query_date": "2019-03-04"})
    said = "That has not happened yet, as far as I know: today is 4 March 2019."
    assert before.dialogue() == talk("Today is 4 March 2019.", "Who won?", said) and before.after is False
    assert case_of({**FACT, "query_date": 852}).dialogue()[-1]["content"].endswith("it is the year 852.")
    own = case_of({**FACT, "query_date": 2019, "answer_before": "Nobody yet."})
    assert own.dialogue()[-1]["content"] == "Nobody yet."
    assert case_of({**FACT, "answer": ["Ann Bell", "Ann"]}).dialogue()[-1]["content"] == "Ann Bell"
    assert case_of({**FACT, "query_date": "2020"}) is None


def test_an_answered_one() -> None:
    messages = talk("Today is May.", "Who won?", "Bob")
    record = {"messages": messages, "answer": "Ann", "event_date": 2020, "query_date": 2021}
    case = case_of(record)
    assert (case.prompt, case.answered, case.gold, case.after) == (messages[:-1], "Bob", ["Ann"], True)


def test_sft_reads_them(tmp_path: Path, capsys) -> None:
    """By name and by their fields; what the dates do not decide is left out, and counted."""
    lines = [{**FACT, "source": "races"}, {**FACT, "query_date": 2019, "id": 7}, {**FACT, "query_date": 2020}]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for format in ("auto", "temporal"):
        records = [record for _, record in read_dialogues([path], format=format)]
        assert [r["messages"][-1]["content"][:8] for r in records] == ["Ann", "That has"]
        assert records[0]["source"] == "races" and records[1]["id"] == "7"
        assert records[1]["event_date"] == "2020-05" and records[1]["query_date"] == "2019"
        err = capsys.readouterr().err
        assert "read as temporal: 2 dialogues of 3 records; left out 1: the dates do not say" in err


BAD = [
    ({**FACT, "query_date": "soon"}, 'query_date: expected a date as 2023-07-18, 2023-07 or 2023, got "soon"'),
    ({**FACT, "event_date": "2021-02-30"}, 'event_date: there is no such date as "2021-02-30"'),
    ({**FACT, "event_date": None}, "event_date: expected an integer or a string, got null"),
    ({**FACT, "answer": " "}, "answer: is empty"),
    ({**FACT, "answer": []}, "answer: is empty"),
    ({**FACT, "answer": ["Ann", ""]}, "answer[1]: is empty"),
    ({**FACT, "answer": 3}, "answer: expected a string or a list, got an integer"),
    ({**FACT, "question": ""}, "question: is empty"),
]


@pytest.mark.parametrize(("record", "complaint"), BAD)
def test_wrong_facts_are_named(tmp_path: Path, record: dict, complaint: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(FACT)}\n{json.dumps(record)}\n")
    for read in (
        lambda: list(read_dialogues([path], format="temporal")),
        lambda: [case_at(fact, place) for place, fact in read_facts([path])],
    ):
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value).startswith(f"{path}:2: {complaint}")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1]", "expected an object"),
        ('{"question": "x", "answer": "y", "event_date": 3}', 'the field "query_date" is missing'),
        (json.dumps({"messages": talk("a", "b", "c")[:2], "answer": "x", "event_date": 1, "query_date": 2}),
         "messages[1].role: expected the last message to be the assistant's"),
        (json.dumps({"messages": talk("a", "b", "c"), "event_date": 1, "query_date": 2}), 'the field "answer" is'),
        (json.dumps({"messages": [{"role": "user"}], "answer": "x", "event_date": 1, "query_date": 2}),
         'messages[0]: the field "content" is missing'),
        (json.dumps({"messages": [3], "answer": "x", "event_date": 1, "query_date": 2}),
         "messages[0]: expected an object, got an integer"),
    ],
)  # fmt: skip
def test_wrong_records_of_eval_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(FACT)}\n{line}\n")
    with pytest.raises(DataError) as error:
        [case_at(fact, place) for place, fact in read_facts([path])]
    assert f"{path}:2: {complaint}" in str(error.value)
