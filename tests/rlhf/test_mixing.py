"""The mixtures of section 3.2.2: how many pairs of each source an epoch reads, counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import Misuse
from llama2cli.rlhf.mixing import role_of, weights
from llama2cli.training.examples import Order, Part


def read(chosen: dict[str, float], sizes: dict[str, int], epochs: int = 1, seed: int = 0) -> list[Counter[str]]:
    """How often each pair, as "source:number", is read in each epoch."""
    start, parts, names = 0, [], []
    for name, n in sizes.items():
        parts.append(Part(name, np.arange(start, start + n), chosen[name]))
        names += [f"{name}:{i}" for i in range(n)]
        start += n
    order = Order(parts, seed)
    return [Counter(names[i] for i in order.of(epoch)) for epoch in range(epochs)]


def by_source(epoch: Counter[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, n in epoch.items():
        found[name.partition(":")[0]] += n
    return dict(found)


# --- the paper's two mixtures -------------------------------------------------------------------------------------


def test_helpfulness_is_half_and_the_rest_in_proportion() -> None:
    """All 300 helpfulness pairs, and 300 more: 600 safety and 1,200 open ones give a third and two thirds of them."""
    sizes = {"helpfulness": 300, "safety": 600, "open.webgpt": 1000, "open.shp": 200}
    chosen, notes = weights("helpfulness", sizes)
    [epoch] = read(chosen, sizes)
    assert by_source(epoch) == {"helpfulness": 300, "safety": 100, "open.webgpt": 167, "open.shp": 33}
    assert set(epoch.values()) == {1} and notes == []


def test_safety_is_nine_tenths() -> None:
    """ "Meta Safety and Anthropic Harmless with Meta Helpfulness and open source helpfulness data in 90/10"."""
    sizes = {"safety.meta": 500, "safety.harmless": 400, "helpfulness": 600, "open": 400}
    chosen, notes = weights("safety", sizes)
    [epoch] = read(chosen, sizes)
    assert by_source(epoch) == {"safety.meta": 500, "safety.harmless": 400, "helpfulness": 60, "open": 40}
    assert notes == []


@pytest.mark.parametrize("mix", ["helpfulness", "safety"])
def test_a_share_of_one_is_unmixed(mix: str) -> None:
    sizes = {"helpfulness": 50, "safety": 70, "open": 90}
    chosen, notes = weights(mix, sizes, own_share=1.0)
    assert chosen == {name: float(name == mix) for name in sizes} and notes == []
    assert by_source(read(chosen, sizes)[0]) == {mix: sizes[mix]}


def test_another_share() -> None:
    sizes = {"helpfulness": 300, "safety": 400, "open": 500}
    chosen, _ = weights("helpfulness", sizes, own_share=0.75)
    assert by_source(read(chosen, sizes)[0]) == {"helpfulness": 300, "safety": 44, "open": 56}


def test_a_rest_that_is_smaller_than_wanted_is_taken_whole_and_told() -> None:
    sizes = {"helpfulness": 300, "safety": 60, "open": 40}
    chosen, [note] = weights("helpfulness", sizes)
    assert by_source(read(chosen, sizes)[0]) == sizes  # nothing twice
    assert "wants 300" in note and "are 100" in note and "75% are helpfulness" in note
    chosen, [note] = weights("safety", {"safety": 90})
    assert chosen == {"safety": 1.0} and "there are 0" in note and "100%" in note
    chosen, notes = weights("safety", {"safety": 90, "open": 10})  # just enough
    assert chosen == pytest.approx({"safety": 1.0, "open": 1.0}) and notes == []


SIZES = st.fixed_dictionaries(
    {"helpfulness": st.integers(1, 300), "safety.a": st.integers(1, 300), "safety.b": st.integers(1, 300)},
    optional={"open.a": st.integers(1, 300), "open.b": st.integers(1, 300)},
)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, mix=st.sampled_from(["helpfulness", "safety"]), share=st.sampled_from([None, 0.3, 0.5, 0.8, 0.99]))
def test_counts_of_any_sizes(sizes: dict[str, int], mix: str, share: float | None) -> None:
    """The mix's own data once, the rest as the share wants it as far as it goes, each source by its size."""
    chosen, notes = weights(mix, sizes, share)
    got = by_source(read(chosen, sizes)[0])
    own = {name: n for name, n in sizes.items() if name.startswith(mix)}
    rest = {name: n for name, n in sizes.items() if name not in own}
    part = share or {"helpfulness": 0.5, "safety": 0.9}[mix]
    wanted = sum(own.values()) * (1 - part) / part
    taken = min(wanted, sum(rest.values()))
    assert {name: got[name] for name in own} == own
    for name, n in rest.items():
        assert abs(got.get(name, 0) - taken * n / sum(rest.values())) <= 1  # a pair at least is read
    assert bool(notes) == (round(wanted) > sum(rest.values()))


def test_the_drawn_part_rotates_through_all_of_the_rest() -> None:
    """A ninth of 90 is 10 of the 70 others: seven epochs read each of them once, the next seven again."""
    sizes = {"safety": 90, "helpfulness": 42, "open": 28}
    chosen, _ = weights("safety", sizes)
    epochs = read(chosen, sizes, epochs=14)
    assert all(by_source(e) == {"safety": 90, "helpfulness": 6, "open": 4} for e in epochs)
    others = [Counter({k: n for k, n in e.items() if not k.startswith("safety")}) for e in epochs]
    for some in (others[:7], others[7:]):
        total = sum(some, Counter())
        assert len(total) == 70 and set(total.values()) == {1}
    assert [set(e) for e in others[:7]] != [set(e) for e in others[7:]]  # in another order the second time
    another = read(chosen, sizes, seed=1)[0]
    assert set(another) != set(epochs[0])


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["helpfulness", "safety.harmless", "open.web.gpt"])
def test_a_role_stands_before_the_first_dot(name: str) -> None:
    assert role_of(name) == name.split(".")[0]


@pytest.mark.parametrize("name, hint", [("safty", "safety"), ("helpfullness.x", "helpfulness"), ("webgpt", "")])
def test_a_name_without_a_role(name: str, hint: str) -> None:
    with pytest.raises(Misuse) as e:
        weights("safety", {"safety": 3, name: 4})
    assert name in str(e.value) and "safety=FILE" in str(e.value)
    assert (f'did you mean "{hint}"' in str(e.value)) == bool(hint)


def test_a_mix_without_its_own_data() -> None:
    with pytest.raises(Misuse, match="no data named safety: give safety=FILE"):
        weights("safety", {"helpfulness": 3, "open": 5})
