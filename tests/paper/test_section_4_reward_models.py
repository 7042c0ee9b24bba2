"""Llama 2, sections 3.2.1 and 3.2.2: preferences and reward models, held against `rm-train` and the statistics.

One test for each rule or number. Asserted is what the paper's text or tables say, or what follows by arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama2cli import cli
from llama2cli.measure import preferences, reward_model
from llama2cli.nn.checkpoint import load_into, save_model
from llama2cli.nn.config import PRESETS, ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.rlhf import mixing
from llama2cli.rlhf.preferences import MARGINS, margins_of, ranking_loss, safety_loss
from llama2cli.rlhf.rewards import piecewise
from llama2cli.stages import pretrain, rm_train
from llama2cli.text.formats import read_comparisons
from llama2cli.text.records import RATINGS, SAFETY_LABELS
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import optim
from llama2cli.training.dist import World

# Table 6: comparisons, turns per dialogue, tokens per example, prompt, response.
TABLE_6 = {
    "Anthropic Helpful": (122_387, 3.0, 251.5, 17.7, 88.4),
    "Anthropic Harmless": (43_966, 3.0, 152.5, 15.7, 46.4),
    "OpenAI Summarize": (176_625, 1.0, 371.1, 336.0, 35.1),
    "OpenAI WebGPT": (13_333, 1.0, 237.2, 48.3, 188.9),
    "StackExchange": (1_038_480, 1.0, 440.2, 200.1, 240.2),
    "Stanford SHP": (74_882, 1.0, 338.3, 199.5, 138.8),
    "Synthetic GPT-J": (33_139, 1.0, 123.3, 13.0, 110.3),
    "Meta": (1_418_091, 3.9, 798.5, 31.4, 234.1),
}
# Table 26: comparisons of each weekly batch.
TABLE_26 = [5_561, 17_072, 30_146, 36_206, 49_375, 57_746, 84_388, 95_235, 127_235, 136_729, 136_868, 181_293,
            210_881, 249_356]  # fmt: skip
# Table 8, the safety model on Meta Safety: significantly, better, slightly, negligibly, average.
TABLE_8 = (94.3, 76.3, 65.7, 55.3, 64.5)
TABLE_27 = {"small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}
CONTEXT = 128
PAIRS = 600


def comparison(prompt: str = "q", chosen: str = "a", rejected: str = "b", **labels: Any) -> dict[str, Any]:
    """A comparison of one turn."""
    answers = {"chosen": chosen, "rejected": rejected}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **sides, **labels}


def read(path: Path, *comparisons: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons that are left of those of a file."""
    path.write_text("".join(json.dumps(c) + "\n" for c in comparisons))
    return [record for _, record in read_comparisons([path])]


def words(text: str) -> int:
    return len(text.split())


# --- 3.2.1: preferences --------------------------------------------------------------------------------------------


def test_3_2_1_four_ratings(tmp_path: Path) -> None:
    """Significantly better, better, slightly better, negligibly better or unsure; no other is read."""
    assert RATINGS == preferences.RATINGS == ("significantly", "better", "slightly", "negligibly")
    records = read(tmp_path / "c.jsonl", *[comparison(rating=rating) for rating in RATINGS])
    assert [record["rating"] for record in records] == list(RATINGS)
    with pytest.raises(Exception, match="significantly, better, slightly, negligibly"):
        read(tmp_path / "c.jsonl", comparison(rating="unsure"))


def test_3_2_1_safety_bins_and_their_shares(tmp_path: Path) -> None:
    """Three bins, 18%, 47% and 35% of the safety data; a safe answer that loses to an unsafe one is left out."""
    counts = {"chosen_safe": 18, "both_safe": 47, "both_unsafe": 35, "rejected_safe": 9}
    made = [comparison(safety=bin, rejected=f"b {i}") for bin, n in counts.items() for i in range(n)]
    found = preferences.records(preferences.collect(read(tmp_path / "c.jsonl", *made), words, "words"))
    shares = {r["measure"]: r["value"] for r in found}
    assert shares["preferences.comparisons"] == 100
    for bin, share in (("chosen_safe", 0.18), ("both_safe", 0.47), ("both_unsafe", 0.35)):
        assert shares[f"preferences.safety_share.{bin}"] == share
    assert set(SAFETY_LABELS) == {"chosen_safe", "both_safe", "both_unsafe"}


def test_table_26_adds_up_to_table_6() -> None:
    """1,418,091 comparisons in 14 weekly batches, each larger than the one before."""
    assert sum(TABLE_26) == TABLE_6["Meta"][0] == 1_418_091
    assert len(TABLE_26) == 14 and sorted(TABLE_26) == TABLE_26


def test_table_26_as_the_statistics_have_it() -> None:
    """Batches in their order with their numbers (here a thousandth of each), and the sum in the total."""
    sizes = {week: n // 1000 for week, n in enumerate(TABLE_26, start=1)}
    made = [comparison(f"q {week} {i}", batch=week) for week, n in sizes.items() for i in range(n)]
    found = preferences.collect(reversed(made), words, "words")
    counted = [r for r in preferences.records(found) if r["measure"] == "preferences.comparisons"]
    assert counted[0]["value"] == sum(sizes.values())
    assert {r["batch"]: r["value"] for r in counted[1:]} == sizes
    title, columns, rows = preferences.tables(found)[0]
    assert title.startswith("comparisons by batch") and columns[:2] == ["batch", "pairs"]
    assert [row[0] for row in rows] == [*map(str, range(1, 15)), "total"]


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6_columns(name: str) -> None:
    """In the paper's rows an example is (rounds) x (prompt + response); with one turn a round, as we count them.

    In the rows of more turns the rounds that follow are fewer than the printed turns, by 0.5 to 0.9.
    """
    _, turns, example, prompt, response = TABLE_6[name]
    rounds = example / (prompt + response)
    if turns == 1:
        assert rounds == pytest.approx(1, abs=0.001)
    else:
        assert 0.5 < turns - rounds < 0.95
    mine = preferences.collect(
        [comparison("p " * round(prompt), "r " * round(response), "s " * round(response))], words
    )
    means = preferences.means(mine.total)
    assert means["per_example"][0] == means["per_prompt"][0] + means["per_response"][0]


# --- 3.2.2: the loss ----------------------------------------------------------------------------------------------


def test_table_27_margins() -> None:
    """Small and large, by rating; without a margin all are 0."""
    for name, margins in TABLE_27.items():
        assert margins_of(RATINGS, MARGINS[name]) == pytest.approx(margins, abs=1e-15)
    assert margins_of(RATINGS, MARGINS["none"]) == [0, 0, 0, 0]


def test_3_2_2_ranking_loss() -> None:
    """Equations 1 and 2: -log sigmoid(r(chosen) - r(rejected) - m(r)), which is softplus(m - (rc - rr))."""
    chosen, rejected = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    margin = torch.tensor(margins_of([RATINGS[i % 4] for i in range(50)], MARGINS["large"]), dtype=torch.float64)
    for m in (torch.zeros(50, dtype=torch.float64), margin):
        loss = ranking_loss(chosen, rejected, m)
        torch.testing.assert_close(loss, -torch.log(1 / (1 + torch.exp(-(chosen - rejected - m)))))
        torch.testing.assert_close(loss, torch.log1p(torch.exp(m - (chosen - rejected))))


def test_a_3_4_safety_auxiliary_loss_tells_safe_from_unsafe() -> None:
    """Its formula is not in the paper; that it rewards a high score of a safe answer, a low one of an unsafe, is."""
    scores = torch.tensor([2.0, -2.0])
    safe, unsafe = safety_loss(scores, torch.ones(2)), safety_loss(scores, torch.zeros(2))
    assert safe[0] < safe[1] and unsafe[1] < unsafe[0]


# --- 3.2.2: the model and its training ----------------------------------------------------------------------------


def test_3_2_2_a_regression_head_takes_the_place_of_the_language_models() -> None:
    """The same architecture, but for one row in place of the head; the rest is the chat checkpoint's."""
    config = ModelConfig(64, 32, 88, 2, 4, 2, 32)
    lm = {name: p.shape for name, p in Llama(config).named_parameters()}
    rm = {name: p.shape for name, p in Llama(config, scorer=True).named_parameters()}
    assert [tuple(lm[name]) for name in lm if name not in rm] == [(64, 32)]
    assert [tuple(rm[name]) for name in rm if name not in lm] == [(1, 32)]
    assert all(rm[name] == lm[name] for name in rm if name in lm)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, excerpts: Path) -> Path:
    """A folder with a small chat model, `init`, and rated comparisons, `data.jsonl`."""
    folder = tmp_path_factory.mktemp("rm")
    model = folder / "tok.model"
    text = str(excerpts / "alice.txt.gz")
    assert cli.invoke(["tokenize", "--train", "--vocab-size", "400", "-o", str(model), "--quiet", text]) == 0
    tokenizer = Tokenizer.load(model)
    (folder / "init").mkdir()
    lm = Llama(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, CONTEXT))
    lm.init_weights(0)
    save_model(folder / "init", lm, tokenizer)
    made = [
        comparison(f"What is {i}?", f"It is {i}.", "No idea.", rating=RATINGS[i % 4], batch=1 + i // 200)
        for i in range(PAIRS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(c) + "\n" for c in made))
    return folder


def prepared(folder: Path, **settings: Any) -> rm_train.Job:
    """The run that `llama2 rm-train` would make with these flags."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    given = rm_train.Settings(files=[str(folder / "data.jsonl")], init=str(folder / "init"), out="", **settings)
    return rm_train.prepare(given, world)


def test_3_2_1_each_weekly_batch_holds_out_its_own_test_set(folder: Path) -> None:
    """The same number of each batch (the paper's 1000; here 20 of 200), and none of them is trained on."""
    job = prepared(folder, heldout_per_batch=20)
    facts = job.rows.store.facts
    held = [int(i) for part in job.heldout for i in part.index]
    assert Counter(facts[i]["batch"] for i in held) == {1: 20, 2: 20, 3: 20}
    trained = {int(i) for part in job.rows.order.parts for i in part.index}
    assert len(trained) == PAIRS - 60 and not trained & set(held)


def test_3_2_2_starts_from_the_chat_checkpoint(folder: Path) -> None:
    """Both reward models know what the chat model knows: every weight of the trunk is its own."""
    job = prepared(folder)
    assert job.work.scorer and Path(job.work.init) == folder / "init"
    lm, rm = (Llama(job.work.config, scorer=scorer) for scorer in (False, True))
    load_into(lm, folder / "init")
    assert load_into(rm, folder / "init") is False  # the head is not there, and stays as it was
    trunk = dict(lm.named_parameters())
    assert all(torch.equal(p, trunk[name]) for name, p in rm.named_parameters() if name in trunk)


def test_3_2_2_one_epoch_of_512_pairs(folder: Path) -> None:
    """1 epoch, since more overfits; 512 pairs, 1024 rows, a batch."""
    job = prepared(folder)
    assert job.work.resolved["batch_size"] == 512
    assert job.work.resolved["steps"] == math.ceil(PAIRS / 512)
    batch, _ = next(job.rows.batches(512, None, None))
    assert batch.count == 512


def test_3_2_2_learning_rates() -> None:
    """5e-6 for the 70B model, 1e-5 for the others."""
    rates = {name: rm_train.learning_rate(PRESETS[name]) for name in ("7b", "13b", "34b", "70b")}
    assert rates == {"7b": 1e-5, "13b": 1e-5, "34b": 1e-5, "70b": 5e-6}


@pytest.mark.parametrize("steps, warmup", [(100, 5), (1000, 30), (166, 5), (200, 6), (2770, 83)])
def test_3_2_2_warm_up(folder: Path, steps: int, warmup: int) -> None:
    """3% of the steps, with a minimum of 5: of 1,418,091 pairs' 2770 steps, 83."""
    assert prepared(folder, steps=steps).work.resolved["warmup"] == warmup


def test_3_2_2_cosine_to_a_tenth(folder: Path) -> None:
    """The rate falls from its maximum, at the end of the warm-up, to a tenth of it at the end, half-way at the mean."""
    resolved = prepared(folder, steps=1000).work.resolved
    schedule = optim.Schedule(resolved["lr"], resolved["warmup"], resolved["steps"], resolved["final_lr"])
    assert (schedule.lr(30), schedule.lr(1000)) == pytest.approx((1e-5, 1e-6))
    assert schedule.lr(515) == pytest.approx(5.5e-6)
    rates = [schedule.lr(step) for step in range(30, 1001)]
    assert all(a >= b for a, b in pairwise(rates))


def test_3_2_2_optimizer_of_the_base_model() -> None:
    """The same optimizer parameters as for pretraining: AdamW's decay and clipping are those of `pretrain`."""
    both = [{f.name: f.default for f in dataclasses.fields(s.Settings)} for s in (pretrain, rm_train)]
    assert all(both[0][name] == both[1][name] for name in ("weight_decay", "clip", "decay"))


def test_3_2_2_mix_of_the_helpfulness_model() -> None:
    """All helpfulness data and an equal amount of the rest, drawn uniformly from safety and open data."""
    sizes = {"helpfulness": 1000, "safety": 600, "open.webgpt": 1400}
    weights, notes = mixing.weights("helpfulness", sizes)
    amounts = {name: weights[name] * n for name, n in sizes.items()}
    assert amounts == pytest.approx({"helpfulness": 1000, "safety": 300, "open.webgpt": 700}) and notes == []


def test_3_2_2_mix_of_the_safety_model() -> None:
    """All safety data (Anthropic Harmless too), mixed 90/10 with helpfulness data, Meta's and open."""
    sizes = {"safety": 700, "safety.harmless": 200, "helpfulness": 400, "open.helpful": 600}
    weights, _ = mixing.weights("safety", sizes)
    assert (weights["safety"], weights["safety.harmless"]) == (1, 1)
    own, rest = 900, weights["helpfulness"] * 400 + weights["open.helpful"] * 600
    assert own / (own + rest) == pytest.approx(0.9) and weights["helpfulness"] == weights["open.helpful"]


# --- results ------------------------------------------------------------------------------------------------------


def test_table_8_shape() -> None:
    """The columns from significantly to negligibly, then the average over all pairs, which is not that of the columns.

    (Table 8's average of 64.5 is below the mean of its columns, 72.9: there are more pairs of the weaker ratings.)
    """
    ratings = ["significantly"] * 2 + ["better"] * 2 + ["slightly"] * 2 + ["negligibly"] * 10
    right = np.array([1, 1, 1, 1, 1, 0, *[1, 0] * 5])
    result = reward_model.evaluate(right, 1 - right, ratings)
    _, columns, rows = reward_model.tables(result)[0]
    assert columns[1:] == ["significantly", "better", "slightly", "negligibly", "average"]
    assert rows[0][1:] == ["100.0", "100.0", "50.0", "50.0", f"{100 * 10 / 16:.1f}"]
    assert sum(TABLE_8[:4]) / 4 > TABLE_8[4]


@pytest.mark.parametrize(
    "unsafe, safe, expected", [(True, 0.9, 0.9), (False, 0.149, 0.149), (False, 0.151, 0.6), (True, 0.1, 0.1)]
)
def test_3_2_3_piecewise_reward(unsafe: bool, safe: float, expected: float) -> None:
    """The safety score where the prompt is unsafe or that score is below 0.15, else the helpfulness score (0.6)."""
    logits = torch.logit(torch.tensor([0.6, safe], dtype=torch.float64))
    reward = piecewise(logits[:1], logits[1:], torch.tensor([unsafe]))
    assert torch.sigmoid(reward).item() == pytest.approx(expected)


def test_3_2_3_the_threshold_is_strict() -> None:
    """At 0.15 itself an answer is safe, for the reward and for precision and recall alike."""
    at = torch.tensor([math.log(0.15 / 0.85)], dtype=torch.float64)
    below = torch.nextafter(at, at - 1)
    for score, is_unsafe in ((at, False), (below, True)):
        reward = piecewise(torch.ones(1, dtype=torch.float64), score, torch.tensor([False]))
        assert torch.equal(reward, score) == is_unsafe
        assert reward_model.found_unsafe(score.numpy(), np.array([False]))["found"] == int(is_unsafe)
