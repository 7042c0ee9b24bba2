"""Obedience to an instruction by turn (Table 30 of Llama 2), and the attention that is paid to it (Fig. 10).

Shares are of answers; an instruction was obeyed in a turn or was not. Their intervals are Wilson's. Where a dialogue
has several answers in a share (more instructions, more samples, more turns) these are not independent: the interval is
Wilson's with the effective number of answers, n / deff, where deff is the variance of the share between dialogues over
what independent answers would have (Korn and Graubard, 1998; Dean and Pagano, 2015, find Wilson's form of it the best).
They speak of other dialogues with the same instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama2cli.measure.flow import Table
from llama2cli.measure.intervals import Estimate, mean
from llama2cli.measure.rates import Rate, interval, metric, percent, wilson
from llama2cli.text.records import Record

LATER = 0  # in place of a turn: all turns after the first, in which the instruction stands
SPLITS = ("", "trained", "unseen")
NAMES = {
    "": "all instructions",
    "trained": "instructions seen in training",
    "unseen": "instructions not seen in training",
}
Key = tuple[str, str, int]  # split, kind ("" is every kind), turn


# --- obedience ----------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """k of n answers of c dialogues, with the sums over dialogues that the variance between them wants."""

    k: int = 0
    n: int = 0
    c: int = 0
    kk: int = 0
    kn: int = 0
    nn: int = 0

    def add(self, k: int, n: int) -> None:
        """One dialogue more: k of its n answers."""
        self.k, self.n, self.c = self.k + k, self.n + n, self.c + 1
        self.kk, self.kn, self.nn = self.kk + k * k, self.kn + k * n, self.nn + n * n

    def effective(self) -> int:
        """How many independent answers would tell as much: n where each dialogue has one, else n / deff.

        At least 1 and at most n. Where all answers are alike their variance says nothing: the number of dialogues.
        """
        if self.n == self.c:
            return self.n
        p = self.k / self.n
        if p in (0, 1) or self.c < 2:
            return self.c
        between = (self.kk - 2 * p * self.kn + p * p * self.nn) * self.c / (self.c - 1)  # sum of (k - p n)^2
        return max(1, min(self.n, int(p * (1 - p) * self.n**2 / between))) if between > 1e-9 else self.n

    def rate(self) -> Rate:
        """The share with its interval. Raises ValueError for no answers."""
        n = self.effective()
        low, high = wilson(min(n, self.k / self.n * n), n)
        return {"value": self.k / self.n, "n": self.n, "low": low, "high": high}


class Judged(NamedTuple):
    """One roll-out: the kind of its instruction, whether it was seen in training (None: not known), each turn."""

    kind: str
    trained: bool | None
    obeyed: Sequence[bool]


@dataclass
class Obedience:
    """The shares of one model."""

    shares: dict[Key, Share] = field(default_factory=dict)

    def add(self, rolled: Sequence[Judged]) -> None:
        """All roll-outs of one dialogue."""
        sums: dict[Key, list[int]] = {}
        for judged in rolled:
            splits = ["", *([] if judged.trained is None else [SPLITS[1] if judged.trained else SPLITS[2]])]
            for turn, obeyed in enumerate(judged.obeyed, start=1):
                for split in splits:
                    for kind in ("", judged.kind):
                        for when in (turn, LATER) if turn > 1 else (turn,):
                            k_n = sums.setdefault((split, kind, when), [0, 0])
                            k_n[0] += bool(obeyed)
                            k_n[1] += 1
        for key, (k, n) in sums.items():
            self.shares.setdefault(key, Share()).add(k, n)

    def state(self) -> list[list[Any]]:
        """As JSON holds it."""
        return [[*key, *vars(share).values()] for key, share in self.shares.items()]

    @classmethod
    def of_state(cls, state: Sequence[Sequence[Any]]) -> Obedience:
        """From what `state` gave."""
        return cls({(row[0], row[1], row[2]): Share(*row[3:]) for row in state})

    def kinds(self) -> list[str]:
        """The kinds of instructions, in the order of the first of each."""
        return list(dict.fromkeys(kind for _, kind, _ in self.shares if kind))

    def turns(self) -> int:
        """The last turn that has an answer."""
        return max((turn for _, _, turn in self.shares), default=0)

    def rate(self, split: str = "", kind: str = "", turn: int = LATER) -> Rate | None:
        """One share, None where there are no answers."""
        share = self.shares.get((split, kind, turn))
        return share.rate() if share else None


def records(model: str, obedience: Obedience) -> Iterator[Record]:
    """Metric records: gatt.obedience by turn and gatt.later (all turns after the first), by kind too, each also as
    .trained and .unseen where that is known. One kind alone is not told twice."""
    several = len(obedience.kinds()) > 1
    for (split, kind, turn), share in sorted(obedience.shares.items(), key=lambda item: _order(item[0], obedience)):
        if kind and not several:
            continue
        name = ".".join(filter(None, ["gatt", "later" if turn == LATER else "obedience", split]))
        yield metric(name, share.rate(), model=model, turn=turn or None, category=kind or None)


def _order(key: Key, obedience: Obedience) -> tuple[int, int, bool, int]:
    split, kind, turn = key
    kinds = ["", *obedience.kinds()]
    return SPLITS.index(split), kinds.index(kind), turn == LATER, turn


def shown_turns(last: int) -> list[int]:
    """The turns of a table: 1, the even ones, and the last (Table 30 has 2, 4, 6, 20)."""
    return [t for t in range(1, last + 1) if t in (1, last) or t % 2 == 0]


def tables(models: Mapping[str, Obedience]) -> list[Table]:
    """A table for each split, a row for each turn, the models side by side; then the kinds, where there are several."""
    splits = [s for s in SPLITS if any(s == key[0] for o in models.values() for key in o.shares)]
    if len(splits) == 2:  # all are trained, or all unseen: the same numbers twice
        splits = splits[1:]
    made = []
    for split in splits:
        last = max(o.turns() for o in models.values())
        rows = [_row(f"{t}", [o.rate(split, "", t) for o in models.values()]) for t in shown_turns(last)]
        if last > 1:
            rows.append(_row("2 and later", [o.rate(split) for o in models.values()]))
        made.append((f"obeyed %, {NAMES[split]}", ["turn", "answers", *models], rows))
        kinds = list(dict.fromkeys(kind for o in models.values() for kind in o.kinds()))
        if len(kinds) > 1 and last > 1:
            rows = [_row(kind, [o.rate(split, kind) for o in models.values()]) for kind in kinds]
            made.append((f"obeyed % from turn 2 on, {NAMES[split]}", ["kind", "answers", *models], rows))
    return made


def _row(name: str, rates: Sequence[Rate | None]) -> list[str]:
    """A row with the numbers of answers, of each model where they differ."""
    ns = list(dict.fromkeys(f"{rate['n']:,}" if rate else "0" for rate in rates))
    cells = [f"{percent(rate)} ({interval(rate)})" if rate else "-" for rate in rates]
    return [name, "/".join(ns), *cells]


# --- attention ----------------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Neighbouring tokens begin..end of one part of a dialogue (see `sampling.attention.Part`)."""

    turn: int
    part: str
    begin: int
    end: int


def bins_of(parts: Sequence[tuple[int, str, int, int]], size: int) -> list[Bin]:
    """The parts, which follow each other, in bins of `size` tokens; a bin holds tokens of one part."""
    return [
        Bin(turn, name, at, min(at + size, end)) for turn, name, begin, end in parts for at in range(begin, end, size)
    ]


def binned(weights_TT: np.ndarray, bins: Sequence[Bin]) -> np.ndarray:
    """The largest weight between the tokens of two bins, [N, N]: row query, column key. The bins cover the tokens."""
    starts = [b.begin for b in bins]
    return np.maximum.reduceat(np.maximum.reduceat(weights_TT, starts, axis=0), starts, axis=1)


def attention_records(
    weights_TT: np.ndarray, parts: Sequence[tuple[int, str, int, int]], size: int
) -> Iterator[dict[str, Any]]:
    """A record for each answered turn of a dialogue.

    weights_TT: the largest over layers and heads, row query, column key. attention: the mean over the tokens of the
    answer of the largest weight to a token of the instruction, where a token's query is that which predicted it;
    largest: the largest of these. bins: [turn, part, first token, token after the last], of all that the answer could
    see and itself. map: for each bin of the answer the largest weight to each of these bins, four digits.
    """
    bins = bins_of(parts, size)
    whole = binned(weights_TT, bins)
    instruction = next(slice(begin, end) for _, name, begin, end in parts if name == "instruction")
    for turn, name, begin, end in parts:
        if name != "answer":
            continue
        paid = weights_TT[begin - 1 : end - 1, instruction].max(1)
        rows = [i for i, b in enumerate(bins) if (b.turn, b.part) == (turn, "answer")]
        seen = rows[-1] + 1
        yield {
            "turn": turn,
            "attention": float(paid.mean()),
            "largest": float(paid.max()),
            "bin": size,
            "bins": [list(b) for b in bins[:seen]],
            "map": [[round(float(x), 4) for x in whole[i, :seen]] for i in rows],
        }


@dataclass
class Attention:
    """By turn what each dialogue paid to its instruction, and the map of the first of the longest, a row for a turn."""

    paid: dict[int, list[float]] = field(default_factory=dict)
    bins: list[list[Any]] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    obeyed: list[bool] = field(default_factory=list)

    def add(self, turns: Sequence[Record], obeyed: Sequence[bool]) -> None:
        """The records of one dialogue."""
        for record in turns:
            self.paid.setdefault(record["turn"], []).append(record["attention"])
        if len(turns) > len(self.rows):
            self.bins, self.obeyed = turns[-1]["bins"], list(obeyed[: len(turns)])
            self.rows = [np.max(record["map"], 0).tolist() for record in turns]

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "paid": [[turn, values] for turn, values in self.paid.items()]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Attention:
        """From what `state` gave."""
        return cls(**{**state, "paid": dict(state["paid"])})


def attention_metrics(model: str, attention: Attention) -> Iterator[Record]:
    """Metric records: gatt.attention by turn, the mean over dialogues."""
    for turn, values in sorted(attention.paid.items()):
        yield mean_weight(values).record("gatt.attention", model=model, turn=turn)


def mean_weight(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval, which ends where weights do."""
    found = mean(values)
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))


def attention_table(models: Mapping[str, Attention]) -> Table:
    """A row for each turn, the models side by side."""
    rows = []
    for turn in shown_turns(max(turn for a in models.values() for turn in a.paid)):
        cells, ns = [], []
        for a in models.values():
            estimate = mean_weight(a.paid[turn]) if turn in a.paid else None
            spread = f" ({estimate.low:.2f}-{estimate.high:.2f})" if estimate and estimate.low is not None else ""
            cells.append(f"{estimate.value:.3f}{spread}" if estimate else "-")
            ns.append(f"{estimate.n}" if estimate else "0")
        rows.append([f"{turn}", "/".join(dict.fromkeys(ns)), *cells])
    return "attention of answers to the instruction", ["turn", "dialogues", *models], rows


SHADES = " \u2591\u2592\u2593\u2588"


def picture(attention: Attention, width: int = 64) -> list[str]:
    """Lines of characters, one for each turn: what its answer attends to, from the instruction on the left on.

    Columns are bins, several to a column where they are more than `width`; darker is more, in steps of 0.2. A line over
    them marks the instruction (i), users (u) and answers (a). "x" behind the number of a turn: it disobeyed.
    """
    bins = attention.bins
    per = -(-len(bins) // width)
    groups: list[list[int]] = []
    for i, b in enumerate(bins):  # bins of one part alone stand together
        if groups and len(groups[-1]) < per and bins[groups[-1][-1]][:2] == b[:2]:
            groups[-1].append(i)
        else:
            groups.append([i])
    marks = "".join({"start": " ", "instruction": "i", "user": "u", "answer": "a"}[bins[g[0]][1]] for g in groups)
    lines = [" " * 6 + marks]
    for turn, (row, obeyed) in enumerate(zip(attention.rows, attention.obeyed), start=1):
        values = [max((row[i] for i in g if i < len(row)), default=0.0) for g in groups]
        shades = "".join(SHADES[min(4, int(v * 5))] for v in values).rstrip()
        lines.append(f"{turn:4d}{' ' if obeyed else 'x'} {shades}")
    return lines


# --- one model ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What is known of one model: it goes into the journal."""

    obedience: Obedience
    attention: Attention
    dialogues: int = 0
    rolled: int = 0
    answers: int = 0
    cut: int = 0

    @classmethod
    def start(cls, state: dict[str, Any] | None) -> Found:
        """Nothing yet, or what an earlier process had found."""
        if state is None:
            return cls(Obedience(), Attention())
        known = {
            "obedience": Obedience.of_state(state["obedience"]),
            "attention": Attention.of_state(state["attention"]),
        }
        return cls(**{**state, **known})

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "obedience": self.obedience.state(), "attention": self.attention.state()}

    def records(self, model: str) -> Iterator[Record]:
        """Its metric records."""
        yield from records(model, self.obedience)
        yield from attention_metrics(model, self.attention)

    def told(self, model: str, drawn: str) -> str:
        """A closing line; what is 0 is not told. drawn: what is said of the answers, "" without any."""
        times = f" answered {self.rolled:,} times" if self.rolled > self.dialogues else ""
        parts = [f"{model}: {self.dialogues:,} dialogues{times}, {self.answers:,} answers judged", drawn]
        if self.cut:
            parts.append(f"{self.cut:,} times cut at a turn boundary: the context ends")
        return "; ".join(filter(None, parts))
