"""Obedience by turn and attention, by hand, by simulation, and against plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure import gatt
from llama2cli.measure.gatt import Attention, Bin, Judged, Obedience, Share
from llama2cli.measure.rates import wilson
from llama2cli.text.records import validate


def share(*pairs: tuple[int, int]) -> Share:
    made = Share()
    for k, n in pairs:
        made.add(k, n)
    return made


# --- intervals ----------------------------------------------------------------------------------------------------


def test_one_answer_of_each_dialogue_has_wilsons_interval():
    made = share(*[(1, 1)] * 10, *[(0, 1)] * 38)
    rate = made.rate()
    assert (rate["low"], rate["high"]) == wilson(10, 48) and (rate["value"], rate["n"]) == (10 / 48, 48)


def test_dialogues_that_are_all_or_nothing_count_as_one_answer_each():
    """20 dialogues of 5 answers that are all alike: the effective number is about 20 (19, with the c - 1)."""
    made = share(*[(5, 5)] * 10, *[(0, 5)] * 10)
    assert made.effective() == 19 and made.n == 100
    rate = made.rate()
    assert (rate["low"], rate["high"]) == wilson(9.5, 19)


def test_effective_number_by_hand():
    """Shares 3/4, 1/4, 2/4 of three dialogues: p = 1/2, deviations 1, -1, 0, their sum of squares 2 * 3/2 = 3;
    p (1-p) n^2 / 3 = 36 / 3 = 12, the most that there are."""
    assert share((3, 4), (1, 4), (2, 4)).effective() == 12
    # 4/4, 0/4, 2/4: deviations 2, -2, 0, 8 * 3/2 = 12, 36 / 12 = 3
    assert share((4, 4), (0, 4), (2, 4)).effective() == 3
    # unequal ones: 2/2, 1/4: p = 1/2, deviations 1, -1; 2 * 2/1 = 4; 36/4/4 = 2.25
    assert share((2, 2), (1, 4)).effective() == 2


def test_where_all_are_alike_the_dialogues_count():
    assert share(*[(4, 4)] * 12).effective() == 12 and share((4, 4)).effective() == 1
    rate = share(*[(0, 4)] * 12).rate()
    assert (rate["value"], rate["low"], rate["high"]) == (0, *wilson(0, 12))


@given(st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=30))
def test_an_interval_holds_its_value(pairs):
    rate = share(*pairs).rate()
    k, n = (sum(column) for column in zip(*pairs))
    assert rate["value"] == k / n and rate["n"] == n
    assert 0 <= rate["low"] <= k / n + 1e-12 and k / n - 1e-12 <= rate["high"] <= 1
    low, high = wilson(k, n)
    assert rate["high"] - rate["low"] >= high - low - 1e-9, "never narrower than of independent answers"


def test_coverage_by_simulation():
    """Dialogues differ (beta distributed), 10 answers each: Wilson's own interval misses the truth too often."""
    rng = np.random.default_rng(7)
    hits = naive = 0
    for _ in range(800):
        ks = rng.binomial(10, rng.beta(2, 1, size=40))
        rate = share(*[(int(k), 10) for k in ks]).rate()
        hits += rate["low"] <= 2 / 3 <= rate["high"]
        low, high = wilson(int(ks.sum()), 400)
        naive += low <= 2 / 3 <= high
    assert 0.92 <= hits / 800 <= 0.98 and naive / 800 < 0.8


# --- obedience ----------------------------------------------------------------------------------------------------


def two_dialogues() -> Obedience:
    made = Obedience()
    made.add([Judged("hobby", True, [True, True, False]), Judged("figure", False, [True, False])])
    made.add([Judged("hobby", True, [True, True, True])])
    return made


def test_shares_by_turn_kind_and_training():
    made = two_dialogues()

    def of(*key):
        rate = made.rate(*key)
        return rate and (round(rate["value"] * rate["n"]), rate["n"])

    assert [of("", "", t) for t in (1, 2, 3, 4)] == [(3, 3), (2, 3), (1, 2), None]
    assert [of("trained", "", t) for t in (1, 2, 3)] == [(2, 2), (2, 2), (1, 2)]
    assert [of("unseen", "", t) for t in (1, 2, 3)] == [(1, 1), (0, 1), None]
    assert of("") == (3, 5) and of("", "hobby") == (3, 4) and of("unseen", "figure") == (0, 1)
    assert made.shares["", "", 2].c == 2, "a dialogue is counted once, however many instructions it has"
    assert made.kinds() == ["hobby", "figure"] and made.turns() == 3


def test_what_is_not_known_to_be_trained_is_in_neither():
    made = Obedience()
    made.add([Judged("hobby", None, [True, False])])
    assert {split for split, _, _ in made.shares} == {""}
    found = [(r["measure"], r.get("turn"), r.get("category")) for r in gatt.records("m", made)]
    assert found == [("gatt.obedience", 1, None), ("gatt.obedience", 2, None), ("gatt.later", None, None)], "one kind"


def test_the_state_is_the_whole():
    made = two_dialogues()
    again = Obedience.of_state(json.loads(json.dumps(made.state())))
    assert again == made
    again.add([Judged("hobby", False, [True])])
    made.add([Judged("hobby", False, [True])])
    assert list(gatt.records("m", again)) == list(gatt.records("m", made))


def test_records_are_metric_records():
    made = list(gatt.records("run", two_dialogues()))
    for record in made:
        validate("metric", record)
        assert record["model"] == "run" and record["low"] <= record["value"] <= record["high"]
    found = [(r["measure"], r.get("category"), r.get("turn")) for r in made]
    assert found[:4] == [("gatt.obedience", None, t) for t in (1, 2, 3)] + [("gatt.later", None, None)]
    assert ("gatt.obedience", "hobby", 3) in found and ("gatt.later.unseen", "figure", None) in found
    assert len(set(found)) == len(found)
    [later] = [r for r in made if r["measure"] == "gatt.later" and "category" not in r]
    assert (later["value"], later["n"]) == (3 / 5, 5)


def test_the_table_has_the_shape_of_the_papers():
    """Table 30: a row for each turn, 2, 4, 6 and 20 among them, the baseline and GAtt side by side."""
    paper = {2: (100, 100), 4: (10, 100), 6: (0, 100), 20: (0, 100)}
    models = {"baseline": Obedience(), "gatt": Obedience()}
    for dialogue in range(10):
        for column, made in enumerate(models.values()):
            turns = [next(v[column] for t, v in paper.items() if turn <= t) > 10 * dialogue for turn in range(1, 21)]
            made.add([Judged("figure", None, turns)])
    [(title, columns, rows)] = gatt.tables(models)
    assert title == "obeyed %, all instructions" and columns == ["turn", "answers", "baseline", "gatt"]
    assert [row[0] for row in rows] == ["1", *map(str, range(2, 21, 2)), "2 and later"]
    cells = {row[0]: [cell.split()[0] for cell in row[1:]] for row in rows}
    for turn, (baseline, with_gatt) in paper.items():
        assert cells[str(turn)] == ["10", f"{baseline:.1f}", f"{with_gatt:.1f}"]


def test_tables_tell_trained_and_unseen_apart_and_kinds():
    made = gatt.tables({"a": two_dialogues()})
    assert [title for title, _, _ in made] == [
        "obeyed %, all instructions",
        "obeyed % from turn 2 on, all instructions",
        "obeyed %, instructions seen in training",
        "obeyed % from turn 2 on, instructions seen in training",
        "obeyed %, instructions not seen in training",
        "obeyed % from turn 2 on, instructions not seen in training",
    ]
    assert made[3][2][1] == ["figure", "0", "-"]
    shorter = Obedience()
    shorter.add([Judged("hobby", True, [True])])
    rows = gatt.tables({"a": two_dialogues(), "b": shorter})[0][2]
    assert rows[0][1] == "3/1" and rows[1][:2] == ["2", "3/0"] and rows[1][3] == "-"
    assert len(gatt.tables({"b": shorter})) == 1, "all are trained: one table says it"


# --- attention ----------------------------------------------------------------------------------------------------

PARTS = [(1, "start", 0, 2), (1, "instruction", 2, 7), (1, "user", 7, 10), (1, "answer", 10, 14), (2, "user", 14, 19),
         (2, "answer", 19, 28)]  # fmt: skip


def weights(seed: int = 3) -> np.ndarray:
    return np.tril(np.random.default_rng(seed).random((28, 28))).astype(np.float32)


def test_bins_are_neighbours_of_one_part():
    bins = gatt.bins_of(PARTS, 4)
    assert bins[:4] == [
        Bin(1, "start", 0, 2),
        Bin(1, "instruction", 2, 6),
        Bin(1, "instruction", 6, 7),
        Bin(1, "user", 7, 10),
    ]
    assert [b.begin for b in bins[1:]] == [b.end for b in bins[:-1]] and bins[-1].end == 28
    assert max(b.end - b.begin for b in bins) == 4


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_attention_against_plain_loops(size):
    w, bins = weights(), gatt.bins_of(PARTS, size)
    records = list(gatt.attention_records(w, PARTS, size))
    assert [r["turn"] for r in records] == [1, 2]
    for record, (begin, end) in zip(records, ((10, 14), (19, 28))):
        paid = [max(float(w[q, k]) for k in range(2, 7)) for q in range(begin - 1, end - 1)]
        assert record["attention"] == pytest.approx(sum(paid) / len(paid)) and record["largest"] == pytest.approx(
            max(paid)
        )
        rows = [b for b in bins if b.begin >= begin and b.end <= end]
        seen = [b for b in bins if b.begin < end]
        assert record["bins"] == [list(b) for b in seen] and record["bin"] == size
        for row, query in zip(record["map"], rows, strict=True):
            for value, key in zip(row, seen, strict=True):
                largest = max(float(w[q, k]) for q in range(query.begin, query.end) for k in range(key.begin, key.end))
                assert value == pytest.approx(largest, abs=6e-5)
        json.dumps(record)


def test_attention_by_turn_over_dialogues():
    made = Attention()
    for seed in (1, 2, 3):
        made.add(list(gatt.attention_records(weights(seed), PARTS, 4)), [True, seed > 1])
    made.add(list(gatt.attention_records(weights(4)[:14, :14], PARTS[:4], 4)), [True])
    again = Attention.of_state(json.loads(json.dumps(made.state())))
    assert again == made
    records = list(gatt.attention_metrics("m", again))
    assert [(r["turn"], r["n"]) for r in records] == [(1, 4), (2, 3)]
    assert records[1]["value"] == pytest.approx(np.mean(made.paid[2]))
    for record in records:
        validate("metric", record)
    _, columns, rows = gatt.attention_table({"m": made, "n": Attention()})
    assert columns == ["turn", "dialogues", "m", "n"] and [r[0] for r in rows] == ["1", "2"] and rows[0][3] == "-"


def test_the_picture():
    """Weights of 0 but where it is known: each turn is a line, darker in steps of 0.2, the parts marked above."""
    w = np.zeros((28, 28), np.float32)
    w[10:14, 2:6], w[10:14, 6] = 0.95, 0.25
    w[20, 2:6], w[20, 24] = 0.5, 1.0
    made = Attention()
    made.add(list(gatt.attention_records(w, PARTS, 4)), [True, False])
    marks, first, second = gatt.picture(made)
    assert marks == "      " + " iiuauuaaa"
    assert first == "   1  " + " \u2588\u2591"
    assert second == "   2x " + " \u2592" + 6 * " " + "\u2588"
    assert all(len(line) <= 6 + 7 for line in gatt.picture(made, width=5))
    shorter, longest = (
        list(gatt.attention_records(x, p, 4)) for x, p in ((w[:14, :14], PARTS[:4]), (weights(), PARTS))
    )
    made.add(longest, [True, True])
    made.add(shorter, [True])
    assert gatt.picture(made)[1:] == [first, second], "of several the first of the longest"
    other = Attention()
    other.add(shorter, [True])
    other.add(longest, [True, True])
    assert len(gatt.picture(other)) == 3
    narrow = gatt.picture(made, width=5)
    assert narrow[0] == "       iuauaa" and narrow[1] == "   1   \u2588"
