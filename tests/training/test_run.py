"""The run folder: who may write it, what a save leaves, what a new process cleans up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama2cli.errors import DataError, Failure, Misuse
from llama2cli.text import folders
from llama2cli.training.dist import World
from llama2cli.training.run import Run, check_same, cut, step_name, step_number

HERE = World(0, 1, torch.device("cpu"))
SETTINGS = {"settings": {}, "resolved": {}, "provenance": {}}


def fresh(folder: Path) -> Run:
    run = Run(folder, resume=False, world=HERE)
    run.write_settings(SETTINGS)
    return run


def save(run: Run, step: int, **options: object) -> None:
    run.log({"step": step}, {"step": step})
    run.save(step, lambda aside: (aside / "config.json").write_text(str(step)) and None, **options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_step_names() -> None:
    assert step_name(500) == "step-000500" and step_number("step-000500") == 500
    assert step_number(step_name(12345678)) == 12345678
    for other in ("step-500", "step-00050x", "step-", "latest", "step-0000500", ".step-000500", "step-²00000"):
        assert step_number(other) is None


def test_a_save_is_whole_and_named(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    save(run, 5)
    save(run, 10, best=True)
    save(run, 15)
    folder = tmp_path / "run"
    assert (folder / "latest").read_text() == "step-000015\n" and (folder / "best").read_text() == "step-000010\n"
    for step in (5, 10, 15):
        assert folders.verify_manifest(folder / step_name(step)).keys() == {"config.json"}
    assert folders.resolve_model(folder) == folder / "step-000015"
    assert run.last("metrics.jsonl") == {"step": 15}
    run.close()


def test_keep_spares_the_newest_and_the_best(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    for step in range(1, 7):
        save(run, step, best=step == 2, keep=2)
    run.close()
    assert names(tmp_path / "run") >= {"step-000002", "step-000005", "step-000006"}
    assert not names(tmp_path / "run") & {"step-000001", "step-000003", "step-000004"}


def test_who_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    run = fresh(folder)
    with pytest.raises(Misuse, match=r"run: exists; --resume continues it"):
        Run(folder, resume=False, world=HERE)
    with pytest.raises(Failure, match="another process is writing this run folder") as second:
        Run(folder, resume=True, world=HERE)
    assert second.value.exit_code == 1
    run.close()
    Run(folder, resume=True, world=HERE).close()
    (tmp_path / "mine").mkdir()
    Run(tmp_path / "mine", resume=True, world=HERE).close()  # an empty folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(Misuse, match="is no run folder"):
        Run(tmp_path / "other", resume=True, world=HERE)
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match="is a file"):
        Run(tmp_path / "file", resume=True, world=HERE)


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = fresh(folder)
    save(run, 5)
    run.log({"step": 6}, {"step": 6})
    run.close()
    for left in (".step-000010.partial", "step-000010", ".step-000001.stale"):
        (folder / left / "trainer").mkdir(parents=True)
        (folder / left / "trainer" / "x").write_text("half")
    (folder / ".latest.77.partial").write_text("ste")
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "lo')
    (folder / "notes.txt").write_text("a person's")
    run = Run(folder, resume=True, world=HERE)
    assert run.latest == 5 and run.found == SETTINGS
    known = {"settings.json", "metrics.jsonl", "timing.jsonl", "latest", "step-000005", ".lock"}
    assert names(folder) == known | {"notes.txt"}
    assert (folder / "metrics.jsonl").read_text() == '{"step":5}\n' == (folder / "timing.jsonl").read_text()
    run.close()


@pytest.mark.parametrize("content", ["step-000009", "../step-000005", "step-5", "", "\xff"])
def test_a_pointer_that_names_nothing(tmp_path: Path, content: str) -> None:
    run = fresh(tmp_path / "run")
    save(run, 5)
    run.close()
    (tmp_path / "run" / "latest").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="run/latest"):
        Run(tmp_path / "run", resume=True, world=HERE)


def test_settings_that_are_not_ours(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    save(run, 5)
    run.close()
    for content in (b"", b"{", b"[]", b"{}", b'{"settings": 3}', b"\xff"):
        (tmp_path / "run" / "settings.json").write_bytes(content)
        with pytest.raises(DataError, match=r"settings\.json"):
            Run(tmp_path / "run", resume=True, world=HERE)


def test_a_full_disk_is_seen_before_the_save(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    save(run, 5)
    with pytest.raises(DataError, match="disk space"):
        save(run, 10, needed=1 << 60)
    run.close()
    assert (tmp_path / "run" / "latest").read_text() == "step-000005\n"
    assert names(tmp_path / "run") & {"step-000010", ".step-000010.partial"} == set()


def test_a_save_that_fails_can_be_done_again(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    with pytest.raises(OSError, match="full"):
        run.save(5, lambda aside: (_ for _ in ()).throw(OSError("full")))
    save(run, 5)
    run.close()


def test_best_follows_a_pointer_that_was_moved_back(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    save(run, 5)
    save(run, 10, best=True)
    run.close()
    (tmp_path / "run" / "latest").write_text("step-000005\n")
    run = Run(tmp_path / "run", resume=True, world=HERE)
    run.set_best(None)
    assert not (tmp_path / "run" / "best").exists()
    run.set_best(5)
    assert (tmp_path / "run" / "best").read_text() == "step-000005\n"
    run.close()


def test_logs_are_cut_at_the_first_line_beyond(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cut(log, 3)
    assert not log.exists()
    lines = [json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 6)]
    log.write_text("".join(lines))
    before = log.stat().st_mtime_ns
    cut(log, 5)
    assert log.stat().st_mtime_ns == before
    cut(log, 3)
    assert log.read_text() == "".join(lines[:3])
    cut(log, 0)
    assert log.read_text() == ""


def test_other_settings_are_named() -> None:
    then = {"seed": 1, "data": [{"name": "a", "sha256": "x"}], "keep": 3}
    check_same(then, then | {"keep": 0}, "run/settings.json", {"keep"})
    with pytest.raises(Misuse, match=r"run/settings.json:--seed: the run has 1, now it would be 2"):
        check_same(then, then | {"seed": 2}, "run/settings.json")
    with pytest.raises(Misuse, match=r"--data: .*data\[0\]\.sha256: the run has x, now it would be y"):
        check_same(then, then | {"data": [{"name": "a", "sha256": "y"}]}, "run/settings.json")
    with pytest.raises(Misuse, match=r"--data: .*the run has 1 of them, now it would be 2"):
        check_same(then, then | {"data": [{"name": "a", "sha256": "x"}, {}]}, "run/settings.json")
    with pytest.raises(Misuse, match="--lr"):
        check_same(then, then | {"lr": 3}, "run/settings.json")
