"""Bytes in: files and stdin, plain, zstd or gzip by content, in blocks of at most 1 MiB of decompressed data.

A bomb of 32,000 : 1 costs its reader one block of memory, and damage in the compressed data is told from its end:
python-zstandard's stream reader returns what it has when a file is cut inside a frame, and says nothing.
"""

from __future__ import annotations

import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean

BLOCK = 1 << 20
ZSTD_MAGIC, GZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
SKIPPABLE = tuple(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))  # zstd frames that hold no data
ZSTD_WINDOW = 1 << 27  # what the zstd program itself accepts without --long
UTF8_BOM = b"\xef\xbb\xbf"
WIDE_BOMS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGICS = (ZSTD_MAGIC, GZIP_MAGIC, *SKIPPABLE)


class Damaged(Exception):
    """The compressed data are cut or corrupt; the caller knows the file and the line."""


def display_name(path: str | Path) -> str:
    """How a source is called in messages: "stdin" for "-"."""
    return "stdin" if str(path) == "-" else str(path)


def check_sources(paths: Sequence[str | Path]) -> list[str]:
    """The sources to read, seen to be there: `paths`, or ["-"] when there are none and stdin is a pipe or a file.

    Raises Misuse when there is nothing to read or a source is named twice, DataError for a file that is missing, is a
    folder, or may not be read.
    """
    sources = [str(p) for p in paths]
    if not sources:
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise Misuse('no input: give a file, or "-" to read from the terminal, or pipe records in')
        sources = ["-"]
    seen: dict[object, str] = {}
    for source in sources:
        identity = _identity(source)
        if identity in seen:
            same = "" if seen[identity] == source else f' (it is "{seen[identity]}")'
            raise Misuse(f"is given twice{same}", display_name(source))
        if identity is not None:
            seen[identity] = source
    return sources


def _identity(source: str) -> object:
    """What makes two names one input: "-", or device and inode; None for pipes. Raises DataError if it cannot be read."""
    if source == "-":
        return "-"
    try:
        status = os.stat(source)  # noqa: PTH116
    except FileNotFoundError:
        raise DataError(f"no such file{_neighbour(source)}", source) from None
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", source) from None
    except ValueError:
        raise DataError("is not a file name", repr(source)) from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError("is a folder; name the files in it", source)
    if not os.access(source, os.R_OK):
        raise DataError("cannot be read (Permission denied)", source)
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _neighbour(source: str) -> str:
    """`; did you mean ...?` for the name in the same folder that is most like this one."""
    path = Path(source)
    try:
        close = did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return f'; there is no folder "{path.parent}"'
    return close


def read_blocks(source: str | Path) -> Iterator[bytes]:
    """Decompressed data of a file or of stdin ("-"), in non-empty blocks of at most `BLOCK` bytes, as they come.

    Raises Damaged for compressed data that are cut or corrupt, DataError for a file that cannot be read.
    """
    if str(source) == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise DataError("is closed", "stdin")
        yield from _decompress(sys.stdin.buffer)
        return
    try:
        with Path(source).open("rb") as file:
            yield from _decompress(file)
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror or e})", str(source)) from None


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of the content of `file`, whatever its compression."""
    head = b""
    while head not in MAGICS and any(magic.startswith(head) for magic in MAGICS):
        more = file.read1(BLOCK)  # type: ignore[attr-defined]
        if not more:
            break
        head += more
    source = _Replay(head, file)
    if head.startswith(GZIP_MAGIC):
        yield from _gunzip(source)
    elif head.startswith((ZSTD_MAGIC, *SKIPPABLE)):
        yield from _unzstd(source)
    else:
        while block := source.read(BLOCK):
            yield block


class _Replay:
    """A file whose first bytes were already read; `read` returns what there is, without waiting for more."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self.head, self.file = head, file

    def read(self, size: int = BLOCK) -> bytes:
        if self.head:
            block, self.head = self.head[:size], self.head[size:]
            return block
        return self.file.read1(size)  # type: ignore[attr-defined]

    def readable(self) -> bool:
        return True


def _gunzip(source: _Replay) -> Iterator[bytes]:
    """Blocks of gzip data of one or more members; zero bytes after the last member are padding."""
    held = source.read()
    while held:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                block = member.decompress(held, BLOCK)
            except zlib.error as e:
                raise Damaged(f"the gzip data are damaged ({str(e).split(': ')[-1]})") from None
            held = member.unconsumed_tail
            if block:
                yield block
            if not held and not member.eof:
                held = source.read()
                if not held and not member.decompress(b"", 1) and not member.eof:
                    raise Damaged("the gzip data end too early; the file is cut")
        held = member.unused_data.lstrip(b"\0") or source.read().lstrip(b"\0")


def _unzstd(source: _Replay) -> Iterator[bytes]:
    """Blocks of zstd data of one or more frames."""
    import zstandard

    frames = _FrameWatch(source)
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    reader = decompressor.stream_reader(frames, read_size=1 << 17, read_across_frames=True)  # type: ignore[arg-type]
    try:
        while block := reader.read1(BLOCK):
            yield block
    except zstandard.ZstdError as e:
        if "too much memory" in str(e):
            raise Damaged(
                "the zstd window is larger than 128 MiB; compress it again without --long or --ultra"
            ) from None
        raise Damaged(f"the zstd data are damaged ({str(e).removeprefix('zstd decompress error: ')})") from None
    if frames.inside:
        raise Damaged("the zstd data end too early; the file is cut")


class _FrameWatch:
    """Passes zstd data on and follows the frame format (RFC 8878, section 3.1), to know whether a frame is open."""

    def __init__(self, source: _Replay) -> None:
        self.source, self.held, self.skip = source, b"", 0
        self.state, self.checksum = "magic", False

    @property
    def inside(self) -> bool:
        """Whether the data so far end inside a frame."""
        return self.state != "magic" or self.skip > 0 or bool(self.held)

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(size)
        self._follow(data)
        return data

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self.skip:
                step = min(self.skip, len(data) - at)
                self.skip, at = self.skip - step, at + step
                continue
            need = self._need()
            take = data[at : at + need - len(self.held)]
            self.held, at = self.held + take, at + len(take)
            if len(self.held) == self._need():
                self._enter(self.held)
                self.held = b""

    def _need(self) -> int:
        """Bytes of the header that is being read: magic and frame descriptor, skippable size, or block header."""
        if self.state == "block":
            return 3
        if self.held[:4] in SKIPPABLE:
            return 8
        return 5 if len(self.held) < 5 else 5 + _header_rest(self.held[4])

    def _enter(self, header: bytes) -> None:
        if self.state == "block":
            value = int.from_bytes(header, "little")
            last, kind, size = value & 1, value >> 1 & 3, value >> 3
            self.skip = 1 if kind == 1 else size
            if last:
                self.state, self.skip = "magic", self.skip + 4 * self.checksum
        elif header[:4] in SKIPPABLE:
            self.skip = int.from_bytes(header[4:], "little")
        else:
            self.state, self.checksum = "block", bool(header[4] & 4)


def _header_rest(descriptor: int) -> int:
    """Bytes of a zstd frame header after its descriptor: window, dictionary id, content size."""
    single = descriptor >> 5 & 1
    return (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]


def without_bom(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The same blocks without a UTF-8 byte order mark at the start, which is dropped and counted.

    Raises DataError for UTF-16 and UTF-32.
    """
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 4:
            break
    for bom, encoding in WIDE_BOMS.items():
        if head.startswith(bom):
            raise DataError(f"is {encoding}, not UTF-8; convert it (iconv -f {encoding} -t UTF-8)", name)
    if head.startswith(UTF8_BOM):
        console.warn(f"{name}: a byte order mark at the start is dropped", "a byte order mark at the start is dropped")
        head = head.removeprefix(UTF8_BOM)
    return chain([head], blocks) if head else blocks
