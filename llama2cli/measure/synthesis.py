"""What became of the dialogues that Ghost Attention is trained on (Llama 2, section 3.3): counts, a table, a line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llama2cli.measure.flow import Table


@dataclass
class Kind:
    """What became of the constraints of one kind."""

    drawn: int = 0  # dialogues
    kept: int = 0  # records
    shortened: int = 0  # of these records
    checked: int = 0  # answers
    obeyed: int = 0  # of these answers


@dataclass
class Counts:
    """What is told at the end, over all processes of a run: a journal holds it."""

    dialogues: int = 0
    turns: int = 0
    few: int = 0
    cut: int = 0
    unanswered: int = 0
    truncated: int = 0
    empty: int = 0
    broken: int = 0
    poor: int = 0
    kept: int = 0
    shortened: int = 0
    combined: int = 0
    scored: int = 0
    forgot: int = 0
    kinds: dict[str, Kind] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)  # the mask report

    @classmethod
    def start(cls, state: dict[str, Any] | None) -> Counts:
        """Nothing yet, or what an earlier process had counted."""
        if state is None:
            return cls()
        return cls(**{**state, "kinds": {name: Kind(**kind) for name, kind in state["kinds"].items()}})

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "kinds": {name: vars(kind) for name, kind in self.kinds.items()}}

    def table(self) -> Table:
        """A row for each kind of constraint."""
        rows = []
        for name, kind in self.kinds.items():
            short = f"{100 * kind.shortened / kind.kept:.1f}" if kind.kept else ""
            obeyed = f"{100 * kind.obeyed / kind.checked:.1f}" if kind.checked else ""
            rows.append([name, f"{kind.drawn:,}", f"{kind.kept:,}", short, f"{kind.checked:,}", obeyed])
        return "", ["constraints", "dialogues", "records", "short %", "answers checked", "obeyed %"], rows

    def told(self, min_turns: int) -> str:
        """The closing line; what is 0 is not told."""
        parts = [f"{self.dialogues:,} dialogues, {self.turns:,} turns answered, {self.kept:,} records"]
        if self.kept:
            parts.append(f"{self.shortened:,} shortened ({self.shortened / self.kept:.1%})")
        more = [
            (self.combined, "dialogues with a combination"),
            (self.cut, "dialogues cut at a turn boundary: the context ends"),
            (self.few, f"left out: fewer than {min_turns} turns"),
            (self.unanswered, "left out: no turn fits into the context"),
            (self.truncated, "records left out: the trained answer was cut (--keep-truncated keeps such)"),
            (self.empty, "records left out: the trained answer is empty"),
            (self.broken, "records left out: an answer disobeys"),
            (self.poor, "records left out by the reward model"),
            (self.forgot, "scored without their first turns, which the reward model's context does not hold"),
        ]
        return "; ".join(parts + [f"{n:,} {what}" for n, what in more if n])
