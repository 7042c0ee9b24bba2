"""Documents from what people have: JSON records with a text, or with other fields that make one; text files; lines.

Reading is cheap and decoding is not, so an `Item` is a record that was found but not yet decoded: workers do that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.text.blocks import check_sources
from llama2cli.text.records import checker
from llama2cli.text.segments import MARK
from llama2cli.text.streams import Place, decode, read_json, read_texts, read_whole_text

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SUFFIXES = re.compile(r"(\.(txt|jsonl|ndjson|json))?(\.(gz|zst))?$", re.IGNORECASE)


EMPTY = ("empty", "")  # why a document is left out


class Item(NamedTuple):
    """One document as it was found: the JSON text of a record, or a text. source: what its file is called."""

    payload: bytes | str
    source: str


Chunk = list[tuple[Place, Item]]


def is_text(path: str) -> bool:
    """Whether a file is read as one text: by its name."""
    return path.lower().endswith(TEXT_SUFFIXES)


def source_name(path: str) -> str:
    """The source of documents that do not name theirs: the file's name without its suffixes."""
    return "stdin" if path == "-" else SUFFIXES.sub("", Path(path).name) or Path(path).name


def read_items(
    paths: Sequence[str], *, lines: bool, split: re.Pattern[str] | None, max_line: int
) -> Iterator[tuple[Place, Item]]:
    """The documents of all files (none: stdin), in order, with their places.

    lines: every line is a document. split: a text file is cut before each match. Paths are checked now; raises what the
    readers in `streams` raise.
    """
    sources = check_sources(paths)

    def items() -> Iterator[tuple[Place, Item]]:
        for path in sources:
            name = source_name(path)
            if lines:
                yield from ((place, Item(text, name)) for place, text in read_texts([path], max_line=max_line))
            elif is_text(path):
                text = read_whole_text(path)
                parts = cut(text, split) if split else [text]
                if split and len(parts) == 1:
                    console.warn(f"{path}: --txt-split matches nowhere; the file is one document", "one document")
                line = 1
                for part in parts:
                    yield Place(path, line), Item(part, name)
                    line += part.count("\n")
            else:
                yield from ((place, Item(text, name)) for place, text in read_json([path], max_line=max_line))

    return items()


def cut(text: str, split: re.Pattern[str]) -> list[str]:
    """The text cut before each match; white space alone is no document of its own."""
    bounds = [m.start() for m in split.finditer(text)]
    if not bounds or text[: bounds[0]].strip():
        bounds.insert(0, 0)
    bounds[0] = 0
    return [part for a, b in zip(bounds, [*bounds[1:], len(text)]) if (part := text[a:b])]


def chunked(items: Iterable[tuple[Place, Item]], *, most: int, size: int) -> Iterator[Chunk]:
    """The items in lists of about `size` bytes and at most `most` items."""
    held: Chunk = []
    held_bytes = 0
    for place, item in items:
        held.append((place, item))
        held_bytes += len(item.payload)
        if held_bytes >= size or len(held) >= most:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held


class Document(NamedTuple):
    """A decoded document that stays. record: its fields, "text" among them."""

    record: dict[str, Any]
    source: str

    @property
    def text(self) -> str:
        """What is tokenized."""
        return self.record["text"]


@dataclass
class Tally:
    """What became of some inputs. left_out: ("source", NAME), ("pattern", REGEX) or EMPTY -> how many."""

    inputs: int = 0
    kept: int = 0
    bytes: int = 0  # of the texts that are kept, in UTF-8
    marked: int = 0  # of those, that hold U+2581
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count the other's too."""
        self.inputs += other.inputs
        self.kept += other.kept
        self.bytes += other.bytes
        self.marked += other.marked
        self.left_out.update(other.left_out)


class Selector:
    """Decodes items, and leaves out documents of some sources, or whose text holds some pattern."""

    def __init__(
        self, *, fields: str | None, source: str | None, exclude_sources: Sequence[str], exclude_patterns: Sequence[str]
    ) -> None:
        """fields: "a,b,c?" makes the text of these fields, a blank line between them, empty ones left out; one with "?"
        may be missing. source: that of all documents. Raises Misuse for no name or no regular expression.
        """
        self.names = [n.strip() for n in fields.split(",")] if fields is not None else []
        if fields is not None and not all(n.rstrip("?") for n in self.names):
            raise Misuse(f'expected names of fields, as in instruction,input?,response; got "{fields}"', "--field")
        self.source = source
        self.excluded = frozenset(exclude_sources)
        self.patterns = [compiled(p, "--exclude-pattern") for p in exclude_patterns]
        self.check = checker("document")

    def select(self, chunk: Chunk, *, keep_empty: bool = False) -> tuple[list[Document], Tally]:
        """The documents of a chunk that stay, and the counts. Raises DataError at the place of a wrong record."""
        kept, tally = [], Tally(inputs=len(chunk))
        for place, item in chunk:
            document = self.document(place, item)
            reason = self._reason(document) or (None if document.text or keep_empty else EMPTY)
            if reason:
                tally.left_out[reason] += 1
                continue
            kept.append(document)
            tally.bytes += len(document.text.encode())
            tally.marked += MARK in document.text
        tally.kept = len(kept)
        return kept, tally

    def document(self, place: Place, item: Item) -> Document:
        """Decode an item. A record has a "source" where it had one, is a text file, or all have one."""
        if isinstance(item.payload, str):
            record: dict[str, Any] = {"text": item.payload}
            if is_text(place.file):
                record["source"] = item.source
        else:
            record = decode(item.payload, place)
            record = self.check(_joined(record, self.names, place) if self.names else record, place)
        if self.source is not None:
            record["source"] = self.source
        return Document(record, record.get("source", item.source))

    def _reason(self, document: Document) -> tuple[str, str] | None:
        if document.source in self.excluded:
            return ("source", document.source)
        return next((("pattern", p.pattern) for p in self.patterns if p.search(document.text)), None)


def _joined(record: Any, names: Iterable[str], place: Place) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError("expected an object", *place)
    parts = []
    for name in names:
        key = name.removesuffix("?")
        value = record.get(key)
        if key not in record and key == name:
            raise DataError(f'the field "{key}" of --field is missing{did_you_mean(key, map(str, record))}', *place)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{key}: expected a string, got {type(value).__name__}", *place)
        if value:
            parts.append(value)
    used = {n.removesuffix("?") for n in names}
    return {"text": "\n\n".join(parts), **{k: v for k, v in record.items() if k not in used and k != "text"}}


def compiled(pattern: str, flag: str) -> re.Pattern[str]:
    """A regular expression. Raises Misuse naming the flag."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise Misuse(f'is not a regular expression: "{pattern}" ({e})', flag) from None
