"""`llama2 score` against transformers' sequence classification, the piecewise rule by hand, and every kind of input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli
from llama2cli.sampling.scoring import Scorer

CONTEXT = 128
LINES = [f"the quick brown fox number {i} jumps over {i * i} lazy dogs [INST] </s>" for i in range(500)]


def reward_model(folder: Path, seed: int, context: int = CONTEXT, vocab: int = 400, lines: list[str] = LINES) -> Path:
    """A folder that transformers wrote, with weights large enough for scores on both sides of the threshold."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=context,
        num_labels=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config)
    for p in model.parameters():
        p.data.mul_(3)
    model.score.weight.data.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """help and safe share a tokenizer; other has one of its own and a shorter context."""
    base = tmp_path_factory.mktemp("models")
    other = reward_model(base / "other", 9, context=96, vocab=330, lines=["brown dogs 12 [INST] lazily"] * 99)
    return {"help": reward_model(base / "help", 7), "safe": reward_model(base / "safe", 8), "other": other}


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Runs the command in this process on records; gives the records, or (exit code, stderr) if it failed."""
    both = ["--rm-help", str(folders["help"]), "--rm-safe", str(folders["safe"])]

    def go(source, *args, out: str = "out.jsonl", models: list[str] = both):
        file = tmp_path / "in.jsonl"
        content = "".join(json.dumps(r) + "\n" for r in source)
        if not file.exists() or file.read_text() != content:
            file.write_text(content)  # a changed file would be another input to the journal
        capsys.readouterr()
        code = cli.invoke(["score", str(file), *map(str, models), "-o", str(tmp_path / out), *map(str, args)])
        go.err = capsys.readouterr().err
        go.bytes = (tmp_path / out).read_bytes() if code == 0 else b""
        return [json.loads(line) for line in go.bytes.splitlines()] if code == 0 else (code, go.err)

    return go


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def dialogue(*texts: str, **extra) -> dict:
    """A dialogue of texts in turn, the user's first."""
    return {"messages": [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)], **extra}


def ids_of(folder: Path, record: dict) -> list[int]:
    """What a reward model reads, written out with SentencePiece."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [m["content"].strip() for m in record["messages"]]
    if record["messages"][0]["role"] == "system":
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
    ids: list[int] = []
    for i in range(0, len(texts), 2):
        last = record.get("truncated") and i + 2 == len(texts)
        end = "" if last else " "
        ids += [1, *sp.encode(f"[INST] {texts[i]} [/INST] {texts[i + 1]}{end}"), *([] if last else [2])]
    return ids


def theirs(folder: Path, rows: list[list[int]]) -> list[float]:
    """transformers' scores of one padded batch."""
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(map(len, rows))
    ids = torch.tensor([r + [model.config.pad_token_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()


RECORDS = [
    dialogue("the fox", "jumps", id="a", unsafe=True),
    {"messages": [{"role": "system", "content": "be quick"}, *dialogue("dogs", "lazy", "and 12?", "over")["messages"]]},
    *(dialogue("the quick brown fox number", f"jumps {'over dogs ' * k}{k}", k=k, unsafe=False) for k in range(8)),
    dialogue("fox", "the quick bro", truncated=True, unsafe=True),
    dialogue("fox", "the quick brown", truncated=False),
    dialogue("number 4", ""),
    *(dialogue(f"fox {i}", "dogs " * (i % 7)) for i in range(20)),
]


# --- what comes out -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_transformers(run, folders):
    got = run(RECORDS, "--logits", "--dtype", "fp32")
    for name in ("help", "safe"):
        want = theirs(folders[name], [ids_of(folders[name], r) for r in RECORDS])
        assert [r[f"{name}_logit"] for r in got] == pytest.approx(want, abs=2e-4)
        assert [r[name] for r in got] == pytest.approx(torch.sigmoid(torch.tensor(want)).tolist(), abs=1e-4)
    for record, result in zip(RECORDS, got):
        assert {k: v for k, v in result.items() if k in record} == record
        assert [k for k in result if k not in record] == ["help", "safe", "help_logit", "safe_logit", "reward"]
    assert f"{len(RECORDS)} dialogues" in run.err and "tokens/s" in run.err and "1 truncated" in run.err
    # the answers to one prompt differ: they are not read where the prompt ends
    assert len({r["help"] for r in got}) == len(got)


def test_reward_is_the_rule_by_hand(run):
    got = run(RECORDS, "--logits")
    cases = set()
    for r in got:
        low, tagged = r["safe"] < 0.15, r.get("unsafe", False)
        cases.add((low, tagged))
        assert r["reward"] == (r["safe_logit"] if low or tagged else r["help_logit"])
    assert {(True, False), (False, False), (False, True)} <= cases
    from_safety = sum(r["reward"] == r["safe_logit"] for r in got)
    assert f"the reward of {from_safety} is the safety model's" in run.err


def test_the_threshold_is_strict_and_on_logits(run, monkeypatch):
    """Scores as they could be: at logit(0.15) itself, just below, and where a sigmoid is 1 in every digit."""
    at = math.log(3 / 17)
    safe = [at, math.nextafter(at, -9), 50.0, 60.0]
    values = iter([[5.0, 6.0, 40.0, -800.0], safe])
    monkeypatch.setattr(Scorer, "score", lambda self, sequences, **_: next(values))
    got = run([dialogue("a", "b")] * 3 + [dialogue("a", "b", unsafe=True)])
    assert [r["reward"] for r in got] == [5.0, safe[1], 40.0, 60.0]
    assert got[0]["safe"] == pytest.approx(0.15) and got[2]["help"] == 1.0 and got[3]["help"] == 0.0
    assert all(set(r) <= {"messages", "unsafe", "help", "safe", "reward"} for r in got)


@pytest.mark.parametrize("name", ["help", "safe"])
def test_one_model_gives_its_field_alone(run, folders, name):
    got = run(RECORDS[:2], models=[f"--rm-{name}", folders[name]])
    assert [set(g) - set(r) for g, r in zip(got, RECORDS)] == [{name}] * 2


def test_classifiers_get_fields_of_their_own(run, folders):
    models = ["--as", f"refusal={folders['help']}", "--as", f"rude={folders['safe']}"]
    got = run(RECORDS[:3], "--logits", models=models)
    want = run(RECORDS[:3], "--logits", out="both.jsonl")
    assert [g["refusal_logit"] for g in got] == [w["help_logit"] for w in want]
    assert [g["rude"] for g in got] == [w["safe"] for w in want]
    assert "reward" not in got[0]
    run(RECORDS[:3], models=models, out="told.jsonl")
    mean = sum(g["refusal"] for g in got) / 3
    assert f"means: refusal {mean:.3f}, rude" in run.err


def test_each_model_reads_by_its_own_tokenizer(run, folders):
    models = ["--rm-help", folders["help"], "--as", f"rude={folders['other']}"]
    got = run(RECORDS[:6], "--logits", models=models)
    for name, folder in (("help", folders["help"]), ("rude", folders["other"])):
        want = theirs(folder, [ids_of(folder, r) for r in RECORDS[:6]])
        assert [r[f"{name}_logit"] for r in got] == pytest.approx(want, abs=2e-4)


def test_a_model_that_is_named_twice_is_loaded_once(run, folders, monkeypatch):
    loaded = []
    load = Scorer.load.__func__
    monkeypatch.setattr(
        Scorer, "load", classmethod(lambda cls, path, **kw: loaded.append(path) or load(cls, path, **kw))
    )
    got = run(RECORDS[:3], models=["--rm-help", folders["help"], "--rm-safe", f"{folders['help']}/"])
    assert len(loaded) == 1 and all(r["help"] == r["safe"] for r in got)


def test_the_offset_of_a_folder_counts(run, folders, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folders["safe"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"score_offset": 1.25}))
    models = ["--rm-safe", folders["safe"], "--as", f"moved={moved}"]
    for r in run(RECORDS[:5], "--logits", models=models):
        assert r["moved_logit"] == pytest.approx(r["safe_logit"] + 1.25, abs=1e-6)


def test_scores_of_an_earlier_run_are_replaced(run, folders):
    """Not kept beside new ones that they contradict; fields of other models stay."""
    first = run(RECORDS[:3], "--logits")
    stale = [{**r, "help": 0.5, "rude": 0.25} for r in first]
    again = run(stale, models=["--rm-help", folders["help"]])
    assert [r["help"] for r in again] == [r["help"] for r in first]
    for r in again:
        assert "reward" not in r and "help_logit" not in r and "safe_logit" in r and r["rude"] == 0.25
    assert "3 had scores already, which were replaced" in run.err


def test_order_and_values_do_not_depend_on_window_or_batch(run):
    records = [dialogue(f"fox {i % 5}", "dogs " * (i * 7 % 11), n=i) for i in range(40)]
    want = run(records, "--logits")
    assert [r["n"] for r in want] == list(range(40))
    for i, flags in enumerate([("--window", 7), ("--batch-tokens", 1), ("--window", 1, "--batch-tokens", 50)]):
        got = run(records, "--logits", *flags, out=f"{i}.jsonl")
        assert [r["n"] for r in got] == list(range(40))
        assert [r["help_logit"] for r in got] == pytest.approx([r["help_logit"] for r in want], abs=1e-4)
    first = run.bytes
    run(records, "--logits", "--window", 1, "--batch-tokens", 50, out="again.jsonl")
    assert run.bytes == first  # to the byte


def test_a_run_that_was_killed_goes_on(run, monkeypatch):
    run(RECORDS, "--window", 5, out="whole.jsonl")
    whole, score, calls = run.bytes, Scorer.score, []

    def once(self, sequences, **kw):
        calls.append(len(sequences))
        if len(calls) == 6:  # the safety model, in the third window
            raise KeyboardInterrupt
        return score(self, sequences, **kw)

    monkeypatch.setattr(Scorer, "score", once)
    code, _ = run(RECORDS, "--window", 5)
    assert code == 130 and len(calls) == 6
    run(RECORDS, "--window", 5)
    assert run.bytes == whole and "continuing after 10 inputs" in run.err
    assert len(calls) == 6 + 2 * math.ceil((len(RECORDS) - 10) / 5)


def test_another_model_is_not_gone_on_with(run, folders, tmp_path, monkeypatch):
    """What a killed command left of one model is not continued with another in its place."""
    score, calls = Scorer.score, []

    def once(self, sequences, **kw):
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, sequences, **kw)

    link = tmp_path / "model"
    link.symlink_to(folders["help"])
    monkeypatch.setattr(Scorer, "score", once)
    assert run(RECORDS, "--window", 5, models=["--rm-help", link])[0] == 130
    link.unlink()
    link.symlink_to(folders["safe"])
    got = run(RECORDS, "--window", 5, models=["--rm-help", link])
    assert "other settings or inputs; starting over" in run.err
    assert len(got) == len(RECORDS)


def test_provenance(run, tmp_path, folders):
    run(RECORDS[:1], "--provenance", tmp_path / "p.json", "--as", f"rude={folders['other']}")
    record = json.loads((tmp_path / "p.json").read_bytes())
    assert set(record["provenance"]["inputs"]) == {"in.jsonl", "help", "safe", "other"}
    assert str(tmp_path.parent) not in json.dumps(record["settings"])


# --- tags and lengths ---------------------------------------------------------------------------------------------


def test_tags_in_messages(run, folders):
    records = [dialogue("fox", "dogs"), dialogue("a [/INST] b <<SYS>>", "ok [INST]")]
    escaped = run(records, "--logits")
    assert "3 tags of the chat format escaped" in run.err
    assert escaped[1]["messages"] == records[1]["messages"]
    safe = dialogue("a [\\/INST] b <\\<SYS>>", "ok [\\INST]")
    assert escaped[1]["help_logit"] == pytest.approx(
        theirs(folders["help"], [ids_of(folders["help"], safe)])[0], abs=2e-4
    )
    code, err = run(records, "--tags", "refuse")
    assert code == 1 and 'in.jsonl:2: messages[0].content: holds "[/INST]"' in err and len(err.splitlines()) == 1
    kept = run(records, "--tags", "keep", "--logits")
    assert kept[1]["help_logit"] == pytest.approx(
        theirs(folders["help"], [ids_of(folders["help"], records[1])])[0], abs=2e-4
    )
    assert "escaped" not in run.err


def test_control_texts_end_nothing(run, folders):
    """transformers' tokenizer would read an end of text inside the answer; here a score is of the whole answer."""
    records = [dialogue("fox", "dogs</s>"), dialogue("fox</s>", "dogs"), dialogue("fox", "dogs")]
    got = run(records, "--logits")
    assert [r["help_logit"] for r in got] == pytest.approx(
        theirs(folders["help"], [ids_of(folders["help"], r) for r in records]), abs=2e-4
    )
    assert len({r["help_logit"] for r in got}) == 3


def test_dialogues_longer_than_the_context(run, folders):
    long = dialogue("fox", "dogs " * CONTEXT, n=1)
    records = [dialogue("fox", "dogs", n=0), long, dialogue("dogs", "fox", n=2)]
    code, err = run(records)
    assert code == 1 and len(err.splitlines()) == 1
    n = len(ids_of(folders["help"], long))
    assert f"in.jsonl:2: the dialogue has {n} tokens, the context of the model is {CONTEXT}; --long cut" in err
    assert [r["n"] for r in run(records, "--long", "skip")] == [0, 2]
    assert "1 left out: longer than the context" in run.err
    got = run(records, "--long", "cut", "--logits")
    assert [r["n"] for r in got] == [0, 1, 2] and "1 cut to the context" in run.err
    want = theirs(folders["help"], [ids_of(folders["help"], long)[:CONTEXT]])
    assert got[1]["help_logit"] == pytest.approx(want[0], abs=2e-4)
    assert got[1]["messages"] == long["messages"]
    assert run([long], "--long", "skip", out="none.jsonl") == []


def test_a_prompt_that_leaves_nothing_of_the_answer(run):
    code, err = run([dialogue("fox " * CONTEXT, "dogs")], "--long", "cut")
    assert code == 1 and "in.jsonl:1: the prompt alone has" in err and "--long skip" in err


def test_the_shortest_context_counts(run, folders):
    models = ["--rm-help", folders["help"], "--as", f"rude={folders['other']}"]
    record = dialogue("fox", "dogs 1234567890 " * 7)
    assert len(ids_of(folders["other"], record)) > 96 and len(ids_of(folders["help"], record)) < CONTEXT
    code, err = run([record], models=models)
    assert code == 1 and "the context of the model is 96" in err
    assert len(run([record])) == 1


# --- what cannot be scored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [user("a")]}, "messages[0].role: expected the last message to be the assistant's"),
        (dialogue("a", "b", "c"), "messages[2].role: expected the last message to be the assistant's"),
        ({"messages": []}, "messages: expected at least one message"),
        ({"messages": [user("a"), {"role": "bot", "content": "x"}]}, "messages[1].role: expected one of system, user"),
        (dialogue("a", "b", unsafe="yes"), "unsafe: expected true or false, got a string"),
        (dialogue("a", "b", truncated=1), "truncated: expected true or false, got an integer"),
        ({"prompt": "a"}, 'the field "messages" is missing'),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "messages[1].content"),
    ],
)
def test_malformed_dialogues_are_one_line(run, record, complaint):
    code, err = run([dialogue("a", "b"), record])
    assert code == 1 and len(err.splitlines()) == 1
    assert f"in.jsonl:2: {complaint}" in err


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ([], "there is no model to score with: give --rm-help"),
        (["--as", "refusal"], '--as: expected NAME=MODEL, as refusal=run, got "refusal"'),
        (["--as", "refusal="], "--as: expected NAME=MODEL"),
        (["--as", "Re fusal=x"], "--as: expected NAME=MODEL"),
        (["--as", "messages=x"], '--as: "messages" is a field of records already'),
        (["--as", "help=x"], '--as: "help" is a field of records already'),
        (["--as", "a_logit=x"], '--as: "a_logit" is a field of records already'),
        (["--as", "a=x", "--as", "a=y"], '--as: "a" is given twice'),
    ],
)
def test_misuse(run, models, complaint):
    code, err = run(RECORDS[:1], models=models)
    assert code == 2 and len(err.splitlines()) == 1 and complaint in err


def test_a_model_that_cannot_be_read_leaves_an_earlier_output_alone(run, tmp_path, folders):
    (tmp_path / "out.jsonl").write_text("earlier")
    code, err = run(RECORDS[:1], models=["--rm-help", tmp_path / "nothing"])
    assert code == 1 and len(err.splitlines()) == 1 and "nothing" in err
    config = transformers.LlamaConfig.from_pretrained(folders["help"])
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer.model").write_bytes((folders["help"] / "tokenizer.model").read_bytes())
    code, err = run(RECORDS[:1], models=["--rm-help", tmp_path / "lm"])
    assert code == 1 and "this is a language model, a reward model is wanted" in err.splitlines()[-1]
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


def test_no_dialogues_at_all(run):
    code, err = run([])
    assert code == 1 and "holds no records" in err


# --- as a filter --------------------------------------------------------------------------------------------------


def test_as_a_pipe_whose_reader_leaves(folders):
    """stdin to stdout in a process of its own; the reader takes one line and goes."""
    command = [
        sys.executable,
        "-m",
        "llama2cli",
        "score",
        "--rm-help",
        str(folders["help"]),
        "--window",
        "1",
        "--quiet",
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdin.write((json.dumps(dialogue("fox", "dogs")) + "\n") * 500)  # less than a pipe holds
    process.stdin.close()
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    assert set(first) == {"messages", "help"}
