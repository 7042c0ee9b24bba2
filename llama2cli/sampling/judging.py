"""Answers before reward models: from answered dialogues to a logit of each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llama2cli import console
from llama2cli.sampling.scoring import Scorer
from llama2cli.sampling.turns import encode_recent
from llama2cli.text.chat import Written, encode_dialogue
from llama2cli.text.records import Record
from llama2cli.text.streams import Place

Groups = Sequence[tuple[Place, Sequence[Record]]]  # the place of a prompt, and its answered dialogues


class Judged(NamedTuple):
    """Logits of the answers to each prompt, in order; cut: how many were read up to the end of the context."""

    logits: list[list[float]]
    cut: int


def score_answers(
    scorer: Scorer, groups: Groups, *, tags: Written = "escape", tick: Callable[[int], None] | None = None
) -> Judged:
    """The logits of answers by prompt, read at the EOS behind each, or of one with `truncated` at its last token.

    Equal sequences are computed once. One that ends behind the context is read at the last token that fits, with a
    counted warning. tick is called with the number of sequences that a forward pass has scored. Raises as
    `encode_dialogue` and `Scorer.score` do.
    """
    sequences: dict[tuple[int, ...], int] = {}
    where: list[int] = []  # the sequence of each answer
    cut = 0
    for place, answers in groups:
        for answer in answers:
            truncated = bool(answer.get("truncated"))
            whole = encode_dialogue(scorer.tokenizer, answer["messages"], truncated=truncated, tags=tags, place=place)
            ids = tuple(whole.ids[: scorer.context])
            if len(ids) < len(whole.ids):
                what = f"the answer ends behind the context of the reward model, {scorer.context:,} tokens"
                console.warn(f"{place.file}:{place.line}: {what}", "answers scored where they are cut")
                cut += 1
            where.append(sequences.setdefault(ids, len(sequences)))
    found = scorer.score(list(sequences), tick=tick) if sequences else []
    logits = iter([found[i] for i in where])
    return Judged([[next(logits) for _ in answers] for _, answers in groups], cut)


def judge_answers(
    scorers: Mapping[str, Scorer], groups: Groups, *, tags: Written, progress: console.Progress
) -> tuple[list[dict[str, list[float]]], int]:
    """For each prompt the logits of its answers by reward model, and how many were cut; the bar's note tells of it."""
    by_prompt: list[dict[str, list[float]]] = [{} for _ in groups]
    cut = 0
    for name, scorer in scorers.items():
        done = 0

        def tick(n: int, name: str = name) -> None:
            nonlocal done
            done += n
            progress.advance(0, note=f"{name}: {done:,} scored")

        judged = score_answers(scorer, groups, tags=tags, tick=tick)
        cut += judged.cut
        for logits, of_prompt in zip(by_prompt, judged.logits, strict=True):
            logits[name] = of_prompt
    return by_prompt, cut


def score_recent(
    scorer: Scorer, dialogues: Sequence[tuple[Place, Sequence[Record], bool]], *, tags: Written
) -> tuple[list[float], int]:
    """The logit of the last answer of each dialogue (its place, messages, whether that answer was cut), in order.

    Of one that is longer than the context its first turns are left out (see `encode_recent`): of how many, is the
    second result.
    """
    sequences, forgot = [], 0
    for place, messages, truncated in dialogues:
        ids, left_out = encode_recent(
            scorer.tokenizer, messages, scorer.context, truncated=truncated, tags=tags, place=place
        )
        sequences.append(ids)
        forgot += left_out
    return scorer.score(sequences), forgot
