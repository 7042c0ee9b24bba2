"""Where an output comes from: version, command, seed and the hashes of what was read. No dates, no absolute paths, so
that the same command on the same inputs writes the same bytes anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from llama2cli import __version__

WHOLE = 1 << 30  # files up to this size are hashed whole
SAMPLE = 1 << 20  # of larger ones the size, the first and the last MiB


def collect(settings: Any, inputs: Iterable[str | Path] = ()) -> dict[str, Any]:
    """The provenance of a command's output.

    settings: the stage's dataclass. inputs: files and folders that it reads; "-" (stdin) has no hash.
    Returns {"version", "command", "seed", "inputs": {name: hash or None}}.
    """
    hashes = {str(p) if str(p) == "-" else Path(p).name: fingerprint(p) for p in inputs}
    return {"version": __version__, "command": command_line(), "seed": getattr(settings, "seed", 0), "inputs": hashes}


def write(path: str | Path, settings: Any, inputs: Iterable[str | Path] = ()) -> None:
    """Write the provenance of a data output, with every setting, as one JSON file (`--provenance FILE`)."""
    record = {"settings": portable(dataclasses.asdict(settings)), "provenance": collect(settings, inputs)}
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def fingerprint(path: str | Path) -> str | None:
    """sha256 of a file, or of a folder's manifest (of its files where it has none); None for stdin and for nothing."""
    if str(path) == "-":
        return None
    path = Path(path)
    if path.is_file():
        return _hash_file(path)
    if (path / "manifest.json").is_file():
        return _hash_file(path / "manifest.json")
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path)} {_hash_file(file)}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as f:
        size = path.stat().st_size
        if size <= WHOLE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        total = hashlib.sha256(str(size).encode() + f.read(SAMPLE))
        f.seek(size - SAMPLE)
        total.update(f.read())
        return total.hexdigest()


def command_line() -> str:
    """The command as it was typed, absolute paths cut to their last part."""
    return " ".join(["llama2", *map(str, portable(sys.argv[1:]))])


def portable(value: Any) -> Any:
    """Settings without absolute paths: an absolute path becomes its last part."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    if isinstance(value, str):
        head, sep, tail = value.partition("=")  # NAME=PATH:WEIGHT
        if sep and tail.startswith("/"):
            return f"{head}={Path(tail).name}"
        return Path(value).name if value.startswith("/") and len(value) > 1 else value
    return value
