"""Records and lines in, records out: the common layer of every command that is a filter.

Sources are files or stdin, plain, zstd or gzip, told by content. A record is one JSON object a line, or an element of one
JSON array. JSON is decoded by msgspec; the `jsonlines` package is not used: its reader decodes every line to text first
(a third of the time of a whole record), reads lines of any length, and cannot name the field.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from llama2cli.errors import DataError
from llama2cli.text.blocks import Damaged, check_sources, display_name, read_blocks, without_bom
from llama2cli.text.output import Output, encode
from llama2cli.text.records import checker

__all__ = [
    "Output",
    "Place",
    "encode",
    "read_lines",
    "read_records",
    "read_texts",
    "read_whole_text",
    "some",
    "windows",
]

MAX_LINE = 64 << 20
MAX_TEXT = 1 << 31
T = TypeVar("T")


class Place(NamedTuple):
    """Where a record came from: `DataError(message, *place)` names it."""

    file: str
    line: int


class Element(int):
    """The number of an element of a JSON array, from 1, where other inputs have a line number."""

    def __str__(self) -> str:
        return f"element {int(self)}"


def read_lines(paths: Sequence[str | Path], *, max_line: int = MAX_LINE) -> Iterator[tuple[Place, bytes]]:
    """Lines of files, or of stdin when there are no paths, without their ends (LF or CRLF); blank lines are skipped.

    Paths are checked at once, before the first line is asked for. Raises Misuse for no input or one given twice, DataError
    for an unreadable file, a line longer than `max_line` bytes (before it is held in memory), or damaged data.
    """
    return chain.from_iterable(_file_lines(s, max_line) for s in check_sources(paths))


def _file_lines(source: str, max_line: int) -> Iterator[tuple[Place, bytes]]:
    return _split(without_bom(read_blocks(source), display_name(source)), display_name(source), max_line)


def _split(blocks: Iterator[bytes], name: str, max_line: int) -> Iterator[tuple[Place, bytes]]:
    """Lines of one source that hold more than white space, with their places."""
    number, held, size = 1, [], 0  # the open line, its pieces and its length so far
    try:
        for block in blocks:
            parts = block.split(b"\n")
            last = len(parts) - 1
            for i, part in enumerate(parts):
                if size + len(part) > max_line:
                    raise _too_long(name, number, max_line)
                if i == last:
                    held.append(part)
                    size += len(part)
                    break
                line = b"".join([*held, part]) if size else part
                held, size = [], 0
                if line and not line.isspace():
                    yield Place(name, number), line.removesuffix(b"\r")
                number += 1
    except Damaged as e:
        raise DataError(str(e), name, number) from None
    line = b"".join(held)
    if line and not line.isspace():
        yield Place(name, number), line.removesuffix(b"\r")


def _too_long(name: str, number: int, max_line: int) -> DataError:
    return DataError(f"longer than {max_line:,} bytes; --max-line allows more", name, number)


def read_records(
    paths: Sequence[str | Path], kind: str, *, max_line: int = MAX_LINE
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Records of a kind (see `records.validate`): one JSON object a line, or the elements of one JSON array.

    Paths are checked at once. Raises what `read_lines` raises, and DataError for what is not JSON or not of that kind.
    """
    check = checker(kind)
    sources = check_sources(paths)

    def records() -> Iterator[tuple[Place, dict[str, Any]]]:
        for source in sources:
            for place, line in _json_texts(source, max_line):
                yield place, check(decode(line, place), place)

    return records()


def _json_texts(source: str, max_line: int) -> Iterator[tuple[Place, bytes]]:
    """The JSON text of each record of one source."""
    name = display_name(source)
    blocks = without_bom(read_blocks(source), name)
    head = b""
    try:
        for block in blocks:
            head += block
            if not head.isspace() or len(head) > max_line:
                break
    except Damaged as e:
        raise DataError(str(e), name) from None
    blocks = chain([head], blocks) if head else iter(())
    return _elements(blocks, name, max_line) if head.lstrip()[:1] == b"[" else _split(blocks, name, max_line)


def _elements(blocks: Iterator[bytes], name: str, max_line: int) -> Iterator[tuple[Place, bytes]]:
    """JSON texts of the elements of one array. Holds one element; the text grows by doubling until it parses."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    scan = json.JSONDecoder().raw_decode
    text, at, number, ended = "", 0, 0, False
    opened = closed = False

    def more(size: int) -> None:
        """Read on until `size` characters lie after `at`, or the source ends."""
        nonlocal text, at, ended
        parts, have = [text[at:]], len(text) - at
        while have < size and not ended:
            block = next(blocks, None)
            ended = block is None
            parts.append(utf8.decode(block or b"", final=ended))
            have += len(parts[-1])
        text, at = "".join(parts), 0

    def mark() -> str:
        """The next character that is not white space, or nothing at the end."""
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or ended:
                return text[at : at + 1]
            more(1)

    def wrong(message: str) -> DataError:
        return DataError(message, name, Element(number))

    try:
        while not closed:
            if not opened:
                mark()
                at, opened = at + 1, True
                if mark() == "]":
                    closed, at = True, at + 1
                    break
            number += 1
            if mark() == "":
                raise wrong("the JSON array is not closed; the file is cut")
            while True:
                try:
                    end = scan(text, at)[1]
                    if end < len(text) or ended:
                        break
                except json.JSONDecodeError as e:
                    sure = e.pos < len(text) - 16 and not e.msg.startswith(("Unterminated", "Invalid \\"))
                    if sure or ended:
                        raise wrong(f"is not JSON ({e.msg[0].lower()}{e.msg[1:]})") from None
                except RecursionError:
                    raise wrong("is nested too deeply") from None
                if len(text) - at > max_line:
                    raise wrong(f"longer than {max_line:,} bytes; --max-line allows more")
                more(2 * (len(text) - at) + 1)
            yield Place(name, Element(number)), text[at:end].encode("utf-8", "surrogatepass")
            at = end
            follows = mark()
            at += 1
            if follows not in (",", "]"):
                raise wrong(
                    "is not followed by a comma or the end of the array"
                    if follows
                    else "the JSON array is not closed; the file is cut"
                )
            closed = follows == "]"
        if mark() != "":
            raise DataError("something follows the end of the JSON array", name)
    except UnicodeDecodeError as e:
        raise wrong(f"is not UTF-8 ({e.reason})") from None
    except Damaged as e:
        raise wrong(str(e)) from None


_SPACE = re.compile(r"[ \t\r\n]*")
_KEY_COLON = re.compile(rb'"[ \t\r]*:')
_decode = msgspec.json.Decoder().decode


def decode(line: bytes, place: Place) -> Any:
    """The value of a JSON text. Raises DataError for what is not JSON, not UTF-8, nested too deeply, or names a key twice."""
    try:
        value = _decode(line)
        if len(_KEY_COLON.findall(line)) != _n_keys(value):
            _refuse_twice(line, place)
        return value
    except RecursionError:
        raise DataError("is nested too deeply", *place) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(_why_not_json(line, e), *place) from None


def _n_keys(value: Any) -> int:
    """Keys in all objects of a decoded value."""
    n = 0
    if isinstance(value, dict):
        n = len(value)
        for v in value.values():
            if v.__class__ is list or v.__class__ is dict:
                n += _n_keys(v)
    elif isinstance(value, list):
        for v in value:
            if v.__class__ is list or v.__class__ is dict:
                n += _n_keys(v)
    return n


def _refuse_twice(line: bytes, place: Place) -> None:
    """Raise DataError if an object of the line names a key twice: every decoder would silently keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(f'the field "{key}" is there twice', *place)
            seen.add(key)

    json.loads(line, object_pairs_hook=once)


def _why_not_json(line: bytes, error: Exception) -> str:
    """One phrase on what is wrong with a line that msgspec cannot decode."""
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        return f"is not UTF-8 (byte {line[e.start]:#04x} at {e.start + 1})"

    def constant(name: str) -> None:
        raise ValueError(f"holds {name}, which JSON has not; write null or leave it out")

    try:
        json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as e:
        if text.strip() in ("{", "["):
            return "is not one JSON object a line; jq -c . FILE puts each on its line"
        return f"is not JSON ({e.msg[0].lower()}{e.msg[1:]}, column {e.colno})"
    except ValueError as e:
        return str(e)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return f"holds a number that is out of range ({error})" if "range" in str(error) else f"is not JSON ({error})"


def read_texts(paths: Sequence[str | Path], *, max_line: int = MAX_LINE) -> Iterator[tuple[Place, str]]:
    """Lines of plain text. Raises what `read_lines` raises, and DataError for what is not UTF-8."""
    lines = read_lines(paths, max_line=max_line)
    return ((place, _utf8(line, place)) for place, line in lines)


def _utf8(line: bytes, place: Iterable[object]) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"is not UTF-8 (byte {line[e.start]:#04x} at {e.start + 1})", *place) from None


def read_whole_text(path: str | Path, *, max_bytes: int = MAX_TEXT) -> str:
    """A file (or "-") as one text, character for character; only a byte order mark is dropped.

    Raises DataError for an unreadable file, damaged data, more than `max_bytes`, or what is not UTF-8 (naming the line).
    """
    [source] = check_sources([path])
    name = display_name(source)
    parts, size = [], 0
    try:
        for block in without_bom(read_blocks(source), name):
            size += len(block)
            if size > max_bytes:
                raise DataError(f"holds more than {max_bytes:,} bytes; split it into documents", name)
            parts.append(block)
    except Damaged as e:
        raise DataError(str(e), name) from None
    data = b"".join(parts)
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"is not UTF-8 (byte {data[e.start]:#04x})", name, line) from None


def some(items: Iterable[T], paths: Sequence[str | Path], what: str = "records") -> Iterator[T]:
    """The same items, seen to be at least one: the first is read now. Raises DataError when there are none."""
    iterator = iter(items)
    first = list(islice(iterator, 1))
    if not first:
        raise DataError(f"holds no {what}", ", ".join(display_name(p) for p in paths) or "stdin")
    return chain(first, iterator)


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
