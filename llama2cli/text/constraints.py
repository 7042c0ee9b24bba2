"""Constraints: what a dialogue has to obey, a record each (Llama 2, section 3.3: hobbies, languages, public figures).

    {"kind": "figure", "instruction": "Always act as Napoleon from now on.", "short": "Figure: Napoleon.", "check": ...}

`short` is the less verbose form that half of the training data has. `check` says how to see whether an answer obeys:

    {"regex": "..."}        is found in the answer              {"all": [CHECK, ...]}   every one holds
    {"not_regex": "..."}    is not found                        {"any": [CHECK, ...]}   at least one holds
    {"predicate": "NAME", ...}   a rule that a regular expression cannot say, with what it wants to know

Letters match in either case unless `"case": true` stands beside the expression. Other fields pass through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from llama2cli import console
from llama2cli.errors import DataError, did_you_mean
from llama2cli.text.chat import TAGS
from llama2cli.text.records import Record, Wrong, conform
from llama2cli.text.streams import MAX_LINE, decode, read_json

FIELDS = ("kind", "instruction", "short", "check")
FORMS = ("regex", "not_regex", "all", "any", "predicate")
MAX_DEPTH = 20  # of checks in checks


class Constraint(Struct):
    """What a dialogue has to obey."""

    kind: str
    instruction: str
    short: str | UnsetType = UNSET
    check: dict[str, Any] | UnsetType = UNSET


def read_constraints(
    paths: Sequence[str | Path], *, predicates: Collection[str] | None = None, max_line: int = MAX_LINE
) -> list[Record]:
    """The constraints of files, or of stdin when there are no paths; the same one again is left out and counted.

    predicates: the names that a check may have; None admits any. Raises what `streams.read_lines` raises, and
    DataError, which names file, line and field, for what is no constraint, or where there is none at all.
    """
    found: dict[tuple[str, str], Record] = {}
    for place, text in read_json(paths, max_line=max_line):
        record = constraint(decode(text, place), place, predicates)
        key = record["kind"], record["instruction"].strip()
        if key in found:
            where = f"{place.file}:{place.line}"
            console.warn(f"{where}: left out: the same constraint was there before", "constraints that are given twice")
            continue
        found[key] = record
    if not found:
        raise DataError("holds no constraints", ", ".join(map(str, paths)) or "stdin")
    return list(found.values())


def constraint(record: Any, place: Iterable[object] = (), predicates: Collection[str] | None = None) -> Record:
    """The record, seen to be a constraint. Raises DataError at its place and field."""
    try:
        if isinstance(record, dict):  # as tables exported to JSON have it
            record = {k: v for k, v in record.items() if v is not None or k not in ("short", "check")}
        conform(record, Constraint)
        for name in ("kind", "instruction", "short"):
            if name in record:
                _text(record[name], name)
        if "check" in record:
            _check(record["check"], "check", predicates, 0)
    except Wrong as e:
        field, message = e.args
        raise DataError(f"{field}: {message}" if field else message, *place) from None
    for name in record:
        hint = did_you_mean(name, [f for f in FIELDS if f not in record])
        if name not in FIELDS and hint:
            what = f'the field "{name}" is not known and passes through{hint}'
            console.warn(": ".join([":".join(map(str, place)), what]) if place else what, what)
    return record


def kinds(constraints: Iterable[Record]) -> Counter[str]:
    """How many constraints there are of each kind, in the order of the first of each."""
    return Counter(c["kind"] for c in constraints)


def _text(value: str, field: str) -> None:
    """Raise Wrong for a text that is blank, or would open or close a turn of the chat format."""
    if not value.strip():
        raise Wrong(field, "is empty")
    if found := TAGS.search(value):
        raise Wrong(field, f'holds "{found[0]}", a tag of the chat format')


def _check(check: Any, field: str, predicates: Collection[str] | None, depth: int) -> None:
    """Raise Wrong for what is no check. What a predicate wants to know is for the predicate to say."""
    if not isinstance(check, dict):
        raise Wrong(field, f"expected an object with one of {', '.join(FORMS)}, got {_called(check)}")
    given = [name for name in FORMS if name in check]
    if len(given) != 1:
        hint = next(filter(None, (did_you_mean(name, FORMS) for name in check)), "") if not given else ""
        got = " and ".join(given) or ", ".join(map(str, check)) or "nothing"
        raise Wrong(field, f"expected one of {', '.join(FORMS)}, got {got}{hint}")
    if depth > MAX_DEPTH:
        raise Wrong(field, "is nested too deeply")
    form = given[0]
    value, where = check[form], f"{field}.{form}"
    if form in ("all", "any"):
        if not isinstance(value, list) or not value:
            raise Wrong(where, f"expected a list of checks, got {_called(value)}")
        for i, one in enumerate(value):
            _check(one, f"{where}[{i}]", predicates, depth + 1)
    elif not isinstance(value, str) or not value:
        raise Wrong(where, f"expected {'a name' if form == 'predicate' else 'an expression'}, got {_called(value)}")
    elif form == "predicate":
        if predicates is not None and value not in predicates:
            known = ", ".join(sorted(predicates))
            raise Wrong(where, f'there is no predicate "{value}"{did_you_mean(value, predicates)} (there are {known})')
        return
    else:
        _expression(value, where)
        if not isinstance(check.get("case", False), bool):
            raise Wrong(f"{field}.case", f"expected true or false, got {_called(check['case'])}")
    for name in check:
        if name != form and not (name == "case" and form in ("regex", "not_regex")):
            raise Wrong(f"{field}.{name}", f"is not known beside {form}{did_you_mean(name, ('case',))}")


def _expression(text: str, field: str) -> None:
    """Raise Wrong for what is no regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        raise Wrong(field, f"is no regular expression: {e}") from None


def _called(value: Any) -> str:
    """The type of a value, for a person."""
    names = {"str": "a string", "int": "a number", "float": "a number", "bool": "true or false", "list": "a list",
             "dict": "an object", "NoneType": "null"}  # fmt: skip
    return "nothing" if value in ("", [], {}) else names[type(value).__name__]
