"""Packing: nothing lost and nothing twice, rows within their width, trees that are the sequences they were made of."""

from __future__ import annotations

from collections import Counter
from itertools import chain as flat
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.nn import packing
from llama2cli.nn.packing import Piece, branched, chain, lay, rows, split, tree

LENGTHS = st.lists(st.integers(1, 30), max_size=40)
IDS = st.lists(st.integers(3, 6), min_size=1, max_size=9)  # few ids: sequences that begin alike
TREES = st.lists(IDS, min_size=1, max_size=4)


def sequences_of(piece: Piece) -> list[list[int]]:
    """What each end of a piece sees: the ids at or before it that are the trunk's or its own branch's."""
    out = []
    for end in piece.ends:
        before = np.arange(len(piece)) <= end
        mine = before & ((piece.branches == 0) | (piece.branches == piece.branches[end]))
        assert piece.positions[mine].tolist() == list(range(mine.sum()))
        out.append(piece.ids[mine].tolist())
    return out


# --- rows and micro-batches ---------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(30, 80))
def test_every_piece_is_in_one_row_that_holds_it(lengths: list[int], width: int) -> None:
    packed = rows(lengths, width)
    assert sorted(flat(*packed)) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in packed]
    assert all(0 < n <= width for n in used)
    assert packed == rows(lengths, width)
    # No row is opened while an earlier one has room: the first piece of each would have gone into none before it.
    for later, row in enumerate(packed):
        assert all(n + lengths[row[0]] > width for n in used[:later])


def test_rows_by_hand() -> None:
    assert rows([5, 9, 1, 4, 6], 10) == [[1, 2], [4, 3], [0]]  # 9 + 1, 6 + 4, 5
    assert rows([7, 5, 3, 2], 10) == [[0, 2], [1, 3]]  # the 3 where it fits best, beside the 7
    assert rows([], 4) == []
    with pytest.raises(ValueError, match="a piece of 5 tokens in rows of 4"):
        rows([5], 4)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 90), st.integers(1, 5))
def test_rows_are_dealt_to_ranks_and_micro_batches(used: list[int], budget: int, ranks: int) -> None:
    dealt = split(used, budget, ranks)
    assert len(dealt) == ranks and len({len(micros) for micros in dealt}) == 1
    assert sorted(r for micros in dealt for micro in micros for r in micro) == list(range(len(used)))
    for micros in dealt:
        filled = [bool(micro) for micro in micros]
        assert filled == sorted(filled, reverse=True)  # the empty ones are the last
        for micro in filter(None, micros):
            assert len(micro) == 1 or len(micro) * max(used[r] for r in micro) <= budget
    tokens = [sum(used[r] for micro in micros for r in micro) for micros in dealt]
    assert max(tokens) - min(tokens) <= max(used)
    assert dealt == split(used, budget, ranks)


def test_micro_batches_by_hand() -> None:
    assert split([4, 9, 5, 8], 16) == [[[1], [3, 2], [0]]]  # two of 9 are 18; two of 8 are 16, a third is not
    assert split([4, 9, 5, 8], 16, 2) == [[[1], [0]], [[3, 2], []]]  # 9 + 4 and 8 + 5
    assert split([50], 16, 3) == [[[0]], [[]], [[]]]


# --- pieces -------------------------------------------------------------------------------------------------------


@given(TREES)
def test_a_tree_is_its_sequences(sequences: list[list[int]]) -> None:
    piece = tree(sequences)
    assert sequences_of(piece) == sequences
    trunk = int((piece.branches == 0).sum())
    if len(sequences) > 1:  # the trunk is the longest that leaves each sequence a token of its own
        longest = min(map(len, sequences)) - 1
        while len({tuple(s[:longest]) for s in sequences}) > 1:
            longest -= 1
        assert trunk == longest
        assert len(piece) == trunk + sum(len(s) - trunk for s in sequences)


def test_a_tree_by_hand() -> None:
    piece = tree([[1, 5, 6, 2], [1, 5, 7], [1, 5, 6, 6, 2]])
    assert piece.ids.tolist() == [1, 5, 6, 2, 7, 6, 6, 2]
    assert piece.positions.tolist() == [0, 1, 2, 3, 2, 2, 3, 4]
    assert piece.branches.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert piece.ends.tolist() == [3, 4, 7]
    again = branched(piece.ids, 2, [2, 1, 3])
    for name in ("ids", "positions", "branches", "ends"):
        assert np.array_equal(getattr(again, name), getattr(piece, name)) and getattr(again, name).dtype == np.int64
    same = tree([[1, 5], [1, 5]])  # two that are equal: each keeps its last token
    assert same.ids.tolist() == [1, 5, 5] and same.ends.tolist() == [1, 2]
    one = chain([4, 4])
    assert (one.positions.tolist(), one.branches.tolist(), one.ends.tolist()) == ([0, 1], [0, 0], [1])


# --- laid rows ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(TREES, max_size=6), st.integers(0, 30), st.data())
def test_laid_rows_hold_the_pieces(trees: list[list[list[int]]], spare: int, data: st.DataObject) -> None:
    """A row's tokens, gone through one by one, are those of its pieces; each end is found where ends_N says."""
    pieces = [tree(t) for t in trees]
    packed = rows([len(p) for p in pieces], max(map(len, pieces), default=1) + spare)
    left = data.draw(st.integers(0, len(packed)))  # the rows that another rank has
    laid = lay(pieces, packed[left:])
    B, T = laid.ids_BT.shape
    assert {t.dtype for t in (laid.ids_BT, laid.positions_BT, laid.segments_BT, laid.ends_N)} == {torch.int64}
    there = set(flat(*packed[left:]))
    assert (laid.branches_BT is None) == (not any(pieces[i].branches.any() for i in there))
    branches_BT = torch.zeros(B, T, dtype=torch.int64) if laid.branches_BT is None else laid.branches_BT

    ends = laid.ends_N.tolist()
    for i in range(len(pieces)):
        for k, sequence in enumerate(trees[i]):
            b, t = divmod(end := ends.pop(0), T)
            if i not in there:
                assert end == -1
                continue
            segments = laid.segments_BT[b]
            seen = [
                u for u in range(t + 1) if segments[u] == segments[t] and branches_BT[b, u] in (0, branches_BT[b, t])
            ]
            assert [int(laid.ids_BT[b, u]) for u in seen] == sequence, k
            assert [int(laid.positions_BT[b, u]) for u in seen] == list(range(len(sequence)))
    assert not ends and [i for i, s in enumerate(laid.starts) if s >= 0] == sorted(there)

    # A segment is one piece, and what is left over is a segment of its own without a piece.
    sizes = Counter((b, int(s)) for b in range(B) for s in laid.segments_BT[b])
    blank = sum(n for (_, segment), n in sizes.items() if segment == 0)
    assert blank == B * T - sum(len(pieces[i]) for i in there)
    assert len([s for _, s in sizes if s]) == len(there)
    assert not bool(laid.ids_BT[laid.segments_BT == 0].any())

    numbers = [np.arange(len(p)) + 100 * i for i, p in enumerate(pieces)]
    spread = laid.spread(numbers, -7)
    for i in there:
        assert spread.flatten()[laid.starts[i] : laid.starts[i] + len(pieces[i])].tolist() == numbers[i].tolist()
    assert int((spread == -7).sum()) == blank


def test_no_rows_are_one_token_of_padding() -> None:
    for packed in ([], [[]]):
        laid = lay([chain([5, 6])], packed)
        assert laid.ids_BT.tolist() == laid.segments_BT.tolist() == [[0]]
        assert laid.ends_N.tolist() == [-1] and laid.spread([np.array([1, 2])], -100).tolist() == [[-100]]
    assert lay([], []).ends_N.tolist() == []


def test_laid_rows_by_hand() -> None:
    laid = lay([chain([5, 6]), tree([[7, 8], [7, 9, 3]]), chain([4])], [[1, 2], [0]])
    assert laid.ids_BT.tolist() == [[7, 8, 9, 3, 4], [5, 6, 0, 0, 0]]
    assert laid.positions_BT.tolist() == [[0, 1, 1, 2, 0], [0, 1, 0, 0, 0]]
    assert laid.segments_BT.tolist() == [[1, 1, 1, 1, 2], [1, 1, 0, 0, 0]]
    assert laid.branches_BT is not None and laid.branches_BT.tolist() == [[0, 1, 2, 2, 0], [0, 0, 0, 0, 0]]
    assert laid.ends_N.tolist() == [6, 1, 3, 4]  # in the order of the pieces, not of the rows


def test_packed_trees_give_the_hidden_states_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama2cli.nn.checkpoint import state_from_hf
    from llama2cli.nn.config import ModelConfig
    from llama2cli.nn.model import Llama

    shape: dict[str, Any] = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    shape |= dict(num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5)
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    trees = [[[1, 9, 8, 7, 2], [1, 9, 8, 5, 6, 6, 2]], [[1, 4, 2]], [[1, 9, 9, 2], [1, 8, 2], [1, 9, 9, 9, 9]]]
    pieces = [tree(t) for t in trees]
    laid = lay(pieces, packing.rows([len(p) for p in pieces], 15))
    ours = Llama(ModelConfig(**shape))
    ours.load_state_dict(state_from_hf(theirs.state_dict(), ours.config))
    with torch.no_grad():
        args = (laid.ids_BT, laid.positions_BT, laid.segments_BT)
        hidden = ours(*args, branches_BT=laid.branches_BT).flatten(0, 1)[laid.ends_N]
        for got, sequence in zip(hidden, flat(*trees), strict=True):
            want = theirs.model(torch.tensor([sequence])).last_hidden_state[0, -1]
            assert torch.allclose(got, want, atol=1e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 3))
def test_tight_rows_hold_every_piece_once_with_no_more_padding(lengths: list[int], most: int, ranks: int) -> None:
    def area(rows: list[list[int]]) -> int:
        used = [sum(lengths[i] for i in row) for row in rows]
        micros = [g for groups in packing.split(used, 256, ranks) for g in groups if g]
        return sum(len(g) * max(used[r] for r in g) for g in micros)

    found = packing.tight(lengths, most, 256, ranks)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in found) <= max(most, max(lengths))
    assert area(found) <= area(packing.rows(lengths, max(lengths)))
