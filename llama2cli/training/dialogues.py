"""Supervised fine-tuning data: dialogues as token ids with a loss mask, and rows of them for the model.

Three ways to make rows (`Packing`):

    blocks   (default) dialogues are packed to the context; each attends to itself only and its positions start at 0.
             The loss and the gradients are those of `none`, without its padding.
    concat   what section 3.1 says: all of an epoch concatenated and cut every `context` tokens. Attention and positions
             run over the ends of dialogues; an answer at a cut goes on in the next row, without what was before it.
    none     a dialogue a row, filled up with padding.

A dialogue longer than the context is cut at its end, or left out; either is counted. An answer that was sampled and cut
("truncated": true) is trained without an end: there was none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llama2cli import console
from llama2cli.errors import Failure
from llama2cli.nn import packing
from llama2cli.text.chat import Tags, encode_dialogue
from llama2cli.text.records import Record
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import dist
from llama2cli.training.data import IGNORED, Batch, Position, as_micro
from llama2cli.training.dist import World
from llama2cli.training.examples import Order, Part, Ragged, group_of, walk
from llama2cli.training.fit import HELD_OUT, autocast, moved

Packing = Literal["blocks", "concat", "none"]
Long = Literal["cut", "drop"]


# --- dialogues as ids ---------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the dialogues that were read: the mask report.

    system, user, answers: tokens of each role, the format's own among them (an answer's closing space and EOS are the
    answer's); trained: of the answers. cut: dialogues that were cut at the context, cut_answers: answers that lost
    tokens by it, cut_tokens: tokens that were lost. long: dropped for their length, untrained: for having no answer to
    train on. tags: tags of the chat format in contents. empty: trained answers without a text.
    """

    dialogues: int = 0
    system: int = 0
    user: int = 0
    answers: int = 0
    trained: int = 0
    cut: int = 0
    cut_answers: int = 0
    cut_tokens: int = 0
    long: int = 0
    untrained: int = 0
    tags: int = 0
    empty: int = 0

    def add(self, other: Report) -> None:
        """Add the counts of another report."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def metrics(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        roles = {
            "system": {"total": self.system, "trained": 0},
            "user": {"total": self.user, "trained": 0},
            "assistant": {"total": self.answers, "trained": self.trained},
        }
        rest = ("dialogues", "cut", "cut_answers", "cut_tokens", "long", "untrained", "tags", "empty")
        return {"tokens": roles, **{k: getattr(self, k) for k in rest}}

    def why_none(self, context: int) -> str:
        """Why no dialogue was left of what was read, for the line that says so."""
        if n := self.untrained + self.long:
            none = f": of {n:,}"
            if self.long == n:
                return f"{none} all are longer than the context of {context:,}"
            within = f" within the context of {context:,}" if self.cut else ""
            return f"{none} none has an answer that is trained{within}"
        return ""

    def show(self) -> None:
        """Tell a person."""
        rows = [("system", self.system, 0), ("user", self.user, 0), ("assistant", self.answers, self.trained)]
        rows.append(("all", sum(n for _, n, _ in rows), self.trained))
        told = [(name, f"{n:,}", f"{t:,}", f"{t / max(1, n):.0%}") for name, n, t in rows]
        console.table(f"masks of {self.dialogues:,} dialogues", ["role", "tokens", "trained", "share"], told)
        for n, what, more in (
            (self.cut_answers, "answers cut at the context", f" ({self.cut_tokens:,} tokens lost; see --long)"),
            (self.long, "dialogues left out, longer than the context", ""),
            (self.untrained, "dialogues left out, no answer that is trained within the context", ""),
            (self.tags, "tags of the chat format escaped in contents", " (--tags)"),
            (self.empty, "empty answers, trained as such", " (llama2 eval dialogues --annotate finds them)"),
        ):
            if n:
                console.warn(f"{what}: {n:,}{more}")


@dataclass(frozen=True, eq=False)
class Dialogues:
    """Encoded dialogues: ids, and masks with 1 where a token is trained. groups: of each, for the split by prompt."""

    ids: Ragged = field(default_factory=Ragged)
    masks: Ragged = field(default_factory=lambda: Ragged("b"))
    groups: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self, index: Sequence[int] | np.ndarray) -> str:
        """A hash of the ids and masks of some dialogues."""
        told = sha256()
        for i in index:
            told.update(len(self.ids[i]).to_bytes(8) + self.ids[i].tobytes() + self.masks[i].tobytes())
        return told.hexdigest()

    def targets(self, i: int) -> np.ndarray:
        """int64 [n - 1], the tokens behind each but the last; -100 where they are not trained."""
        return np.where(self.masks[i][1:] != 0, self.ids[i][1:].astype(np.int64), IGNORED)


def add(
    store: Dialogues,
    tokenizer: Tokenizer,
    records: Iterable[tuple[Place, Record]],
    *,
    context: int,
    tags: Tags,
    long: Long,
) -> Report:
    """Encode dialogues into the store; what became of them. Raises DataError where the encoder does."""
    report = Report()
    for place, record in records:
        messages, truncated = record["messages"], bool(record.get("truncated"))
        encoded = encode_dialogue(tokenizer, messages, truncated=truncated, tags=tags, place=place)
        ids, mask = encoded.ids, encoded.mask
        answers = answer_mask(tokenizer, messages, mask, tags, truncated)
        if len(ids) > context and long == "drop":
            report.long += 1
            continue
        lost = answers[context:]
        report.cut += len(ids) > context
        report.cut_answers += runs(lost)
        report.cut_tokens += max(0, len(ids) - context)
        ids, mask, answers = ids[:context], mask[:context], answers[:context]
        if not any(mask[1:]):
            report.untrained += 1
            continue
        system = system_tokens(tokenizer, messages, tags)
        report.dialogues += 1
        report.tags += encoded.n_escaped
        report.empty += sum(is_empty(m) for m in messages)
        report.system += min(system, len(ids))
        report.answers += sum(answers)
        report.user += len(ids) - min(system, len(ids)) - sum(answers)
        report.trained += sum(mask)
        store.ids.add(ids)
        store.masks.add(mask)
        store.groups.append(group_of(messages))
    return report


def answer_mask(
    tokenizer: Tokenizer, messages: Sequence[Record], mask: list[bool], tags: Tags, truncated: bool = False
) -> list[bool]:
    """True for every token of an answer, trained or not."""
    if all(m.get("weight", 1) for m in messages if m["role"] == "assistant"):
        return mask
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    return encode_dialogue(tokenizer, plain, truncated=truncated, tags=tags).mask


def system_tokens(tokenizer: Tokenizer, messages: Sequence[Record], tags: Tags) -> int:
    """Tokens that the system message adds to the first turn."""
    if messages[0]["role"] != "system":
        return 0
    first = [{"role": m["role"], "content": m["content"]} for m in messages[:2]]
    lengths = [len(encode_dialogue(tokenizer, turns, tags=tags).ids) for turns in (first, first[1:])]
    return lengths[0] - lengths[1]


def is_empty(message: Record) -> bool:
    """Whether a message is an answer without a text that is trained."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and not message["content"].strip()


def runs(mask: Sequence[bool]) -> int:
    """How many runs of true values there are."""
    return sum(here and not before for before, here in zip([False, *mask], mask))


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """How dialogues become rows. budget: tokens that a process runs at once."""

    store: Dialogues
    order: Order
    context: int
    packing: Packing
    budget: int
    world: World

    def count(self, epoch: int) -> int:
        """Dialogues of an epoch, or rows where they are concatenated."""
        if self.packing != "concat":
            return self.order.count(epoch)
        return -(-(len(self.stream(epoch)[0]) - 1) // self.context)

    def stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch concatenated: ids and targets of the tokens (the first has none), int64."""
        return _stream(self, epoch)

    def batches(self, size: int, last: int | None, position: Position | None) -> Iterator[tuple[Batch, Position]]:
        """Batches of `size` dialogues (rows where they are concatenated), `last` of them in the whole run."""
        for items, at in walk(self.count, size, last, position):
            yield self.batch(items), at

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, number in it)."""
        if self.packing == "concat":
            return self.cut(items)
        chosen = [int(self.order.of(epoch)[i]) for epoch, i in items]
        micro, count, tokens = packed(self.store, chosen, self.context, self.packing, self.budget, self.world)
        return Batch(micro, count, tokens, len(items))

    def cut(self, items: Sequence[tuple[int, int]]) -> Batch:
        """Rows cut from the concatenated epochs."""
        C = self.context
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for epoch, i in items:
            ids, targets = self.stream(epoch)
            row, after = ids[i * C : i * C + C], targets[i * C + 1 : i * C + C + 1]
            row = row[: len(after)]
            rows.append((np.pad(row, (0, C - len(row))), np.pad(after, (0, C - len(after)), constant_values=IGNORED)))
        used = [C] * len(rows)
        micro = []
        for mine in packing.split(used, self.budget, self.world.size)[self.world.rank]:
            chosen = [rows[r] for r in mine] or [(np.zeros(1, np.int64), np.full(1, IGNORED))]
            inputs, after = zip(*chosen)
            micro.append(as_micro(np.stack(inputs), np.stack(after)))
        count = sum(int((t != IGNORED).sum()) for _, t in rows)
        return Batch(micro, count, sum(used), len(rows))


@lru_cache(maxsize=2)
def _stream(rows: Rows, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    order = rows.order.of(epoch)
    ids = np.concatenate([rows.store.ids[int(i)] for i in order]).astype(np.int64)
    masks = np.concatenate([rows.store.masks[int(i)] for i in order])
    return ids, np.where(masks != 0, ids, IGNORED)


def packed(
    store: Dialogues, chosen: Sequence[int], context: int, how: Packing, budget: int, world: World
) -> tuple[list[dict[str, Tensor]], int, int]:
    """This rank's micro-batches of some dialogues; trained tokens and all tokens of all ranks."""
    pieces = [packing.chain(store.ids[i][:-1]) for i in chosen]
    targets = [store.targets(i) for i in chosen]
    lengths = [len(p) for p in pieces]
    rows = packing.rows(lengths, context) if how == "blocks" else [[i] for i in range(len(pieces))]
    used = [sum(lengths[i] for i in row) for row in rows]
    micro = []
    for mine in packing.split(used, budget, world.size)[world.rank]:
        laid = packing.lay(pieces, [rows[r] for r in mine])
        args = {"ids_BT": laid.ids_BT, "targets_BT": laid.spread(targets, IGNORED)}
        if how == "blocks":
            args |= {"positions_BT": laid.positions_BT, "segments_BT": laid.segments_BT}
        micro.append(args)
    return micro, sum(int((t != IGNORED).sum()) for t in targets), sum(lengths)


# --- held out -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(loss: nn.Module, rows: Rows, parts: Sequence[Part], dtype: torch.dtype) -> dict[str, Any]:
    """Held-out metrics: nats per trained token over all sources, and of each. Raises Failure where it is not finite.

    rows: how the training data become rows; of held-out dialogues each attends to itself only, whatever the packing.
    """
    store, world = rows.store, rows.world
    sums: list[float] = []
    counts: list[int] = []
    how: Packing = "none" if rows.packing == "none" else "blocks"
    for part in parts:
        chosen = [int(i) for i in part.index]
        micro, count, _ = packed(store, chosen, rows.context, how, rows.budget, world)
        total = 0.0
        for args in micro:
            with autocast(world.device, dtype):
                total += float(loss(**moved(args, world.device)))
        sums.append(total)
        counts.append(count)
    dist.reshard(loss)
    sums = dist.sums(world, sums)
    if not np.isfinite(sum(sums)):
        raise Failure("the held-out loss is not finite: stopped; the last checkpoint is good")
    each = {p.name: {"loss": s / n, "tokens": n} for p, s, n in zip(parts, sums, counts)}
    return {HELD_OUT: sum(sums) / sum(counts), "heldout": each}
