"""Flaws of data for supervised fine-tuning, by source: "quality is all you need" (Llama 2, section 3.1).

The paper found that vendors differ, and that a few thousand good examples beat millions; it gives no rules. These are
ours. Each marks what can be dropped: of several copies the first is without flaw.

Memory: hashes of prompts and answers, and a few numbers for each dialogue; no texts.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from llama2cli.measure.flow import Table
from llama2cli.measure.rates import metric, percent, rate
from llama2cli.text.chat import TAGS
from llama2cli.text.records import Record, prompt_id
from llama2cli.text.streams import Place

FLAWS = {
    "unanswered": "the last message is the user's",
    "empty_prompt": "a user message without text",
    "empty_answer": "an answer without text",
    "echo": "an answer that is its prompt again",
    "duplicate": "all but the last answer was there before",
    "repeated": "the same answer was given to other prompts before (--same)",
    "short": "an answer far shorter than most (--outlier)",
    "long": "an answer far longer than most (--outlier)",
    "tags": "a tag of the chat format, as [INST]",
    "control": "the text of a control token, as </s>",
    "template": "the marks of another chat format, as ### Response:",
    "broken": "characters that were lost: U+FFFD",
}
BIT = {name: 1 << i for i, name in enumerate(FLAWS)}
CONTROL = re.compile(r"</?s>|<unk>|<pad>|\[PAD\]|<\|[a-z0-9_]{2,}\|>|<(?:start|end)_of_turn>", re.IGNORECASE)
TEMPLATE = re.compile(
    r"^\s*(?:#{2,3} ?(?:Human|Assistant|Instruction|Input|Response|User|System)\b"
    r"|(?:Human|Assistant|USER|ASSISTANT): )",
    re.MULTILINE,
)
COMMON = 20  # characters of the shortest answer whose repetition is a flaw: "Yes." is a good answer to many prompts
FACTOR = 4  # between an outlier and the median, at least
MAD = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution
MEAN_DEVIATION = 1.2533  # the same for the mean absolute deviation, where more than half of the values are equal


def flaws_alone(record: Record) -> int:
    """The flaws that a dialogue shows by itself, as bits. What is wrong with an answer of weight 0 is in no loss."""
    messages = record["messages"]
    found = BIT["unanswered"] * (messages[-1]["role"] != "assistant")
    previous = ""
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "user":
            found |= BIT["empty_prompt"] * (not text)
        elif message["role"] == "assistant" and message.get("weight") != 0:
            found |= BIT["empty_answer"] * (not text) | BIT["echo"] * (bool(text) and text == previous)
        if TAGS.search(text):
            found |= BIT["tags"]
        if CONTROL.search(text):
            found |= BIT["control"]
        if TEMPLATE.search(text):
            found |= BIT["template"]
        if "\ufffd" in text:
            found |= BIT["broken"]
        previous = text
    return found


def trained_answers(record: Record) -> list[str]:
    """The answers of a dialogue that are in the loss, stripped."""
    messages = record["messages"]
    return [m["content"].strip() for m in messages if m["role"] == "assistant" and m.get("weight") != 0]


@dataclass
class Survey:
    """What is known of the dialogues read so far. `add` each, then `finish`.

    count: the length of a text, in `unit`. same: how often an answer may be given. outlier: how far, in robust standard
    deviations of the logarithm of the length, an answer may be from the median answer.
    """

    count: Callable[[str], int]
    unit: str
    same: int
    outlier: float
    sources: dict[str | None, int] = field(default_factory=dict)
    source: array[int] = field(default_factory=lambda: array("i"))  # of each dialogue, its number
    flaws: array[int] = field(default_factory=lambda: array("H"))  # of each dialogue, bits
    turns: array[int] = field(default_factory=lambda: array("i"))
    owner: array[int] = field(default_factory=lambda: array("q"))  # of each answer, its dialogue
    length: array[int] = field(default_factory=lambda: array("q"))  # of each answer
    prompts: set[str] = field(default_factory=set)
    answers: Counter[bytes] = field(default_factory=Counter)
    files: dict[str, int] = field(default_factory=dict)
    file: array[int] = field(default_factory=lambda: array("i"))  # of each dialogue, the number of its file
    line: array[int] = field(default_factory=lambda: array("q"))  # of each dialogue, its line

    def add(self, place: Place, record: Record) -> None:
        """Look at one dialogue."""
        found = flaws_alone(record)
        messages, answers = record["messages"], trained_answers(record)
        if messages[-1]["role"] == "assistant" and self._was_there(prompt_id(messages[:-1])):
            found |= BIT["duplicate"]
        else:
            for answer in answers:
                digest = blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                self.answers[digest] += 1
                if len(answer) >= COMMON and self.answers[digest] > self.same:
                    found |= BIT["repeated"]
        n = len(self.flaws)
        for answer in filter(None, answers):
            self.owner.append(n)
            self.length.append(max(1, self.count(answer)))
        self.flaws.append(found)
        self.turns.append(sum(m["role"] == "user" for m in messages))
        self.source.append(self.sources.setdefault(record.get("source"), len(self.sources)))
        self.file.append(self.files.setdefault(place.file, len(self.files)))
        self.line.append(place.line)

    def _was_there(self, prompt: str) -> bool:
        before = len(self.prompts)
        self.prompts.add(prompt)
        return len(self.prompts) == before

    def finish(self) -> None:
        """Mark the outliers, which takes all lengths."""
        if not self.length:
            return
        for name, far in zip(("short", "long"), outliers(np.asarray(self.length), self.outlier)):
            for n in np.unique(np.asarray(self.owner)[far]).tolist():
                self.flaws[n] |= BIT[name]

    def names(self) -> Iterator[list[str]]:
        """The names of the flaws of each dialogue, in order."""
        for found in self.flaws:
            yield [name for name, bit in BIT.items() if found & bit]


def outliers(lengths: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """(short, long): which lengths are more than `limit` robust standard deviations and 4 times off the median.

    Of the logarithms, since lengths are skewed. The deviation is the median absolute one (Iglewicz and Hoaglin, 1993,
    whose limit is 3.5), so that outliers, however many below half, do not widen it. The factor keeps answers that are
    all of nearly one length from being outliers of each other.
    """
    logs = np.log(lengths)
    away = logs - np.median(logs)
    deviation = MAD * np.median(np.abs(away)) or MEAN_DEVIATION * np.mean(np.abs(away))
    far = max(limit * deviation, math.log(FACTOR))
    return away < -far, away > far


# --- what is told -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What is known of a source, or of all."""

    name: str | None
    n: int
    flawed: int
    flaws: dict[str, int]
    turns: float
    lengths: np.ndarray  # of its answers, sorted


def groups(survey: Survey) -> list[Group]:
    """All dialogues, then each source that has a name, the most flawed first."""
    flaws, source, turns = (np.asarray(a) for a in (survey.flaws, survey.source, survey.turns))
    owner, length = np.asarray(survey.owner, dtype=np.int64), np.asarray(survey.length)

    def group(name: str | None, mine: np.ndarray) -> Group:
        bits = flaws[mine]
        counts = {flaw: int(((bits & bit) > 0).sum()) for flaw, bit in BIT.items()}
        return Group(
            name, len(bits), int((bits > 0).sum()), counts, float(turns[mine].mean()), np.sort(length[mine[owner]])
        )

    named = [group(name, source == i) for name, i in survey.sources.items() if name is not None]
    every = group(None, np.ones(len(flaws), dtype=bool))
    return [every, *sorted(named, key=lambda g: (-g.flawed / g.n, g.name))]


def records(survey: Survey) -> list[Record]:
    """Metric records: dialogues.total, .flawed, one for each flaw, .turns and the length of answers; then by source."""
    made: list[Record] = []
    for group in groups(survey):
        of: dict[str, Any] = {} if group.name is None else {"source": group.name}
        made.append({"measure": "dialogues.total", "value": group.n, "n": group.n, **of})
        made.append({"measure": "dialogues.turns", "value": group.turns, "n": group.n, **of})
        if n := len(group.lengths):
            for what, value in (("mean", group.lengths.mean()), ("median", np.median(group.lengths))):
                name = f"dialogues.{survey.unit}_per_answer.{what}"
                made.append({"measure": name, "value": float(value), "n": n, **of})
        made.append(metric("dialogues.flawed", rate(group.flawed, group.n), **of))
        made += [metric(f"dialogues.{flaw}", rate(k, group.n), **of) for flaw, k in group.flaws.items()]
    return made


def tables(survey: Survey) -> list[Table]:
    """Sizes by source; shares of flaws by source, the worst first; where each flaw was met first."""
    every, *named = groups(survey)
    rows = [*named, every]
    met = [flaw for flaw, k in every.flaws.items() if k]
    made: list[Table] = []
    columns = ["source", "dialogues", "turns", f"{survey.unit}/answer", "shortest", "median", "longest"]
    made.append((f"{every.n:,} dialogues", columns, [sizes(group) for group in rows]))
    if not met:
        return made
    stars = {flaw: any(stands_out(g.flaws[flaw], g.n, every.flaws[flaw], every.n) for g in named) for flaw in met}
    note = "; * far more than the others" if any(stars.values()) else ""
    made.append((f"flaws, % of dialogues{note}", ["source", "any", *met], [shares(g, every, met) for g in rows]))
    where = [[flaw, f"{every.flaws[flaw]:,}", first_place(survey, flaw), FLAWS[flaw]] for flaw in met]
    width = max(len(row[3]) for row in where)
    made.append(("", ["flaw", "dialogues", "first", "what".ljust(width)], [[*r[:3], r[3].ljust(width)] for r in where]))
    return made


def sizes(group: Group) -> list[str]:
    """The row of a group in the table of sizes."""
    lengths = group.lengths
    told = [lengths.mean(), lengths[0], np.median(lengths), lengths[-1]] if len(lengths) else []
    name = "total" if group.name is None else group.name
    return [name, f"{group.n:,}", f"{group.turns:.1f}", *(f"{x:,.0f}" for x in told), *["-"] * (4 - len(told))]


def shares(group: Group, every: Group, met: list[str]) -> list[str]:
    """The row of a group in the table of flaws."""
    row = ["total" if group.name is None else group.name, percent(rate(group.flawed, group.n))]
    for flaw in met:
        star = group.name is not None and stands_out(group.flaws[flaw], group.n, every.flaws[flaw], every.n)
        row.append(f"{percent(rate(group.flaws[flaw], group.n))}{'*' if star else ''}")
    return row


def stands_out(k: int, n: int, k_all: int, n_all: int) -> bool:
    """Whether the interval of a share lies above that of the share of all others."""
    return n < n_all and rate(k, n)["low"] > rate(k_all - k, n_all - n)["high"]


def first_place(survey: Survey, flaw: str) -> str:
    """file:line of the first dialogue with a flaw."""
    n = next(i for i, found in enumerate(survey.flaws) if found & BIT[flaw])
    return f"{list(survey.files)[survey.file[n]]}:{survey.line[n]}"
