"""Context distillation: where a template goes, what the student gets, and the gate, against brute force."""

from __future__ import annotations

import copy
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.rlhf import distillation as d
from llama2cli.text.records import take_turns
from llama2cli.text.templates import Lesson


def said(*roles_and_texts: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in roles_and_texts]


LESSON = Lesson("preprompt", "BE GOOD", "<{prompt}>", (("q1", "a1"), ("q2", "a2")))
texts = st.text(alphabet="ab {}\n", max_size=6)


# --- what the teacher sees ----------------------------------------------------------------------------------------


def test_where_the_template_goes() -> None:
    messages = said(("system", "old"), ("user", "x"), ("assistant", "y"), ("user", "z"))
    examples = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    middle = [("user", "x"), ("assistant", "y")]
    assert d.with_teacher(messages, LESSON) == said(("system", "BE GOOD\n\nold"), *examples, *middle, ("user", "<z>"))
    assert d.with_teacher(messages, LESSON, "user") == said(
        ("system", "old"), *examples, *middle, ("user", "BE GOOD\n\n<z>")
    )
    bare = said(("user", "z"))
    alone = Lesson("preprompt", "BE GOOD")
    assert d.with_teacher(bare, alone) == said(("system", "BE GOOD"), ("user", "z"))
    assert d.with_teacher(bare, alone, "user") == said(("user", "BE GOOD\n\nz"))
    assert d.with_teacher(said(("system", ""), ("user", "z")), Lesson("preprompt", ""), "user") == said(("user", "z"))


@given(st.lists(texts, min_size=1, max_size=4), st.none() | texts, texts, texts, st.sampled_from(d.PLACES))
def test_the_messages_are_left_as_they_are(turns, system, preprompt, around, place) -> None:
    """They take turns, hold everything that was asked, and the prompt itself is not touched."""
    messages = said(*([("system", system)] if system is not None else []))
    for i, text in enumerate(turns):
        messages += said(*([("assistant", f"answer {i}")] if i else []), ("user", text))
    before = copy.deepcopy(messages)
    lesson = Lesson("preprompt", preprompt, f"{around.replace('{', '').replace('}', '')}{{prompt}}", (("q", "a"),))
    taught = d.with_teacher(messages, lesson, place)
    assert messages == before
    take_turns(taught, "messages", end="user")
    assert turns[-1] in taught[-1]["content"]
    assert [m for m in messages[:-1] if m["role"] != "system"] == taught[-len(messages) + (system is not None) : -1]


# --- what the student gets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "pattern", "expected"),
    [
        (" as it is ", None, "as it is"),
        ("First 2, then 4.\nAnswer: six\n or so ", r"(?s)Answer:(.*)", "six\n or so"),
        ("First 2, then 4.\nAnswer: six\n or so ", r"Answer:(.*)", "six"),
        ("so: 6", r"\d", "6"),
        ("no idea", r"Answer:(.*)", None),
        ("x", r"x|(y)", None),
        ("Answer:  ", r"Answer:(.*)", ""),
    ],
)
def test_what_is_extracted(answer: str, pattern: str | None, expected: str | None) -> None:
    assert d.extracted(answer, re.compile(pattern) if pattern else None) == expected


def test_the_student_has_the_bare_prompt() -> None:
    sampled = {
        "messages": said(("system", "BE GOOD"), ("user", "<z>"), ("assistant", "thinking. Answer: six")),
        "id": "teacher's", "sample": 2, "policy": "p", "temperature": 0.5, "seed": 1, "n_tokens": 9, "truncated": False,
        "mark": "teacher's",
    }  # fmt: skip
    prompt = {"messages": said(("user", "z")), "id": "mine", "unsafe": True, "n": 3}
    assert d.student(prompt, sampled, "six") == {
        "messages": said(("user", "z"), ("assistant", "six")), "id": "mine", "unsafe": True, "n": 3, "sample": 2,
        "policy": "p", "temperature": 0.5, "seed": 1, "n_tokens": 9, "truncated": False,
    }  # fmt: skip


def test_an_answer_that_quotes_the_template() -> None:
    text = "One must be kind, careful and wise in all things that one says to others."
    lesson = Lesson("preprompt", text)
    prompt = said(("user", "Why?"))
    quote = "I was told: ONE must be kind -- careful and wise in all things!"
    assert d.quotes(quote, lesson, prompt) and not d.quotes(quote, lesson, prompt, 0)
    assert not d.quotes("I must be kind, careful and wise in many ways", lesson, prompt, 8)  # seven words in a row
    assert d.quotes("I must be kind, careful and wise in many ways", lesson, prompt, 7)
    assert not d.quotes(quote, lesson, said(("user", f"Translate: {text}")))  # the prompt has it too
    assert d.quotes("as in: q r s t u v w x", Lesson("preprompt", "", "", (("no", "q r s t u v w x y"),)), prompt)


@pytest.mark.parametrize(
    ("answer", "truncated", "keep", "expected"),
    [("x", False, False, None), ("x", True, False, d.TRUNCATED), ("x", True, True, None), ("", False, False, d.EMPTY),
     (None, False, True, d.UNMATCHED), (None, True, False, d.TRUNCATED), ("", True, True, d.EMPTY)],
)  # fmt: skip
def test_flaws(answer: str | None, truncated: bool, keep: bool, expected: str | None) -> None:
    assert d.flaw(answer, truncated, keep) == expected


def test_which_prompts_are_adversarial() -> None:
    assert d.adversarial({"unsafe": True})
    assert not any(d.adversarial(r) for r in ({}, {"unsafe": False}, {"unsafe": 1}, {"unsafe": "true"}))


# --- the gate -----------------------------------------------------------------------------------------------------

scores = st.lists(st.floats(-50, 50) | st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=6)


@given(scores, st.lists(st.floats(-50, 50) | st.sampled_from([0.0, 1.0]), max_size=6), st.data())
def test_the_gate_never_lowers_a_score(taught: list[float], plain: list[float], data: st.DataObject) -> None:
    """What is kept is allowed, above every plain answer, and the best of those that are; else none is such."""
    allowed = data.draw(st.lists(st.booleans(), min_size=len(taught), max_size=len(taught)))
    kept = d.gate(taught, plain, allowed)
    bar = max(plain, default=-math.inf)
    could = [i for i, may in enumerate(allowed) if may and taught[i] > bar]
    if kept is None:
        assert could == []
    else:
        assert taught[kept] == max(taught[i] for i in could) and kept == min(
            i for i in could if taught[i] == taught[kept]
        )
        assert all(taught[kept] > score for score in plain)


def test_the_gate_by_hand() -> None:
    assert d.gate([1.0], [0.5], [True]) == 0
    assert d.gate([1.0], [1.0], [True]) is None  # a tie is not above
    assert d.gate([1.0, 3.0, 3.0], [2.0, -9.0], [True, True, True]) == 1
    assert d.gate([1.0, 3.0], [2.0], [True, False]) is None  # the best one may not be kept, the other is below
    assert d.gate([-40.0], [-50.0], [True]) == 0  # logits: their sigmoids are as good as the same
    assert d.gate([1.0], [], [True]) == 0 and d.gate([1.0], [], [False]) is None
