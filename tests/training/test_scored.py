"""Pairs with a common prompt as rows: the same loss and gradients as two padded rows of each in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from llama2cli.nn import cpu, ops
from llama2cli.nn.checkpoint import state_to_hf
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.rlhf import objectives
from llama2cli.training.dist import World
from llama2cli.training.examples import Order, Part
from llama2cli.training.scored import Examples, Report, Rows, Scored

CONTEXT = 48
SAFETY_WEIGHT = 0.7
HEADS = {"mha": (4, 4), "gqa": (4, 2)}
CPU = torch.device("cpu")
BOTH_FORMS = pytest.mark.usefixtures("form")
Pair = tuple[list[int], list[int]]


# --- what is compared ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "fast"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test with torch's own operators and with the faster forms, whatever this machine would choose."""
    before = ops.choices()
    picks = {f"{name}.fp32": "fast" for name in ("rms_norm", "rope", "attention")}
    matmul = {"matmul.fp32": "fast"} if cpu.exact() else {}
    ops.restore({"mode": "auto", "picks": picks | matmul if request.param == "fast" else {}})
    yield request.param
    ops.restore(before)


def drawn_pairs() -> list[Pair]:
    """(chosen, rejected): prompts long, short and of no token at all, an answer that begins the other, all lengths."""
    draw = np.random.default_rng(5)
    found: list[Pair] = []
    for prefix, one, two in [
        (30, 9, 4), (30, 2, 2), (3, 5, 12), (1, 20, 2), (0, 6, 9), (0, 1, 30), (44, 4, 3), (12, 12, 12), (7, 3, 8)
    ]:  # fmt: skip
        start, a, b = (draw.integers(3, 90, n).tolist() for n in (prefix, one, two))
        a[0], b[0] = 91, 92  # they part here
        found.append(([1][:prefix] + start[1:] + a[:-1] + [2], [1][:prefix] + start[1:] + b[:-1] + [2]))
    whole = [1, *draw.integers(3, 90, 14).tolist()]
    found.append(([*whole[:9], 2], [*whole, 2]))  # the text of one begins the other
    found.append((whole, whole[:6]))  # all of one begins the other, as where answers were cut
    return found


PAIRS = drawn_pairs()
MARGINS = np.linspace(0, 3, len(PAIRS)).astype(np.float32)
SAFE = np.array([[(1, 0), (1, 1), (0, 0), (-1, -1)][i % 4] for i in range(len(PAIRS))])


def made(heads: str) -> tuple[Llama, LlamaForSequenceClassification]:
    """Our reward model, and the same weights in transformers'."""
    H, G = HEADS[heads]
    config = ModelConfig(96, 32, 64, 2, H, G, CONTEXT)
    ours = Llama(config, scorer=True)
    ours.init_weights(3, std=0.25)
    shape = dict(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=G, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    theirs = LlamaForSequenceClassification(LlamaConfig(**shape))
    theirs.load_state_dict(state_to_hf(dict(ours.named_parameters()), config, scorer=True))
    return ours, theirs


def padded_scores(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """transformers' scores [N] of sequences, each a row of its own, padded."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]


def loss_by_hand(chosen: Tensor, rejected: Tensor) -> Tensor:
    """softplus(m - (c - r)), and for each answer with a label its cross-entropy, summed over pairs."""
    total = F.softplus(torch.from_numpy(MARGINS) - (chosen - rejected)).sum()
    for i, labels in enumerate(SAFE):
        for score, safe in zip((chosen[i], rejected[i]), labels):
            if safe >= 0:
                total = total + SAFETY_WEIGHT * F.softplus(-score if safe else score)
    return total


def gradients_of(model: Llama) -> dict[str, Tensor]:
    """Our gradients under transformers' names."""
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in found.values())
    return state_to_hf(found, model.config, scorer=True)  # type: ignore[arg-type]


def stored(pairs: Sequence[Sequence[Sequence[int]]]) -> Examples:
    store = Examples()
    for sequences in pairs:
        store.add(sequences, 0, {})
    return store


def rows_of(store: Examples, *, share: bool, budget: int = 200, rank: int = 0, ranks: int = 1) -> Rows:
    order = Order([Part("all", np.arange(len(store)))], seed=0)
    labels = {"margins": MARGINS, "safe": SAFE}
    return Rows(store, labels, order, CONTEXT, budget, share, World(rank, ranks, CPU))


def summed(model: Llama, rows: Rows, chosen: Sequence[int]) -> Tensor:
    """The sums of the loss over a rank's micro-batches; its gradients are added up."""
    loss = Scored(model, objectives.reducer("ranking", SAFETY_WEIGHT))
    parts = []
    for args, _ in rows.micro(chosen)[0]:
        part = loss(**args)
        part[0].backward()
        parts.append(part.detach().double())
    return torch.stack(parts).sum(0)


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal within 1e-5 of the largest gradient of each tensor, and these are no rounding errors themselves."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        size = float(theirs[name].abs().max())
        assert size > 1e-3, name
        assert float((ours[name] - theirs[name]).abs().max()) <= tolerance * max(1.0, size), name


# --- the shared prefix --------------------------------------------------------------------------------------------


@BOTH_FORMS
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_loss_and_gradients_are_those_of_two_padded_rows(heads: str, share: bool) -> None:
    ours, theirs = made(heads)
    chosen, rejected = (padded_scores(theirs, [p[k] for p in PAIRS]) for k in (0, 1))
    wanted = loss_by_hand(chosen, rejected) / len(PAIRS)
    wanted.backward()
    wanted, chosen, rejected = wanted.detach(), chosen.detach(), rejected.detach()

    rows = rows_of(stored(PAIRS), share=share)
    sums = summed(ours, rows, range(len(PAIRS))) / len(PAIRS)
    for p in ours.parameters():
        assert p.grad is not None
        p.grad /= len(PAIRS)
    assert float(sums[0]) == pytest.approx(float(wanted), abs=1e-5)
    assert float(sums[1]) == pytest.approx(float((chosen > rejected).float().mean()))
    ranking = F.softplus(torch.from_numpy(MARGINS) - (chosen - rejected)).mean()
    assert float(sums[2]) == pytest.approx(float(ranking), abs=1e-5)
    assert float(sums[2] + SAFETY_WEIGHT * sums[3]) == pytest.approx(float(wanted), abs=1e-5)
    assert_near(gradients_of(ours), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})


def test_a_common_prompt_is_computed_once() -> None:
    store = stored(PAIRS)
    tokens = sum(len(s) for p in PAIRS for s in p)
    prompts = 0
    for a, b in PAIRS:
        n = 0
        while n < min(len(a), len(b)) - 1 and a[n] == b[n]:
            n += 1
        prompts += n
    assert prompts > 100
    for share, wanted in ((True, tokens - prompts), (False, tokens)):
        micro, told = rows_of(store, share=share, budget=10_000).micro(range(len(PAIRS)))
        assert told == wanted
        assert sum(int((args["ids_BT"] != 0).sum()) for args, _ in micro) == wanted


@BOTH_FORMS
@pytest.mark.parametrize("budget, ranks", [(1, 1), (60, 1), (100, 2), (10_000, 3), (60, 5), (10_000, 16)])
def test_micro_batches_and_ranks_add_up(budget: int, ranks: int) -> None:
    """However the pairs are dealt; of many ranks some run an empty micro-batch."""
    ours, theirs = made("gqa")
    wanted = loss_by_hand(*(padded_scores(theirs, [p[k] for p in PAIRS]) for k in (0, 1)))
    wanted.backward()
    total, counts, empty = torch.zeros(4, dtype=torch.float64), set(), 0
    for rank in range(ranks):
        rows = rows_of(stored(PAIRS), share=True, budget=budget, rank=rank, ranks=ranks)
        micro, _ = rows.micro(range(len(PAIRS)))
        counts.add(len(micro))
        empty += sum(not here for _, here in micro)
        total += summed(ours, rows, range(len(PAIRS)))
    assert len(counts) == 1  # all ranks run as many
    assert bool(empty) == (ranks >= 5)
    assert float(total[0]) == pytest.approx(wanted.item(), rel=1e-5)
    assert_near(gradients_of(ours), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, 2e-5)


@BOTH_FORMS
def test_a_rank_without_a_pair_gives_zeros_that_have_a_gradient() -> None:
    ours, _ = made("mha")
    rows = rows_of(stored(PAIRS), share=True, rank=1, ranks=2)
    assert [here for _, here in rows.micro([4])[0]] == [[]]
    assert summed(ours, rows, [4]).tolist() == [0.0] * 4
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_a_pair_that_is_not_shared_may_be_longer_than_the_context() -> None:
    """And leaves more padding in the row beside it than the context has positions."""
    ours, theirs = made("gqa")
    pairs = [([1, *range(5, 50), 2], [1, *range(5, 49), 51, 2]), ([1, 4, 2], [1, 5, 2])]
    found = rows_of(stored(pairs), share=False).scores(Scored(ours, lambda scores: scores), [0, 1], torch.float32)
    with torch.no_grad():
        wanted = padded_scores(theirs, [s for p in pairs for s in p])
    assert np.abs(found.ravel() - wanted.numpy()).max() < 1e-5


@BOTH_FORMS
@pytest.mark.parametrize("share", [True, False])
def test_scores_come_in_the_order_asked_for(share: bool) -> None:
    ours, theirs = made("gqa")
    chosen = [7, 0, 9, 3, 3, 10, 1]
    rows = rows_of(stored(PAIRS), share=share, budget=90)
    found = rows.scores(Scored(ours, lambda scores: scores), chosen, torch.float32)
    with torch.no_grad():
        wanted = torch.stack([padded_scores(theirs, [PAIRS[i][k] for i in chosen]) for k in (0, 1)], dim=1)
    assert found.dtype == np.float64 and found.shape == (7, 2)
    assert np.abs(found - wanted.numpy()).max() < 1e-5


@BOTH_FORMS
def test_single_dialogues() -> None:
    """--objective binary: the mean of the cross-entropy, and how many are on the right side of 0."""
    ours, theirs = made("gqa")
    dialogues = [s for p in PAIRS for s in p]
    labels = np.array([i % 3 == 0 for i in range(len(dialogues))], np.float32)
    scores = padded_scores(theirs, dialogues)
    signs = torch.from_numpy(2 * labels - 1)
    wanted = F.softplus(-signs * scores).sum()
    wanted.backward()
    order = Order([Part("all", np.arange(len(dialogues)))], seed=0)
    store = stored([[d] for d in dialogues])
    rows = Rows(store, {"labels": labels}, order, CONTEXT, 150, True, World(0, 1, CPU))
    loss = Scored(ours, objectives.reducer("binary", 0.0))
    total = torch.zeros(2)
    for args, _ in rows.micro(range(len(dialogues)))[0]:
        assert "branches_BT" not in args
        part = loss(**args)
        part[0].backward()
        total += part.detach()
    assert float(total[0]) == pytest.approx(wanted.item(), rel=1e-5)
    assert total[1].item() == float((signs * scores > 0).sum())
    assert_near(gradients_of(ours), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    assert rows.scores(loss, range(len(dialogues)), torch.float32).shape == (len(dialogues), 1)


# --- how examples are laid out ------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 120), ranks=st.integers(1, 4), share=st.booleans(), data=st.data())
def test_every_pair_once_on_one_rank(
    lengths: list[tuple[int, int, int]], budget: int, ranks: int, share: bool, data: Any
) -> None:
    """All pairs are in one micro-batch of one rank, with their own labels, and are read at their last tokens."""
    fill = iter(range(10, 10**6))  # no id twice: every token can be told
    pairs = []
    for prompt, a, b in lengths:
        begin = [next(fill) for _ in range(prompt)]
        pairs.append(([*begin, *(next(fill) for _ in range(a))], [*begin, *(next(fill) for _ in range(b))]))
    store = stored(pairs)
    chosen = data.draw(st.permutations(range(len(pairs))))
    labels = {"margins": np.arange(len(pairs), dtype=np.float32)}
    order = Order([Part("all", np.arange(len(pairs)))], seed=0)
    found: list[int] = []
    counts = set()
    for rank in range(ranks):
        micro, _ = Rows(store, labels, order, 32, budget, share, World(rank, ranks, CPU)).micro(chosen)
        counts.add(len(micro))
        for args, here in micro:
            found += here
            assert args["margins"].tolist() == [float(chosen[j]) for j in here]
            flat = {name: args[name].flatten().tolist() for name in ("ids_BT", "positions_BT", "segments_BT")}
            branches = args["branches_BT"].flatten().tolist() if "branches_BT" in args else [0] * len(flat["ids_BT"])
            width = args["ids_BT"].shape[1]
            assert args["ids_BT"].numel() <= budget or len(args["ids_BT"]) == 1
            ends = args["ends_N"].tolist()
            assert len(ends) == 2 * len(here)
            for end, sequence in zip(ends, (s for j in here for s in pairs[chosen[j]])):
                row = end // width
                mine = [
                    k
                    for k in range(row * width, end + 1)
                    if flat["segments_BT"][k] == flat["segments_BT"][end] and branches[k] in (0, branches[end])
                ]
                assert [flat["ids_BT"][k] for k in mine] == sequence  # what the last token sees is the dialogue
                assert [flat["positions_BT"][k] for k in mine] == list(range(len(sequence)))
    assert sorted(found) == list(range(len(pairs)))
    assert len(counts) == 1


def test_batches_run_over_epochs_and_go_on_from_any_position() -> None:
    store = stored(PAIRS)
    rows = rows_of(store, share=True, budget=10_000)
    first = list(rows.batches(4, 2 * len(PAIRS) + 3, None))
    counts = [batch.count for batch, _ in first]
    assert counts == [4, 4, 4, 4, 4, 4, 1] and [b.items for b, _ in first] == counts
    assert [p["seen"] for _, p in first] == np.cumsum(counts).tolist()
    margins = [sorted(m for args in b.micro for m in args["margins"].tolist()) for b, _ in first]
    read = [m for batch in margins for m in batch]
    assert sorted(read[: len(PAIRS) - 3]) != sorted(read[len(PAIRS) :][: len(PAIRS) - 3])  # in another order
    together = sorted(m for b, _ in rows.batches(len(PAIRS), len(PAIRS), None) for a in b.micro for m in a["margins"])
    assert np.allclose(together, MARGINS)  # an epoch has each pair once
    for k, (_, position) in list(enumerate(first))[:-1]:
        rest = list(rows.batches(4, 2 * len(PAIRS) + 3, dict(position)))
        assert [p for _, p in rest] == [p for _, p in first[k + 1 :]]
        for (ours, _), (theirs, _) in zip(rest, first[k + 1 :], strict=True):
            for a, b in zip(ours.micro, theirs.micro, strict=True):
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_pieces_of_an_example() -> None:
    store = stored([([1, 7, 8, 2], [1, 7, 9, 9, 2]), ([1, 4, 2],)])
    shared, apart, single = store.piece(0, True), store.piece(0, False), store.piece(1, True)
    assert shared.ids.tolist() == [1, 7, 8, 2, 9, 9, 2] and shared.branches.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert shared.positions.tolist() == [0, 1, 2, 3, 2, 3, 4] and shared.ends.tolist() == [3, 6]
    assert apart.ids.tolist() == [1, 7, 8, 2, 1, 7, 9, 9, 2] and apart.branches.tolist() == [1] * 4 + [2] * 5
    assert apart.positions.tolist() == [*range(4), *range(5)] and apart.ends.tolist() == [3, 8]
    assert single.ids.tolist() == [1, 4, 2] and single.ends.tolist() == [2] and not single.branches.any()
    assert [b - a for a, b in pairwise(store.ids.starts)] == [7, 3]


def test_reports_add_up_and_say_only_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(examples=3, tokens=100, shared=25)
    report.show("comparisons")
    assert capsys.readouterr().err == "3 comparisons, 100 tokens, 25% of them in common prompts that are read once\n"
    report.add(Report(examples=1, long=2, cut=3, same=4, tags=5))
    report.show("comparisons")
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"\d+", line.split("warning: ")[-1])[0] for line in lines] == ["4", "2", "3", "4", "5"]
