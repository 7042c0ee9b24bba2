"""Common beginnings of prompts against a search through all beginnings, and hand-worked cases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.sampling import stems as module
from llama2cli.sampling.stems import stems


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 2)
    monkeypatch.setattr(module, "SPARED", 3)


def most_spared(prompts: list[tuple[int, ...]], beginning: tuple[int, ...] = ()) -> int:
    """The most that can be spared if all prompts with a beginning share it, or those with each longer one do so."""
    n = len(beginning)
    alike = [p for p in prompts if p[:n] == beginning and len(p) > n]
    spared = n * (len(alike) - 1)
    whole = spared if n >= 2 and spared >= 3 else 0
    return max(whole, sum(most_spared(alike, (*beginning, token)) for token in {p[n] for p in alike}))


@settings(max_examples=150, deadline=None)
@given(st.sets(st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple), min_size=1, max_size=20))
def test_no_other_choice_spares_more(prompts):
    prompts = sorted(prompts, key=lambda p: hash((7, p)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST", 2)
        patch.setattr(module, "SPARED", 3)
        found = stems(prompts)
    members = [i for stem in found for i in stem.members]
    assert len(members) == len(set(members))
    for stem in found:
        assert len({prompts[i][: stem.length] for i in stem.members}) == 1
        assert all(stem.length < len(prompts[i]) for i in stem.members)
    assert sum(stem.spared for stem in found) == most_spared(prompts)


def test_by_hand(small):
    system, other = [1, 2, 3, 4, 5], [1, 9, 9, 9]
    prompts = [[*system, 6], [*other, 6], [7, 8], [*system, 7, 8], [*other, 5, 5], [*system, 8]]
    assert [(s.length, sorted(s.members), s.spared) for s in stems(prompts)] == [(5, [0, 3, 5], 10), (4, [1, 4], 4)]
    assert stems([[1, 2, 3]]) == stems([]) == []
    assert [s.length for s in stems([[1, 2, 3, 4], [1, 2, 3, 4, 5]])] == [3]  # each keeps a token of its own


def test_what_is_short_or_few_is_left_out_and_so_is_the_ninth():
    assert stems([[*range(31), 100 + i] for i in range(1000)]) == []
    assert stems([[*range(500), 1000], [*range(500), 1001]]) == []
    nine = [[100 * j + x for x in range(40)] + [i] for j in range(9) for i in range(20 + j)]
    found = stems(nine)
    assert [len(s.members) for s in found] == [28, 27, 26, 25, 24, 23, 22, 21]


def test_prompts_that_grow_word_by_word():
    found = stems([list(range(n)) for n in range(1, 2000)])  # each is the beginning of all that follow
    assert (len(found) == 1 and found[0].length in (999, 1000)) or found[0].spared >= 990_000
