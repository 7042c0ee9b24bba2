"""`llama2 ppo` learns: on a task whose optimum is known it gets there, and goes no farther than it must.

A prompt names a colour, and the policy answers one of three colours, each with probability 1/3 whatever the prompt. The
reward is high for the colour of the prompt. The best policy is always right, and the nearest one of these to the policy
that it started from is log 3 = 1.0986 nats away: what PPO ends with has to be right in 95% and about that far.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

from llama2cli import cli
from llama2cli.stages.ppo import roles
from llama2cli.text.tokenizer import Tokenizer

COLOURS = ("red", "green", "blue")
GOOD, BAD, SAFE = 2.0, -2.0, 5.0  # logits


class Rule:
    """In the place of a reward model: GOOD where the answer is the colour of the prompt; or SAFE, always."""

    def __init__(self, tokenizer: Tokenizer, safe: bool) -> None:
        self.tokenizer, self.safe, self.context, self.model = tokenizer, safe, 64, torch.nn.Identity()

    def score(self, sequences, *, tick=None):
        """One logit for each dialogue."""
        texts = [self.tokenizer.decode([i for i in ids if i > 2]) for ids in sequences]
        pairs = [text.partition("[/INST]")[::2] for text in texts]
        return [SAFE if self.safe else GOOD if prompt.split()[1] == answer.strip() else BAD for prompt, answer in pairs]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """policy: answers any colour; rm: a reward model of its tokenizer; prompts.jsonl."""
    base = tmp_path_factory.mktemp("colours")
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": f"{COLOURS[i % 3]} fox {i // 3}"},
                {"role": "assistant", "content": c},
            ]
        }
        for i in range(600)
        for c in [COLOURS[i // 3 % 3]]
    ]
    (base / "dialogues.jsonl").write_text("".join(json.dumps(d) + "\n" for d in dialogues))
    prompts = [{"messages": d["messages"][:1]} for d in dialogues]
    (base / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    shape = dict(
        vocab_size=330,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, num_labels=1, pad_token_id=0)
    for kind, name in ((transformers.LlamaForCausalLM, "base"), (transformers.LlamaForSequenceClassification, "rm")):
        made = kind(config)
        for p in made.parameters():
            p.data.mul_(3)  # so small a model learns little from weights of 0.02
        made.save_pretrained(base / name)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"[INST] {c} fox {i} [/INST] {c} " for i in range(40) for c in COLOURS]),
        model_prefix=str(base / "base/tokenizer"),
        vocab_size=330,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    shutil.copy(base / "base/tokenizer.model", base / "rm")
    tune = ["sft", "--init", base / "base", "--data", base / "dialogues.jsonl", "--lr", "2e-3", "--epochs", "6"]
    assert cli.invoke([str(a) for a in (*tune, "-o", base / "policy", "--quiet")]) == 0
    return base


def learn(start: Path, out: Path, seed: int, *more: str) -> dict[str, float]:
    """Run PPO; the held-out figures of its last step, with the share of right answers."""
    line = ["ppo", "--policy", start / "policy", "--rm-help", start / "rm", "--rm-safe", start / "rm"]
    line += ["--prompts", start / "prompts.jsonl", "--heldout", "0.25", "--patience", "0", "--seed", seed, "-o", out]
    line += ["--batch-size", "64", "--mini-batch", "16", "--max-new-tokens", "8", "--lr", "1e-4", "--quiet"]
    line += ["--steps", "80", "--eval-every", "40", "--save-every", "80", *more]
    assert cli.invoke([str(a) for a in line]) == 0
    measured = [m for m in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "heldout" in m]
    before, after = measured[0]["heldout"], measured[-1]["heldout"]
    assert 0.15 < (before["reward"] - BAD) / (GOOD - BAD) < 0.55  # it could not do it
    return {**after, "right": (after["reward"] - BAD) / (GOOD - BAD)}


@pytest.fixture
def rules(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards of the task for those of models."""
    tokenizer = Tokenizer.load(start / "policy")
    monkeypatch.setattr(roles, "load_scorers", lambda job: {n: Rule(tokenizer, n == "safe") for n in ("help", "safe")})


def check(found: dict[str, float]) -> None:
    """At least 95% of the optimum, as far as that is away: right in p of all cases costs log 3 - H(p) or more."""
    assert found["right"] >= 0.95, found
    assert 0.7 < found["kl"] < 1.5, (found, math.log(3))


def test_it_learns_what_is_asked(start: Path, tmp_path: Path, rules: None) -> None:
    """With a value model of its own."""
    check(learn(start, tmp_path / "run", 0))


def test_it_learns_with_a_value_head_on_the_trunk(start: Path, tmp_path: Path, rules: None) -> None:
    """With one model for both."""
    check(learn(start, tmp_path / "run", 1, "--value", "head"))


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "head"])
def test_ten_of_ten_seeds(start: Path, tmp_path: Path, rules: None, value: str) -> None:
    """No seed fails."""
    for seed in range(10):
        check(learn(start, tmp_path / str(seed), seed, "--value", value))
