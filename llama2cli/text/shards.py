"""Token folders: tokenized documents on disk, memory-mapped when they are read.

    DIR/manifest.json            counts, the tokenizer's hash, what was left out, a sha256 per file
    DIR/shard-00000.safetensors  "ids": uint16 where the vocabulary fits, else uint32 [tokens];
                                 "documents": uint64, where in this shard a document begins [documents]

Each document is BOS, its ids, EOS. The shards of a folder are one stream: a document may reach over a shard's end.
Where documents had several sources, DIR holds one such folder for each, and its manifest lists them; DIR as a whole
is read as their concatenation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llama2cli.errors import DataError, did_you_mean
from llama2cli.text.folders import MANIFEST, atomic_write, publish_folder, sha256_file, verify_manifest
from llama2cli.text.tensorfile import open_arrays, write_arrays
from llama2cli.text.tokenizer import BOS, EOS, Tokenizer

FORMAT = "llama2cli tokens, version 1"
SPILL = 1 << 20  # bytes of one source's ids that are held before they are written
MAX_SOURCES = 1000  # more are a mistake: a field that names documents, not sources
SHARD = "shard-%05d.safetensors"


# --- reading ------------------------------------------------------------------------------------------------------


class TokenFolder:
    """A token folder, open for reading. The ids stay on disk until they are asked for.

    n_tokens, n_documents: BOS and EOS counted. n_bytes: of the text, in UTF-8. sources: their names, in stream order.
    """

    def __init__(self, path: Path, manifests: list[tuple[Path, dict[str, Any]]], name: str) -> None:
        self.path, self.name = path, name
        first = manifests[0][1]
        self.tokenizer_sha256: str = first["tokenizer_sha256"]
        self.vocab_size: int = first["vocab_size"]
        self.sources: list[str] = [m["source"] for _, m in manifests]
        self.n_bytes: int = sum(m["bytes"] for _, m in manifests)
        self.n_documents: int = sum(m["documents"] for _, m in manifests)
        self._files = [folder / shard["file"] for folder, m in manifests for shard in m["shards"]]
        self._counts = [(s["tokens"], s["documents"]) for _, m in manifests for s in m["shards"]]
        self._starts = np.cumsum([0, *(tokens for tokens, _ in self._counts)])
        self.n_tokens = int(self._starts[-1])
        self._open: dict[int, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, path: str | Path) -> TokenFolder:
        """Open DIR, or one source of it as DIR/SOURCE. Raises DataError for what is not a token folder."""
        path = Path(path)
        manifest = read_manifest(path)
        if "sources" not in manifest:
            return cls(path, [(path, manifest)], manifest["source"])
        parts = [(path / folder, read_manifest(path / folder)) for folder in manifest["sources"].values()]
        for folder, part in parts:
            if "sources" in part or part["tokenizer_sha256"] != parts[0][1]["tokenizer_sha256"]:
                raise DataError("does not belong to the folder that it is in", folder / MANIFEST)
        return cls(path, parts, path.resolve().name)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 ids [stop - start] of the stream. Raises IndexError outside of it, DataError for damaged shards."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"{start}:{stop} is not within {self.n_tokens} tokens")
        out = np.empty(stop - start, np.int64)
        shard, at = int(np.searchsorted(self._starts, start, side="right")) - 1, start
        while at < stop:
            base, end = int(self._starts[shard]), min(int(self._starts[shard + 1]), stop)
            out[at - start : end - start] = self._shard(shard)["ids"][at - base : end - base]
            at, shard = end, shard + 1
        if out.size and int(out.max()) >= self.vocab_size:
            raise DataError(f"holds id {int(out.max())}, but the vocabulary is {self.vocab_size}", self.path)
        return out

    def document_starts(self) -> np.ndarray:
        """int64 [n_documents]: where each document's BOS is in the stream."""
        starts = [self._shard(i)["documents"].astype(np.int64) + self._starts[i] for i in range(len(self._files))]
        return np.concatenate(starts) if starts else np.empty(0, np.int64)

    def verify(self) -> None:
        """Hash every file against the manifests. Raises DataError naming the first that was changed."""
        for folder in {file.parent: None for file in self._files} | {self.path: None}:
            verify_manifest(folder)

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        if i not in self._open:
            file, (tokens, documents) = self._files[i], self._counts[i]
            arrays = open_arrays(file)
            shapes = {name: a.shape for name, a in arrays.items()}
            if shapes != {"ids": (tokens,), "documents": (documents,)}:
                raise DataError(f"is not the shard that {MANIFEST} describes", file)
            wide = arrays["ids"].dtype.name
            if wide not in ("uint16", "uint32") or arrays["documents"].dtype != np.uint64:
                raise DataError(f"holds ids as {wide}", file)
            self._open[i] = arrays
        return self._open[i]


_COUNTS = {"vocab_size": int, "tokens": int, "documents": int, "bytes": int, "tokenizer_sha256": str}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a token folder, seen to have what we read of it. Raises DataError."""
    file = path / MANIFEST
    if not path.exists():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such token folder{did_you_mean(path.name, known)}", path)
    if not path.is_dir():
        raise DataError("is not a token folder; make one of documents with llama2 tokenize -o DIR", path)
    if not file.is_file():
        raise DataError(f"is not a token folder: it has no {MANIFEST}; llama2 tokenize -o DIR makes one", path)
    try:
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"is not the manifest of a token folder (format {FORMAT})", file)
        for key, kind in _COUNTS.items():
            if not isinstance(manifest[key], kind) or manifest[key] is True:
                raise ValueError(key)
        inside = manifest["sources"].values() if "sources" in manifest else [s["file"] for s in manifest["shards"]]
        if not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in inside):
            raise ValueError("a name that leads out of the folder")
        if "sources" not in manifest and not isinstance(manifest["source"], str):
            raise ValueError("source")
        if "sources" not in manifest and any(
            sum(s[k] for s in manifest["shards"]) != manifest[k] for k in ("tokens", "documents")
        ):
            raise ValueError("the counts of its shards do not add up")
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", file) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"is damaged ({e})", file) from None
    return manifest


def is_token_folder(path: Path) -> bool:
    """Whether a folder holds nothing but what a ShardWriter makes: it may be replaced."""
    if not path.is_dir():
        return False
    ours = re.compile(r"manifest\.json|shard-\d{5}\.safetensors").fullmatch
    inside = [(p, p.parent == path) for p in path.rglob("*")]
    return all(ours(p.name) if p.is_file() else p.is_dir() and top for p, top in inside)


# --- writing ------------------------------------------------------------------------------------------------------


def folder_name(source: str, taken: Sequence[str] = ()) -> str:
    """A folder name for a source: itself where that is a plain name, else its plain part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", source).strip("._-")[:60] or "source"
    if plain != source or plain.lower() in {t.lower() for t in taken} or plain.startswith(("shard-", MANIFEST)):
        plain = f"{plain}-{sha256(source.encode()).hexdigest()[:8]}"
    return plain


@dataclass
class _Source:
    """One source while it is written."""

    name: str
    folder: Path
    held: list[bytes] = field(default_factory=list)
    held_bytes: int = 0
    starts: list[int] = field(default_factory=list)  # of the documents in the open shard
    filled: int = 0  # tokens in the open shard
    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class ShardWriter:
    """Writes a token folder aside; `publish` makes it appear under its name, whole.

    Used as a context manager, it removes what it wrote when it is left before `publish`.
    """

    def __init__(self, final: str | Path, tokenizer: Tokenizer, *, shard_tokens: int) -> None:
        """shard_tokens: of one file at most. Raises DataError where the folder cannot be made."""
        self.final, self.tokenizer, self.shard_tokens = Path(final), tokenizer, shard_tokens
        self.dtype = np.dtype("u2" if tokenizer.code == "H" else "u4")
        self.bos, self.eos = (array(tokenizer.code, [i]).tobytes() for i in (BOS, EOS))
        self.sources: dict[str, _Source] = {}
        self.aside = self.final.with_name(f".{self.final.name}.{os.getpid()}.partial")
        _remove_stale(self.final)
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir()
        except OSError as e:
            raise DataError(f"cannot be made ({e.strerror})", final) from None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)

    def add(self, source: str, documents: Sequence[bytes], n_bytes: int) -> None:
        """Add documents: their ids as `Tokenizer.pack` gives them; n_bytes: all their texts in UTF-8."""
        s = self.sources.get(source)
        if s is None:
            s = self._new(source)
        s.documents += len(documents)
        s.bytes += n_bytes
        size = self.dtype.itemsize
        for packed in documents:
            s.starts.append(s.filled + s.held_bytes // size)
            s.held += (self.bos, packed, self.eos)
            s.held_bytes += len(packed) + 2 * size
        if s.held_bytes >= SPILL or s.filled + s.held_bytes // size >= self.shard_tokens:
            self._spill(s)

    def _new(self, source: str) -> _Source:
        if len(self.sources) == MAX_SOURCES:
            raise DataError(f"more than {MAX_SOURCES} sources; --source NAME makes them one", self.final)
        name = folder_name(source, [s.folder.name for s in self.sources.values()])
        s = self.sources[source] = _Source(source, self.aside / name)
        s.folder.mkdir()
        return s

    def _spill(self, s: _Source) -> None:
        """Move what is held to the open shard, closing shards as they fill up."""
        data = memoryview(b"".join(s.held))
        s.held, s.held_bytes = [], 0
        size = self.dtype.itemsize
        while len(data):
            take = data[: (self.shard_tokens - s.filled) * size]
            with (s.folder / "open").open("ab") as file:
                file.write(take)
            s.filled += len(take) // size
            data = data[len(take) :]
            if s.filled == self.shard_tokens:
                self._close(s)

    def _close(self, s: _Source) -> None:
        """Make a shard of what the open file holds."""
        if not s.filled:
            return
        raw, here = s.folder / "open", [at for at in s.starts if at < s.filled]
        name = SHARD % len(s.shards)
        ids = np.memmap(raw, self.dtype, "r", shape=(s.filled,))
        write_arrays(s.folder / name, {"ids": ids, "documents": np.array(here, np.uint64)})
        del ids
        raw.unlink()
        entry = {"file": name, "tokens": s.filled, "documents": len(here), "sha256": sha256_file(s.folder / name)}
        s.shards.append(entry)
        s.tokens += s.filled
        s.starts, s.filled = [at - s.filled for at in s.starts[len(here) :]], 0

    def publish(self, about: dict[str, Any], *, replace: bool = False) -> dict[str, Any]:
        """Finish the shards, write the manifests and move the folder to its name; returns the manifest of the whole.

        about: what else the manifest says. replace: an earlier folder of that name goes.
        """
        common = {
            "format": FORMAT,
            "tokenizer_sha256": self.tokenizer.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": self.dtype.name,
        }
        manifests: dict[Path, dict[str, Any]] = {}
        for s in self.sources.values():
            self._spill(s)
            self._close(s)
            counts = {"source": s.name, "tokens": s.tokens, "documents": s.documents, "bytes": s.bytes}
            hashes = {shard["file"]: shard["sha256"] for shard in s.shards}
            manifests[s.folder] = {**common, **counts, "shards": s.shards, "sha256": hashes}
        if len(manifests) == 1:  # the folder is the source's own
            [(folder, whole)] = manifests.items()
            for path in folder.iterdir():
                path.rename(self.aside / path.name)
            folder.rmdir()
            whole |= about
        else:
            for folder, manifest in manifests.items():
                _write(folder, manifest)
            totals = {k: sum(m[k] for m in manifests.values()) for k in ("tokens", "documents", "bytes")}
            names = {m["source"]: folder.name for folder, m in manifests.items()}
            hashes = {f"{folder.name}/{MANIFEST}": sha256_file(folder / MANIFEST) for folder in manifests}
            whole = {**common, **totals, "sources": names, "sha256": hashes, **about}
        _write(self.aside, whole)
        publish_folder(self.aside, self.final, replace=replace)
        return whole


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _remove_stale(final: Path) -> None:
    """Remove what killed processes left beside the folder."""
    for path in final.parent.glob(f".{final.name}.*.partial") if final.parent.is_dir() else ():
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
