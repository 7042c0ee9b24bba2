"""Llama 2, section 3.3 and appendix A.3.5: what Ghost Attention is measured by, held against `eval gatt`.

One test for each rule or number. Asserted is what the paper's text says, or what follows from it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llama2cli.measure import gatt
from llama2cli.measure.checkers import compile_check
from llama2cli.stages import eval_gatt

DEFAULTS = {f.name: f.default for f in dataclasses.fields(eval_gatt.Settings)}
TALK = [{"role": role, "content": f"{role[0]}{n}"} for n in range(1, 21) for role in ("user", "assistant")]


def test_3_3_the_instruction_is_said_once_and_should_be_respected_throughout_the_dialogue() -> None:
    """ "Some instructions should apply for all the conversation turns", and are given in the first."""
    seen = eval_gatt.shown(TALK[:-1], "act as", DEFAULTS["place"])
    assert [i for i, m in enumerate(seen) if "act as" in m["content"]] == [0]


def test_table_30_baseline_and_gatt_by_turn() -> None:
    """Turns 2, 4, 6 and 20, the baseline beside GAtt, in per cent: 100, 10, 0, 0 and 100 throughout."""
    paper = {2: (100.0, 100.0), 4: (10.0, 100.0), 6: (0.0, 100.0), 20: (0.0, 100.0)}
    models = {"baseline": gatt.Obedience(), "+ GAtt": gatt.Obedience()}
    for dialogue in range(10):
        first = {t: 1 if t <= 2 else dialogue == 0 and t <= 4 for t in range(1, 21)}
        models["baseline"].add([gatt.Judged("figure", None, [bool(first[t]) for t in first])])
        models["+ GAtt"].add([gatt.Judged("figure", None, [True] * 20)])
    [(_, columns, rows)] = gatt.tables(models)
    assert columns[2:] == ["baseline", "+ GAtt"]
    shown = {row[0]: tuple(float(cell.split()[0]) for cell in row[2:]) for row in rows}
    assert {turn: shown[str(turn)] for turn in paper} == paper
    assert gatt.shown_turns(30)[-1] == 30, "and beyond 20"


def test_a_3_5_attributes_that_can_be_checked() -> None:
    """ "Attributes limited to public figures and hobbies" can be told by what is named; so can the constraints that
    were not in the training: "Always answer with Haiku" and, elsewhere in 3.3, "answer in one sentence only"."""
    napoleon = compile_check({"regex": r"\b(napoleon|emperor|waterloo|josephine)\b"})
    assert napoleon("As Emperor of the French, I say no.") and not napoleon("I am a language model.")
    haiku = compile_check({"all": [{"predicate": "lines", "n": 3}, {"predicate": "max_words", "n": 17}]})
    assert haiku("An old silent pond\nA frog jumps into the pond\nSplash! Silence again")
    assert not haiku("A haiku is a poem of three lines, and I cannot write one now.")
    one = compile_check({"predicate": "max_sentences", "n": 1})
    assert one("Dr. Who lives at No. 5, and that is all I know.") and not one("Yes. No.")
    french = compile_check({"predicate": "language", "is": "fr"})  # "Language ('Speak in e.g. French')"
    assert french("Je suis désolé, mais je ne sais pas.") and not french("I am sorry, but I do not know.")


def test_fig_10_the_maximum_over_the_network_with_neighbouring_tokens_binned() -> None:
    """ "We considered the maximum activations across the network and we bin neighboring tokens together." """
    rng = np.random.default_rng(0)
    layers = np.tril(rng.random((3, 4, 12, 12)))  # [layers, heads, query, key]
    parts = [(1, "start", 0, 2), (1, "instruction", 2, 6), (1, "user", 6, 8), (1, "answer", 8, 12)]
    [turn] = gatt.attention_records(layers.max((0, 1)), parts, 2)
    assert [b[1:] for b in turn["bins"]] == [
        ["start", 0, 2], ["instruction", 2, 4], ["instruction", 4, 6], ["user", 6, 8],
        ["answer", 8, 10], ["answer", 10, 12],
    ]  # fmt: skip
    assert turn["map"][1][2] == round(float(layers[:, :, 10:12, 4:6].max()), 4)
