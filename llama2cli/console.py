"""The only writer to stderr. Rank 0 alone speaks; `--quiet` silences all but errors.

`rich` is imported only when a live bar or a table is drawn on a terminal: it costs 0.08 s.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_state: dict[str, Any] = {"command": "llama2", "quiet": False, "warned": Counter()}
WARN_LIMIT = 3  # how often one kind of warning is printed before it is only counted
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


def configure(command: str, quiet: bool) -> None:
    """Set the name that begins each line, and whether to be silent."""
    _state.update(command=command, quiet=quiet, warned=Counter())


def speaks() -> bool:
    """Whether this process prints for a person: not under --quiet, and only on rank 0."""
    return not _state["quiet"] and os.environ.get("RANK", "0") == "0"


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        pass


def say(message: str) -> None:
    """Print a line for a person."""
    if speaks():
        _write(message + "\n")


def warn(message: str, kind: str | None = None) -> None:
    """Print a warning; of one `kind` only the first few, the rest are counted and told by `flush_warnings`."""
    if kind is not None:
        _state["warned"][kind] += 1
        if _state["warned"][kind] > WARN_LIMIT:
            return
    if speaks():
        _write(f"{_state['command']}: warning: {message}\n")


def flush_warnings() -> None:
    """Say how many warnings of each kind were not printed."""
    for kind, count in _state["warned"].items():
        if count > WARN_LIMIT and speaks():
            _write(f"{_state['command']}: warning: {count} times: {kind}\n")
    _state["warned"].clear()


def error(message: str) -> None:
    """Print the one line of an expected failure; --quiet does not hide it."""
    _write(f"{_state['command']}: {message}\n")


def traceback() -> None:
    """Print the traceback of the exception that is being handled (`--debug`)."""
    from traceback import format_exc

    _write(format_exc())


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table on stderr: first column left-aligned, the others right-aligned."""
    if not speaks():
        return
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(columns), *cells]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()

    rule = "  ".join("-" * w for w in widths)
    head = [title] if title else []
    _write("\n".join([*head, line(list(columns)), rule, *map(line, cells)]) + "\n")


def tables(several: Iterable[tuple[str, Sequence[str], Iterable[Sequence[object]]]]) -> None:
    """Draw tables, each (title, columns, rows), with a blank line between them."""
    for i, (title, columns, rows) in enumerate(several):
        if i:
            say("")
        table(title, columns, rows)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


class Progress:
    """Progress of long work: a live bar with ETA on a terminal, else a plain line every few seconds.

    with Progress("tokenize", total=n) as p: p.advance(1, note="12 MB/s")
    """

    def __init__(self, what: str, total: float | None = None, unit: str = "") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.first = 0.0, 0.0
        self.began = self.spoke = time.monotonic()
        self.note = ""
        self.live: Any = None

    def __enter__(self) -> Progress:
        if speaks() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            def fixed() -> Column:
                return Column(no_wrap=True)

            # A narrow terminal cuts the note, and nothing else.
            rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns = [TextColumn("{task.description}", table_column=fixed()), BarColumn(20, table_column=fixed())]
            columns += [TextColumn("{task.fields[count]}", table_column=fixed())]
            columns += [TimeRemainingColumn(table_column=fixed()), TextColumn("{task.fields[note]}", table_column=rest)]
            self.live = RichProgress(*columns, console=Console(stderr=True), transient=True, expand=True)
            self.task = self.live.add_task(self.what, total=self.total, count="", note="")
            self.live.start()
        return self

    def start_at(self, done: float) -> None:
        """Work that an earlier process did; it does not count for the ETA."""
        self.done = self.first = done

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work done; `note` is shown beside the bar."""
        self.done += amount
        self.note = note or self.note
        if self.live is not None:
            self.live.update(self.task, completed=self.done, count=self._count(), note=self.note)
        elif speaks() and time.monotonic() - self.spoke >= PLAIN_SECONDS:
            self.spoke = time.monotonic()
            _write(self._line() + "\n")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.live is not None:
            self.live.console.print(message, markup=False, highlight=False)
        else:
            say(message)

    def _count(self) -> str:
        done = f"{self.done:,.0f}"
        return f"{done}/{self.total:,.0f} {self.unit}".rstrip() if self.total else f"{done} {self.unit}".rstrip()

    def eta(self) -> float | None:
        """Seconds left, or None when it cannot be told."""
        new = self.done - self.first
        if not self.total or new <= 0:
            return None
        return (time.monotonic() - self.began) / new * (self.total - self.done)

    def _line(self) -> str:
        eta = self.eta()
        left = f", {duration(eta)} left" if eta is not None else ""
        return f"{self.what}: {self._count()}{left}" + (f", {self.note}" if self.note else "")

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
    """`Progress` as a context manager."""
    with Progress(what, total, unit) as p:
        yield p
