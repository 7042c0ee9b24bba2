"""`llama2 score`: how good answers are, by reward models (Llama 2, sections 3.2.2 and 3.2.3) and classifiers.

Choices where the paper is silent:
1. A dialogue is read at the EOS behind its last answer; an answer that was cut has none, and is read at its last token.
2. A model's `score_offset`, which gives its scores the origin that the threshold presumes, is added.
3. `--long cut` cuts the end of a dialogue, as `rm-train --long cut` does; it is read at the last token that is left.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.measure.rates import sigmoid
from llama2cli.settings import Compute, Filter, flag
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.folders import resolve_model
from llama2cli.text.records import KNOWN, Record
from llama2cli.text.streams import Place, open_output, read_records, some, windows

if TYPE_CHECKING:
    from llama2cli.sampling.scoring import Scorer
    from llama2cli.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(Filter, Compute):
    """Score the last answer of dialogues with reward models and classifiers.

    A record {"messages": [...]} that ends with an assistant's message gets "help" and "safe", from 0 to 1. With both
    models it gets "reward" too, a logit: the safety model's where the record has "unsafe": true or "safe" is below
    0.15, else the helpfulness model's. Answers with "truncated": true are read without an end of text. Other fields
    pass through, the order is that of the input.

    Example:
      llama2 score examples/data/chat.jsonl --rm-help rm-help --rm-safe rm-safe --long skip -o scored.jsonl
    """

    rm_help: str | None = flag(default=None, help='the helpfulness reward model; gives "help"', complete="checkpoint")
    rm_safe: str | None = flag(default=None, help='the safety reward model; gives "safe"', complete="checkpoint")
    others: list[str] = flag(
        rename="--as",
        default=[],
        metavar="NAME=MODEL",
        help="one more reward model or classifier, and the field that it gives; repeatable",
    )
    logits: bool = flag(default=False, help='the scores before the sigmoid too: "help_logit", "safe_logit"')
    long: Literal["error", "cut", "skip"] = flag(
        default="error", help="dialogues longer than the context: an error, cut at the end, or left out (both counted)"
    )
    tags: Literal["escape", "refuse", "keep"] = flag(
        default="escape", help="what to do with tags of the chat format, as [INST], in any message"
    )
    batch_tokens: int | None = flag(
        default=None, low=1, help="tokens that are computed at the same time (default: 2048 on a CPU, 16384 on CUDA)"
    )


@dataclass
class Counts:
    """What the closing lines tell."""

    dialogues: int = 0
    tokens: int = 0
    by_safety: int = 0
    truncated: int = 0
    cut: int = 0
    skipped: int = 0
    escaped: int = 0
    replaced: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


class Asked(NamedTuple):
    """A dialogue to be scored: its record, and its ids by the tokenizer of each model."""

    record: Record
    ids: dict[str, list[int]]


def run(settings: Settings) -> None:
    """Read dialogues, score them window by window, write them in their order."""
    # 1. what is asked: the first record is read, and the output opened, before a model is loaded
    paths = models(settings)
    folders = sorted({resolve_model(path) for path in paths.values()})
    dialogues = some(read_records(settings.files, "answered", max_line=settings.max_line), settings.files)
    if settings.provenance:
        provenance.write(settings.provenance, settings, [*settings.files, *paths.values()])
    with open_output(settings, paths=folders) as out:
        # 2. the models
        scorers = load(paths, settings)
        counts, done = Counts(sums=dict.fromkeys(paths, 0.0)), out.skip
        # 3. the scores
        with console.Progress("score", unit="dialogues") as progress:
            for window in windows(out.rest(dialogues), settings.window):
                asked = prepare(window, scorers, settings, counts)
                tick = ticker(progress, counts, len(scorers))
                logits = {}
                for name, scorer in scorers.items():
                    logits[name] = scorer.score([a.ids[scorer.tokenizer.sha256] for a in asked], tick=tick)
                for record in scored([a.record for a in asked], logits, settings, counts):
                    out.write(record)
                done += len(window)
                out.commit(done)
    report(counts, settings, len(scorers))


def models(settings: Settings) -> dict[str, str]:
    """The folder of each model by the field that it gives. Raises Misuse."""
    paths = {name: path for name, path in (("help", settings.rm_help), ("safe", settings.rm_safe)) if path is not None}
    for given in settings.others:
        name, _, path = given.partition("=")
        if not path or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise Misuse(f'expected NAME=MODEL, as refusal=run, got "{given}"', "--as")
        if name in KNOWN or name.endswith("_logit"):
            raise Misuse(f'"{name}" is a field of records already; give another name', "--as")
        if name in paths:
            raise Misuse(f'"{name}" is given twice', "--as")
        paths[name] = path
    if not paths:
        raise Misuse("there is no model to score with: give --rm-help, --rm-safe or --as NAME=MODEL")
    return paths


def load(paths: dict[str, str], settings: Settings) -> dict[str, Scorer]:
    """The models; one that is named twice is loaded once."""
    from llama2cli.sampling.voices import open_scorers

    return open_scorers(paths, device=settings.device, dtype=settings.dtype, tokens=settings.batch_tokens)


# --- dialogues to ids ---------------------------------------------------------------------------------------------


def prepare(
    window: Sequence[tuple[Place, Record]], scorers: dict[str, Scorer], settings: Settings, counts: Counts
) -> list[Asked]:
    """The dialogues of a window as ids, without those that `--long skip` leaves out."""
    tokenizers = {s.tokenizer.sha256: s.tokenizer for s in scorers.values()}
    context = min(s.context for s in scorers.values())
    asked = []
    for place, record in window:
        encoded = [encode(record, tokenizer, settings, place) for tokenizer in tokenizers.values()]
        n_escaped, longest = encoded[0][1], max(len(ids) for ids, _ in encoded)
        if longest > context:
            what = f"the dialogue has {longest:,} tokens, the context of the model is {context:,}"
            if settings.long == "error":
                raise DataError(f"{what}; --long cut shortens it, --long skip leaves it out", *place)
            if settings.long == "skip":
                console.warn(f"{place.file}:{place.line}: left out: {what}", "dialogues left out that are too long")
                counts.skipped += 1
                continue
            console.warn(f"{place.file}:{place.line}: cut: {what}", "dialogues cut to the context")
            counts.cut += 1
            for tokenizer in tokenizers.values():
                refuse_lost_answer(record, tokenizer, context, settings, place)
            encoded = [(ids[:context], n) for ids, n in encoded]
        counts.dialogues += 1
        counts.tokens += len(encoded[0][0])
        counts.truncated += bool(record.get("truncated"))
        counts.escaped += n_escaped
        asked.append(Asked(record, dict(zip(tokenizers, (ids for ids, _ in encoded)))))
    return asked


def encode(record: Record, tokenizer: Tokenizer, settings: Settings, place: Place) -> tuple[list[int], int]:
    """The ids of a dialogue as a reward model reads it, and the tags that were escaped."""
    truncated = bool(record.get("truncated"))
    encoded = encode_dialogue(tokenizer, record["messages"], truncated=truncated, tags=settings.tags, place=place)
    return encoded.ids, encoded.n_escaped


def refuse_lost_answer(record: Record, tokenizer: Tokenizer, context: int, settings: Settings, place: Place) -> None:
    """Raise DataError for a dialogue that cut to the context would have no token of its answer."""
    prompt = encode_dialogue(tokenizer, record["messages"][:-1], tags=settings.tags, place=place).ids
    if len(prompt) >= context:
        what = f"the prompt alone has {len(prompt):,} tokens, the context of the model is {context:,}"
        raise DataError(f"{what}; --long skip leaves such dialogues out", *place)


# --- scores to records --------------------------------------------------------------------------------------------


def scored(
    records: Sequence[Record], logits: dict[str, list[float]], settings: Settings, counts: Counts
) -> list[Record]:
    """The records with their scores. Those of an earlier `score` that would contradict them are taken out."""
    rewards = selected(records, logits["help"], logits["safe"], counts) if {"help", "safe"} <= set(logits) else None
    earlier = {*logits, *(f"{name}_logit" for name in logits)} | (
        {"reward"} if {"help", "safe"} & set(logits) else set()
    )
    out = []
    for i, record in enumerate(records):
        kept = {k: v for k, v in record.items() if k not in earlier}
        counts.replaced += len(kept) < len(record)
        found = {name: sigmoid(values[i]) for name, values in logits.items()}
        for name, value in found.items():
            counts.sums[name] += value
        if settings.logits:
            found |= {f"{name}_logit": values[i] for name, values in logits.items()}
        if rewards is not None:
            found["reward"] = rewards[i]
        out.append({**kept, **found})
    return out


def selected(
    records: Sequence[Record], help_logits: list[float], safe_logits: list[float], counts: Counts
) -> list[float]:
    """The reward of each record, by the piecewise rule."""
    from llama2cli.rlhf.rewards import combined

    unsafe = [bool(record.get("unsafe")) for record in records]
    rewards, by_safety = combined(help_logits, safe_logits, unsafe)
    counts.by_safety += sum(by_safety)
    return rewards


# --- telling ------------------------------------------------------------------------------------------------------


def ticker(progress: console.Progress, counts: Counts, n_models: int) -> Callable[[int], None]:
    """What is told of dialogues that one of the models has read."""

    def tick(n: int) -> None:
        seconds = max(time.monotonic() - counts.began, 1e-9)
        done = progress.done - progress.first + n / n_models
        progress.advance(n / n_models, note=f"{done / seconds:,.0f} dialogues/s")

    return tick


def report(counts: Counts, settings: Settings, n_models: int) -> None:
    """The closing line on stderr."""
    seconds = max(time.monotonic() - counts.began, 1e-9)
    n = counts.dialogues
    parts = [f"{n:,} {'dialogue' if n == 1 else 'dialogues'}, {n / seconds:,.0f} dialogues/s"]
    by = f" by each of {n_models} models" if n_models > 1 else ""
    parts.append(f"{counts.tokens:,} tokens{by}, {counts.tokens * n_models / seconds:,.0f} tokens/s")
    if n:
        parts.append("means: " + ", ".join(f"{name} {total / n:.3f}" for name, total in counts.sums.items()))
    if counts.by_safety:
        parts.append(f"the reward of {counts.by_safety:,} is the safety model's")
    if counts.truncated:
        parts.append(f"{counts.truncated:,} truncated answers read without an end")
    if counts.cut:
        parts.append(f"{counts.cut:,} cut to the context")
    if counts.skipped:
        parts.append(f"{counts.skipped:,} left out: longer than the context")
    if counts.escaped:
        parts.append(f"{counts.escaped:,} tags of the chat format escaped")
    if counts.replaced:
        parts.append(f"{counts.replaced:,} had scores already, which were replaced")
    console.say("; ".join(parts))
