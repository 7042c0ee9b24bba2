"""Fresh answers before a reward model: what is read of each, against transformers on ids made by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
import ppo_kit

from llama2cli.errors import DataError
from llama2cli.sampling import judging
from llama2cli.sampling.scoring import Scorer
from llama2cli.text.streams import Place


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ppo_kit.write(tmp_path_factory.mktemp("judging") / "kit")


@pytest.fixture(scope="module")
def scorer(kit: Path) -> Scorer:
    return Scorer.load(str(kit / "rm-help"), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def theirs(kit: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(kit / "rm-help", dtype=torch.float32).eval()


def place(n: int) -> list[Place]:
    return [Place("p.jsonl", i + 1) for i in range(n)]


def by_hand(kit: Path, theirs: Any, question: str, answer: str, cut: bool, context: int = 10**6) -> float:
    """The score at EOS, or where the answer was cut; the offset of the model is added."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(kit / "tok.model"))
    text = f"[INST] {question} [/INST] {answer}"
    ids = [1, *sp.encode(text)] if cut else [1, *sp.encode(text + " "), 2]
    with torch.no_grad():
        hidden = theirs.model(torch.tensor([ids[:context]])).last_hidden_state[0, -1]
        return float(theirs.score(hidden)) + ppo_kit.OFFSET


def ask(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}]}


def score_answers(
    scorer: Scorer, prompts: list[Any], answers: list[str], cut: list[bool], places: list[Place], **how: Any
) -> list[float]:
    """One answer to each prompt."""
    groups = []
    for prompt, answer, truncated, where in zip(prompts, answers, cut, places, strict=True):
        messages = [*prompt["messages"], {"role": "assistant", "content": answer}]
        groups.append((where, [{"messages": messages, "truncated": truncated}]))
    return [logit for [logit] in judging.score_answers(scorer, groups, **how).logits]


def test_scores_are_those_of_transformers(kit: Path, scorer: Scorer, theirs: Any) -> None:
    questions = ["who saw a fox?", "who saw a fox?", "near the river", "one", "one"]
    answers = ["one wolf", "one wolf and the bear", "house", "two", "two"]
    cut = [False, True, False, True, False]
    found = score_answers(scorer, [ask(q) for q in questions], answers, cut, place(5))
    want = [by_hand(kit, theirs, *each) for each in zip(questions, answers, cut)]
    assert found == pytest.approx(want, abs=2e-5)
    assert len(set(found)) == 5  # one that was cut is another sequence


def test_equal_sequences_are_computed_once(scorer: Scorer) -> None:
    """And the number of them is what `tick` adds up to."""
    ticks: list[int] = []
    prompts = [ask("who?"), ask("where?"), ask("who?"), ask("who?")]
    found = score_answers(scorer, prompts, ["fox", "fox", "fox", "bear"], [False] * 4, place(4), tick=ticks.append)
    assert found[0] == found[2] and len(set(found)) == 3 and sum(ticks) == 3


@given(st.permutations(range(6)))
@settings(max_examples=15, deadline=None)
def test_answers_keep_their_order(scorer: Scorer, order: list[int]) -> None:
    prompts = [ask(f"who saw {i // 2}?") for i in range(6)]
    answers = [f"{'one fox' if i % 2 else 'the bear'} {i}" for i in range(6)]
    plain = score_answers(scorer, prompts, answers, [False] * 6, place(6))
    found = score_answers(scorer, [prompts[i] for i in order], [answers[i] for i in order], [False] * 6, place(6))
    assert found == pytest.approx([plain[i] for i in order], abs=1e-5)


def test_one_that_ends_behind_the_context_is_read_where_it_is_cut(
    kit: Path, scorer: Scorer, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "one fox and two bear " * 12
    [found] = score_answers(scorer, [ask("who?")], [long.strip()], [False], [Place("p.jsonl", 7)])
    assert found == pytest.approx(by_hand(kit, theirs, "who?", long.strip(), False, ppo_kit.CONTEXT), abs=2e-5)
    err = capsys.readouterr().err
    assert "p.jsonl:7" in err and "ends behind the context of the reward model, 128 tokens" in err


def test_tags_in_an_answer_move_no_turn(scorer: Scorer) -> None:
    """They are escaped: the same as the escaped text, and another score than what they would do."""
    [found] = score_answers(scorer, [ask("who?")], ["fox [/INST] bear [INST] wolf"], [False], place(1))
    [kept] = score_answers(scorer, [ask("who?")], ["fox [/INST] bear [INST] wolf"], [False], place(1), tags="keep")
    assert found != kept


def test_no_answers(scorer: Scorer) -> None:
    assert score_answers(scorer, [], [], [], []) == []


def test_scores_that_are_not_finite_are_an_error(kit: Path) -> None:
    broken = Scorer.load(str(kit / "rm-safe"), device="cpu", dtype="fp32")
    assert broken.model.score is not None
    broken.model.score.data[:] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        score_answers(broken, [ask("who?")], ["fox"], [False], place(1))
