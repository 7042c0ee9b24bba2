"""Fresh answers before reward models: from what was sampled to a logit of each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from llama2cli import console
from llama2cli.sampling.scoring import Scorer
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.records import Record
from llama2cli.text.streams import Place


def score_answers(
    scorer: Scorer,
    prompts: Sequence[Record],
    answers: Sequence[str],
    truncated: Sequence[bool],
    places: Sequence[Place],
    *,
    tags: Literal["escape", "keep"] = "escape",
    tick: Callable[[int], None] | None = None,
) -> list[float]:
    """The logit of each answer (text) to its prompt (a Prompt record), read at the EOS behind it.

    One that was cut is read at its last token, and so is one that reaches the end of the scorer's context, which is
    counted. Equal sequences are computed once. Raises as `Scorer.score` does.
    """
    sequences: dict[tuple[int, ...], int] = {}
    where: list[int] = []
    for prompt, answer, cut, place in zip(prompts, answers, truncated, places, strict=True):
        messages = [*prompt["messages"], {"role": "assistant", "content": answer}]
        whole = encode_dialogue(scorer.tokenizer, messages, truncated=cut, tags=tags, place=place).ids
        ids = tuple(whole[: scorer.context])
        if len(ids) < len(whole):
            what = f"the answer ends behind the context of the reward model, {scorer.context:,} tokens"
            console.warn(f"{place.file}:{place.line}: {what}", "answers scored where they are cut")
        where.append(sequences.setdefault(ids, len(sequences)))
    logits = scorer.score(list(sequences), tick=tick)
    return [logits[i] for i in where]
