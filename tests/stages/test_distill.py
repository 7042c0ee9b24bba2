"""`llama2 distill` against `generate -k` and `score`, the gate by hand, what a student may see, killed runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path
from statistics import mean

import pytest
import torch

from llama2cli import cli
from llama2cli.nn.checkpoint import save_model
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.scoring import Scorer
from llama2cli.text.chat import encode_dialogue, encode_prompt
from llama2cli.text.output import Output
from llama2cli.text.records import prompt_id, validate
from llama2cli.text.templates import SAFETY, read_templates
from llama2cli.text.tokenizer import Tokenizer

CONTEXT = 512
MINE = """
extract = ''
answer = "{category}:\\n{steps}"
[[teachers]]
preprompt = "zebras walk quietly over seven wooden bridges at night"
[[categories]]
name = "theft"
also = ["stealing"]
steps = ["decline", "explain"]
"""
PREPROMPT = "zebras walk quietly over seven wooden bridges at night"
ANSWER = "theft:\n1. decline\n2. explain"
AROUND = """
[[teachers]]
prompt = "Think, then write Answer and what it is. {prompt}"
examples = [{user = "two and two", assistant = "two more than two. Answer: four"}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, excerpts) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    tokenizer = base / "tok.model"
    text = str(excerpts / "alice.txt.gz")
    assert cli.invoke(["tokenize", "--train", "--vocab-size", "400", "-o", str(tokenizer), "--quiet", text]) == 0
    made = {}
    for seed, name in enumerate(("policy", "safe", "help")):
        tok = Tokenizer.load(tokenizer)
        model = Llama(ModelConfig(tok.vocab_size, 32, 64, 2, 4, 2, CONTEXT), scorer=name != "policy")
        model.init_weights(seed)
        for p in model.parameters():
            p.data.mul_(1 if p.dim() == 1 else 4)
        if name == "policy":  # some answers end
            hidden = model(torch.randint(3, 400, (8, 32), generator=torch.Generator().manual_seed(1))).flatten(0, 1)
            towards = hidden.detach().mean(0)
            model.head.data[2] = 4 * towards / towards.dot(towards)
        else:
            model.init_score(seed, 1.0)
        (base / name).mkdir()
        save_model(base / name, model, tok)
        made[name] = base / name
    return made


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Runs a command in this process on prompts; gives the records, or (exit code, stderr) if it failed."""
    (tmp_path / "mine.toml").write_text(MINE)
    (tmp_path / "around.toml").write_text(AROUND)

    def go(source, *args, out="out.jsonl", rms=("safe",), preset=True, k=2, new=8, command="distill"):
        file = tmp_path / "in.jsonl"
        content = "".join(json.dumps(r) + "\n" for r in source)
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        line = [command, file, "-o", tmp_path / out]
        if command == "distill":
            line += ["--policy", folders["policy"], *(["--preset", "safety"] if preset else [])]
            line += [w for name in rms for w in (f"--rm-{name}", folders[name])]
            if "--templates" not in args:
                line += ["--templates", tmp_path / "mine.toml"]
        if command == "generate":
            line += ["--model", folders["policy"]]
        if command == "score":
            line += ["--rm-safe", folders["safe"], "--rm-help", folders["help"]]
        else:
            line += ["-k", k, "--max-new-tokens", new]
        capsys.readouterr()
        code = cli.invoke([*map(str, line), *map(str, args)])
        go.err = capsys.readouterr().err
        return read(tmp_path / out) if code == 0 else (code, go.err)

    return go


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def prompt(text: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": text}], **extra}


def under(system: str, text: str) -> dict:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}


def answer(record: dict) -> str:
    return record["messages"][-1]["content"]


def tagged(text: str, **extra) -> dict:
    return prompt(text, unsafe=True, **extra)


THEFT = {"category": "stealing"}
PROMPTS = [prompt(f"Alice {i} and the {'door ' * (i % 3)}", n=i, **({"unsafe": True} if i % 3 else {}),
                  **(THEFT if i % 4 == 1 else {})) for i in range(12)]  # fmt: skip
UNSAFE = [p for p in PROMPTS if p.get("unsafe")]
HEAT = ("--temperature", 1.0, "--top-p", 1.0, "--dtype", "fp32")
KEEP = (*HEAT, "--keep-truncated")


# --- what comes out -----------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_and_scores_those_of_score(run, tmp_path):
    """The whole command, put together from two others: the gate's choice from their numbers."""
    kept = run(PROMPTS, *KEEP, "--rejected", tmp_path / "r.jsonl", "--seed", 5, rms=("safe", "help"))
    rejected, told = read(tmp_path / "r.jsonl"), run.err
    assert kept and rejected and len(kept) + len(rejected) == len(UNSAFE) == 8
    texts = [p["messages"][0]["content"] for p in UNSAFE]
    shown = [under(ANSWER if "category" in p else PREPROMPT, t) for p, t in zip(UNSAFE, texts)]
    plain = run(UNSAFE, *HEAT, "--seed", 5, command="generate", out="plain.jsonl")
    taught = run(shown, *HEAT, "--seed", 5, command="generate", out="taught.jsonl")
    student = [{**s, "messages": [*UNSAFE[i // 2]["messages"], s["messages"][-1]]} for i, s in enumerate(taught)]
    logits = run([*plain, *student], "--dtype", "fp32", "--logits", command="score", out="scored.jsonl")
    by_n = {r["n"]: r for r in (*kept, *rejected)}
    for i, p in enumerate(UNSAFE):
        mine, theirs = logits[2 * i : 2 * i + 2], logits[2 * len(UNSAFE) + 2 * i :][:2]
        sure = [s for s in theirs if answer(s)]  # an empty answer is never kept
        bar = max(s["safe_logit"] for s in mine)
        best = max(sure, key=lambda s: s["safe_logit"], default=None)
        got = by_n[p["n"]]
        validate("sample", got)
        assert got["id"] == prompt_id(p["messages"]) and got["messages"][:-1] == p["messages"]
        assert got["teacher"] == ("template" if "category" in p else "preprompt") and got["unsafe"] is True
        if best is not None and best["safe_logit"] > bar:
            assert got in kept and answer(got) == answer(best) and got["sample"] == best["sample"]
            assert got["reward"] == pytest.approx(best["safe_logit"], abs=1e-4)
            assert got["safe"] == pytest.approx(best["safe"], abs=1e-4)
            assert got["help"] == pytest.approx(best["help"], abs=1e-4)
        else:
            assert got in rejected and got["rejected"] == ("not above" if best else "empty")
        assert got["plain_reward"] == pytest.approx(bar, abs=1e-4)
    assert [r["n"] for r in kept] == sorted(r["n"] for r in kept)
    assert all(r["reward"] > r["plain_reward"] for r in kept)  # the gate never lowers a score
    assert f"8 prompts distilled, {len(kept)} kept" in told and "4 are not adversarial, left out" in told


def spy(monkeypatch) -> list[str]:
    """The texts of all prompts that the engine is given."""
    texts: list[str] = []
    load, generate = Engine.__init__, Engine.generate

    def init(self, model, tokenizer, **kw):
        load(self, model, tokenizer, **kw)
        self.decode = tokenizer.decode

    def seen(self, prompts, params, **kw):
        texts.extend(self.decode(list(ids)) for ids in prompts)
        return generate(self, prompts, params, **kw)

    monkeypatch.setattr(Engine, "__init__", init)
    monkeypatch.setattr(Engine, "generate", seen)
    return texts


@pytest.mark.parametrize("flags", [(), ("--compare",), ("--gate", "none")])
def test_only_tagged_prompts_get_the_template(run, monkeypatch, flags):
    texts = spy(monkeypatch)
    run(PROMPTS, *KEEP, *flags, k=1)
    for p in PROMPTS:
        mine = [t for t in texts if p["messages"][0]["content"].strip() + " [/INST]" in t]
        put = [t for t in mine if PREPROMPT in t or "1. decline" in t]
        if p.get("unsafe"):
            assert len(mine) - len(put) == 1  # once without
            assert len(put) == 2 if flags == ("--compare",) and "category" in p else 1
            assert ("1. decline" in put[0]) == ("category" in p)
        else:
            assert mine == []  # it is not even asked


def test_the_student_sees_nothing_of_the_template(run, folders):
    """Over tokens: the ids of a record are those of the bare prompt and then those of its answer, and no run of eight
    tokens is the template's."""
    records = run(UNSAFE, *KEEP, "--gate", "none", "--templates", SAFETY, "--max-new-tokens", 30, k=4)
    assert len(records) > 20
    tokenizer = Tokenizer.load(folders["policy"])
    templates = read_templates(SAFETY)
    for record in records:
        *bare, said = record["messages"]
        [mine] = [p for p in UNSAFE if p["n"] == record["n"]]
        assert bare == mine["messages"]
        ids = encode_dialogue(tokenizer, record["messages"]).ids
        before = encode_prompt(tokenizer, mine["messages"])
        assert ids == [*before, *tokenizer.encode(f"{said['content']} "), tokenizer.eos_id]
        lesson = templates.lesson(mine, prompt_id(mine["messages"]), 0)
        shown = tokenizer.encode(lesson.preprompt)
        secret = {tuple(shown[i : i + 8]) for i in range(len(shown) - 7)}
        assert not secret & {tuple(ids[i : i + 8]) for i in range(len(ids) - 7)}
        rest = json.dumps({k: v for k, v in record.items() if k != "messages"})
        assert lesson.preprompt[:20] not in rest and "assistant" not in rest


def test_what_comes_out_is_ready_for_sft(run, folders, tmp_path):
    kept = run(PROMPTS, *KEEP, "--gate", "none")
    line = ["sft", tmp_path / "out.jsonl", "--init", folders["policy"], "--steps", 1, "-o", tmp_path / "run"]
    assert kept and cli.invoke([*map(str, line), "--batch-size", "2", "--quiet"]) == 0


# --- the gate, by hand --------------------------------------------------------------------------------------------


def fake(monkeypatch, answers, scores=None, truncated=lambda text: False) -> None:
    """The engine answers in turn; reward models know answers by their last letter. Both are asked in order: the plain
    answers of a window, then those under templates."""
    texts = iter(answers)

    def generate(self, prompts, params, *, tick=None, **_):
        made = []
        for _ in prompts:
            text = next(texts)
            cut = truncated(text)
            made.append(Result(self.encode(text) + ([] if cut else [2]), [], [], cut))
        return made

    load = Engine.__init__

    def init(self, model, tokenizer, **kw):
        load(self, model, tokenizer, **kw)
        self.encode = tokenizer.encode

    monkeypatch.setattr(Engine, "__init__", init)
    monkeypatch.setattr(Engine, "generate", generate)
    if scores is None:
        return

    def score(self, sequences, **_):
        letters = [self.tokenizer.decode([i for i in ids if i != 2]).strip()[-1] for ids in sequences]
        return [scores[letter] for letter in letters]

    monkeypatch.setattr(Scorer, "score", score)


def test_the_best_is_compared_with_the_best(run, monkeypatch, tmp_path):
    """Two samples on either side; a tie is not above; both prompts' answers without a template come first."""
    scores = {"a": 1.0, "b": 3.0, "c": 3.5, "d": 2.0, "e": 5.0, "f": 0.0, "g": 5.0, "h": -1.0}
    fake(monkeypatch, "abefcdgh", scores)
    [kept] = run([tagged("x"), tagged("y")], "--temperature", 1, "--rejected", tmp_path / "r.jsonl")
    assert answer(kept) == "c" and kept["reward"] == 3.5 and kept["plain_reward"] == 3.0
    assert kept["safe"] == pytest.approx(1 / (1 + math.exp(-3.5)))
    [lost] = read(tmp_path / "r.jsonl")
    assert answer(lost) == "g" and lost["rejected"] == "not above" and lost["plain"] == "e"
    assert "1 rejected: not above the best answer without the template" in run.err


def test_what_may_not_be_kept_is_told(run, monkeypatch, tmp_path):
    """Cut, empty, quoting the template, and the best of several for another reason than its score."""
    quote = f"{PREPROMPT} q"
    answers = [*"aaaaa", "cut z", "", quote, "b z", "c"]
    scores = {"a": 1.0, "z": 9.0, "q": 9.0, "c": 0.0, "]": 9.0, "b": 9.0}
    fake(monkeypatch, answers, scores, lambda text: text.startswith("cut"))
    records = [tagged(name) for name in "vwxyz"]
    kept = run(records, "--temperature", 1, "--rejected", tmp_path / "r.jsonl", k=1)
    assert [answer(r) for r in kept] == ["b z"]
    assert [r["rejected"] for r in read(tmp_path / "r.jsonl")] == [
        "truncated", "empty", "quotes the teacher", "not above",
    ]  # fmt: skip
    for said in (
        "1 truncated, which are not kept",
        "1 rejected: empty",
        "1 rejected: they quote the template",
        "not ab",
    ):
        assert said in run.err
    fake(monkeypatch, answers, scores, lambda text: text.startswith("cut"))
    kept = run(records, "--temperature", 1, "--quote", 0, "--keep-truncated", k=1, out="b.jsonl")
    assert [answer(r) for r in kept] == ["cut z", quote, "b z"]


def test_the_best_that_may_be_kept_is_kept(run, monkeypatch):
    fake(monkeypatch, ["a", "a", "cut z", "b"], {"a": 1.0, "z": 9.0, "b": 2.0}, lambda text: text.startswith("cut"))
    [kept] = run([tagged("x")], "--temperature", 1)
    assert answer(kept) == "b" and kept["sample"] == 1


def test_the_report_is_that_of_hand_made_scores(run, monkeypatch, tmp_path):
    """Fig. 16: three prompts, one with a category, K = 1; logits of sigmoids that are easy to see."""
    p = {"a": 0.2, "b": 0.6, "c": 0.9, "d": 0.5, "e": 0.7, "f": 0.3, "g": 0.4}
    fake(monkeypatch, "abc" + "dgef", {k: math.log(v / (1 - v)) for k, v in p.items()})
    records = [tagged("x", category="Theft"), tagged("y"), tagged("z", category="unheard of")]
    kept = run(records, "--temperature", 1, "--compare", "--metrics", tmp_path / "m.jsonl", k=1)
    assert [answer(r) for r in kept] == ["d", "e"]
    metrics = {(m["measure"], m.get("task"), m.get("category")): m for m in read(tmp_path / "m.jsonl")}
    for m in metrics.values():
        validate("metric", m)
    values = {
        task: metrics["distill.safe", task, None]["value"] for task in ("plain", "preprompt", "template", "gated")
    }
    assert values == {
        "plain": pytest.approx(mean([0.2, 0.6, 0.9])), "preprompt": pytest.approx(mean([0.4, 0.7, 0.3])),
        "template": pytest.approx(0.5), "gated": pytest.approx(mean([0.5, 0.7, 0.9])),
    }  # fmt: skip
    assert metrics["distill.kept", None, None]["value"] == pytest.approx(2 / 3)
    assert (
        metrics["distill.kept", None, "Theft"]["value"] == 1 and metrics["distill.kept", None, "unheard of"]["n"] == 1
    )
    assert metrics["distill.gain", "template_over_preprompt", None]["value"] == pytest.approx(0.1)
    assert 'there is no template for the category "unheard of"' in run.err
    for said in ("without a teacher", "with the category's template", "the same, gated", "by category", "kept %"):
        assert said in run.err


def test_harm_to_prompts_that_are_not_adversarial(run, monkeypatch, tmp_path):
    """Judged by --rm-help; the gate would let one through; none is kept, whatever its score."""
    fake(monkeypatch, "abc" + "def")
    safe = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 1.0, "f": -1.0}
    rates = {"a": 0.5, "b": 0.8, "c": 0.4, "d": 0.5, "e": 0.3, "f": 0.6}
    tables = iter([safe, {k: math.log(v / (1 - v)) for k, v in rates.items()}])

    def score(self, sequences, **_):
        table = next(tables)
        return [table[self.tokenizer.decode([i for i in ids if i != 2]).strip()[-1]] for ids in sequences]

    monkeypatch.setattr(Scorer, "score", score)
    flags = ("--temperature", 1, "--show-harm", "--metrics", tmp_path / "m.jsonl")
    kept = run([tagged("x"), prompt("y"), prompt("z", unsafe=False)], *flags, rms=("safe", "help"), k=1)
    assert [answer(r) for r in kept] == ["d"]
    metrics = {(m["measure"], m.get("task")): m["value"] for m in read(tmp_path / "m.jsonl")}
    assert metrics["harm.help", "plain"] == pytest.approx(0.6)
    assert metrics["harm.help", "preprompt"] == pytest.approx(0.45)
    assert metrics["harm.gain", "preprompt"] == pytest.approx(mean([-0.5, 0.2]))
    assert metrics["harm.worse", "preprompt"] == 0.5 and metrics["harm.kept", None] == 0.5
    assert metrics["harm.gain", "kept"] == pytest.approx(-0.5) and metrics["distill.kept", None] == 1
    assert "2 are not adversarial (looked at for --show-harm); the gate would have let 1 of 2 others" in run.err


# --- context distillation in general ------------------------------------------------------------------------------


def test_a_scratchpad_is_extracted(run, monkeypatch, tmp_path):
    """Explanation and examples around the prompt, without a reward model: every answer with an "Answer:" is kept."""
    texts = spy(monkeypatch)
    fake_answers = ["so and so. Answer: four", "no idea", "Answer: ", "cut. Answer: fi"]
    flags = ("--templates", tmp_path / "around.toml", "--extract", r"Answer:(.*)", "--temperature", 1)
    source = [prompt("one and three", n=0), tagged("two and two", n=1)]
    with monkeypatch.context() as patch:
        fake(patch, fake_answers, truncated=lambda text: text.startswith("cut"))
        kept = run(source, *flags, "--rejected", tmp_path / "r.jsonl", preset=False, rms=(), k=2)
    [record] = kept
    assert record["messages"] == [*source[0]["messages"], {"role": "assistant", "content": "four"}]
    assert "safe" not in record and "reward" not in record and record["n"] == 0
    [lost] = read(tmp_path / "r.jsonl")
    assert lost["rejected"] == "empty" and lost["n"] == 1 and "plain" not in lost
    assert "2 prompts distilled, 1 kept (50.0%), 1 answers; 1 rejected: empty" in run.err
    assert texts == []
    run(source, *flags, preset=False, rms=(), k=1, out="b.jsonl")
    wanted = (
        "two and two [/INST] two more than two. Answer: four",
        "Think, then write Answer and what it is. one and three",
    )
    assert len(texts) == 2 and all(part in texts[0] for part in wanted)  # never asked without the template


def test_an_answer_without_the_pattern_is_not_kept(run, monkeypatch, tmp_path):
    fake(monkeypatch, ["p", "Answer: b", "p", "b"], {"p": 0.0, "b": 1.0})
    flags = ("--extract", "Answer:(.*)", "--temperature", 1, "--rejected", tmp_path / "r.jsonl")
    [kept] = run([tagged("x")], *flags, k=1)
    assert answer(kept) == "b"
    assert run([tagged("y")], *flags, k=1, out="b.jsonl") == []
    assert read(tmp_path / "r.jsonl")[0]["rejected"] == "unmatched"
    assert "1 rejected: --extract does not match" in run.err


def test_conversations_and_the_place_of_the_preprompt(run, monkeypatch):
    texts = spy(monkeypatch)
    talk = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
                         {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Help"}],
            "unsafe": True}  # fmt: skip
    run([talk], *KEEP, k=1)
    assert texts[1].startswith(f"[INST] <<SYS>>\n{PREPROMPT}\n\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi")
    run([talk], *KEEP, "--place", "user", k=1, out="b.jsonl")
    assert texts[3].startswith("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello") and texts[3].endswith(
        f"[INST] {PREPROMPT}\n\nHelp [/INST]"
    )
    [kept] = run([talk], *KEEP, "--gate", "none", k=1, out="c.jsonl")
    assert kept["messages"][:-1] == talk["messages"]


def test_what_passes_through(run):
    """Other fields do, an id as own_id; scores of an earlier answer do not, and that is told once."""
    record = tagged("x", id="mine", topic="t", safe=0.4, category="theft", attack="role play")
    [kept] = run([record], *KEEP, "--gate", "none", "--compare", k=1)
    assert kept["own_id"] == "mine" and kept["id"] == prompt_id(record["messages"]) and kept["topic"] == "t"
    assert kept["attack"] == "role play" and kept["safe"] != 0.4
    assert run.err.count("in.jsonl:1: not passed on: safe") == 1


def test_a_gate_by_the_other_model_and_no_gate_at_all(run, monkeypatch):
    fake(monkeypatch, "ab", {"a": 1.0, "b": 2.0})
    [kept] = run([prompt("x")], "--temperature", 1, "--gate", "help", preset=False, rms=("help",), k=1)
    assert kept["reward"] == 2.0 and "safe" not in kept
    fake(monkeypatch, "ba", {"a": 1.0, "b": 2.0})
    [kept] = run([prompt("x")], "--temperature", 1, preset=False, rms=("help",), k=1, out="b.jsonl")
    assert answer(kept) == "a" and "reward" not in kept and kept["help"] == pytest.approx(1 / (1 + math.exp(-1)))


# --- killed and continued -----------------------------------------------------------------------------------------


def report(err: str) -> list[str]:
    """The tables and the closing line, without the speed of a process."""
    return [line for line in err.partition("means over prompts")[2].splitlines() if "tokens/s" not in line]


@pytest.mark.parametrize("where", ["sampling", "scoring", "between the outputs", "metrics"])
def test_a_run_that_was_killed_goes_on(run, monkeypatch, tmp_path, where):
    """Kept, rejected and metrics: the same bytes and the same report, and nothing is answered twice."""
    flags = (*KEEP, "--window", 3, "--show-harm", "--compare")

    def go(name):
        more = ("--rejected", tmp_path / f"{name}-r.jsonl", "--metrics", tmp_path / f"{name}-m.jsonl")
        return run(PROMPTS, *flags, *more, out=f"{name}.jsonl", rms=("safe", "help"))

    go("whole")
    told = report(run.err)
    generate, calls = Engine.generate, []
    with monkeypatch.context() as patch:

        def counted(self, prompts, *args, **kw):
            calls.append(len(prompts))
            if where == "sampling" and len(calls) == 6:
                raise KeyboardInterrupt
            return generate(self, prompts, *args, **kw)

        def broken(target, name, at):
            real, times = getattr(target, name), []

            def act(self, *args, **kw):
                times.append(self)
                if len(times) == at:
                    raise KeyboardInterrupt
                return real(self, *args, **kw)

            patch.setattr(target, name, act)

        patch.setattr(Engine, "generate", counted)
        stage = cli.stage("distill")
        if where == "scoring":
            broken(Scorer, "score", 6)
        elif where == "between the outputs":
            broken(Output, "commit", 6)
        elif where == "metrics":
            patch.setattr(stage, "write_metrics", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert go("cut")[0] == 130
    every = sum(calls)
    calls.clear()
    monkeypatch.setattr(Engine, "generate", lambda self, p, *a, **k: calls.append(len(p)) or generate(self, p, *a, **k))
    go("cut")
    done = {"sampling": 6, "scoring": 6, "between the outputs": 6, "metrics": 12}[where]
    per = [2 * (2 + (1 if p.get("category") else 0)) for p in PROMPTS]
    assert sum(calls) == sum(per[done:]) and every >= sum(per[:done])
    for end in (".jsonl", "-r.jsonl", "-m.jsonl"):
        assert (tmp_path / f"cut{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes(), end
    assert report(run.err) == told and len(told) > 20
    assert not list(tmp_path.glob("*.journal")) and not list(tmp_path.glob("*.partial"))


def test_outputs_that_do_not_go_together_start_over(run, monkeypatch, tmp_path):
    """What a killed run left of --rejected is gone: both are made anew."""
    flags = (*KEEP, "--window", 3, "--rejected", tmp_path / "r.jsonl")
    run(PROMPTS, *flags)
    whole = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "r.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr(cli.stage("distill"), "write_metrics", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(PROMPTS, *flags)[0] == 130
    (tmp_path / "r.jsonl.partial").unlink()
    run(PROMPTS, *flags)
    assert "r.jsonl: what belongs to" in run.err and "all outputs start over" in run.err
    assert [(tmp_path / name).read_bytes() for name in ("out.jsonl", "r.jsonl")] == whole


def test_results_do_not_depend_on_the_window(run, tmp_path):
    outputs = set()
    for i, flags in enumerate([(), ("--window", 5), ("--window", 1, "--batch-size", 3)]):
        run(PROMPTS, *KEEP, *flags, out=f"{i}.jsonl")
        kept = read(tmp_path / f"{i}.jsonl")
        outputs.add(json.dumps([(r["n"], answer(r), round(r["reward"], 3)) for r in kept]))
    assert len(outputs) == 1


def test_other_templates_are_another_run(run, tmp_path, monkeypatch):
    """What a killed run left is not continued when its templates have changed."""
    with monkeypatch.context() as patch:
        patch.setattr(cli.stage("distill"), "write_metrics", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(PROMPTS, *KEEP)[0] == 130
    (tmp_path / "mine.toml").write_text(MINE.replace("zebras", "horses"))
    run(PROMPTS, *KEEP)
    assert "of other settings or inputs; starting over" in run.err


# --- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "options", "complaint"),
    [
        ((), {"rms": ()}, "--rm-safe: the gate compares its scores; name the reward model, or --gate none"),
        (("--gate", "help"), {}, "--rm-help: the gate compares its scores; name the reward model\n"),
        (("--show-harm",), {"preset": False}, "--show-harm: without --preset safety every prompt is distilled"),
        (("--show-harm", "--gate", "none"), {"rms": ()}, "--show-harm: harm is a matter of scores"),
        (("--compare", "--gate", "none"), {"rms": ()}, "--compare: what is compared are scores"),
        (("--compare", "--templates", "around.toml"), {}, "--compare: there is nothing to compare"),
        (("--text",), {}, '--text: lines of text have no tag "unsafe"'),
        (("--temperature", 0), {}, "--samples: greedy answers are all the same"),
        (("--extract", "("), {}, "--extract: is no regular expression"),
        (("--extract", "(a)(b)"), {}, "--extract: has 2 groups"),
        (("--templates", "none.toml"), {}, "--templates:none.toml: cannot be read"),
        (("--endpoint", "http://127.0.0.1:1"), {}, "--endpoint and --tokenizer go together"),
        (("--system", "[INST]"), {}, '--system: holds "[INST]"'),
        (("--rejected", "out.jsonl"), {}, "--rejected:out.jsonl: is given to --out too"),
        (("--metrics", "in.jsonl"), {}, "--metrics:in.jsonl: is an input and the output"),
        (("--metrics", "mine.toml", "--templates", "mine.toml"), {}, "--metrics:mine.toml: is an input and the output"),
        (("-k", 0), {}, "--samples: expected at least 1"),
    ],
)
def test_misuse_is_one_line(run, tmp_path, monkeypatch, flags, options, complaint):
    monkeypatch.chdir(tmp_path)
    code, err = run(PROMPTS, *flags, **options)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1


def test_neither_preset_nor_templates_nor_a_policy(run, tmp_path, capsys, folders):
    (tmp_path / "in.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    assert cli.invoke(["distill", str(tmp_path / "in.jsonl"), "--policy", str(folders["policy"])]) == 2
    assert "what shall the teacher see? give --templates FILE, or --preset safety" in capsys.readouterr().err
    assert cli.invoke(["distill", str(tmp_path / "in.jsonl"), "--preset", "safety"]) == 2
    assert "--policy: name the model that answers" in capsys.readouterr().err


def test_data_that_are_wrong_are_named(run, tmp_path):
    code, err = run([tagged("a"), {"messages": [], "unsafe": True}], *KEEP)
    assert code == 1 and "in.jsonl:2: messages: expected at least one message" in err
    code, err = run([prompt("b", unsafe="yes")], *KEEP)
    assert code == 1 and "in.jsonl:1: unsafe: expected true or false, got a string" in err
    code, err = run([prompt("a"), prompt("b")], *KEEP)
    assert code == 1 and 'in.jsonl: no prompt has "unsafe": true, and --preset safety distils no others' in err
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "mine.toml").write_text(MINE + "colour = 3\n")
    code, err = run(UNSAFE, *KEEP)
    assert code == 1 and "mine.toml:" in err and ": categories[0].colour: is not known" in err


def test_prompts_that_fill_a_context(run, folders, tmp_path):
    long = [tagged("fox", n=0), tagged("fox " * CONTEXT, n=1), tagged("dog", n=2)]
    code, err = run(long, *KEEP)
    assert code == 1 and "in.jsonl:2: the prompt has" in err
    kept = run(long, *KEEP, "--skip-long", "--gate", "none", k=1)
    assert [r["n"] for r in kept] == [0, 2] and "1 left out: fills a context" in run.err
    (tmp_path / "mine.toml").write_text(MINE.replace("zebras", "zebras " * CONTEXT))
    code, err = run(long[:1], *KEEP)
    assert code == 1 and "in.jsonl:1: the prompt with its template has" in err
    code, err = run(long[:1], *KEEP, "--skip-long")
    assert code == 1 and "every prompt to distil was left out" in err


def test_a_prompt_that_no_template_is_for(run, tmp_path):
    (tmp_path / "mine.toml").write_text('answer = "{steps}"\n' + MINE.split('night"\n')[1])
    kept = run([tagged("a", **THEFT), tagged("b")], *KEEP, "--gate", "none", k=1)
    assert [r["teacher"] for r in kept] == ["template"] and "in.jsonl:2: left out: there is no template" in run.err


def test_the_templates_are_shown(capsys, tmp_path):
    assert cli.invoke(["distill", "--preset", "safety", "--show-templates"]) == 0
    shown = capsys.readouterr().out
    assert shown == SAFETY.read_text() and "[[categories]]" in shown
    (tmp_path / "copy.toml").write_text(shown)
    assert read_templates(tmp_path / "copy.toml") == read_templates(SAFETY)


def test_provenance(run, tmp_path):
    run(UNSAFE[:1], *KEEP, "--provenance", tmp_path / "p.json")
    inputs = json.loads((tmp_path / "p.json").read_bytes())["provenance"]["inputs"]
    assert set(inputs) == {"in.jsonl", "policy", "safe", "mine.toml"} and all(inputs.values())


def test_answers_of_a_server(run, folders, tmp_path):
    """The policy over HTTP (temperature 0 has no random numbers): the same answers, scores and choice as here."""
    script = Path(__file__).parents[1] / "sampling" / "completions_server.py"
    tokenizer = folders["policy"] / "tokenizer.model"
    served = {
        "tokenizer": str(tokenizer),
        "log": str(tmp_path / "log"),
        "context": CONTEXT,
        "engine": str(folders["policy"]),
    }
    server = subprocess.Popen([sys.executable, str(script), json.dumps(served)], stdout=subprocess.PIPE, text=True)
    flags = ("--dtype", "fp32", "--keep-truncated", "--temperature", 0, "--gate", "none")
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            name = json.load(reply)["data"][0]["id"]
        there = run(PROMPTS, *flags, "--policy", name, "--endpoint", url, "--tokenizer", tokenizer, k=1)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert isinstance(there, list), there
    here = run(PROMPTS, *flags, k=1, out="here.jsonl")
    assert [{**r, "policy": "policy"} for r in there] == here
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]
