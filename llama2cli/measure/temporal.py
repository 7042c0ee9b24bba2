"""Whether a model knows what has happened by a date (Llama 2, section 5.1, "Time perception").

A question about an event is asked at a date on either side of it. After the event an answer is right that gives what
happened; before it, one that says that it has not happened or is not known. The paper looked at dozens by hand.

What the paper leaves open, all of it: an answer *gives* a right one where its words stand in it in a row (without case,
punctuation and articles), and *denies* where a pattern finds that it says so (`DENIES`, or one's own).

    after the event    right: it gives a right answer, and does not deny
    before it          right: it denies, and gives no right answer

A model that always denies is right on one side: `balanced` is the mean of both sides, with the interval of that mean by
the two Wilson intervals (MOVER: Donner and Zou, 2012).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2cli.measure.flow import Table
from llama2cli.measure.rates import Rate, interval, metric, percent, rate
from llama2cli.text.records import Record

HAPPENED = r"(?:happened|occurred|taken place|come to pass|been|begun|started|existed?|known|held|won|born|announced)"
DENIES = re.compile(
    rf"\b(?:not|never)(?: yet)? {HAPPENED}\b"
    rf"|n't(?: yet)? {HAPPENED}\b"
    r"|\bnot yet\b|\byet to\b|\bno(?:thing)? (?:is )?(?:such|known|knowledge|information|record|idea)\b"
    r"|(?:\b(?:do|does|did|can|could)(?: not|n't)|\bcannot|\bam not able to|\bunable to)(?: yet)? (?:know|say|tell)\b"
    r"|\bin the future\b|\bunknown\b",
    re.IGNORECASE,
)
ARTICLES = {"a", "an", "the"}
SIDES = ("after", "before")


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and articles; none where it has only those."""
    found = re.findall(r"\w+", text.casefold())
    return [word for word in found if word not in ARTICLES]


def gives(answer: str, gold: Sequence[str]) -> bool:
    """Whether one of the right answers stands in an answer, word by word."""
    said = words(answer)
    return any(_stands_in(words(text), said) for text in gold)


def _stands_in(wanted: list[str], said: list[str]) -> bool:
    n = len(wanted)
    return n > 0 and any(said[i : i + n] == wanted for i in range(len(said) - n + 1))


def denies(answer: str, pattern: re.Pattern[str] = DENIES) -> bool:
    """Whether an answer says that the event has not happened, or is not known."""
    return bool(pattern.search(answer.replace("’", "'")))


@dataclass
class Tally:
    """Counts of answers on one side of the event. gave: those with a right answer in them."""

    n: int = 0
    right: int = 0
    gave: int = 0
    denied: int = 0


@dataclass
class Survey:
    """The answers of one model, by side. by_source: by side and source, where the facts have one."""

    pattern: re.Pattern[str] = DENIES
    sides: dict[str, Tally] = field(default_factory=lambda: {side: Tally() for side in SIDES})
    by_source: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def add(self, answer: str, gold: Sequence[str], after: bool, source: str | None = None) -> bool:
        """Judge an answer and count it; whether it is right."""
        gave, denied = gives(answer, gold), denies(answer, self.pattern)
        right = (gave and not denied) if after else (denied and not gave)
        tables = [self.sides]
        if source is not None:
            tables.append(self.by_source.setdefault(source, {side: Tally() for side in SIDES}))
        for table in tables:
            tally = table[SIDES[0] if after else SIDES[1]]
            tally.n += 1
            tally.right += right
            tally.gave += gave
            tally.denied += denied
        return right


def balanced(sides: Mapping[str, Tally]) -> Rate | None:
    """The mean of the shares that are right on both sides; None where one has no answers.

    Its interval is p - sqrt(sum (p_i - l_i)^2) / 2 and p + sqrt(sum (u_i - p_i)^2) / 2.
    """
    if not all(sides[side].n for side in SIDES):
        return None
    shares = [rate(sides[side].right, sides[side].n) for side in SIDES]
    value = sum(share["value"] for share in shares) / 2
    below = math.hypot(*(share["value"] - share["low"] for share in shares)) / 2
    above = math.hypot(*(share["high"] - share["value"] for share in shares)) / 2
    return {"value": value, "n": sum(share["n"] for share in shares), "low": value - below, "high": value + above}


def records(survey: Survey, **groups: Any) -> Iterator[Record]:
    """Metric records: what is right by side (task "after", "before"), balanced, and the two ways to be wrong."""
    for source, sides in ((None, survey.sides), *survey.by_source.items()):
        by = {**groups, "source": source}
        for side in SIDES:
            if (tally := sides[side]).n:
                yield metric("temporal.correct", rate(tally.right, tally.n), task=side, **by)
        if (both := balanced(sides)) is not None:
            yield metric("temporal.balanced", both, **by)
        if (before := sides["before"]).n:  # it tells what it cannot know yet
            yield metric("temporal.leaks", rate(before.gave, before.n), task="before", **by)
        if (after := sides["after"]).n:  # it denies what has happened
            yield metric("temporal.denies", rate(after.denied, after.n), task="after", **by)


def tables(surveys: Mapping[str, Survey]) -> list[Table]:
    """A row for each model, or for each source of a single one: right on either side, and how it is wrong."""
    rows = []
    for name, survey in surveys.items():
        rows.append(_row(name or "all", survey.sides))
        if len(surveys) == 1:
            rows += [_row(source, sides) for source, sides in survey.by_source.items()]
    columns = ["", "after", "right %", "95%", "denied %", "before", "right %", "95%", "told %", "balanced %"]
    return [("answers after the event, and before it", columns, rows)]


def _row(name: str, sides: Mapping[str, Tally]) -> list[str]:
    cells = [name]
    for side, wrong in (("after", "denied"), ("before", "gave")):
        tally = sides[side]
        share = rate(tally.right, tally.n) if tally.n else None
        shown = [percent(share), interval(share)] if share else ["", ""]
        cells += [f"{tally.n:,}", *shown, f"{100 * getattr(tally, wrong) / tally.n:.1f}" if tally.n else ""]
    both = balanced(sides)
    return [*cells, percent(both) if both else ""]
