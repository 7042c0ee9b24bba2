"""What every fine-tuning stage settles before its loop: where it starts, what it holds out, how long it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2cli import provenance
from llama2cli.nn import checkpoint
from llama2cli.nn.config import LM, ModelConfig
from llama2cli.settings import Training
from llama2cli.text.folders import resolve_model
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import examples, session
from llama2cli.training.corpus import Named, parse_heldout
from llama2cli.training.dist import World
from llama2cli.training.examples import Part
from llama2cli.training.optim import warmup_steps


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from. config: the model's, its context extended where --context is longer."""

    folder: Path
    tokenizer: Tokenizer
    config: ModelConfig
    context: int
    notes: list[str]


def start_from(path: str, context: int | None, architecture: str | None = LM) -> Start:
    """Open a checkpoint; reads no weights. architecture: None takes a reward model too. Raises DataError."""
    folder = resolve_model(path)
    tokenizer = Tokenizer.load(folder)
    own = checkpoint.load_config(folder, architecture)
    checkpoint.check_tokenizer(own, tokenizer, path)
    longest = max(own.max_position_embeddings, context or 0)
    config = dataclasses.replace(own, max_position_embeddings=longest)
    notes = [] if config == own else [f"the context of {path} is extended to {longest:,} positions"]
    return Start(folder, tokenizer, config, context or longest, notes)


@dataclass(frozen=True)
class Split:
    """The parts that are trained on and those that are held out. paths: files of the latter."""

    parts: list[Part]
    heldout: list[Part]
    paths: list[str]
    notes: list[str]


def set_apart(
    texts: Sequence[str],
    parts: list[Part],
    groups: Sequence[int],
    read: Callable[[Sequence[Named]], list[Part]],
    what: str,
) -> Split:
    """Hold out what --heldout says: a fraction of each source's prompts, or files, whose prompts are not trained on.

    groups: of all examples that are read, by prompt; `read` reads more of them. what: they are. Raises Misuse, and
    DataError where nothing is left.
    """
    held = parse_heldout(texts)
    if isinstance(held, float):
        kept, out = examples.split_all(parts, groups, held)
        return Split(kept, out, [], [])
    if not held:
        return Split(parts, [], [], [])
    out = read(held)
    kept, left_out = examples.without(parts, groups, out)
    told = f"{left_out:,} {what} are not trained on: --heldout has their prompts"
    return Split(kept, out, [n.path for n in held], [told] if left_out else [])


@dataclass(frozen=True)
class Length:
    """How long a run is. total: examples, None where --steps says it; epochs: passes over the data."""

    total: int | None
    steps: int
    epochs: float
    eval_every: int
    notes: list[str]


def length_of(settings: Training, count: Callable[[int], int], batch_size: int, epochs: float) -> Length:
    """The length of a run of `epochs`, or of --steps, measured four times an epoch. count: examples of an epoch."""
    an_epoch = count(0)
    total = None if settings.steps else examples.length(count, epochs)
    steps = settings.steps or -(-(total or 0) // batch_size)
    epochs = (total or steps * batch_size) / an_epoch
    told = f"one step reads the data {epochs / steps:,.1f} times; a smaller --batch-size?"
    return Length(total, steps, epochs, max(1, an_epoch // batch_size // 4), [told] if epochs > steps else [])


def resolve(
    settings: Training,
    world: World,
    start: Start,
    split: Split,
    length: Length,
    *,
    lr: float,
    batch_size: int,
    digest: Callable[[Part], str],
    eval_every: int | None,
) -> dict[str, Any]:
    """What the settings of every fine-tuning stage come to. digest: a hash of the examples of a part."""

    def told(parts: list[Part]) -> list[dict[str, Any]]:
        return [examples.described(p) | {"sha256": digest(p)} for p in parts]

    return {
        **session.resolve(
            settings,
            world,
            context=start.context,
            steps=length.steps,
            lr=lr,
            warmup=warmup_steps(length.steps, settings.warmup, tuning=True),
            eval_every=eval_every,
        ),
        "batch_size": batch_size,
        "micro_tokens": session.tokens_at_once(settings, world),
        "data": told(split.parts),
        "heldout": told(split.heldout),
        "tokenizer": start.tokenizer.sha256,
        "init": provenance.fingerprint(start.folder),
        "model": dataclasses.asdict(start.config),
    }
