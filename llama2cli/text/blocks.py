"""Bytes in: files and stdin, plain, zstd or gzip by content, in blocks of at most 1 MiB of decompressed data.

A bomb of 32,000 : 1 costs its reader one block of memory, and compressed data that are cut are told from whole ones.

zstd is Python 3.14's own module, or its backport: python-zstandard weighs 24 MB, and its stream reader returns what it
has when a file ends inside a frame, and says nothing.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean

BLOCK = 1 << 20
ZSTD_WINDOW_LOG = 27  # what the zstd program itself accepts without --long
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
    zstd = zstd_module()
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    held = source.read()
    while held:
        frame = zstd.ZstdDecompressor(options=options)
        while not frame.eof:
            try:
                block = frame.decompress(held, BLOCK)
            except zstd.ZstdError as e:
                if "too much memory" in str(e):
                    raise Damaged("the zstd window is larger than 128 MiB; compress it again without --long") from None
                raise Damaged(f"the zstd data are damaged ({str(e).split(': ')[-1]})") from None
            held = b""
            if block:
                yield block
            if frame.needs_input and not frame.eof:
                held = source.read()
                if not held:
                    raise Damaged("the zstd data end too early; the file is cut")
        held = frame.unused_data or source.read()


def zstd_module() -> Any:
    """`compression.zstd` of Python 3.14, or its backport."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return importlib.import_module(name)


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
