"""A reader of SentencePiece model files, in the standard library alone (`sentencepiece_model_pb2` would need protobuf).

The format is protocol buffers: sentencepiece's `src/sentencepiece_model.proto` gives the field numbers below.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class Spec:
    """What of a model file decides how text becomes ids."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    split_digits: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    whitespace_as_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number is longer than 64 bits")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) pairs of one message: integers, or the bytes of strings, messages and floats.

    Raises ValueError or IndexError for bytes that are no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - at:
            raise ValueError("cut short")
        yield number, data[at : at + size]
        at += size


def _last(message: list[tuple[int, int | bytes]], number: int, default: int) -> int:
    """The value of an integer field: the last one counts; 32-bit numbers are sign-extended to 64 bits."""
    values = [v for n, v in message if n == number and isinstance(v, int)]
    value = values[-1] if values else default
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def read(proto: bytes) -> Spec:
    """Parse the bytes of a `.model` file.

    Raises ValueError for bytes that are no SentencePiece model.
    """
    try:
        top = list(fields(proto))
        pieces = tuple(_piece(v) for n, v in top if n == 1 and isinstance(v, bytes))
        # a message field given twice is the merge of both, so joining the bytes is right
        trainer = list(fields(b"".join(v for n, v in top if n == 2 and isinstance(v, bytes))))
        normalizer = list(fields(b"".join(v for n, v in top if n == 3 and isinstance(v, bytes))))
    except (IndexError, struct.error, UnicodeDecodeError) as e:
        raise ValueError(str(e)) from None
    if not pieces:
        raise ValueError("no pieces")
    return Spec(
        pieces=pieces,
        model_type=_last(trainer, 3, UNIGRAM),
        byte_fallback=bool(_last(trainer, 35, 0)),
        split_digits=bool(_last(trainer, 25, 0)),
        unk_id=_last(trainer, 40, 0),
        bos_id=_last(trainer, 41, 1),
        eos_id=_last(trainer, 42, 2),
        pad_id=_last(trainer, 43, -1),
        whitespace_as_suffix=bool(_last(trainer, 24, 0)),
        charsmap=b"".join(v for n, v in normalizer if n == 2 and isinstance(v, bytes)),
        add_dummy_prefix=bool(_last(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_last(normalizer, 4, 1)),
        escape_whitespaces=bool(_last(normalizer, 5, 1)),
    )


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, body: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(body)) + body


def edit(proto: bytes, *, keep: list[int] | None = None, dummy_prefix: bool | None = None) -> bytes:
    """The same model with only the pieces `keep`, in that order, or with another add_dummy_prefix.

    A field given again at the end of a message replaces the one before; every model of ours and Meta's has both specs.
    """
    top = [(n, v) for n, v in fields(proto) if isinstance(v, bytes)]
    pieces = [v for n, v in top if n == 1]
    pieces = pieces if keep is None else [pieces[i] for i in keep]
    size = _number(4 << 3) + _number(len(pieces))
    prefix = b"" if dummy_prefix is None else _number(3 << 3) + _number(dummy_prefix)
    last = {2: b"" if keep is None else size, 3: prefix}
    others = (_message(n, v + last.get(n, b"")) for n, v in top if n != 1)
    return b"".join([*(_message(1, p) for p in pieces), *others])
