"""`llama2 generate` against transformers, and what it does with every kind of input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli
from llama2cli.errors import DataError
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.load import settle_sampling
from llama2cli.text.records import prompt_id, validate
from llama2cli.text.tokenizer import Tokenizer

CONTEXT = 128
LINES = [f"the quick brown fox number {i} jumps over {i * i} lazy dogs [INST] </s>" for i in range(500)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder that transformers wrote: grouped-query attention, weights large enough for clear greedy answers."""
    folder = tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
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
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=Tokenizer.load(folder).vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Runs the command in this process on records or text; gives the records, or (exit code, stderr) if it failed."""

    def go(source, *args, out: str = "out.jsonl", model: Path = checkpoint):
        file = tmp_path / ("in.txt" if isinstance(source, str) else "in.jsonl")
        content = source if isinstance(source, str) else "".join(json.dumps(r) + "\n" for r in source)
        if not file.exists() or file.read_text() != content:
            file.write_text(content)  # a changed file would be another input to the journal
        capsys.readouterr()
        code = cli.invoke(["generate", "--model", str(model), str(file), "-o", str(tmp_path / out), *map(str, args)])
        go.err = capsys.readouterr().err
        go.bytes = (tmp_path / out).read_bytes() if code == 0 else b""
        return [json.loads(line) for line in go.bytes.splitlines()] if code == 0 else (code, go.err)

    return go


def greedy(folder: Path, ids: list[int], new: int) -> list[int]:
    """The new ids of transformers' own greedy decoding, without EOS."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, len(ids))
    )[0, len(ids) :].tolist()
    return out[: out.index(2)] if 2 in out else out


def prompt(text: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": text}], **extra}


def answers(records: list[dict]) -> list[str]:
    return [r["messages"][-1]["content"] for r in records]


# --- what comes out -----------------------------------------------------------------------------------------------


def test_prompts_and_documents_equal_transformers(run, checkpoint):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    system = {"role": "system", "content": "be quick"}
    turns = [*prompt("the fox")["messages"], {"role": "assistant", "content": "jumps"}, *prompt("and 12?")["messages"]]
    records = [
        prompt("the quick brown"),
        {"messages": [system, *turns], "id": "a"},
        {"text": "lazy dogs and"},
        {"text": ""},
    ]
    sys_user = "<<SYS>>\nbe quick\n<</SYS>>\n\nthe fox"
    first = [1, *sp.encode(f"[INST] {sys_user} [/INST] jumps "), 2, 1, *sp.encode("[INST] and 12? [/INST]")]
    asked = [[1, *sp.encode("[INST] the quick brown [/INST]")], first, [1, *sp.encode("lazy dogs and")], [1]]
    got = run(records, "--temperature", 0, "--max-new-tokens", 30, "--dtype", "fp32")
    want = [greedy(checkpoint, ids, 30) for ids in asked]
    assert answers(got[:2]) == [sp.decode(ids).strip() for ids in want[:2]]
    assert [g["completion"] for g in got[2:]] == [
        sp.decode(asked[i] + want[i])[len(sp.decode(asked[i])) :] for i in (2, 3)
    ]
    for record, result in zip(records, got):
        assert all(result[key] == value for key, value in record.items() if key != "messages")
        assert result.get("messages", [])[:-1] == record.get("messages", [])
    assert "greedy" in run.err and "tokens/s" in run.err


def test_order_fields_and_kinds_do_not_depend_on_window_or_batch(run):
    records = [
        prompt("fox " * (i * 7 % 11 + 1), n=i) if i % 3 else {"text": "dogs " * (i % 5), "n": i} for i in range(40)
    ]
    outputs = []
    for i, flags in enumerate([(), ("--window", 7), ("--batch-size", 3), ("--window", 1, "--batch-size", 1)]):
        got = run(records, "--max-new-tokens", 9, "--seed", 5, *flags, out=f"{i}.jsonl")
        assert [r["n"] for r in got] == list(range(40))
        assert all(("completion" in r) == (r["n"] % 3 == 0) for r in got)
        outputs.append(run.bytes)
    assert len(set(outputs)) == 1
    run(records, "--max-new-tokens", 9, "--seed", 6)
    assert run.bytes not in outputs


def test_lines_of_text_are_prompts(run):
    got = run("the fox\n\n  lazy dogs \n", "--text", "--max-new-tokens", 8)
    assert [m["messages"][0] for m in got] == [
        {"role": "user", "content": "the fox"},
        {"role": "user", "content": "  lazy dogs "},
    ]
    assert answers(got) == answers(run([prompt("the fox"), prompt("lazy dogs")], "--max-new-tokens", 8))


def test_system_prompt_goes_where_none_is(run):
    own = {"messages": [{"role": "system", "content": "mine"}, *prompt("fox")["messages"]]}
    got = run([prompt("fox"), own, {"text": "fox"}], "--system", "be quick", "--max-new-tokens", 4)
    assert got[0]["messages"][0] == {"role": "system", "content": "be quick"}
    assert got[1]["messages"][:2] == own["messages"]
    assert "a document has no system prompt" in run.err


def test_truncation_is_marked_and_counted(run):
    long = "fox " * 90
    got = run([prompt("dogs"), prompt(long, truncated=True)], "--max-new-tokens", 40, "--temperature", 0)
    assert [r["truncated"] for r in got] == [True, True]
    assert "1 truncated at --max-new-tokens 40; 1 truncated at the end of the context" in run.err


def test_an_answer_that_ended_is_not_marked(run, monkeypatch):
    def instant(self, prompts, params, **_):
        return [Result([2], [], [], False) for _ in prompts]

    monkeypatch.setattr(Engine, "generate", instant)
    got = run([prompt("a"), prompt("b", truncated=True)])
    assert answers(got) == ["", ""]
    assert [r.get("truncated") for r in got] == [None, False]
    assert "2 empty" in run.err


def test_a_run_that_was_killed_goes_on(run, monkeypatch):
    records = [prompt(f"fox {i}") for i in range(10)]
    run(records, "--window", 4, "--max-new-tokens", 6, out="whole.jsonl")
    whole, generate, calls = run.bytes, Engine.generate, []

    def once(self, prompts, *args, **kw):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **kw)

    monkeypatch.setattr(Engine, "generate", once)
    code, _ = run(records, "--window", 4, "--max-new-tokens", 6)
    assert code == 130 and calls == [4, 4, 2]
    run(records, "--window", 4, "--max-new-tokens", 6)
    assert run.bytes == whole and calls == [4, 4, 2, 2]


def test_provenance(run, tmp_path, checkpoint):
    run([prompt("fox")], "--max-new-tokens", 2, "--provenance", tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_bytes())["provenance"]
    assert set(record["inputs"]) == {"in.jsonl", checkpoint.name}


# --- tags ---------------------------------------------------------------------------------------------------------


def test_tags_in_what_a_user_typed(run):
    records = [prompt("fox"), prompt("a [/INST] b <<SYS>>")]
    assert run(records)[0] == 1
    assert 'in.jsonl:2: messages[0].content: holds "[/INST]"' in run.err and len(run.err.splitlines()) == 1
    escaped = run(records, "--tags", "escape", "--max-new-tokens", 4)
    assert "2 tags of the chat format escaped" in run.err
    assert escaped[1]["messages"][0]["content"] == records[1]["messages"][0]["content"]
    assert len(run(records, "--tags", "keep", "--max-new-tokens", 4)) == 2
    assert "escaped" not in run.err
    assert run(records[:1], "--system", "<<SYS>>")[0] == 2


def test_tags_in_answers_are_escaped_and_never_fatal(run, monkeypatch, checkpoint):
    ids = Tokenizer.load(checkpoint).encode("[INST] fox [/INST]")
    monkeypatch.setattr(
        Engine, "generate", lambda self, prompts, params, **_: [Result([*ids, 2], [], [], False) for _ in prompts]
    )
    once = run([prompt("a"), {"text": "a"}])
    assert answers(once[:1]) == ["[\\INST] fox [\\/INST]"]
    assert once[1]["completion"].strip() == "[INST] fox [/INST]"  # no dialogue, no turns
    assert "2 tags of the chat format escaped" in run.err
    kept = run([prompt("a")], "--tags", "keep")
    assert answers(kept) == ["[INST] fox [/INST]"]
    followed = {"messages": [*kept[0]["messages"], {"role": "user", "content": "and?"}]}
    assert len(run([followed])) == 1
    assert "4 tags of the chat format escaped" in run.err  # two in the history, two in the new answer


# --- what cannot be answered --------------------------------------------------------------------------------------


def test_prompts_that_fill_the_context(run):
    records = [
        prompt("fox", n=0),
        prompt("fox " * CONTEXT, n=1),
        {"text": "fox " * CONTEXT, "n": 2},
        prompt("dog", n=3),
    ]
    code, err = run(records)
    assert code == 1 and "in.jsonl:2: the prompt has" in err and "--skip-long" in err and len(err.splitlines()) == 1
    got = run(records, "--skip-long", "--max-new-tokens", 3)
    assert [r["n"] for r in got] == [0, 3]
    assert "2 prompts left out" in run.err
    assert run(records[1:2], "--skip-long") == []


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (
            {"messages": [*prompt("a")["messages"], {"role": "assistant", "content": "b"}]},
            "messages[1].role: the dialogue",
        ),
        ({"prompt": "a"}, 'expected a prompt, {"messages": [...]}, or a document'),
        ({"messages": []}, "messages: expected at least one message"),
        ({"text": 3}, "text: expected a string"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: expected one of system, user, assistant"),
    ],
)
def test_malformed_requests_are_one_line(run, record, complaint):
    code, err = run([prompt("a"), record])
    assert code == 1 and len(err.splitlines()) == 1
    assert f"in.jsonl:2: {complaint}" in err


def test_no_requests_at_all(run):
    code, err = run([])
    assert code == 1 and "holds no records" in err


def test_a_model_that_is_not_there_leaves_an_earlier_output_alone(run, tmp_path):
    (tmp_path / "out.jsonl").write_text("earlier")
    code, err = run([prompt("a")], model=tmp_path / "nothing")
    assert code == 1 and len(err.splitlines()) == 1
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


# --- how it is drawn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "want", "warned"),
    [
        (None, (0.6, 0.9), ""),
        ({}, (0.6, 0.9), ""),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.5, "top_k": 50}, (0.8, 0.5), ""),
        ({"do_sample": False}, (0.0, 0.9), ""),
        ({"temperature": 1.1}, (1.1, 0.9), ""),
        ({"repetition_penalty": 1.2, "top_k": 7}, (0.6, 0.9), "repetition_penalty 1.2 is not applied"),
    ],
)
def test_defaults_come_from_the_folder(tmp_path, capsys, content, want, warned):
    (tmp_path / "config.json").write_text("{}")
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert settle_sampling(str(tmp_path), None, None) == want
    err = capsys.readouterr().err
    assert (warned in err) and (warned or not err)
    assert settle_sampling(str(tmp_path), 0.3, 0.2) == (0.3, 0.2)


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_p": 1.5}, {"temperature": -1}, {"temperature": True}])
def test_defaults_that_are_wrong_are_named(tmp_path, bad):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps(bad))
    with pytest.raises(DataError) as e:
        settle_sampling(str(tmp_path), None, None)
    assert next(iter(bad)) in str(e.value) and "generation_config.json" in str(e.value)


# --- as a filter --------------------------------------------------------------------------------------------------


def test_as_a_pipe_whose_reader_leaves(checkpoint):
    """stdin to stdout in a process of its own; the reader takes one line and goes."""
    command = [sys.executable, "-m", "llama2cli", "generate", "--text", "--model", str(checkpoint)]
    options = ["--max-new-tokens", "3", "--window", "1", "--quiet"]
    process = subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdin.write("fox\n" * 3000)
    process.stdin.close()
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    assert first["messages"][0]["content"] == "fox" and len(first["messages"]) == 2


# --- samples and pairs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory) -> Path:
    """A second model with the same tokenizer and other weights."""
    folder = tmp_path_factory.mktemp("other") / "step-000040"
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(8)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    return folder


def test_samples(run, checkpoint):
    records = [prompt("the fox", n=0), prompt("12 lazy dogs", n=1)]
    got = run(records, "-k", 4, "--max-new-tokens", 9, "--seed", 5, "--temperature", 1.2)
    assert [(r["n"], r["sample"]) for r in got] == [(n, i) for n in (0, 1) for i in range(4)]
    for record in got:
        assert validate("sample", record) == record
        assert record["id"] == prompt_id(record["messages"][:-1])
        assert (record["policy"], record["temperature"], record["seed"]) == (checkpoint.name, 1.2, 5)
        assert record["n_tokens"] == 9 if record["truncated"] else 1 <= record["n_tokens"] <= 9
    assert len(set(answers(got))) > 6
    assert "8 answers" in run.err and "temperature 1.2" in run.err
    whole, count = run.bytes, len(got)
    run(
        records,
        "--samples",
        4,
        "--max-new-tokens",
        9,
        "--seed",
        5,
        "--temperature",
        1.2,
        "--batch-size",
        3,
        "--window",
        1,
    )
    assert run.bytes == whole, "neither rows nor windows matter"
    more = run(records, "-k", 6, "--max-new-tokens", 9, "--seed", 5, "--temperature", 1.2)
    assert [r for r in more if r["sample"] < 4] == got and len(more) == count + 4
    # the first sample is what generate writes without -k
    plain = run(records, "--max-new-tokens", 9, "--seed", 5, "--temperature", 1.2)
    assert answers(plain) == answers(got[::4])
    [one] = run("the fox", "--text", "-k", 1, "--max-new-tokens", 9, "--temperature", 0)
    assert one["sample"] == 0 and one["temperature"] == 0


def test_samples_are_of_prompts(run):
    code, err = run([prompt("a"), {"text": "b"}], "-k", 2)
    assert code == 1 and 'in.jsonl:2: the field "messages" is missing' in err
    code, err = run([prompt("a")], "-k", 2, "--temperature", 0)
    assert code == 2 and "greedy answers are all the same" in err and len(err.splitlines()) == 1
    code, err = run([prompt("a")], "-k", 2, "--pair-temperature", 1)
    assert code == 2 and "either samples or a pair" in err
    assert run([prompt("a")], "-k", 0)[0] == 2


def test_pairs_of_two_models(run, checkpoint, other):
    records = [prompt(f"the fox {i}", n=i) for i in range(12)]
    fixed = ["--max-new-tokens", 9, "--seed", 3, "--temperature", 0]
    got = run(records, *fixed, "--pair", other)
    both = {"step-000040"} | {checkpoint.name}
    each = {checkpoint.name: answers(run(records, *fixed)), "step-000040": answers(run(records, *fixed, model=other))}
    assert each[checkpoint.name] != each["step-000040"]
    for i, pair in enumerate(got):
        assert validate("pair", pair) == pair
        assert (pair["prompt"], pair["n"]) == (records[i]["messages"], i)
        policies = [r["policy"].split("/")[-1] for r in pair["responses"]]
        assert set(policies) == both
        for name, response in zip(policies, pair["responses"]):
            assert response["message"] == {"role": "assistant", "content": each[name][i]}
    assert 0 < sum(checkpoint.name in pair["responses"][0]["policy"] for pair in got) < 12
    assert not [r["policy"] for pair in got for r in pair["responses"] if Path(r["policy"]).is_absolute()]


def test_pairs_of_two_temperatures(run, monkeypatch):
    from llama2cli.sampling import load

    loaded, original = [], load.load_engine
    monkeypatch.setattr(load, "load_engine", lambda path, **kw: (loaded.append(path), original(path, **kw))[1])
    records = [prompt(f"fox {i}") for i in range(8)]
    got = run(records, "--max-new-tokens", 9, "--temperature", 0.8, "--pair-temperature", 1.3)
    assert len(loaded) == 1, "one model is loaded once"
    assert all({r["temperature"] for r in pair["responses"]} == {0.8, 1.3} for pair in got)
    assert len({pair["responses"][0]["temperature"] for pair in got}) == 2
    assert "temperature 0.8, top-p 0.9 and temperature 1.3" in run.err and "16 answers" in run.err
    samples = run(records, "-k", 2, "--max-new-tokens", 9, "--temperature", 0.8)
    cool = [r["message"]["content"] for pair in got for r in pair["responses"] if r["temperature"] == 0.8]
    assert cool == answers(samples[::2])


def test_two_samples_of_one_model_are_a_pair(run, checkpoint):
    got = run([prompt(f"fox {i}") for i in range(8)], "--max-new-tokens", 9, "--temperature", 1.3, "--pair", checkpoint)
    different = [pair for pair in got if pair["responses"][0]["message"] != pair["responses"][1]["message"]]
    assert len(different) > 4 and not any("identical" in pair for pair in different)
    code, err = run([prompt("a")], "--temperature", 0, "--pair", checkpoint)
    assert code == 2 and "two greedy answers of one model are the same" in err


@pytest.mark.parametrize("flags", [("-k", 3), ("--pair-temperature", 1.5)])
def test_samples_and_pairs_of_a_run_that_was_killed(run, monkeypatch, flags):
    records = [prompt(f"fox {i}") for i in range(10)]
    fixed = ["--window", 4, "--max-new-tokens", 6, *flags]
    run(records, *fixed, out="whole.jsonl")
    whole, generate, calls = run.bytes, Engine.generate, []

    def dies(self, prompts, *args, **kw):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **kw)

    monkeypatch.setattr(Engine, "generate", dies)
    if flags[0] == "-k":
        calls.append(0)
    assert run(records, *fixed)[0] == 130
    run(records, *fixed)
    assert run.bytes == whole
    if flags[0] == "-k":
        assert calls[1:] == [12, 12, 6, 6]
    else:
        assert calls == [4, 4, 4, 4, 4, 4, 2, 2]


def test_a_killed_run_is_not_continued_with_another_second_model(run, monkeypatch, other, checkpoint):
    records = [prompt(f"fox {i}") for i in range(6)]
    fixed = ["--window", 2, "--max-new-tokens", 4]
    generate, calls = Engine.generate, []

    def dies(self, prompts, *args, **kw):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **kw)

    monkeypatch.setattr(Engine, "generate", dies)
    assert run(records, *fixed, "--pair", other)[0] == 130
    assert len(run(records, *fixed, "--pair", checkpoint)) == 6
    assert "of other settings or inputs; starting over" in run.err
