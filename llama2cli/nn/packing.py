"""Token sequences of different lengths as rows for the model: packed, not padded, and a common beginning only once.

A piece is what stays together in a row: one sequence, or several that begin alike (the two answers of a comparison, K
samples of one prompt) as a tree. In a row each piece is a segment of its own: attention does not leave it, positions
start again at 0. In a tree each answer is a branch, which sees the trunk and itself. So packed and separate rows give
the same hidden states, and the common beginning is computed once.

Letters of shapes: B rows, T positions, N sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """Sequences that are computed together. ids, positions, branches: int64 [n].

    ends: int64 [k], where in the piece the last token of each of its k sequences is. Branch 0 is the trunk.
    """

    ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def chain(ids: Sequence[int] | np.ndarray) -> Piece:
    """One sequence."""
    n = len(ids)
    return Piece(np.asarray(ids, np.int64), np.arange(n), np.zeros(n, np.int64), np.array([n - 1]))


def common(sequences: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Tokens with which all sequences begin, less than the shortest has: each keeps its last as its own."""
    n = min(len(s) for s in sequences) - 1
    first = np.asarray(sequences[0][:n])
    for other in sequences[1:]:
        differs = np.flatnonzero(first[:n] != np.asarray(other[:n]))
        n = int(differs[0]) if len(differs) else n
    return n


def tree(sequences: Sequence[Sequence[int] | np.ndarray]) -> Piece:
    """Several sequences: their longest common beginning, then a branch for each. Of one it is a chain."""
    if len(sequences) == 1:
        return chain(sequences[0])
    trunk = common(sequences)
    own = [np.asarray(s[trunk:], np.int64) for s in sequences]
    sizes = np.array([len(o) for o in own])
    return branched(np.concatenate([np.asarray(sequences[0][:trunk], np.int64), *own]), trunk, sizes)


def branched(ids: np.ndarray, trunk: int, sizes: Sequence[int] | np.ndarray) -> Piece:
    """A tree whose ids are laid out already: `trunk` tokens, then branches of these sizes."""
    spans = [np.arange(trunk), *(np.arange(trunk, trunk + n) for n in sizes)]
    branches = np.repeat(np.arange(len(sizes) + 1), [trunk, *sizes])
    return Piece(np.asarray(ids, np.int64), np.concatenate(spans), branches, trunk + np.cumsum(sizes) - 1)


def rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which pieces stand in which row of at most `width` tokens: best fit, the longest first; the same every time.

    Raises ValueError for a piece that is longer than a row.
    """
    if max(lengths, default=0) > width:
        raise ValueError(f"a piece of {max(lengths)} tokens in rows of {width}")
    out: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(out))
        if row == len(out):
            out.append([])
        out[row].append(i)
        insort(room, (left - lengths[i], row))
    return out


def split(used: Sequence[int], budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """Rows dealt to ranks and, on each, to micro-batches that hold at most `budget` tokens, padding counted.

    used: tokens of each row. Every rank gets as many micro-batches as the others, the last of them may be empty; a
    rank that has the least tokens gets the next longest row. A row longer than the budget is a micro-batch by itself.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(range(len(used)), key=lambda r: -used[r]):
        rank = tokens.index(min(tokens))
        dealt[rank].append(row)
        tokens[rank] += used[row]
    micros: list[list[list[int]]] = []
    for mine in dealt:
        groups: list[list[int]] = []
        for row in mine:  # the longest first: the first row of a group is its width
            if groups and (len(groups[-1]) + 1) * used[groups[-1][0]] <= budget:
                groups[-1].append(row)
            else:
                groups.append([row])
        micros.append(groups)
    most = max(len(groups) for groups in micros)
    return [groups + [[] for _ in range(most - len(groups))] for groups in micros]


def tight(lengths: Sequence[int], most: int, budget: int, ranks: int = 1) -> list[list[int]]:
    """`rows` as wide as leaves the least padding in the micro-batches of `split`, at most `most` or the longest piece.

    Worth it where a batch has few pieces and they are long beside a row: a tenth of the tokens were padding.
    """
    longest, best = max(lengths), (0, [[0]])
    for part in range(8, 25, 2):
        packed = rows(lengths, max(longest, min(most, longest * part // 8)))
        used = [sum(lengths[i] for i in row) for row in packed]
        area = sum(len(g) * used[g[0]] for groups in split(used, budget, ranks) for g in groups if g)
        if part == 8 or area < best[0]:
            best = (area, packed)
    return best[1]


@dataclass(frozen=True, eq=False)
class Laid:
    """Rows for the model, int64 [B, T]; what is left of a row is a segment of its own, of ids 0 at position 0.

    branches_BT: None where no piece has branches. ends_N: b * T + t of the last token of each sequence, in the order of
    the pieces that were given, whatever the rows; -1 for pieces that stand in none of them. starts: b * T + t of the
    first token of each piece.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    branches_BT: Tensor | None
    ends_N: Tensor
    starts: list[int]

    def spread(self, values: Sequence[np.ndarray], blank: int) -> Tensor:
        """One number a token, given by piece, as int64 [B, T]."""
        flat = np.full(self.ids_BT.numel(), blank, np.int64)
        for start, value in zip(self.starts, values):
            if start >= 0:
                flat[start : start + len(value)] = value
        return torch.from_numpy(flat.reshape(self.ids_BT.shape))


def lay(pieces: Sequence[Piece], rows: Sequence[Sequence[int]]) -> Laid:
    """Put pieces into rows; T is the longest row. No rows, or empty ones, are one row of one padding token."""
    T = max((sum(len(pieces[i]) for i in row) for row in rows), default=0) or 1
    shape = (max(1, len(rows)), T)
    ids, positions, segments, branches = (np.zeros(shape, np.int64) for _ in range(4))
    starts = [-1] * len(pieces)
    for b, row in enumerate(rows):
        t = 0
        for segment, i in enumerate(row, 1):
            piece, upto = pieces[i], t + len(pieces[i])
            ids[b, t:upto], positions[b, t:upto] = piece.ids, piece.positions
            branches[b, t:upto], segments[b, t:upto] = piece.branches, segment
            starts[i], t = b * T + t, upto
    ends = [p.ends + s if s >= 0 else np.full(len(p.ends), -1) for p, s in zip(pieces, starts)]
    ends_N = np.concatenate(ends) if ends else np.empty(0, np.int64)
    as_tensor = torch.from_numpy
    return Laid(
        as_tensor(ids),
        as_tensor(positions),
        as_tensor(segments),
        as_tensor(branches) if branches.any() else None,
        as_tensor(ends_N.astype(np.int64)),
        starts,
    )
