"""Scores against transformers' LlamaForSequenceClassification on padded batches; how sequences are put together."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.nn.packing import common, tree
from llama2cli.sampling import scoring
from llama2cli.sampling.scoring import Scorer, alike, batches

CONTEXT, VOCAB = 96, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reward model that transformers wrote: grouped-query attention, weights large enough to tell orders apart."""
    folder = tmp_path_factory.mktemp("rm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"good or bad {i}" for i in range(300)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        num_labels=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config)
    for p in model.parameters():
        p.data.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """Scores by transformers: one batch, padded with the config's pad id, with an attention mask."""
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def score(sequences: list[list[int]]) -> list[float]:
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()

    return score


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return Scorer.load(str(folder), device="cpu", dtype="fp32")


def drawn(n: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """Dialogues' shape: BOS first, EOS last; the id of the padding is not in them."""
    r = random.Random(seed)
    return [[1, *(r.randrange(3, VOCAB) for _ in range(r.randint(low, high) - 2)), 2] for _ in range(n)]


def answers(groups: int, k: int, prompt: int, answer: int, seed: int = 0) -> list[list[int]]:
    """k answers of about `answer` tokens to each of some prompts of `prompt` tokens."""
    out = []
    for g, start in enumerate(drawn(groups, prompt, prompt, seed)):
        out += [start + own[1:] for own in drawn(k, answer // 2, answer, seed + 1000 + g)]
    return out


SETS = {
    "of all lengths": drawn(40, 3, CONTEXT),
    "alike": answers(6, 7, 40, 20),
    "pairs": answers(12, 2, 50, 12),
    "one": drawn(1, 9, 9),
    "equal": drawn(1, 30, 30) * 3,
    "one begins another": [drawn(1, 80, 80)[0][:n] for n in (80, 40, 41, 80, 2, 1)],
    "mixed": [*answers(2, 5, 40, 20), *drawn(5, 3, 90), *answers(1, 3, 60, 10), *drawn(3, 3, 9)],
}


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tokens", [1, 200, 10000])
def test_scores_are_those_of_transformers(folder, theirs, name, tokens):
    scorer = Scorer.load(str(folder), device="cpu", dtype="fp32", tokens=tokens)
    want = theirs(SETS[name])
    assert len(set(want)) == len(set(map(tuple, SETS[name])))
    ticks: list[int] = []
    got = scorer.score(SETS[name], tick=ticks.append)
    assert got == pytest.approx(want, abs=2e-4)
    assert sum(ticks) == len(want)


def test_trees_are_what_was_tested(scorer):
    """The sets above do hold trees of several sizes, and rows without."""
    sizes = {name: [len(r) for r in alike(arrays(s), CONTEXT, scorer.cost)] for name, s in SETS.items()}
    assert max(sizes["alike"]) >= 3 and max(sizes["pairs"]) == 2 and sizes["equal"] == [3]
    assert {len(r) > 1 for r in alike(arrays(SETS["mixed"]), CONTEXT, scorer.cost)} == {True, False}


def test_order_and_company_do_not_matter(scorer):
    mixed = SETS["mixed"]
    alone = [scorer.score([s])[0] for s in mixed]
    assert scorer.score(mixed) == pytest.approx(alone, abs=2e-4)
    shuffled = random.Random(1).sample(range(len(mixed)), len(mixed))
    assert scorer.score([mixed[i] for i in shuffled]) == pytest.approx([alone[i] for i in shuffled], abs=2e-4)
    assert scorer.score(mixed) == scorer.score(mixed)  # to the bit
    assert scorer.score([]) == []


def test_the_offset_is_added(folder, tmp_path, scorer):
    moved = tmp_path / "rm"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"score_offset": -1.5}))
    raw, with_offset = scorer.score(SETS["pairs"]), Scorer.load(str(moved), device="cpu").score(SETS["pairs"])
    assert with_offset == pytest.approx([x - 1.5 for x in raw], abs=1e-6)


def test_bf16_is_close(folder, theirs):
    """8 bits of precision: the order of clear cases, not the digits."""
    got = Scorer.load(str(folder), device="cpu", dtype="bf16").score(SETS["pairs"])
    want = theirs(SETS["pairs"])
    assert np.corrcoef(got, want)[0, 1] > 0.99


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [5] * (CONTEXT + 1)])
def test_sequences_that_cannot_be_scored(scorer, bad):
    with pytest.raises(ValueError, match=rf"sequence 1 has {len(bad)} tokens, the context is {CONTEXT}"):
        scorer.score([[1, 5, 2], bad])
    assert len(scorer.score([[5] * CONTEXT])) == 1


def test_scores_that_are_not_finite_are_an_error(folder):
    scorer = Scorer.load(str(folder), device="cpu")
    with torch.no_grad():
        scorer.model.norm[0] = float("inf")
    with pytest.raises(DataError, match="scores are not finite") as e:
        scorer.score(SETS["one"])
    assert str(folder) in str(e.value)


def test_a_language_model_is_no_scorer(folder, tmp_path):
    config = transformers.LlamaConfig.from_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="this is a language model, a reward model is wanted"):
        Scorer.load(str(tmp_path), device="cpu")


# --- what is computed together ------------------------------------------------------------------------------------


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(s) for s in sequences]


def tokens_of(sequences: list[np.ndarray], runs: list[range]) -> int:
    return sum(len(tree(sequences[r.start : r.stop])) for r in runs)


few = st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=12), max_size=9)  # much in common


@settings(max_examples=300, deadline=None)
@given(few, st.integers(12, 40))
def test_runs_are_consecutive_and_never_cost_more(sequences, most):
    given = arrays(sequences)
    runs = alike(given, most, lambda n: n)
    assert [i for r in runs for i in r] == list(range(len(given)))
    for r in runs:
        piece = tree(given[r.start : r.stop])
        assert len(piece) <= max(most, len(given[r.start]))
        assert len(r) == 1 or len(piece) < sum(len(given[i]) for i in r)
    assert tokens_of(given, runs) <= sum(map(len, given))


def test_a_common_beginning_is_counted_once():
    """By hand: 4 answers of 3 tokens to a prompt of 10 are 22 tokens, not 52; the next prompt begins a new run."""
    first = [[1, *range(10, 19), 30 + i, 40 + i, 2] for i in range(4)]
    second = [[1, *range(50, 59), 30 + i, 40 + i, 2] for i in range(2)]
    given = arrays(first + second)
    runs = alike(given, 100, lambda n: n)
    assert runs == [range(0, 4), range(4, 6)]
    assert [len(tree(given[r.start : r.stop])) for r in runs] == [22, 16]
    assert alike(given, 17, lambda n: n) == [range(0, 2), range(2, 4), range(4, 6)]  # 16 tokens each


def test_what_all_share_does_not_tear_the_prompts_apart():
    """A system prompt that every dialogue has must not make one tree of which the prompts are not part."""
    r = random.Random(0)
    system = [r.randrange(3, 300) for _ in range(20)]
    prompts = [[*system, *(r.randrange(3, 300) for _ in range(60))] for _ in range(5)]
    given = arrays([[*p, *(r.randrange(3, 300) for _ in range(10))] for p in prompts for _ in range(4)])
    assert alike(given, 10000, lambda n: n) == [range(i, i + 4) for i in range(0, 20, 4)]


def test_a_small_saving_is_not_worth_a_mask():
    given = arrays([[*range(5), *range(100, 200)], [*range(5), *range(200, 300)]])
    assert common(given) == 5
    assert [len(r) for r in alike(given, 1000, lambda n: n)] == [1, 1]


def test_quadratic_attention_keeps_trees_small(scorer):
    """Where the attention of a long row costs more than the common tokens, there is more than one tree."""
    given = arrays(answers(1, 64, 24, 24))
    sizes = [len(r) for r in alike(given, 10**6, scorer.cost)]
    assert 1 < max(sizes) < 64
    assert sum(scorer.cost(len(tree(given[r.start : r.stop]))) for r in alike(given, 10**6, scorer.cost)) < sum(
        scorer.cost(len(s)) for s in given
    )


@settings(max_examples=200, deadline=None)
@given(few, st.integers(1, 60))
def test_batches_hold_each_piece_once_and_stay_below_the_bound(sequences, tokens):
    given = arrays(sequences)
    runs = alike(given, 40, lambda n: n)
    pieces = [tree(given[r.start : r.stop]) for r in runs]
    out = batches(pieces, tokens)
    assert sorted(itertools.chain(*out)) == list(range(len(pieces)))
    for batch in out:
        assert len(batch) == 1 or len(batch) * max(len(pieces[i]) for i in batch) <= tokens
        assert len({len(pieces[i].ends) > 1 for i in batch}) == 1
    assert out == batches(pieces, tokens)


def test_rows_of_a_batch_have_similar_length():
    """1,000 dialogues of 20 to 400 tokens: less than a twentieth of what is computed is padding."""
    r = random.Random(5)
    pieces = [tree([np.arange(r.randint(20, 400))]) for _ in range(1000)]
    out = batches(pieces, scoring.BATCH_TOKENS["cpu"])
    padded = sum(len(b) * max(len(pieces[i]) for i in b) for b in out)
    assert padded < 1.05 * sum(map(len, pieces))
