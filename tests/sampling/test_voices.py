"""Who answers and who judges, by flags; answers scored by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2cli import cli
from llama2cli.errors import DataError
from llama2cli.sampling import voices
from llama2cli.sampling.judging import score_answers
from llama2cli.sampling.scoring import Scorer
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, excerpts) -> Tokenizer:
    path = tmp_path_factory.mktemp("tok") / "tok.model"
    text = str(excerpts / "alice.txt.gz")
    assert cli.invoke(["tokenize", "--train", "--vocab-size", "400", "-o", str(path), "--quiet", text]) == 0
    return Tokenizer.load(path)


class ByLength:
    """A reward model that likes what is long, and says what it was asked."""

    context = 60

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.asked = tokenizer, []

    def score(self, sequences, *, tick=None):
        self.asked = [*map(list, sequences)]
        if tick:
            tick(len(sequences))
        return [float(len(ids)) for ids in sequences]


def said(question: str, answer: str, **more) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def test_answers_by_prompt(tokenizer: Tokenizer, capsys) -> None:
    """Those that are the same are computed once, in their prompt; each gets its own number, in order."""
    groups = [
        (Place("a", 1), [said("a", "b"), said("a", "bb cc"), said("a", "b"), said("a", "b", truncated=True)]),
        (Place("a", 2), []),
        (Place("a", 3), [said("d", "b")]),
    ]
    scorer, ticks = ByLength(tokenizer), []
    judged = score_answers(scorer, groups, tick=ticks.append)
    whole = [encode_dialogue(tokenizer, a["messages"], truncated=bool(a.get("truncated"))).ids for a in groups[0][1]]
    assert scorer.asked == [whole[0], whole[1], whole[3], encode_dialogue(tokenizer, groups[2][1][0]["messages"]).ids]
    assert judged.logits[0] == [float(len(ids)) for ids in whole] and judged.logits[1] == [] and ticks == [4]
    assert judged.cut == 0 and whole[0][-1] == 2 and whole[3][-1] != 2
    long = [(Place("in.jsonl", 7), [said("a", "word " * 60)])]
    assert score_answers(scorer, long).cut == 1 and len(scorer.asked[0]) == 60
    assert "in.jsonl:7: the answer ends behind the context of the reward model, 60 tokens" in capsys.readouterr().err
    assert score_answers(scorer, []).logits == []


def test_a_reward_model_is_loaded_once(monkeypatch, tmp_path: Path) -> None:
    loaded = []
    monkeypatch.setattr(Scorer, "load", lambda path, **how: loaded.append(path) or object())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    paths = {"safe": f"{tmp_path}/one", "help": f"{tmp_path}/one", "other": f"{tmp_path}/two"}
    found = voices.open_scorers(paths, device="cpu", dtype="fp32", tokens=None)
    assert loaded == [f"{tmp_path}/one", f"{tmp_path}/two"]
    assert found["safe"] is found["help"] is not found["other"]


def test_how_answers_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.8}')
    assert voices.drawn_as(str(tmp_path), None, None, None) == (0.9, 0.8)
    assert voices.drawn_as(str(tmp_path), None, 1.2, 1.0) == (1.2, 1.0)
    assert voices.drawn_as("a name", "http://127.0.0.1:1", 1.2, 1.0) == (1.2, 1.0)
    with pytest.raises(DataError, match="no such folder"):
        voices.drawn_as(str(tmp_path / "none"), None, None, None)
