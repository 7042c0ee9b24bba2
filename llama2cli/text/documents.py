"""Documents from what people have: JSON records with a text, or with other fields that make one; text files; lines.

Reading is cheap and decoding is not, so an `Item` is a record that was found but not yet decoded: workers do that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.text.blocks import check_sources
from llama2cli.text.records import checker
from llama2cli.text.streams import Place, decode, read_json, read_texts, read_whole_text

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SUFFIXES = re.compile(r"(\.(txt|jsonl|ndjson|json))?(\.(gz|zst))?$", re.IGNORECASE)


class Item(NamedTuple):
    """One document as it was found: the JSON text of a record, or a text. source: what its file is called."""

    payload: bytes | str
    source: str


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


def parser(fields: str | None) -> Callable[[Place, Item], dict[str, Any]]:
    """A function from items to documents: dicts with a "text", and a "source" where record or text file give one.

    fields: "a,b,c?" makes the text of these fields, empty ones left out, with a blank line between them; one that ends
    in "?" may be missing. The fields that made the text are gone from the record. Raises Misuse for no name, and the
    function DataError for a record that has no such text.
    """
    check = checker("document")
    names = [n.strip() for n in fields.split(",")] if fields is not None else []
    if fields is not None and not all(n.rstrip("?") for n in names):
        raise Misuse(f'expected names of fields, as in instruction,input?,response; got "{fields}"', "--field")

    def parse(place: Place, item: Item) -> dict[str, Any]:
        if isinstance(item.payload, str):
            return {"text": item.payload, **({"source": item.source} if is_text(place.file) else {})}
        record = decode(item.payload, place)
        return check(_joined(record, names, place) if names else record, place)

    return parse


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


class Filter:
    """Which documents are left out: by the name of their source, or by a pattern that their text holds."""

    def __init__(self, sources: Sequence[str], patterns: Sequence[str]) -> None:
        """Raises Misuse for a pattern that is no regular expression."""
        self.sources = frozenset(sources)
        self.patterns = [compiled(p, "--exclude-pattern") for p in patterns]

    def reason(self, source: str, text: str) -> tuple[str, str] | None:
        """("source", its name) or ("pattern", the first that matches), or None for a document that stays."""
        if source in self.sources:
            return ("source", source)
        for pattern in self.patterns:
            if pattern.search(text):
                return ("pattern", pattern.pattern)
        return None


def compiled(pattern: str, flag: str) -> re.Pattern[str]:
    """A regular expression. Raises Misuse naming the flag."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise Misuse(f'is not a regular expression: "{pattern}" ({e})', flag) from None
