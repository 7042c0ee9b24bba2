"""Bytes in: files and stdin, plain, zstd or gzip by content, in blocks of at most 1 MiB of decompressed data.

A bomb of 32,000 : 1 costs its reader one block of memory. Compressed data that are cut are told from whole ones:
python-zstandard's stream reader returns what it has when a file ends inside a frame, and says nothing.
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
ZSTD_WINDOW = 1 << 27  # what the zstd program itself accepts without --long
ZSTD_MAGIC, GZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
SKIPPABLE = tuple(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))  # zstd frames without data
UTF8_BOM = b"\xef\xbb\xbf"
FOREIGN = {
    b"\xff\xfe": "UTF-16, not UTF-8; convert it (iconv -t UTF-8)",
    b"\xfe\xff": "UTF-16, not UTF-8; convert it (iconv -t UTF-8)",
    b"\xfd7zXZ\0": "xz data; plain text, zstd and gzip are read",
    b"BZh91AY": "bzip2 data; plain text, zstd and gzip are read",
    b"PK\x03\x04": "a zip archive; plain text, zstd and gzip are read",
    b"PAR1\x15": "a Parquet file; JSON lines are expected",
    b"ARROW1\0\0": "an Arrow file; JSON lines are expected",
}
LONGEST = max(map(len, FOREIGN))


class Damaged(Exception):
    """The compressed data are cut or corrupt; the caller knows the file and the line."""


# --- which sources ------------------------------------------------------------------------------------------------


def display_name(path: str | Path) -> str:
    """What a source is called in messages: "stdin" for "-"."""
    return "stdin" if str(path) == "-" else str(path)


def check_sources(paths: Sequence[str | Path]) -> list[str]:
    """The sources to read, seen to be there: `paths`, or ["-"] when there are none and stdin is no terminal.

    Raises Misuse when there is nothing to read or a source is named twice, DataError for a file that is missing, is a
    folder, or may not be read.
    """
    sources = [str(p) for p in paths]
    if not sources:
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise Misuse('no input: name a file, or pipe one in ("-" reads from the terminal)')
        sources = ["-"]
    seen: dict[object, str] = {}
    for source in sources:
        identity = _identity(source)
        if identity in seen:
            other = display_name(seen[identity])
            raise Misuse(
                "is given twice" + (f' (it is "{other}")' if other != display_name(source) else ""),
                display_name(source),
            )
        if identity is not None:
            seen[identity] = source
    return sources


def _identity(source: str) -> object:
    """What makes two names one input: device and inode, or "-"; None for pipes. Raises DataError if it is no file."""
    try:
        status = os.fstat(sys.stdin.fileno()) if source == "-" else os.stat(source)  # noqa: PTH116
    except FileNotFoundError:
        raise DataError(f"no such file{_neighbour(Path(source))}", source) from None
    except (OSError, ValueError, AttributeError) as e:
        if source == "-":  # a stdin without a descriptor, as tests and notebooks have
            return "-"
        raise DataError(f"cannot be read ({getattr(e, 'strerror', e)})", ascii(source)) from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError("is a folder; name the files in it", display_name(source))
    if source != "-" and not os.access(source, os.R_OK):
        raise DataError("cannot be read (Permission denied)", source)
    if stat.S_ISREG(status.st_mode):
        return status.st_dev, status.st_ino
    return "-" if source == "-" else None


def _neighbour(path: Path) -> str:
    """`; did you mean ...?` for the name in the same folder that is most like this one."""
    try:
        return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return f'; there is no folder "{path.parent}"'


# --- decompression ------------------------------------------------------------------------------------------------


def read_blocks(source: str | Path) -> Iterator[bytes]:
    """Decompressed data of a file or of stdin ("-") in non-empty blocks of at most `BLOCK` bytes, as they come.

    A UTF-8 byte order mark at the start is dropped with a warning. Raises Damaged for compressed data that are cut or
    corrupt, DataError for a file that cannot be read or is of a known foreign format (UTF-16, xz, Parquet, ...).
    """
    name = display_name(source)
    try:
        if str(source) == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise DataError("is closed", name)
            yield from _as_text(_decompress(sys.stdin.buffer), name)
        else:
            with Path(source).open("rb") as file:
                yield from _as_text(_decompress(file), name)
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror or e})", name) from None


class _Replay:
    """A file whose first bytes were read already. `read` returns what there is, without waiting for more."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self.head, self.file = head, file

    def read(self, size: int = BLOCK) -> bytes:
        if self.head:
            block, self.head = self.head[:size], self.head[size:]
            return block
        return self.file.read1(size)  # type: ignore[attr-defined]


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of the content of `file`, whatever its compression."""
    magics = (ZSTD_MAGIC, GZIP_MAGIC, *SKIPPABLE)
    head = b""
    while head not in magics and any(magic.startswith(head) for magic in magics):
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
        while block := source.read():
            yield block


def _gunzip(source: _Replay) -> Iterator[bytes]:
    """Blocks of gzip data of one or more members; zero bytes after the last are padding."""
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
            elif not held and not member.eof:
                held = source.read()
                if not held:
                    raise Damaged("the gzip data end too early; the file is cut")
        held = member.unused_data.lstrip(b"\0")
        while not held and (more := source.read()):
            held = more.lstrip(b"\0")


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
        reason = str(e).removeprefix("zstd decompress error: ")
        if "too much memory" in reason:
            raise Damaged("the zstd window is larger than 128 MiB; compress it again without --long") from None
        raise Damaged(f"the zstd data are damaged ({reason})") from None
    if frames.inside:
        raise Damaged("the zstd data end too early; the file is cut")


class _FrameWatch:
    """Passes zstd data on and follows the frames (RFC 8878, section 3.1), to know whether the data end inside one."""

    def __init__(self, source: _Replay) -> None:
        self.source = source
        self.held = b""  # of the header that is being read
        self.skip = 0  # bytes of block content or checksum still to come
        self.in_frame = self.checksum = False

    @property
    def inside(self) -> bool:
        return self.in_frame or self.skip > 0 or bool(self.held)

    def read(self, size: int = BLOCK) -> bytes:
        data = self.source.read(size)
        at = 0
        while at < len(data):
            if self.skip:
                step = min(self.skip, len(data) - at)
                self.skip -= step
            else:
                step = min(self._header_size() - len(self.held), len(data) - at)
                self.held += data[at : at + step]
                if len(self.held) == self._header_size():
                    self._enter(self.held)
                    self.held = b""
            at += step
        return data

    def _header_size(self) -> int:
        """Bytes of the header that is being read, as far as its beginning tells."""
        if self.in_frame:
            return 3  # of a block
        if self.held[:4] in SKIPPABLE:
            return 8
        if len(self.held) < 5:
            return 5
        descriptor = self.held[4]  # then follow window, dictionary id, content size
        single = descriptor >> 5 & 1
        return 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]

    def _enter(self, header: bytes) -> None:
        """Take in a whole header: what follows it, and what comes after that."""
        if self.in_frame:
            block = int.from_bytes(header, "little")
            last, kind, size = block & 1, block >> 1 & 3, block >> 3
            self.skip = (1 if kind == 1 else size) + (4 if last and self.checksum else 0)
            self.in_frame = not last
        elif header[:4] in SKIPPABLE:
            self.skip = int.from_bytes(header[4:], "little")
        else:
            self.in_frame, self.checksum = True, bool(header[4] & 4)


def _as_text(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The same blocks without a UTF-8 byte order mark at the start. Raises DataError for a foreign format."""
    head = b""
    while len(head) < LONGEST and any(magic.startswith(head) for magic in (UTF8_BOM, *FOREIGN)):
        block = next(blocks, b"")
        if not block:
            break
        head += block
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"is {what}", name)
    if head.startswith(UTF8_BOM):
        what = "a byte order mark at the start is dropped"
        console.warn(f"{name}: {what}", what)
        head = head.removeprefix(UTF8_BOM)
    return chain([head], blocks) if head else blocks
