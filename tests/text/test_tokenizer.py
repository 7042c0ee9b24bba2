"""The tokenizer against SentencePiece itself, and what the paper asks of it (Llama 2, section 2.2)."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama2cli.errors import DataError, Misuse
from llama2cli.text import segments, sentencepiece_proto, tokenizer
from llama2cli.text.segments import MARK, blocks, cuttable, unpack
from llama2cli.text.tokenizer import Tokenizer, count_words, fit, forget_rare, train

# What breaks tokenizers: runs of spaces, every kind of line end, control characters, other scripts, joined emoji.
AWKWARD = ["  ", "   ", " ", "\n", "\r\n", "\t", "\0", "\1", "\x1f", "\u0085", "\u2028", "\u00a0", "\u3000", "\ufeff"]
AWKWARD += [
    "é",
    "e\u0301",
    "漢字",
    "かな",
    "한글",
    "🙂",
    "👩\u200d👩\u200d👧",
    "\U0010ffff",
    "\ufffe",
    "\u2585",
    "²",
    "٣",
    "007",
]
AWKWARD += ["</s>", "<s>", "<unk>", "<0x41>", "[INST]", "the", " Alice", ", and", "don't", "\n\n    return x", MARK]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=24).map("".join)


def read(path: Path) -> str:
    """A gzipped text with its line ends."""
    return gzip.decompress(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def ours(excerpts: Path) -> Tokenizer:
    """A tokenizer of 2,048 pieces, trained on Alice."""
    return Tokenizer(train([read(excerpts / "alice.txt.gz")], 2048))


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer) -> SentencePieceProcessor:
    """SentencePiece with the same model."""
    return SentencePieceProcessor(model_proto=ours.proto)


def sentencepiece_model(lines: list[str], **options: Any) -> bytes:
    """A model by SentencePiece's own trainer, by default with the paper's rules."""
    rules: dict[str, Any] = dict(model_type="bpe", vocab_size=400, split_digits=True, byte_fallback=True)
    rules |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    rules |= dict(allow_whitespace_only_pieces=True, hard_vocab_limit=False)
    out = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **(rules | options))
    return out.getvalue()


LINES = [f"the quick brown fox {i} jumps over {i * i} lazy dogs" for i in range(300)]


# --- encoding -----------------------------------------------------------------------------------------------------


@given(texts)
@settings(max_examples=400, deadline=None)
def test_ids_are_sentencepieces(ours: Tokenizer, theirs: SentencePieceProcessor, text: str) -> None:
    """The same ids as SentencePiece, through the cache."""
    assert ours.exact
    assert ours.encode(text) == theirs.encode(text)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_round_trip(ours: Tokenizer, text: str) -> None:
    """Byte-identical, except that U+2581 becomes a space."""
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace(MARK, " ")
    assert not {0, 1, 2} & set(ids), "no text makes a control id"
    if text:
        assert b"".join(map(ours.id_to_bytes, ids)) == (" " + text.replace(MARK, " ")).encode()


@given(st.lists(texts, max_size=6), st.integers(2, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_small_limits_change_nothing(
    ours: Tokenizer, theirs: SentencePieceProcessor, batch: list[str], size: int, data: st.DataObject
) -> None:
    """However small the blocks, the held-back parts and the cache are, the ids stay, and the cache stays small."""
    most = data.draw(st.integers(1, 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "blocks", lambda text: blocks(text, size))
        patch.setattr(segments, "PENDING_CHARS", data.draw(st.integers(1, 100)))
        patch.setattr(segments, "PENDING_SEGMENTS", data.draw(st.integers(1, 9)))
        patch.setattr(segments, "MAX_ENTRIES", most)
        fresh = Tokenizer(ours.proto)
        assert [unpack(p, "H") for p in fresh.pack(batch)] == [theirs.encode(t) for t in batch]
        patch.setattr(segments, "MAX_ENTRIES", 0)
        assert unpack(fresh.pack(["one more"])[0], "H") == theirs.encode("one more")
        assert fresh._cache is not None and len(fresh._cache.words) <= 2, "a full cache begins again"


def test_a_full_cache_begins_again_in_the_middle_of_a_text(
    ours: Tokenizer, theirs: SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text whose words are partly in the cache when it is emptied keeps all of them."""
    monkeypatch.setattr(segments, "MAX_ENTRIES", 3)
    batch = ["one two three", "one four two", "five one four three"]
    fresh = Tokenizer(ours.proto)
    assert [fresh.encode(t) for t in batch] == theirs.encode(batch)


@given(texts, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_blocks_join_and_begin_where_they_may(text: str, size: int) -> None:
    """Blocks join to the text; no run of spaces is cut, and none but the first begins inside a word."""
    parts = list(blocks(text, size))
    assert "".join(parts) == text
    for before, part in pairwise(parts):
        assert part[0] == "\n" or (part[0] == " " and not before.endswith(" "))


def test_blocks_are_about_their_size() -> None:
    """A long text is not one block, with newlines or without."""
    assert max(map(len, blocks("word " * 5000, 1000))) <= 1005
    assert max(map(len, blocks("word\n" * 5000, 1000))) <= 1005
    assert len(list(blocks("x" * 5000, 1000))) == 1


def test_vocabularies_of_others(excerpts: Path) -> None:
    """Models of SentencePiece's own trainer, pieces that forbid cutting too: the ids stay SentencePiece's."""
    text = read(excerpts / "alice.txt.gz")[:30_000] + "  x   y\n\n\tz <sep> a<sep>b ﬁ ①"
    lines = text.split("\n")
    kinds: list[tuple[bool, dict[str, Any]]] = [
        (True, {}),
        (True, {"split_digits": False, "character_coverage": 1.0}),
        (False, {"split_by_whitespace": False, "vocab_size": 1000}),
        (False, {"user_defined_symbols": ["<sep>"]}),
        (False, {"normalization_rule_name": "nmt_nfkc"}),
        (False, {"add_dummy_prefix": False}),
        (False, {"remove_extra_whitespaces": True}),
        (False, {"treat_whitespace_as_suffix": True}),
    ]
    for exact, options in kinds:
        proto = sentencepiece_model(lines, **options)
        mine, sp = Tokenizer(proto), SentencePieceProcessor(model_proto=proto)
        assert mine.exact == exact, options
        for part in [text, *lines[-6:], "", " ", "  lead"]:
            assert mine.encode(part) == sp.encode(part), options


def test_a_newline_piece_forbids_cutting() -> None:
    """A model whose trainer was given whole texts may have pieces with newlines."""
    proto = sentencepiece_model(["ab\ncd\nab\ncd"] * 50)
    pieces = [p.text for p in sentencepiece_proto.read(proto).pieces]
    assert any("\n" in p for p in pieces) and not any(MARK in p[1:] for p in pieces), "the premise"
    assert not cuttable(sentencepiece_proto.read(proto))
    assert Tokenizer(proto).encode("a\nb\nc") == SentencePieceProcessor(model_proto=proto).encode("a\nb\nc")


def test_pieces_and_ids(ours: Tokenizer, theirs: SentencePieceProcessor) -> None:
    """The vocabulary as SentencePiece has it."""
    assert ours.vocab_size == theirs.vocab_size() == 2048
    assert [ours.id_to_piece(i) for i in range(2048)] == [theirs.id_to_piece(i) for i in range(2048)]
    assert all(ours.piece_to_id(ours.id_to_piece(i)) == i for i in range(2048))
    assert ours.piece_to_id("no such piece") == ours.unk_id
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, None)
    assert [p.score for p in ours.spec.pieces] == [theirs.get_score(i) for i in range(2048)]


def test_what_cannot_be_encoded_or_decoded(ours: Tokenizer) -> None:
    """Half a surrogate pair and ids outside the vocabulary are named; bytes that are no UTF-8 are shown as such."""
    with pytest.raises(DataError, match="surrogate"):
        ours.encode("a \ud800 b")
    for wrong in (2048, -1):
        with pytest.raises(DataError, match=f"id {wrong} is outside the vocabulary of 2048"):
            ours.decode([5, wrong])
    assert ours.decode([ours.piece_to_id("<0xE6>")]) == "\ufffd"
    assert ours.decode([1, *ours.encode("a b"), 2]) == "a b"


def shared_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file of the public data as a text, as it stands."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        yield path.name, (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def test_equal_to_sentencepiece_on_samples(ours: Tokenizer, theirs: SentencePieceProcessor, shared_data: Path) -> None:
    """Slices of every file of the public data; the slow test takes them whole."""
    draw = random.Random(0)
    for name, text in shared_texts(shared_data):
        starts = [draw.randrange(max(1, len(text) - 1500)) for _ in range(6)]
        parts = [text[at : at + draw.randrange(1, 1500)] for at in starts]
        assert [unpack(p, "H") for p in ours.pack(parts)] == theirs.encode(parts), name


@pytest.mark.slow
def test_equal_to_sentencepiece_on_all_data(shared_data: Path) -> None:
    """All of the public data, file by file and line by line, with 32,000 pieces trained on it."""
    proto = train((text for _, text in shared_texts(shared_data)), 32_000)
    mine, sp = Tokenizer(proto), SentencePieceProcessor(model_proto=proto)
    for name, text in shared_texts(shared_data):
        lines = text.split("\n")
        assert [unpack(p, "H") for p in mine.pack(lines)] == sp.encode(lines), name
        for part in blocks(text, 1 << 16):
            assert mine.encode(part) == sp.encode(part), name
        assert mine.encode(text) == sp.encode(text), name


# --- training -----------------------------------------------------------------------------------------------------


def test_the_papers_rules(ours: Tokenizer, excerpts: Path) -> None:
    """Digits are split, all bytes are there, spaces make pieces, and nothing holds a newline or a tab."""
    spec, normal = ours.spec, [p.text for p in ours.spec.pieces if p.kind == sentencepiece_proto.NORMAL]
    assert (spec.model_type, spec.byte_fallback, spec.split_digits) == (sentencepiece_proto.BPE, True, True)
    assert (spec.charsmap, spec.remove_extra_whitespaces, spec.add_dummy_prefix) == (b"", False, True)
    assert [p.text for p in spec.pieces[:5]] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert not [t for t in normal if len(t) > 1 and re.search("[0-9]", t)]
    assert not [t for t in normal if "\n" in t or "\t" in t]
    assert len(ours.encode("x 2023")) == len(ours.encode("x ")) + 4
    numbers = Tokenizer(train(LINES, 400))
    assert numbers.encode("x 2023") == numbers.encode("x ") + [numbers.piece_to_id(d) for d in "2023"]
    assert ours.encode("a\nb")[1] == ours.piece_to_id("<0x0A>")
    indented = Tokenizer(train([read(excerpts / "alice.txt.gz") + "\n        return x" * 90], 600))
    assert MARK * 4 in [p.text for p in indented.spec.pieces]


def test_pieces_are_those_of_sentencepieces_trainer() -> None:
    """On texts of one line, which is what SentencePiece's trainer reads, both give the same vocabulary."""
    by_us = sentencepiece_proto.read(train(LINES, 400)).pieces
    by_them = sentencepiece_proto.read(sentencepiece_model(LINES, character_coverage=0.99995)).pieces
    assert by_us == by_them


def test_words_count_as_they_are_encoded() -> None:
    """Only the first line of a text begins with a space."""
    assert count_words(["Down the\nDown  hole\n"]) == {" Down": 1, " the": 1, "Down": 1, "  hole": 1}
    assert count_words(["a\tb\0c\n\n" + MARK + "d \n"]) == {" a": 1, "b": 1, "c": 1, " d": 1, " ": 1}
    spec = Tokenizer(train(["x\n" + "Hello\n" * 99], 300)).spec
    assert "Hello" in [p.text for p in spec.pieces] and f"{MARK}Hello" not in [p.text for p in spec.pieces]


def test_same_texts_same_bytes(excerpts: Path, tmp_path: Path) -> None:
    """Twice the same, and nothing of this machine in it."""
    text = read(excerpts / "alice.txt.gz")
    proto = train([text], 512)
    assert proto == train([text], 512) != train([text[:50_000]], 512)
    assert b"/" + Path.cwd().name.encode() not in proto and str(tmp_path.parent).encode() not in proto


@pytest.mark.parametrize("size", [260, 261, 290, 320, 330, 400, 1000])
def test_any_size(excerpts: Path, size: int) -> None:
    """From 260 up, the size that was asked for; every text survives it."""
    t = Tokenizer(train([read(excerpts / "alice.txt.gz")[:20_000]], size))
    assert t.vocab_size == size
    assert SentencePieceProcessor(model_proto=t.proto).encode("a  漢 7") == t.encode("a  漢 7")
    assert t.decode(t.encode("Alice,  \n漢字 7")) == "Alice,  \n漢字 7"


def test_small_sizes_keep_the_commonest_letters() -> None:
    """Where the alphabet does not fit, the rarest letters become bytes; the space never does."""
    t = Tokenizer(train(["e" * 90 + "t" * 50 + "q"], 262))
    assert [p.text for p in t.spec.pieces[259:]] == ["e", "t", MARK]


def test_the_space_is_always_a_piece() -> None:
    """However rare it is: without it, a space would be decoded as U+2581."""
    t = Tokenizer(train(["漢字仮名" * 100_000], 400))
    assert MARK in [p.text for p in t.spec.pieces] and t.decode(t.encode("漢 字")) == "漢 字"


def test_sizes_that_cannot_be() -> None:
    """Below 260 is misuse; a text that is too small gives fewer pieces; no text is an error."""
    with pytest.raises(Misuse, match=r"at least 260.*got 259"):
        train(["a b c"], 259)
    assert Tokenizer(train(["a b c"], 5000)).vocab_size < 280
    for nothing in ([], [""], ["\n\n"]):
        with pytest.raises(DataError, match="no text to train on"):
            train(nothing, 300)


def test_long_lines_are_not_dropped() -> None:
    """SentencePiece's trainer drops long lines without a word; ours has none: a line of 1 MB counts in full."""
    assert "zyx" in [p.text for p in Tokenizer(train(["a b\n" + "zyx" * 400_000], 300)).spec.pieces]
    assert f"{MARK}wvut" in [p.text for p in Tokenizer(train(["a b\n" + "wvut " * 200_000], 300)).spec.pieces]


def test_sampling_lines() -> None:
    """A share of the lines, the same for the same seed."""
    text = "\n".join(f"w{i}" for i in range(4000))
    tenth = count_words([text], sample=0.1, seed=1)
    assert 300 < len(tenth) < 500
    assert tenth == count_words([text], sample=0.1, seed=1) != count_words([text], sample=0.1, seed=2)


def test_rare_words_are_forgotten_in_bounded_memory() -> None:
    """What stays is what was seen most."""
    counts = Counter({f"w{i}": i for i in range(1, 101)})
    forget_rare(counts, most=100)
    assert len(counts) == 100
    forget_rare(counts, most=99)
    assert set(counts) == {f"w{i}" for i in range(52, 101)}


def test_no_coverage_no_character() -> None:
    """Characters beyond the coverage are bytes."""
    counts = Counter({" ab": 10_000, " é": 1})
    assert "é" in [p.text for p in Tokenizer(fit(counts, 300, character_coverage=1.0)).spec.pieces]
    assert "é" not in [p.text for p in Tokenizer(fit(counts, 300)).spec.pieces]


# --- loading ------------------------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, **files: bytes) -> Path:
    """A folder with these files, dots written as _."""
    for name, data in files.items():
        (tmp_path / name.replace("_", ".")).write_bytes(data)
    return tmp_path


def test_load(ours: Tokenizer, tmp_path: Path) -> None:
    """From the file, its folder, and a run folder through `latest`."""
    step = tmp_path / "run" / "step-000001"
    step.mkdir(parents=True)
    (step / "tokenizer.model").write_bytes(ours.proto)
    (step / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "run" / "latest").write_text("step-000001\n")
    for path in (step / "tokenizer.model", step, str(step), tmp_path / "run", tmp_path / "run" / "latest"):
        assert Tokenizer.load(path).sha256 == ours.sha256


LLAMA_3 = {"config_json": b'{"model_type": "llama"}', "tokenizer_json": b'{"model": {"type": "BPE"}}'}
FOREIGN: list[tuple[str, Callable[[], dict[str, bytes]]]] = [
    ("has tokenizer.json but no tokenizer.model: .*Llama 3", lambda: LLAMA_3),
    ("has no tokenizer.model", lambda: {"config_json": b"{}"}),
    ("is not a model", lambda: {}),
    ("tiktoken vocabulary", lambda: {"tokenizer_model": b"IQ== 0\nIg== 1\n"}),
    ("is a Git LFS pointer", lambda: {"tokenizer_model": b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}),
    ("is no SentencePiece model", lambda: {"tokenizer_model": b""}),
    ("is no SentencePiece model", lambda: {"tokenizer_model": b"not a model at all"}),
    ("is no SentencePiece model", lambda: {"tokenizer_model": sentencepiece_model(LINES)[:900]}),
    ("SentencePiece unigram model", lambda: {"tokenizer_model": sentencepiece_model(LINES, model_type="unigram")}),
    ("SentencePiece word model", lambda: {"tokenizer_model": sentencepiece_model(LINES, model_type="word")}),
    ("without byte fallback", lambda: {"tokenizer_model": sentencepiece_model(LINES, byte_fallback=False)}),
    ("has unk 0, bos 2, eos 1", lambda: {"tokenizer_model": sentencepiece_model(LINES, bos_id=2, eos_id=1)}),
    ("has unk 3, bos 1, eos 2", lambda: {"tokenizer_model": sentencepiece_model(LINES, unk_id=3, pad_id=0)}),
]


@pytest.mark.parametrize("message, files", FOREIGN, ids=[re.sub(r"\W+", "-", m) for m, _ in FOREIGN])
def test_foreign_tokenizers_are_refused_by_name(
    tmp_path: Path, message: str, files: Callable[[], dict[str, bytes]]
) -> None:
    """One line that says what it is instead."""
    with pytest.raises(DataError, match=message) as error:
        Tokenizer.load(folder_with(tmp_path, **files()))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_tokenizer_there(tmp_path: Path) -> None:
    """A path that is not there, and a tokenizer.json by itself."""
    with pytest.raises(DataError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"SentencePiece"):
        Tokenizer.load(folder_with(tmp_path, tokenizer_json=b"{}") / "tokenizer.json")


def test_a_pad_piece_is_known() -> None:
    """Some fine-tuned models have one."""
    assert Tokenizer(sentencepiece_model(LINES, pad_id=3)).pad_id == 3


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_model_or_an_error(data: bytes) -> None:
    """The reader of model files never fails in another way."""
    with suppress(ValueError):
        sentencepiece_proto.read(data)


@given(st.integers(0, 20_000), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_flipped_byte_is_a_model_or_an_error(ours: Tokenizer, at: int, value: int) -> None:
    """Damage in a model file gives a model or a DataError."""
    damaged = bytearray(ours.proto)
    damaged[at % len(damaged)] = value
    with suppress(DataError):
        tokenizer.check(bytes(damaged), "damaged")
