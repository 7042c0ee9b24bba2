"""`llama2 eval temporal`: models against answers by hand, answered dialogues, prompts for others, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama2cli import cli
from llama2cli.nn.checkpoint import save_model
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.sampling.engine import Engine, Result
from llama2cli.text.records import validate
from llama2cli.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory, excerpts) -> Path:
    """A folder with two small models, one and two."""
    base = tmp_path_factory.mktemp("models")
    text, path = str(excerpts / "alice.txt.gz"), base / "tok.model"
    assert cli.invoke(["tokenize", "--train", "--vocab-size", "400", "-o", str(path), "--quiet", text]) == 0
    tokenizer = Tokenizer.load(path)
    for seed, name in enumerate(("one", "two")):
        model = Llama(ModelConfig(tokenizer.vocab_size, 32, 64, 1, 2, 2, 128))
        model.init_weights(seed)
        (base / name).mkdir()
        save_model(base / name, model, tokenizer)
    return base


@pytest.fixture
def run(models, tmp_path, capsys, monkeypatch):
    """Runs the command in the folder of the models; gives the records, or (exit code, stderr) if it failed."""
    monkeypatch.chdir(models)

    def go(source, *args, file="in.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(r) + "\n" for r in source))
        capsys.readouterr()
        out = tmp_path / "out.jsonl"
        code = cli.invoke(["eval", "temporal", str(tmp_path / file), "-o", str(out), *map(str, args)])
        go.err = capsys.readouterr().err
        return read(out) if code == 0 else (code, go.err)

    return go


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def fact(answer: str, query: str | int, **more) -> dict:
    return {"question": f"Who is {answer}?", "answer": answer, "event_date": "2020-05", "query_date": query, **more}


FACTS = [fact("Ann", 2021), fact("Bob", 2019), fact("Cid", 2020), fact("Dan", "2020-06", answer_before="No."),
         fact("Eve", "2020-04-30")]  # fmt: skip


def answers(monkeypatch, *texts: str) -> list[str]:
    """The engine answers so, in turn; gives the prompts that it was asked."""
    left, asked = iter(texts), []
    load = Engine.__init__

    def init(self, model, tokenizer, **kw):
        load(self, model, tokenizer, **kw)
        self.tokenizer = tokenizer

    def generate(self, prompts, params, **_):
        assert all(p.temperature == 0 for p in params)
        asked.extend(self.tokenizer.decode(list(ids)) for ids in prompts)
        return [Result([*self.tokenizer.encode(next(left)), 2], [], [], False) for _ in prompts]

    monkeypatch.setattr(Engine, "__init__", init)
    monkeypatch.setattr(Engine, "generate", generate)
    return asked


def values(records: list[dict], **by) -> dict[tuple, float]:
    for record in records:
        validate("metric", record)
    mine = [r for r in records if all(r.get(k) == v for k, v in by.items())]
    return {(r["measure"], r.get("task")): r["value"] for r in mine}


def test_a_model_is_asked_at_the_date(run, monkeypatch, tmp_path):
    asked = answers(monkeypatch, "It is Ann.", "Not yet.", "Not yet.", "Eve")
    got = values(run(FACTS, "--model", "one", "--answers", tmp_path / "a.jsonl"))
    assert asked[0] == "[INST] <<SYS>>\nIt is the year 2021.\n<</SYS>>\n\nWho is Ann? [/INST]"
    assert "Today is 30 April 2020." in asked[3] and len(asked) == 4  # the third cannot be decided
    assert got == {
        ("temporal.correct", "after"): 0.5, ("temporal.correct", "before"): 0.5, ("temporal.balanced", None): 0.5,
        ("temporal.leaks", "before"): 0.5, ("temporal.denies", "after"): 0.5,
    }  # fmt: skip
    assert "in.jsonl:3: left out: the dates do not say whether the event lies before the query" in run.err
    kept = read(tmp_path / "a.jsonl")
    assert [r["correct"] for r in kept] == [True, True, False, False] and {r["policy"] for r in kept} == {"one"}
    assert [validate("answered", r)["messages"][-1]["content"] for r in kept] == [
        "It is Ann.",
        "Not yet.",
        "Not yet.",
        "Eve",
    ]
    again = run(kept)  # what was answered is judged to the same numbers
    assert values(again) == got


def test_models_side_by_side(run, monkeypatch):
    answers(monkeypatch, "Ann", "Not yet", "Dan", "Not yet", *["Ann"] * 4)
    got = run(FACTS, "--model", "one", "--model", "two")
    assert values(got, model="one")["temporal.balanced", None] == 1.0
    assert values(got, model="two")["temporal.correct", "after"] == 0.5
    assert run.err.splitlines()[-2].split()[0] == "one" and run.err.splitlines()[-1].split()[0] == "two"


def test_prompts_to_be_answered_elsewhere(run, models):
    """The pipe of the help: --prompts, generate, and the answers judged."""
    prompts = run(FACTS, "--prompts")
    assert [validate("prompt", p)["answer"] for p in prompts] == ["Ann", "Bob", "Dan", "Eve"]
    assert prompts[2]["messages"][0]["content"] == "Today is June 2020." and "answer_before" not in prompts[2]
    answered = [{**p, "messages": [*p["messages"], {"role": "assistant", "content": "Not yet."}]} for p in prompts]
    got = values(run(answered))
    assert got["temporal.correct", "after"] == 0 and got["temporal.correct", "before"] == 1


def test_a_real_model_answers(run, tmp_path):
    run(FACTS, "--model", "one", "--max-new-tokens", 5, "--answers", tmp_path / "a.jsonl", "--window", 2)
    first = read(tmp_path / "a.jsonl")
    run(FACTS, "--model", "one", "--max-new-tokens", 5, "--answers", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == first and len(first) == 4


def test_sources_and_a_pattern_of_ones_own(run, monkeypatch, tmp_path):
    answers(monkeypatch, "Ann", "nescio")
    got = run([fact("Ann", 2021, source="a"), fact("Bob", 2019, source="b")], "--model", "one", "--denies", "NESCIO")
    assert values(got, source="a") == {("temporal.correct", "after"): 1.0, ("temporal.denies", "after"): 0.0}
    assert values(got, source="b")["temporal.correct", "before"] == 1.0


def test_one_side_alone_is_warned_of(run, monkeypatch):
    answers(monkeypatch, "Ann")
    assert run([FACTS[0]], "--model", "one") and "no question is asked before its event" in run.err
    assert run([FACTS[2]], "--model", "one")[0] == 1 and "in.jsonl: every question was left out" in run.err


def test_json_and_provenance(run, monkeypatch, tmp_path):
    answers(monkeypatch, "Ann")
    run([FACTS[0]], "--model", "one", "--json", "--provenance", tmp_path / "p.json")
    assert "right %" not in run.err
    assert set(json.loads((tmp_path / "p.json").read_bytes())["provenance"]["inputs"]) == {"in.jsonl", "one"}


ANSWERED = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}],
            "answer": "Ann", "event_date": 2020, "query_date": 2021}  # fmt: skip


@pytest.mark.parametrize(
    ("records", "flags", "code", "complaint"),
    [
        (FACTS, (), 1, "in.jsonl:1: nobody has answered it; name a --model, or answer what --prompts writes"),
        ([ANSWERED], ("--model", "one"), 1, "in.jsonl:1: messages: is answered already"),
        ([ANSWERED], ("--prompts",), 1, "in.jsonl:1: messages: is answered already"),
        ([FACTS[0], fact("Ann", "now")], ("--model", "one"), 1, "in.jsonl:2: query_date: expected a date"),
        ([], ("--model", "one"), 1, "holds no questions"),
        (FACTS, ("--model", "onr"), 1, "onr"),
        (FACTS, ("--model", "one", "--model", "one"), 2, "--model: one is given twice"),
        (FACTS, ("--model", "one", "--prompts"), 2, "--prompts: prompts are to be answered elsewhere"),
        (FACTS, ("--denies", "("), 2, "--denies: is no regular expression"),
        (FACTS, ("--answers", "-", "-o", "-"), 2, "--answers:-: is given to --out too"),
        (FACTS, ("--model", "one", "--temperature", "-1"), 2, "--temperature: expected at least 0"),
    ],
)
def test_what_is_refused(run, records, flags, code, complaint):
    got, err = run(records, *flags)
    assert got == code and complaint in err and len(err.splitlines()) == 1


def test_several_models_want_files(capsys, monkeypatch):
    assert cli.invoke(["eval", "temporal", "-", "--model", "a", "--model", "b"]) == 2
    assert "stdin can be read once" in capsys.readouterr().err


def test_sft_trains_what_is_measured(run, models, tmp_path):
    """`sft --format temporal` on the same file."""
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in FACTS))
    line = ["sft", tmp_path / "facts.jsonl", "--format", "temporal", "--init", "one", "-o", tmp_path / "run"]
    assert cli.invoke([*map(str, line), "--steps", "1", "--batch-size", "2", "--quiet"]) == 0
