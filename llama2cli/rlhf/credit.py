"""From the scores of answers to what each token is trained on: the reward of section 3.2.3, its whitening, the penalty
for leaving the initial policy, advantages, and the losses as the sums that a training loop adds up.

Letters of shapes: N answers, T places for their tokens, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama2cli.rlhf import ppo
from llama2cli.rlhf.ppo import KLEstimator, Moments

Whiten = Literal["batch", "running", "none"]


@dataclass(frozen=True)
class Terms:
    """What the paper fixes and what it leaves open, see the top of `ppo`.

    per: where the KL is paid. whiten: over the batch, all batches so far, or not. shift_mean: the mean becomes 0 too.
    reward_clip: bound of a whitened reward, 0 for none. cut_penalty: taken from the whitened reward of an answer that
    was cut. whiten_advantages: over the tokens of a batch.
    """

    beta: float
    estimator: KLEstimator | Literal["exact"] = "k1"
    per: Literal["token", "answer"] = "token"
    whiten: Whiten = "batch"
    shift_mean: bool = True
    reward_clip: float = 0.0
    cut_penalty: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = False


def whitened(logits_N: Tensor, cut_N: Tensor, terms: Terms, before: Moments) -> tuple[Tensor, Moments]:
    """[N] R~c of all answers of a batch, and the moments of all batches so far.

    logits_N: the piecewise reward's. cut_N: bool, answers that were cut. before: moments of earlier batches.
    """
    mine = ppo.moments(logits_N)
    so_far = ppo.merged(before, mine)
    if terms.whiten == "none":
        rewards_N = logits_N
    else:
        over = mine if terms.whiten == "batch" else so_far
        rewards_N = ppo.standardize(logits_N, over, shift_mean=terms.shift_mean)
    if terms.reward_clip:
        rewards_N = rewards_N.clamp(-terms.reward_clip, terms.reward_clip)
    return rewards_N - terms.cut_penalty * cut_N, so_far


def advantages(
    rewards_N: Tensor, kl_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """(advantages_NT, returns_NT) of answers with whitened rewards."""
    earned_NT = ppo.penalized(rewards_N, kl_NT, mask_NT, terms.beta, terms.per)
    return ppo.gae(earned_NT, values_NT, mask_NT, terms.gamma, terms.lam)


# --- losses as sums -----------------------------------------------------------------------------------------------

POLICY = ("clip_fraction", "entropy", "kl_old", "ratio_gap")  # tracked beside the policy's loss
VALUE = ("value_clip_fraction",)


def policy_sums(clip: float) -> Callable[..., Tensor]:
    """Logprobs [M], entropy [M], labels old_logprobs and advantages [M] -> the loss and POLICY, summed.

    kl_old: KL(pi_old || pi) as k3 estimates it from samples of pi_old. ratio_gap: |pi / pi_old - 1|, which before the
    first update is what sampling and training differ by in rounding.
    """

    def reduce(logprobs_M: Tensor, entropy_M: Tensor, *, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        mask_M = torch.ones_like(logprobs_M, dtype=torch.bool)
        loss_M = ppo.policy_loss(logprobs_M, old_logprobs, advantages, mask_M, clip)
        with torch.no_grad():
            kl_M = ppo.kl_estimate(old_logprobs, logprobs_M, "k3")
            gap_M = (ppo.ratios(logprobs_M, old_logprobs, mask_M) - 1).abs()
            clipped_M = ppo.clipped(logprobs_M, old_logprobs, advantages, mask_M, clip)
            told = [x.sum() for x in (clipped_M.float(), entropy_M, kl_M, gap_M)]
        return torch.stack([loss_M.sum(), *told])

    return reduce


def value_sums(clip: float | None) -> Callable[..., Tensor]:
    """Values [M], labels old_values and returns [M] -> the loss and VALUE, summed."""

    def reduce(values_M: Tensor, *, old_values: Tensor, returns: Tensor) -> Tensor:
        mask_M = torch.ones_like(values_M, dtype=torch.bool)
        loss_M = ppo.value_loss(values_M, old_values, returns, mask_M, clip)
        held_M = torch.zeros_like(mask_M) if clip is None else (values_M.detach() - old_values).abs() > clip
        return torch.stack([loss_M.sum(), held_M.float().sum()])

    return reduce


def joint_sums(clip: float, value_clip: float | None, value_weight: float) -> Callable[..., Tensor]:
    """Both on one trunk: the policy's loss plus `value_weight` times the value's; POLICY; the value's loss; VALUE."""
    of_policy, of_value = policy_sums(clip), value_sums(value_clip)

    def reduce(logprobs_M: Tensor, entropy_M: Tensor, values_M: Tensor, **labels: Tensor) -> Tensor:
        mine = {k: labels.pop(k) for k in ("old_values", "returns")}
        policy, value = of_policy(logprobs_M, entropy_M, **labels), of_value(values_M, **mine)
        loss = policy[:1] + value_weight * value[:1]
        return torch.cat([loss, policy[1:], policy[:1].detach(), value.detach()])

    return reduce
