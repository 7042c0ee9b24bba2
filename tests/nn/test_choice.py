"""A machine takes the same forms of the operations in every run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2cli.nn import choice, ops


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = ops.choices()
    yield
    ops.restore(before)


def picks_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch, faster: bool) -> dict[str, str]:
    """What is taken where every check that is made finds `faster`."""
    from llama2cli.nn import cpu

    monkeypatch.setattr(cpu, "compare", lambda *args, **kwargs: faster)
    ops.restore({"mode": "auto", "picks": {}})
    choice.choose()
    return ops.choices()["picks"]


def test_the_first_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = picks_of_a_fresh_process(monkeypatch, True)
    assert first and set(first.values()) == {"fast"}
    assert picks_of_a_fresh_process(monkeypatch, False) == first
    choice.memory_file().unlink()
    assert set(picks_of_a_fresh_process(monkeypatch, False).values()) == {"plain"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attention.fp32": 3}', "\x00"])
def test_a_damaged_memory_is_no_memory(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    choice.memory_file().parent.mkdir(parents=True)
    choice.memory_file().write_text(content)
    assert set(picks_of_a_fresh_process(monkeypatch, True).values()) == {"fast"}
    assert choice.recall(choice.memory_file()) == picks_of_a_fresh_process(monkeypatch, False)


def test_a_new_operation_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    first = picks_of_a_fresh_process(monkeypatch, True)
    known = {k: v for k, v in first.items() if k != "attention.fp32"}
    choice.remember(choice.memory_file(), known, replace=True)
    assert picks_of_a_fresh_process(monkeypatch, False) == first | {"attention.fp32": "plain"}


def test_no_place_to_remember(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama2cli").write_text("a file where the folder would be")
    assert set(picks_of_a_fresh_process(monkeypatch, True).values()) == {"fast"}


def test_plain_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.force("plain")
    choice.choose()
    assert not choice.memory_file().exists() and ops.choices()["mode"] == "plain"
