"""Ghost Attention (Llama 2, section 3.3): dialogues that obey an instruction which stands in them once.

    sampled    inst + u1, a1, inst + u2, a2, ..., inst + un, an     the instruction in every user message: `augment`
    trained    inst + u1, a1, u2, a2, ..., un, AN                   in the first alone, the loss on AN alone: `rewrite`

"We can drop it in all but the first turn, but this would lead to a mismatch at training time between the system
message, i.e., all the intermediate assistant messages that come before the last turn, and our sample. To fix this issue
[...] we simply set the loss to 0 for all the tokens from the previous turns, including assistant messages."

Choices where the paper is silent:
1. The instruction stands before what the user said, with a blank line between (`BETWEEN`): in one place for all.
2. An instruction is one constraint, or with a probability a combination of 2 to `most` of different kinds, for two of a
   kind (two languages) would contradict each other. A kind is drawn first, then one of its constraints, so that a long
   list of hobbies does not crowd out the languages.
3. What is drawn for a dialogue depends on the seed, the dialogue and the sample number alone. Whether the instruction
   is shortened is drawn apart: another probability changes no constraint.
4. All records of one dialogue are shortened, or none: a split by prompt keeps them together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

Record = dict[str, Any]
Place = Literal["first", "system"]  # where the instruction stays
PLACES: tuple[Place, ...] = ("first", "system")
BETWEEN = "\n\n"  # an instruction, and the message that it stands in


# --- where an instruction stands ----------------------------------------------------------------------------------


def instructed(content: str, instruction: str) -> str:
    """A user's message with an instruction before it."""
    return f"{instruction}{BETWEEN}{content}"


def augment(messages: Sequence[Record], instruction: str) -> list[Record]:
    """The messages with the instruction in every user message: what the policy is shown when it answers."""
    return [
        {**m, "content": instructed(m["content"], instruction)} if m["role"] == "user" else dict(m) for m in messages
    ]


def keep_once(messages: Sequence[Record], instruction: str, place: Place = "first") -> list[Record]:
    """The messages with the instruction in the first user message alone, or in the system message.

    A system message that is there stands before it. Raises ValueError for another place, or without a user message.
    """
    if place not in PLACES:
        raise ValueError(f"expected one of {', '.join(PLACES)}, got {place}")
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise ValueError("a dialogue without a user message")
    made = [dict(m) for m in messages]
    if place == "first":
        made[first]["content"] = instructed(made[first]["content"], instruction)
    elif first == 0:
        made.insert(0, {"role": "system", "content": instruction})
    else:
        made[0]["content"] = f"{made[0]['content']}{BETWEEN}{instruction}"
    return made


# --- what is trained ----------------------------------------------------------------------------------------------


def weighted(messages: Sequence[Record]) -> list[Record]:
    """A dialogue that ends with an answer, of which that alone is trained: weight 1, and 0 for the answers before it.

    What the system and the users say is never trained. Raises ValueError for a dialogue that ends otherwise.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("expected a dialogue that ends with an answer")
    last = len(messages) - 1
    return [{**m, "weight": int(i == last)} if m["role"] == "assistant" else dict(m) for i, m in enumerate(messages)]


def prefixes(messages: Sequence[Record]) -> Iterator[list[Record]]:
    """The dialogue up to each of its answers, the shortest first."""
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            yield list(messages[: i + 1])


def rewrite(
    messages: Sequence[Record], instruction: str, *, place: Place = "first", expand: bool = False
) -> list[list[Record]]:
    """Dialogues to be trained, of one with the user messages as they were given and the sampled answers.

    instruction: as it is kept, shortened or not. One dialogue, which trains the last answer; with `expand` as many as
    there are answers, each of which trains its own last one. Raises as `keep_once` and `weighted` do.
    """
    chosen = list(prefixes(messages)) if expand else [list(messages)]
    return [weighted(keep_once(dialogue, instruction, place)) for dialogue in chosen]


def best_share(rewards: Sequence[float], share: float, before: int = 0) -> list[int]:
    """The indices of the best of a window, in order: as many as keep the share of all records so far.

    before: records of earlier windows, of which round(share * before) were kept. Of equal rewards the first is better.
    """
    n = round(share * (before + len(rewards))) - round(share * before)
    return sorted(sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[:n])


# --- which instruction --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a dialogue has to obey. constraints: their records. shortened: whether their short forms are kept."""

    constraints: tuple[Record, ...]
    shortened: bool

    @property
    def instruction(self) -> str:
        """As the policy is shown it, in every turn."""
        return combine([c["instruction"] for c in self.constraints])

    @property
    def kept(self) -> str:
        """As it stays in the dialogue that is trained."""
        return shorten(self.constraints) if self.shortened else self.instruction


def combine(sentences: Sequence[str]) -> str:
    """One instruction of several: sentences in a row. A single one is left as it is."""
    stripped = [s.strip() for s in sentences]
    if len(stripped) == 1:
        return stripped[0]
    return " ".join(s + "." if s[-1:].isalnum() else s for s in stripped)


def shorten(constraints: Sequence[Record]) -> str:
    """The instruction of constraints in their short forms ("Figure: Napoleon."); one without keeps its words."""
    return combine([c.get("short") or c["instruction"] for c in constraints])


def draw(
    constraints: Sequence[Record],
    *,
    seed: int,
    dialogue: str,
    sample: int = 0,
    combined: float = 0.5,
    most: int = 3,
    shortened: float = 0.5,
) -> Drawn:
    """The instruction of one dialogue.

    constraints: records with `kind`, `instruction` and perhaps `short`. dialogue: what names it (a hash of its
    prompts), sample: which of several instructions of it. combined: the probability of a combination, of 2 to `most`
    kinds, each number alike. shortened: the probability of the short form; an instruction that has none is not
    shortened. Raises ValueError without constraints.
    """
    if not constraints:
        raise ValueError("there are no constraints to draw from")
    kinds: dict[str, list[Record]] = {}
    for c in constraints:
        kinds.setdefault(c["kind"], []).append(c)
    rng = numbers("constraints", seed, dialogue, sample)
    several, amount = rng.random() < combined, rng.random()
    largest = min(most, len(kinds))
    n = 2 + int(amount * (largest - 1)) if several and largest > 1 else 1
    left = list(kinds.values())
    chosen = []
    for _ in range(n):
        of_kind = left.pop(int(rng.random() * len(left)))
        chosen.append(of_kind[int(rng.random() * len(of_kind))])
    short = numbers("shortened", seed, dialogue, sample).random() < shortened
    return Drawn(tuple(chosen), short and any(c.get("short") for c in chosen))


def numbers(what: str, *of: object) -> random.Random:
    """Random numbers that depend on these words alone. Only `random()` is used: Python keeps its sequence."""
    told = "\0".join(map(str, (what, *of))).encode()
    return random.Random(int.from_bytes(blake2b(told, digest_size=16).digest()))
