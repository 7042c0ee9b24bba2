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
from collections.abc import Callable, Iterable, Iterator, Sequence

from llama2cli.text.sentencepiece_proto import BPE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Spec

MARK = "\u2581"  # SentencePiece's space
MAX_ENTRIES = 1 << 19  # about 110 MB of cache, then it starts again
MAX_CHARS = 1 << 24  # keys of text without spaces are long
GROUP = 64  # unseen segments that are encoded in one call
BLOCK = 1 << 18  # characters that are cut into segments at once

cut = re.compile(r"[ \n]*[^ \n]+|[ \n]+").findall


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


def separator(spec: Spec) -> tuple[str, int] | None:
    """A control character that no piece holds, and the id of its byte: it joins unseen segments in one call."""
    ids = {p.text: i for i, p in enumerate(spec.pieces)}
    texts = "".join(p.text for p in spec.pieces if p.kind != CONTROL)
    for code in range(32):
        if chr(code) not in texts and chr(code) != "\n" and f"<0x{code:02X}>" in ids:
            return chr(code), ids[f"<0x{code:02X}>"]
    return None


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """Cut a long text at newlines, or before spaces, into parts of about `size` characters whose ids join exactly."""
    start = 0
    while len(text) - start > size:
        at = text.rfind("\n", start + 1, start + size)
        if at < 0:
            at = text.rfind(" ", start + 1, start + size)
            while at > start and text[at - 1] == " ":
                at -= 1
        if at <= start:  # one enormous word
            found = [i for i in (text.find("\n", start + size), text.find(" ", start + size)) if i >= 0]
            if not found:
                break
            at = min(found)
            while at > start and text[at - 1] == " ":
                at -= 1
        if at <= start:
            break
        yield text[start:at]
        start = at
    yield text[start:]


class _Words(dict[str, bytes]):
    """segment -> packed ids; an unseen one is noted and counts as nothing, until the whole batch is encoded."""

    def __init__(self) -> None:
        self.unseen: list[str] = []

    def __missing__(self, segment: str) -> bytes:
        self.unseen.append(segment)
        return b""


class SegmentCache:
    """Packed ids of texts. `encode` is SentencePiece without the dummy prefix, over a list of strings."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], separator: tuple[str, int], code: str) -> None:
        self.encode, self.code = encode, code
        self.separator, self.separator_id = separator
        self.after_space = _Words()  # "word" stands for " word", "\nword" for itself
        self.literal = _Words()
        self.chars = 0

    def pack(self, texts: Iterable[str]) -> list[bytes]:
        """Ids of each text as native-endian integers of `code` ("H" or "I")."""
        return [b"".join(self._text(text)) if text else b"" for text in texts]

    def _text(self, text: str) -> Iterator[bytes]:
        if MARK in text:
            text = text.replace(MARK, " ")
        for i, part in enumerate(blocks(text)):
            yield self._part(part, first=i == 0)

    def _part(self, part: str, first: bool) -> bytes:
        """A part that is not the first begins with a space or a newline; the first gets the dummy prefix."""
        if "  " not in part and not (first and part[0] == " "):
            words, segments = self.after_space, part.replace("\n", " \n").split(" ")
            if not first:
                del segments[0]  # empty: what stands before the first space
        else:
            words, segments = self.literal, cut(" " + part if first else part)
        packed = b"".join(map(words.__getitem__, segments))
        while words.unseen:  # once, or twice where the cache was full
            self._learn(words)
            packed = b"".join(map(words.__getitem__, segments))
        return packed

    def _learn(self, words: _Words) -> None:
        """Encode what was unseen, many segments in one string: SentencePiece's cost is by call more than by byte."""
        new = list(dict.fromkeys(words.unseen))
        words.unseen.clear()
        texts = [s if words is self.literal or s[:1] == "\n" else " " + s for s in new]
        size = sum(map(len, texts))
        if len(self.literal) + len(self.after_space) + len(new) > MAX_ENTRIES or self.chars + size > MAX_CHARS:
            self.literal.clear()
            self.after_space.clear()
            self.chars = 0
        self.chars += size
        alone = [i for i, t in enumerate(texts) if self.separator in t]
        together = [i for i, t in enumerate(texts) if self.separator not in t]
        for i, ids in zip(alone, self.encode([texts[i] for i in alone])):
            words[new[i]] = array(self.code, ids).tobytes()
        groups = [together[i : i + GROUP] for i in range(0, len(together), GROUP)]
        joined = self.encode([self.separator.join(texts[i] for i in g) for g in groups])
        for group, ids in zip(groups, joined):
            ids.append(self.separator_id)
            at = 0
            for i in group:
                end = ids.index(self.separator_id, at)
                words[new[i]] = array(self.code, ids[at:end]).tobytes()
                at = end + 1


def unpack(packed: bytes, code: str) -> Sequence[int]:
    """The ids of one packed text."""
    return memoryview(packed).cast(code).tolist()
