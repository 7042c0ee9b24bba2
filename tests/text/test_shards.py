"""Token folders: what goes in comes out, they are whole or not there, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from array import array
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.text import shards
from llama2cli.text.shards import ShardWriter, TokenFolder, folder_name, is_token_folder

Document = tuple[str, list[int], int]  # source, ids, bytes of the text


def stub(vocab_size: int = 1000) -> Any:
    """As much of a tokenizer as a writer needs."""
    return SimpleNamespace(vocab_size=vocab_size, code="H" if vocab_size <= 65536 else "I", sha256="0" * 64)


def write(
    path: Path, documents: list[Document], *, shard_tokens: int = 1000, tokenizer: Any = None, **publish: Any
) -> dict[str, Any]:
    """A token folder of these documents; its manifest."""
    tokenizer = tokenizer or stub()
    with ShardWriter(path, tokenizer, shard_tokens=shard_tokens) as writer:
        for source, group in groupby(documents, key=lambda d: d[0]):
            own = list(group)
            writer.add(source, [array(tokenizer.code, ids).tobytes() for _, ids, _ in own], sum(n for *_, n in own))
        return writer.publish({}, **publish)


def stream(documents: list[Document]) -> tuple[list[int], list[int]]:
    """The ids that a folder should hold, and where documents begin: sources in order of their first document."""
    ids: list[int] = []
    starts = []
    for source in dict.fromkeys(d[0] for d in documents):
        for _, own, _ in (d for d in documents if d[0] == source):
            starts.append(len(ids))
            ids += [1, *own, 2]
    return ids, starts


documents = st.lists(
    st.tuples(st.sampled_from(["a", "b", "x/../y"]), st.lists(st.integers(3, 999), max_size=30), st.integers(0, 99)),
    min_size=1,
    max_size=25,
)


@given(documents, st.integers(1, 40), st.data())
@settings(max_examples=25, deadline=None)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], shard_tokens: int, data: st.DataObject
) -> None:
    """Ids between BOS and EOS, document starts and counts, however small the shards; any span can be read."""
    path = tmp_path_factory.mktemp("t") / "tokens"
    manifest = write(path, documents, shard_tokens=shard_tokens)
    folder = TokenFolder.open(path)
    ids, starts = stream(documents)
    assert folder.read(0, folder.n_tokens).tolist() == ids
    assert folder.document_starts().tolist() == starts
    assert folder.n_tokens == manifest["tokens"] == len(ids)
    assert folder.n_documents == manifest["documents"] == len(documents)
    assert folder.n_bytes == sum(d[2] for d in documents)
    assert (folder.vocab_size, folder.tokenizer_sha256) == (1000, "0" * 64)
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)))))
    assert folder.read(a, b).tolist() == ids[a:b] and folder.read(a, b).dtype == np.int64
    files = [s for f in path.rglob("manifest.json") for s in json.loads(f.read_text()).get("shards", [])]
    assert all(s["tokens"] <= shard_tokens for s in files)
    folder.verify()
    for source in folder.sources:
        own = [d for d in documents if d[0] == source]
        part = TokenFolder.open(path / manifest["sources"][source] if "sources" in manifest else path)
        assert part.name == source and part.read(0, part.n_tokens).tolist() == stream(own)[0]


def test_layout(tmp_path: Path) -> None:
    """One source is the folder itself; several are folders in it, opened by name or together."""
    write(tmp_path / "one", [("x", [5, 6], 3)])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    write(tmp_path / "two", [("y", [5], 1), ("x", [6], 1), ("y", [7], 1)])
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["manifest.json", "x", "y"]
    assert TokenFolder.open(tmp_path / "two").read(0, 9).tolist() == [1, 5, 2, 1, 7, 2, 1, 6, 2]
    assert TokenFolder.open(tmp_path / "two" / "x").read(0, 3).tolist() == [1, 6, 2]
    assert TokenFolder.open(tmp_path / "two").name == "two"


def test_width_follows_the_vocabulary(tmp_path: Path) -> None:
    """uint16 up to 65,536 pieces, uint32 above; the safetensors library reads both."""
    from safetensors.numpy import load_file

    for size, dtype in ((65536, "uint16"), (65537, "uint32")):
        path = tmp_path / dtype
        write(path, [("x", [size - 1, 3], 1)], tokenizer=stub(size))
        assert TokenFolder.open(path).read(1, 3).tolist() == [size - 1, 3]
        arrays = load_file(path / "shard-00000.safetensors")
        assert arrays["ids"].dtype == dtype and arrays["ids"].tolist() == [1, size - 1, 3, 2]
        assert arrays["documents"].dtype == np.uint64 and arrays["documents"].tolist() == [0]


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    """Every file, byte for byte."""
    docs = [("b", [7] * 900, 9), ("a", [8], 1)]
    for name in ("1", "2"):
        write(tmp_path / name, docs, shard_tokens=100)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) > 10
    assert all((tmp_path / "1" / f).read_bytes() == (tmp_path / "2" / f).read_bytes() for f in files)


def test_names_of_folders() -> None:
    """Plain names stay; others cannot lead anywhere, collide, or pass for a shard."""
    assert folder_name("war_and_peace-2.v1") == "war_and_peace-2.v1"
    odd = ["../..", "/etc", "a/b", "a b", ".", "..", "", "é", "manifest.json", "shard-00000.safetensors", "-rf"]
    odd += ["x" * 300]
    names = [folder_name(s) for s in odd]
    assert len(set(names)) == len(odd)
    assert all(n not in odd and len(n) < 80 and n.isascii() and "/" not in n and n[0].isalnum() for n in names)
    assert folder_name("Web", ["web"]) != "Web", "some file systems do not tell case apart"


def test_too_many_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that names documents is no source."""
    monkeypatch.setattr(shards, "MAX_SOURCES", 5)
    write(tmp_path / "t", [(f"url{i}", [5], 1) for i in range(5)])
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(DataError, match="more than 5 sources; --source NAME"):
        write(tmp_path / "t", [(f"url{i}", [5], 1) for i in range(6)])
    assert list(tmp_path.iterdir()) == []


# --- whole or not there -------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    """An exception before `publish` leaves neither the folder nor what was written aside."""
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "t", stub(), shard_tokens=10) as writer:
        writer.add("x", [array("H", [5] * 40).tobytes()], 1)
        assert list(tmp_path.iterdir()) != []
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from array import array
from types import SimpleNamespace
from llama2cli.text.shards import ShardWriter
writer = ShardWriter(sys.argv[1], SimpleNamespace(vocab_size=9, code="H", sha256=""), shard_tokens=10)
writer.add("x", [array("H", [5] * 40).tobytes()], 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Nothing stands under the name; the next writer removes what the dead one left, but not what a live one writes."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "t")])
    assert done.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".t.") and left.name.endswith(".partial")
    alive = tmp_path / f".t.{os.getppid()}.partial"
    alive.mkdir()
    write(tmp_path / "t", [("x", [5], 1)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "t"])


def test_an_existing_folder(tmp_path: Path) -> None:
    """It is replaced only when that is asked for."""
    write(tmp_path / "t", [("x", [5], 1)])
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "t", [("x", [6], 1)])
    assert TokenFolder.open(tmp_path / "t").read(1, 2).tolist() == [5]
    write(tmp_path / "t", [("x", [6], 1)], replace=True)
    assert TokenFolder.open(tmp_path / "t").read(1, 2).tolist() == [6]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_where_no_folder_can_be(tmp_path: Path) -> None:
    """The parent must be there."""
    with pytest.raises(DataError, match="cannot be made"):
        write(tmp_path / "no" / "t", [("x", [5], 1)])


def test_what_may_be_replaced(tmp_path: Path) -> None:
    """Only folders of which every file is a writer's."""
    write(tmp_path / "t", [("x", [5], 1), ("y", [5], 1)])
    assert is_token_folder(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    assert is_token_folder(tmp_path / "t"), "make deletes the target of a rule that failed"
    (tmp_path / "t" / "x" / "notes.txt").write_text("mine")
    assert not is_token_folder(tmp_path / "t")
    assert not is_token_folder(tmp_path / "t" / "x" / "notes.txt")


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards."""
    write(tmp_path / "tokens", [("x", list(range(3, 15)), 20), ("x", [7], 1)], shard_tokens=10)
    return tmp_path / "tokens"


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of a manifest; None takes one away."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_not_a_token_folder(tmp_path: Path, folder: Path) -> None:
    """Each says what it is instead."""
    for path, message in (
        (tmp_path / "token", r'no such token folder; did you mean "tokens"'),
        (folder / "manifest.json", "is not a token folder"),
        (tmp_path, "it has no manifest.json"),
    ):
        with pytest.raises(DataError, match=message):
            TokenFolder.open(path)
    (tmp_path / "manifest.json").write_text('{"sha256": {}}')
    with pytest.raises(DataError, match="is not the manifest of a token folder"):
        TokenFolder.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": 99},
        {"documents": "2"},
        {"vocab_size": True},
        {"shards": [{"file": "../t/shard-00000.safetensors", "tokens": 17, "documents": 2}]},
        {"shards": [{"tokens": 17, "documents": 2}]},
        {"shards": 3},
        {"source": None},
        {"sources": {"x": ".."}},
        {"sources": ["x"]},
    ],
)
def test_damaged_manifests(folder: Path, change: dict[str, Any]) -> None:
    """One line that names the manifest."""
    edit(folder, **change)
    with pytest.raises(DataError, match=r"manifest\.json: is damaged"):
        TokenFolder.open(folder)


def test_a_manifest_that_is_no_json(folder: Path) -> None:
    """Cut short, as by a full disk."""
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text[:100])
    with pytest.raises(DataError, match=r"manifest\.json: is damaged"):
        TokenFolder.open(folder)


def test_damaged_shards(folder: Path) -> None:
    """Missing, cut, of another size, with ids outside the vocabulary, or changed."""
    second = folder / "shard-00001.safetensors"
    good = second.read_bytes()

    second.write_bytes(good[:-2])
    with pytest.raises(DataError, match=r"shard-00001.*is cut"):
        TokenFolder.open(folder).read(0, 17)
    shutil.copy(folder / "shard-00000.safetensors", second)
    with pytest.raises(DataError, match=r"is not the shard that manifest\.json describes"):
        TokenFolder.open(folder).document_starts()
    second.unlink()
    with pytest.raises(DataError, match="shard-00001"):
        TokenFolder.open(folder).read(0, 17)
    assert TokenFolder.open(folder).read(0, 10).tolist() == [1, *range(3, 12)], "the first shard is whole"

    second.write_bytes(good[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match="holds id 65535, but the vocabulary is 1000"):
        TokenFolder.open(folder).read(0, 17)
    second.write_bytes(good[:-2] + b"\x09\x00")
    with pytest.raises(DataError, match=r"shard-00001.*is not the file that was saved"):
        TokenFolder.open(folder).verify()
    second.write_bytes(good)
    TokenFolder.open(folder).verify()


def test_spans_outside(folder: Path) -> None:
    """A reader that asks for too much has a bug."""
    t = TokenFolder.open(folder)
    assert t.read(17, 17).tolist() == []
    for span in ((0, 18), (-1, 3), (5, 4)):
        with pytest.raises(IndexError):
            t.read(*span)


def test_parts_of_different_tokenizers(tmp_path: Path) -> None:
    """A folder that was put into another is found out."""
    write(tmp_path / "t", [("x", [5], 1), ("y", [5], 1)])
    edit(tmp_path / "t" / "y", tokenizer_sha256="1" * 64)
    with pytest.raises(DataError, match=r"y/manifest\.json: does not belong"):
        TokenFolder.open(tmp_path / "t")
