"""What sampling more, or hotter, is worth: reward by number of samples and by temperature (Figs. 7 and 8 of Llama 2).

All means are over prompts, which are drawn independently: an interval is the mean and 1.96 standard errors on either
side. Letters: P prompts, K samples of each at one temperature, N of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama2cli.measure.flow import Table
from llama2cli.measure.rates import Z, metric, rate
from llama2cli.text.records import Record

CURVES = ("max", "median", "gain")  # each has a point for N = 1..K; "mean" has one


class Point(NamedTuple):
    """A mean with its 95% interval, where there are two prompts."""

    value: float
    low: float | None
    high: float | None

    def shown(self) -> str:
        """ "1.234 ±0.100", for a table."""
        return f"{self.value:.3f}" + (f" ±{self.value - self.low:.3f}" if self.low is not None else "")

    def fields(self, n: int) -> Record:
        """Of a metric record over n prompts."""
        interval = {"low": self.low, "high": self.high} if self.low is not None else {}
        return {"value": self.value, "n": n, **interval}


@dataclass
class Spread:
    """Means and squared deviations of the numbers of rows [F] that come in batches (Chan et al. 1979)."""

    n: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(1))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, rows: np.ndarray) -> None:
        """Rows [m, F] more."""
        m = len(rows)
        if m:
            n, mean = self.n + m, rows.mean(0)
            gap = mean - self.mean
            self.squares = self.squares + np.square(rows - mean).sum(0) + gap * gap * self.n * m / n
            self.mean, self.n = self.mean + gap * m / n, n

    def points(self) -> list[Point]:
        """Each mean with its interval."""
        if self.n < 2:
            return [Point(value, None, None) for value in self.mean.tolist()]
        half = Z * np.sqrt(self.squares / (self.n - 1) / self.n)
        return [Point(*map(float, p)) for p in zip(self.mean, self.mean - half, self.mean + half)]


@dataclass
class Temperature:
    """The samples of one temperature. chosen: how often one of them was the best of all that competed.

    whole: the largest reward among those that were not cut, over the prompts that have such, where others are not kept.
    """

    temperature: float
    k: int
    answers: int = 0
    tokens: int = 0
    truncated: int = 0
    distinct: int = 0
    chosen: int = 0
    rewards: Spread = field(default_factory=Spread)
    whole: Spread = field(default_factory=Spread)

    def add(self, largest_PK: np.ndarray, median_PK: np.ndarray, mean_P: np.ndarray) -> None:
        """The rewards of more prompts: the expected largest and median of N = 1..K of their samples, and their mean."""
        self.rewards.add(np.concatenate([largest_PK, median_PK, largest_PK - median_PK, mean_P[:, None]], 1))

    def see(self, samples: Sequence[Record], rewards: Sequence[float], *, whole: bool) -> None:
        """The samples of one prompt more. whole: those that were cut are not kept."""
        self.answers += len(samples)
        self.tokens += sum(s["n_tokens"] for s in samples)
        self.truncated += sum(s["truncated"] for s in samples)
        self.distinct += len({s["messages"][-1]["content"] for s in samples})
        uncut = [reward for reward, s in zip(rewards, samples) if not s["truncated"]]
        if uncut and whole:
            self.whole.add(np.array([[max(uncut)]]))

    def curves(self) -> dict[str, list[Point]]:
        """By name, for N = 1..K; gain is max less median, what fine-tuning on the best can gain (Fig. 7)."""
        points = self.rewards.points()
        return {name: points[i * self.k : (i + 1) * self.k] for i, name in enumerate(CURVES)} | {"mean": points[-1:]}

    def state(self) -> dict[str, Any]:
        """As JSON holds it, every digit kept."""
        spreads = {name: getattr(self, name) for name in ("rewards", "whole")}
        told = {k: {name: np.asarray(value).tolist() for name, value in vars(s).items()} for k, s in spreads.items()}
        return {**vars(self), **told}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Temperature:
        """From what `state` gave."""
        told = {name: state[name] for name in ("rewards", "whole")}
        spreads = {k: Spread(t["n"], np.array(t["mean"]), np.array(t["squares"])) for k, t in told.items()}
        return cls(**{**state, **spreads})


def records(heat: Sequence[Temperature], kept: int, **groups: Any) -> Iterator[Record]:
    """Metric records: the curves by temperature and k, the best that was not cut, shares of truncated, distinct and
    chosen answers.

    kept: prompts of which an answer was kept.
    """
    for t in heat:
        if not t.rewards.n:
            continue
        for name, curve in t.curves().items():
            for n, point in enumerate(curve, start=1):
                by = {"temperature": t.temperature, **({"k": n} if name in CURVES else {})}
                yield {"measure": f"reward.{name}", **point.fields(t.rewards.n), **by, **groups}
        by = {"temperature": t.temperature, **groups}
        if t.whole.n:
            yield {"measure": "reward.whole", **t.whole.points()[0].fields(t.whole.n), **by}
        yield metric("samples.truncated", rate(t.truncated, t.answers), **by)
        yield {"measure": "samples.distinct", "value": t.distinct / t.answers, "n": t.answers, **by}
        if kept:
            yield metric("samples.chosen", rate(t.chosen, kept), **by)


def tables(heat: Sequence[Temperature], kept: int) -> list[Table]:
    """For a person; none where nothing was sampled."""
    return [by_temperature(heat, kept), by_number(heat)] if heat[0].rewards.n else []


def by_temperature(heat: Sequence[Temperature], kept: int) -> Table:
    """A row for each temperature (Fig. 8 at K)."""
    rows = []
    cut = any(t.whole.n for t in heat)
    for t in heat:
        made = t.curves()
        rewards = [made[name][-1].shown() for name in ("mean", "median", "max")]
        rewards += [t.whole.points()[0].shown() if t.whole.n else "-"] if cut else []
        shares = [t.distinct / t.answers, t.truncated / t.answers, t.chosen / max(kept, 1)]
        cells = [f"{t.temperature:g}", *rewards, *(f"{100 * share:.1f}" for share in shares)]
        rows.append([*cells, f"{t.tokens / t.answers:,.0f}"])
    columns = ["T", "mean", "median", f"best of {heat[0].k}", *(["best not cut"] if cut else [])]
    columns += ["distinct %", "cut %", "chosen %", "tokens"]
    return f"reward (a logit) over {heat[0].rewards.n:,} prompts by temperature", columns, rows


def by_number(heat: Sequence[Temperature]) -> Table:
    """A row for each N = 1, 2, 4, ... K: of one temperature Fig. 7, of several the largest by temperature (Fig. 8)."""
    k, made = heat[0].k, [t.curves() for t in heat]
    ladder = [*(2**i for i in range(k.bit_length()) if 2**i < k), k]
    if len(heat) == 1:
        rows = [[f"{n}", *(made[0][name][n - 1].shown() for name in CURVES)] for n in ladder]
        return "expected reward of n samples", ["n", "max", "median", "max - median"], rows
    rows = []
    for n in ladder:
        largest = [curves["max"][n - 1] for curves in made]
        top = max(range(len(heat)), key=lambda i: largest[i].value)
        rows.append([f"{n}", *(point.shown() for point in largest), f"{heat[top].temperature:g}"])
    columns = ["n", *(f"T {t.temperature:g}" for t in heat), "best at"]
    return "expected largest reward of n samples", columns, rows
