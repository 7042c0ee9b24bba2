"""Masks to the token, rows that lose nothing, and the loss and gradients of transformers on each dialogue alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli import console
from llama2cli.nn.checkpoint import state_from_hf, state_to_hf
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import dialogues
from llama2cli.training.data import IGNORED, Batch
from llama2cli.training.dialogues import Dialogues, Packing, Report, Rows
from llama2cli.training.dist import World
from llama2cli.training.examples import Order, Part
from llama2cli.training.fit import gradients
from llama2cli.training.objective import NextToken
from llama2cli.training.signals import Stop

PACKINGS: tuple[Packing, ...] = ("blocks", "concat", "none")
Golden = tuple[list[int], list[int]]


def letters() -> Tokenizer:
    """A vocabulary of single letters, bytes and the space: ids can be worked out by hand."""
    alphabet = "INST/[]<>Yhokbe\\"
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(alphabet)] * 2),
        model_writer=out,
        model_type="bpe",
        vocab_size=259 + len(alphabet) + 1,
        character_coverage=1.0,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(out.getvalue())


LETTERS = letters()
WORLD = World(0, 1, torch.device("cpu"))


def golden(line: str) -> Golden:
    """(ids, mask) of pieces separated by spaces; what stands between two bars is trained."""
    special = {"<s>": 1, "</s>": 2, "\\n": LETTERS.piece_to_id("<0x0A>")}
    ids, mask, on = [], [], 0
    for piece in line.split():
        if piece == "|":
            on = 1 - on
        else:
            ids.append(special.get(piece) or LETTERS.piece_to_id(piece))
            mask.append(on)
    return ids, mask


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **extra: int) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


SYSTEM = {"role": "system", "content": "be"}
OPEN, CLOSE = "<s> ▁ [ I N S T ] ▁", "▁ [ / I N S T ]"
SYS = "< < S Y S > > \\n b e \\n < < / S Y S > > \\n \\n"

# One round; three of which the second is not trained, and the last ends with a question; a system message.
SINGLE = [user(" h\n"), assistant(" ok ")]
MULTI = [user("h"), assistant("k"), user("o b"), assistant("e e", weight=0), user("k"), assistant("h o"), user("b")]
FIRST = [SYSTEM, user("h"), assistant("", weight=1), user("o"), assistant("o\nk")]
CASES: list[tuple[list[dict[str, Any]], Golden]] = [
    (SINGLE, golden(f"{OPEN} h {CLOSE} | ▁ o k ▁ </s> |")),
    (
        MULTI,
        golden(
            f"{OPEN} h {CLOSE} | ▁ k ▁ </s> | {OPEN} o ▁ b {CLOSE} ▁ e ▁ e ▁ </s> "
            f"{OPEN} k {CLOSE} | ▁ h ▁ o ▁ </s> | {OPEN} b {CLOSE}"
        ),
    ),
    (FIRST, golden(f"{OPEN} {SYS} h {CLOSE} | ▁ ▁ </s> | {OPEN} o {CLOSE} | ▁ o \\n k ▁ </s> |")),
]
GOLDENS = [g for _, g in CASES]


def stored(
    many: Sequence[list[dict[str, Any]]], context: int = 999, long: dialogues.Long = "cut"
) -> tuple[Dialogues, Report]:
    store = Dialogues()
    records = ((Place("d.jsonl", i), {"messages": m}) for i, m in enumerate(many, 1))
    return store, dialogues.add(store, LETTERS, records, context=context, tags="escape", long=long)


def rows_of(store: Dialogues, context: int, packing: Packing, budget: int = 64, world: World = WORLD) -> Rows:
    return Rows(store, Order([Part("d", np.arange(len(store)))], 3), context, packing, budget, world)


# --- masks --------------------------------------------------------------------------------------------------------


def test_golden_masks() -> None:
    store, report = stored([m for m, _ in CASES])
    for i, (ids, mask) in enumerate(GOLDENS):
        assert (store.ids[i].tolist(), store.masks[i].tolist()) == (ids, mask)
        wanted = [id if on else -100 for id, on in zip(ids[1:], mask[1:])]
        assert store.targets(i).tolist() == wanted
    assert report == Report(
        dialogues=3,
        system=21,
        user=18 + (18 + 20 + 18 + 18) + (18 + 18),
        answers=5 + (4 + 6 + 6) + (3 + 6),
        trained=5 + (4 + 6) + (3 + 6),
        empty=1,
    )
    assert report.metrics() == {
        "tokens": {
            "system": {"total": 21, "trained": 0},
            "user": {"total": 128, "trained": 0},
            "assistant": {"total": 30, "trained": 24},
        },
        "dialogues": 3, "cut": 0, "cut_answers": 0, "cut_tokens": 0, "long": 0, "untrained": 0, "tags": 0, "empty": 1,
    }  # fmt: skip


@pytest.mark.parametrize("case", range(3))
def test_cut_at_every_boundary(case: int) -> None:
    """What is left of a dialogue is its beginning, whose masks have not moved, and what was lost is counted."""
    messages, (ids, mask) = CASES[case]
    ends = {0: [23], 1: [22, 48, 72], 2: [42, 66]}[case]  # behind each answer
    starts = {0: [18], 1: [18, 42, 66], 2: [39, 60]}[case]
    n = len(ids)
    assert all(ids[end - 1] == 2 for end in ends) and n == {0: 23, 1: 90, 2: 66}[case]
    for context in range(2, n + 2):
        store, report = stored([messages], context)
        left = min(context, n)
        assert report.cut == (context < n) and report.cut_tokens == n - left
        assert report.cut_answers == sum(end > context for end in ends)
        assert (len(store), report.dialogues, report.untrained) == ((1, 1, 0) if any(mask[:left]) else (0, 0, 1))
        if len(store):
            assert store.ids[0].tolist() == ids[:left] and store.masks[0].tolist() == mask[:left]
            assert store.targets(0).tolist() == [i if on else -100 for i, on in zip(ids[1:left], mask[1:left])]
            answers = sum(max(0, min(end, left) - start) for start, end in zip(starts, ends))
            assert (report.answers, report.trained) == (answers, sum(mask[:left]))
            assert report.system == 21 * (case == 2) and report.system + report.user + report.answers == left
        dropped, left_out = stored([messages], context, "drop")
        assert (len(dropped), left_out.long) == ((0, 1) if context < n else (1, 0))
        assert left_out.cut == left_out.cut_tokens == left_out.cut_answers == 0


TAGS = {"[INST]": "[\\INST]", "[/INST]": "[\\/INST]", "<<SYS>>": "<\\<SYS>>"}
TEXTS = st.lists(st.sampled_from([*"hok \n\u00e9\U0001f600", *TAGS, "[/", "INST]", "</s>", "<s>"]), max_size=12).map(
    "".join
)
SP = sentencepiece.SentencePieceProcessor(model_proto=LETTERS.proto)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 1)), min_size=1, max_size=3), st.integers(2, 150))
def test_trained_are_the_answers_that_are_left(turns: list[tuple[str, str, int]], context: int) -> None:
    """A dialogue is the beginning of its rounds as SentencePiece makes them; trained is what comes behind [/INST]."""
    messages, ids, mask = [], [], []
    for asked, answered, weight in turns:
        messages += [user(asked), assistant(answered, weight=weight)]
        q, a = asked, answered
        for tag, escaped in TAGS.items():
            q, a = q.replace(tag, escaped), a.replace(tag, escaped)
        prompt = SP.encode(f"[INST] {q.strip()} [/INST]")
        whole = SP.encode(f"[INST] {q.strip()} [/INST] {a.strip()} ")
        ids += [1, *whole, 2]
        mask += [0] * (1 + len(prompt)) + [weight] * (len(whole) - len(prompt) + 1)
    store, report = stored([messages], context)
    assert (len(store) == 1) == any(mask[:context])
    if len(store):
        assert store.ids[0].tolist() == ids[:context] and store.masks[0].tolist() == mask[:context]
        assert report.trained == sum(mask[:context]) and report.cut_tokens == max(0, len(ids) - context)
        assert report.tags == sum(t.count(tag) for q, a, _ in turns for t in (q, a) for tag in TAGS)


def test_the_report_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure("llama2 sft", quiet=False)
    untrained = [user("h"), assistant("k", weight=0)]
    tags = [user("[INST]h<<SYS>>"), assistant("")]
    _, report = stored([SINGLE, MULTI, untrained, tags], 70)
    assert (report.cut, report.cut_answers, report.cut_tokens) == (1, 1, 20)
    assert (report.dialogues, report.untrained, report.tags, report.empty) == (3, 1, 2, 1)
    report.show()
    told = capsys.readouterr().err
    assert "masks of 3 dialogues" in told
    assert "answers cut at the context: 1 (20 tokens lost; see --long)" in told
    assert "dialogues left out, no answer that is trained within the context: 1" in told
    assert "tags of the chat format escaped in contents: 2 (--tags)" in told
    assert "empty answers, trained as such: 1" in told
    line = next(x for x in told.splitlines() if "assistant" in x).split()
    assert [w for w in line if w[0].isdigit()] == ["22", "16", "73%"]  # 5, 4 + 6 (untrained) + 4 of 6, 3

    _, dropped = stored([SINGLE, MULTI], 70, "drop")
    dropped.show()
    assert "dialogues left out, longer than the context: 1" in capsys.readouterr().err
    stored([SINGLE])[1].show()
    assert "warning" not in capsys.readouterr().err


def test_an_empty_answer_that_is_not_trained_is_not_told_as_trained() -> None:
    assert stored([[user("h"), assistant(" ", weight=0), user("h"), assistant("k")]])[1].empty == 0


# --- rows ---------------------------------------------------------------------------------------------------------


def many(n: int = 12) -> list[list[dict[str, Any]]]:
    """Dialogues of different lengths, in order of nothing."""
    return [[user("h" * (i * 5 % 7)), assistant("ok " * (i * 3 % 5))] for i in range(n)] + [MULTI, FIRST]


def segments_of(micro: dict[str, torch.Tensor]) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, targets) of each dialogue in a micro-batch; padding, which has no targets, is left out."""
    for b, (ids, targets) in enumerate(zip(micro["ids_BT"], micro["targets_BT"])):
        places = torch.arange(len(ids))
        real = places <= places[ids != 0].max() if bool(ids.any()) else places < 0
        segments = micro["segments_BT"][b] if "segments_BT" in micro else real.long()
        for s in segments.unique():
            mine = segments == s
            if s == 0:
                assert not bool(ids[mine].any()) and set(targets[mine].tolist()) == {IGNORED}
                continue
            if "positions_BT" in micro:
                assert micro["positions_BT"][b][mine].tolist() == list(range(int(mine.sum())))
            yield ids[mine].tolist(), targets[mine].tolist()


@pytest.mark.parametrize("packing", ["blocks", "none"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [1, 150, 9999])
def test_a_batch_is_its_dialogues(packing: Packing, ranks: int, budget: int) -> None:
    """Each segment is a dialogue without its last token, and its targets are its own masked ids, moved by one."""
    store, _ = stored(many())
    chosen = [(0, i) for i in range(9)]
    worlds = [World(r, ranks, torch.device("cpu")) for r in range(ranks)]
    batches = [rows_of(store, 100, packing, budget, world).batch(chosen) for world in worlds]
    assert len({len(b.micro) for b in batches}) == 1
    for micro in (m for b in batches for m in b.micro):
        B, T = micro["ids_BT"].shape
        assert T <= 100 and (budget >= B * T or B == 1)
        assert ("segments_BT" in micro) == (packing == "blocks")

    order = rows_of(store, 100, packing).order.of(0)[:9]
    whole = [(store.ids[i].tolist(), store.masks[i].tolist()) for i in order]
    wanted = [(ids[:-1], [i if on else -100 for i, on in zip(ids[1:], mask[1:])]) for ids, mask in whole]
    assert sorted(piece for b in batches for m in b.micro for piece in segments_of(m)) == sorted(wanted)
    assert {b.count for b in batches} == {sum(sum(mask) for _, mask in whole)}
    assert {b.tokens for b in batches} == {sum(len(ids) - 1 for ids, _ in whole)} and batches[0].items == 9
    if packing == "blocks" and budget == 9999:  # they are packed: fewer rows than dialogues
        assert sum(len(m["ids_BT"]) for b in batches for m in b.micro) < 9


@pytest.mark.parametrize("context", [2, 7, 40, 2000])
def test_concatenated_rows_are_the_stream_cut(context: int) -> None:
    """The rows of an epoch, put together, are its dialogues one after another: no token and no target is lost."""
    store, _ = stored(many())
    rows = rows_of(store, context, "concat", budget=3 * context)
    for epoch in (0, 1):
        order = rows.order.of(epoch)
        ids = [i for d in order for i in store.ids[int(d)].tolist()]
        mask = [m for d in order for m in store.masks[int(d)].tolist()]
        n = rows.count(epoch)
        assert n == -(-(len(ids) - 1) // context)
        batches = [rows.batch([(epoch, i) for i in range(at, min(at + 4, n))]) for at in range(0, n, 4)]
        inputs: list[int] = []
        targets: list[int] = []
        for batch in batches:
            assert all(set(m) == {"ids_BT", "targets_BT"} and m["ids_BT"].shape[1] == context for m in batch.micro)
            assert all(m["ids_BT"].numel() <= 3 * context for m in batch.micro)
            inputs += torch.cat([m["ids_BT"] for m in batch.micro]).flatten().tolist()
            targets += torch.cat([m["targets_BT"] for m in batch.micro]).flatten().tolist()
            assert batch.count == sum(int((m["targets_BT"] != IGNORED).sum()) for m in batch.micro)
        assert inputs[: len(ids) - 1] == ids[:-1] and not any(inputs[len(ids) - 1 :])
        assert targets[: len(ids) - 1] == [i if on else IGNORED for i, on in zip(ids[1:], mask[1:])]
        assert set(targets[len(ids) - 1 :]) <= {IGNORED}
        assert sum(b.count for b in batches) == sum(mask)  # answers at cuts are trained whole
    assert not np.array_equal(rows.order.of(0), rows.order.of(1))


def test_concatenated_rows_of_ranks_are_those_of_one() -> None:
    store, _ = stored(many())
    items = [(0, i) for i in range(7)]
    whole = rows_of(store, 20, "concat").batch(items)
    dealt = [rows_of(store, 20, "concat", 64, World(r, 3, torch.device("cpu"))).batch(items) for r in range(3)]
    assert {b.count for b in dealt} == {whole.count} and len({len(b.micro) for b in dealt}) == 1
    pairs = [
        sorted(
            (row.tolist(), t.tolist()) for b in some for m in b.micro for row, t in zip(m["ids_BT"], m["targets_BT"])
        )
        for some in ([whole], dealt)
    ]
    assert [p for p in pairs[1] if len(p[0]) == 20] == pairs[0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_two_epochs_train_every_answer_token_twice(packing: Packing) -> None:
    from llama2cli.training.examples import length

    store, report = stored(many())
    rows = rows_of(store, 64, packing) if packing == "concat" else rows_of(store, 128, packing)
    batches = list(rows.batches(5, length(rows.count, 2), None))
    assert sum(b.count for b, _ in batches) == 2 * report.trained
    trained = [int(t) for b, _ in batches for m in b.micro for t in m["targets_BT"].flatten() if t != IGNORED]
    once = [i for d in range(len(store)) for i in store.targets(d).tolist() if i != IGNORED]
    assert sorted(trained) == sorted(once * 2)
    assert batches[-1][1] == {"epoch": 2, "at": 0, "seen": 2 * rows.count(0)}
    for k in (0, 1, len(batches) - 2):  # it goes on from any position
        again = list(rows_of(store, rows.context, packing).batches(5, length(rows.count, 2), dict(batches[k][1])))
        assert [at for _, at in again] == [at for _, at in batches[k + 1 :]]
        assert all(same(a, b) for (a, _), (b, _) in zip(again, batches[k + 1 :], strict=True))


def same(a: Batch, b: Batch) -> bool:
    equal = [torch.equal(x[k], y[k]) for x, y in zip(a.micro, b.micro, strict=True) for k in x]
    return all(equal) and (a.count, a.tokens, a.items) == (b.count, b.tokens, b.items)


# --- loss and gradients -------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = dict(
    vocab_size=LETTERS.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for p in model.parameters():  # larger than at the start of training: a wrong mask is not lost in uniform attention
        p.data *= 3 if p.ndim == 2 else 1
    yield model


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Llama:
    model = Llama(ModelConfig(**SHAPE))
    model.load_state_dict(state_from_hf(theirs.state_dict(), model.config))
    return model


def reference(theirs: Any, rows: Sequence[Golden]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers on each row alone with labels outside the answers -100: sum of losses / trained tokens."""
    theirs.zero_grad()
    count = sum(sum(mask[1:]) for _, mask in rows)
    total = 0.0
    for ids, mask in rows:
        labels = torch.tensor([[i if on else -100 for i, on in zip(ids, mask)]])
        if not (n := int((labels[:, 1:] != -100).sum())):
            continue
        loss = theirs(torch.tensor([ids]), labels=labels).loss * n / count
        loss.backward()
        total += float(loss.detach())
    return total, {k: p.grad.clone() for k, p in theirs.named_parameters()}


def gradients_of(ours: Llama, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Ours, added up over the batches of all ranks."""
    ours.zero_grad()
    total = 0.0
    for batch in batches:
        sums = gradients(NextToken(ours), batch, WORLD, torch.float32, Stop())
        assert sums is not None
        total += float(sums) / batch.count
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    return total, state_to_hf(grads, ours.config)


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = float((got[name] - want[name]).abs().max() / want[name].abs().max())
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("packing", "budget", "ranks"),
    [
        ("blocks", 9999, 1),
        ("blocks", 120, 1),
        ("none", 9999, 1),
        ("none", 130, 1),
        ("none", 1, 1),
        ("blocks", 120, 2),
        ("blocks", 120, 9),
    ],
)
def test_the_loss_is_that_of_each_dialogue_alone(
    ours: Llama, theirs: Any, packing: Packing, budget: int, ranks: int
) -> None:
    """Packed or padded, in one micro-batch or many of different sizes, on one rank or two."""
    store, _ = stored(many(), 80)
    chosen = [(0, i) for i in range(len(store))]
    batches = [
        rows_of(store, 80, packing, budget, World(r, ranks, torch.device("cpu"))).batch(chosen) for r in range(ranks)
    ]
    if budget < 9999 and ranks < 9:  # of nine some have nothing
        assert len(batches[0].micro) > 2
    whole = [(store.ids[i].tolist(), store.masks[i].tolist()) for i in range(len(store))]
    (loss, grads), (want, wanted) = gradients_of(ours, batches), reference(theirs, whole)
    assert loss == pytest.approx(want, rel=1e-5)
    close(grads, wanted)


def test_the_loss_of_a_concatenated_set_is_that_of_its_rows(ours: Llama, theirs: Any) -> None:
    """A row with the token behind it: transformers moves the labels by one."""
    store, _ = stored(many())
    rows = rows_of(store, 50, "concat", budget=120)
    order = rows.order.of(0)
    ids = [i for d in order for i in store.ids[int(d)].tolist()]
    mask = [m for d in order for m in store.masks[int(d)].tolist()]
    windows = [(ids[i : i + 51], [0, *mask[i + 1 : i + 51]]) for i in range(0, len(ids) - 1, 50)]
    (loss, grads) = gradients_of(ours, [rows.batch([(0, i) for i in range(rows.count(0))])])
    want, wanted = reference(theirs, windows)
    assert loss == pytest.approx(want, rel=1e-5)
    close(grads, wanted)


@pytest.mark.parametrize("packing", PACKINGS)
def test_held_out_loss_is_that_of_each_dialogue_alone(ours: Llama, theirs: Any, packing: Packing) -> None:
    store, _ = stored(many())
    parts = [Part("a", np.arange(9)), Part("b", np.arange(9, 14))]
    got = dialogues.measure(NextToken(ours), rows_of(store, 100, packing), parts, torch.float32)
    rows = [(store.ids[i].tolist(), store.masks[i].tolist()) for i in range(14)]
    for part, some in zip(parts, (rows[:9], rows[9:])):
        assert got["heldout"][part.name]["loss"] == pytest.approx(reference(theirs, some)[0], rel=1e-5)
        assert got["heldout"][part.name]["tokens"] == sum(sum(mask) for _, mask in some)
    assert got["heldout_loss"] == pytest.approx(reference(theirs, rows)[0], rel=1e-5)
    assert json.dumps(got)


def test_an_answer_that_was_cut_is_trained_without_an_end() -> None:
    """What a sampler cut at its limit must not teach that the text ends there."""
    store = dialogues.Dialogues()
    whole, cut = golden(f"{OPEN} h {CLOSE} | ▁ o k ▁ </s> |"), golden(f"{OPEN} h {CLOSE} | ▁ o k |")
    records = [{"messages": SINGLE}, {"messages": SINGLE, "truncated": True}, {"messages": SINGLE, "truncated": False}]
    places = [Place("samples.jsonl", i) for i in range(1, 4)]
    report = dialogues.add(store, LETTERS, zip(places, records), context=64, tags="escape", long="cut")
    found = [(store.ids[i].tolist(), store.masks[i].tolist()) for i in range(3)]
    assert found == [whole, cut, whole] and report.trained == 5 + 3 + 5
