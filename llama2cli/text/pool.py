"""Samples of earlier rounds, found by their prompt. They lie in a temporary file; a few bytes of each are in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from llama2cli.errors import DataError
from llama2cli.text.output import encode
from llama2cli.text.records import Record, prompt_id
from llama2cli.text.streams import MAX_LINE, Place, decode, read_records


class FromPool(Place):
    """The place of a prompt that stands in no file of prompts: where the pool has it first."""


class Pool:
    """The Samples of some files, by the id of their prompt, in their order. An answer that is there twice counts once.

    newest: the highest round among them, 0 without. n: how many there are; identical: how many more were the same;
    others: how many were not wanted.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        wanted: Callable[[Record], bool] = lambda sample: True,
        max_line: int = MAX_LINE,
        tick: Callable[[], None] | None = None,
    ) -> None:
        """Read them all. Raises DataError for what is no Sample, or where there is no room for a temporary file."""
        self.n = self.identical = self.others = self.newest = 0
        self.lines: dict[int, list[int]] = {}  # where the Samples of a prompt begin
        self.places: dict[int, Place] = {}
        self.asked: set[int] = set()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the pool
        seen: set[int] = set()
        for place, sample in read_records(paths, "sample", max_line=max_line):
            if not wanted(sample):
                self.others += 1
                continue
            *prompt, answer = sample["messages"]
            key = int(prompt_id(prompt), 16)
            text = f"{key}:{sample['truncated']}:{answer['content'].strip()}".encode()
            mark = int.from_bytes(blake2b(text, digest_size=8).digest())
            if mark in seen:
                self.identical += 1
                continue
            seen.add(mark)
            self.lines.setdefault(key, []).append(self._append(sample))
            self.places.setdefault(key, place)
            self.newest = max(self.newest, sample.get("round", 0))
            self.n += 1
            if tick is not None:
                tick()

    def _append(self, sample: Record) -> int:
        """Write a Sample; where it begins."""
        at = self.file.tell()
        try:
            self.file.write(encode(sample))
        except OSError as e:
            raise DataError(f"the pool cannot be kept there ({e.strerror})", tempfile.gettempdir()) from None
        return at

    def of(self, messages: Sequence[Record]) -> list[Record]:
        """The Samples of a prompt, which now has been asked for."""
        key = int(prompt_id(messages), 16)
        self.asked.add(key)
        return self._read(key)

    def ask(self, messages: Sequence[Record]) -> None:
        """Say that a prompt is asked for elsewhere."""
        key = int(prompt_id(messages), 16)
        if key in self.lines:
            self.asked.add(key)

    def _read(self, key: int) -> list[Record]:
        found = []
        for at in self.lines.get(key, ()):
            self.file.seek(at)
            found.append(decode(self.file.readline()))
        return found

    def unasked(self) -> Iterator[tuple[FromPool, Record]]:
        """The prompts that nobody has asked for, in their order, with the tag that their first Sample has."""
        for key, place in self.places.items():
            if key not in self.asked:
                first = self._read(key)[0]
                tag = {"unsafe": first["unsafe"]} if "unsafe" in first else {}
                yield FromPool(*place), {"messages": first["messages"][:-1], **tag}
