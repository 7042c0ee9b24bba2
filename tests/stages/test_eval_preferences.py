"""`llama2 eval preferences` as a person runs it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama2cli import cli
from llama2cli.text.records import validate


def write(path: Path, *comparisons: dict[str, Any]) -> str:
    """A file of comparisons."""
    path.write_text("".join(json.dumps(c) + "\n" for c in comparisons))
    return str(path)


def comparison(prompt: str, chosen: str, rejected: str, **fields: Any) -> dict[str, Any]:
    """One comparison of one turn."""
    answers = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": [{"role": "user", "content": prompt}], **answers, **fields}


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, metric records of stdout, stderr."""
    code = cli.invoke(["eval", "preferences", *args])
    out, err = capsys.readouterr()
    return code, [validate("metric", json.loads(line)) for line in out.splitlines()], err


def test_records_on_stdout_and_a_table_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "c.jsonl", comparison("a b", "c d e", "f"), comparison("a b", "c", "d e"))
    code, records, err = ask(capsys, path)
    found = {r["measure"]: r["value"] for r in records}
    assert code == 0 and found["preferences.comparisons"] == 2 and found["preferences.prompts"] == 1
    assert found["preferences.words_per_example"] == (5 + 3 + 3 + 4) / 4
    assert re.search(r"^total +2 +1 +1\.0 +3\.8 +2\.0 +1\.8 +50\.0$", err, re.MULTILINE), err
    code, same, err = ask(capsys, path, "--json")
    assert (code, same) == (0, records) and "total" not in err
    assert ask(capsys, path, "--quiet") == (0, records, "")


def test_what_nobody_may_learn_from_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unsafe = [comparison("q", "a", f"b {i}", safety="rejected_safe") for i in range(5)]
    path = write(
        tmp_path / "c.jsonl", comparison("q", "a", "b", safety="both_safe"), *unsafe, comparison("q", "a", "a")
    )
    code, records, err = ask(capsys, path)
    assert code == 0 and records[0] == {"measure": "preferences.comparisons", "value": 1, "n": 1}
    assert "5 times" in err and "the chosen answer is unsafe, the other is safe" in err
    assert "the two answers are the same" in err


def test_tokens_are_those_of_sentencepiece(tmp_path: Path, capsys: pytest.CaptureFixture[str], excerpts: Path) -> None:
    """Counted by the library itself, on texts that need bytes and spaces."""
    text = gzip.decompress((excerpts / "alice.txt.gz").read_bytes()).decode()
    model = str(tmp_path / "tok.model")
    assert (
        cli.invoke(
            ["tokenize", "--train", "--vocab-size", "400", "-o", model, "--quiet", str(excerpts / "alice.txt.gz")]
        )
        == 0
    )
    capsys.readouterr()
    parts = [text[i : i + 300] for i in range(0, 1800, 300)]
    parts[1] += "  日本 \n\n 12345"
    path = write(tmp_path / "c.jsonl", comparison(*parts[:3]), comparison(*parts[3:]))
    _, records, _ = ask(capsys, path, "--tokenizer", model)
    count = [len(ids) for ids in sentencepiece.SentencePieceProcessor(model_file=model).encode(parts)]
    found = {r["measure"]: r["value"] for r in records}
    assert found["preferences.tokens_per_prompt"] == (count[0] + count[3]) / 2
    assert found["preferences.tokens_per_response"] == sum(count[i] for i in (1, 2, 4, 5)) / 4


def test_each_of_several_files_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But what a record says of itself holds."""
    first = write(tmp_path / "acme.jsonl", comparison("q", "a", "b"), comparison("q", "a", "c", source="own"))
    second = write(tmp_path / "other.jsonl", comparison("q", "a", "b"))
    _, records, _ = ask(capsys, first, second)
    assert {r["source"] for r in records if "source" in r} == {"acme", "own", "other"}
    _, records, _ = ask(capsys, second)
    assert not any("source" in r for r in records)


def test_output_and_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "c.jsonl", comparison("q", "a", "b"))
    code, records, _ = ask(capsys, path, "-o", f"{tmp_path}/m.jsonl", "--provenance", f"{tmp_path}/p.json")
    assert code == 0 and records == []
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 7
    assert set(json.loads((tmp_path / "p.json").read_text())["provenance"]["inputs"]) == {"c.jsonl"}
    assert ask(capsys, path, "-o", path)[0] == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ({"chosen": comparison("q", "a", "b")["chosen"]}, ["c.jsonl:1: ", "rejected"]),
        (
            comparison("q", "a", "b", rating="much"),
            ["c.jsonl:1: rating: ", "significantly, better, slightly, negligibly"],
        ),
        (comparison("q", "a", "b", safety="safe"), ["c.jsonl:1: safety: "]),
    ],
)
def test_what_is_malformed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any], words: list[str]
) -> None:
    code, records, err = ask(capsys, write(tmp_path / "c.jsonl", line))
    assert code == 1 and records == [] and err.count("\n") == 1 and all(word in err for word in words), err


def test_nothing_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ask(capsys, write(tmp_path / "c.jsonl"))
    assert code == 1 and "c.jsonl: holds no comparisons" in err
