"""`llama2 rs-sample` against probability theory: the best of N draws from a distribution that is known by construction.

The policy is a Llama whose layers add nothing: what it says after `[/INST]` depends on that last token alone, and is
one of six words with probabilities that are written below. So is the reward model: its score is that of the word. The
truth is the distribution function of one draw, F(v)^N for the largest of N, and binomial sums for the median: nothing
of `rlhf/best_of.py` or `measure/best_of.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli

WORDS = ["a", "b", "c", "d", "e", "f"]
PROBABILITIES = np.array([0.4, 0.28, 0.14, 0.1, 0.05, 0.03])
REWARDS = np.array([0.5, -1.0, 0.0, 2.0, 3.0, 5.0])  # the likeliest is not the worst, the best is rare
HEAT = (1.0, 0.8)
P, K = 1200, 12
WIDTH, EPS = 16, 1e-5
GAIN = 1 / math.sqrt(1 / WIDTH + EPS)  # what the final norm makes of a unit vector
# Each of the 2 temperatures x (12 + 12 + 2) comparisons allows 5.5 standard errors: 4e-8 for a normal, and in a million
# simulated runs of these skewed numbers no more than 2e-6. So with another seed the test fails by chance with a
# probability below 1e-4.
Z = 5.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    lines = [f"[INST] number {i} [/INST] {' '.join(WORDS)} " for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(base / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    after = sp.encode("[INST] x [/INST]")
    words = [sp.encode(f"[INST] x [/INST] {word}")[len(after) :] for word in WORDS]
    assert all(len(ids) == 1 for ids in words)
    config = transformers.LlamaConfig(
        vocab_size=310,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        num_labels=1,
        pad_token_id=0,
    )
    made = {}
    for name, kind in (
        ("policy", transformers.LlamaForCausalLM),
        ("rewards", transformers.LlamaForSequenceClassification),
    ):
        model = kind(config)
        with torch.no_grad():
            layer, table = model.model.layers[0], model.model.embed_tokens.weight
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            table.copy_(torch.eye(WIDTH)[-1].expand_as(table))  # a direction for all else
            table[after[-1]] = torch.eye(WIDTH)[0]
            for i, [word] in enumerate(words):
                table[word] = torch.eye(WIDTH)[1 + i]
            if name == "policy":
                model.lm_head.weight.zero_()
                model.lm_head.weight[:, 0] = -60 / GAIN
                for [word], p in zip(words, PROBABILITIES):
                    model.lm_head.weight[word, 0] = math.log(p) / GAIN
            else:
                model.score.weight.zero_()
                model.score.weight[0, 1 : 1 + len(WORDS)] = torch.tensor(REWARDS / GAIN)
        made[name] = base / name
        model.save_pretrained(made[name])
        (made[name] / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    return made


# --- the truth ----------------------------------------------------------------------------------------------------


def of_rank(p: np.ndarray, n: int, rank: int) -> np.ndarray:
    """The distribution of the rank-th smallest of n draws, over the sorted rewards: p holds that of one draw.

    It is at most v if at least `rank` of the n are.
    """
    F = np.minimum(np.cumsum(p), 1.0)
    below = sum(math.comb(n, i) * F**i * (1 - F) ** (n - i) for i in range(rank, n + 1))
    return np.diff(below, prepend=0)


def moments(p: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """The variance, and the variance of the squared deviation."""
    squares = (v - p @ v) ** 2
    return p @ squares, p @ squares**2 - (p @ squares) ** 2


def test_the_truth_by_hand():
    """Of two throws of a coin the larger is 1 with 3/4; the middle of three is fair."""
    assert of_rank(np.array([0.5, 0.5]), 2, 2) == pytest.approx([0.25, 0.75])
    assert of_rank(np.array([0.5, 0.5]), 3, 2) == pytest.approx([0.5, 0.5])


# --- the measurement ----------------------------------------------------------------------------------------------


def test_best_of_n_is_the_expected_maximum(folders, tmp_path):
    """Largest and median of N = 1..K, the mean, and the width of the intervals that are stated, at two temperatures."""
    prompts = [{"messages": [{"role": "user", "content": f"number {i}"}]} for i in range(P)]
    names = ("in.jsonl", "all.jsonl", "metrics.jsonl", "best.jsonl")
    source, every, metrics, best = (tmp_path / name for name in names)
    source.write_text("".join(json.dumps(r) + "\n" for r in prompts))
    line = ["rs-sample", source, "-k", K, "--max-new-tokens", 1, "--keep-truncated", "--dtype", "fp32", "--quiet"]
    line += [word for heat in HEAT for word in ("--temperature", heat)]
    line += ["--policy", folders["policy"], "--rm-help", folders["rewards"]]
    assert cli.invoke([*map(str, line), "--all", str(every), "--metrics", str(metrics), "-o", str(best)]) == 0

    # the rewards are those that were written down, and nothing else is said
    worth = dict(zip(WORDS, REWARDS))
    samples = [json.loads(row) for row in every.read_text().splitlines()]
    assert len(samples) == P * K * len(HEAT) and len(best.read_text().splitlines()) == P
    for s in samples:
        assert s["reward"] == pytest.approx(worth[s["messages"][-1]["content"]], abs=1e-4)

    found = {(m["measure"], m["temperature"], m.get("k")): m for m in map(json.loads, metrics.read_text().splitlines())}
    order = np.argsort(REWARDS)
    v = REWARDS[order]
    for heat in HEAT:
        p = PROBABILITIES[order] ** (1 / heat)
        p = p / p.sum()
        for n in range(1, K + 1):
            largest = of_rank(p, n, n)
            middle = (of_rank(p, n, (n + 1) // 2) + of_rank(p, n, n // 2 + 1)) / 2
            for name, truth in (("max", largest), ("median", middle)):
                m = found[f"reward.{name}", heat, n]
                half = (m["high"] - m["low"]) / 2
                assert m["n"] == P and abs(m["value"] - truth @ v) < Z / 1.959964 * half, (name, heat, n)
        # the width of the intervals: that of the mean of K draws for N = 1, of the largest of them for N = K
        for n in (1, K):
            variance, spread = moments(of_rank(p, n, n), v)
            if n == 1:  # the same of means of K draws
                variance, spread = variance / K, (spread + 2 * (K - 1) * variance**2) / K**3
            m = found["reward.max", heat, n]
            stated = ((m["high"] - m["low"]) / 2 / 1.959964) ** 2 * P
            assert abs(stated - variance) < Z * math.sqrt(spread / P), (heat, n)
