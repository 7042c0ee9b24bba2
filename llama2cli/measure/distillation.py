"""What context distillation does to the scores of reward models (Fig. 16 of Llama 2, and Table 40 for helpful prompts).

Scores are on the scale of `safe` and `help`, from 0 to 1. A prompt counts once, with the mean of its K samples.
Intervals are the mean and 1.96 standard errors on either side, over prompts, which are drawn independently; gains are
differences on the same prompts, so their intervals are those of paired differences. Shares have Wilson's.

Tasks, the arms of Fig. 16:

    plain        the model's answers without a teacher
    preprompt    its answers under a teacher of the file
    template     its answers under the template of the prompt's risk category
    kept         the answers that the gate let through, which are trained on
    kept_plain   the best plain answers to the same prompts
    gated        kept where there is one, else the best plain answer, over all prompts; and `best_plain` over the same

Gains of preprompt and template are over plain, those of kept and gated over the best plain answer, and that of
template_over_preprompt is of the one over the other; all on the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama2cli.measure.best_of import Point, Spread
from llama2cli.measure.flow import Table
from llama2cli.measure.rates import interval, percent, rate
from llama2cli.text.records import Record

BINS = 5  # of the plain score, for what is gained by it (Fig. 16b)
ARMS = ("plain", "preprompt", "template", "best_plain", "gated", "kept_plain", "kept")
SAID = {
    "plain": "without a teacher",
    "preprompt": "with a preprompt",
    "template": "with the category's template",
    "best_plain": "best of k without a teacher",
    "gated": "the same, gated",
    "kept_plain": "best of k without, where one is kept",
    "kept": "kept",
}


def bin_of(score: float) -> str:
    """The bin of a plain score: "plain 0.2-0.4"; a bin holds its lower bound, the last one 1 as well."""
    i = min(int(score * BINS), BINS - 1)
    return f"plain {i / BINS:.1f}-{(i + 1) / BINS:.1f}"


@dataclass
class Ledger:
    """Means and shares by measure and groups, which grow prompt by prompt; a journal holds them.

    means, shares: by the JSON of what a Metric record says beside its numbers.
    """

    means: dict[str, Spread] = field(default_factory=dict)
    shares: dict[str, list[int]] = field(default_factory=dict)

    def add(self, measure: str, value: float, **groups: Any) -> None:
        """A number of one prompt."""
        self.means.setdefault(_key(measure, groups), Spread()).add(np.array([[value]], np.float64))

    def mark(self, measure: str, hit: bool, **groups: Any) -> None:
        """Whether a prompt is one of those whose share is asked for."""
        share = self.shares.setdefault(_key(measure, groups), [0, 0])
        share[0] += bool(hit)
        share[1] += 1

    def point(self, measure: str, **groups: Any) -> tuple[Point, int] | None:
        """A mean, and over how many prompts; None without any."""
        spread = self.means.get(_key(measure, groups))
        return None if spread is None else (spread.points()[0], spread.n)

    def share(self, measure: str, **groups: Any) -> tuple[int, int]:
        """How many of how many."""
        k, n = self.shares.get(_key(measure, groups), (0, 0))
        return k, n

    def named(self, measure: str, group: str) -> list[str]:
        """The values that a group of a measure has, in order."""
        keys = [json.loads(key) for key in (*self.means, *self.shares)]
        return sorted({key[group] for key in keys if key["measure"] == measure and group in key})

    def state(self) -> dict[str, Any]:
        """As JSON holds it, every digit kept."""
        means = {
            key: {name: np.asarray(value).tolist() for name, value in vars(spread).items()}
            for key, spread in self.means.items()
        }
        return {"means": means, "shares": self.shares}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Ledger:
        """From what `state` gave."""
        means = {k: Spread(s["n"], np.array(s["mean"]), np.array(s["squares"])) for k, s in state["means"].items()}
        return cls(means, {k: list(v) for k, v in state["shares"].items()})


class Outcome(NamedTuple):
    """What became of one prompt.

    scores: by reward model, K of the plain answers, then K under each lesson. kinds: of the lessons. kept: which
    answers of the first lesson. best: which plain answer is the best by `by`, the score that gates or judges.
    """

    scores: dict[str, list[list[float]]]
    kinds: list[str]
    kept: list[int]
    best: int = 0
    by: str | None = None
    gated: bool = True
    groups: dict[str, str] = {}  # noqa: RUF012  category, attack

    def means(self, name: str) -> list[float]:
        """The mean score of the plain answers, and of those under each lesson."""
        return [sum(of) / len(of) for of in self.scores[name]]

    def plain(self, name: str) -> float:
        """The score of the best plain answer."""
        return self.scores[name][0][self.best]

    def of_kept(self, name: str) -> float:
        """The mean score of the answers that are kept."""
        return sum(self.scores[name][1][i] for i in self.kept) / len(self.kept)


def add_outcome(ledger: Ledger, outcome: Outcome) -> None:
    """Count a prompt that is distilled."""
    has = bool(outcome.kept)
    ledger.mark("distill.kept", has)
    ledger.mark("distill.kept", has, task=outcome.kinds[0])
    for name, group in outcome.groups.items():
        ledger.mark("distill.kept", has, **{name: group})
    for name, scores in outcome.scores.items():
        _add_means(ledger, f"distill.{name}", outcome, name)
        if len(scores[0]) > 1:
            ledger.add(f"distill.{name}", outcome.plain(name), task="best_plain")
        if outcome.gated:
            ledger.add(f"distill.{name}", outcome.of_kept(name) if has else outcome.plain(name), task="gated")
    if outcome.by is None:
        return
    plain, *taught = outcome.means(outcome.by)
    for kind, value in zip(outcome.kinds, taught):
        ledger.add("distill.gain", value - plain, task=kind)
    if len(taught) > 1:
        ledger.add("distill.gain", taught[0] - taught[1], task="template_over_preprompt")
    gain = outcome.of_kept(outcome.by) - outcome.plain(outcome.by) if has else 0.0
    if has:
        ledger.add("distill.gain", gain, task="kept")
    if outcome.gated:
        ledger.add("distill.gain", gain, task="gated")
    ledger.add("distill.gain", taught[0] - plain, task=bin_of(plain))
    ledger.mark("distill.kept", has, task=bin_of(plain))


def add_harm(ledger: Ledger, outcome: Outcome) -> None:
    """Count a prompt that is not adversarial: what distillation would do to it, judged by `help` where it is there."""
    by = "help" if "help" in outcome.scores else outcome.by or ""
    ledger.mark("harm.kept", bool(outcome.kept))
    for name in outcome.scores:
        _add_means(ledger, f"harm.{name}", outcome, name)
    plain, *taught = outcome.means(by)
    gains = {kind: value - plain for kind, value in zip(outcome.kinds, taught)}
    if outcome.kept:
        gains["kept"] = outcome.of_kept(by) - outcome.plain(by)
    for task, gain in gains.items():
        ledger.add("harm.gain", gain, task=task)
        ledger.mark("harm.worse", gain < 0, task=task)


def _add_means(ledger: Ledger, measure: str, outcome: Outcome, name: str) -> None:
    for task, value in zip(["plain", *outcome.kinds], outcome.means(name)):
        ledger.add(measure, value, task=task)
    if outcome.kept:
        ledger.add(measure, outcome.plain(name), task="kept_plain")
        ledger.add(measure, outcome.of_kept(name), task="kept")


def _key(measure: str, groups: dict[str, Any]) -> str:
    return json.dumps({"measure": measure, **{k: v for k, v in sorted(groups.items()) if v is not None}})


def records(ledger: Ledger) -> Iterator[Record]:
    """Metric records, means first."""
    for key, spread in sorted(ledger.means.items()):
        [point] = spread.points()
        bounds = {} if point.low is None else {"low": point.low, "high": point.high}
        named = json.loads(key)
        yield {"measure": named.pop("measure"), "value": point.value, "n": spread.n, **bounds, **named}
    for key, (k, n) in sorted(ledger.shares.items()):
        named = json.loads(key)
        yield {"measure": named.pop("measure"), **rate(k, n), **named}


# --- for a person -------------------------------------------------------------------------------------------------


def tables(ledger: Ledger, scores: Sequence[str], judge: str | None) -> list[Table]:
    """scores: the fields that reward models give ("safe", "help"). judge: the one that gates, or judges gains."""
    out = []
    if any(ledger.point(f"distill.{name}", task="plain") for name in scores):
        out.append(arms(ledger, scores, judge))
    if judge is not None and ledger.share("distill.kept")[1]:
        out.append(by_plain(ledger, judge))
    if len(ledger.named("distill.kept", "category")) > 0:
        out.append(by_category(ledger))
    if any(ledger.point(f"harm.{name}", task="plain") for name in scores):
        out.append(harm(ledger, scores))
    return out


def arms(ledger: Ledger, scores: Sequence[str], judge: str | None) -> Table:
    """A row for each arm of Fig. 16: its prompts, its mean scores, and the gain over plain on the same prompts."""
    rows = []
    for task in ARMS:
        found = [ledger.point(f"distill.{name}", task=task) for name in scores]
        if not any(found):
            continue
        n = next(f[1] for f in found if f)
        gain = ledger.point("distill.gain", task=task)
        cells = [f[0].shown() if f else "" for f in found]
        rows.append([SAID[task], f"{n:,}", *cells, *([f"{gain[0].shown()}" if gain else ""] if judge else [])])
    if over := ledger.point("distill.gain", task="template_over_preprompt"):
        rows.append(["template over preprompt", f"{over[1]:,}", *("" for _ in scores), over[0].shown()])
    last = [f"gain in {judge}"] if judge else []
    return "means over prompts (scores from 0 to 1)", ["answers", "prompts", *scores, *last], rows


def by_plain(ledger: Ledger, judge: str) -> Table:
    """A row for each bin of the plain score: what the teacher gains there, and the share kept (Fig. 16b)."""
    rows = []
    for task in (name for name in ledger.named("distill.kept", "task") if name.startswith("plain ")):
        gain = ledger.point("distill.gain", task=task)
        share = rate(*ledger.share("distill.kept", task=task))
        rows.append([task.removeprefix("plain "), f"{share['n']:,}", gain[0].shown() if gain else "", percent(share)])
    return "by the score without a teacher", [f"{judge} without", "prompts", "gain", "kept %"], rows


def by_category(ledger: Ledger) -> Table:
    """A row for each risk category: the share kept."""
    rows = []
    for name in ledger.named("distill.kept", "category"):
        share = rate(*ledger.share("distill.kept", category=name))
        rows.append([name, f"{share['n']:,}", percent(share), interval(share)])
    return "by category", ["category", "prompts", "kept %", "95%"], rows


def harm(ledger: Ledger, scores: Sequence[str]) -> Table:
    """What distillation would do to prompts that are not adversarial; `kept`: where the gate would let it."""
    rows = []
    for task in ("plain", "preprompt", "template", "kept_plain", "kept"):
        found = [ledger.point(f"harm.{name}", task=task) for name in scores]
        if not any(found):
            continue
        worse = ledger.share("harm.worse", task=task)
        cells = [f[0].shown() if f else "" for f in found]
        rows.append(
            [SAID[task], f"{next(f[1] for f in found if f):,}", *cells, percent(rate(*worse)) if worse[1] else ""]
        )
    title = "prompts that are not adversarial, had they been distilled as well"
    return title, ["answers", "prompts", *scores, "worse %"], rows
