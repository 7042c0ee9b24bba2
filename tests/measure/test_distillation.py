"""The ledger of `distill`: means, paired gains and shares against plain arithmetic, and what a journal keeps of it."""

from __future__ import annotations

import json
import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.measure.distillation import Ledger, Outcome, add_harm, add_outcome, bin_of, records, tables
from llama2cli.text.records import validate

TEMPLATE, PREPROMPT = "template", "preprompt"
# Three prompts, K = 2: plain answers, those under the category's template, and for two of them under a preprompt too.
ONE = Outcome({"safe": [[0.1, 0.3], [0.8, 0.2], [0.5, 0.5]]}, [TEMPLATE, PREPROMPT], [0], 1, "safe", True,
              {"category": "theft"})  # fmt: skip
TWO = Outcome({"safe": [[0.9, 0.7], [0.8, 0.6], [0.1, 0.3]]}, [TEMPLATE, PREPROMPT], [], 0, "safe", True,
              {"category": "theft", "attack": "role play"})  # fmt: skip
THREE = Outcome({"safe": [[0.2, 0.4], [0.5, 0.1]]}, [PREPROMPT], [0], 1, "safe", True, {})


def found(ledger: Ledger) -> dict[tuple, dict]:
    got = list(records(ledger))
    for record in got:
        validate("metric", record)
    keys = ("task", "category", "attack")
    return {(r["measure"], *(r.get(k) for k in keys)): r for r in got}


def test_fig_16_by_hand() -> None:
    ledger = Ledger()
    for outcome in (ONE, TWO, THREE):
        add_outcome(ledger, outcome)
    got = found(ledger)

    def value(measure: str, task: str | None = None, **by: str) -> float:
        return got[measure, task, by.get("category"), by.get("attack")]["value"]

    assert value("distill.safe", "plain") == pytest.approx(mean([0.2, 0.8, 0.3]))
    assert value("distill.safe", "template") == pytest.approx(mean([0.5, 0.7]))
    assert value("distill.safe", "preprompt") == pytest.approx(mean([0.5, 0.2, 0.3]))
    assert value("distill.safe", "best_plain") == pytest.approx(mean([0.3, 0.9, 0.4]))
    assert value("distill.safe", "gated") == pytest.approx(mean([0.8, 0.9, 0.5]))  # the second keeps its own answer
    assert value("distill.safe", "kept") == pytest.approx(mean([0.8, 0.5]))
    assert value("distill.safe", "kept_plain") == pytest.approx(mean([0.3, 0.4]))
    assert value("distill.gain", "template") == pytest.approx(mean([0.3, -0.1]))
    assert value("distill.gain", "preprompt") == pytest.approx(mean([0.3, -0.6, 0.0]))
    assert value("distill.gain", "template_over_preprompt") == pytest.approx(mean([0.0, 0.5]))
    assert value("distill.gain", "kept") == pytest.approx(mean([0.5, 0.1]))
    assert value("distill.gain", "gated") == pytest.approx(mean([0.5, 0.0, 0.1]))
    assert value("distill.kept") == pytest.approx(2 / 3) and value("distill.kept", "template") == 0.5
    assert value("distill.kept", category="theft") == 0.5 and value("distill.kept", attack="role play") == 0
    assert value("distill.kept", "plain 0.2-0.4") == 1.0 and value("distill.kept", "plain 0.8-1.0") == 0.0
    assert value("distill.gain", "plain 0.2-0.4") == pytest.approx(mean([0.3, 0.0]))
    gated = got["distill.safe", "gated", None, None]
    half = 1.959964 * stdev([0.8, 0.9, 0.5]) / math.sqrt(3)
    assert (gated["low"], gated["high"], gated["n"]) == (
        pytest.approx(gated["value"] - half), pytest.approx(gated["value"] + half), 3,
    )  # fmt: skip
    shown = {row[0]: row for row in tables(ledger, ["safe"], "safe")[0][2]}
    assert shown["without a teacher"][1:3] == ["3", "0.433 ±0.364"]
    assert shown["template over preprompt"][3].startswith("0.250 ")


def test_gains_are_paired() -> None:
    """Scores that differ from prompt to prompt, a gain that does not: no doubt about the gain."""
    ledger = Ledger()
    for plain in (0.1, 0.5, 0.8):
        add_outcome(ledger, Outcome({"safe": [[plain], [plain + 0.1]]}, [PREPROMPT], [0], 0, "safe"))
    got = found(ledger)
    gain, safe = got["distill.gain", "preprompt", None, None], got["distill.safe", "plain", None, None]
    assert gain["high"] - gain["low"] < 1e-12 < 0.5 < safe["high"] - safe["low"]
    assert ("distill.safe", "best_plain", None, None) not in got  # with one sample it is the plain one


def test_without_a_gate_all_that_are_kept_count() -> None:
    ledger = Ledger()
    add_outcome(ledger, Outcome({"safe": [[0.5, 0.1], [0.2, 0.4]]}, [PREPROMPT], [0, 1], 0, "safe", False))
    got = found(ledger)
    assert got["distill.safe", "kept", None, None]["value"] == pytest.approx(0.3)
    assert ("distill.safe", "gated", None, None) not in got
    add_outcome(bare := Ledger(), Outcome({}, [PREPROMPT], [0], 0, None, False))
    assert [r["measure"] for r in records(bare)] == ["distill.kept"] * 2 and tables(bare, [], None) == []


def test_harm_by_hand() -> None:
    """Judged by `help`, where the gate is the other model."""
    ledger = Ledger()
    add_harm(ledger, Outcome({"safe": [[0.5], [0.9]], "help": [[0.8], [0.3]]}, [PREPROMPT], [0], 0, "safe"))
    add_harm(ledger, Outcome({"safe": [[0.5], [0.4]], "help": [[0.2], [0.3]]}, [PREPROMPT], [], 0, "safe"))
    got = found(ledger)
    assert got["harm.help", "plain", None, None]["value"] == pytest.approx(0.5)
    assert got["harm.help", "preprompt", None, None]["value"] == pytest.approx(0.3)
    assert got["harm.gain", "preprompt", None, None]["value"] == pytest.approx(-0.2)
    assert got["harm.worse", "preprompt", None, None]["value"] == 0.5
    assert got["harm.kept", None, None, None]["value"] == 0.5
    assert got["harm.gain", "kept", None, None]["value"] == pytest.approx(-0.5)
    assert got["harm.worse", "kept", None, None]["value"] == 1.0
    [(title, _, rows)] = tables(ledger, ["safe", "help"], "safe")
    assert "not adversarial" in title and [row[0] for row in rows] == [
        "without a teacher", "with a preprompt", "best of k without, where one is kept", "kept",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), st.data())
def test_a_journal_loses_nothing(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    """Stopped anywhere and read back from JSON, the ledger ends with the same digits."""
    at = data.draw(st.integers(0, len(pairs)))
    whole, cut = Ledger(), Ledger()
    for i, (plain, taught) in enumerate(pairs):
        outcome = Outcome({"safe": [[plain], [taught]]}, [PREPROMPT], [0] * (taught > plain), 0, "safe")
        add_outcome(whole, outcome)
        if i == at:
            cut = Ledger.of_state(json.loads(json.dumps(cut.state())))
        add_outcome(cut, outcome)
    assert list(records(cut)) == list(records(whole))


@pytest.mark.parametrize(
    ("score", "expected"), [(0.0, "0.0-0.2"), (0.1999, "0.0-0.2"), (0.2, "0.2-0.4"), (0.999, "0.8-1.0"), (1, "0.8-1.0")]
)
def test_bins(score: float, expected: str) -> None:
    assert bin_of(score) == f"plain {expected}"
