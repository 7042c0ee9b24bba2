"""Random numbers that are computed from a position, not drawn one after another: nothing to store, exact to resume."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

WORD = (1 << 64) - 1


def splitmix(state: Any) -> Any:
    """The output of SplitMix64 (Steele, Lea, Flood 2014) that follows a 64-bit state: an int, or a uint64 array."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def mix(*words: int) -> int:
    """A 64-bit number that looks random and depends on all words."""
    state = 0
    for word in words:
        state = splitmix(state ^ splitmix(word & WORD))
    return state


def shuffled(i: int, n: int, key: int) -> int:
    """Where i goes in a shuffle of range(n): a permutation that is computed, not stored.

    A Feistel network over the next power of four, walked until it falls below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(6):
            left, right = right, left ^ (mix(key, turn, right) & mask)
        i = left << half | right
        if i < n:
            return i


def name_key(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(sha256(name.encode()).digest()[:8], "big")
