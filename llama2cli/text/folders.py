"""Files and folders that are either whole or not there: atomic writes, two-phase publishing, manifests, finding models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama2cli.errors import DataError, did_you_mean

MANIFEST = "manifest.json"
POINTERS = ("latest", "best")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a small file so that a crash leaves the old content or the new: aside, fsync, rename, fsync the folder.

    Raises DataError where it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise DataError(f"cannot be written ({e.strerror})", path) from None


def publish_folder(aside: str | Path, final: str | Path, *, replace: bool = False) -> None:
    """Two-phase commit of a folder: fsync its files and folders, rename it, fsync the parent.

    replace: an earlier folder of that name goes (it is moved away first). Raises DataError if `final` exists otherwise.
    """
    aside, final = Path(aside), Path(final)
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(aside)
    stale = final.with_name(f".{final.name}.stale")
    if final.exists():
        if not replace:
            raise DataError("exists already", final)
        shutil.rmtree(stale, ignore_errors=True)
        final.rename(stale)
    aside.rename(final)
    fsync_folder(final.parent)
    shutil.rmtree(stale, ignore_errors=True)


def check_space(path: str | Path, needed: int) -> None:
    """Raise DataError when the disk under `path` (which need not exist yet) has fewer than `needed` bytes for us."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(f"needs {_size(needed)} of disk space, {_size(free)} is free", path)


def _size(n: int) -> str:
    """1.5 GB, in powers of 1000 as `df -H` prints."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} bytes"


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises DataError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", path) from None


def _members(folder: Path) -> Iterator[str]:
    """Names of the files of a folder, relative, sorted; not the manifest."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return iter(sorted(n for n in names if n != MANIFEST))


def write_manifest(folder: str | Path) -> dict[str, str]:
    """Write manifest.json, {"sha256": {file: hex}} for every file of the folder and below, and return the hashes."""
    folder = Path(folder)
    hashes = {name: sha256_file(folder / name) for name in _members(folder)}
    atomic_write(folder / MANIFEST, json.dumps({"sha256": hashes}, indent=1) + "\n")
    return hashes


def verify_manifest(folder: str | Path) -> dict[str, str]:
    """The hashes of manifest.json, each seen to be right. Raises DataError naming the first file that is not."""
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        hashes = json.loads(path.read_bytes())["sha256"]
        pairs = sorted((str(k), str(v)) for k, v in hashes.items())
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError("is not a manifest", path) from None
    for name, expected in pairs:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f'names a file outside the folder: "{name}"', path)
        if not (folder / name).is_file():
            raise DataError("is missing, and the manifest names it", folder / name)
        if sha256_file(folder / name) != expected:
            raise DataError("is not the file that was saved: its hash differs from the manifest's", folder / name)
    return dict(pairs)


def resolve_model(path: str | Path) -> Path:
    """The Hugging Face folder that a user's PATH means: that folder, a step folder, or a run folder through `latest`.

    RUN/latest and RUN/best, the text files themselves, name their step folder too. Raises DataError, one line that says
    what the path is instead.
    """
    path = Path(path)
    if path.name in POINTERS and path.is_file():
        return _follow(path)
    if not path.exists():
        raise DataError(f"no such folder{_near(path)}", path)
    if path.is_file():
        raise DataError(f'is a file; give the folder that holds it ("{path.parent}")', path)
    if (path / "config.json").is_file():
        _refuse_pickles(path)
        return path
    if (path / "latest").is_file():
        return _follow(path / "latest")
    raise DataError(_what_else(path), path)


def _follow(pointer: Path) -> Path:
    """The step folder that `latest` or `best` names."""
    try:
        name = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise DataError("cannot be read", pointer) from None
    step = pointer.parent / name
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise DataError(f"does not name a step folder: {name[:80]!r}", pointer)
    if not (step / "config.json").is_file():
        raise DataError(f'names "{name}", which is not a saved step', pointer)
    return step


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return "; a model is a folder on this disk (nothing is downloaded)"


def _refuse_pickles(folder: Path) -> None:
    if list(folder.glob("pytorch_model*.bin")) and not list(folder.glob("*.safetensors")):
        raise DataError(
            "holds pickled weights (pytorch_model.bin), which are never read; save them as safetensors first", folder
        )


def _what_else(folder: Path) -> str:
    """What a folder without config.json is."""
    if (folder / "params.json").is_file() or list(folder.glob("consolidated.*")):
        return f'is a Meta checkpoint; make a Hugging Face folder of it with "llama2 convert {folder} -o DIR"'
    if (folder / "adapter_config.json").is_file():
        return "is an adapter (LoRA), not a model; merge it into its base model first"
    if (folder / "metrics.jsonl").is_file() or (folder / "settings.json").is_file():
        return 'is a run folder that has saved nothing yet (it has no "latest")'
    if list(folder.glob("*.gguf")):
        return "holds GGUF weights; the Hugging Face folder is needed"
    if (folder / "snapshots").is_dir():
        return "is a download cache; the model is a folder under its snapshots"
    inside = sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file() or (p / "latest").is_file())
    hint = f' (did you mean "{folder / inside[0]}"?)' if inside else ""
    return f"is not a model: it has no config.json{hint}"
