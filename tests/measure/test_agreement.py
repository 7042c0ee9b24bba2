"""Agreement against irrCAC (Python 0.4.4 and R), Krippendorff's examples, numbers worked by hand, and properties."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.measure import agreement
from llama2cli.measure.agreement import COEFFICIENTS, WEIGHTS, Agreement, evaluate, mean_of, weights
from llama2cli.measure.judgements import Item, Scale, parse_scale
from llama2cli.text.records import validate

GOLDENS = json.loads(Path(__file__).with_name("agreement_irrcac.json").read_text())
Ratings = Sequence[Sequence[Any]]


def items(ratings: Ratings) -> list[Item]:
    """Rows of items, a column for each rater, None where one is missing."""
    return [
        Item(f"i{n}", {f"r{j}": score for j, score in enumerate(row) if score is not None})
        for n, row in enumerate(ratings)
    ]


def measured(ratings: Ratings, categories: Sequence[Any], kind: str = "identity") -> dict[str, Agreement]:
    """Every coefficient by its name; Gwet's as "gwet"."""
    found = evaluate(items(ratings), Scale(tuple(categories)), [kind])
    return {"gwet" if name in ("ac1", "ac2") else name: a for (name, _), a in found.items()}


# --- irrCAC -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", GOLDENS["tables"], ids=lambda t: t["name"])
def test_equal_to_irrcac(table: dict[str, Any]) -> None:
    """Its outputs on its own data sets and on random ones with missing ratings: coefficients, errors, intervals."""
    assert GOLDENS["irrCAC"] == "0.4.4" and len(GOLDENS["tables"]) >= 10
    for kind, coefficients in table["weights"].items():
        found = measured(table["ratings"], table["categories"], kind)
        for name, numbers in coefficients.items():
            a = found[name]
            ours = (a.value, a.se, a.low, a.high, a.observed, a.expected)
            assert ours == pytest.approx(numbers, abs=1e-8), (kind, name)


@pytest.mark.parametrize("table", GOLDENS["tables"], ids=lambda t: t["name"])
def test_equal_to_irrcac_where_it_is_installed(table: dict[str, Any]) -> None:
    raw = pytest.importorskip("irrCAC.raw")
    pandas = pytest.importorskip("pandas")
    kinds = [float if not isinstance(c, str) else str for c in table["categories"]]
    categories = [kind(c) for kind, c in zip(kinds, table["categories"])]
    frame = pandas.DataFrame([[math.nan if x is None else x for x in row] for row in table["ratings"]])
    for kind in WEIGHTS:
        cac = raw.CAC(frame, weights=kind, categories=categories, digits=10)
        found = measured(table["ratings"], table["categories"], kind)
        for name in ("gwet", "fleiss", "krippendorff"):
            told = getattr(cac, name)()["est"]
            assert (found[name].value, found[name].se) == pytest.approx(
                (told["coefficient_value"], told["se"]), abs=1e-5
            )


FOUR_RATERS = next(t for t in GOLDENS["tables"] if t["name"] == "raw_4raters")["ratings"]


@pytest.mark.parametrize(
    "kind, name, value, se, low",
    [
        ("identity", "percent", 0.8181818, 0.1256090, 0.5417184),
        ("identity", "gwet", 0.7754441, 0.1429500, 0.4608133),
        ("identity", "fleiss", 0.7611693, 0.1530192, 0.4243763),
        ("identity", "krippendorff", 0.7434211, None, None),
        ("quadratic", "percent", 0.9753788, 0.09061628, 0.7759337),
        ("quadratic", "gwet", 0.9140007, 0.10396224, 0.6851814),
        ("quadratic", "fleiss", 0.8649351, 0.14603361, 0.5435173),
        ("quadratic", "krippendorff", 0.8491071, None, None),
    ],
)
def test_the_example_that_r_publishes(kind: str, name: str, value: float, se: float | None, low: float | None) -> None:
    """Gwet's four raters as the R package SimplyAgree prints them: agree_coef of its vignette on reliability.

    (Of alpha R takes pa', where irrCAC for Python takes pa, in what the items' numbers of ratings add to the variance:
    its errors are 0.1454787 and 0.1290512, 0.0001 beside ours.)
    """
    a = measured(FOUR_RATERS, [1, 2, 3, 4, 5], kind)[name]
    assert a.value == pytest.approx(value, abs=5e-8)
    if se is not None:
        assert (a.se, a.low, a.high) == pytest.approx((se, low, 1.0), abs=5e-8)


@pytest.mark.parametrize(
    "name, value, se",
    [
        ("gwet", 0.8493305, 0.04321747),
        ("brennan_prediger", 0.835, 0.04693346),
        ("percent", 0.89, 0.03128898),
        ("krippendorff", 0.7972585, None),
    ],
)
def test_the_table_that_the_r_package_irrcac_publishes(name: str, value: float, se: float | None) -> None:
    """cont3x3abstractors of its vignette: 100 women, two abstractors.

    Variances of tables are divided by n there, not by n - 1; and its error of alpha is Scott's pi's.
    """
    table = [[13, 0, 0], [0, 20, 7], [0, 4, 56]]
    rows = [[a, b] for a in range(3) for b in range(3) for _ in range(table[a][b])]
    found = measured(rows, [0, 1, 2])[name]
    assert found.value == pytest.approx(value, abs=5e-8) and found.n == 100
    assert se is None or (found.se or 0) * math.sqrt(99 / 100) == pytest.approx(se, abs=5e-9)


def test_krippendorffs_own_examples() -> None:
    """Krippendorff (2011): binary data of two observers, 0.095; nominal data of four with missing ratings, 0.743, and
    with the interval metric 0.849."""
    a, b = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert measured(list(zip(a, b)), [0, 1])["krippendorff"].value == pytest.approx(0.095, abs=5e-4)
    assert measured(FOUR_RATERS, [1, 2, 3, 4, 5])["krippendorff"].value == pytest.approx(0.743, abs=5e-4)
    assert measured(FOUR_RATERS, [1, 2, 3, 4, 5], "quadratic")["krippendorff"].value == pytest.approx(0.849, abs=5e-4)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_two_raters_by_hand() -> None:
    """Four items, safe or unsafe: both safe twice, both unsafe once, once split. pa = 3/4, pi = 5/8 and 3/8.

    AC1: pe = 2 x 5/8 x 3/8 = 15/32, so (24 - 15) / (32 - 15) = 9/17. Fleiss: pe = 25/64 + 9/64 = 34/64, so
    (48 - 34) / 30 = 7/15. Brennan-Prediger: pe = 1/2, so 1/2. Alpha: pa' = 7/8 x 3/4 + 1/8 = 25/32, so
    (50 - 34) / 30 = 8/15.
    """
    found = measured([["s", "s"], ["s", "s"], ["u", "u"], ["s", "u"]], ["s", "u"])
    expected = {"percent": Fraction(3, 4), "gwet": Fraction(9, 17), "fleiss": Fraction(7, 15)}
    expected |= {"brennan_prediger": Fraction(1, 2), "krippendorff": Fraction(8, 15)}
    assert {name: a.value for name, a in found.items()} == pytest.approx({k: float(v) for k, v in expected.items()})
    # percent agreement is a mean of 1, 1, 1, 0: variance 3/16 x 4/3, over 4
    assert found["percent"].se == pytest.approx(math.sqrt(1 / 16))
    assert found["percent"].low == pytest.approx(0.75 - 3.18244631 * 0.25) and found["percent"].high == 1.0


def test_the_formula_of_the_paper_by_loops() -> None:
    """AC2 = (pa - pe) / (1 - pe), pe = sum(w) / (Q (Q - 1)) sum pi (1 - pi), over every pair of raters."""
    draw = random.Random(3)
    ratings: list[list[Any]] = [[draw.choice([None, 1, 2, 2, 3, 5]) for _ in range(4)] for _ in range(30)]
    ratings = [row for row in ratings if any(row)]
    categories = [1, 2, 3, 4, 5]

    def w(a: int, b: int) -> float:
        return 1 - (a - b) ** 2 / 16

    agree = []
    for row in ratings:
        pairs = [(a, b) for i, a in enumerate(row) for j, b in enumerate(row) if i != j and a and b]
        if pairs:
            agree.append(sum(w(a, b) for a, b in pairs) / len(pairs))
    pi = [sum(row.count(k) / sum(x is not None for x in row) for row in ratings) / len(ratings) for k in categories]
    pa = sum(agree) / len(agree)
    pe = sum(w(a, b) for a in categories for b in categories) / 20 * sum(p * (1 - p) for p in pi)
    assert measured(ratings, categories, "quadratic")["gwet"].value == pytest.approx((pa - pe) / (1 - pe))


def test_weights_by_hand() -> None:
    """Of three and five categories (irrCAC's vignette on weighting has the first), and at uneven steps."""
    assert weights("linear", [1, 2, 3])[0].tolist() == [1, 0.5, 0]
    assert weights("quadratic", [1, 2, 3])[0].tolist() == [1, 0.75, 0]
    assert weights("ordinal", [1, 2, 3])[0] == pytest.approx([1, 2 / 3, 0])
    assert weights("ordinal", [1, 2, 3, 4, 5])[0] == pytest.approx([1, 0.9, 0.7, 0.4, 0])
    assert weights("linear", [1, 2, 5])[0].tolist() == [1, 0.75, 0]
    assert weights("ordinal", [1, 2, 5])[0] == pytest.approx([1, 2 / 3, 0])
    for kind in WEIGHTS:
        assert weights(kind, [0, 1]).tolist() == [[1, 0], [0, 1]]
        with pytest.raises(ValueError):
            weights(kind, [1])
    with pytest.raises(ValueError):
        weights("radical", [1, 2])


def test_the_mean_of_batches() -> None:
    """The plain mean, with the error of independent batches; a batch that has no value does not count."""
    batches = [Agreement(0.9, 10, 0.03), Agreement(0.94, 50, 0.04), Agreement(None, 3)]
    mean = mean_of(batches)
    assert mean is not None and mean.value == pytest.approx(0.92) and mean.n == 2
    assert mean.se == pytest.approx(0.05 / 2)
    assert (mean.low, mean.high) == pytest.approx((0.92 - 1.959964 * 0.025, 0.92 + 1.959964 * 0.025))
    assert mean_of(batches[1:]) is None
    bare = mean_of([Agreement(0.5, 1), Agreement(0.7, 10, 0.1)])
    assert bare is not None and bare[1:4] == (2, None, None)


# --- properties ---------------------------------------------------------------------------------------------------

row = st.lists(st.sampled_from([None, 1, 2, 3, 4]), min_size=3, max_size=3).filter(any)
tables = st.lists(row, min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(tables, st.randoms(use_true_random=False), st.sampled_from(WEIGHTS))
def test_order_of_raters_and_items_changes_nothing(ratings: Ratings, draw: random.Random, kind: str) -> None:
    """Raters change places, items too, and a scale may be turned round."""
    before = measured(ratings, [1, 2, 3, 4], kind)
    columns = draw.sample(range(3), 3)
    moved = [[r[c] for c in columns] for r in draw.sample(list(ratings), len(ratings))]
    turned = [[None if x is None else 5 - x for x in r] for r in ratings]
    for other in (moved, turned):
        for name, a in measured(other, [1, 2, 3, 4], kind).items():
            same(a, before[name])


@settings(max_examples=40, deadline=None)
@given(tables, st.permutations([1, 2, 3, 4]))
def test_names_of_categories_change_nothing(ratings: Ratings, names: Sequence[int]) -> None:
    """Without an order (identity weights) any category may have any name."""
    renamed = [[None if x is None else names[x - 1] for x in r] for r in ratings]
    before = measured(ratings, [1, 2, 3, 4])
    for name, a in measured(renamed, [1, 2, 3, 4]).items():
        same(a, before[name])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=10), st.sampled_from(WEIGHTS))
def test_perfect_agreement_is_one(scores: Sequence[int], kind: str) -> None:
    """With error 0; kappa and alpha are not defined where only one category is used, AC1 and AC2 are."""
    for name, a in measured([[s] * 3 for s in scores], [1, 2, 3], kind).items():
        if name in ("fleiss", "krippendorff") and len(set(scores)) == 1:
            assert a.value is None
        else:
            assert (a.value, a.se) == pytest.approx((1, 0), abs=1e-7), name


def same(a: Agreement, b: Agreement) -> None:
    """Equal but for rounding."""
    assert (a.value is None) is (b.value is None) and a.n == b.n
    if a.value is not None:
        assert (a.value, a.observed, a.expected) == pytest.approx((b.value, b.observed, b.expected), abs=1e-9)
        assert (a.se is None) is (b.se is None)
        if a.se is not None:
            assert a.se == pytest.approx(b.se, abs=1e-7)


def test_chance_agreement_is_near_zero() -> None:
    draw = np.random.default_rng(0)
    ratings = draw.integers(1, 6, (3000, 3)).tolist()
    for kind in WEIGHTS:
        for name, a in measured(ratings, [1, 2, 3, 4, 5], kind).items():
            if name != "percent":
                assert a.low is not None and a.high is not None and a.low < 0.02 and a.high > -0.02
                assert a.value == pytest.approx(0, abs=0.05), name


def test_the_interval_covers_what_it_should() -> None:
    """95% of the intervals of 200 samples of 60 items hold the agreement of 100,000 items of the same kind."""
    draw = np.random.default_rng(1)

    def rated(n: int) -> Ratings:
        truth = draw.choice(5, (n, 1), p=[0.05, 0.05, 0.1, 0.2, 0.6])
        noise = draw.integers(0, 5, (n, 3))
        return np.where(draw.random((n, 3)) < 0.3, noise, truth).tolist()

    def gwet(ratings: Ratings) -> Agreement:
        counts = np.stack([(np.asarray(ratings) == k).sum(1) for k in range(5)], 1).astype(float)
        return agreement.gwet(counts, weights("quadratic", range(5)))

    true = gwet(rated(100_000)).value
    intervals = [gwet(rated(60)) for _ in range(200)]
    held = sum(a.low <= true <= a.high for a in intervals)  # type: ignore[operator]
    assert 180 <= held <= 198


def test_a_single_item_has_no_error() -> None:
    """And items with one rating alone no agreement."""
    for name, a in measured([[1, 2, 2]], [1, 2, 3]).items():
        assert a.se is None and a.low is None and a.value is not None, name
    for a in measured([[1, None], [None, 2]], [1, 2, 3]).values():
        assert a.value is None
    assert COEFFICIENTS.keys() == measured([[1, 1]], [1, 2]).keys()


# --- reports ------------------------------------------------------------------------------------------------------


def test_records_and_tables_of_groups() -> None:
    """Each group apart, the mean of batches beside them; every record is a Metric."""
    rated = items(FOUR_RATERS)
    for i, item in enumerate(rated[:-1]):
        item.groups["batch"] = i % 2 + 1
    found = agreement.report(rated, parse_scale("1:5"), ["identity", "quadratic"], ["batch", "category"])
    made = [validate("metric", record) for record in agreement.records(found)]
    ac2 = {r.get("batch"): r for r in made if r["measure"] == "agreement.ac2"}
    assert set(ac2) == {None, 1, 2} and all(r["weights"] == "quadratic" for r in ac2.values())
    [mean] = [r for r in made if r["measure"] == "agreement.ac2.batch_mean"]
    assert mean["value"] == pytest.approx((ac2[1]["value"] + ac2[2]["value"]) / 2) and mean["n"] == 2
    alone = measured([FOUR_RATERS[i] for i in range(0, 11, 2)], [1, 2, 3, 4, 5], "quadratic")["gwet"]
    assert ac2[1]["value"] == alone.value and ac2[1]["n"] == 6
    [whole, by_batch, raters] = agreement.tables(found)
    assert "12 items, 4 raters, 41 ratings; items with one rating, which agrees with no other: 1" in whole[0]
    assert [r[0] for r in by_batch[2]] == ["1", "2", "mean of batches", "all"] and "1 items without batch" in by_batch[
        0
    ]
    assert len({len(r) for r in [by_batch[1], *by_batch[2]]}) == 1
    # r2 is alone with its score of the items 2, 6 and 8: of 27 ratings of others beside its own 18 are the same
    assert raters[2][0] == ["r2", "11", "66.7", "2.82"]
