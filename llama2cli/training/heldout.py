"""Held-out loss and bits per byte of each source.

A held-out stream is cut into windows of `context` predicted tokens, as in training, without overlap: every token but
the first is predicted once, BOS and EOS among them. Bits per byte are the bits of all of these over the UTF-8 bytes of
the text that they stand for, so that runs with different tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llama2cli.errors import DataError, Failure
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import dist
from llama2cli.training.data import IGNORED, Stream, as_micro
from llama2cli.training.dist import World
from llama2cli.training.fit import HELD_OUT, autocast, moved


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out text of one source. tokens: how many of the stream are used; n_bytes: of what they predict."""

    stream: Stream
    tokens: int
    n_bytes: int


def held_out(stream: Stream, tokenizer: Tokenizer, limit: int | None) -> HeldOut:
    """What is measured of a stream: all of it, or its first `limit` predicted tokens. Raises DataError for no text."""
    tokens = stream.n_tokens if limit is None else min(stream.n_tokens, limit + 1)
    n_bytes = count_bytes(stream, tokens, tokenizer)
    if not n_bytes:
        raise DataError(f'the held-out part of source "{stream.name}" has no text')
    return HeldOut(stream, tokens, n_bytes)


def count_bytes(stream: Stream, tokens: int, tokenizer: Tokenizer, block: int = 1 << 20) -> int:
    """UTF-8 bytes of the text of a stream's tokens 1..tokens-1.

    Added up by piece, which is exact wherever a document is cut. The space that SentencePiece puts before a text is no
    byte of it.
    """
    sizes = np.array([len(tokenizer.id_to_bytes(i)) for i in range(tokenizer.vocab_size)])
    total = 0
    for start in range(0, tokens - 1, block):
        ids = stream.read(start, min(start + block + 1, tokens))
        before, ids = ids[:-1], ids[1:]
        total += int(sizes[ids].sum())
        if tokenizer.spec.add_dummy_prefix:
            total -= int(((before == tokenizer.bos_id) & (ids != tokenizer.eos_id)).sum())
    return total


def window(held: HeldOut, number: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 [context] each; the last window is filled up with targets that have no loss."""
    start = number * context
    ids = held.stream.read(start, min(start + context + 1, held.tokens))
    short = context + 1 - len(ids)
    return np.pad(ids[:-1], (0, short)), np.pad(ids[1:], (0, short), constant_values=IGNORED)


@torch.no_grad()
def measure(
    loss: nn.Module, parts: Sequence[HeldOut], context: int, rows: int, world: World, dtype: torch.dtype
) -> dict[str, Any]:
    """Held-out metrics: the mean of the sources' losses, and of each its loss (nats a token) and bits per byte.

    rows: windows that are run at once. Raises Failure where a loss is not finite.
    """
    nlls = [0.0] * len(parts)
    blank = (np.zeros(context, np.int64), np.full(context, IGNORED))
    for i, part in enumerate(parts):
        n = -(-(part.tokens - 1) // context)
        for start in range(
            0, n, rows * world.size
        ):  # every rank runs as many forward passes; the last may hold nothing
            first = start + world.rank * rows
            chosen = [window(part, j, context) for j in range(first, min(first + rows, n))] or [blank]
            inputs, targets = zip(*chosen)
            micro = as_micro(np.stack(inputs), np.stack(targets))
            with autocast(world.device, dtype):
                nlls[i] += float(loss(**moved(micro, world.device)))
    dist.reshard(loss)
    return summary(parts, dist.sums(world, nlls))


def summary(parts: Sequence[HeldOut], nlls: Sequence[float]) -> dict[str, Any]:
    """Metrics from the sum of -log p over each part, in nats."""
    sources: dict[str, Mapping[str, float]] = {}
    for part, nll in zip(parts, nlls):
        if not math.isfinite(nll):
            raise Failure(
                f'the held-out loss of source "{part.stream.name}" is {nll}: stopped; the last checkpoint is good'
            )
        sources[part.stream.name] = {
            "loss": nll / (part.tokens - 1),
            "bits_per_byte": nll / math.log(2) / part.n_bytes,
        }
    return {HELD_OUT: sum(s["loss"] for s in sources.values()) / len(sources), "heldout": sources}
