"""Where the parts of a dialogue stand among its tokens: the instruction, what users said, the answers.

For the attention that answers pay to an instruction, turn by turn (Llama 2, section 3.3, Fig. 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from llama2cli.text.chat import Tags, encode_conversation, escape
from llama2cli.text.records import Record
from llama2cli.text.tokenizer import Tokenizer


class Part(NamedTuple):
    """Tokens begin..end of a dialogue. turn: from 1. name: "start" (what stands before the instruction), "instruction",
    "user" (the rest of a user's turn, its tags too) or "answer" (with its closing space and EOS)."""

    turn: int
    name: str
    begin: int
    end: int


def dialogue_parts(
    tokenizer: Tokenizer, messages: Sequence[Record], instruction: str, context: int, *, tags: Tags = "escape"
) -> tuple[list[int], list[Part]] | None:
    """The ids of a dialogue that ends with an answer, up to the context, and its parts, which cover them in order.

    instruction: it stands in the first turn or the system message. None where it cannot be found among the tokens: with
    a tokenizer that writes a text otherwise than it is.
    """
    ids = encode_conversation(tokenizer, messages, tags=tags).ids
    ends = [
        len(encode_conversation(tokenizer, messages[: i + 1], tags=tags).ids)
        for i, m in enumerate(messages)
        if m["role"] != "system"
    ]
    found = span(tokenizer, ids[: ends[0]], instruction.strip() if tags == "keep" else escape(instruction.strip())[0])
    if found is None:
        return None
    begin, end = found
    parts = [Part(1, "start", 0, begin), Part(1, "instruction", begin, end), Part(1, "user", end, ends[0])]
    for number, (start, stop) in enumerate(pairwise(ends), start=1):
        parts.append(Part(number // 2 + 1, "user" if number % 2 == 0 else "answer", start, stop))
    clipped = [p._replace(end=min(p.end, context)) for p in parts if p.begin < min(p.end, context)]
    return ids[:context], clipped


def span(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> tuple[int, int] | None:
    """The first tokens that hold a text, a neighbour's letters perhaps with it; None where it does not stand there."""
    pieces = [tokenizer.id_to_bytes(i) for i in ids]
    at = b"".join(pieces).find(text.encode())
    if at < 0 or not text:
        return None
    ends = list(accumulate(map(len, pieces)))
    begin = next(i for i, end in enumerate(ends) if end > at)
    return begin, next(i for i, end in enumerate(ends) if end >= at + len(text.encode())) + 1
