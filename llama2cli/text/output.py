"""Records out: stdout, or a file that appears only when it is complete and that a killed command continues.

Beside FILE stand, until it is complete, FILE.partial (what is written so far) and FILE.journal (one line per window that
is safe on disk: inputs done, bytes written). Every window is a zstd frame or gzip member of its own, so the bytes of the
finished file do not depend on where a process was killed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
import sys
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from llama2cli import console
from llama2cli.errors import DataError, Misuse
from llama2cli.text.folders import fsync_folder

SPILL = 8 << 20  # bytes of an open window that are held before they are compressed and written
ZSTD_LEVEL, GZIP_LEVEL = 3, 6


def _plain(value: Any) -> Any:
    """What numpy scalars and arrays are in JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


def encode(record: Any) -> bytes:
    """One line of JSON, UTF-8, keys in their order, floats that read back exactly. Raises ValueError for NaN or infinity."""
    try:
        line = _encode(record)
    except OverflowError:  # an integer above 64 bits, which passes through unchanged
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=_plain).encode()
    if b"null" in line:  # what msgspec makes of NaN
        _refuse_nonfinite(record, "")
    return line + b"\n"


def _refuse_nonfinite(value: Any, path: str) -> None:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path.removeprefix('.') or 'the value'} is {value}, which JSON cannot hold")
    if isinstance(value, dict):
        for k, v in value.items():
            _refuse_nonfinite(v, f"{path}.{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            _refuse_nonfinite(v, f"{path}[{i}]")


def _compressor(path: str) -> Callable[[], Any] | None:
    """What makes the compressor of one window, by the suffix of the file."""
    if path.endswith(".zst"):
        import zstandard

        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj
    if path.endswith(".gz"):
        return lambda: zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)  # its header has no name and no time
    return None


def fingerprint(*parts: Any, paths: Sequence[str | Path] = ()) -> str:
    """A key for `Output`: a hash of settings (anything msgspec can encode) and of what `paths` are now.

    Of files the size and time of change count, of folders those of the files in them; of pipes and stdin nothing can.
    """
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(msgspec.json.encode(part, enc_hook=str, order="deterministic") + b"\n")
    for path in map(Path, paths):
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            status = file.stat() if file.is_file() else None
            digest.update(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


class Output:
    """Where the records of a command go.

    path: "-" is stdout; a file is written aside and renamed when the `with` block ends without an exception; the suffix
    .zst or .gz compresses. key: a fingerprint of settings and inputs (see `fingerprint`); a journal with the same key is
    continued unless resume is false. inputs: files that are being read, which the output must not be.

    Raises Misuse for an output that is a folder or an input, DataError where it cannot be written or another process
    is writing it.
    """

    def __init__(self, path: str, *, key: str, resume: bool = True, inputs: Sequence[str | Path] = ()) -> None:
        self.path, self.skip = path, 0
        self.consumed = 0
        self.held: list[bytes] = []
        self.size = 0
        self.open_window: Any = None
        self.journal: BinaryIO | None = None
        self.is_file = path != "-" and (
            not os.path.exists(path) or stat.S_ISREG(os.stat(path).st_mode) or os.path.isdir(path)
        )  # noqa: PTH110, PTH112, PTH116
        self.name = "stdout" if path == "-" else path
        self.compressor = None if path == "-" else _compressor(path)
        self._refuse_input(inputs)
        try:
            if self.is_file:
                self._open_file(key, resume)
            else:
                self.file = sys.stdout.buffer if path == "-" else Path(path).open("wb")
        except OSError as e:
            raise DataError(f"cannot be written ({e.strerror})", self.name) from None

    def _refuse_input(self, inputs: Sequence[str | Path]) -> None:
        """Raise Misuse if the output is one of the files that are read."""
        try:
            mine = os.fstat(sys.stdout.fileno()) if self.path == "-" else os.stat(self.path)  # noqa: PTH116
        except (OSError, ValueError, AttributeError):
            return
        for path in inputs:
            try:
                theirs = os.fstat(sys.stdin.fileno()) if str(path) == "-" else os.stat(path)  # noqa: PTH116
            except (OSError, ValueError, AttributeError):
                continue
            if stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, theirs):
                raise Misuse("is an input and the output; write to another file", self.name)

    def _open_file(self, key: str, resume: bool) -> None:
        self.final = Path(os.path.realpath(self.path))
        if self.final.is_dir():
            raise Misuse("is a folder; name a file", self.name)
        if not self.final.parent.is_dir():
            raise DataError(f'there is no folder "{Path(self.path).parent}"', self.name)
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.journal_path = self.final.with_name(self.final.name + ".journal")
        self.file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError("another process is writing it", self.name) from None
        done = self._done(key, os.fstat(self.file.fileno()).st_size) if resume else None
        self.skip = self.consumed = done[0] if done else 0
        self.bytes = done[1] if done else 0
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)
        if done:
            console.say(f"{self.name}: continuing after {self.skip:,} records")
            self.journal = self.journal_path.open("ab")
        else:
            self.journal = self.journal_path.open("wb")
            self._note({"key": key})
            fsync_folder(self.final.parent)

    def _done(self, key: str, size: int) -> tuple[int, int] | None:
        """(inputs done, bytes written) by an earlier process with this key, as far as the partial file holds them."""
        try:
            lines = self.journal_path.read_bytes().split(b"\n")[:-1]
            first, *windows = [json.loads(line) for line in lines]
            if first["key"] != key:
                console.warn(f"{self.name}: the journal beside it is of other settings or inputs; starting over")
                return None
            held = [(w["consumed"], w["bytes"]) for w in windows if w["bytes"] <= size]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            console.warn(f"{self.name}: the journal beside it cannot be read; starting over")
            return None
        return held[-1] if held else None

    def _note(self, entry: dict[str, Any]) -> None:
        """Add a line to the journal, durably."""
        assert self.journal is not None
        self.journal.write(msgspec.json.encode(entry) + b"\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def write(self, record: Any) -> None:
        """Add a record. It is safe when the window is committed. Raises DataError for what JSON cannot hold."""
        try:
            line = encode(record)
        except (TypeError, ValueError, RecursionError) as e:
            raise DataError(f"a record cannot be written: {e}", self.name) from None
        self.held.append(line)
        self.size += len(line)
        if self.size >= SPILL:
            self._spill()

    def _spill(self, end: bool = False) -> None:
        """Move what is held to the file; at the end of a window its frame is finished."""
        data = b"".join(self.held)
        self.held, self.size = [], 0
        if self.compressor is not None and (data or self.open_window):
            if self.open_window is None:
                self.open_window = self.compressor()
            data = self.open_window.compress(data)
            if end:
                data += self.open_window.flush()
                self.open_window = None
        try:
            self.file.write(data)
            if end:
                self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise DataError(f"cannot be written ({e.strerror})", self.name) from None

    def commit(self, consumed: int) -> None:
        """End a window: everything written so far is durable, and the first `consumed` inputs (counted from the very
        first, skipped ones included) are done. Raises ValueError if that number went down, DataError for a full disk.
        """
        if consumed < self.consumed:
            raise ValueError(
                f"commit takes the number of inputs done since the beginning: {consumed} < {self.consumed}"
            )
        self._spill(end=True)
        self.consumed = consumed
        if self.journal is None:
            return
        try:
            os.fsync(self.file.fileno())
            self._note({"consumed": consumed, "bytes": self.file.tell()})
        except OSError as e:
            raise DataError(f"cannot be written ({e.strerror})", self.name) from None

    def close(self) -> None:
        """Finish: the file appears under its name, and the journal goes."""
        self.commit(self.consumed)
        if self.journal is None:
            if self.path != "-":
                self.file.close()
            return
        if self.final.exists():
            self.partial.chmod(stat.S_IMODE(self.final.stat().st_mode))
        self.partial.replace(self.final)
        fsync_folder(self.final.parent)
        self.journal_path.unlink(missing_ok=True)
        self.journal.close()
        self.file.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.is_file:  # the partial file and its journal stay, for the next process to continue
            assert self.journal is not None
            self.journal.close()
            self.file.close()
