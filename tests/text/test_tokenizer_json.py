"""The tokenizer files of a checkpoint, read by transformers: AutoTokenizer gives our ids."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.text.segments import MARK
from llama2cli.text.tokenizer import Tokenizer, train
from llama2cli.text.tokenizer_json import merges, write_tokenizer_files

PARTS = [
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "  ",
    "    ",
    " ",
    "é",
    "e\u0301",
    "ñandú",
    "漢字",
    "🙂",
    "👩\u200d👧",
    "\0",
    "\x1f",
]
PARTS += [
    "\u00a0",
    "\u2028",
    "\ufeff",
    "the",
    " Alice",
    "don't",
    ", and",
    "12.5",
    "=====",
    "    return x",
    "[INST]",
    "<0x41>",
]
CONTROLS = ("<s>", "</s>", "<unk>")
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=6)), max_size=20).map("".join)
plain_texts = texts.filter(lambda t: not any(c in t for c in CONTROLS))


@pytest.fixture(scope="module")
def ours(excerpts: Path) -> Tokenizer:
    """A tokenizer of 2,048 pieces, some of which are runs of spaces."""
    text = gzip.decompress((excerpts / "alice.txt.gz").read_bytes()).decode()
    return Tokenizer(train([text + "\n        return x  ====  " * 200], 2048))


@pytest.fixture(scope="module")
def folder(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as far as the tokenizer goes."""
    folder = tmp_path_factory.mktemp("hf")
    write_tokenizer_files(folder, ours, context=512)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """What transformers makes of it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@given(plain_texts)
@settings(max_examples=400, deadline=None)
def test_same_ids(ours: Tokenizer, theirs: Any, text: str) -> None:
    """BOS, then our ids, as with the tokenizer that Meta published; the mask is all ones."""
    encoded = theirs(text)
    assert encoded["input_ids"] == [1, *ours.encode(text)]
    assert set(encoded) == {"input_ids", "attention_mask"}, "generate() refuses token_type_ids"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


@given(plain_texts)
@settings(max_examples=200, deadline=None)
def test_same_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    """Decoding gives the text back, with or without us."""
    ids = ours.encode(text)
    assert theirs.decode([1, *ids, 2], skip_special_tokens=True) == ours.decode(ids) == text.replace(MARK, " ")


def test_runs_of_one_character(ours: Tokenizer, theirs: Any) -> None:
    """Where one piece can be made in several ways, both choose alike."""
    for char in " =.-a\n\té":
        for n in range(1, 70):
            for text in (char * n, f"x{char * n}y"):
                assert theirs(text)["input_ids"] == [1, *ours.encode(text)], text


def test_the_known_difference(ours: Tokenizer, theirs: Any) -> None:
    """The text of a control piece becomes its id there; here it is text, and no text makes a control id."""
    assert theirs("a</s>")["input_ids"] == [1, *ours.encode("a"), 2]
    assert 2 not in ours.encode("a</s>") and ours.decode(ours.encode("a</s>")) == "a</s>"


def test_a_chat_of_metas_format(ours: Tokenizer, theirs: Any) -> None:
    """Control pieces written out in a text, as chat templates do, give the ids of the rounds encoded one by one."""
    rounds = ["[INST] Hello [/INST] Hi, you. ", "[INST] And? [/INST] No. "]
    by_number = [i for text in rounds for i in (1, *ours.encode(text), 2)]
    assert theirs("".join(f"<s>{text}</s>" for text in rounds), add_special_tokens=False)["input_ids"] == by_number


def test_special_ids_and_padding(theirs: Any) -> None:
    """Ids 0, 1, 2; a batch can be padded, on the left, with <unk>."""
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 0)
    assert (theirs.vocab_size, len(theirs), theirs.model_max_length) == (2048, 2048, 512)
    batch = theirs(["one", "one two three four"], padding=True)
    assert batch["input_ids"][0][0] == 0 and batch["attention_mask"][0][0] == 0
    assert len(batch["input_ids"][0]) == len(batch["input_ids"][1])


def test_saved_again_by_transformers(ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    """A folder that transformers saves keeps the ids, and its tokenizer.model, where it writes one, is ours."""
    from transformers import AutoTokenizer

    theirs.save_pretrained(tmp_path)
    text = "  Alice\n\tand 12 漢字"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == [1, *ours.encode(text)]


def test_files(ours: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """tokenizer.model as it came in; the same bytes every time."""
    assert (folder / "tokenizer.model").read_bytes() == ours.proto
    write_tokenizer_files(tmp_path, ours, context=512)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    write_tokenizer_files(tmp_path, ours, context=512, chat_template="{{ messages }}")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_merges_are_transformers_own(ours: Tokenizer) -> None:
    """The converter of transformers derives the same merges, in the same order, from vocabulary and scores."""
    from transformers.tokenization_utils_base import generate_merges

    normal = {p.text: i for i, p in enumerate(ours.spec.pieces) if p.kind == 1}
    assert merges(ours.spec) == generate_merges(normal)


def test_the_name_of_a_byte_in_a_text(tmp_path: Path) -> None:
    """A vocabulary whose pieces can be put together to "<0x41>": that is text, and not the byte."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    rules = dict(normalization_rule_name="identity", split_by_number=False, split_by_unicode_script=False)
    proto = sentencepiece_model(["x1> y1> z1> q1> a<0x4 b<0x4 c<0x4 d<0x4"] * 100, **rules)
    pieces = [p.text for p in Tokenizer(proto).spec.pieces]
    assert {"<0x4", "1>"} <= set(pieces), "the premise"
    write_tokenizer_files(tmp_path, Tokenizer(proto), context=8)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<0x41>", "a <0x41><0x42>", "<0x411>"):
        assert theirs(text)["input_ids"][1:] == SentencePieceProcessor(model_proto=proto).encode(text)


def sentencepiece_model(lines: list[str], **options: Any) -> bytes:
    """A model by SentencePiece's own trainer."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    rules = dict(model_type="bpe", vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    rules |= dict(remove_extra_whitespaces=False)
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **(rules | options))
    return out.getvalue()


def test_no_json_for_what_it_cannot_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that normalises text gets its tokenizer.model only, with a warning."""
    proto = sentencepiece_model([f"some words {i}" for i in range(200)], normalization_rule_name="nmt_nfkc")
    write_tokenizer_files(tmp_path, Tokenizer(proto, "odd.model"), context=8)
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer.model").read_bytes() == proto
    assert "odd.model" in capsys.readouterr().err
