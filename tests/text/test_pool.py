"""Samples of earlier rounds by their prompt: order, what is the same, what nobody asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama2cli.errors import DataError
from llama2cli.text.pool import FromPool, Pool


def sample(text: str, content: str, **extra) -> dict:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": content}]
    made = {"messages": messages, "id": "of another tool", "sample": 0, "policy": "p", "temperature": 1.0, "seed": 0}
    return made | {"n_tokens": 3, "truncated": False, **extra}


@pytest.fixture
def pool(tmp_path: Path):
    def make(*samples: dict, split: int = 1, **kw) -> Pool:
        for i, part in enumerate((samples[:split], samples[split:])):
            (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in part))
        return Pool([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], **kw)

    return make


def texts(samples: list[dict]) -> list[str]:
    return [s["messages"][-1]["content"] for s in samples]


def test_samples_of_a_prompt_in_their_order(pool):
    """Over files; the prompt is told by its messages, stripped, and not by the id that somebody wrote."""
    made = pool(sample("x", "é" * 9), sample("y", "b"), sample(" x ", "c", note=[1]), sample("x", "a"))
    x = [{"role": "user", "content": "x"}]
    assert texts(made.of(x)) == ["é" * 9, "c", "a"] and made.of(x)[1]["note"] == [1]
    assert made.of([{"role": "system", "content": "s"}, *x]) == [] and made.n == 4


def test_what_is_the_same_counts_once(pool):
    made = pool(
        sample("x", "a", round=1), sample("x", " a ", round=4), sample("y", "a"), sample("x", "a", truncated=True)
    )
    found = made.of([{"role": "user", "content": "x"}])
    assert [(s.get("round"), s["truncated"]) for s in found] == [(1, False), (None, True)]
    assert (made.n, made.identical, made.newest) == (3, 1, 1)


def test_prompts_that_nobody_asked_for(pool, tmp_path):
    made = pool(sample("x", "a"), sample("z", "b", unsafe=True), sample("y", "c"), sample("z", "d"))
    made.ask([{"role": "user", "content": "y"}])
    made.ask([{"role": "user", "content": "elsewhere"}])
    left = made.unasked()
    place, record = next(left)
    assert isinstance(place, FromPool) and (place.file, place.line) == (str(tmp_path / "0.jsonl"), 1)
    assert record == {"messages": [{"role": "user", "content": "x"}]}
    assert next(left)[1] == {"messages": [{"role": "user", "content": "z"}], "unsafe": True}
    assert next(left, None) is None


def test_only_what_is_wanted(pool):
    made = pool(sample("x", "a", round=1), sample("x", "b", round=2), wanted=lambda s: s["round"] == 2)
    assert texts(made.of([{"role": "user", "content": "x"}])) == ["b"] and (made.n, made.others) == (1, 1)


def test_what_is_no_sample_is_named(pool):
    with pytest.raises(DataError, match=r"1\.jsonl:1: .*policy"):
        pool(sample("x", "a"), {k: v for k, v in sample("x", "b").items() if k != "policy"})
