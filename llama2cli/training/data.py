"""Pretraining data: token folders mixed by weight into rows of `context + 1` tokens.

Iterators that are composed; each yields (item, position), and what comes after a position depends on it, the seed and
the settings alone. So a run that is resumed at a position sees what an uninterrupted one would.

Choices that the paper leaves open:
1. A source's documents are one long stream (each BOS, text, EOS), cut into windows of `context` predicted tokens; a
   window may span documents, and attention does too.
2. An epoch of a source is all its windows in a shuffled order of its own; where the first begins differs by epoch.
3. Each row's source is drawn independently, with probability = weight / sum of weights. Without weights it is the
   source's share of the tokens.
4. Held-out documents are chosen by a hash of their number, not by --seed: runs with different seeds compare. Of a
   source that is one document, its end is held out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2cli.errors import DataError
from llama2cli.text.shards import TokenFolder
from llama2cli.training.order import mix, name_key, shuffled, splitmix

IGNORED = -100  # a target that has no loss
Position = dict[str, Any]


# --- sources ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stream:
    """Some documents of a token folder as one stream of ids.

    name: of the source. starts, stops: int64 arrays, the runs of the folder's own stream that it is made of.
    """

    name: str
    folder: TokenFolder
    starts: np.ndarray
    stops: np.ndarray
    documents: int

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each run ends in this stream."""
        return np.cumsum(self.stops - self.starts)

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 ids [stop - start]."""
        if len(self.starts) == 1:
            return self.folder.read(int(self.starts[0]) + start, int(self.starts[0]) + stop)
        ends = self.ends
        out = []
        run = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            upto = min(stop, int(ends[run]))
            shift = int(self.stops[run]) - int(ends[run])
            out.append(self.folder.read(start + shift, upto + shift))
            start, run = upto, run + 1
        return np.concatenate(out) if out else np.empty(0, np.int64)


def whole(name: str, folder: TokenFolder) -> Stream:
    """All documents of a folder."""
    return Stream(name, folder, np.array([0]), np.array([folder.n_tokens]), folder.n_documents)


def split(name: str, folder: TokenFolder, fraction: float) -> tuple[Stream, Stream]:
    """(training, held-out) documents of a folder; about `fraction` of its tokens are held out.

    Documents are taken in the order of a hash of their number while they fit, at least one; of a single document its
    end is. Raises DataError where nothing would be left to train on.
    """
    starts = np.asarray(folder.document_starts(), np.int64)
    stops = np.append(starts[1:], folder.n_tokens)
    n = len(starts)
    if n == 0:
        raise DataError(f'source "{name}" has no documents')
    if n == 1:
        cut = folder.n_tokens - max(2, int(fraction * folder.n_tokens))  # one token that is predicted, at the least
        if cut < 2:
            raise DataError(f'source "{name}" has {folder.n_tokens} tokens: nothing can be held out of it')
        return tuple(Stream(name, folder, np.array([a]), np.array([b]), 1) for a, b in ((0, cut), (cut, stops[0])))  # type: ignore[return-value]
    lengths, room = stops - starts, int(fraction * folder.n_tokens)
    taken = np.zeros(n, bool)
    left = np.argsort(splitmix(np.arange(n, dtype=np.uint64)), kind="stable")
    while len(left := left[lengths[left] <= room]):
        fit = int(np.searchsorted(np.cumsum(lengths[left]), room, side="right"))
        taken[left[:fit]] = True
        room -= int(lengths[left[:fit]].sum())
        left = left[fit:]
    if not taken.any():
        taken[lengths.argmin()] = True
    if taken.all():
        raise DataError(f'--heldout {fraction} leaves no document of source "{name}" to train on')
    return tuple(_runs(name, folder, starts[keep], stops[keep]) for keep in (~taken, taken))  # type: ignore[return-value]


def _runs(name: str, folder: TokenFolder, starts: np.ndarray, stops: np.ndarray) -> Stream:
    """The stream of these documents, neighbours joined."""
    first = np.append(True, starts[1:] != stops[:-1])
    last = np.append(first[1:], True)
    return Stream(name, folder, starts[first], stops[last], len(starts))


@dataclass(frozen=True, eq=False)
class Source:
    """A stream and how it is walked: windows of `context` predicted tokens, drawn with probability `share`."""

    stream: Stream
    share: float
    context: int

    @property
    def name(self) -> str:
        """The name that the user gave it."""
        return self.stream.name

    @property
    def windows(self) -> int:
        """Windows in one epoch."""
        return (self.stream.n_tokens - 1) // self.context

    def window(self, number: int, seed: int) -> np.ndarray:
        """int64 ids [context + 1] of the window that is read as the number-th (from 0) since the run began."""
        epoch, i = divmod(number, self.windows)
        key = mix(seed, name_key(self.name), epoch)
        spare = (self.stream.n_tokens - 1) % self.context  # tokens that the last window leaves: share them out by epoch
        start = key % (spare + 1) + shuffled(i, self.windows, key) * self.context
        return self.stream.read(start, start + self.context + 1)


def sources(streams: Sequence[Stream], weights: Sequence[float | None], context: int) -> list[Source]:
    """Sources with their shares, weights all given or none. Raises DataError where one is shorter than one window."""
    for s in streams:
        if s.n_tokens < context + 1:
            need = f"one row of --context {context} needs {context + 1}"
            raise DataError(f'source "{s.name}" has {s.n_tokens:,} tokens to train on, {need}')
    if all(w is None for w in weights):
        weights = [s.n_tokens for s in streams]
    total = sum(w or 0 for w in weights)
    return [Source(s, (w or 0) / total, context) for s, w in zip(streams, weights)]


# --- rows and batches ---------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A row before it is read: which source, and its how-many-eth window."""

    source: int
    number: int


def draws(shares: Sequence[float], seed: int, position: Position | None = None) -> Iterator[tuple[Draw, Position]]:
    """Rows in the order of training, without end. Position: {"row": n, "drawn": [windows of each source]}."""
    bounds = list(accumulate(shares))
    row = position["row"] if position else 0
    drawn = list(position["drawn"]) if position else [0] * len(shares)
    while True:
        at = mix(seed, 0x524F57, row) / 2**64 * bounds[-1]
        source = min(bisect_right(bounds, at), len(shares) - 1)
        draw = Draw(source, drawn[source])
        row, drawn[source] = row + 1, drawn[source] + 1
        yield draw, {"row": row, "drawn": list(drawn)}


@dataclass(frozen=True)
class Batch:
    """What one optimizer step is made of.

    micro: this rank's micro-batches, arguments of the loss by name. count: tokens (pairs, ...) that the loss is divided
    by: all that count, in all micro-batches of all ranks. tokens: that go through the model, padding left out, where
    they are not the same. items: dialogues or pairs, where the stage counts in them.
    """

    micro: list[dict[str, Tensor]]
    count: int
    tokens: int | None = None
    items: int | None = None


@dataclass(frozen=True)
class Shape:
    """How a step's rows are split. rows: of all ranks, a multiple of `size`; micro: rows that are run at once."""

    rows: int
    micro: int
    rank: int = 0
    size: int = 1

    @property
    def mine(self) -> range:
        """The rows of this rank, by their place in the batch."""
        each = self.rows // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def as_micro(inputs: np.ndarray, targets: np.ndarray) -> dict[str, Tensor]:
    """A micro-batch: int64 ids and targets, [B, T] each."""
    return {"ids_BT": torch.from_numpy(inputs), "targets_BT": torch.from_numpy(targets)}


def as_batch(rows: Sequence[np.ndarray], shape: Shape, context: int) -> Batch:
    """A batch of this rank's rows, each [context + 1]: inputs and the tokens after them."""
    stacks = (np.stack(rows[i : i + shape.micro]) for i in range(0, len(rows), shape.micro))
    return Batch([as_micro(ids[:, :-1], ids[:, 1:]) for ids in stacks], shape.rows * context)


def batches(
    mixed: Sequence[Source], seed: int, shape: Shape, position: Position | None = None
) -> Iterator[tuple[Batch, Position]]:
    """Batches of a weighted mixture, without end; each rank reads its own rows only."""
    order = draws([s.share for s in mixed], seed, position)
    while True:
        chosen = []
        for _ in range(shape.rows):
            draw, position = next(order)
            chosen.append(draw)
        rows = [mixed[chosen[i].source].window(chosen[i].number, seed) for i in shape.mine]
        assert position is not None
        yield as_batch(rows, shape, mixed[0].context), position


def streamed_batches(records: Iterable[dict[str, Any]], context: int, shape: Shape) -> Iterator[tuple[Batch, Position]]:
    """Batches of `{"ids"}` records in the order in which they come; ends where less than a batch is left.

    A record is a document: it gets BOS and EOS where it has none. Position: {"row": n}.
    """
    windows = stream_windows(records, context)
    for row in count(shape.rows, shape.rows):
        rows = list(islice(windows, shape.rows))
        if len(rows) < shape.rows:
            return
        yield as_batch(rows, shape, context), {"row": row}


def stream_windows(records: Iterable[dict[str, Any]], context: int) -> Iterator[np.ndarray]:
    """Rows [context + 1] of documents that follow each other; neighbours share one token."""
    held = np.empty(0, np.int64)
    for record in records:
        ids = np.asarray(record["ids"], np.int64)
        held = np.concatenate([held, *document(ids)])
        while len(held) > context:
            yield held[: context + 1]
            held = held[context:]


def document(ids: np.ndarray, bos: int = 1, eos: int = 2) -> list[np.ndarray]:
    """A document's ids between BOS and EOS; neither is doubled."""
    before = [] if len(ids) and ids[0] == bos else [np.array([bos])]
    after = [] if len(ids) and ids[-1] == eos else [np.array([eos])]
    return [*before, ids, *after]


def epochs(mixed: Sequence[Source], position: Position) -> dict[str, float]:
    """How often each source has been read: windows drawn over windows in an epoch."""
    return {s.name: n / s.windows for s, n in zip(mixed, position["drawn"])}
