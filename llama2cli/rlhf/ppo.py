"""PPO over the tokens of answers (Llama 2, section 3.2.3): pure functions on tensors, one for each line of the method.

    R = whiten(logit(Rc)) - beta KL(pi || pi_0)          Rc is the piecewise reward, see `rewards`
    A = GAE(R, V)                                        Schulman et al. 2016
    L = mean over tokens of -min(r A, clip(r, 1 - 0.2, 1 + 0.2) A),   r = pi / pi_old      Schulman et al. 2017

Letters: N answers, T places for their tokens, V vocabulary. mask_NT is bool, true at the tokens of an answer (EOS with
them): at least one, and one run without a hole in each row. What stands elsewhere is padding: any finite number goes
in, 0 comes out. Log-probabilities are those of the sampled ids, at least fp32 is computed in. Losses are per token and
not reduced, because a loss is a sum over the tokens of all processes and micro-batches by their global number.

What the paper leaves open, and every one of these functions has as an argument:
1. The estimator of the KL (`KL_ESTIMATORS`, or `kl_exact` from all logits), and whether it is paid per token, as in
   Ouyang et al. 2022, or per answer at its last token (`penalized`).
2. What whitening covers: give `whiten` the values of one batch, or keep `Moments` over batches and `standardize` by
   them. Mean shifted or not (`shift_mean`). The paper never defines WHITEN.
3. gamma and lambda of GAE. Ours: 1, as an answer is short, and 0.95.
4. Clipping of the value loss: none unless asked for.
5. An answer that was cut has no value after its last token, as one that ended.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from llama2cli.rlhf.preferences import at_least_fp32

KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[str, ...] = get_args(KLEstimator)
# Llama 2, section 3.2.3
BATCH, MINI_BATCH, CLIP, LR = 512, 64, 0.2, 1e-6
BETA, BETA_LARGE, LARGE = 0.01, 0.005, 20e9  # 7B and 13B; 34B and 70B; the border between them is ours
ROUNDING = 1e-6  # values whose deviation is no more than this part of 1 + |mean| are held to be equal


def beta(n_params: float) -> float:
    """The weight of the KL for a model of this size: 0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    return BETA_LARGE if n_params > LARGE else BETA


# --- whitening ----------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """How many values there were, their mean, and the sum of squared deviations from it, in float64."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation, by the count and not by one less."""
        return math.sqrt(self.squares / self.n) if self.n else 0.0


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Of all entries of x of any shape, or of those where mask is true."""
    taken = (x if mask is None else x[mask]).detach().double()
    if not taken.numel():
        return Moments()
    mean = taken.mean()
    return Moments(taken.numel(), mean.item(), (taken - mean).square().sum().item())


def merged(a: Moments, b: Moments) -> Moments:
    """Of the values of both (Chan et al. 1979): over micro-batches, processes, or the batches of a run."""
    n = a.n + b.n
    if not n:
        return Moments()
    gap = b.mean - a.mean
    return Moments(n, a.mean + gap * b.n / n, a.squares + b.squares + gap * gap * a.n * b.n / n)


def standardize(x: Tensor, over: Moments, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / deviation by given moments; without shift_mean the mean is added again. 0 where mask is false.

    Where the values over which they were taken differ by rounding alone, x becomes 0 (or the mean): nothing is known.
    """
    equal = over.deviation <= ROUNDING * (1 + abs(over.mean))
    x = at_least_fp32(x)
    whitened = torch.zeros_like(x) if equal else (x - over.mean) / over.deviation
    whitened = whitened if shift_mean else whitened + over.mean
    return whitened if mask is None else torch.where(mask, whitened, 0.0)


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """x with mean 0 and variance 1 over all its entries, or those where mask is true; 0 elsewhere.

    Without shift_mean the mean stays and the variance is 1 around it, as in OpenAI's code of 2019.
    """
    return standardize(x, moments(x, mask), mask, shift_mean=shift_mean)


# --- KL -----------------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(pi || pi_0) at sampled tokens, in nats, same shape (Schulman 2020). With d = log pi - log pi_0:

        k1   d                     right in the mean, negative at some tokens
        k2   d^2 / 2               never negative, wrong by the third order of d
        k3   exp(-d) - 1 + d       right in the mean, never negative; its variance is large where pi_0 >> pi

    Raises ValueError for another name.
    """
    d = at_least_fp32(logprobs) - at_least_fp32(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"expected one of {', '.join(KL_ESTIMATORS)}, got {estimator}")


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[..., V], [..., V] -> [...]: KL(pi || pi_0) of whole distributions, in nats. A logit may be -inf."""
    log_p, log_q = (torch.log_softmax(at_least_fp32(x), -1) for x in (logits, ref_logits))
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """[..., V] -> [...]: the entropy of the distribution that is sampled from, in nats. A logit may be -inf."""
    log_p = torch.log_softmax(at_least_fp32(logits), -1)
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


# --- rewards and advantages ---------------------------------------------------------------------------------------


def last_tokens(mask_NT: Tensor) -> Tensor:
    """[N] the place of the last token of each answer. Raises ValueError for a row without a token or with a hole."""
    starts_N = mask_NT[:, 0].long() + (mask_NT[:, 1:] & ~mask_NT[:, :-1]).sum(1)
    if bool((starts_N != 1).any()):
        row = int((starts_N != 1).nonzero()[0, 0])
        raise ValueError(f"answer {row} has {'holes' if starts_N[row] else 'no token'}")
    return mask_NT.shape[1] - 1 - mask_NT.flip(1).long().argmax(1)


def penalized(
    rewards_N: Tensor,
    kl_NT: Tensor,
    mask_NT: Tensor,
    beta: float,
    per: Literal["token", "answer"] = "token",
) -> Tensor:
    """[N, T] what each token earns: R(g | p) = R~c(g | p) - beta KL, section 3.2.3.

    rewards_N: of whole answers, whitened; earned at the last token. kl_NT: see `kl_estimate`. per: the penalty is paid
    at the token that it is of, or the sum over an answer at its last token. The sum over a row is the same.
    """
    last_N = last_tokens(mask_NT)
    kl_NT = torch.where(mask_NT, at_least_fp32(kl_NT), 0.0)
    earned_N = at_least_fp32(rewards_N).to(kl_NT.dtype)
    if per == "answer":
        earned_N, kl_NT = earned_N - beta * kl_NT.sum(1), torch.zeros_like(kl_NT)
    return (-beta * kl_NT).scatter_add(1, last_N[:, None], earned_N[:, None])


def gae(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages_NT, returns_NT) by generalized advantage estimation. No gradient goes through either.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    return_t = A_t + V_t

    values_NT: V of the state in which token t is drawn. V and A are 0 behind the last token.
    """
    mask_NT = mask_NT.bool()
    last_tokens(mask_NT)
    rewards_NT, values_NT = (torch.where(mask_NT, at_least_fp32(x.detach()), 0.0) for x in (rewards_NT, values_NT))
    advantages_NT = torch.zeros_like(values_NT)
    next_value_N = next_advantage_N = torch.zeros_like(values_NT[:, 0])
    for t in reversed(range(values_NT.shape[1])):
        delta_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        next_advantage_N = torch.where(mask_NT[:, t], delta_N + gamma * lam * next_advantage_N, 0.0)
        next_value_N = values_NT[:, t]
        advantages_NT[:, t] = next_advantage_N
    return advantages_NT, torch.where(mask_NT, advantages_NT + values_NT, 0.0)


# --- losses -------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs_NT: Tensor, old_logprobs_NT: Tensor, advantages_NT: Tensor, mask_NT: Tensor, clip: float = CLIP
) -> Tensor:
    """[N, T] -min(r A, clip(r, 1 - clip, 1 + clip) A), r the ratio of new to old probability; -A at r = 1.

    The gradient is 0 where r is beyond the clip on the side to which A pushes it.
    """
    ratio_NT = ratios(logprobs_NT, old_logprobs_NT, mask_NT)
    pushed_NT = advantages_NT * ratio_NT
    held_NT = advantages_NT * ratio_NT.clamp(1 - clip, 1 + clip)
    return torch.where(mask_NT, -torch.minimum(pushed_NT, held_NT), 0.0)


def clipped(
    logprobs_NT: Tensor, old_logprobs_NT: Tensor, advantages_NT: Tensor, mask_NT: Tensor, clip: float = CLIP
) -> Tensor:
    """[N, T] bool: the tokens whose gradient `policy_loss` cuts off. Their share is the clip fraction."""
    ratio_NT = ratios(logprobs_NT, old_logprobs_NT, mask_NT)
    up_NT = (ratio_NT > 1 + clip) & (advantages_NT > 0)
    down_NT = (ratio_NT < 1 - clip) & (advantages_NT < 0)
    return (up_NT | down_NT) & mask_NT


def ratios(logprobs_NT: Tensor, old_logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """[N, T] new over old probability of each token; 1 at padding, whatever stands there."""
    gap_NT = at_least_fp32(logprobs_NT) - at_least_fp32(old_logprobs_NT)
    return torch.where(mask_NT, gap_NT, 0.0).exp()


def value_loss(
    values_NT: Tensor, old_values_NT: Tensor, returns_NT: Tensor, mask_NT: Tensor, clip: float | None = None
) -> Tensor:
    """[N, T] (V - return)^2 / 2. clip: V counts as no farther than this from its old value, where that is worse."""
    values_NT, old_values_NT = at_least_fp32(values_NT), at_least_fp32(old_values_NT)
    error_NT = (values_NT - returns_NT).square()
    if clip is not None:
        held_NT = old_values_NT + (values_NT - old_values_NT).clamp(-clip, clip)
        error_NT = torch.maximum(error_NT, (held_NT - returns_NT).square())
    return torch.where(mask_NT, error_NT / 2, 0.0)


# --- for the log --------------------------------------------------------------------------------------------------


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over tokens: 1 is a perfect value model, 0 no better than a constant.

    0 where all returns are the same.
    """
    return explained(*spreads(values, returns, mask))


def spreads(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> tuple[Moments, Moments]:
    """The moments of the returns, and of what values leave of them: those of all processes can be merged."""
    return moments(returns, mask), moments(returns.double() - values.double(), mask)


def explained(returns: Moments, left: Moments) -> float:
    """Explained variance from `spreads`."""
    equal = returns.deviation <= ROUNDING * (1 + abs(returns.mean))
    return 0.0 if equal else 1 - left.squares / returns.squares
