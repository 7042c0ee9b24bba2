"""How far raters agree beyond chance: Gwet's AC1 and AC2 (Llama 2, sections 3.4.2 and A.4.6), and others beside them.

Letters: N items, Q categories, W weights [Q, Q] (1 on the diagonal, 0 for the worst disagreement), r_ik how many raters
put item i into category k, r_i how many rated it, N2 items with r_i >= 2, and of an item that was rated at all
    r*_ik = sum_l w_kl r_il                                agreement with category k
    pa_i = sum_k r_ik (r*_ik - 1) / (r_i (r_i - 1))        of a pair of its raters; 0 where r_i < 2
    pi_k = 1/N sum_i r_ik / r_i                            how often category k is used
All are (pa - pe) / (1 - pe), where pa = sum_i pa_i / N2, and differ in pe, the agreement that chance would give:
    percent agreement       0
    Gwet's AC1, AC2         sum(W) / (Q (Q - 1)) sum_k pi_k (1 - pi_k)
    Brennan and Prediger    sum(W) / Q^2
    Fleiss                  sum_kl w_kl pi_k pi_l
    Krippendorff's alpha    as Fleiss, of items with r_i >= 2 only, weighted by how many ratings they have; and
                            pa' = (1 - e) pa + e, e = 1 / sum_i r_i, since a rating is not compared with itself
With W the identity Gwet's is called AC1, else AC2. The variance is that of the mean of a value per item (linearised),
    v_i = N / N2 (pa_i - pe [r_i >= 2]) / (1 - pe) - 2 (1 - coefficient) (pe_i - pe) / (1 - pe)
    variance = 1 / (N (N - 1)) sum_i (v_i - coefficient)^2
with pe_i the same as pe but one pi_k replaced by r_ik / r_i. Intervals are Student's with N - 1 degrees of freedom,
cut at 1: of items, for the raters at hand.

Source: K. L. Gwet, "Computing inter-rater reliability and its variance in the presence of high agreement", 2008;
"Handbook of Inter-Rater Reliability", 4th edition, 2014, chapters 2 to 6. Krippendorff, "Computing Krippendorff's
alpha-reliability", 2011. The same numbers as the R and Python packages irrCAC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama2cli.measure.flow import Table
from llama2cli.measure.intervals import student_t
from llama2cli.measure.judgements import Item, Scale, by_group
from llama2cli.measure.rates import Z
from llama2cli.text.records import Record

WEIGHTS = ("identity", "linear", "quadratic", "ordinal")
PERFECT = 1e-12  # an expected agreement this near to 1 leaves no room to agree beyond it
MOST_RATERS = 12  # rows of the table of raters


class Agreement(NamedTuple):
    """A coefficient: of n items, with its standard error and 95% interval where there are two items.

    observed, expected: pa and pe. value is None where expected is 1: every rating is in one category.
    """

    value: float | None
    n: int
    se: float | None = None
    low: float | None = None
    high: float | None = None
    observed: float | None = None
    expected: float | None = None


# --- weights and counts -------------------------------------------------------------------------------------------


def weights(name: str, values: Sequence[float]) -> np.ndarray:
    """[Q, Q] of `WEIGHTS` for categories at these values, in rising order.

    identity 1 or 0; linear 1 - |a - b| / (max - min); quadratic 1 - ((a - b) / (max - min))^2; ordinal, by ranks only,
    1 - d (d + 1) / (Q (Q - 1)) for categories d ranks apart (Gwet, 2014, table 3.6: the pairs that lie between them).
    Raises ValueError for an unknown name or a single category.
    """
    at = np.asarray(values, np.float64)
    if len(at) < 2:
        raise ValueError("weights take two categories or more")
    gaps, span = np.abs(at[:, None] - at[None, :]), at.max() - at.min()
    ranks = np.abs(np.arange(len(at))[:, None] - np.arange(len(at))[None, :])
    if name == "identity":
        return np.eye(len(at))
    if name == "linear":
        return 1 - gaps / span
    if name == "quadratic":
        return 1 - np.square(gaps / span)
    if name == "ordinal":
        return 1 - ranks * (ranks + 1) / (len(at) * (len(at) - 1))
    raise ValueError(f"unknown weights {name}")


def counts(items: Sequence[Item], scale: Scale) -> np.ndarray:
    """[N, Q]: how many raters put each item into each category."""
    found = np.zeros((len(items), len(scale.categories)))
    for i, item in enumerate(items):
        for score in item.scores:
            found[i, scale.number(score)] += 1
    return found


# --- coefficients -------------------------------------------------------------------------------------------------


def percent(counts_NQ: np.ndarray, weights_QQ: np.ndarray) -> Agreement:
    """The share of pairs of raters that agree, by weight."""
    return corrected(counts_NQ, weights_QQ, 0.0, np.zeros(len(counts_NQ)))


def gwet(counts_NQ: np.ndarray, weights_QQ: np.ndarray) -> Agreement:
    """AC1 with the identity, else AC2."""
    q = len(weights_QQ)
    shares_NQ, pi_Q = shares(counts_NQ)
    scale = weights_QQ.sum() / (q * (q - 1))
    return corrected(counts_NQ, weights_QQ, scale * (pi_Q * (1 - pi_Q)).sum(), scale * (shares_NQ @ (1 - pi_Q)))


def brennan_prediger(counts_NQ: np.ndarray, weights_QQ: np.ndarray) -> Agreement:
    """Every category is as likely by chance."""
    pe = weights_QQ.mean()
    return corrected(counts_NQ, weights_QQ, pe, np.full(len(counts_NQ), pe))


def fleiss(counts_NQ: np.ndarray, weights_QQ: np.ndarray) -> Agreement:
    """Fleiss' kappa, with weights and missing ratings."""
    shares_NQ, pi_Q = shares(counts_NQ)
    both_Q = (weights_QQ + weights_QQ.T) @ pi_Q / 2
    return corrected(counts_NQ, weights_QQ, pi_Q @ weights_QQ @ pi_Q, shares_NQ @ both_Q)


def krippendorff(counts_NQ: np.ndarray, weights_QQ: np.ndarray) -> Agreement:
    """Krippendorff's alpha; its difference function is 1 - W: nominal for identity, interval for quadratic weights."""
    counts_NQ = counts_NQ[counts_NQ.sum(1) >= 2]
    n, raters_N = len(counts_NQ), counts_NQ.sum(1)
    if not n:
        return Agreement(None, 0)
    mean = raters_N.mean()
    pairs_N = (counts_NQ * (counts_NQ @ weights_QQ.T - 1)).sum(1) / (mean * (raters_N - 1))
    pi_Q = counts_NQ.mean(0) / mean
    once = 1 / raters_N.sum()
    plain = pairs_N.mean()
    pa, pe = (1 - once) * plain + once, pi_Q @ weights_QQ @ pi_Q
    if pe >= 1 - PERFECT:
        return Agreement(None, n, observed=float(pa), expected=float(pe))
    excess_N = raters_N / mean - 1  # an item with more ratings counts more
    both_Q = (weights_QQ + weights_QQ.T) @ pi_Q / 2
    pe_N = counts_NQ @ both_Q / mean - pe * excess_N
    value_N = (pairs_N - pa * excess_N - pe) / (1 - pe)
    uncorrected = (plain - pe) / (1 - pe)
    value_N = value_N - 2 * (1 - uncorrected) * (pe_N - pe) / (1 - pe)
    return finished((pa - pe) / (1 - pe), value_N - uncorrected, pa, pe)


def shares(counts_NQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r_ik / r_i [N, Q], and pi_k [Q]. Every item has a rating."""
    shares_NQ = counts_NQ / counts_NQ.sum(1, keepdims=True)
    return shares_NQ, shares_NQ.mean(0)


def corrected(counts_NQ: np.ndarray, weights_QQ: np.ndarray, pe: float, pe_N: np.ndarray) -> Agreement:
    """(pa - pe) / (1 - pe) with its error, as at the top of this file."""
    n, raters_N = len(counts_NQ), counts_NQ.sum(1)
    paired_N = raters_N >= 2
    n_paired = int(paired_N.sum())
    if not n_paired:
        return Agreement(None, n)
    agreeing_N = (counts_NQ * (counts_NQ @ weights_QQ.T - 1)).sum(1)
    pa_N = np.where(paired_N, agreeing_N / np.where(paired_N, raters_N * (raters_N - 1), 1), 0.0)
    pa = pa_N.sum() / n_paired
    if pe >= 1 - PERFECT:
        return Agreement(None, n, observed=float(pa), expected=float(pe))
    value = (pa - pe) / (1 - pe)
    value_N = n / n_paired * (pa_N - pe * paired_N) / (1 - pe) - 2 * (1 - value) * (pe_N - pe) / (1 - pe)
    return finished(value, value_N - value, pa, pe)


def finished(value: float, deviations_N: np.ndarray, pa: float, pe: float) -> Agreement:
    """The coefficient with the error that the deviations of its items give."""
    n = len(deviations_N)
    if n < 2:
        return Agreement(float(value), n, observed=float(pa), expected=float(pe))
    se = math.sqrt(float(np.square(deviations_N).sum()) / (n * (n - 1)))
    half = student_t(n - 1) * se
    return Agreement(float(value), n, se, float(value) - half, min(1.0, float(value) + half), float(pa), float(pe))


COEFFICIENTS: dict[str, Callable[[np.ndarray, np.ndarray], Agreement]] = {
    "percent": percent,
    "gwet": gwet,
    "brennan_prediger": brennan_prediger,
    "fleiss": fleiss,
    "krippendorff": krippendorff,
}
TITLES = {
    "percent": "percent agreement",
    "ac1": "Gwet's AC1",
    "ac2": "Gwet's AC2",
    "brennan_prediger": "Brennan-Prediger",
    "fleiss": "Fleiss' kappa",
    "krippendorff": "Krippendorff's alpha",
}


# --- all of it ----------------------------------------------------------------------------------------------------

Found = dict[tuple[str, str], Agreement]  # by (coefficient, weights): ("ac2", "quadratic")


def evaluate(items: Sequence[Item], scale: Scale, kinds: Sequence[str]) -> Found:
    """Every coefficient with each kind of weights."""
    counts_NQ = counts(items, scale)
    found: Found = {}
    for kind in kinds:
        weights_QQ = weights(kind, scale.values)
        for name, coefficient in COEFFICIENTS.items():
            if name == "gwet":
                name = "ac1" if kind == "identity" else "ac2"
            found[name, kind] = coefficient(counts_NQ, weights_QQ)
    return found


def mean_of(several: Sequence[Agreement]) -> Agreement | None:
    """The plain mean of coefficients of different items, as the paper reports it over batches; n: how many they are.

    Its error is that of these batches, whose items are drawn: sqrt(sum se^2) / B; none where one has none. None for
    less than two.
    """
    known = [a for a in several if a.value is not None]
    if len(known) < 2:
        return None
    value = math.fsum(a.value for a in known if a.value is not None) / len(known)
    errors = [a.se for a in known if a.se is not None]
    if len(errors) < len(known):
        return Agreement(value, len(known))
    se = math.sqrt(math.fsum(e * e for e in errors)) / len(known)
    return Agreement(value, len(known), se, value - Z * se, min(1.0, value + Z * se))


class Report(NamedTuple):
    """What was measured: of all items, of each group, and the mean over batches."""

    items: list[Item]
    scale: Scale
    total: Found
    groups: dict[str, dict[Any, Found]]
    sizes: dict[str, dict[Any, tuple[int, int]]]  # items and ratings of each group
    without: dict[str, int]  # items that are in no group of that name
    means: Found


def report(items: Sequence[Item], scale: Scale, kinds: Sequence[str], by: Sequence[str]) -> Report:
    """Measure all items, and those of each group of the names in `by` that has any."""
    groups: dict[str, dict[Any, Found]] = {}
    sizes: dict[str, dict[Any, tuple[int, int]]] = {}
    without: dict[str, int] = {}
    for name in by:
        held, rest = by_group(items, name)
        if held:
            groups[name] = {value: evaluate(mine, scale, kinds) for value, mine in held.items()}
            sizes[name] = {value: (len(mine), sum(len(i.ratings) for i in mine)) for value, mine in held.items()}
            without[name] = rest
    total = evaluate(items, scale, kinds)
    means: Found = {}
    for key in total:
        mean = mean_of([found[key] for found in groups.get("batch", {}).values()])
        if mean is not None:
            means[key] = mean
    return Report(list(items), scale, total, groups, sizes, without, means)


def records(found: Report) -> list[Record]:
    """agreement.ac1, .ac2, .percent, .brennan_prediger, .fleiss, .krippendorff, each with its `weights`, and its
    standard error as agreement.ac1.se; of all, of each group, and over batches as agreement.ac1.batch_mean. n: items,
    of a mean batches. What is not defined is left out.
    """
    made = of_group(found.total)
    for name, groups in found.groups.items():
        for value, mine in groups.items():
            made += of_group(mine, **{name: value})
    return made + of_group(found.means, end=".batch_mean")


def of_group(found: Found, end: str = "", **groups: Any) -> list[Record]:
    """The records of one group."""
    made: list[Record] = []
    for (name, kind), a in found.items():
        if a.value is None:
            continue
        bounds = {} if a.low is None else {"low": a.low, "high": a.high}
        measure, more = f"agreement.{name}{end}", {**groups, "weights": kind}
        made.append({"measure": measure, "value": a.value, "n": a.n, **bounds, **more})
        if a.se is not None:
            made.append({"measure": f"{measure}.se", "value": a.se, "n": a.n, **more})
    return made


# --- for a person -------------------------------------------------------------------------------------------------


def tables(found: Report) -> list[Table]:
    """All coefficients of all items; percent agreement, Gwet's and alpha by group; the raters."""
    raters = {rater for item in found.items for rater in item.ratings}
    n_ratings = sum(len(item.ratings) for item in found.items)
    single = sum(len(item.ratings) < 2 for item in found.items)
    title = f"agreement: {len(found.items):,} items, {len(raters):,} raters, {n_ratings:,} ratings"
    title += f"; items with one rating, which agrees with no other: {single:,}" if single else ""
    rows = [[TITLES[name], kind, *cells(a)] for (name, kind), a in found.total.items()]
    made = [(title, ["coefficient", "weights", "value", "s.e.", "95% interval", "chance"], rows)]
    for name, groups in found.groups.items():
        made.append(group_table(found, name, groups))
    made.append(rater_table(found))
    return [table for table in made if table[2]]


def cells(a: Agreement) -> list[str]:
    """value, s.e., interval, expected agreement."""
    se, interval = ("-", "-") if a.se is None else (f"{a.se:.3f}", f"{a.low:.3f} to {a.high:.3f}")
    return [shown(a), se, interval, "-" if a.expected is None else f"{a.expected:.3f}"]


def shown(a: Agreement | None) -> str:
    """The value, or a dash where it is not defined."""
    return "-" if a is None or a.value is None else f"{a.value:.3f}"


def group_table(found: Report, name: str, groups: dict[Any, Found]) -> Table:
    """A row for each group: Gwet's coefficients with intervals; percent agreement and alpha, both without weights."""
    gwets = [key for key in found.total if key[0] in ("ac1", "ac2")]
    named = [("agree %", ("percent", "identity")), ("alpha", ("krippendorff", "identity"))]
    heads = [f"{key[0].upper()}{f' {key[1]}' if key[0] == 'ac2' else ''}" for key in gwets]
    columns = [name, "items", "ratings", *(x for head in heads for x in (head, "95% interval"))]
    columns += [head for head, _ in named]
    rows = [
        [str(value), *(f"{n:,}" for n in found.sizes[name][value]), *row(mine, gwets, [key for _, key in named])]
        for value, mine in groups.items()
    ]
    if name == "batch" and found.means:
        rows.append(["mean of batches", "", "", *row(found.means, gwets, [key for _, key in named])])
    ratings = sum(len(item.ratings) for item in found.items)
    total = row(found.total, gwets, [key for _, key in named])
    rows.append(["all", f"{len(found.items):,}", f"{ratings:,}", *total])
    rest = f"; {found.without[name]:,} items without {name}" if found.without[name] else ""
    return f"agreement by {name}{rest}", columns, rows


def row(found: Found, gwets: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> list[str]:
    """The cells of a group."""
    made = []
    for key in gwets:
        made += cells(found.get(key, Agreement(None, 0)))[:3:2]
    for key in others:
        a = found.get(key)
        made.append(f"{100 * a.value:.1f}" if key[0] == "percent" and a and a.value is not None else shown(a))
    return made


def rater_table(found: Report) -> Table:
    """Who agrees least with the others: the share of others' ratings of the same items that are the same as theirs."""
    same: dict[str, list[float]] = {}  # items, ratings that are the same, ratings of others, sum of scores
    for item in found.items:
        for rater, score in item.ratings.items():
            mine = same.setdefault(rater, [0.0] * 4)
            mine[0] += 1
            mine[1] += sum(s == score for s in item.scores) - 1
            mine[2] += len(item.ratings) - 1
            mine[3] += found.scale.values[found.scale.number(score)]
    if len(same) < 3:
        return "", [], []
    order = sorted(same, key=lambda r: same[r][1] / same[r][2] if same[r][2] else 2.0)
    rows = []
    for rater in order[:MOST_RATERS]:
        n, agreeing, others, total = same[rater]
        rows.append([rater, f"{n:,.0f}", f"{100 * agreeing / others:.1f}" if others else "-", f"{total / n:.2f}"])
    if not found.scale.numeric:
        rows = [r[:3] for r in rows]
    title = f"the {MOST_RATERS} raters of {len(same):,} that agree least" if len(same) > MOST_RATERS else "raters"
    return title, ["rater", "items", "agrees with others %", *(["mean score"] if found.scale.numeric else [])], rows
