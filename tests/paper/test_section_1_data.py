"""Llama 2, sections 2.1, 2.2 (tokenizer) and 4.1: what the paper says of data and tokenizer, one test for each rule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama2cli import cli
from llama2cli.stages import plan, pretrain, tokenize
from llama2cli.text import tokenizer as tok
from llama2cli.text.tokenizer import Tokenizer

TEXTS = [
    f"In {year} some {n * n} people saw {n} of them, at {n}.{year % 7} km." for n, year in enumerate(range(1800, 2000))
]
Run = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small tokenizer by the project's own rules, on texts full of numbers."""
    return Tokenizer(tok.train(TEXTS, 400))


@pytest.fixture
def llama2(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line of the project in this process: its records and what it said."""

    def run(*args: object) -> tuple[list[dict[str, Any]], str]:
        assert cli.invoke([str(a) for a in args]) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return run


def default(settings: type, name: str) -> Any:
    """The default of a setting; a list's too."""
    field = {f.name: f for f in dataclasses.fields(settings)}[name]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def write(path: Path, documents: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return path


# --- 2.1: the data ----------------------------------------------------------------------------------------------------


def test_2_1_two_trillion_tokens() -> None:
    """The models are trained on 2.0T tokens: what a plan assumes when no number is given."""
    assert plan.parse_count(default(plan.Settings, "tokens"), "--tokens") == 2.0e12


def test_2_1_sites_with_much_personal_information_are_left_out(
    llama2: Run, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Documents of a named source, or with a pattern in them, are left out and counted."""
    model = tmp_path / "tok.model"
    model.write_bytes(tokenizer.proto)
    documents = [{"text": f"page {i}", "source": "phonebook" if i % 5 == 0 else "web"} for i in range(20)]
    documents.append({"text": "write to someone@example.com", "source": "web"})
    data = write(tmp_path / "d.jsonl", documents)
    pattern = r"\w+@\w+\.\w+"
    records, said = llama2(
        "tokenize", "--tokenizer", model, "--exclude-source", "phonebook", "--exclude-pattern", pattern, data
    )
    kept = [d for d in documents[:20] if d["source"] != "phonebook"]
    assert [tokenizer.decode(r["ids"]) for r in records] == [d["text"] for d in kept]
    assert "4" in said and "phonebook" in said and pattern in said


def test_2_1_factual_sources_are_up_sampled(llama2: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A source is sampled by its weight, not by its size, and may be read more than once, which is reported."""
    from llama2cli.text.shards import TokenFolder
    from llama2cli.training import data

    model = tmp_path / "tok.model"
    model.write_bytes(tokenizer.proto)
    folders = {}
    for name, count in (("facts", 30), ("web", 600)):
        texts = [{"text": f"{name} {TEXTS[i % len(TEXTS)]}"} for i in range(count)]
        llama2("tokenize", "--tokenizer", model, "-o", tmp_path / name, write(tmp_path / f"{name}.jsonl", texts))
        folders[name] = TokenFolder.open(tmp_path / name)
    assert folders["web"].n_tokens > 10 * folders["facts"].n_tokens
    mixed = data.sources([data.whole(n, f) for n, f in folders.items()], [3.0, 1.0], context=32)
    rows = 4000
    drawn = [0, 0]
    order = data.draws([s.share for s in mixed], seed=0)
    for _ in range(rows):
        draw, position = next(order)
        drawn[draw.source] += 1
    share = drawn[0] / rows
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / rows) ** 0.5  # four standard errors
    epochs = data.epochs(mixed, position)
    assert epochs["facts"] == pytest.approx(drawn[0] * 32 / folders["facts"].n_tokens, rel=0.1)
    assert epochs["facts"] > 10 > epochs["web"]


# --- 2.2: the tokenizer -----------------------------------------------------------------------------------------------


def test_2_2_vocabulary_is_32k() -> None:
    """The total vocabulary size is 32k tokens."""
    assert default(tokenize.Settings, "vocab_size") == 32000


def test_2_2_tokenizer_is_sentencepiece_bpe(tokenizer: Tokenizer) -> None:
    """Bytepair encoding by SentencePiece: its own library reads the model, and its merges are ranked by score."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_proto=tokenizer.proto)
    assert all(theirs.encode(t) == tokenizer.encode(t) for t in TEXTS)
    merges = [i for i in range(theirs.vocab_size()) if len(theirs.id_to_piece(i)) > 1 and not special(theirs, i)]
    assert len(merges) > 20
    # BPE scores are minus the rank of the merge; a unigram model's would be log-probabilities
    assert [theirs.get_score(i) for i in merges] == [-float(rank) for rank in range(len(merges))]


def special(model: Any, i: int) -> bool:
    """Control, unknown and byte pieces."""
    return model.is_control(i) or model.is_unknown(i) or model.is_byte(i)


def test_2_2_numbers_are_split_into_digits(tokenizer: Tokenizer) -> None:
    """All numbers are split into individual digits: no piece has a digit and more, every digit is a piece."""
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) and len(p) > 1 and not p.startswith("<0x")]
    for text in ("1999", "In 1812 there were 1000000 of them.", "3.14159", "x86_64 v2.0.1"):
        got = [tokenizer.id_to_piece(i) for i in tokenizer.encode(text)]
        assert [p for p in got if p.isdigit()] == [c for c in text if c.isdigit()]


def test_2_2_unknown_characters_become_bytes(tokenizer: Tokenizer) -> None:
    """Bytes decompose unknown UTF-8 characters: a script that was never seen round-trips through its own UTF-8."""
    for text in ("ж", "漢字", "🦙", "a\u0301", "\U0010ffff"):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text
        as_bytes = [tokenizer.id_to_piece(i) for i in ids]
        wanted = [f"<0x{b:02X}>" for b in text.replace("a", "").encode()]
        assert [p for p in as_bytes if p.startswith("<0x")] == wanted


# --- 4.1: what is deliberately not done -------------------------------------------------------------------------------


def test_4_1_nothing_is_filtered_unless_asked(llama2: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No filter by default, so none by toxicity: every document comes out, whatever it says."""
    assert default(tokenize.Settings, "exclude_source") == [] and default(tokenize.Settings, "exclude_pattern") == []
    model = tmp_path / "tok.model"
    model.write_bytes(tokenizer.proto)
    texts = ["You are all stupid, I hate you.", "A kind word.", "kill them", "call 555-0199", "\x00 odd", "ж" * 50]
    data = write(tmp_path / "d.jsonl", [{"text": t} for t in texts])
    records, _ = llama2("tokenize", "--tokenizer", model, data)
    assert [tokenizer.decode(r["ids"]) for r in records] == texts


def test_2_1_the_mixture_is_the_users() -> None:
    """The paper's own list of sources is not public: pretrain has none built in, every source is named by a flag."""
    assert default(pretrain.Settings, "data") == [] and default(pretrain.Settings, "files") == []
