"""Whether an answer obeys an instruction: CHECKs of constraints (see `text.constraints`) as functions of the answer.

    {"regex": "..."}  {"not_regex": "..."}     searched for, in either case unless "case": true stands beside it
    {"all": [CHECK, ...]}  {"any": [CHECK, ...]}
    {"predicate": "NAME", ...}                 one of `PREDICATES`, each with what it wants to know

Nothing of a record is run as code. An expression that backtracks without end is stopped by a timer of the processor's
time (`SECONDS`), and is an error that names it; such a result is never guessed. A predicate says what can be seen in
the characters of an answer, and its docstring says where that is not the whole of what an instruction means.

An answer of white space alone obeys nothing. Answers are compared in Unicode's composed form (NFC).
"""

from __future__ import annotations

import json
import re
import signal
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import FrameType
from typing import Any

from llama2cli.errors import DataError, did_you_mean
from llama2cli.measure.languages import LANGUAGES, SCRIPTS, language_of, script_share
from llama2cli.text.records import Record, Wrong

Checker = Callable[[str], bool]
SECONDS = 1.0  # of processor time that one expression may take on one answer
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE_END = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]|\n\s*\n|\n(?=\s*(?:[-*\u2022]|\d+[.)])\s)"
)
ABBREVIATION = re.compile(r"(?:\b(?i:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|jr|sr)|\b[A-HJ-Z]|^\s*\d+)$", re.MULTILINE)
NUMBER_FOLLOWS = re.compile(r"\bNo$")  # No. 5
EMOJI = re.compile(
    "[\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
)


def compile_check(check: Record, where: str = "check") -> Checker:
    """The function that a CHECK is. where: its field, for errors. Raises Wrong, which names field and fault.

    The function raises DataError for an expression that takes too long, and works in the main thread alone.
    """
    obeys = _compiled(check, where)

    def checker(answer: str) -> bool:
        return bool(answer.strip()) and obeys(unicodedata.normalize("NFC", answer))

    return checker


def _compiled(check: Record, where: str) -> Checker:
    for form in ("all", "any"):
        if form in check:
            several = [_compiled(c, f"{where}.{form}[{i}]") for i, c in enumerate(check[form])]
            every = form == "all"
            return lambda answer: (all if every else any)(one(answer) for one in several)
    if "predicate" in check:
        name = check["predicate"]
        if name not in PREDICATES:
            raise Wrong(f"{where}.predicate", f'there is no predicate "{name}"{did_you_mean(str(name), PREDICATES)}')
        return PREDICATES[name](check, where)
    form = "not_regex" if "not_regex" in check else "regex"
    found = expression(check[form], case=check.get("case", False), where=f"{where}.{form}")
    return found if form == "regex" else lambda answer: not found(answer)


# --- expressions --------------------------------------------------------------------------------------------------


def expression(pattern: str, *, case: bool = False, where: str = "regex") -> Checker:
    """Whether a regular expression (Python's) is found. Raises Wrong for what is none; the function as `limited` does.

    ^ and $ are the ends of the answer, which is stripped; a dot is no line break. (?m) and (?s) say otherwise.
    """
    try:
        compiled = re.compile(pattern, 0 if case else re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as e:
        raise Wrong(where, f"is no regular expression: {e}") from None

    def found(answer: str) -> bool:
        shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
        what = f'the expression "{shown}" takes more than {SECONDS:g} s on an answer of {len(answer):,} characters'
        with limited(SECONDS, f"{what}; write it without a repetition inside a repetition"):
            return compiled.search(answer.strip()) is not None

    return found


@contextmanager
def limited(seconds: float, message: str) -> Iterator[None]:
    """Raise DataError(message) when the block takes more than so much of the processor's time.

    Python's matcher looks for signals while it searches (every 4096 steps), so a timer's handler can stop it. Main
    thread only, where Python handles signals: ValueError elsewhere.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise DataError(message)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --- predicates ---------------------------------------------------------------------------------------------------

Reader = Callable[[Any, str], Any]  # (value, field) -> what the predicate gets; raises Wrong


@dataclass(frozen=True)
class Predicate:
    """A rule with the parameters it wants: their readers by name, and values of those that need not be given.

    Called with a check and its field it gives the Checker, or raises Wrong for a parameter.
    """

    rule: Callable[[str, Record], bool]
    wants: dict[str, Reader] = field(default_factory=dict)
    default: Record = field(default_factory=dict)

    def __call__(self, check: Record, where: str) -> Checker:
        """The Checker of a check that names this predicate."""
        for name in check:
            if name != "predicate" and name not in self.wants:
                known = ", ".join(self.wants) or "nothing"
                raise Wrong(f"{where}.{name}", f"is not known to the predicate, which takes {known}")
        given = dict(self.default)
        for name, read in self.wants.items():
            if name in check:
                given[name] = read(check[name], f"{where}.{name}")
            elif name not in given:
                raise Wrong(where, f'the predicate "{check["predicate"]}" wants the field "{name}"')
        return lambda answer: self.rule(answer, given)


def natural(value: Any, where: str) -> int:
    """A whole number from 0."""
    if type(value) is not int or value < 0:
        raise Wrong(where, f"expected a whole number from 0, got {json.dumps(value)[:60]}")
    return value


def share(value: Any, where: str) -> float:
    """A share, more than 0 and at most 1."""
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise Wrong(where, f"expected a share, more than 0 and at most 1, got {json.dumps(value)[:60]}")
    return float(value)


def boolean(value: Any, where: str) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise Wrong(where, f"expected true or false, got {json.dumps(value)[:60]}")
    return value


def texts(value: Any, where: str) -> list[str]:
    """A text that is not blank, or a list of such."""
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(v, str) and v.strip() for v in several):
        raise Wrong(where, f"expected a text, or a list of texts, got {json.dumps(value)[:60]}")
    return [unicodedata.normalize("NFC", v.strip()) for v in several]


def one_of(names: Sequence[str]) -> Reader:
    """A reader of one of these names."""

    def read(value: Any, where: str) -> str:
        if value not in names:
            hint = did_you_mean(value, names) if isinstance(value, str) else ""
            raise Wrong(where, f"expected one of {', '.join(names)}, got {json.dumps(value)[:60]}{hint}")
        return str(value)

    return read


def folded(answer: str, p: Record) -> tuple[str, list[str]]:
    """The stripped answer and the texts of a predicate, in one case unless "case" is true."""
    fold = (lambda text: text) if p["case"] else str.casefold
    return fold(answer.strip()), [fold(text) for text in p["text"]]


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, apostrophes and hyphens inside them belong to the word: it's, well-known.

    Scripts that do not part words (Chinese, Thai) give one word for each run.
    """
    return WORD.findall(text)


@lru_cache(maxsize=1024)
def _whole(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])")


def contains(answer: str, p: Record) -> bool:
    """One of the texts is in the answer, also inside a word: "art" is in "party"."""
    whole, texts = folded(answer, p)
    return any(text in whole for text in texts)


def contains_word(answer: str, p: Record) -> bool:
    """One of the texts is in the answer as a word or several, not as part of one: "art" is not in "party"."""
    whole, texts = folded(answer, p)
    return any(_whole(text).search(whole) for text in texts)


def excludes(answer: str, p: Record) -> bool:
    """None of the texts is in the answer, not even inside a word."""
    return not contains(answer, p)


def excludes_word(answer: str, p: Record) -> bool:
    """None of the texts is in the answer as a word."""
    return not contains_word(answer, p)


def starts_with(answer: str, p: Record) -> bool:
    """The answer begins with one of the texts."""
    whole, texts = folded(answer, p)
    return whole.startswith(tuple(texts))


def ends_with(answer: str, p: Record) -> bool:
    """The answer ends with one of the texts, its punctuation too."""
    whole, texts = folded(answer, p)
    return whole.endswith(tuple(texts))


def starts_with_word(answer: str, p: Record) -> bool:
    """The first words are those of one of the texts; what stands before and between them does not count."""
    whole, texts = folded(answer, p)
    said = words_of(whole)
    return any(said[: len(w)] == w for w in map(words_of, texts) if w)


def ends_with_word(answer: str, p: Record) -> bool:
    """The last words are those of one of the texts; what stands between and behind them does not count."""
    whole, texts = folded(answer, p)
    said = words_of(whole)
    return any(said[-len(w) :] == w for w in map(words_of, texts) if w)


def max_words(answer: str, p: Record) -> bool:
    """At most n words (see `words_of`)."""
    return len(words_of(answer)) <= p["n"]


def min_words(answer: str, p: Record) -> bool:
    """At least n words (see `words_of`)."""
    return len(words_of(answer)) >= p["n"]


def max_characters(answer: str, p: Record) -> bool:
    """At most n characters, white space at the ends apart."""
    return len(answer.strip()) <= p["n"]


def sentences_of(text: str) -> list[str]:
    """Sentences: they end with . ! ? or \u2026 before white space, an empty line, or before an item of a list.

    A point behind a common abbreviation, an initial or the number of an item ends none, nor do points before a small
    letter ("Wait... what?"). "etc." at the end of a sentence is taken for one in the middle; a line break alone
    (verse) ends none.
    """
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        before, after = text[max(0, end.start() - 12) : end.start()], text[end.end() :].lstrip()
        if end[0] in ("...", "\u2026") and after[:1].islower():
            continue
        if end[0] == "." and after and ABBREVIATION.search(before):
            continue
        if end[0] == "." and after[:1].isdigit() and NUMBER_FOLLOWS.search(before):
            continue
        found.append(text[start : end.end()])
        start = end.end()
    return [s.strip() for s in [*found, text[start:]] if WORD.search(s)]


def max_sentences(answer: str, p: Record) -> bool:
    """At most n sentences (see `sentences_of`): "answer in one sentence only" (Llama 2, section 3.3) is n = 1."""
    return len(sentences_of(answer)) <= p["n"]


def lines(answer: str, p: Record) -> bool:
    """Exactly n lines that are not blank. A haiku has 3 of them and at most 17 words, and that much can be seen."""
    return sum(bool(line.strip()) for line in answer.splitlines()) == p["n"]


def no_digits(answer: str, p: Record) -> bool:
    """No decimal digit of any script; numbers in words are not seen."""
    return not any(c.isdecimal() for c in answer)


def lower_case(answer: str, p: Record) -> bool:
    """There are letters, and none is upper case."""
    return answer.lower() == answer and answer.upper() != answer


def upper_case(answer: str, p: Record) -> bool:
    """There are letters, and none is lower case. Written out for the few that have no upper case (\u00df)."""
    return answer.upper() == answer and answer.lower() != answer


def has_emoji(answer: str, p: Record) -> bool:
    """A pictograph or symbol of Unicode's blocks for them, arrows and dingbats among them."""
    return EMOJI.search(answer) is not None


def only_emoji(answer: str, p: Record) -> bool:
    """There are emoji, and no letter or digit (those of keycap emoji apart) beside them."""
    rest = re.sub("[0-9#*]\ufe0f?\u20e3", "\u2b50", answer)
    return has_emoji(rest, p) and not any(c.isalnum() for c in EMOJI.sub("", rest))


def is_json(answer: str, p: Record) -> bool:
    """The whole answer is one JSON text; a fence of Markdown around it does not count."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", answer.strip(), re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return True


def language(answer: str, p: Record) -> bool:
    """The answer is in a language, as its function words or its script tell (see `languages.language_of`).

    One too short to tell, as a name, is not.
    """
    return language_of(answer) == p["is"]


def script(answer: str, p: Record) -> bool:
    """At least `share` of the letters are of a script."""
    return script_share(answer, p["is"]) >= p["share"]


TEXT: dict[str, Reader] = {"text": texts, "case": boolean}
EITHER: Record = {"case": False}
NUMBER: dict[str, Reader] = {"n": natural}

PREDICATES: dict[str, Predicate] = {
    "contains": Predicate(contains, TEXT, EITHER),
    "contains_word": Predicate(contains_word, TEXT, EITHER),
    "excludes": Predicate(excludes, TEXT, EITHER),
    "excludes_word": Predicate(excludes_word, TEXT, EITHER),
    "starts_with": Predicate(starts_with, TEXT, EITHER),
    "ends_with": Predicate(ends_with, TEXT, EITHER),
    "starts_with_word": Predicate(starts_with_word, TEXT, EITHER),
    "ends_with_word": Predicate(ends_with_word, TEXT, EITHER),
    "max_words": Predicate(max_words, NUMBER),
    "min_words": Predicate(min_words, NUMBER),
    "max_characters": Predicate(max_characters, NUMBER),
    "max_sentences": Predicate(max_sentences, NUMBER),
    "lines": Predicate(lines, NUMBER),
    "no_digits": Predicate(no_digits),
    "lower_case": Predicate(lower_case),
    "upper_case": Predicate(upper_case),
    "has_emoji": Predicate(has_emoji),
    "only_emoji": Predicate(only_emoji),
    "json": Predicate(is_json),
    "language": Predicate(language, {"is": one_of(LANGUAGES)}),
    "script": Predicate(script, {"is": one_of(SCRIPTS), "share": share}, {"share": 0.7}),
}
