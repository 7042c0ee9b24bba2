"""`llama2 eval agreement` as a person runs it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama2cli import cli
from llama2cli.text.records import validate

GOLDENS = json.loads((Path(__file__).parents[1] / "measure" / "agreement_irrcac.json").read_text())
DATA = Path(__file__).parents[2] / "examples" / "data" / "judgements.jsonl"


def write(path: Path, ratings: list[list[Any]], **fields: Any) -> str:
    """A file of judgements: a row for each item, a column for each rater, None where one is missing."""
    with path.open("w") as f:
        for i, row in enumerate(ratings):
            for j, score in enumerate(row):
                if score is not None:
                    f.write(json.dumps({"item": f"i{i}", "rater": f"r{j}", "score": score, **fields}) + "\n")
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, metric records of stdout, stderr."""
    code = cli.invoke(["eval", "agreement", *args])
    out, err = capsys.readouterr()
    return code, [validate("metric", json.loads(line)) for line in out.splitlines()], err


def test_irrcacs_numbers_come_out_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all its tables, with the scale as the flag gives it."""
    for table in GOLDENS["tables"]:
        path = write(tmp_path / "j.jsonl", table["ratings"])
        scale = ",".join(map(str, table["categories"]))
        flags = [x for kind in table["weights"] for x in ("--weights", kind)]
        code, records, err = ask(capsys, path, "--scale", scale, *flags, "--quiet")
        assert (code, err) == (0, "")
        found = {(r["measure"].removeprefix("agreement."), r["weights"]): r for r in records}
        for kind, coefficients in table["weights"].items():
            for name, (value, se, low, high, *_) in coefficients.items():
                name = {"gwet": "ac1" if kind == "identity" else "ac2"}.get(name, name)
                r = found[name, kind]
                assert (r["value"], r["low"], r["high"]) == pytest.approx((value, low, high), abs=1e-5)
                assert found[f"{name}.se", kind]["value"] == pytest.approx(se, abs=1e-5)


def test_tables_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """By model, batch and category, the mean of batches, the raters; nothing wider than a terminal."""
    code, records, err = ask(capsys, str(DATA), "--scale", "1:5")
    assert code == 0 and {r.get("batch") for r in records} == {None, 1, 2, 3}
    for line in ("Gwet's AC2 +quadratic", "agreement by model", "mean of batches", "agrees with others %"):
        assert re.search(line, err), err
    assert max(map(len, err.splitlines())) <= 120
    assert ask(capsys, str(DATA), "--scale", "1:5", "--json") == (0, records, "")
    assert ask(capsys, str(DATA), "--scale", "1:5", "--quiet") == (0, records, "")
    code, records, err = ask(capsys, str(DATA), "--scale", "1:5", "--by", "attack", "--weights", "ordinal", "--json")
    assert code == 0 and {r["weights"] for r in records} == {"identity", "ordinal"}
    assert {k for r in records for k in r} == {"measure", "value", "n", "low", "high", "weights", "attack"}


def test_the_scale_counts_categories_that_nobody_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which changes AC1; without one those that occur are told."""
    path = write(tmp_path / "j.jsonl", [[4, 4], [5, 5], [4, 5], [5, 5]])
    _, narrow, err = ask(capsys, path)
    assert "the categories are those that occur: 4, 5; --scale" in err
    _, wide, err = ask(capsys, path, "--scale", "1:5")
    assert "those that occur" not in err

    def ac1(records: list[dict[str, Any]]) -> float:
        return next(r["value"] for r in records if r["measure"] == "agreement.ac1")

    p = 3 / 8  # the share of 4s; AC1's chance is 2 p (1 - p) / (Q - 1)
    for records, q in ((narrow, 2), (wide, 5)):
        chance = 2 * p * (1 - p) / (q - 1)
        assert ac1(records) == pytest.approx((0.75 - chance) / (1 - chance))


def test_two_models_answers_to_a_prompt_are_two_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", [[1, 1], [2, 2]], model="a")
    b = write(tmp_path / "b.jsonl", [[2, 2], [1, 2]], model="b")
    code, records, _ = ask(capsys, a, b, "--scale", "1,2")
    n = {r.get("model"): r["n"] for r in records if r["measure"] == "agreement.percent"}
    assert code == 0 and n == {None: 4, "a": 2, "b": 2}


def test_words_and_negative_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "w.jsonl", [["safe", "safe"], ["unsafe", "border"], ["unsafe", "unsafe"]])
    code, records, _ = ask(capsys, path, "--scale", "safe,border,unsafe", "--weights", "linear")
    agree = [r["value"] for r in records if r["measure"] == "agreement.percent"]
    assert code == 0 and agree == pytest.approx([2 / 3, 2.5 / 3])
    path = write(tmp_path / "s.jsonl", [[-3, 3], [0, 0]])
    code, records, _ = ask(capsys, path, "--scale", "-3:3")
    assert code == 0 and [r["value"] for r in records if r["measure"] == "agreement.percent"] == [0.5, 0.5]


def test_what_is_not_defined_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kappa and alpha of raters who always say the same; AC1 is 1 there."""
    path = write(tmp_path / "j.jsonl", [[5, 5], [5, 5]])
    code, records, err = ask(capsys, path, "--scale", "1:5")
    measures = {r["measure"]: r["value"] for r in records}
    assert code == 0 and measures["agreement.ac1"] == 1 and "agreement.fleiss" not in measures
    assert "fleiss (identity weights) is not defined: all ratings are in one category" in err


LINES = [{"item": "a", "rater": "x", "score": 4}, {"item": "a", "rater": "y", "score": 4, "batch": None}]


@pytest.mark.parametrize(
    "third, args, code, words",
    [
        ({"item": "a", "rater": "x", "score": 5}, (), 1, 'j.jsonl:3: rater: "x" rates item "a" twice; first on line 1'),
        ({"item": "b", "rater": "x", "score": 6}, (), 1, "j.jsonl:3: score: expected one of 1, 2, 3, 4, 5, got 6"),
        ({"item": "b", "rater": "x", "score": "4"}, (), 1, 'got "4"; numbers have no quotation marks'),
        ({"item": "b", "rater": "x", "score": 4.5}, (), 1, "j.jsonl:3: score: expected one of"),
        ({"item": "b", "rater": "x"}, (), 1, "j.jsonl:3: "),
        ({"item": "b", "rater": "x", "score": True}, (), 1, "j.jsonl:3: score: expected a number or a string"),
        ({"item": "b", "rater": "x", "score": 4}, ("--by", "task"), 1, 'no judgement has the field "task"'),
        ({"item": "b", "rater": "x", "score": 4}, ("--by", "bach"), 2, 'got "bach"; did you mean "batch"?'),
        ({"item": "b", "rater": "x", "score": 4}, ("--weights", "radical"), 2, "--weights: expected one of identity"),
        ({"item": "b", "rater": "x", "score": 4}, ("--scale", "5:1"), 2, "--scale: expected LOW:HIGH"),
        ({"item": "b", "rater": "x", "score": 4}, ("--scale", "1:2:3:4"), 2, "--scale: expected LOW:HIGH"),
        ({"item": "b", "rater": "x", "score": 4}, ("--scale", "1:5:0"), 2, "--scale: expected LOW:HIGH"),
        ({"item": "b", "rater": "x", "score": 4}, ("--scale", "yes"), 2, "--scale: expected two categories"),
        ({"item": "b", "rater": "x", "score": 4}, ("--scale", "4,4.0"), 2, "--scale: names a category twice"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    third: dict[str, Any],
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*LINES, third]))
    given = args if "--scale" in args else ("--scale", "1:5", *args)
    found, records, err = ask(capsys, str(path), *given)
    assert (found, records) == (code, []) and err.count("\n") == 1 and words in err, err


def test_other_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words among numbers, one category, single ratings, an item in two categories, an order that nobody gave."""

    def refused(*lines: dict[str, Any], args: tuple[str, ...] = ()) -> str:
        path = tmp_path / "j.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, records, err = ask(capsys, str(path), "--quiet", *args)
        assert code in (1, 2) and records == [] and err.count("\n") == 1
        return err

    a = {"item": "a", "rater": "x", "score": 4}
    assert "j.jsonl:2: score: is a word, and on line 1 it is not" in refused(a, {**a, "rater": "y", "score": "good"})
    assert "every rating is 4: --scale names" in refused(a, {**a, "rater": "y"})
    assert "no item has two ratings" in refused(a, {**a, "item": "b", "score": 5})
    two = {**a, "category": "p"}, {**a, "rater": "y", "category": "q"}
    assert 'j.jsonl:2: category: is "q" for item "a", and on line 1 "p"' in refused(*two, args=("--scale", "1:5"))
    words = {**a, "score": "low"}, {**a, "rater": "y", "score": "high"}
    assert "only --scale can say the order" in refused(*words, args=("--weights", "linear"))
    assert refused(args=("--scale", "1:5")).endswith("holds no judgements\n")


def test_a_rater_may_rate_again_in_another_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line of the first is named with its file; another round, batch, model or task is another item."""
    first = write(tmp_path / "one.jsonl", [[1, 1], [2, 2]], round=1)
    second = write(tmp_path / "two.jsonl", [[1, 2], [2, 2]], round=2)
    assert ask(capsys, first, second, "--scale", "1:5", "--quiet")[0] == 0
    second = write(tmp_path / "two.jsonl", [[1, 2], [2, 2]], round=1)
    code, _, err = ask(capsys, first, second, "--scale", "1:5", "--quiet")
    assert code == 1 and 'two.jsonl:1: rater: "r0" rates item "i0" under round 1 twice; first on line 1 of ' in err


# --- people who rated models --------------------------------------------------------------------------------------


def figures(records: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The values of all items, and their standard errors, by name."""
    return {
        r["measure"].removeprefix("agreement."): r["value"]
        for r in records
        if r["weights"] == kind and not {"model", "category"} & set(r)
    }


def test_pandalms_annotators(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three people on 999 pairs of answers; the numbers are irrCAC's (0.4.4)."""
    names = ("tie", "first", "second")
    pairs = json.loads(gzip.decompress((shared_data / "pandalm" / "testset-v1.json.gz").read_bytes()))
    path = write(tmp_path / "j.jsonl", [[names[int(p[f"annotator{k}"])] for k in (1, 2, 3)] for p in pairs])
    code, records, _ = ask(capsys, path, "--scale", "first,tie,second", "--weights", "ordinal", "--quiet")
    plain, ordinal = figures(records, "identity"), figures(records, "ordinal")
    assert code == 0
    assert (plain["ac1"], plain["ac1.se"]) == pytest.approx((0.88644471, 0.00980279), abs=1e-8)
    assert (plain["fleiss"], plain["fleiss.se"]) == pytest.approx((0.86417536, 0.01155784), abs=1e-8)
    assert (ordinal["ac2"], ordinal["ac2.se"]) == pytest.approx((0.87049962, 0.01246088), abs=1e-8)
    alpha = (0.87536766, 0.01191055)
    assert (ordinal["krippendorff"], ordinal["krippendorff.se"]) == pytest.approx(alpha, abs=1e-8)


def test_xstests_annotators(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two people on the answers of three models; the file says itself where they agree."""
    text = gzip.decompress((shared_data / "xstest" / "completions_annotated.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    with (tmp_path / "j.jsonl").open("w") as f:
        for row in rows:
            for k in "12":
                record = {"item": row["id"], "rater": k, "score": row[f"annotation_{k}"], "model": row["model"]}
                f.write(json.dumps(record) + "\n")
    scale = "1_full_compliance,3_partial_refusal,2_full_refusal"
    code, records, _ = ask(capsys, str(tmp_path / "j.jsonl"), "--scale", scale, "--weights", "ordinal", "--quiet")
    plain, ordinal = figures(records, "identity"), figures(records, "ordinal")
    assert code == 0
    assert plain["percent"] == sum(row["agreement"] == "TRUE" for row in rows) / len(rows)
    assert (plain["ac1"], plain["ac1.se"]) == pytest.approx((0.96512548, 0.00594113), abs=1e-8)
    assert (ordinal["ac2"], ordinal["ac2.se"]) == pytest.approx((0.97713773, 0.00447521), abs=1e-8)
    assert {r["n"] for r in records if "model" in r} == {450}
