"""What `--data` and `--heldout` mean, and the bytes that held-out text has."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from llama2cli.errors import DataError, Failure, Misuse
from llama2cli.text.shards import TokenFolder
from llama2cli.text.tokenizer import Tokenizer, train
from llama2cli.training import corpus as corpora
from llama2cli.training import data, heldout
from llama2cli.training.corpus import Named
from llama2cli.training.dist import World

HERE = World(0, 1, torch.device("cpu"))


def test_forms_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for odd in ("a:3", "n=x"):
        Path(odd).mkdir()
    assert corpora.parse("web=dir/web:0.5") == Named("web", "dir/web", 0.5)
    assert corpora.parse("dir/web") == Named("web", "dir/web", None)
    assert corpora.parse("dir/web/") == Named("web", "dir/web/", None)
    assert corpora.parse("dir/web:2") == Named("web", "dir/web", 2.0)
    assert corpora.parse("w=dir") == Named("w", "dir", None)
    assert corpora.parse("w=/abs/d=e:1e3") == Named("w", "/abs/d=e", 1000.0)
    assert corpora.parse("dir/k=v") == Named("k=v", "dir/k=v", None)
    assert corpora.parse("a:3") == Named("a:3", "a:3", None)  # a folder of that name is there
    assert corpora.parse("n=x") == Named("n=x", "n=x", None)
    assert corpora.parse(".").name == tmp_path.name
    assert corpora.parse("-") == Named("stdin", "-", None)


@pytest.mark.parametrize("text", ["x=d:0", "x=d:-1", "x=d:nan", "x=d:inf", "x=d:much", "x=", "=d", "x=:2"])
def test_a_source_that_makes_no_sense(text: str) -> None:
    with pytest.raises(Misuse, match="--data"):
        corpora.parse(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no data"),
        (["a/x", "b/x"], 'two sources are called "x"'),
        (["a:1", "b"], 'source "b" has no weight'),
        (["-", "b"], "stdin cannot be mixed"),
    ],
)
def test_sources_that_do_not_go_together(texts: list[str], message: str) -> None:
    with pytest.raises(Misuse, match=message):
        corpora.parse_sources(texts)


def test_heldout_is_a_share_or_folders() -> None:
    assert corpora.parse_heldout([]) == []
    assert corpora.parse_heldout(["0.25"]) == 0.25
    assert corpora.parse_heldout(["v=d", "e"]) == [Named("v", "d", None), Named("e", "e", None)]
    for texts in (["0"], ["1"], ["1.5"], ["0.1", "d"]):
        with pytest.raises(Misuse, match="--heldout"):
            corpora.parse_heldout(texts)


def test_folders_of_another_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(train(tiny.documents(300), 290))
    other = Tokenizer.load(tmp_path / "other.model")
    named = [Named("a", str(corpus / "a"), None)]
    with pytest.raises(DataError, match=r'source "a" was made with the tokenizer [0-9a-f]{12}, this one is'):
        corpora.open_corpus(named, [], other, 16)
    opened = corpora.open_corpus(named, [Named("b", str(corpus / "b"), None)], Tokenizer.load(corpus / "tok.model"), 16)
    assert [h.name for h in opened.heldout] == ["b"] and opened.described["heldout"]["sources"][0]["documents"] == 150


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_bytes_are_those_of_the_text(corpus: Path, name: str) -> None:
    tokenizer = Tokenizer.load(corpus / "tok.model")
    folder = TokenFolder.open(corpus / name)
    stream = data.whole(name, folder)
    texts = tiny.documents(400) if name == "a" else tiny.documents(150, 400)
    wanted = sum(len(t.encode()) for t in texts)
    assert wanted == folder.n_bytes
    assert heldout.count_bytes(stream, stream.n_tokens, tokenizer) == wanted
    assert heldout.count_bytes(stream, stream.n_tokens, tokenizer, block=7) == wanted


def test_bytes_where_a_document_is_cut(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / "tok.model")
    stream = data.whole("a", TokenFolder.open(corpus / "a"))
    ids = stream.read(0, stream.n_tokens).tolist()
    end = ids.index(2)  # of the first document
    for cut in range(2, end + 1):
        assert heldout.count_bytes(stream, cut, tokenizer) == len(tokenizer.decode(ids[1:cut]).encode())
    assert heldout.count_bytes(stream, end + 2, tokenizer) == len(tokenizer.decode(ids[1:end]).encode())


class Uniform(torch.nn.Module):
    """-log p of a model that gives every piece the same probability."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.predicted = vocab, 0

    def forward(self, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        assert bool((ids_BT[:, 1:] == targets_BT[:, :-1])[targets_BT[:, 1:] >= 0].all())
        n = int((targets_BT >= 0).sum())
        self.predicted += n
        return torch.tensor(n * math.log(self.vocab))


@pytest.mark.parametrize("limit", [None, 1, 16, 100])
def test_every_token_is_predicted_once(corpus: Path, limit: int | None) -> None:
    tokenizer = Tokenizer.load(corpus / "tok.model")
    stream = data.whole("a", TokenFolder.open(corpus / "a"))
    part = heldout.held_out(stream, tokenizer, limit)
    model = Uniform(64)
    metrics = heldout.measure(model, [part], 16, 3, HERE, torch.float32)  # type: ignore[arg-type]
    n = stream.n_tokens - 1 if limit is None else limit
    assert model.predicted == n == part.tokens - 1
    assert metrics["heldout_loss"] == pytest.approx(math.log(64))
    assert metrics["heldout"]["a"]["bits_per_byte"] == pytest.approx(6 * n / part.n_bytes)


def test_the_mean_is_over_sources() -> None:
    parts = [
        heldout.HeldOut(data.Stream(n, None, np.array([0]), np.array([9]), 1), t, 8) for n, t in (("x", 5), ("y", 9))
    ]  # type: ignore[arg-type]
    metrics = heldout.summary(parts, [4.0, 16.0])
    assert metrics["heldout_loss"] == 1.5
    assert metrics["heldout"] == {
        "x": {"loss": 1.0, "bits_per_byte": 4 / math.log(2) / 8},
        "y": {"loss": 2.0, "bits_per_byte": 16 / math.log(2) / 8},
    }
    with pytest.raises(Failure, match='held-out loss of source "y" is nan'):
        heldout.summary(parts, [1.0, math.nan])


def test_held_out_data_have_no_weight(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert [n.name for n in corpora.parse_heldout([str(tmp_path / "a")])] == ["a"]
    with pytest.raises(Misuse, match='"a" has a weight; what is held out is measured whole'):
        corpora.parse_heldout([f"{tmp_path / 'a'}:2"])
