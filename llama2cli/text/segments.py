"""The segment cache: the ids of SentencePiece BPE, several times faster, because most words were seen before.

Why it is exact. A BPE merge joins two neighbours only if together they are a piece. So where no piece holds the two
characters around a boundary side by side, no merge crosses it, and the text on either side can be encoded alone.
In a Llama vocabulary no piece has the space mark U+2581 after another character, and none has a newline: every text
may be cut before a run of spaces, and before and after a newline. `cuttable` checks this on the vocabulary itself.
User-defined symbols are matched before any merge, so with them the argument fails.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from llama2cli.text.sentencepiece_proto import BPE, NORMAL, UNUSED, USER_DEFINED, Spec

Code = Literal["H", "I"]  # of an array: ids of 2 or of 4 bytes
MARK = "\u2581"  # SentencePiece's space
RUN = "\1"  # stands for a second, third... space of a run; a part that holds it goes to SentencePiece whole
MAX_ENTRIES = 1 << 19  # about 110 MB, then the cache begins again
MAX_CHARS = 1 << 24  # of all keys: words are long where a language writes no spaces
BLOCK = 1 << 14  # characters cut into segments at once: they stay in the processor's cache
PENDING_SEGMENTS, PENDING_CHARS = 1 << 12, 1 << 20  # what is held back until its unseen segments are encoded together

later = re.compile(r"\n|(?<! ) ").search


def cuttable(spec: Spec) -> bool:
    """Whether every text may be cut before a run of spaces and around newlines without changing its ids."""
    changed = spec.charsmap or spec.remove_extra_whitespaces or spec.whitespace_as_suffix or not spec.escape_whitespaces
    mergeable = [p.text for p in spec.pieces if p.kind in (NORMAL, UNUSED)]
    return (
        spec.model_type == BPE
        and spec.byte_fallback
        and spec.add_dummy_prefix
        and not changed
        and not any(p.kind == USER_DEFINED for p in spec.pieces)
        and not any("\n" in text or " " in text or MARK in text.lstrip(MARK) for text in mergeable)
    )


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """Cut a text before newlines, or before runs of spaces, into parts of about `size` characters.

    The parts join to the text, and every part but the first begins with a newline or a space.
    """
    start = 0
    while len(text) - start > size:
        at = text.rfind("\n", start + 1, start + size)
        if at < 0:
            at = text.rfind(" ", start + 1, start + size)
            at = start + len(text[start:at].rstrip(" ")) if at > 0 else at
        if at <= start:  # one long word, or one long run of spaces
            found = later(text, start + size)
            at = found.start() if found else len(text)
        yield text[start:at]
        start = at
    if start < len(text):
        yield text[start:]


def segments(part: str) -> list[str]:
    """Cut a part that begins with a space or a newline. A segment "word" stands for " word", "\\nword" for itself.

    Newlines get a space before them, and the spaces of a run after its first become RUN; then one `split` does it.
    """
    if "  " in part:
        part = part.replace("  ", " " + RUN).replace(RUN + " ", RUN + RUN)
    found = part.replace("\n", " \n").split(" ")
    del found[0]
    return found


def literal(segment: str) -> str:
    """The text that a segment stands for."""
    return (segment if segment[:1] == "\n" else " " + segment).replace(RUN, " ")


class _Words(dict[str, bytes]):
    """segment -> packed ids; an unseen one is noted, and counts as nothing until it is encoded with the others."""

    def __init__(self) -> None:
        self.unseen: list[str] = []

    def __missing__(self, segment: str) -> bytes:
        self.unseen.append(segment)
        return b""


class SegmentCache:
    """Packed ids of texts, as native-endian integers of `code` ("H" or "I").

    encode: SentencePiece without the dummy prefix, from a list of strings to a list of lists of ids.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], code: Code) -> None:
        self.encode, self.code = encode, code
        self.words = _Words()
        self.chars = 0
        self.pending: list[tuple[list[bytes], int, list[str]]] = []  # (parts, which of them, its segments)

    def pack(self, texts: Sequence[str]) -> list[bytes]:
        """The packed ids of each text. Raises what `encode` raises, and can be used after that."""
        try:
            return self._pack(texts)
        except BaseException:
            self.pending.clear()
            self.words.unseen.clear()
            raise

    def _pack(self, texts: Sequence[str]) -> list[bytes]:
        out: list[list[bytes]] = []
        held = 0
        for text in texts:
            parts: list[bytes] = []
            out.append(parts)
            if not text:
                continue
            text = " " + (text.replace(MARK, " ") if MARK in text else text)
            for part in blocks(text):
                held += self._part(part, parts)
                if held > PENDING_CHARS or len(self.words.unseen) > PENDING_SEGMENTS:
                    self._settle()
                    held = 0
        self._settle()
        return [b"".join(parts) for parts in out]

    def _part(self, part: str, parts: list[bytes]) -> int:
        """Append a part's ids; return the characters held back because some of its segments are unseen."""
        if RUN in part:
            parts.append(self._packed([part])[0])
            return 0
        words, cut = self.words, segments(part)
        before = len(words.unseen)
        parts.append(b"".join(map(words.__getitem__, cut)))
        if len(words.unseen) == before:
            return 0
        self.pending.append((parts, len(parts) - 1, cut))
        return len(part)

    def _settle(self) -> None:
        """Encode the unseen segments in one call, then join what waited for them."""
        words = self.words
        if len(words) + len(words.unseen) > MAX_ENTRIES or self.chars > MAX_CHARS:
            words.clear()
            self.chars = 0
        self._learn()
        for parts, which, cut in self.pending:
            parts[which] = b"".join(map(words.__getitem__, cut))
            if words.unseen:  # they went when the cache was emptied
                self._learn()
                parts[which] = b"".join(map(words.__getitem__, cut))
        self.pending.clear()

    def _learn(self) -> None:
        new = list(dict.fromkeys(self.words.unseen))
        self.words.unseen.clear()
        if new:
            self.chars += sum(map(len, new))
            self.words.update(zip(new, self._packed([literal(s) for s in new])))

    def _packed(self, texts: list[str]) -> list[bytes]:
        return [array(self.code, ids).tobytes() for ids in self.encode(texts)]


def unpack(packed: bytes, code: Code) -> list[int]:
    """The ids of one packed text."""
    return memoryview(packed).cast(code).tolist()
