"""Llama 2, section 3.2.3: rejection sampling and PPO, held against `rs-sample` and the functions of `rlhf`.

One test for each rule or number. Asserted is what the paper's text says, or what follows by arithmetic.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from llama2cli.nn.budget import n_params
from llama2cli.nn.config import PRESETS
from llama2cli.rlhf import best_of, ppo
from llama2cli.rlhf.rewards import piecewise
from llama2cli.stages import ppo as ppo_stage
from llama2cli.stages import rs_sample
from llama2cli.stages.ppo import job
from llama2cli.text.records import THRESHOLD
from llama2cli.training.optim import Schedule

DEFAULTS = {f.name: f for f in dataclasses.fields(rs_sample.Settings)}
PPO = {f.name: f.default for f in dataclasses.fields(ppo_stage.Settings)}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# --- rejection sampling -------------------------------------------------------------------------------------------


def test_3_2_3_the_best_of_k_by_the_reward() -> None:
    """K outputs of the model, of which the best candidate by the reward is selected."""
    assert best_of.best([logit(p) for p in (0.2, 0.9, 0.7)]) == 1


def test_3_2_3_temperature_between_10_and_100_samples() -> None:
    """T in [1.2, 1.3] is best for the RLHF model when 10 to 100 outputs are sampled; several can be compared."""
    [heat], k = DEFAULTS["temperature"].default_factory(), DEFAULTS["samples"].default
    assert 1.2 <= heat <= 1.3 and 10 <= k <= 100


def test_fig_7_what_the_best_can_gain() -> None:
    """The largest of N grows with N, the median does not; what lies between is the potential gain."""
    x = np.random.default_rng(0).normal(size=(500, 100))
    largest, median = best_of.expected_max(x).mean(0), best_of.expected_median(x).mean(0)
    assert largest.shape == median.shape == (100,)
    assert (np.diff(largest) > 0).all() and np.abs(median).max() < 0.1
    assert largest[0] == pytest.approx(median[0]) and largest[-1] - median[-1] > 2


def test_3_2_3_which_rounds_are_chosen_from() -> None:
    """Up to RLHF-V3 the samples of the preceding model alone, after it the best of all prior iterations."""
    samples = [{"round": r} for r in (1, 2, 3, 4)]
    last, every = ([s["round"] for s in samples if best_of.competes(s, mode, 4)] for mode in ("last", "all"))
    assert last == [4] and every == [1, 2, 3, 4]


# --- PPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "safe", "expected"),
    [(True, 0.9, "safe"), (True, 0.1, "safe"), (False, 0.149, "safe"), (False, 0.15, "help"), (False, 0.151, "help")],
)
def test_3_2_3_combined_reward(tag: bool, safe: float, expected: str) -> None:
    """Rs if the prompt is tagged or Rs < 0.15 (strictly, on the scale of the sigmoid), else Rh."""
    assert THRESHOLD == 0.15
    scores = {"help": torch.tensor([logit(0.6)]).double(), "safe": torch.tensor([logit(safe)]).double()}
    if safe == 0.15:
        scores["safe"] = torch.tensor([math.log(3 / 17)]).double()
    got = piecewise(scores["help"], scores["safe"], torch.tensor([tag]))
    assert got.item() == scores[expected].item()


def test_3_2_3_whitened_logit_of_the_combined_reward() -> None:
    """R~c = whiten(logit(Rc)): of scores that are logits already, mean 0 and variance 1, the order kept."""
    help, safe = torch.randn(512), torch.randn(512)
    combined = piecewise(help, safe, torch.rand(512) < 0.3)
    white = ppo.whiten(combined)
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.var(correction=0).item() == pytest.approx(1)
    assert torch.equal(white.argsort(), combined.argsort())


def test_3_2_3_final_reward_pays_for_the_distance_from_the_original_policy() -> None:
    """R = R~c - beta KL(pi || pi_0): over an answer, its whitened reward less beta times its divergence."""
    kl, mask = torch.rand(4, 6), torch.ones(4, 6, dtype=torch.bool)
    rewards = torch.randn(4)
    torch.testing.assert_close(ppo.penalized(rewards, kl, mask, 0.01).sum(1), rewards - 0.01 * kl.sum(1))
    logits = torch.randn(3, 9)
    assert ppo.kl_exact(logits, logits).abs().max() < 1e-6  # nothing to pay at the start


def test_3_2_3_beta_by_size() -> None:
    """0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    betas = {name: ppo.beta(n_params(PRESETS[name])) for name in ("7b", "13b", "34b", "70b")}
    assert betas == {"7b": 0.01, "13b": 0.01, "34b": 0.005, "70b": 0.005}


def test_3_2_3_batch_and_steps() -> None:
    """Batch 512, mini-batch 64, one step for each: 8 steps an iteration; the rate is 1e-6, the clip 0.2."""
    assert (ppo.BATCH, ppo.MINI_BATCH, ppo.LR, ppo.CLIP) == (512, 64, 1e-6, 0.2)
    assert ppo.BATCH // ppo.MINI_BATCH == 8 and ppo.BATCH % ppo.MINI_BATCH == 0


def test_3_2_3_ppo_asks_for_these_numbers() -> None:
    """Batch 512, mini-batch 64, one step for each of them, clip 0.2, weight decay 0.1, gradients clipped to 1."""
    assert (PPO["batch_size"], PPO["mini_batch"], PPO["ppo_epochs"]) == (512, 64, 1)
    assert (PPO["clip_ratio"], PPO["weight_decay"], PPO["clip"], PPO["beta"]) == (0.2, 0.1, 1.0, None)


def test_3_2_3_ppo_rate_is_constant() -> None:
    """1e-6 in the first iteration and in the last."""
    schedule = Schedule(PPO["lr"], PPO["warmup"], job.STEPS, PPO["final_lr"])
    assert {schedule.lr(step) for step in range(1, job.STEPS + 1)} == {1e-6}


def test_3_2_3_between_200_and_400_iterations_with_early_stopping() -> None:
    """400 at most; what held-out prompts say ends a run before."""
    assert 200 <= job.STEPS <= 400 and PPO["steps"] is None and PPO["patience"] > 0


def test_3_2_3_ppo_draws_from_the_policy_whose_probabilities_it_takes() -> None:
    """The policy is optimised under its own distribution: nothing is cut off it (there is no --top-p, no greedy)."""
    assert PPO["temperature"] == 1.0 and not {"top_p", "top_k"} & PPO.keys()


@pytest.mark.parametrize(("ratio", "counted"), [(0.7, 0.8), (0.9, 0.9), (1.1, 1.1), (1.5, 1.2)])
def test_3_2_3_clip_threshold(ratio: float, counted: float) -> None:
    """A ratio beyond 1 +- 0.2 counts no further, on the side to which the advantage pushes it."""
    advantage = 1.0 if ratio > 1 else -1.0
    one = torch.ones(1, 1)
    loss = ppo.policy_loss(one * math.log(ratio), one * 0, one * advantage, one.bool())
    assert loss.item() == pytest.approx(-counted * advantage)
