"""Context distillation (Llama 2, section 4.2.4): a teacher sees more than the prompt, the student learns its answer to
the prompt alone. Pure functions over messages, answers and scores.

What the paper leaves open:
1. Where a preprompt goes: before the system message, in its place where there is none (`system`), or before the user's
   last message (`user`). With Llama 2's format the two are the same text for a prompt of one turn without a system
   message, but for the tags around it.
2. With K samples on either side the best are compared: the best answer of the teacher that may be kept against the
   best answer that the model gives without it, strictly. With K = 1 that is the paper's rule.
3. An answer that repeats `QUOTE` words in a row of the teacher's text is not kept: the student would learn to quote
   what it never sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2cli.text.records import Record, prompt_id
from llama2cli.text.streams import Place
from llama2cli.text.templates import Lesson

PLACES = ("system", "user")
QUOTE = 8
# Why an answer of the teacher may not be kept.
TRUNCATED, UNMATCHED, EMPTY, QUOTED = "truncated", "unmatched", "empty", "quotes the teacher"
WORSE = "not above"  # the answer without the teacher
REASONS = (WORSE, TRUNCATED, UNMATCHED, EMPTY, QUOTED)


def adversarial(record: Record) -> bool:
    """Whether a prompt is tagged so: the paper distils safety on such prompts only, for on others it does harm."""
    return record.get("unsafe") is True


def with_teacher(messages: Sequence[Record], lesson: Lesson, place: str = "system") -> list[Record]:
    """A prompt's messages as the teacher sees them: examples as earlier turns, the preprompt at `place`, the text
    around the last message. The messages that are given stay as they are."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    body = [*messages[1:]] if system or messages[0]["role"] == "system" else [*messages]
    asked = lesson.around(body[-1]["content"])
    if place == "user":
        asked = joined(lesson.preprompt, asked)
    else:
        system = joined(lesson.preprompt, system)
    turns = []
    for user, assistant in lesson.examples:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *turns, *body[:-1], {**body[-1], "content": asked}]


def joined(*texts: str) -> str:
    """The texts that say something, a blank line between them."""
    return "\n\n".join(text for text in texts if text)


def extracted(answer: str, pattern: re.Pattern[str] | None) -> str | None:
    """What a student is to learn of an answer, stripped: what the pattern's group matches (the whole match where it has
    none), the whole answer without a pattern, None where it does not match."""
    if pattern is None:
        return answer.strip()
    found = pattern.search(answer)
    return found[pattern.groups and 1].strip() if found and found[pattern.groups and 1] is not None else None


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def quotes(answer: str, lesson: Lesson, messages: Sequence[Record], n: int = QUOTE) -> bool:
    """Whether an answer has n words in a row of what only the teacher sees; those of the prompt itself it may repeat.

    n = 0: never.
    """
    if n == 0:
        return False
    secret = {run for text in lesson.texts() for run in _runs(text, n)}
    known = {run for message in messages for run in _runs(message["content"], n)}
    return any(run in secret and run not in known for run in _runs(answer, n))


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def flaw(answer: str | None, truncated: bool, keep_truncated: bool) -> str | None:
    """Why an answer (as `extracted`) may not be kept whatever its score, or None. See `quotes` for one more reason."""
    if truncated and not keep_truncated:
        return TRUNCATED
    if answer is None:
        return UNMATCHED
    return None if answer else EMPTY


def gate(taught: Sequence[float], plain: Sequence[float], allowed: Sequence[bool]) -> int | None:
    """The best of the teacher's answers that may be kept, if it scores above every answer without the teacher.

    taught [K], allowed [K]: score of each, and whether it may be kept; plain [K']: scores without the teacher; none:
    nothing is compared. So no kept prompt's score is lowered. The first of equals; None where none is kept.
    """
    best = max((i for i, may in enumerate(allowed) if may), key=lambda i: (taught[i], -i), default=None)
    if best is None or (plain and taught[best] <= max(plain)):
        return None
    assert not plain or taught[best] > max(plain)  # what the gate promises; NaN never gets here
    return best


def student(prompt: Record, sampled: Record, answer: str) -> Record:
    """The Sample that the student learns: the prompt as it was asked, the answer, and how it was sampled.

    prompt: fields that go with it, its messages bare. sampled: the teacher's Sample.
    """
    how: dict[str, Any] = {k: sampled[k] for k in OF_A_SAMPLE}
    return {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": answer}], **how}


OF_A_SAMPLE = ("sample", "policy", "temperature", "seed", "n_tokens", "truncated")


# --- one prompt ---------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A prompt and its answers: the model's own, and those under each lesson, as the student would learn them.

    lessons: what is distilled first, then what is there to compare. distilled: false for a prompt that is looked at
    only. flaws: why an answer of the first lesson may not be kept. logits: by reward model, for the plain
    answers and then for each lesson's.
    """

    place: Place
    prompt: Record
    lessons: list[Lesson]
    distilled: bool
    plain: list[Record] = field(default_factory=list)
    taught: list[list[Record]] = field(default_factory=list)
    flaws: list[str | None] = field(default_factory=list)
    logits: dict[str, list[list[float]]] = field(default_factory=dict)

    def learn(
        self,
        lesson: Lesson,
        samples: Sequence[Record],
        pattern: re.Pattern[str] | None,
        *,
        keep_truncated: bool,
        n: int,
    ) -> None:
        """Add a lesson's Samples as the student would learn them; of the first lesson's, why one may not be kept.

        n: as of `quotes`.
        """
        messages = self.prompt["messages"]
        prompt = {**self.prompt, "id": prompt_id(messages)}
        learnt = []
        for sampled in samples:
            whole = sampled["messages"][-1]["content"]
            answer = extracted(whole, pattern)
            learnt.append({**student(prompt, sampled, whole if answer is None else answer), "teacher": lesson.kind})
            if not self.taught:
                wrong = flaw(answer, sampled["truncated"], keep_truncated)
                if wrong is None and quotes(answer or "", lesson, messages, n):
                    wrong = QUOTED
                self.flaws.append(wrong)
        self.taught.append(learnt)

    def let_through(self, by: str | None) -> list[int]:
        """Which of the first lesson's answers are kept: the best one if it is above by this score, without a gate all
        that may be."""
        allowed = [flaw is None for flaw in self.flaws]
        if by is None:
            return [i for i, may in enumerate(allowed) if may]
        plain, taught = self.logits[by][:2]
        best = gate(taught, plain, allowed)
        return [] if best is None else [best]

    def shown(self, by: str | None) -> int:
        """Which of the first lesson's answers is shown where none is kept: the best that may be, or the best."""
        logits = self.logits[by][1] if by else [0.0] * len(self.flaws)
        return max(range(len(logits)), key=lambda i: (self.flaws[i] is None, logits[i], -i))

    def why(self, by: str | None) -> str:
        """Why none of them is kept: what is wrong with the one that is shown."""
        return self.flaws[self.shown(by)] or WORSE
