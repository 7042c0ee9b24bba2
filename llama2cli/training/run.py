"""The run folder: what a training command leaves, and what another process continues.

    settings.json   flags as given, what they came to, provenance
    metrics.jsonl   one line per step, deterministic; timing.jsonl: the rest
    step-000500/    a checkpoint, published whole or not at all
    latest  best    text files that name a step folder; moved last

One process writes a run folder (a lock sees to it), and of several ranks rank 0. A save is: files aside, fsync, rename,
fsync of the folder, then `latest`. Whatever the instant of a crash, `latest` names a whole step; the next process
removes what a killed save left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llama2cli.errors import DataError, Failure, Misuse
from llama2cli.text import folders
from llama2cli.training import dist
from llama2cli.training.dist import World

SETTINGS, METRICS, TIMING, LATEST, BEST, LOCK = (
    "settings.json",
    "metrics.jsonl",
    "timing.jsonl",
    "latest",
    "best",
    ".lock",
)


def step_name(step: int) -> str:
    """step-000500"""
    return f"step-{step:06d}"


def step_number(name: str) -> int | None:
    """500 for step-000500, None for what is no step folder."""
    digits = name.removeprefix("step-")
    return int(digits) if name != digits and digits.isdecimal() and step_name(int(digits)) == name else None


class Run:
    """A run folder, locked until `close`. Every rank has one; what it writes, rank 0 writes.

    folder: as the user gave it. latest: number of the last saved step, 0 when nothing is saved. found: the content of
    settings.json that an earlier process left, None for a fresh run.
    """

    def __init__(self, folder: str | Path, *, resume: bool, world: World) -> None:
        """Create the folder or take it over, and lock it.

        Raises Misuse where it exists without `resume`, or is no run folder; Failure where another process writes it.
        """
        self.folder, self.world = Path(folder), world
        self._logs: dict[str, BinaryIO] = {}
        self._lock = self._take(resume) if world.first else None
        dist.barrier(world)
        try:
            self.latest = read_pointer(self.folder / LATEST)
            self.found = read_settings(self.folder) if (self.folder / SETTINGS).exists() else None
            if world.first:
                self._clean()
        except BaseException:
            self.close()
            raise

    @property
    def step_folder(self) -> Path:
        """The folder of the last saved step."""
        return self.folder / step_name(self.latest)

    def _take(self, resume: bool) -> int:
        """Make or accept the folder and lock it; return the descriptor that holds the lock."""
        if self.folder.exists():
            if not resume:
                raise Misuse("exists; --resume continues it, another -o starts anew", self.folder)
            if not self.folder.is_dir():
                raise Misuse("is a file, a run folder is wanted", self.folder)
            ours = (self.folder / SETTINGS).exists()
            if not ours and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise Misuse(f"is no run folder: it holds files, but no {SETTINGS}; take another -o", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Failure("another process is writing this run folder", self.folder) from None
        return lock

    def _clean(self) -> None:
        """Remove what a killed process left: things aside, and steps and log lines beyond `latest`."""
        for path in sorted(self.folder.iterdir()):
            step = step_number(path.name)
            if path.is_dir() and (path.name.startswith(".step-") or (step is not None and step > self.latest)):
                retire(path)
            elif path.name.startswith(".") and path.name.endswith(".partial"):
                path.unlink()
        for name in (METRICS, TIMING):
            cut(self.folder / name, self.latest or -1)  # step 0 is measured again

    def write_settings(self, content: Mapping[str, Any]) -> None:
        """Replace settings.json."""
        if self.world.first:
            folders.atomic_write(self.folder / SETTINGS, to_json(content))

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and to timing.jsonl."""
        if not self.world.first:
            return
        for name, record in ((METRICS, metrics), (TIMING, timing)):
            if name not in self._logs:
                self._logs[name] = (self.folder / name).open("ab")
            self._logs[name].write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            self._logs[name].flush()

    def save(
        self, step: int, write: Callable[[Path], None], *, needed: int = 0, best: bool = False, keep: int = 0
    ) -> None:
        """Save a step: `write` fills a folder aside (on every rank), which is then published and named by `latest`.

        needed: bytes of disk that it takes. best: `best` names it too. keep: how many newest steps stay besides the
        best one; 0 keeps all. Raises DataError where the disk lacks room.
        """
        aside, final = self.folder / f".{step_name(step)}.partial", self.folder / step_name(step)
        if self.world.first:
            folders.check_space(self.folder, needed)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        dist.barrier(self.world)
        write(aside)
        dist.barrier(self.world)
        if self.world.first:
            folders.write_manifest(aside)
            for log in self._logs.values():
                os.fsync(log.fileno())
            folders.publish_folder(aside, final)
            folders.atomic_write(self.folder / LATEST, step_name(step) + "\n")
            if best:
                self.set_best(step)
            if keep:
                self._prune(keep, step)
        dist.barrier(self.world)
        self.latest = step

    def set_best(self, step: int | None) -> None:
        """Let `best` name a saved step, or nothing. A save does so last; who resumes does it again: a kill may have
        come between, or a person may have moved `latest` back."""
        if not self.world.first:
            return
        path = self.folder / BEST
        if step is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text() != step_name(step) + "\n":
            folders.atomic_write(path, step_name(step) + "\n")

    def _prune(self, keep: int, newest: int) -> None:
        """Remove all but the newest `keep` steps and the best."""
        steps = sorted(n for n in (step_number(p.name) for p in self.folder.iterdir()) if n is not None)
        spared = {*steps[-keep:], newest, read_pointer(self.folder / BEST)}
        for n in steps:
            if n not in spared:
                retire(self.folder / step_name(n))

    def last(self, name: str) -> dict[str, Any]:
        """The last line of METRICS or TIMING as a record, {} where there is none."""
        path = self.folder / name
        lines: list[bytes] = []
        if path.exists():
            with path.open("rb") as f:
                f.seek(max(0, path.stat().st_size - (1 << 20)))
                lines = f.read().splitlines()
        return json.loads(lines[-1]) if lines else {}

    def read(self, name: str) -> list[dict[str, Any]]:
        """All lines of METRICS or TIMING as records."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def close(self) -> None:
        """Close the files and give the folder free."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def retire(folder: Path) -> None:
    """Remove a folder of a run; at no instant does half of it stand under its name."""
    if not folder.name.startswith("."):
        folder = folder.rename(folder.with_name(f".{folder.name}.stale"))
    shutil.rmtree(folder)


def to_json(value: Any) -> str:
    """JSON for a person to read, ending with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_pointer(path: Path) -> int:
    """The step that `latest` or `best` names, 0 where there is no file. Raises DataError where it names no step."""
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        return 0
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot be read ({e})", path) from None
    step = step_number(name)
    if step is None or not (path.parent / name).is_dir():
        raise DataError(f'names "{name[:40]}", which is no step folder here; let it name one', path)
    return step


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a run folder's settings.json. Raises DataError where it cannot be read."""
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"cannot be read ({e})", path) from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), dict) for k in ("settings", "resolved", "provenance")
    ):
        raise DataError("is not the settings file of a run", path)
    return content


def cut(path: Path, step: int) -> None:
    """Cut a log back to the lines of steps up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as f:
        for line in f:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    if end < path.stat().st_size:
        with path.open("r+b") as f:
            f.truncate(end)
            os.fsync(f.fileno())


def check_same(found: Mapping[str, Any], now: Mapping[str, Any], place: object, free: Iterable[str] = ()) -> None:
    """Refuse to continue a run with other settings.

    found, now: what the settings came to, then and now. free: those that may differ. Raises Misuse naming the first.
    """
    for name in (*now, *(k for k in found if k not in now)):
        if name not in free and found.get(name) != now.get(name):
            what, was, is_ = first_difference(found.get(name), now.get(name))
            told = f"{name}{what}: " if what else ""
            hint = "give the run's own settings, or another -o"
            raise Misuse(
                f"{told}the run has {was}, now it would be {is_}; {hint}", place, f"--{name.replace('_', '-')}"
            )


def first_difference(was: Any, now: Any) -> tuple[str, str, str]:
    """Where two values differ first ("[0].sha256"), and what stands there in each."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(k for k in (*now, *was) if was.get(k) != now.get(k))
        inside, a, b = first_difference(was.get(key), now.get(key))
        return f".{key}{inside}", a, b
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return "", f"{len(was)} of them", str(len(now))
        i = next(i for i, (a, b) in enumerate(zip(was, now)) if a != b)
        inside, a, b = first_difference(was[i], now[i])
        return f"[{i}]{inside}", a, b
    return "", shown(was), shown(now)


def shown(value: Any) -> str:
    """A setting on one line."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
