"""Llama 2, section 3.3 and appendix A.3.5: Ghost Attention, held against `rlhf.gatt`, `gatt-synth` and its data.

One test for each rule or number. Asserted is what the paper's text says, or what follows from it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from llama2cli.rlhf import gatt
from llama2cli.stages import gatt_synth
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.constraints import ASKED, of_names, read_constraints
from llama2cli.text.tokenizer import Tokenizer, train
from llama2cli.training import dialogues

DEFAULTS = {f.name: f.default for f in dataclasses.fields(gatt_synth.Settings)}
NAPOLEON = {"kind": "figure", "instruction": "Always act as Napoleon from now", "short": "Figure: Napoleon."}
TALK = [
    {"role": role, "content": f"{role[0]}{n}"} for n in (1, 2, 3) for role in ("user", "assistant")
]  # [u1, a1, ..., un, an]


def test_3_3_the_instruction_is_concatenated_to_all_the_user_messages() -> None:
    """ "We can then synthetically concatenate this instruction to all the user messages of the conversation." """
    made = gatt.augment(TALK, "act as")
    assert all(m["content"].startswith("act as") == (m["role"] == "user") for m in made)
    assert [m["content"].split()[-1] for m in made] == ["u1", "a1", "u2", "a2", "u3", "a3"]


def test_3_3_it_is_dropped_in_all_but_the_first_turn() -> None:
    """ "Instead of augmenting all context-dialogue turns [...], we can drop it in all but the first" one."""
    [made] = gatt.rewrite(TALK, "act as")
    assert [("act as" in m["content"]) for m in made] == [True] + [False] * 5
    assert DEFAULTS["place"] == "first"


def test_3_3_the_loss_is_0_for_all_the_tokens_from_the_previous_turns(tmp_path: Path) -> None:
    """ "We simply set the loss to 0 for all the tokens from the previous turns, including assistant messages": of the
    ids that sft trains on, those of the last answer count (with its EOS) and none before them."""
    (tmp_path / "tokenizer.model").write_bytes(train(["act as user assistant 1 2 3"] * 50, 300))
    tokenizer = Tokenizer.load(tmp_path)
    for record in gatt.rewrite(TALK, "act as", expand=True):
        store = dialogues.Dialogues()
        dialogues.add(store, tokenizer, [(("x", 1), {"messages": record})], context=512, tags="escape", long="cut")
        n_before = len(encode_dialogue(tokenizer, record[:-1]).ids)
        assert not store.masks[0][:n_before].any() and store.masks[0][n_before:].all()
        assert store.ids[0][-1] == tokenizer.eos_id


def test_3_3_the_kinds_of_constraints() -> None:
    """Hobbies ("You enjoy e.g. Tennis"), Language ("Speak in e.g. French"), Public Figure ("Act as e.g. Napoleon"),
    which Llama 2-Chat is asked for, "avoiding a mismatch between the instruction and model knowledge"."""
    assert set(ASKED) == {"hobby", "language", "figure"}
    for kind, name, sentence in (
        ("hobby", "tennis", "You enjoy tennis"),
        ("language", "French", "speak in French"),
        ("figure", "Napoleon", "act as Napoleon"),
    ):
        assert sentence in of_names(kind, [name])[0][0]["instruction"]
    data = read_constraints([Path(__file__).parents[2] / "examples" / "data" / "constraints.jsonl"])
    assert set(ASKED) <= {c["kind"] for c in data} and all("short" in c for c in data)
    # and the two of appendix A.3.5 that it generalises to, with checks
    assert {"Always answer with a haiku.", "Answer in one sentence only."} <= {
        c["instruction"] for c in data if "check" in c
    }


def test_3_3_the_final_instruction_is_a_random_combination() -> None:
    """ "To make the instructions more complex and diverse, we construct the final instruction by randomly combining the
    above constraints." """
    lists = [c for kind in ASKED for c in of_names(kind, ["a", "b", "c"])[0]]
    drawn = [gatt.draw(lists, seed=0, dialogue=str(i)) for i in range(400)]
    kinds = {tuple(sorted(c["kind"] for c in d.constraints)) for d in drawn}
    assert {len(k) for k in kinds} == {1, 2, 3} and len(kinds) == 7  # every set of kinds
    assert len({d.instruction for d in drawn}) > 100
    assert 0 < DEFAULTS["combine"] < 1


def test_3_3_half_of_the_time_it_is_less_verbose() -> None:
    """ "We also modify the original instruction half of the time to be less verbose, e.g., "Always act as Napoleon from
    now" -> "Figure: Napoleon."": within four binomial deviations at a fixed seed."""
    n = 2000
    drawn = [gatt.draw([NAPOLEON], seed=0, dialogue=str(i), shortened=DEFAULTS["shorten"]) for i in range(n)]
    assert DEFAULTS["shorten"] == 0.5
    assert abs(sum(d.shortened for d in drawn) - n / 2) < 4 * math.sqrt(n / 4)
    assert {d.kept for d in drawn} == {"Always act as Napoleon from now", "Figure: Napoleon."}
    assert {d.instruction for d in drawn} == {
        "Always act as Napoleon from now"
    }  # what is sampled from is not shortened
