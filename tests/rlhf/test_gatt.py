"""The Ghost Attention rewrite: properties over any dialogue, and what is drawn against the binomial distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.rlhf import gatt

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
RULE = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@st.composite
def dialogues(draw) -> list[dict]:
    """System or none, user and assistant in turn, answered to the end; some with weights and fields of their own."""
    made = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 6))):
        made.append({"role": "user", "content": draw(TEXT), "n": i})
        weight = draw(st.sampled_from([{}, {"weight": 0}, {"weight": 1}]))
        made.append({"role": "assistant", "content": draw(TEXT), **weight})
    return made


def contents(messages: list[dict], role: str) -> list[str]:
    return [m["content"] for m in messages if m["role"] == role]


# --- the rewrite --------------------------------------------------------------------------------------------------


@given(dialogues(), RULE, st.sampled_from(gatt.PLACES), st.booleans())
def test_the_rewrite(messages, rule, place, expand):
    """Answers, user contents but the first, order and fields of messages are untouched; one answer is trained."""
    before = [dict(m) for m in messages]
    made = gatt.rewrite(messages, rule, place=place, expand=expand)
    assert messages == before
    n = len(contents(messages, "user"))
    assert len(made) == (n if expand else 1)
    for turns, record in zip(range(1, n + 1) if expand else [n], made):
        users = contents(messages, "user")[:turns]
        if place == "first":
            assert contents(record, "user") == [f"{rule}\n\n{users[0]}", *users[1:]]
            assert contents(record, "system") == contents(messages, "system")
        else:
            assert contents(record, "user") == users
            own = contents(messages, "system")
            assert contents(record, "system") == ([f"{own[0]}\n\n{rule}"] if own else [rule])
        assert contents(record, "assistant") == contents(messages, "assistant")[:turns]
        roles = [m["role"] for m in record if m["role"] != "system"]
        assert roles == ["user", "assistant"] * turns and all(m["role"] != "system" for m in record[1:])
        assert [m["weight"] for m in record if m["role"] == "assistant"] == [0] * (turns - 1) + [1]
        assert not any("weight" in m for m in record if m["role"] != "assistant")
        assert [m["n"] for m in record if m["role"] == "user"] == list(range(turns))


@given(dialogues(), st.sampled_from(gatt.PLACES), st.booleans())
def test_no_later_user_message_contains_the_instruction(messages, place, expand):
    rule = "\0Act as Napoleon.\0"  # in no generated text of 20 characters by chance
    for record in gatt.rewrite(messages, rule, place=place, expand=expand):
        holding = [i for i, m in enumerate(record) if rule in m["content"]]
        assert holding == [
            next(i for i, m in enumerate(record) if m["role"] == ("user" if place == "first" else "system"))
        ]


@given(dialogues(), RULE)
def test_augmented_is_every_user_message(messages, rule):
    made = gatt.augment(messages, rule)
    assert contents(made, "user") == [f"{rule}\n\n{text}" for text in contents(messages, "user")]
    assert [m for m in made if m["role"] != "user"] == [m for m in messages if m["role"] != "user"]
    assert gatt.keep_once(messages, rule)[:2] == made[:2]  # the first turn is the one that the policy answered


@given(dialogues(), RULE, st.sampled_from(gatt.PLACES))
def test_expanded_records_are_the_rewrites_of_the_prefixes(messages, rule, place):
    whole = gatt.rewrite(messages, rule, place=place, expand=True)
    assert whole == [gatt.rewrite(p, rule, place=place)[0] for p in gatt.prefixes(messages)]
    assert whole[-1:] == gatt.rewrite(messages, rule, place=place)


def test_by_hand():
    """The paper's [u1, a1, ..., un, an] with its own instruction."""
    messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["Hi", "Bonjour", "Who?", "Moi"])]
    [made] = gatt.rewrite(messages, "Act as Napoleon.")
    assert made == [
        {"role": "user", "content": "Act as Napoleon.\n\nHi"},
        {"role": "assistant", "content": "Bonjour", "weight": 0},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Moi", "weight": 1},
    ]


def test_what_cannot_be_rewritten():
    asked = [{"role": "user", "content": "Hi"}]
    for wrong in ([], asked):
        with pytest.raises(ValueError, match=r"ends with an answer|without a user message"):
            gatt.rewrite(wrong, "x")
    with pytest.raises(ValueError, match="expected one of first, system"):
        gatt.keep_once(asked, "x", place="last")


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=8), st.floats(0, 1))
def test_a_share_of_the_best_over_windows(windows, share):
    """The share of all, to half a record, and in each window none is left out that is better than one that is kept."""
    seen = kept = 0
    for rewards in windows:
        chosen = gatt.best_share(rewards, share, seen)
        seen, kept = seen + len(rewards), kept + len(chosen)
        assert chosen == sorted(set(chosen)) and abs(kept - share * seen) <= 0.5 + 1e-9
        others = [r for i, r in enumerate(rewards) if i not in chosen]
        assert not chosen or not others or min(rewards[i] for i in chosen) >= max(others)


# --- the instruction ----------------------------------------------------------------------------------------------


def constraint(kind: str, name: str, short: bool = True) -> dict:
    made = {"kind": kind, "instruction": f"Be {kind} {name}"}
    return made | ({"short": f"{kind}: {name}."} if short else {})


MANY = [constraint("hobby", f"h{i}") for i in range(30)] + [constraint("figure", f"f{i}") for i in range(3)]
MANY += [constraint("language", f"l{i}") for i in range(5)]


def within(k: int, n: int, p: float, sigmas: float = 4) -> bool:
    """Whether k of n is what a binomial distribution gives."""
    return abs(k - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("shortened", "combined", "most"), [(0.5, 0.5, 3), (0.1, 0.8, 2)])
def test_shares_are_binomial(seed, shortened, combined, most):
    n = 4000
    drawn = [
        gatt.draw(MANY, seed=seed, dialogue=f"d{i}", shortened=shortened, combined=combined, most=most)
        for i in range(n)
    ]
    assert within(sum(d.shortened for d in drawn), n, shortened)
    sizes = Counter(len(d.constraints) for d in drawn)
    assert within(n - sizes[1], n, combined)
    for size in range(2, most + 1):  # each size of a combination alike
        assert within(sizes[size], n - sizes[1], 1 / (most - 1))
    singles = [d.constraints[0] for d in drawn if len(d.constraints) == 1]
    of_kind = Counter(c["kind"] for c in singles)
    assert all(within(of_kind[kind], len(singles), 1 / 3) for kind in ("hobby", "figure", "language"))
    figures = Counter(c["instruction"] for c in singles if c["kind"] == "figure")
    assert all(within(k, of_kind["figure"], 1 / 3) for k in figures.values()) and len(figures) == 3
    both = sum(d.shortened and len(d.constraints) > 1 for d in drawn)
    assert within(both, n, shortened * combined)  # independent


def test_a_combination_is_of_different_kinds():
    for i in range(300):
        kinds = [c["kind"] for c in gatt.draw(MANY, seed=0, dialogue=str(i), combined=1, most=9).constraints]
        assert len(kinds) == len(set(kinds)) >= 2
    one = [c for c in MANY if c["kind"] == "hobby"]
    assert {len(gatt.draw(one, seed=0, dialogue=str(i), combined=1).constraints) for i in range(50)} == {1}


def test_what_is_drawn_depends_on_seed_dialogue_and_sample_alone():
    def draw(**changed):
        return gatt.draw(MANY, **{"seed": 3, "dialogue": "x", "sample": 1, **changed})

    assert draw() == draw()
    others = [draw(seed=4), draw(dialogue="y"), draw(sample=2)]
    assert all(o.constraints != draw().constraints for o in others)
    for p in (0.0, 0.3, 1.0):
        assert draw(shortened=p).constraints == draw().constraints
    # pinned: another platform or version of Python must not draw other data
    assert gatt.numbers("constraints", 3, "x", 1).random() == 0.9019273966562215


def test_instruction_and_short_form():
    a, b, bare = (
        constraint("figure", "Napoleon"),
        constraint("hobby", "tennis"),
        constraint("word", "ahoy", short=False),
    )
    assert gatt.Drawn((a,), False).kept == gatt.Drawn((a,), False).instruction == "Be figure Napoleon"
    assert gatt.Drawn((a,), True).kept == "figure: Napoleon."
    both = gatt.Drawn((a, b, bare), True)
    assert both.instruction == "Be figure Napoleon. Be hobby tennis. Be word ahoy."
    assert both.kept == "figure: Napoleon. hobby: tennis. Be word ahoy."
    assert gatt.combine(["Is it?", "说中文", "Yes!"]) == "Is it? 说中文. Yes!"
    assert not gatt.draw([bare], seed=0, dialogue="x", shortened=1).shortened
    with pytest.raises(ValueError, match="no constraints"):
        gatt.draw([], seed=0, dialogue="x")
