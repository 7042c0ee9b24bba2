"""Sampled answers as rows for a model, read where the next token of an answer is decided.

Only these places go through the output head: the prompt's need no logits, and of the last token of an answer nothing
follows, so it is not run at all. Sequences are packed, each a segment of its own.

Letters of shapes: B rows, T positions, N tokens of answers (of a micro-batch, or of all answers one after another), D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama2cli.nn import ops, packing
from llama2cli.nn.model import Llama
from llama2cli.training import dist
from llama2cli.training.dist import World
from llama2cli.training.fit import autocast, moved

Arguments = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Answers:
    """Prompts and what was sampled after each, as ids. Tokens of answers are numbered through, answer after answer.

    No prompt and no answer is empty.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def starts(self) -> np.ndarray:
        """The number of the first token of each answer, and at the end how many there are."""
        return np.cumsum([0, *map(len, self.answers)])

    def mask(self) -> Tensor:
        """[answers, longest] true at their tokens. `x[mask]` numbers them through, `y[mask] = x` lays them out."""
        sizes = torch.tensor([len(a) for a in self.answers])
        return torch.arange(int(sizes.max()) if len(sizes) else 1) < sizes[:, None]

    def micro(self, chosen: Sequence[int], width: int, budget: int) -> list[tuple[Arguments, Tensor]]:
        """Micro-batches of some answers: the arguments of `Read`, and the numbers [N] of the tokens that are read.

        width: of a row at most, unless a sequence is longer; budget: tokens of a micro-batch.
        """
        if not len(chosen):
            return []
        pieces = [packing.chain([*self.prompts[i], *self.answers[i][:-1]]) for i in chosen]
        lengths, starts = [len(p) for p in pieces], self.starts
        rows = packing.tight(lengths, width, budget)
        out = []
        for mine in packing.split([sum(lengths[j] for j in row) for row in rows], budget)[0]:
            here = [j for r in mine for j in rows[r]]
            ends = np.cumsum([0, *(len(rows[r]) for r in mine)])
            laid = packing.lay([pieces[j] for j in here], [range(a, b) for a, b in pairwise(ends)])
            places, targets, numbers = [], [], []
            for start, j in zip(laid.starts, here):
                i = chosen[j]
                first, n = start + len(self.prompts[i]) - 1, len(self.answers[i])
                places.append(np.arange(first, first + n))
                targets.append(np.asarray(self.answers[i], np.int64))
                numbers.append(np.arange(starts[i], starts[i] + n))
            args = arguments(laid, np.concatenate(places), np.concatenate(targets))
            out.append((args, torch.from_numpy(np.concatenate(numbers))))
        return out


def arguments(laid: packing.Laid, places: np.ndarray, targets: np.ndarray) -> Arguments:
    """The arguments of `Read` for rows."""
    return {
        "ids_BT": laid.ids_BT,
        "positions_BT": laid.positions_BT,
        "segments_BT": laid.segments_BT,
        "places_N": torch.from_numpy(places.astype(np.int64)),
        "targets_N": torch.from_numpy(targets.astype(np.int64)),
    }


def blank() -> tuple[Arguments, Tensor]:
    """A micro-batch without an answer: for a rank that has fewer than another one."""
    nothing = np.empty(0, np.int64)
    return arguments(packing.lay([], []), nothing, nothing), torch.from_numpy(nothing)


class Read(nn.Module):
    """A model, read at the tokens of answers: what the model has of log-probability and entropy, and value.

    A language model gives the first two, at a temperature, and a value too where it has a value head; a reward model
    the value alone. reduce: takes these in this order, fp32 [N] each, and the labels by name, and gives the sums that
    `fit.gradients` wants. pieces: of the tokenizer, where the model may have more rows (a padded vocabulary): those ids
    are never sampled, and have no part in the probabilities here either. All weights are used inside the forward pass,
    which is what FSDP2 asks for.
    """

    def __init__(
        self,
        model: Llama,
        reduce: Callable[..., Tensor] | None = None,
        *,
        temperature: float = 1.0,
        pieces: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.reduce, self.temperature, self.pieces = model, reduce, temperature, pieces

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor,
        places_N: Tensor,
        targets_N: Tensor,
        **labels: Tensor,
    ) -> Tensor:
        """The sums of `reduce`, or without labels what was read, [k, N]."""
        hidden_ND = self.hidden(ids_BT, positions_BT, segments_BT, places_N)
        found: list[Tensor] = []
        if not self.model.scorer:
            found += ops.token_logprobs_and_entropy(self.heated(hidden_ND), self.head(), targets_N)
        if self.model.score is not None:
            found.append(self.model.scores(hidden_ND))
        if not labels:
            return torch.stack(found)
        assert self.reduce is not None
        return self.reduce(*found, **labels)

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor, places_N: Tensor) -> Tensor:
        """The states [N, D] in which the tokens of answers are drawn."""
        return self.model(ids_BT, positions_BT, segments_BT).flatten(0, 1).index_select(0, places_N)

    def head(self) -> Tensor:
        """The output table of what can be sampled."""
        weight = self.model.head_weight()
        return weight if self.pieces in (None, len(weight)) else weight[: self.pieces]

    def heated(self, hidden_ND: Tensor) -> Tensor:
        """What gives the logits at the temperature by its product with the head."""
        return hidden_ND if self.temperature == 1 else hidden_ND / self.temperature


@dataclass(frozen=True)
class Rows:
    """How answers become rows. width, budget: see `Answers.micro`."""

    width: int
    budget: int
    world: World

    def micro(self, answers: Answers, chosen: Sequence[int]) -> list[tuple[Arguments, Tensor]]:
        """Micro-batches of some of this rank's answers: on every rank as many, the last of them may be blank."""
        mine = answers.micro(chosen, self.width, self.budget)
        return mine + [blank()] * (dist.most(self.world, len(mine)) - len(mine))

    def labelled(self, answers: Answers, chosen: Sequence[int], labels: Mapping[str, Tensor]) -> list[Arguments]:
        """The same with labels, each given by the numbers of all tokens."""
        return [args | {k: v[numbers] for k, v in labels.items()} for args, numbers in self.micro(answers, chosen)]

    @torch.no_grad()
    def read(self, read: Callable[..., Tensor], answers: Answers, dtype: torch.dtype, k: int = 1) -> Tensor:
        """What `read` gives for all answers, [k, tokens] in fp32 on the CPU. dtype: of the arithmetic (autocast)."""
        out = torch.zeros(k, int(answers.starts[-1]))
        for args, numbers in self.micro(answers, range(len(answers))):
            with autocast(self.world.device, dtype):
                out[:, numbers] = read(**moved(args, self.world.device)).float().cpu()
        if isinstance(read, nn.Module):
            dist.reshard(read)
        return out


def exact_kl(policy: Read, reference: Read) -> Callable[..., Tensor]:
    """A function for `Rows.read`: KL(policy || reference) of whole next-token distributions at each place, [1, N]."""

    def read(targets_N: Tensor, **rows: Any) -> Tensor:
        p, q = (who.heated(who.hidden(**rows)) for who in (policy, reference))
        return ops.token_kl(p, policy.head(), q, reference.head())[None]

    return read
