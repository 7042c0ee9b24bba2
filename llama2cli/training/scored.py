"""What a reward model is trained on: pairs of dialogues with a common prompt, or single dialogues with a label.

Each example is one piece (`nn.packing`): of a pair the common beginning stands in the row once, the two answers behind
it as branches. Scores, loss and gradients are those of two rows, for fewer tokens. Scores are read at the last token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llama2cli import console
from llama2cli.nn import packing
from llama2cli.nn.model import Llama
from llama2cli.nn.packing import Piece
from llama2cli.training import dist
from llama2cli.training.data import Batch, Position
from llama2cli.training.dist import World
from llama2cli.training.examples import Order, Part, Ragged, walk
from llama2cli.training.fit import autocast, moved

Long = Literal["drop", "cut"]


# --- examples -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the records that were read. tokens: of all sequences; shared: that a common prompt saved."""

    examples: int = 0
    tokens: int = 0
    shared: int = 0
    long: int = 0
    cut: int = 0
    same: int = 0
    tags: int = 0

    def add(self, other: Report) -> None:
        """Add the counts of another report."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def show(self, what: str) -> None:
        """Tell a person. what: "comparisons" or "dialogues"."""
        saved = f", {self.shared / max(1, self.tokens):.0%} of them in common prompts that are read once"
        console.say(f"{self.examples:,} {what}, {self.tokens:,} tokens{saved if self.shared else ''}")
        for n, found, more in (
            (self.long, f"{what} left out, longer than the context", " (--long cut keeps their beginnings)"),
            (self.cut, "answers cut at the context", ", read at their last token that is left"),
            (self.same, f"{what} left out, the two answers are the same within the context", ""),
            (self.tags, "tags of the chat format escaped in contents", " (--tags)"),
        ):
            if n:
                console.warn(f"{found}: {n:,}{more}")


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded examples: ids as they stand in a row, tokens of the trunk, tokens of the first branch (-1: no branches).

    groups: of each, for the split by prompt. facts: of each, what the record says of it (rating, label, ...).
    """

    ids: Ragged = field(default_factory=Ragged)
    trunks: array[int] = field(default_factory=lambda: array("i"))
    firsts: array[int] = field(default_factory=lambda: array("i"))
    groups: list[int] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, sequences: Sequence[Sequence[int]], group: int, facts: dict[str, Any]) -> None:
        """Append a dialogue, or a pair that begins alike."""
        if len(sequences) == 1:
            trunk, first, ids = len(sequences[0]), -1, list(sequences[0])
        else:
            trunk = packing.common(sequences)
            first = len(sequences[0]) - trunk
            ids = [*sequences[0], *sequences[1][trunk:]]
        self.ids.add(ids)
        self.trunks.append(trunk)
        self.firsts.append(first)
        self.groups.append(group)
        self.facts.append(facts)

    def piece(self, i: int, share: bool) -> Piece:
        """An example for a row. share: the common beginning stands in it once, else before each of the two."""
        ids, trunk, first = self.ids[i], self.trunks[i], self.firsts[i]
        if first < 0:
            return packing.chain(ids)
        if share:
            return packing.branched(ids, trunk, [first, len(ids) - trunk - first])
        pair = ids[: trunk + first], np.concatenate([ids[:trunk], ids[trunk + first :]])
        return packing.branched(np.concatenate(pair), 0, [len(s) for s in pair])


# --- the loss -----------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """The loss of scores: a model with a scalar head, read at the last token of each sequence.

    reduce: scores [N] and the micro-batch's labels by name -> the sums that `fit` wants.
    """

    def __init__(self, model: Llama, reduce: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.reduce = model, reduce

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor,
        ends_N: Tensor,
        branches_BT: Tensor | None = None,
        scores_only: bool = False,
        **labels: Tensor,
    ) -> Tensor:
        """The sums of `reduce`; with scores_only the scores [N], fp32."""
        hidden = self.model(ids_BT, positions_BT, segments_BT, branches_BT=branches_BT)
        scores = self.model.scores(hidden.reshape(-1, hidden.shape[-1])[ends_N])
        return scores if scores_only else self.reduce(scores, **labels)


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """How examples become rows.

    labels: by name, numbers [n] or [n, 2] for all examples. budget: tokens that a process runs at once. share: compute
    a common prompt once.
    """

    store: Examples
    labels: Mapping[str, np.ndarray]
    order: Order
    context: int
    budget: int
    share: bool
    world: World

    def batches(self, size: int, last: int | None, position: Position | None) -> Iterator[tuple[Batch, Position]]:
        """Batches of `size` examples, `last` of them in the whole run."""
        for items, at in walk(self.order.count, size, last, position):
            chosen = [int(self.order.of(epoch)[i]) for epoch, i in items]
            micro, tokens = self.micro(chosen)
            yield Batch([args for args, _ in micro], len(chosen), tokens, len(chosen)), at

    def micro(self, chosen: Sequence[int]) -> tuple[list[tuple[dict[str, Tensor], list[int]]], int]:
        """This rank's micro-batches of some examples, each with their places in `chosen`; tokens of all ranks."""
        pieces = [self.store.piece(i, self.share) for i in chosen]
        lengths = [len(p) for p in pieces]
        rows = packing.tight(lengths, 2 * self.context, self.budget, self.world.size)
        used = [sum(lengths[j] for j in row) for row in rows]
        out = []
        for mine in packing.split(used, self.budget, self.world.size)[self.world.rank]:
            here = [j for r in mine for j in rows[r]]
            starts = np.cumsum([0, *(len(rows[r]) for r in mine)])
            laid = packing.lay([pieces[j] for j in here], [range(a, b) for a, b in pairwise(starts)])
            args = {"ids_BT": laid.ids_BT, "positions_BT": laid.positions_BT, "segments_BT": laid.segments_BT}
            args |= {"ends_N": laid.ends_N} | ({} if laid.branches_BT is None else {"branches_BT": laid.branches_BT})
            which = [chosen[j] for j in here]
            out.append((args | {k: torch.from_numpy(v[which]) for k, v in self.labels.items()}, here))
        return out, sum(lengths)

    def digest(self, part: Part) -> str:
        """A hash of the ids and labels of a part."""
        told = sha256()
        for i in part.index:
            shape = [len(self.store.ids[i]), self.store.trunks[i], self.store.firsts[i] + 1]
            told.update(b"".join(n.to_bytes(8) for n in shape) + self.store.ids[i].tobytes())
        for name, values in self.labels.items():
            told.update(name.encode() + values[part.index].tobytes())
        return told.hexdigest()

    @torch.no_grad()
    def scores(self, loss: nn.Module, chosen: Sequence[int], dtype: torch.dtype) -> np.ndarray:
        """Scores of some examples, fp64 [n, k], the same on every rank."""
        k = 1 if not len(chosen) or self.store.firsts[chosen[0]] < 0 else 2
        out = np.zeros((len(chosen), k))
        for args, here in self.micro(chosen)[0]:
            with autocast(self.world.device, dtype):
                scores = loss(**moved(args, self.world.device), scores_only=True)
            out[here] = scores.double().cpu().numpy().reshape(-1, k)
        dist.reshard(loss)
        return np.array(dist.sums(self.world, out.ravel().tolist())).reshape(-1, k)
