"""The mixture: every token once an epoch, sources by weight, positions that can be gone back to."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny

from llama2cli.errors import DataError
from llama2cli.text.shards import TokenFolder
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import data
from llama2cli.training.data import Shape


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.load(corpus / "tok.model")


@pytest.fixture(scope="module")
def stream_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of folder a, made from the texts, not read from the shards."""
    return np.concatenate([[1, *tokenizer.encode(t), 2] for t in tiny.documents(400)])


def mixture(corpus: Path, weights: tuple[float | None, float | None] = (2.0, 1.0), context: int = 16) -> list:
    streams = [data.whole(n, TokenFolder.open(corpus / n)) for n in "ab"]
    return data.sources(streams, weights, context)


def test_an_epoch_reads_every_window_once(corpus: Path, stream_ids: np.ndarray) -> None:
    [source] = data.sources([data.whole("a", TokenFolder.open(corpus / "a"))], [None], 16)
    n = (len(stream_ids) - 1) // 16
    assert source.windows == n
    spare = (len(stream_ids) - 1) % 16
    for epoch in range(3):
        rows = [source.window(epoch * n + i, seed=5) for i in range(n)]
        offsets = {s for s in range(spare + 1) if {tuple(r) for r in rows} == windows_from(stream_ids, s, 16)}
        assert offsets, "no offset explains the windows of this epoch"
    first, second = ([tuple(source.window(e * n + i, seed=5)) for i in range(n)] for e in range(2))
    assert first != second
    assert [tuple(source.window(i, seed=6)) for i in range(n)] != first


def windows_from(ids: np.ndarray, start: int, context: int) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + context + 1]) for i in range(start, len(ids) - context, context)}


def test_sources_are_drawn_by_weight(corpus: Path) -> None:
    mixed = mixture(corpus)
    assert [s.share for s in mixed] == pytest.approx([2 / 3, 1 / 3])
    n = 6000
    drawn = Counter(d.source for d, _ in islice(data.draws([s.share for s in mixed], seed=1), n))
    assert abs(drawn[0] - n * 2 / 3) < 4 * (n * 2 / 9) ** 0.5
    tokens = [s.stream.n_tokens for s in mixed]
    assert [s.share for s in mixture(corpus, (None, None))] == pytest.approx([t / sum(tokens) for t in tokens])


def test_the_order_of_a_source_does_not_depend_on_the_others(corpus: Path) -> None:
    together, alone = mixture(corpus)[0], mixture(corpus, (1.0, 5.0))[0]
    assert all(np.array_equal(together.window(i, 3), alone.window(i, 3)) for i in range(20))


def test_batches_go_on_from_any_position(corpus: Path) -> None:
    mixed, shape = mixture(corpus), Shape(rows=6, micro=4)
    plain = list(islice(data.batches(mixed, 9, shape), 12))
    for k in range(12):
        again = list(islice(data.batches(mixed, 9, shape, plain[k][1]), 11 - k))
        assert [p for _, p in again] == [p for _, p in plain[k + 1 :]]
        for (a, _), (b, _) in zip(again, plain[k + 1 :]):
            assert all(bool((x[n] == y[n]).all()) for x, y in zip(a.micro, b.micro) for n in x)
    batch, position = plain[-1]
    assert [len(m["ids_BT"]) for m in batch.micro] == [4, 2] and batch.count == 6 * 16
    assert position["row"] == 72 == sum(position["drawn"])
    for micro in batch.micro:
        assert bool((micro["ids_BT"][:, 1:] == micro["targets_BT"][:, :-1]).all())


def test_ranks_share_the_rows_of_one_process(corpus: Path) -> None:
    mixed = mixture(corpus)
    alone = next(data.batches(mixed, 9, Shape(rows=6, micro=6)))
    ranks = [next(data.batches(mixed, 9, Shape(6, 2, rank, 2))) for rank in range(2)]
    rows = np.concatenate([m["ids_BT"].numpy() for b, _ in ranks for m in b.micro])
    assert np.array_equal(rows, alone[0].micro[0]["ids_BT"].numpy())
    assert all(b.count == alone[0].count and p == alone[1] for b, p in ranks)


def test_epochs_are_windows_read_over_windows(corpus: Path) -> None:
    mixed = mixture(corpus)
    position = {"row": 0, "drawn": [mixed[0].windows * 3, mixed[1].windows // 2]}
    assert data.epochs(mixed, position)["a"] == 3.0
    assert data.epochs(mixed, position)["b"] == pytest.approx(0.5, abs=0.01)


def test_a_source_shorter_than_a_window_is_named(corpus: Path) -> None:
    with pytest.raises(DataError, match=r'source "b" has .* tokens to train on, one row of --context 99999 needs'):
        data.sources([data.whole("b", TokenFolder.open(corpus / "b"))], [None], 99999)


def test_held_out_documents_are_whole_and_apart(corpus: Path, tokenizer: Tokenizer) -> None:
    texts = tiny.documents(400)
    train, held = data.split("a", TokenFolder.open(corpus / "a"), 0.1)
    kept, apart = (documents_of(s, tokenizer) for s in (train, held))
    assert Counter(kept) + Counter(apart) == Counter(texts)
    assert len(apart) == held.documents and len(kept) == train.documents
    assert 0.09 < held.n_tokens / (held.n_tokens + train.n_tokens) <= 0.1
    again = data.split("a", TokenFolder.open(corpus / "a"), 0.1)[1]
    assert np.array_equal(again.starts, held.starts)
    for start, stop in ((0, 5), (100, 900), (train.n_tokens - 3, train.n_tokens), (7, 7)):
        assert np.array_equal(train.read(start, stop), train.read(0, train.n_tokens)[start:stop])


def documents_of(stream: data.Stream, tokenizer: Tokenizer) -> list[str]:
    ids = stream.read(0, stream.n_tokens).tolist()
    starts = [i for i, t in enumerate(ids) if t == 1]
    parts = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)])]
    assert all(p[0] == 1 and p[-1] == 2 for p in parts)
    return [tokenizer.decode(p[1:-1]) for p in parts]


def test_a_small_share_holds_out_one_document(corpus: Path) -> None:
    train, held = data.split("a", TokenFolder.open(corpus / "a"), 1e-6)
    assert held.documents == 1 and train.documents == 399


def test_of_one_document_the_end_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from llama2cli.text.shards import ShardWriter

    text = " ".join(tiny.documents(50))
    for name, words in (("one", text), ("less", "")):
        with ShardWriter(tmp_path / name, tokenizer, shard_tokens=1 << 20) as writer:
            writer.add(name, tokenizer.pack([words]), len(words))
            writer.publish({})
    folder = TokenFolder.open(tmp_path / "one")
    train, held = data.split("one", folder, 0.1)
    assert held.n_tokens == folder.n_tokens // 10
    whole = [*train.read(0, train.n_tokens), *held.read(0, held.n_tokens)]
    assert tokenizer.decode(whole) == text
    with pytest.raises(DataError, match='"less" has 2 tokens: nothing can be held out'):
        data.split("less", TokenFolder.open(tmp_path / "less"), 0.5)


def test_streamed_records_become_documents() -> None:
    records = [{"ids": [5, 6, 7]}, {"ids": [1, 8]}, {"ids": [9, 2]}, {"ids": [1, 3, 2]}, {"ids": []}]
    flat = [1, 5, 6, 7, 2, 1, 8, 2, 1, 9, 2, 1, 3, 2, 1, 2]
    rows = [r.tolist() for r in data.stream_windows(records, 4)]
    assert rows == [flat[i : i + 5] for i in (0, 4, 8)]  # 4 predicted tokens a row; the last 3 tokens do not fill one
    batches = list(data.streamed_batches(records, 4, Shape(2, 1)))
    assert [p for _, p in batches] == [{"row": 2}]
    assert batches[0][0].micro[1]["ids_BT"].tolist() == [flat[4:8]]
