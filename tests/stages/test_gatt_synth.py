"""`llama2 gatt-synth`: what the policy is shown, what is written, what is left out, and runs that are killed.

The policy's answers are often given by hand (`speak`): the tests then say what every record must be.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers

from llama2cli import cli
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.scoring import Scorer
from llama2cli.text import constraints
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.output import Output
from llama2cli.text.records import prompt_id, validate
from llama2cli.text.tokenizer import Tokenizer, train
from llama2cli.training import dialogues

CONTEXT = 256
LINES = [f"the quick brown fox number {i} jumps over {i * i} lazy dogs. Hobby: ahoy." for i in range(400)]


def model(folder: Path, seed: int, *, rewards: bool = False, context: int = CONTEXT) -> Path:
    """A folder that transformers wrote; all of them have one tokenizer."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train(LINES, 380))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=380, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=context, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    kind = transformers.LlamaForSequenceClassification if rewards else transformers.LlamaForCausalLM
    made = kind(config)
    for p in made.parameters():
        p.data.mul_(3)
    if not rewards:
        hidden = made.model(torch.randint(3, 380, (8, 32))).last_hidden_state.flatten(0, 1).detach()
        towards = hidden.mean(0)
        made.lm_head.weight.data[2] = 4 * towards / towards.dot(towards)  # some answers end
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {"policy": model(base / "policy", 6), "rm": model(base / "rm", 7, rewards=True)}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def dialogue(*turns: str, **extra) -> dict:
    """User turns with answers that are to be replaced."""
    return {"messages": [m for t in turns for m in (user(t), assistant("old"))], **extra}


AHOY = {"kind": "word", "instruction": "Say ahoy", "short": "Word: ahoy.", "check": {"regex": "ahoy"}}
RULES = [
    AHOY,
    {"kind": "hobby", "instruction": "You enjoy foxes.", "short": "Hobby: foxes."},
    {"kind": "hobby", "instruction": "You enjoy dogs.", "short": "Hobby: dogs."},
    {"kind": "figure", "instruction": "Act as number 7"},
]
DIALOGUES = [dialogue(*(f"fox {i} {j}" for j in range(1 + i % 3)), n=i) for i in range(9)]


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Runs the command in this process on dialogues; gives the records, or (exit code, stderr) if it failed."""

    def go(source, *args, rules=RULES, out="out.jsonl", new=6):
        for name, records in (("in.jsonl", source), ("rules.jsonl", rules or [])):
            content = "".join(json.dumps(r) + "\n" for r in records)
            if not (tmp_path / name).exists() or (tmp_path / name).read_text() != content:
                (tmp_path / name).write_text(content)  # a changed file would be another input to the journal
        line = ["gatt-synth", tmp_path / "in.jsonl", "--policy", folders["policy"], "-o", tmp_path / out]
        line += ["--max-new-tokens", new, *(["--constraints", tmp_path / "rules.jsonl"] if rules else [])]
        capsys.readouterr()
        code = cli.invoke([*map(str, line), *map(str, args)])
        go.err = capsys.readouterr().err
        return read(tmp_path / out) if code == 0 else (code, go.err)

    return go


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def speak(monkeypatch, answer, cut=lambda text: False) -> list[str]:
    """The engine answers each prompt, as text, with answer(prompt); gives the list that all prompts go to."""
    seen: list[str] = []
    load = Engine.__init__

    def init(self, model, tokenizer, **kw):
        load(self, model, tokenizer, **kw)
        self.tokenizer = tokenizer

    def generate(self, prompts, params, *, tick=None, **_):
        made = []
        for ids, p in zip(prompts, params):
            seen.append(self.tokenizer.decode(ids))
            text = answer(seen[-1])
            sampled = self.tokenizer.encode(text)[: p.max_new_tokens]
            room = self.context - len(ids)
            truncated = cut(text) or len(sampled) + 1 > min(room, p.max_new_tokens)
            made.append(Result(sampled[:room] if truncated else [*sampled, 2], [], [], truncated))
        return made

    monkeypatch.setattr(Engine, "__init__", init)
    monkeypatch.setattr(Engine, "generate", generate)
    return seen


def contents(record: dict, role: str) -> list[str]:
    return [m["content"] for m in record["messages"] if m["role"] == role]


def rules_of(record: dict) -> tuple[str, str]:
    return record["gatt"]["instruction"], record["gatt"]["kept"]


ONE = ("--combine", 0)
KEEP = ("--keep-truncated",)


# --- what is asked and what is written ----------------------------------------------------------------------------


def test_the_policy_sees_the_instruction_in_every_turn_and_the_record_keeps_it_once(run, folders, monkeypatch):
    """Written by hand for one dialogue of three turns."""
    answers = iter(["one", "two", "three"])
    seen = speak(monkeypatch, lambda prompt: next(answers))
    [record] = run([dialogue("a", "b", "c", source="s", id="mine", help=0.5)], "--shorten", 0, rules=[AHOY])
    shown = "[INST] Say ahoy\n\na [/INST]", "[INST] Say ahoy\n\nb [/INST]", "[INST] Say ahoy\n\nc [/INST]"
    seen = [text.replace("  ", " ") for text in seen]  # the space that closes an answer, and that before the next turn
    assert seen == [shown[0], f"{shown[0]} one {shown[1]}", f"{shown[0]} one {shown[1]} two {shown[2]}"]
    kept = user("Say ahoy\n\na")
    assert record == {
        "messages": [
            kept, {**assistant("one"), "weight": 0}, user("b"), {**assistant("two"), "weight": 0}, user("c"),
            {**assistant("three"), "weight": 1},
        ],
        "source": "s",
        "id": prompt_id([kept, assistant("one"), user("b"), assistant("two"), user("c")]),
        "own_id": "mine",
        "sample": 0,
        "policy": "policy",
        "temperature": 0.6,
        "seed": 0,
        "n_tokens": len(Tokenizer.load(folders["policy"]).encode("three")) + 1,
        "truncated": False,
        "gatt": {
            "constraints": [AHOY], "instruction": "Say ahoy", "kept": "Say ahoy", "shortened": False,
            "place": "first", "turn": 3, "obeyed": [False, False, False],
        },
    }  # fmt: skip
    validate("sample", record)


def test_expanded_records_train_an_answer_each(run, monkeypatch):
    speak(monkeypatch, lambda prompt: f"say {prompt.count('[INST]')}")
    whole = run(DIALOGUES, *ONE, new=20)
    parts = run(DIALOGUES, *ONE, "--expand", new=20, out="parts.jsonl")
    turns = [1 + i % 3 for i in range(9)]
    assert [r["n"] for r in parts] == [i for i, n in enumerate(turns) for _ in range(n)]
    assert [r["gatt"]["turn"] for r in parts] == [t for n in turns for t in range(1, n + 1)]
    assert [r for r in parts if r["gatt"]["turn"] == turns[r["n"]]] == whole
    for r in parts:
        assert contents(r, "assistant") == [f"say {t}" for t in range(1, r["gatt"]["turn"] + 1)]
        assert [m["weight"] for m in r["messages"] if "weight" in m] == [0] * (r["gatt"]["turn"] - 1) + [1]


@pytest.mark.parametrize("place", ["first", "system"])
def test_where_the_instruction_stays(run, monkeypatch, place):
    speak(monkeypatch, lambda prompt: "yes")
    own = dialogue("a", "b")
    own["messages"].insert(0, {"role": "system", "content": "Be kind."})
    for record in run([*DIALOGUES, own], "--place", place):
        rule, kept = rules_of(record)
        first, *later = contents(record, "user")
        is_own = "n" not in record
        assert not any(rule in text or kept in text for text in later) and record["gatt"]["place"] == place
        assert contents(record, "system") == (
            (["Be kind."] if is_own else []) if place == "first" else [f"Be kind.\n\n{kept}" if is_own else kept]
        )
        asked = "a" if is_own else f"fox {record['n']} 0"
        assert first == (f"{kept}\n\n{asked}" if place == "first" else asked)


def test_what_is_drawn_is_told_and_binomial(run, monkeypatch):
    """Half of 400 records are shortened, half are combinations; each says how."""
    speak(monkeypatch, lambda prompt: "yes")
    n = 400
    made = run([dialogue(f"fox {i}", n=i) for i in range(n)], rules=RULES[:3], new=9)
    shortened = sum(r["gatt"]["shortened"] for r in made)
    combined = sum(len(r["gatt"]["constraints"]) > 1 for r in made)
    four_sigma = 4 * math.sqrt(n / 4)
    assert abs(shortened - n / 2) < four_sigma and abs(combined - n / 2) < four_sigma
    for r in made:
        long, short = ([c[k] for c in r["gatt"]["constraints"]] for k in ("instruction", "short"))
        written = short if r["gatt"]["shortened"] else long
        assert all(sentence in r["messages"][0]["content"] for sentence in written)
        assert r["gatt"]["shortened"] or not any(s in r["messages"][0]["content"] for s in short)
    assert f"{n} dialogues, {n} turns answered, {n} records; {shortened} shortened ({shortened / n:.1%})" in run.err
    assert f"{combined} dialogues with a combination" in run.err
    [hobby] = [line.split() for line in run.err.splitlines() if line.startswith("hobby")]
    mine = [r for r in made if any(c["kind"] == "hobby" for c in r["gatt"]["constraints"])]
    share = sum(r["gatt"]["shortened"] for r in mine) / len(mine)
    assert hobby == ["hobby", str(len(mine)), str(len(mine)), f"{100 * share:.1f}", "0"]


def test_several_instructions_for_each_dialogue(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "yes")
    made = run([dialogue(f"fox {i}", n=i) for i in range(20)], "-k", 3)
    assert [(r["n"], r["sample"]) for r in made] == [(i, s) for i in range(20) for s in range(3)]
    assert [r for r in made if r["sample"] == 0] == run([dialogue(f"fox {i}", n=i) for i in range(20)], out="one.jsonl")
    assert len({(r["n"], *rules_of(r)) for r in made}) > 40


def test_several_answers_to_the_same_instruction_differ(run):
    """Random numbers of each are its own; those of the first are what they are without the others."""
    flags = (*KEEP, "--temperature", 1, "--shorten", 0)
    made = run([dialogue("fox", "dog")], "-k", 4, *flags, rules=[AHOY])
    assert len({tuple(contents(r, "assistant")) for r in made}) > 2
    assert made[:1] == run([dialogue("fox", "dog")], *flags, rules=[AHOY], out="one.jsonl")


def test_sft_trains_the_last_answer_alone(run, folders):
    """The masks of sft, token by token, on what a real model wrote; joined dialogues, both places, expanded."""
    tokenizer = Tokenizer.load(folders["policy"])
    for place in ("first", "system"):
        made = run(DIALOGUES, *KEEP, "--place", place, "--expand", "--temperature", 1, out=f"{place}.jsonl")
        assert len(made) > 12
        for r in made:
            store = dialogues.Dialogues()
            dialogues.add(store, tokenizer, [(("x", 1), r)], context=CONTEXT, tags="escape", long="cut")
            answer = encode_dialogue(tokenizer, r["messages"], truncated=r["truncated"]).ids
            asked = encode_dialogue(tokenizer, r["messages"][:-1]).ids
            assert list(store.ids[0]) == answer
            assert list(store.masks[0]) == [0] * len(asked) + [1] * (len(answer) - len(asked))
    assert re.search(r"user +[\d,]+ +0 +0%", run.err)  # the mask report


# --- which dialogues ----------------------------------------------------------------------------------------------


def test_joined_dialogues(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "yes")
    own = dialogue("x", "y")
    own["messages"].insert(0, {"role": "system", "content": "Be kind."})
    source = [dialogue("a", "b", source="s", n=1), own, dialogue("c", "d", source="s", n=2), dialogue("e", source="s")]
    made = run(source, "--join", 3, "--place", "system")
    assert [contents(r, "user") for r in made] == [["x", "y"], ["a", "b", "c", "d"], ["e"]]
    assert [(r.get("joined"), r.get("source"), r.get("n")) for r in made] == [
        (None, None, None),
        (2, "s", None),
        (1, "s", None),
    ]
    made = run(source, "--join", 3, "--turns", 3, "--place", "system", "--min-turns", 2, out="b.jsonl")
    assert [contents(r, "user") for r in made] == [["x", "y"], ["a", "b", "c"]]
    assert "left out: it has 1 of the 2 turns of --min-turns" in run.err and "1 left out: fewer than 2 turns" in run.err


def test_a_dialogue_that_ends_with_a_user_and_other_forms(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "yes")
    source = [{"messages": dialogue("a", "b")["messages"][:-1]}, {"instruction": "Add.", "input": "1 1", "output": "2"}]
    assert [contents(r, "user")[-1] for r in run(source, "--place", "system")] == ["b", "Add.\n\n1 1"]


def test_a_window_of_turns(run, monkeypatch):
    """The policy is shown the first turn and the last two; the record is whole."""
    seen = speak(monkeypatch, lambda prompt: "yes")
    [record] = run([dialogue(*"abcde")], "--turn-window", 2, "--shorten", 0, rules=[AHOY])
    assert re.findall(r"Say ahoy\n\n(\w)", seen[-1]) == ["a", "d", "e"]
    assert contents(record, "user") == ["Say ahoy\n\na", *"bcde"]


# --- the end of the context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("place", ["first", "system"])
def test_dialogues_end_at_a_turn_boundary(run, folders, monkeypatch, expand, place):
    """Turns that fit, counted by hand: prompt and answer, as they were sampled, stay within the context."""
    tokenizer = Tokenizer.load(folders["policy"])
    speak(monkeypatch, lambda prompt: "the quick fox")
    sizes = [3, 9, 14, 30]
    source = [dialogue(*[f"fox {t} jumps over" for t in range(n)], n=n) for n in sizes]
    made = run(source, "--shorten", 0, "--place", place, *(["--expand"] if expand else []), rules=[AHOY], new=40)

    def tokens(n):
        rounds = "".join(f"[INST] Say ahoy\n\nfox {t} jumps over [/INST] the quick fox " for t in range(n))
        per_round = re.split(r"(?<=fox )(?=\[)", rounds)
        return sum(len(tokenizer.encode(text)) + 2 for text in per_round)

    fit = max(n for n in range(1, 30) if tokens(n) <= CONTEXT)
    assert 3 < fit < 14
    longest = {r["n"]: r["gatt"]["turn"] for r in made}
    assert longest == {n: min(n, fit) for n in sizes}
    assert len(made) == (sum(min(n, fit) for n in sizes) if expand else 4)
    cut = sum(n > fit for n in sizes)
    assert f"{cut} dialogues cut at a turn boundary: the context ends" in run.err
    for r in made:
        assert r["messages"][-1] == {**assistant("the quick fox"), "weight": 1} and not r["truncated"]
        assert len(encode_dialogue(tokenizer, r["messages"]).ids) <= CONTEXT


def test_a_record_longer_than_the_context_is_cut_though_the_policy_saw_a_window(run, folders, monkeypatch):
    tokenizer = Tokenizer.load(folders["policy"])
    speak(monkeypatch, lambda prompt: "the quick fox")
    [record] = run([dialogue(*[f"fox {t} jumps over" for t in range(40)])], "--turn-window", 1, rules=[AHOY], new=40)
    n = len(encode_dialogue(tokenizer, record["messages"]).ids)
    assert n <= CONTEXT < n + 40 and "1 dialogues cut at a turn boundary" in run.err


def test_a_first_turn_that_fills_the_context(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "yes")
    source = [dialogue("a", n=0), dialogue("fox " * CONTEXT, n=1), dialogue("fox " * 240, n=2)]
    code, err = run(source)
    assert code == 1 and "in.jsonl:2: the prompt has" in err and "--skip-long" in err
    assert [r["n"] for r in run(source, "--skip-long")] == [0] and "left out: no turn fits into the context" in run.err


def test_answers_that_were_cut(run, monkeypatch):
    """As context they stay; trained they are only when that is asked for, and then without an end."""
    speak(monkeypatch, lambda prompt: "cut " * 30 if prompt.count("[INST]") == 2 else "whole")
    source = [dialogue("a", "b", n=0), dialogue("a", "b", "c", n=1)]
    made = run(source, "--expand", new=20)
    assert [(r["n"], r["gatt"]["turn"]) for r in made] == [(0, 1), (1, 1), (1, 3)]
    assert re.fullmatch(r"whole\|[cut ]+\|whole", "|".join(contents(made[-1], "assistant")))
    assert "2 records left out: the trained answer was cut" in run.err
    kept = run(source, "--expand", *KEEP, new=20, out="b.jsonl")
    assert [r["truncated"] for r in kept] == [False, True, False, True, False]
    assert run(source[:1], new=20, out="none.jsonl") == [] and "no record was written" in run.err


def test_an_empty_answer_is_not_trained(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "" if prompt.count("[INST]") == 1 else "yes")
    made = run([dialogue("a", "b", n=0), dialogue("a", n=1)], "--expand", *KEEP)
    assert [(r["n"], contents(r, "assistant")) for r in made] == [(0, ["", "yes"])]
    assert "2 records left out: the trained answer is empty" in run.err


# --- checkers and reward models -----------------------------------------------------------------------------------


def obedient(prompt: str) -> str:
    """Obeys, but not in the second turn of a dialogue about bears."""
    return "no" if "bear" in prompt and prompt.count("[INST]") == 2 else "ahoy"


def test_only_answers_that_obey(run, monkeypatch):
    speak(monkeypatch, obedient)
    source = [dialogue("fox", "x", "y", n=0), dialogue("bear", "x", "y", n=1)]
    assert [r["n"] for r in run(source, "--check", rules=[AHOY])] == [0]
    assert "1 records left out: an answer disobeys" in run.err
    [row] = [line.split() for line in run.err.splitlines() if line.startswith("word")]
    assert row[1:3] == ["2", "1"] and row[4:6] == ["6", "83.3"]
    made = run(source, "--check", "--expand", rules=[AHOY], out="b.jsonl")
    assert [(r["n"], r["gatt"]["turn"]) for r in made] == [(0, 1), (0, 2), (0, 3), (1, 1)]  # up to the first that does
    every = run(source, "--expand", rules=[AHOY], out="c.jsonl")
    assert [r["gatt"]["obeyed"] for r in every[3:]] == [[True], [True, False], [True, False, True]]
    hobbies = [r for r in RULES if r["kind"] == "hobby"]
    code, err = run(source, "--check", rules=hobbies, out="d.jsonl")
    assert code == 2 and "--check: no constraint has a check" in err
    both = run(source, "--check", rules=[AHOY, *hobbies], out="d.jsonl")
    assert all(("obeyed" in r["gatt"]) == any("check" in c for c in r["gatt"]["constraints"]) for r in both)
    assert "2 have no check: --check leaves out nothing for them" in run.err


def test_a_reward_model_reads_what_the_policy_was_shown(run, folders, monkeypatch):
    """The scores are those of `llama2 score` on dialogues with the instruction in every turn."""
    made = run(DIALOGUES, *KEEP, "--rm", folders["rm"], "--rm-threshold", 0, "--expand", "--dtype", "fp32")
    shown = []
    for r in made:
        plain = [user(f"fox {r['n']} {j}") for j in range(r["gatt"]["turn"])]
        rule, answers = r["gatt"]["instruction"], contents(r, "assistant")
        turns = [m for u, a in zip(plain, answers) for m in (user(f"{rule}\n\n{u['content']}"), assistant(a))]
        shown.append({"messages": turns, "truncated": r["truncated"]})
    file = folders["rm"].parent / "shown.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in shown))
    judged = folders["rm"].parent / "judged.jsonl"
    assert cli.invoke(["score", str(file), "--rm-help", str(folders["rm"]), "--dtype", "fp32", "--logits",
                       "-o", str(judged)]) == 0  # fmt: skip
    logits = [r["help_logit"] for r in read(judged)]
    assert [r["reward"] for r in made] == pytest.approx(logits, abs=1e-4)
    half = sorted(1 / (1 + math.exp(-x)) for x in logits)[len(logits) // 2]
    kept = run(DIALOGUES, *KEEP, "--rm", folders["rm"], "--rm-threshold", half, "--expand", "--dtype", "fp32", out="b")
    assert [r["reward"] for r in kept] == [r["reward"] for r in made if 1 / (1 + math.exp(-r["reward"])) >= half]
    assert 0 < len(kept) < len(made) and f"{len(made) - len(kept)} records left out by the reward model" in run.err


def test_a_share_of_the_best_is_kept(run, folders, monkeypatch):
    """Of each window, what is left of the share carried over: 3 of 10 in windows of 4, 4 and 2."""
    speak(monkeypatch, lambda prompt: "yes")
    scores = [5.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 4.0, 7.0, 8.0]
    given = iter(scores)
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: [next(given) for _ in sequences])
    flags = ("--rm", folders["rm"], "--window", 4, "--rm-keep", 0.3)
    made = run([dialogue(f"fox {i}", n=i) for i in range(10)], *flags)
    assert [r["n"] for r in made] == [0, 4, 9]  # round(1.2), round(2.4) - 1, round(3.0) - 2; of equal ones the first
    given = iter(scores)
    assert len(run([dialogue(f"fox {i}", n=i) for i in range(10)], *flags[:-1], 1, out="all.jsonl")) == 10


def test_a_reward_model_with_a_smaller_context_forgets_first_turns(run, folders, monkeypatch, tmp_path):
    small = model(tmp_path / "small", 7, rewards=True, context=64)
    speak(monkeypatch, lambda prompt: "yes")
    seen: list[list[int]] = []
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: seen.extend(sequences) or [1.0] * len(sequences))
    run([dialogue(*[f"fox {i}" for i in range(6)])], "--rm", small, "--rm-keep", 1, "--shorten", 0, rules=[AHOY])
    text = Tokenizer.load(small).decode(seen[0])
    turns = re.findall(r"Say ahoy\n\nfox (\d)", text)
    assert len(seen[0]) <= 64 and turns == [str(i) for i in range(6 - len(turns), 6)] and 0 < len(turns) < 6
    assert "1 scored without their first turns" in run.err


# --- constraints that the policy names ----------------------------------------------------------------------------


def test_the_policy_is_asked_for_constraints(run, monkeypatch, tmp_path):
    lists = iter(["Sure!\n1. Tennis\n2. Chess", "- chess\n- Go", "1. Napoleon\n2. Newton", "1. Newton\n2. Cleo"])
    seen = speak(monkeypatch, lambda p: next(lists) if "List 20" in p else "yes", cut=lambda text: "Cleo" in text)
    flags = ("--ask", "hobby", "--ask", "figure", "--ask-lists", 2, "--asked", tmp_path / "asked.jsonl")
    made = run(DIALOGUES, *flags, rules=None, new=80)
    named = read(tmp_path / "asked.jsonl")
    assert [c["short"] for c in named] == [
        "Hobby: Tennis.",
        "Hobby: Chess.",
        "Hobby: Go.",
        "Figure: Napoleon.",
        "Figure: Newton.",
    ]
    assert "hobby: 3 named in 2 lists, 1 more than once, 1 lines are no name" in run.err
    assert "figure: 2 named in 2 lists, 1 more than once, 1 lines are no name" in run.err
    assert "constraints: 5 (hobby 3, figure 2)" in run.err
    assert [c for r in made for c in r["gatt"]["constraints"] if c not in named] == []
    assert sum("List 20 hobbies" in prompt for prompt in seen) == 2
    # what it named is a constraints file
    again = run(DIALOGUES, "--constraints", tmp_path / "asked.jsonl", rules=None, new=80, out="again.jsonl")
    assert again == made


def test_a_policy_that_names_nothing(run, monkeypatch):
    speak(monkeypatch, lambda prompt: "")
    code, err = run(DIALOGUES, "--ask", "hobby")
    assert code == 1 and "--ask hobby: the policy named none in 4 lists" in err


# --- runs that are killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["sampling", "asked", "scoring", "committing"])
def test_a_killed_run_goes_on_without_sampling_again(run, folders, monkeypatch, tmp_path, where):
    """The same bytes and the same closing counts; windows that were done are not sampled again, nor lists asked."""
    real = Engine.generate
    calls: list[int] = []
    stops: list[int] = []

    def generate(self, prompts, *args, **kw):
        calls.append(len(prompts))
        if stops and len(calls) == stops[0]:
            raise KeyboardInterrupt
        return real(self, prompts, *args, **kw)

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(constraints, "parse_list", lambda text, **_: ([f"n{len(text)}"], 0))
    flags = [*KEEP, "--window", 2, "--expand", "--temperature", 1]
    flags += ["--rm", folders["rm"], "--rm-keep", 0.6] if where in ("scoring", "committing") else []
    flags += ["--ask", "hobby", "--ask-lists", 1] if where == "asked" else []
    run(DIALOGUES, *flags, out="whole.jsonl")
    whole, told = list(calls), run.err.splitlines()[-1]
    calls.clear()
    with monkeypatch.context() as patch:
        if where == "scoring":
            n, score = [0], Scorer.score
            patch.setattr(Scorer, "score", lambda *a, **k: interrupt_at(n, 4) or score(*a, **k))
        elif where == "committing":
            n, commit = [0], Output.commit
            patch.setattr(Output, "commit", lambda *a, **k: interrupt_at(n, 4) or commit(*a, **k))
        else:
            stops.append(8)
        assert run(DIALOGUES, *flags, out="cut.jsonl")[0] == 130
    done = {"sampling": 4, "asked": 4, "scoring": 6, "committing": 6}[where]  # dialogues
    stops.clear()
    calls.clear()
    run(DIALOGUES, *flags, out="cut.jsonl")
    assert f"continuing after {done} inputs" in run.err
    assert sum(calls) == sum(1 + i % 3 for i in range(done, 9)) < sum(whole)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run.err.splitlines()[-1] == told
    assert not list(tmp_path.glob("*.journal")) and not list(tmp_path.glob("*.partial"))


def interrupt_at(n: list[int], at: int) -> None:
    n[0] += 1
    if n[0] == at:
        raise KeyboardInterrupt


# --- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--ask", "hobbies"), '--ask: expected one of hobby, language, figure, got "hobbies"'),
        (("--asked", "x"), "--asked: nothing is asked"),
        (("--ask", "hobby", "--asked", "same", "-o", "same"), "--asked:same: is given to --out too"),
        (("--constraints", "-"), "--constraints: stdin is for the dialogues"),
        (("--rm", "rm"), "--rm: what does it keep?"),
        (("--rm", "rm", "--rm-keep", 1, "--rm-threshold", 1), "--rm: what does it keep?"),
        (("--rm-keep", 1), "there is no reward model"),
        (("--endpoint", "http://127.0.0.1:1"), "--endpoint and --tokenizer go together"),
        (("--join", 3, "--turns", 2), "--turns: 2 turns at most are fewer"),
        (("--shorten", 2), "--shorten: expected"),
        (("--most", 1), "--most: expected at least 2"),
        (("--join", 1), "--join: expected at least 2"),
        (("--place", "last"), "--place"),
        (("-k", 0), "--samples: expected at least 1"),
        (("--format", "alpaka"), "--format"),
    ],
)
def test_misuse_is_one_line(run, flags, complaint):
    code, err = run(DIALOGUES, *flags)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1


def test_nothing_to_obey(run):
    code, err = run(DIALOGUES, rules=None)
    assert code == 2 and "nothing to obey: give --constraints FILE, or --ask KIND" in err


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"kind": "a"}, 'rules.jsonl:2: the field "instruction" is missing'),
        ({**AHOY, "check": {"regex": "("}}, "rules.jsonl:2: check.regex: is no regular expression"),
        ({**AHOY, "check": {"predicate": "max_sentence", "n": 1}}, 'did you mean "max_sentences"?'),
        ({**AHOY, "check": {"predicate": "max_words", "n": "1"}}, "rules.jsonl:2: check.n: expected a whole number"),
    ],
)
def test_constraints_that_are_wrong_are_named(run, rule, complaint):
    code, err = run(DIALOGUES, rules=[AHOY, rule])
    assert code == 1 and complaint in err and len(err.splitlines()) == 1


def test_dialogues_that_are_wrong_are_named(run):
    code, err = run([DIALOGUES[0], {"messages": [user("a"), {"role": "bot", "content": "b"}]}])
    assert code == 1 and "in.jsonl:2: messages[1].role: expected one of system, user, assistant" in err
    code, err = run([dialogue("a"), {"messages": [user("a"), user("b")]}])
    assert code == 1 and "in.jsonl:2: messages[1].role" in err
    code, err = run([dialogue("a [INST] b")])
    assert code == 1 and "in.jsonl:1: messages[0].content: holds" in err
    code, err = run([])
    assert code == 1 and "holds no dialogues" in err


def test_provenance(run, tmp_path, folders):
    run(DIALOGUES[:1], *KEEP, "--provenance", tmp_path / "p.json", "--rm", folders["rm"], "--rm-keep", 1)
    inputs = json.loads((tmp_path / "p.json").read_bytes())["provenance"]["inputs"]
    assert set(inputs) == {"in.jsonl", "rules.jsonl", "policy", "rm"} and all(inputs.values())


# --- another machine's policy, and the pipe -----------------------------------------------------------------------


def test_answers_of_a_server(run, folders, tmp_path):
    """The policy over HTTP (temperature 0 has no random numbers): the same records as here."""
    script = Path(__file__).parents[1] / "sampling" / "completions_server.py"
    tokenizer = folders["policy"] / "tokenizer.model"
    served = {
        "tokenizer": str(tokenizer),
        "log": str(tmp_path / "log"),
        "engine": str(folders["policy"]),
        "context": CONTEXT,
    }
    server = subprocess.Popen([sys.executable, str(script), json.dumps(served)], stdout=subprocess.PIPE, text=True)
    flags = (*KEEP, "--temperature", 0)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            name = json.load(reply)["data"][0]["id"]
        there = run(DIALOGUES, *flags, "--policy", name, "--endpoint", url, "--tokenizer", tokenizer)
        assert isinstance(there, list), there
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    here = run(DIALOGUES, *flags, out="here.jsonl")
    assert [{**r, "policy": "policy"} for r in there] == here and {r["policy"] for r in there} == {name}
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]


def test_it_is_a_pipe(run, folders, tmp_path):
    """Dialogues from stdin, records to sft's stdin, as the README has it."""
    run(DIALOGUES[:1], *KEEP)  # writes the two files
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in DIALOGUES))
    llama2 = f"{sys.executable} -m llama2cli"
    line = (
        f"cat in.jsonl | {llama2} gatt-synth --constraints rules.jsonl --policy {folders['policy']} --max-new-tokens 6 "
        f"--keep-truncated | {llama2} sft --init {folders['policy']} --steps 1 --batch-size 4 -o gatt/ -"
    )
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 1
    made, read = re.findall(r"masks of \d dialogues\n(?:.*\n){6}", done.stderr)
    assert made == read  # what gatt-synth says is trained is what sft trains
