"""`llama2 rs-sample` against `generate -k` and `score`, the choice by hand, pools, and runs that are killed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from itertools import combinations
from pathlib import Path
from statistics import mean, median

import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.scoring import Scorer
from llama2cli.text.output import Output
from llama2cli.text.records import prompt_id, validate

CONTEXT = 128
LINES = [f"the quick brown fox number {i} jumps over {i * i} lazy dogs [INST] </s>" for i in range(500)]


def model(folder: Path, seed: int, *, rewards: bool = False, context: int = CONTEXT) -> Path:
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
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=380,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=context,
        num_labels=1,
        pad_token_id=0,
    )
    kind = transformers.LlamaForSequenceClassification if rewards else transformers.LlamaForCausalLM
    made = kind(config)
    for p in made.parameters():
        p.data.mul_(3)
    if rewards:
        made.score.weight.data.mul_(4)
    else:
        hidden = made.model(torch.randint(3, 380, (8, 32))).last_hidden_state.flatten(0, 1).detach()
        towards = hidden.mean(0)
        made.lm_head.weight.data[2] = 4 * towards / towards.dot(towards)  # some answers end
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {"policy": model(base / "policy", 6)} | {
        name: model(base / name, seed, rewards=True) for name, seed in (("help", 7), ("safe", 8), ("later", 9))
    }


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Runs the command in this process on prompts; gives the records, or (exit code, stderr) if it failed."""

    def go(source, *args, out="out.jsonl", help="help", safe="safe", command="rs-sample", k=4, new=8):
        file = tmp_path / "in.jsonl"
        content = "".join(json.dumps(r) + "\n" for r in source)
        if not file.exists() or file.read_text() != content:
            file.write_text(content)  # a changed file would be another input to the journal
        models = {"rs-sample": ["--policy", folders["policy"]], "generate": ["--model", folders["policy"]]}
        line = [command, file, *models.get(command, []), "-o", tmp_path / out]
        if command != "generate":
            line += [w for name, of in (("help", help), ("safe", safe)) if of for w in (f"--rm-{name}", folders[of])]
        if command != "score":
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


def answer(record: dict) -> str:
    return record["messages"][-1]["content"]


PROMPTS = [prompt(f"the fox {i} jumps {'over ' * (i % 3)}", n=i, **({"unsafe": True} if i % 4 == 0 else {}))
           for i in range(7)]  # fmt: skip
KEEP = ("--keep-truncated", "--dtype", "fp32")
HEAT = ("--temperature", 0.8, "--temperature", 1.3)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_samples_are_those_of_generate_and_scores_those_of_score(run, tmp_path):
    best = run(PROMPTS, *KEEP, *HEAT, "--all", tmp_path / "all.jsonl", "--seed", 5)
    every = read(tmp_path / "all.jsonl")
    assert len(every) == 7 * 2 * 4 and len(best) == 7
    for number, heat in enumerate((0.8, 1.3)):
        flags = ("--temperature", heat, "--top-p", 1, "--seed", 5, "--dtype", "fp32")
        drawn = run(PROMPTS, *flags, command="generate", k=8, out=f"{heat}.jsonl")
        for i in range(7):  # the second temperature has random numbers of its own
            mine = every[8 * i + 4 * number :][:4]
            theirs = drawn[8 * i + 4 * number :][:4]
            assert [
                {k: v for k, v in s.items() if k not in ("help", "safe", "reward", "round")} for s in mine
            ] == theirs
    bare = [{k: v for k, v in s.items() if k not in ("help", "safe", "reward")} for s in every]
    judged = run(bare, "--dtype", "fp32", "--logits", command="score", out="judged.jsonl")
    for mine, theirs in zip(every, judged):
        for name in ("help", "safe", "reward"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4)
    for i, kept in enumerate(best):
        validate("sample", kept)
        assert kept["n"] == i and kept["id"] == prompt_id(PROMPTS[i]["messages"]) and kept["round"] == 1
        mine = every[8 * i : 8 * i + 8]
        assert kept == next(s for s in mine if s["reward"] == max(t["reward"] for t in mine))
    assert {kept["temperature"] for kept in best} <= {0.8, 1.3}
    assert any(s["truncated"] for s in every) and not all(s["truncated"] for s in every)


def test_the_best_is_by_the_piecewise_rule(run, monkeypatch):
    """Scores by hand for four answers to each of two prompts: Rs < 0.15 (logit -1.73) counts as the reward."""
    at = math.log(3 / 17)
    helps = [1.0, 9.0, 3.0, 2.0] * 2
    safes = [0.0, -5.0, at, 7.0] * 2
    values = iter([helps, safes])
    texts = iter(["a", "b", "c", "d"] * 2)
    fake_answers(monkeypatch, texts)
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: next(values))
    plain, unsafe = run([prompt("x"), prompt("y", unsafe=True)], window := "--window", 2)
    assert window and answer(plain) == "c" and plain["reward"] == 3.0  # at the threshold is not below it
    assert answer(unsafe) == "d" and unsafe["reward"] == 7.0
    assert plain["help"] == pytest.approx(1 / (1 + math.exp(-3))) and plain["safe"] == pytest.approx(0.15)
    assert "1 chosen by the safety model's score" in run.err


def fake_answers(monkeypatch, texts, truncated=lambda text: False) -> None:
    """The engine answers with these texts in turn."""

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


def test_one_reward_model_chooses_alone_on_logits(run, monkeypatch):
    """Sigmoids of 40 and 50 are both 1 in every digit."""
    fake_answers(monkeypatch, iter("abc"))
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: [40.0, 50.0, 45.0])
    [kept] = run([prompt("x", unsafe=True)], safe=None, k=3)
    assert (
        "empty" not in run.err
        and answer(kept) == "b"
        and kept["reward"] == 50.0
        and kept["help"] == 1.0
        and "safe" not in kept
    )


def test_an_empty_answer_that_is_kept_is_told(run, monkeypatch):
    fake_answers(monkeypatch, iter(["a", " ", "", "b"]))
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: [1.0, 2.0, 0.0][: len(sequences)])
    [kept] = run([prompt("x")], safe=None)
    assert answer(kept) == "" and kept["sample"] == 1 and "1 of them empty" in run.err


def test_answers_that_are_the_same_are_scored_once_and_the_first_is_kept(run, monkeypatch):
    fake_answers(monkeypatch, iter("abab"))
    seen = []
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: seen.append(len(sequences)) or [1.0, 2.0])
    [kept] = run([prompt("x")], safe=None)
    assert seen == [2] and (answer(kept), kept["sample"]) == ("b", 1)
    assert " 50.0 " in run.err  # distinct %


def test_truncated_answers_are_scored_counted_and_not_kept(run, monkeypatch, tmp_path):
    cut = {"b", "e", "f", "g", "h"}.__contains__

    def reward(self, sequences, **_):  # an answer that was cut has no EOS
        assert [ids[-1] == 2 for ids in sequences] == [True, False, True, True] + [False] * 4
        return [0.0, 9.0, 1.0, 0.5, 1.0, 2.0, 3.0, 4.0]

    monkeypatch.setattr(Scorer, "score", reward)
    records = [prompt("x"), prompt("y")]
    fake_answers(monkeypatch, iter("abcdefgh"), cut)
    [kept] = run(records, "--all", tmp_path / "all.jsonl", safe=None)
    assert answer(kept) == "c" and kept["truncated"] is False
    assert "in.jsonl:2: left out: every answer was cut" in run.err and "5 truncated, which are not kept" in run.err
    row = next(line for line in run.err.splitlines() if line.startswith("1.2"))
    assert "best not cut" in run.err and " 6.500 ±" in row and " 1.000 " in row  # 9 and 4; 1
    assert [s["truncated"] for s in read(tmp_path / "all.jsonl")] == [False, True, False, False] + [True] * 4
    fake_answers(monkeypatch, iter("abcdefgh"), cut)
    kept = run(records, "--keep-truncated", safe=None, out="kept.jsonl")
    assert [answer(k) for k in kept] == ["b", "h"] and kept[0]["truncated"] is True


def test_order_and_answers_do_not_depend_on_the_window(run, tmp_path):
    outputs = set()
    for i, flags in enumerate([(), ("--window", 3), ("--window", 1, "--batch-size", 3)]):
        run(PROMPTS, *KEEP, *flags, out=f"{i}.jsonl")
        outputs.add((tmp_path / f"{i}.jsonl").read_bytes())
    assert len({tuple((r["n"], answer(r)) for r in map(json.loads, o.splitlines())) for o in outputs}) == 1


def test_lines_of_text_and_a_system_prompt(run, tmp_path):
    (tmp_path / "in.jsonl").write_text("the fox\nlazy dogs\n")
    source = [prompt("the fox"), prompt("lazy dogs")]
    line = run(source, *KEEP, "--system", "be quick")
    assert [r["messages"][0]["content"] for r in line] == ["be quick"] * 2
    assert line[0]["id"] == prompt_id([{"role": "system", "content": "be quick"}, *source[0]["messages"]])
    assert run(source, "--system", "[INST]")[0] == 2


# --- what is reported ---------------------------------------------------------------------------------------------


def test_curves_are_those_of_brute_force(run, tmp_path):
    run(PROMPTS, *KEEP, *HEAT, "--all", tmp_path / "all.jsonl", "--metrics", tmp_path / "m.jsonl")
    every, metrics = read(tmp_path / "all.jsonl"), read(tmp_path / "m.jsonl")
    for record in metrics:
        validate("metric", record)
    found = {(m["measure"], m["temperature"], m.get("k")): m for m in metrics}
    for heat in (0.8, 1.3):
        sets = [[s["reward"] for s in every[8 * i : 8 * i + 8] if s["temperature"] == heat] for i in range(7)]
        for k in range(1, 5):
            for name, of in (("max", max), ("median", median)):
                by_prompt = [mean(map(of, combinations(rewards, k))) for rewards in sets]
                m = found[f"reward.{name}", heat, k]
                assert m["value"] == pytest.approx(mean(by_prompt), rel=1e-9) and m["n"] == 7 and m["round"] == 1
                half = 1.959964 * torch.tensor(by_prompt).double().std().item() / math.sqrt(7)
                assert (m["low"], m["high"]) == pytest.approx((mean(by_prompt) - half, mean(by_prompt) + half))
            gain = found["reward.max", heat, k]["value"] - found["reward.median", heat, k]["value"]
            assert found["reward.gain", heat, k]["value"] == pytest.approx(gain, abs=1e-12)
        assert found["reward.mean", heat, None]["value"] == pytest.approx(mean(map(mean, sets)))
        mine = [s for s in every if s["temperature"] == heat]
        assert found["samples.truncated", heat, None]["value"] == sum(s["truncated"] for s in mine) / 28
    assert sum(found["samples.chosen", heat, None]["value"] for heat in (0.8, 1.3)) == pytest.approx(1)
    assert "expected largest reward of n samples" in run.err and "best at" in run.err
    run(PROMPTS, *KEEP, out="one.jsonl")
    assert "max - median" in run.err and "best of 4" in run.err
    run(PROMPTS, *KEEP, "--quiet", out="quiet.jsonl")
    assert run.err == ""


# --- the pool -----------------------------------------------------------------------------------------------------


def sample(text: str, content: str, **extra) -> dict:
    messages = prompt(text)["messages"]
    made = {"messages": [*messages, {"role": "assistant", "content": content}], "id": prompt_id(messages), "sample": 0}
    return made | {"policy": "old", "temperature": 1, "seed": 0, "n_tokens": 3, "truncated": False, **extra}


def by_answer(monkeypatch, values: dict[str, float]) -> None:
    """A reward model that knows answers by their last letter."""

    def score(self, sequences, **_):
        texts = [self.tokenizer.decode(ids[:-1]).strip()[-1] for ids in sequences]
        return [values[text] for text in texts]

    monkeypatch.setattr(Scorer, "score", score)


@pytest.fixture
def pooled(run, monkeypatch, tmp_path):
    """Two prompts of this run, x and y, answered "a" and "b"; the pool has answers to x and to z."""
    lines = [
        sample("x", "c", round=1, reward=99.0, help=1.0, unsafe=True),
        sample("z", "d", round=2, note="kept"),
        sample("x", "e", round=2),
        sample("z", "f", round=1),
        sample("x", "e", round=1),
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))

    def go(values, *args, **kw):
        fake_answers(monkeypatch, iter("ab"))
        by_answer(monkeypatch, values)
        return run([prompt("x"), prompt("y")], "--pool", tmp_path / "pool.jsonl", *args, safe=None, k=1, **kw)

    return go


SCORES = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 5.0, "e": 2.0, "f": 4.0}


def test_all_rounds_compete_by_the_scores_of_this_run(pooled, run):
    got = pooled(SCORES)
    assert [answer(r) for r in got] == ["e", "b", "d"]  # x, y, and then what only the pool has
    assert [r["round"] for r in got] == [2, 3, 2] and [r["policy"] for r in got] == ["old", "policy", "old"]
    assert [r["reward"] for r in got] == [2.0, 1.0, 5.0] and "unsafe" not in got[0] and got[2]["note"] == "kept"
    assert all(validate("sample", r) for r in got)
    assert "2 from the pool" in run.err and "1 prompts that only the pool has" in run.err
    assert "pool: 4 samples of 2 prompts; 1 more are the same" in run.err
    got = pooled({**SCORES, "c": 7.0, "f": 6.0}, out="other.jsonl")  # other scores, another best
    assert [answer(r) for r in got] == ["c", "b", "f"] and "unsafe" not in got[0]


def test_only_the_last_round_competes(pooled, run):
    got = pooled(SCORES, "--pool-mode", "last", "--round", 2)
    assert [answer(r) for r in got] == ["e", "b", "d"]
    got = pooled({**SCORES, "c": 7.0, "f": 6.0}, "--pool-mode", "last", "--round", 2, out="b.jsonl")
    assert [answer(r) for r in got] == ["e", "b", "d"]
    got = pooled(SCORES, "--pool-mode", "last", "--round", 5, out="c.jsonl")
    assert [answer(r) for r in got] == ["a", "b"] and {r["round"] for r in got} == {5}
    assert "pool: 0 samples of 0 prompts; 5 of other rounds than 5 left out" in run.err
    assert pooled(SCORES, "--pool-mode", "last", out="d.jsonl")[0] == 2


def test_a_pool_of_real_rounds(run, tmp_path):
    """Round 2 under other reward models: each prompt's best of both rounds' samples, by `score`."""
    run(PROMPTS, *KEEP, "--all", tmp_path / "r1.jsonl", out="1.jsonl")
    flags = (*KEEP, "--seed", 1, "--pool", tmp_path / "r1.jsonl", "--all", tmp_path / "r2.jsonl")
    best = run(PROMPTS, *flags, help="later", out="2.jsonl")
    both = [*read(tmp_path / "r2.jsonl"), *read(tmp_path / "r1.jsonl")]
    judged = run(both, "--dtype", "fp32", command="score", help="later", out="judged.jsonl")
    assert {s["round"] for s in both} == {1, 2}
    for record, kept in zip(PROMPTS, best):
        mine = [s for s in judged if s["id"] == prompt_id(record["messages"])]
        assert kept["reward"] == pytest.approx(max(s["reward"] for s in mine), abs=1e-4)
    assert {kept["round"] for kept in best} == {1, 2}


# --- killed and continued -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["sampling", "scoring", "between the outputs", "metrics"])
def test_a_run_that_was_killed_goes_on(run, monkeypatch, tmp_path, where):
    """The best, all samples, the pool's prompts and the metrics: the same bytes, and nothing is answered twice."""
    (tmp_path / "pool.jsonl").write_text(json.dumps(sample("only here", "fox", round=1)) + "\n")
    keep = KEEP[where == "scoring" :]  # there without --keep-truncated
    flags = (*keep, *HEAT, "--window", 2, "--pool", tmp_path / "pool.jsonl")

    def go(name):
        more = ("--all", tmp_path / f"{name}-all.jsonl", "--metrics", tmp_path / f"{name}-m.jsonl")
        return run(PROMPTS, *flags, *more, out=f"{name}.jsonl")

    go("whole")
    assert ("reward.whole" in (tmp_path / "whole-m.jsonl").read_text()) == (where == "scoring")
    told = run.err.splitlines()[-1]
    generate, calls = Engine.generate, []
    with monkeypatch.context() as patch:

        def counted(self, prompts, *args, **kw):
            calls.append(len(prompts))
            if where == "sampling" and len(calls) == 6:
                raise KeyboardInterrupt
            return generate(self, prompts, *args, **kw)

        patch.setattr(Engine, "generate", counted)
        times = []

        def broken(target, name, at):
            real = getattr(target, name)

            def act(self, *args, **kw):
                times.append(self)
                if len(times) == at:
                    raise KeyboardInterrupt
                return real(self, *args, **kw)

            patch.setattr(target, name, act)

        if where == "scoring":
            broken(Scorer, "score", 6)
        elif where == "between the outputs":
            broken(Output, "commit", 6)
        elif where == "metrics":
            patch.setattr(cli.stage("rs-sample"), "write_metrics", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert go("cut")[0] == 130
    calls.clear()
    monkeypatch.setattr(Engine, "generate", lambda self, p, *a, **k: calls.append(len(p)) or generate(self, p, *a, **k))
    go("cut")
    done = {"sampling": 4, "scoring": 4, "between the outputs": 4, "metrics": 7}[where]
    assert sum(calls) == (7 - done) * 8
    for end in (".jsonl", "-all.jsonl", "-m.jsonl"):
        assert (tmp_path / f"cut{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes(), end
    assert run.err.splitlines()[-1] == told
    assert not list(tmp_path.glob("*.journal")) and not list(tmp_path.glob("*.partial"))


def test_outputs_that_do_not_go_together_start_over(run, monkeypatch, tmp_path):
    flags = (*KEEP, "--window", 2, "--all", tmp_path / "all.jsonl")
    run(PROMPTS, *flags, out="out.jsonl")
    whole = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "all.jsonl")]
    with monkeypatch.context() as patch:
        times = iter([None] * 2)
        real = Scorer.score
        patch.setattr(Scorer, "score", lambda self, *a, **k: (next(times), real(self, *a, **k))[1])
        assert run(PROMPTS, *flags, "--seed", 0)[0] != 0
    (tmp_path / "all.jsonl.partial").unlink()
    run(PROMPTS, *flags, "--seed", 0)
    assert "all outputs start over" in run.err
    assert [(tmp_path / name).read_bytes() for name in ("out.jsonl", "all.jsonl")] == whole


# --- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--temperature", -1), "--temperature: expected at least 0"),
        (("--temperature", "nan"), "--temperature: expected at least 0"),
        ((*HEAT, *HEAT[:2]), "--temperature: 0.8 is given twice"),
        (("--temperature", 0), "--temperature: greedy answers are all the same"),
        (("--all", "out.jsonl"), "--all:out.jsonl: is given to --out too"),
        (("--metrics", "in.jsonl"), "--metrics:in.jsonl: is an input and the output"),
        (("--pool", "in.jsonl", "--all", "in.jsonl"), "--all:in.jsonl: is an input and the output"),
        (("-k", 0), "--samples: expected at least 1"),
        (("--endpoint", "http://127.0.0.1:1"), "--endpoint and --tokenizer go together"),
    ],
)
def test_misuse_is_one_line(run, tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    code, err = run(PROMPTS, *flags)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1


def test_no_reward_model(run):
    code, err = run(PROMPTS, help=None, safe=None)
    assert code == 2 and "give --rm-help, --rm-safe or both" in err


def test_data_that_are_wrong_are_named(run, tmp_path):
    code, err = run([{"messages": [*prompt("a")["messages"], {"role": "assistant", "content": "b"}]}])
    assert code == 1 and "in.jsonl:1: messages[1].role" in err
    code, err = run([])
    assert code == 1 and "holds no prompts" in err
    (tmp_path / "pool.jsonl").write_text(json.dumps(prompt("x")) + "\n")
    code, err = run(PROMPTS, "--pool", tmp_path / "pool.jsonl")
    assert code == 1 and "pool.jsonl:1: " in err and len(err.splitlines()) == 1


def test_prompts_that_fill_a_context(run, folders, tmp_path):
    """Of the policy, or of a reward model alone."""
    records = [prompt("fox", n=0), prompt("fox " * CONTEXT, n=1), prompt("dog", n=2)]
    code, err = run(records, *KEEP)
    assert code == 1 and "in.jsonl:2: the prompt has" in err and "--skip-long" in err
    assert [r["n"] for r in run(records, *KEEP, "--skip-long")] == [0, 2] and "prompts left out" in run.err
    folders["short"] = model(tmp_path / "short", 7, rewards=True, context=16)
    got = run([prompt("fox " * 30, n=0), prompt("dog", n=1)], *KEEP, "--skip-long", help="short", out="b.jsonl")
    assert [r["n"] for r in got] == [1] and "prompts left out" in run.err
    got = run([prompt("dog", n=1)], *KEEP, help="short", new=40, out="c.jsonl")
    assert len(got) == 1 and "read up to the end of a reward model's context" in run.err


def test_provenance(run, tmp_path, folders):
    run(PROMPTS[:1], *KEEP, "--provenance", tmp_path / "p.json")
    inputs = json.loads((tmp_path / "p.json").read_bytes())["provenance"]["inputs"]
    assert set(inputs) == {"in.jsonl", "policy", "help", "safe"} and all(inputs.values())


# --- another machine's policy -------------------------------------------------------------------------------------


@pytest.fixture
def served(folders, tmp_path):
    """A server of the policy as a process of its own: the flags that name it; its log is `log` in tmp_path."""
    script = Path(__file__).parents[1] / "sampling" / "completions_server.py"
    tokenizer = folders["policy"] / "tokenizer.model"
    settings = {"tokenizer": str(tokenizer), "log": str(tmp_path / "log"), "engine": str(folders["policy"])}
    server = subprocess.Popen([sys.executable, str(script), json.dumps(settings)], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            name = json.load(reply)["data"][0]["id"]
        yield ("--policy", name, "--endpoint", url, "--tokenizer", tokenizer)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_answers_of_a_server_are_chosen_from(run, served, tmp_path):
    """The policy over HTTP (temperature 0 has no random numbers): the same answers, scores and choice as here."""
    flags = (*KEEP, "--temperature", 0)
    there = run(PROMPTS, *flags, *served, k=1)
    assert isinstance(there, list), there
    here = run(PROMPTS, *flags, k=1, out="here.jsonl")
    assert [{**r, "policy": "policy"} for r in there] == here and {r["policy"] for r in there} == {served[1]}
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]  # no answers are left beside it


def test_a_server_is_not_asked_twice_by_a_run_that_was_killed(run, served, monkeypatch, tmp_path):
    """Killed when the second window's answers are there and not yet scored: they come from beside the output."""

    def go(name):
        flags = (*KEEP, *HEAT, "--window", 3, "--all", tmp_path / f"{name}-all.jsonl")
        return run(PROMPTS, *flags, *served, out=name, k=2)

    def answered():
        events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        done = [x for x in events if x["event"] == "answered" and x["max_tokens"] > 1]  # but the probes of a beginning
        return [(*x["prompt"], x["seed"], x["temperature"]) for x in done]

    real, times = Scorer.score, []
    with monkeypatch.context() as patch:

        def broken(self, *args, **kw):
            times.append(self)
            if len(times) == 3:
                raise KeyboardInterrupt
            return real(self, *args, **kw)

        patch.setattr(Scorer, "score", broken)
        assert go("cut")[0] == 130
    assert len(answered()) == 24
    assert go("cut") and "cut.answers: 24 answers are there already" in run.err and "since it continued: " in run.err
    assert len(answered()) == len({*answered()}) == 7 * 2 * 2
    go("whole")
    for end in ("", "-all.jsonl"):
        assert (tmp_path / f"cut{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
