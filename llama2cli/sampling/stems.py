"""Which prompts begin alike for so long that their beginning is computed once: a system prompt, an earlier dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llama2cli.nn.packing import common

LEAST = 32  # tokens of a stem
SPARED = 512  # tokens that a stem must spare: it costs a forward pass, and its prompts are run apart from others
MOST = 8  # stems at a time


class Stem(NamedTuple):
    """The first `length` tokens of several prompts, which are given by their numbers."""

    length: int
    members: list[int]

    @property
    def spared(self) -> int:
        """Tokens that need not be computed: those of all members but one."""
        return self.length * (len(self.members) - 1)


class Node:
    """A run of sorted prompts, `left` to the present one, that begin with the same `length` tokens; found: its best."""

    def __init__(self, length: int, left: int) -> None:
        self.length, self.left = length, left
        self.found: list[Stem] = []


def stems(prompts: Sequence[Sequence[int]]) -> list[Stem]:
    """Stems of different prompts, those that spare the most first; no prompt has two, each keeps a token of its own.

    Prompts that begin alike stand together when they are sorted. Of each run of them either the whole has one stem, or
    its parts, which are alike for longer, have theirs: whichever spares more.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    open_runs = [Node(0, 0)]
    for right in range(1, len(order) + 1):
        alike = common([prompts[order[right - 1]], prompts[order[right]]]) if right < len(order) else 0
        left = right - 1
        parts: list[Stem] = []
        while open_runs[-1].length > alike:  # these runs end before `right`
            node = open_runs.pop()
            whole = Stem(node.length, order[node.left : right])
            found = [*node.found, *parts]
            worth = whole.length >= LEAST and whole.spared >= SPARED
            parts = [whole] if worth and whole.spared >= sum(s.spared for s in found) else found
            left = node.left
        if open_runs[-1].length < alike:
            open_runs.append(Node(alike, left))
        open_runs[-1].found += parts
    return sorted(open_runs[0].found, key=lambda s: -s.spared)[:MOST]
