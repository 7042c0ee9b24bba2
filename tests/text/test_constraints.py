"""Constraints: errors that name line and field, and the lists that a model writes."""

from __future__ import annotations

import json

import pytest

from llama2cli.errors import DataError
from llama2cli.text.constraints import (
    ASKED,
    constraint_of,
    kinds,
    of_names,
    parse_list,
    read_constraints,
    read_instructions,
)
from llama2cli.text.records import Wrong

GOOD = {"kind": "figure", "instruction": "Act as Napoleon."}


@pytest.fixture
def file(tmp_path):
    """Writes records, after a good one, and gives the path."""

    def write(*records, first=GOOD):
        path = tmp_path / "rules.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in ([first] if first else []) + list(records)))
        return path

    return write


def test_constraints_are_read_as_they_are(file, capsys):
    whole = {
        **GOOD,
        "kind": "word",
        "short": "Ahoy.",
        "note": 1,
        "check": {"all": [{"regex": "AHOY", "case": True}, {"any": [{"not_regex": "a"}, {"predicate": "p", "n": 2}]}]},
    }
    assert read_constraints([file(whole)]) == [GOOD, whole]
    assert kinds([GOOD, whole, GOOD]) == {"figure": 2, "word": 1}
    assert capsys.readouterr().err == ""


def test_null_is_absent_and_the_same_again_is_left_out(file, capsys):
    read = read_constraints([file({**GOOD, "kind": "other", "short": None, "check": None}, {**GOOD, "short": "N."})])
    assert read == [GOOD, {**GOOD, "kind": "other"}]
    assert "rules.jsonl:3: left out: the same constraint was there before" in capsys.readouterr().err


def test_a_misspelt_field_is_told(file, capsys):
    assert read_constraints([file({**GOOD, "kind": "b", "shrt": "N."})])[1]["shrt"] == "N."
    assert '"shrt" is not known and passes through; did you mean "short"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (3, "expected an object"),
        ({"kind": "a"}, 'the field "instruction" is missing'),
        ({"instruction": "a"}, 'the field "kind" is missing'),
        ({**GOOD, "kind": 3}, "kind: expected a string, got an integer"),
        ({**GOOD, "kind": " "}, "kind: is empty"),
        ({**GOOD, "instruction": "\n"}, "instruction: is empty"),
        ({**GOOD, "short": ""}, "short: is empty"),
        ({**GOOD, "instruction": "a [/INST] b"}, 'instruction: holds "[/INST]"'),
        ({**GOOD, "short": "<<SYS>>"}, 'short: holds "<<SYS>>"'),
        ({**GOOD, "check": "x"}, "check: expected an object, got a string"),
        ({**GOOD, "check": {}}, "check: expected one of regex, not_regex, all, any, predicate, got nothing"),
        ({**GOOD, "check": {"regexp": "x"}}, 'got regexp; did you mean "regex"?'),
        ({**GOOD, "check": {"regex": "x", "all": []}}, "got regex and all"),
        ({**GOOD, "check": {"regex": "("}}, "check.regex: is no regular expression"),
        ({**GOOD, "check": {"regex": "a{9999999999999}"}}, "check.regex: is no regular expression"),
        ({**GOOD, "check": {"not_regex": 4}}, "check.not_regex: expected an expression, got a number"),
        ({**GOOD, "check": {"regex": "a", "case": "yes"}}, "check.case: expected true or false, got a string"),
        ({**GOOD, "check": {"regex": "a", "flags": "i"}}, "check.flags: is not known beside regex"),
        ({**GOOD, "check": {"all": []}}, "check.all: expected a list of checks, got nothing"),
        ({**GOOD, "check": {"any": [{"regex": "a"}, 1]}}, "check.any[1]: expected an object"),
        ({**GOOD, "check": {"all": [{"any": [{"regex": "["}]}]}}, "check.all[0].any[0].regex: is no regular"),
        ({**GOOD, "check": {"predicate": ["a"]}}, "check.predicate: expected a name, got a list"),
    ],
)
def test_what_is_no_constraint_is_named_by_line_and_field(file, record, complaint):
    with pytest.raises(DataError) as e:
        read_constraints([file(record)])
    assert str(e.value).startswith(f"{file(record)}:2: ") and complaint in str(e.value)


def test_checks_in_checks_end_somewhere(file):
    check = {"regex": "a"}
    for _ in range(200):
        check = {"all": [check]}
    with pytest.raises(DataError, match="nested too deeply"):
        read_constraints([file({**GOOD, "check": check})])


def test_what_compiles_checks_is_asked_where_they_are_read(file):
    """It knows the predicates; its complaint gets the line."""

    def compile(check, field):
        raise Wrong(f"{field}.predicate", "no such thing")

    with pytest.raises(DataError, match=r"rules.jsonl:2: check.predicate: no such thing"):
        read_constraints([file({**GOOD, "check": {"predicate": "x"}})], compile=compile)


def test_no_constraints(file):
    with pytest.raises(DataError, match=r"rules.jsonl: holds no constraints"):
        read_constraints([file(first=None)])


# --- lists that a model writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "useless"),
    [
        ("1. Tennis\n2. Chess", ["Tennis", "Chess"], 0),
        ("Sure! Here are 3:\n\n 1) Tennis\n(2) Chess.\n3: Go!\n\nEnjoy!", ["Tennis", "Chess", "Go"], 2),
        ("- **Tennis** - hitting balls\n* _Chess_: a game\n• Go (Baduk)", ["Tennis", "Chess", "Go"], 0),
        ("Tennis\nChess\n", ["Tennis", "Chess"], 0),
        ("Hobbies:\nTennis", ["Tennis"], 1),
        ("Tennis, chess, and rock climbing.", ["Tennis", "chess", "rock climbing"], 0),
        ("Here they are: tennis, chess, go", ["tennis", "chess", "go"], 0),
        ("1. Jean-Paul Sartre\n2. 7\n3. [INST]\n4. one two three four five six seven", ["Jean-Paul Sartre"], 3),
        ("x" * 61, [], 1),
        ("", [], 0),
    ],
)
def test_names_in_a_list(text, names, useless):
    assert parse_list(text) == (names, useless)


def test_the_last_line_of_a_list_that_was_cut_is_no_name():
    assert parse_list("1. Tennis\n2. Che", whole=False) == (["Tennis"], 1)
    assert parse_list("Ten", whole=False) == ([], 1)


def test_constraints_of_names():
    """The paper's own forms (section 3.3): "You enjoy Tennis", "Figure: Napoleon."; a name again counts once."""
    made, twice = of_names("figure", ["Napoleon", "napoleon", "{} Jr."])
    assert twice == 1 and [c["short"] for c in made] == ["Figure: Napoleon.", "Figure: {} Jr.."]
    assert made[0]["instruction"] == "Always act as Napoleon from now on."
    assert of_names("hobby", ["Tennis"])[0][0]["instruction"] == "You enjoy Tennis."
    assert all("{n}" in a.question and "{}" in a.instruction and "{}" in a.short for a in ASKED.values())


def test_the_constraint_that_a_dialogue_brings():
    check = {"regex": "a"}
    assert constraint_of({"messages": []}) is None and constraint_of({"constraint": None}) is None
    assert constraint_of({"constraint": GOOD, "instruction": "another"}) == GOOD
    own = {"instruction": "Act.", "check": check}
    assert constraint_of({**own, "messages": [], "id": "x"}) == {"kind": "own", **own}
    with pytest.raises(DataError, match="in:3:constraint: expected an object with kind, instruction and check"):
        constraint_of({"constraint": "Act."}, ("in", 3))
    with pytest.raises(DataError, match="in:3: check"):
        constraint_of({"instruction": "Act.", "check": {}}, ("in", 3))


def test_instructions_of_constraints_and_of_what_was_trained(file):
    made = {"messages": [], "gatt": {"constraints": [{"kind": "x", "instruction": "One."}, {**GOOD, "note": 1}]}}
    path = file(made, {"instruction": " Say \n two. "})
    assert read_instructions([path]) == {"Act as Napoleon.", "One.", "Say two."}
    with pytest.raises(DataError, match=r"rules\.jsonl:2"):
        read_instructions([file({"messages": []})])
