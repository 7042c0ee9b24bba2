"""`llama2 eval dialogues` as a person runs it: the metrics, the tables, and the filter."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama2cli import cli
from llama2cli.text.records import validate


def dialogue(prompt: str, answer: str, **fields: Any) -> dict[str, Any]:
    """One round."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **fields}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, records of stdout, stderr."""
    code = cli.invoke(["eval", "dialogues", *args])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_metrics_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of several files is a source; the worst is first in the table."""
    good = write(tmp_path / "good.jsonl", *[dialogue(f"q{i}", f"answer {i}") for i in range(9)])
    bad = write(tmp_path / "bad.jsonl", *[dialogue(f"r{i}", "") for i in range(9)])
    code, records, err = ask(capsys, good, bad)
    found = {(validate("metric", r)["measure"], r.get("source")): r["value"] for r in records}
    assert code == 0
    assert found["dialogues.empty_answer", "bad"] == 1 and found["dialogues.empty_answer", "good"] == 0
    assert found["dialogues.flawed", None] == 0.5
    table = err[err.index("flaws, %") :].splitlines()
    assert [line.split()[0] for line in table[3:6]] == ["bad", "good", "total"]
    assert ask(capsys, good, bad, "--quiet") == (0, records, "")


def test_annotate_is_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every dialogue comes out, in order, with its flaws; what else it holds passes through."""
    records = [
        dialogue("q", "one", id="x", note={"a": [1, None]}),
        dialogue("q", "two"),
        dialogue("r", "[INST] three", flaws=["old"]),
        dialogue("s", "x" * 5000),
    ]
    code, found, err = ask(capsys, write(tmp_path / "d.jsonl", *records), "--annotate")
    assert code == 0 and "flaws, % of dialogues" in err
    expected = [[], ["duplicate"], ["tags"], ["long"]]
    assert found == [{**record, "flaws": names} for record, names in zip(records, expected)]
    _, again, _ = ask(capsys, write(tmp_path / "e.jsonl", *found), "--annotate")
    assert again == found


def test_annotate_reads_other_forms_and_stdin(tmp_path: Path) -> None:
    """Alpaca's form comes out as messages; stdin, which cannot be read twice, is read once."""
    lines = [json.dumps({"instruction": f"do {i}", "input": "", "output": "" if i else "done"}) for i in range(2)]
    command = [sys.executable, "-m", "llama2cli", "eval", "dialogues", "--annotate", "--quiet"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=os.environ)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == "" and [r["flaws"] for r in found] == [[], ["empty_answer"]]
    assert found[0]["messages"][0] == {"role": "user", "content": "do 0"}


def test_the_filter_leaves_what_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dropping what is flawed leaves nothing flawed, by the same rules."""
    records = [dialogue(f"q{i % 7}", f"I cannot help you with that, {i % 2}." if i % 3 else "") for i in range(40)]
    _, found, _ = ask(capsys, write(tmp_path / "d.jsonl", *records), "--annotate")
    kept = [r for r in found if not r["flaws"]]
    assert 0 < len(kept) < 8
    _, again, _ = ask(capsys, write(tmp_path / "e.jsonl", *kept), "--annotate")
    assert all(not r["flaws"] for r in again)


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--same and --outlier move the limits, --tokenizer the unit."""
    same = [dialogue(f"q{i}", "The very same answer again.") for i in range(3)]
    path = write(tmp_path / "d.jsonl", *same, dialogue("r", "x" * 300))
    flaws = [r["flaws"] for r in ask(capsys, path, "--annotate", "--same", "1", "--outlier", "9999")[1]]
    assert flaws == [[], ["repeated"], ["repeated"], []]
    _, records, _ = ask(capsys, path)
    assert any(r["measure"] == "dialogues.characters_per_answer.median" for r in records)
    assert ask(capsys, path, "--format", "alpcaa")[0] == 2
    assert ask(capsys, path, "--tokenizer", str(tmp_path))[0] == 1


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = ask(capsys, write(tmp_path / "d.jsonl", {"messages": [{"role": "bot", "content": "x"}]}))
    assert code == 1 and "d.jsonl:1: messages[0].role: expected one of system, user, assistant" in err
    code, _, err = ask(capsys, write(tmp_path / "d.jsonl"))
    assert code == 1 and "d.jsonl: holds no dialogues" in err
    path = write(tmp_path / "d.jsonl", dialogue("q", "a"))
    assert ask(capsys, path, "--annotate", "-o", path)[0] == 2


def test_public_data(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dolly has no empty answer and few repeated prompts (counted here by its own fields)."""
    path = shared_data / "dolly_1k" / "dolly_1k.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    prompts = {(r["instruction"].strip(), (r.get("context") or r.get("input") or "").strip()) for r in rows}
    _, records, _ = ask(capsys, str(path))
    found = {r["measure"]: r for r in records}
    assert found["dialogues.total"]["value"] == len(rows) == 1000
    assert found["dialogues.duplicate"]["value"] == pytest.approx((len(rows) - len(prompts)) / len(rows))
    assert found["dialogues.empty_answer"]["value"] == 0
