"""CHECKs against answers that a person judged: those that obey, and those that come near and do not."""

from __future__ import annotations

import threading
import time

import pytest

from llama2cli.errors import DataError
from llama2cli.measure.checkers import PREDICATES, compile_check, limited, sentences_of, words_of
from llama2cli.text.constraints import constraint
from llama2cli.text.records import Wrong

HAIKU = "An old silent pond...\nA frog jumps into the pond,\nsplash! Silence again."

# (check, answers that obey, answers that do not)
CASES = [
    ({"regex": r"\barr+\b"}, ["Arr, matey!", "I say ARRR"], ["Arrive", "barr", "Hello"]),
    ({"regex": r"\bArr\b", "case": True}, ["Arr!"], ["arr!", "ARR"]),
    ({"regex": r"^yes"}, ["Yes.", "  yes, sir"], ["Oh yes", "no\nyes"]),
    ({"regex": r"(?m)^yes"}, ["no\nyes"], ["oh yes"]),
    ({"not_regex": "e"}, ["A sly fox"], ["The fox", "THE FOX"]),
    ({"not_regex": "e", "case": True}, ["THE FOX"], ["The fox"]),
    ({"all": [{"regex": "tennis"}, {"not_regex": "golf"}]}, ["Tennis!"], ["tennis or golf", "golf", "chess"]),
    ({"any": [{"regex": "tennis"}, {"regex": "racket"}]}, ["a racket", "TENNIS"], ["golf"]),
    ({"all": [{"any": [{"regex": "a"}, {"regex": "b"}]}, {"regex": "c"}]}, ["ac", "bc"], ["ab", "c"]),
    ({"predicate": "contains", "text": "art"}, ["modern ART", "a party"], ["music"]),
    ({"predicate": "contains", "text": "Art", "case": True}, ["Art."], ["art"]),
    ({"predicate": "contains", "text": ["waltz", "tango"]}, ["a Tango"], ["a polka"]),
    ({"predicate": "contains_word", "text": "art"}, ["Art, of course", "(art)", "art_"], ["a party", "arts", "arté"]),
    ({"predicate": "contains_word", "text": "tea time"}, ["It is tea time."], ["tea  timer", "teatime"]),
    ({"predicate": "contains_word", "text": "C++"}, ["I use C++."], ["I use C."]),
    ({"predicate": "excludes", "text": ["!", "wow"]}, ["Calm."], ["Hi!", "Wow."]),
    ({"predicate": "excludes_word", "text": "the"}, ["other foxes", "lathe"], ["The fox"]),
    ({"predicate": "starts_with", "text": "Certainly"}, [" certainly, sir"], ["I certainly do"]),
    ({"predicate": "ends_with", "text": "?"}, ["Why? ", "What?\n"], ["Why? Because."]),
    ({"predicate": "starts_with_word", "text": "as napoleon"}, ['"As Napoleon, I say'], ["As Napoleons go"]),
    ({"predicate": "ends_with_word", "text": "woof"}, ["I like bones, woof!", "Woof."], ["woofer", "woof, I said"]),
    ({"predicate": "max_words", "n": 3}, ["one two three", "It's well-known."], ["one two three four"]),
    ({"predicate": "min_words", "n": 3}, ["one two three"], ["one two", "one-two three"]),
    ({"predicate": "max_characters", "n": 5}, [" abcde ", "é" * 5], ["abcdef"]),
    ({"predicate": "max_characters", "n": 5}, ["e\u0301" * 5], []),  # composed, five
    (
        {"predicate": "max_sentences", "n": 1},
        ["Dr. Smith lives at No. 5, St. James St., e.g. in London.", "It costs 3.50 dollars", HAIKU.split("\n")[1],
         "J. R. R. Tolkien wrote it.", "Wait... what?", "A verse\nover two lines.", "Is it? "],
        ["Yes. No.", "The answer is no. Go on.", "It is I. Who else?", "Why? Because!",
         "One\n\nTwo", "- a fox\n- a dog", "你好。再见。", 'He said "no." She left.'],
    ),
    ({"predicate": "lines", "n": 3}, [HAIKU, "a\n\nb\nc\n"], ["a b c", "a\nb\nc\nd"]),
    (
        {"all": [{"predicate": "lines", "n": 3}, {"predicate": "max_words", "n": 17}]},
        [HAIKU],
        ["one line", "this line has far too many words\nfor any haiku that one would write\nand so it is none of them"],
    ),
    ({"predicate": "no_digits"}, ["seven foxes"], ["7 foxes", "٣ foxes"]),
    ({"predicate": "lower_case"}, ["just this: é, ß, 7!"], ["Just this", "I", "123"]),
    ({"predicate": "upper_case"}, ["LOUD AND CLEAR, 7!"], ["Loud", "LOUd", "!!!"]),
    ({"predicate": "has_emoji"}, ["Nice 🎾", "☀ today", "👍🏽", "🇫🇷"], ["Nice :-)", "naïve ©"]),
    ({"predicate": "only_emoji"}, ["🎾🏆!", "👩‍🚀 🚀", "🇫🇷", "1️⃣ 2️⃣", "❤️"], ["🎾 tennis", "!!!", "7 🎾", "ok"]),
    ({"predicate": "json"}, ['{"a": [1, 2]}', " 7 ", '```json\n{"a": 1}\n```'], ["{'a': 1}", 'Sure: {"a": 1}', "{"]),
    ({"predicate": "language", "is": "fr"}, ["Je ne sais pas, mais c'est une bonne question."], ["I do not know."]),
    ({"predicate": "language", "is": "en"}, ["I do not know."], ["Je ne sais pas.", "Napoleon", "42"]),
    ({"predicate": "script", "is": "cyrillic"}, ["Привет, Иван и Bob!"], ["Hello, Иван", "42"]),
    ({"predicate": "script", "is": "cyrillic", "share": 0.3}, ["Hello, Иван"], ["Hello"]),
]  # fmt: skip


@pytest.mark.parametrize(("check", "obeying", "others"), CASES, ids=lambda value: str(value)[:40])
def test_answers(check, obeying, others):
    obeys = compile_check(check)
    assert [a for a in obeying if not obeys(a)] == []
    assert [a for a in others if obeys(a)] == []
    constraint({"kind": "k", "instruction": "i", "check": check}, compile=compile_check)  # the reader takes it


def test_every_predicate_has_cases_and_says_what_it_sees():
    def names(check):
        return (
            {check["predicate"]}
            if "predicate" in check
            else set().union(*(names(c) for c in [*check.get("all", []), *check.get("any", [])]))
        )

    assert set().union(*(names(check) for check, _, _ in CASES)) == set(PREDICATES)
    assert all(p.rule.__doc__ for p in PREDICATES.values())


@pytest.mark.parametrize("check", [case[0] for case in CASES], ids=lambda value: str(value)[:40])
def test_a_blank_answer_obeys_nothing(check):
    assert not compile_check(check)("") and not compile_check(check)(" \n")


@pytest.mark.parametrize(
    ("check", "field", "message"),
    [
        ({"predicate": "langage", "is": "fr"}, "check.predicate", 'did you mean "language"'),
        ({"predicate": "language"}, "check", 'wants the field "is"'),
        ({"predicate": "language", "is": "fra"}, "check.is", "expected one of en, fr"),
        ({"predicate": "max_words", "n": -1}, "check.n", "a whole number from 0, got -1"),
        ({"predicate": "max_words", "n": True}, "check.n", "a whole number from 0, got true"),
        ({"predicate": "max_words", "m": 3}, "check.m", "is not known to the predicate, which takes n"),
        ({"predicate": "no_digits", "n": 3}, "check.n", "which takes nothing"),
        ({"predicate": "contains", "text": []}, "check.text", "expected a text"),
        ({"predicate": "contains", "text": ["a", ""]}, "check.text", "expected a text"),
        ({"predicate": "contains", "text": "a", "case": 1}, "check.case", "true or false"),
        ({"predicate": "script", "is": "latin", "share": 0}, "check.share", "more than 0 and at most 1"),
        ({"regex": "("}, "check.regex", "is no regular expression"),
        ({"regex": "a{99999999999999999999}"}, "check.regex", "is no regular expression"),
        ({"regex": "(" * 5000 + ")" * 5000}, "check.regex", "is no regular expression"),
        ({"all": [{"regex": "a"}, {"any": [{"not_regex": "["}]}]}, "check.all[1].any[0].not_regex", "is no regular"),
    ],
)  # fmt: skip
def test_a_fault_names_its_field(check, field, message):
    with pytest.raises(Wrong) as e:
        compile_check(check)
    assert e.value.args[0] == field and message in e.value.args[1]


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"(a+)+$", "a" * 60 + "b"),
        (r"^(\w+\s?)*$", "the fox says " * 20 + "!"),
        (r"(x+x+)+y", "x" * 60),
        (r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)z", "no end " * 600),
        (r"^(?:a|a)*b|(?:(?:a?){40}a{40})c", "a" * 50),
    ],
)
def test_an_expression_that_backtracks_without_end_is_stopped(pattern, answer, monkeypatch):
    monkeypatch.setattr("llama2cli.measure.checkers.SECONDS", 0.2)
    obeys = compile_check({"not_regex": pattern})
    began = time.process_time()
    with pytest.raises(DataError, match=r"takes more than 0.2 s on an answer of [\d,]+ characters"):
        obeys(answer)
    assert time.process_time() - began < 1.0
    assert compile_check({"regex": "ab+"})("xxabb"), "the next one has its own time"
    burn = time.process_time()
    while time.process_time() - burn < 0.3:  # no timer is left behind
        pass


def test_the_limit_is_taken_away_and_refuses_other_threads():
    with limited(0.05, "too long"):
        pass
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    caught = []

    def elsewhere():
        try:
            with limited(1.0, "x"):
                pass
        except ValueError as e:
            caught.append(e)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert caught, "a search without a limit is not made silently"


def test_nothing_of_a_record_is_code():
    assert not compile_check({"predicate": "contains", "text": "{0.__class__}"})("<class 'str'>")
    assert not compile_check({"predicate": "contains_word", "text": ".*"})("anything")
    with pytest.raises(Wrong):
        compile_check({"predicate": "__import__('os')"})


def test_words_and_sentences():
    assert words_of("It's a well-known fact: l\u2019eau, 3 foxes_here.") == [
        "It's", "a", "well-known", "fact", "l\u2019eau", "3", "foxes", "here",
    ]  # fmt: skip
    assert sentences_of("Mr. Fox came. He ate! Did he? \u201cYes.\u201d") == [
        "Mr. Fox came.", "He ate!", "Did he?", "\u201cYes.\u201d",
    ]  # fmt: skip
    assert sentences_of("1. Run.\n2. Hide") == ["1. Run.", "2. Hide"]
