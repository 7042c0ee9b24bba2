"""`llama2 eval gatt` with engines whose obedience is known, with small models judged again by hand, and when killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli
from llama2cli.measure.rates import wilson
from llama2cli.sampling.engine import Engine, Result
from llama2cli.text.records import validate
from llama2cli.text.tokenizer import Tokenizer

CONTEXT = 256
LINES = [f"Always say fox or dog, number {i}; what is {i * i}? the lazy tree says hello" for i in range(400)]


def model(folder: Path, seed: int, *, rewards: bool = False) -> Path:
    """A folder that transformers wrote; all of them have one tokenizer."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=380,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        num_labels=1,
        pad_token_id=0,
    )
    made = (transformers.LlamaForSequenceClassification if rewards else transformers.LlamaForCausalLM)(config)
    for p in made.parameters():
        p.data.mul_(10 if p.dim() > 1 else 1)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "base": model(base / "base", 6),
        "gatt": model(base / "gatt", 7),
        "judge": model(base / "judge", 8, rewards=True),
    }


class Forgets:
    """An engine that says what it was last told to say, unless that is `memory` turns ago or more."""

    context = CONTEXT

    def __init__(self, tokenizer: Tokenizer, memory: int) -> None:
        self.tokenizer, self.memory = tokenizer, memory

    def generate(self, prompts, params, *, tick=None):
        results = []
        for prompt in prompts:
            turns = self.tokenizer.decode(prompt).split("[INST]")[1:]
            told = [
                (len(turns) - i, found[1]) for i, turn in enumerate(turns) if (found := re.search(r"say (\w+)", turn))
            ]
            word = told[-1][1] if told and told[-1][0] <= self.memory else "hello"
            results.append(Result([*self.tokenizer.encode(f"tree {word}"), 2], [], [], False))
            if tick is not None:
                tick(results[-1])
        return results


@pytest.fixture
def scripted(folders, monkeypatch):
    """In place of the models engines that remember: base for 1 turn, gatt for ever."""

    def load(path, **how):
        return Forgets(tokenizer, 1 if Path(path).name == "base" else 99), tokenizer

    tokenizer = Tokenizer.load(folders["base"])
    monkeypatch.setattr("llama2cli.sampling.load.load_engine", load)


@pytest.fixture
def run(folders, tmp_path, capsys, monkeypatch):
    """Runs the command in this process; gives the metric records, or (exit code, stderr) if it failed."""
    monkeypatch.chdir(folders["base"].parent)

    def go(source, *args, models=("base", "gatt"), constraints=None, out="out.jsonl", new=6):
        lines = []
        for name, content in (("in.jsonl", source), ("constraints.jsonl", constraints)):
            if content is not None:
                text = "".join(json.dumps(r) + "\n" for r in content)
                if not (tmp_path / name).exists() or (tmp_path / name).read_text() != text:
                    (tmp_path / name).write_text(text)  # a changed file would be another input to the journal
                lines += [tmp_path / name] if name == "in.jsonl" else ["--constraints", tmp_path / name]
        for name in models:
            lines += ["--model", name]
        capsys.readouterr()
        line = ["eval", "gatt", *lines, "-o", tmp_path / out, "--max-new-tokens", new, "--dtype", "fp32", *args]
        code = cli.invoke([str(word) for word in line])
        go.err = capsys.readouterr().err
        return read(tmp_path / out) if code == 0 else (code, go.err)

    return go


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def dialogue(turns: int, i: int = 0, **extra) -> dict:
    messages = []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"what is {i} {turn}?"}, {"role": "assistant", "content": "old"}]
    return {"messages": messages, "n": i, **extra}


def constraint(word: str, kind: str = "word", **extra) -> dict:
    return {"kind": kind, "instruction": f"Always say {word}.", "check": {"regex": rf"\b{word}\b"}, **extra}


def checked(**check) -> dict:
    return {"kind": "x", "instruction": "y", "check": check}


WORDS = [constraint(word) for word in ("fox", "dog", "tree7")]
DIALOGUES = [dialogue(3, i) for i in range(5)]


def shares(records: list[dict], measure: str = "gatt.obedience", **groups) -> dict:
    """turn -> (how many obeyed, n), of a model."""
    chosen = [r for r in records if r["measure"] == measure and all(r.get(k) == v for k, v in groups.items())]
    chosen = [r for r in chosen if ("category" in r) == ("category" in groups)]
    return {r.get("turn"): (round(r["value"] * r["n"]), r["n"]) for r in chosen}


# --- what is measured ---------------------------------------------------------------------------------------------


def test_one_that_forgets_beside_one_that_does_not(run, scripted):
    """The shape of Table 30: all obey in turn 1; later the baseline never, the other always."""
    records = run([dialogue(20, i) for i in range(4)], constraints=WORDS)
    for record in records:
        validate("metric", record)
    base, gatt = shares(records, model="base"), shares(records, model="gatt")
    assert base[1] == gatt[1] == (12, 12)
    assert {base[t] for t in base if t > 1} == {(0, 12)} and {gatt[t] for t in gatt} == {(12, 12)}
    last = max(gatt)
    assert shares(records, "gatt.later", model="gatt") == {None: (12 * (last - 1), 12 * (last - 1))}
    assert f"{last}" in run.err and "2 and later" in run.err
    [row] = [line.split() for line in run.err.splitlines() if line.startswith("4 ")]
    assert row[:3] == ["4", "12", "0.0"] and row[4] == "100.0"
    one = next(r for r in records if r["model"] == "gatt" and r.get("turn") == 2)
    assert (one["low"], one["high"]) == wilson(4, 4), "four dialogues of three instructions each, all alike"


@pytest.mark.parametrize(
    ("place", "base", "gatt"),
    [
        ("first", [1, 0, 0], [1, 1, 1]),
        ("system", [1, 0, 0], [1, 1, 1]),
        ("every", [1, 1, 1], [1, 1, 1]),
        ("none", [0, 0, 0], [0, 0, 0]),
    ],
)
def test_where_the_instruction_stands(run, scripted, tmp_path, place, base, gatt):
    records = run(DIALOGUES, "--place", place, "--rolled", tmp_path / "rolled.jsonl", constraints=WORDS[:1])
    for name, obeyed in (("base", base), ("gatt", gatt)):
        assert shares(records, model=name) == {t: (5 * o, 5) for t, o in enumerate(obeyed, start=1)}
    for record in read(tmp_path / "rolled.jsonl"):
        validate("sample", record)
        texts = [m["content"] for m in record["messages"] if m["role"] == "user"]
        with_it = [("Always say fox." in text) for text in texts]
        assert with_it == {"first": [True, False, False], "every": [True] * 3}.get(place, [False] * 3)
        assert record["messages"][0]["role"] == ("system" if place == "system" else "user")
        assert [text.removeprefix("Always say fox.\n\n") for text in texts] == [
            f"what is {record['n']} {t}?" for t in range(3)
        ]
        assert record["gatt"]["obeyed"] == [bool(o) for o in (base if record["policy"] == "base" else gatt)]
        assert "old" not in str(record["messages"])


def test_a_small_model_judged_again_by_hand(run, tmp_path):
    """Everything that is told, from the answered dialogues alone; and these hold what the model was asked."""
    words = [
        constraint("e", "letter"),
        {"kind": "form", "instruction": "Say it briefly.", "check": {"predicate": "max_characters", "n": 9}},
    ]
    words[0]["check"] = {"regex": "e"}
    records = run(DIALOGUES, "-k", 2, "--rolled", tmp_path / "rolled.jsonl", "--temperature", 1.0, constraints=words)
    rolled = read(tmp_path / "rolled.jsonl")
    assert len(rolled) == 2 * 5 * 2 * 2
    told: dict[tuple, list[bool]] = defaultdict(list)
    for record in rolled:
        answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        [c] = record["gatt"]["constraints"]
        for turn, text in enumerate(answers, start=1):
            obeyed = "e" in text.lower() if c["kind"] == "letter" else len(text.strip()) <= 9
            assert record["gatt"]["obeyed"][turn - 1] == (obeyed and bool(text.strip()))
            for kind in (None, c["kind"]):
                told[record["policy"], kind, turn].append(obeyed and bool(text.strip()))
    assert 0 < sum(map(sum, told.values())) < sum(map(len, told.values()))
    for (name, kind, turn), results in told.items():
        groups = {"model": name} | ({"category": kind} if kind else {})
        assert shares(records, **groups)[turn] == (sum(results), len(results))
    assert len({str(r["messages"]) for r in rolled if r["policy"] == "base"}) == 20, "samples differ"
    assert Counter(r["sample"] for r in rolled) == {0: 20, 1: 20}


def test_neither_window_nor_batch_changes_a_byte(run, tmp_path):
    flags = ("--each", 2, "--temperature", 0.9, "--rolled", tmp_path / "rolled.jsonl")
    whole = run(DIALOGUES, *flags, constraints=WORDS), (tmp_path / "rolled.jsonl").read_bytes()
    assert whole == (
        run(DIALOGUES, *flags, "--window", 2, "--batch-size", 3, constraints=WORDS),
        (tmp_path / "rolled.jsonl").read_bytes(),
    )


# --- which instructions -------------------------------------------------------------------------------------------


def test_trained_and_unseen_instructions_are_told_apart(run, scripted, tmp_path):
    synth = {"messages": [], "gatt": {"constraints": [constraint("fox")], "instruction": "x", "turn": 3}}
    (tmp_path / "synth.jsonl").write_text(json.dumps(synth) + "\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"kind": "word", "instruction": " Always  say dog. "}) + "\n")
    records = run(
        DIALOGUES, "--trained", tmp_path / "synth.jsonl", "--trained", tmp_path / "list.jsonl", constraints=WORDS
    )
    assert shares(records, "gatt.obedience.trained", model="gatt") == {1: (10, 10), 2: (10, 10), 3: (10, 10)}
    assert shares(records, "gatt.obedience.unseen", model="base") == {1: (5, 5), 2: (0, 5), 3: (0, 5)}
    assert shares(records, "gatt.later.unseen", model="gatt") == {None: (10, 10)}
    assert "instructions not seen in training" in run.err


def test_each_dialogue_gets_some_and_all_come_equally_often(run, scripted, tmp_path):
    flags = ("--each", 2, "--rolled", tmp_path / "rolled.jsonl")
    run([dialogue(1, i) for i in range(6)], *flags, constraints=WORDS, models=["gatt"])
    given = [(r["n"], r["gatt"]["instruction"]) for r in read(tmp_path / "rolled.jsonl")]
    assert len(set(given)) == 12 and set(Counter(word for _, word in given).values()) == {4}
    assert set(Counter(n for n, _ in given).values()) == {2}
    orders = set()
    for seed in range(4):
        run([dialogue(1, i) for i in range(6)], *flags, "--seed", seed, constraints=WORDS, models=["gatt"])
        orders.add(str([r["gatt"]["instruction"] for r in read(tmp_path / "rolled.jsonl")]))
    assert len(orders) > 1


def test_a_dialogue_with_an_instruction_of_its_own(run, scripted, tmp_path):
    source = [
        dialogue(2, 0, constraint=constraint("dog")),
        dialogue(2, 1, instruction="Always say dog.", check={"regex": "dog"}),
        dialogue(2, 2),
        dialogue(2, 3, instruction="Be nice."),
    ]
    records = run(source, "--rolled", tmp_path / "rolled.jsonl", models=["gatt"])
    assert shares(records, model="gatt") == {1: (2, 2), 2: (2, 2)}
    assert "in.jsonl:3: left out: it has no instruction" in run.err and "in.jsonl:4: left out" in run.err
    assert [r["gatt"]["constraints"][0]["kind"] for r in read(tmp_path / "rolled.jsonl")] == ["word", "own"]
    run(source, "--rolled", tmp_path / "rolled.jsonl", models=["gatt"], constraints=WORDS[:1])
    told = [r["gatt"]["instruction"] for r in read(tmp_path / "rolled.jsonl")]
    assert told == ["Always say dog."] * 2 + ["Always say fox."] * 2


def test_short_forms(run, scripted, tmp_path):
    words = [constraint("fox", short="We say fox"), constraint("dog")]
    run(DIALOGUES[:1], "--short", "--rolled", tmp_path / "r.jsonl", constraints=words, models=["gatt"])
    assert {r["gatt"]["instruction"] for r in read(tmp_path / "r.jsonl")} == {"We say fox", "Always say dog."}


def test_more_turns_than_a_dialogue_has(run, scripted, tmp_path):
    flags = ("--rolled", tmp_path / "r.jsonl")
    run([dialogue(2, 7)], *flags, "--turns", 5, "--cycle", constraints=WORDS[:1], models=["gatt"])
    [record] = read(tmp_path / "r.jsonl")
    users = [m["content"] for m in record["messages"][::2]]
    assert users[1:] == [f"what is 7 {t}?" for t in (1, 0, 1, 0)] and len(record["gatt"]["obeyed"]) == 5
    run([dialogue(2, i) for i in range(5)], *flags, "--join", 4, constraints=WORDS[:1], models=["gatt"])
    joined = read(tmp_path / "r.jsonl")
    assert [len(r["gatt"]["obeyed"]) for r in joined] == [4, 4, 2] and [r["joined"] for r in joined] == [2, 2, 1]
    run([dialogue(5)], *flags, "--turns", 2, constraints=WORDS[:1], models=["gatt"])
    assert len(read(tmp_path / "r.jsonl")[0]["gatt"]["obeyed"]) == 2


def test_the_context_ends_a_dialogue(run, scripted, tmp_path):
    records = run([dialogue(60)], "--rolled", tmp_path / "r.jsonl", constraints=WORDS[:1], models=["gatt"])
    [record] = read(tmp_path / "r.jsonl")
    n = len(record["gatt"]["obeyed"])
    assert 5 < n < 60 and record["gatt"]["cut"] == n + 1 and max(shares(records)) == n
    assert "1 times cut at a turn boundary: the context ends" in run.err
    long = {"messages": [{"role": "user", "content": "what is " * 300}]}
    code, err = run([long], constraints=WORDS[:1], models=["gatt"])
    assert code == 1 and "in.jsonl:1: the prompt has" in err
    records = run([long, dialogue(1)], "--skip-long", constraints=WORDS[:1], models=["gatt"])
    assert shares(records) == {1: (1, 1)} and "prompts left out: they fill the context" in run.err


def test_through_a_window_the_first_turn_stays_near(run, scripted, monkeypatch, folders):
    """An engine that remembers two turns sees the instruction for ever where it is shown the first and the last."""
    tokenizer = Tokenizer.load(folders["base"])
    monkeypatch.setattr("llama2cli.sampling.load.load_engine", lambda *a, **k: (Forgets(tokenizer, 2), tokenizer))
    whole = run([dialogue(5)], constraints=WORDS[:1], models=["base"])
    assert shares(whole) == {1: (1, 1), 2: (1, 1), 3: (0, 1), 4: (0, 1), 5: (0, 1)}
    assert set(shares(run([dialogue(5)], "--turn-window", 1, constraints=WORDS[:1], models=["base"])).values()) == {
        (1, 1)
    }


# --- a reward model as judge --------------------------------------------------------------------------------------


def test_a_judge_says_what_score_says(run, folders, tmp_path):
    """Obeyed where `llama2 score` gives the dialogue, the instruction in every user message, at least the threshold."""
    free = [{"kind": "manner", "instruction": "Be kind to the fox."}, constraint("fox")]
    flags = ("--judge", folders["judge"], "--rolled", tmp_path / "rolled.jsonl", "--temperature", 1.0)
    run(DIALOGUES, *flags, constraints=free, models=["base"])
    prefixes, told = [], []
    for record in read(tmp_path / "rolled.jsonl"):
        if "check" in record["gatt"]["constraints"][0]:
            continue
        messages = [dict(m) for m in record["messages"]]
        for m in messages[2::2]:
            m["content"] = "Be kind to the fox.\n\n" + m["content"]
        for turn, obeyed in enumerate(record["gatt"]["obeyed"]):
            prefixes.append({"messages": messages[: 2 * turn + 2], "truncated": record["gatt"]["truncated"][turn]})
            told.append(obeyed)
    (tmp_path / "prefixes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prefixes))
    line = [
        "score",
        tmp_path / "prefixes.jsonl",
        "--rm-help",
        folders["judge"],
        "-o",
        tmp_path / "scored.jsonl",
        "--dtype",
        "fp32",
    ]
    assert cli.invoke(list(map(str, line))) == 0
    scores = [r["help"] for r in read(tmp_path / "scored.jsonl")]
    assert told == [s >= 0.5 for s in scores] and 0 < sum(told) < len(told) == 15
    run(DIALOGUES, *flags, "--judge-threshold", 0.8, constraints=free, models=["base"])
    rolled = [r for r in read(tmp_path / "rolled.jsonl") if "check" not in r["gatt"]["constraints"][0]]
    assert [o for r in rolled for o in r["gatt"]["obeyed"]] == [s >= 0.8 for s in scores]


def test_without_a_judge_what_has_no_check_is_left_out_and_told(run, scripted):
    free = [{"kind": "manner", "instruction": "Be kind."}, constraint("fox")]
    assert shares(run(DIALOGUES, constraints=free), model="gatt")[1] == (5, 5)
    assert "1 constraint is left out (manner): no check" in run.err
    code, err = run(DIALOGUES, constraints=free[:1])
    assert code == 2 and "no constraint has a check: give --judge" in err


# --- attention ----------------------------------------------------------------------------------------------------


def test_attention_is_that_of_transformers(run, folders, tmp_path):
    flags = ("--rolled", tmp_path / "rolled.jsonl", "--attention", tmp_path / "attention.jsonl", "--attention-bin", 4)
    records = run(DIALOGUES, *flags, "--attention-dialogues", 2, constraints=WORDS[:2], models=["base", "gatt"])
    found = read(tmp_path / "attention.jsonl")
    assert [(r["policy"], r["turn"]) for r in found] == [
        (m, t) for m in ("base", "gatt") for _ in range(2) for t in (1, 2, 3)
    ]
    dialogues = {(r["policy"], r["id"]): r for r in read(tmp_path / "rolled.jsonl")}
    tokenizer = Tokenizer.load(folders["base"])
    by_turn = defaultdict(list)
    for record in found:
        rolled = dialogues[record["policy"], record["id"]]
        assert record["obeyed"] == rolled["gatt"]["obeyed"][record["turn"] - 1]
        texts = [m["content"] for m in rolled["messages"]]
        ids, spans = [], []  # the reference format, by hand
        for user, answer in zip(texts[::2], texts[1::2]):
            ids += [1, *tokenizer.encode(f"[INST] {user} [/INST]")]
            spans.append((len(ids), len(ids) + len(tokenizer.encode(f"{answer} ")) + 1))
            ids += [*tokenizer.encode(f"{answer} "), 2]
        theirs = transformers.LlamaForCausalLM.from_pretrained(folders[record["policy"]], attn_implementation="eager")
        with torch.no_grad():
            w = torch.stack(theirs(torch.tensor([ids]), output_attentions=True).attentions).amax((0, 1, 2)).numpy()
        begin, end = spans[record["turn"] - 1]
        bins = [b for b in record["bins"] if b[1] == "instruction"]
        first, last = bins[0][2], bins[-1][3]
        assert tokenizer.decode(ids[first:last]).strip() == record["instruction"]
        paid = w[begin - 1 : end - 1, first:last].max(1)
        assert record["attention"] == pytest.approx(paid.mean(), abs=2e-4)
        assert record["largest"] == pytest.approx(paid.max(), abs=2e-4)
        assert record["bins"][-1][3] == end and max(b[3] - b[2] for b in record["bins"]) == 4
        assert np.max(record["map"]) == pytest.approx(w[begin:end, :end].max(), abs=2e-4)
        by_turn[record["policy"], record["turn"]].append(record["attention"])
    told = {(r["model"], r["turn"]): (r["value"], r["n"]) for r in records if r["measure"] == "gatt.attention"}
    assert told == {key: (pytest.approx(np.mean(v)), 2) for key, v in by_turn.items()}
    assert "attention of answers to the instruction" in run.err
    pictures = [line for line in run.err.splitlines() if re.fullmatch(r" {7,9}i+u+a+u+a+u+a+", line)]
    assert len(pictures) == 2 and len(re.findall(r"^   [123][x ] ", run.err, re.MULTILINE)) == 6


# --- killed and continued -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 6, 9, 17])
def test_a_run_that_was_killed_goes_on(run, monkeypatch, tmp_path, at):
    """Two models, all outputs: the same bytes, the same table, and no window is answered twice."""
    flags = ("--window", 2, "--each", 1, "--temperature", 0.9)

    def go(name):
        more = ("--rolled", tmp_path / f"{name}-r.jsonl", "--attention", tmp_path / f"{name}-a.jsonl")
        return run(DIALOGUES, *flags, *more, constraints=WORDS, out=f"{name}.jsonl")

    go("whole")
    table = run.err[run.err.index("obeyed %") : run.err.index("base: 5 dialogues")]
    generate, calls = Engine.generate, []
    with monkeypatch.context() as patch:

        def counted(self, prompts, *args, **kw):
            calls.append(len(prompts))
            if len(calls) == at:
                raise KeyboardInterrupt
            return generate(self, prompts, *args, **kw)

        patch.setattr(Engine, "generate", counted)
        assert go("cut")[0] == 130
    calls.clear()
    monkeypatch.setattr(Engine, "generate", lambda self, p, *a, **k: calls.append(len(p)) or generate(self, p, *a, **k))
    go("cut")
    assert len(calls) == 18 - (at - 1) // 3 * 3, "three turns a window, three windows a model"
    for end in (".jsonl", "-r.jsonl", "-a.jsonl"):
        assert (tmp_path / f"cut{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes(), end
    assert table in run.err
    assert not list(tmp_path.glob("*.journal")) and not list(tmp_path.glob("*.partial"))


def test_outputs_that_do_not_go_together_start_over(run, monkeypatch, tmp_path):
    flags = ("--window", 2, "--rolled", tmp_path / "r.jsonl")
    run(DIALOGUES, *flags, constraints=WORDS, models=["base"])
    whole = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "r.jsonl")]
    with monkeypatch.context() as patch:
        calls, generate = [], Engine.generate

        def stopped(self, *a, **k):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return generate(self, *a, **k)

        patch.setattr(Engine, "generate", stopped)
        assert run(DIALOGUES, *flags, constraints=WORDS, models=["base"])[0] == 130
    (tmp_path / "r.jsonl.partial").unlink()
    run(DIALOGUES, *flags, constraints=WORDS, models=["base"])
    assert "all outputs start over" in run.err
    assert [(tmp_path / name).read_bytes() for name in ("out.jsonl", "r.jsonl")] == whole


# --- another machine's model --------------------------------------------------------------------------------------


@pytest.fixture
def served(folders, tmp_path):
    """A server of the base model as a process of its own: its name, the flags that lead to it, and its log."""
    script = Path(__file__).parents[1] / "sampling" / "completions_server.py"
    tokenizer = folders["base"] / "tokenizer.model"
    settings = {
        "tokenizer": str(tokenizer),
        "log": str(tmp_path / "log"),
        "engine": str(folders["base"]),
        "context": CONTEXT,
    }
    server = subprocess.Popen([sys.executable, str(script), json.dumps(settings)], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            name = json.load(reply)["data"][0]["id"]
        yield name, ("--endpoint", url, "--tokenizer", tokenizer), tmp_path / "log"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_a_model_that_is_served(run, served, tmp_path, monkeypatch):
    """Over HTTP (temperature 0 has no random numbers) the same as here; after a kill no answer is asked for again."""
    name, flags, log = served
    greedy = ("--temperature", 0, "--window", 2, "--each", 1)
    here = run(DIALOGUES, *greedy, constraints=WORDS, models=["base"])
    stage = cli.stage("eval gatt")
    with monkeypatch.context() as patch:
        calls, evaluate = [], stage.evaluate

        def stopped(*a):
            evaluate(*a)
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt  # all answers of the window are there, and nothing of it is in the outputs

        patch.setattr(stage, "evaluate", stopped)
        assert run(DIALOGUES, *greedy, *flags, constraints=WORDS, models=[name], out="there.jsonl")[0] == 130
    there = run(DIALOGUES, *greedy, *flags, constraints=WORDS, models=[name], out="there.jsonl")
    assert there == [{**r, "model": name} for r in here]
    asked = [r for r in read(log) if r["event"] == "answered" and r["max_tokens"] == 6]  # not what it is greeted with
    assert len(asked) == 15, "five dialogues of three turns"
    assert not list(tmp_path.glob("there.jsonl.*"))
    code, err = run(DIALOGUES, *flags, "--attention", tmp_path / "a.jsonl", constraints=WORDS, models=[name])
    assert code == 2 and "a server does not tell what its model attends to" in err
    code, err = run(DIALOGUES, *flags[:2], constraints=WORDS, models=[name])
    assert code == 2 and "--endpoint and --tokenizer go together" in err


# --- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--model", "base"), '--model: "base" is given twice'),
        (("--cycle",), "--cycle: up to how many turns?"),
        (("--attention", "a.jsonl", "--place", "none"), "--attention: with --place none"),
        (("--attention", "a.jsonl", "--turn-window", 2), "--attention: is of whole dialogues"),
        (("--rolled", "r.jsonl", "--attention", "./r.jsonl"), "--attention:./r.jsonl: is given to --rolled too"),
        (("--rolled", "base/config.json", "--trained", "base/config.json"), "is an input and the output"),
        (("--trained", "-"), "--trained: stdin is for the dialogues"),
        (("--judge-threshold", 2), "--judge-threshold: expected 0 to 1"),
    ],
)
def test_misuse_is_one_line(run, flags, complaint):
    code, err = run(DIALOGUES, *flags, constraints=WORDS, models=["base"])
    assert code == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "constraints", "complaint"),
    [
        (DIALOGUES, [WORDS[0], checked(regex="(")], "constraints.jsonl:2: check.regex: is no regular expression"),
        (DIALOGUES, [checked(predicate="max_words")], "constraints.jsonl:1: check: the predicate"),
        (DIALOGUES, [{"kind": "x"}], 'constraints.jsonl:1: the field "instruction" is missing'),
        ([DIALOGUES[0], {"messages": [{"role": "bot", "content": "x"}]}], WORDS, "in.jsonl:2: messages[0].role"),
        ([dialogue(1, constraint="say fox")], None, "in.jsonl:1:constraint: expected an object"),
        ([dialogue(1, constraint=checked(regx="a"))], None, "in.jsonl:1:constraint: check: expected one of"),
        ([dialogue(1)], None, "holds no dialogues with an instruction that can be judged; give --constraints"),
        (DIALOGUES, [checked(regex="(?:.|.|.|.|.|.|.|.)*!")], "takes more than 0.02 s"),
    ],
)
def test_what_is_wrong_is_named(run, scripted, monkeypatch, source, constraints, complaint):
    monkeypatch.setattr("llama2cli.measure.checkers.SECONDS", 0.02)
    code, err = run(source, constraints=constraints)
    assert code == 1 and complaint in err and "Traceback" not in err


def test_several_models_want_files(run, capsys):
    code = cli.invoke(["eval", "gatt", "-", "--model", "a", "--model", "b"])
    assert code == 2 and "stdin can be read once" in capsys.readouterr().err
    assert cli.invoke(["eval", "gatt", "x.jsonl"]) == 2 and "name a model" in capsys.readouterr().err


def test_json_and_quiet(run, scripted, capsys):
    run(DIALOGUES, "--json", constraints=WORDS)
    assert "obeyed %" not in run.err and "gatt: 5 dialogues" in run.err
    run(DIALOGUES, "--quiet", constraints=WORDS)
    assert run.err == ""


def test_the_help_names_every_predicate():
    from llama2cli.measure.checkers import PREDICATES

    told = re.search(r"Predicates: (.*?)\n\n", cli.stage("eval gatt").Settings.__doc__, re.DOTALL)[1]
    assert set(re.findall(r"[a-z_]+", re.sub(r"\(.*?\)", "", told, flags=re.DOTALL))) == set(PREDICATES)
