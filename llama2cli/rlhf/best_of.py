"""The best of K answers (Llama 2, section 3.2.3, "Rejection Sampling"): what more samples are worth, and which rounds'
answers are chosen from.

Fig. 7 shows the largest and the median reward of N samples for N = 1..100. Drawing N out of K samples anew for each N
would be noise; the mean over all ways to draw them is known exactly. Of the sorted rewards x_1 <= ... <= x_K, x_i is
the j-th smallest of N in C(i-1, j-1) C(K-i, N-j) of the C(K, N) ways.

Letters: K samples of a prompt, N of them; "..." prompts, or nothing.

What the paper leaves open:
1. The median of an even number is the mean of the two in the middle.
2. Of answers with the same reward the first is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

POOL_MODES = ("last", "all")
Record = dict[str, Any]


# --- what more samples are worth ----------------------------------------------------------------------------------


def expected_max(rewards: np.ndarray) -> np.ndarray:
    """[..., K] -> [..., K]: the expected largest of N = 1..K of the rewards, drawn without replacement. Exact.

    The first is their mean, the last their largest.
    """
    rewards = np.asarray(rewards, np.float64)
    return np.sort(rewards, -1) @ max_weights(rewards.shape[-1]).T


def expected_median(rewards: np.ndarray) -> np.ndarray:
    """[..., K] -> [..., K]: the expected median of N = 1..K of the rewards, drawn without replacement. Exact."""
    rewards = np.asarray(rewards, np.float64)
    return np.sort(rewards, -1) @ median_weights(rewards.shape[-1]).T


@lru_cache(4)
def max_weights(K: int) -> np.ndarray:
    """[K, K]: row N - 1 holds the probability that each of the sorted rewards is the largest of N."""
    return weights(K, lambda n: n)


@lru_cache(4)
def median_weights(K: int) -> np.ndarray:
    """[K, K]: row N - 1 holds what each of the sorted rewards has of the median of N."""
    return (weights(K, lambda n: (n + 1) // 2) + weights(K, lambda n: n // 2 + 1)) / 2


def weights(K: int, rank: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[K, K]: row N - 1 holds the probability that each of K sorted rewards is the rank(N)-th smallest of N.

    By logarithms of factorials, so that no binomial overflows: right to about 1e-12 at K = 1000. Each row sums to 1.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, K + 1)))])

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        possible = (k >= 0) & (k <= n)
        n, k = (np.where(possible, x, 0) for x in (n, k))
        return np.where(possible, log_factorial[n] - log_factorial[k] - log_factorial[n - k], -np.inf)

    n, i = np.arange(1, K + 1)[:, None], np.arange(1, K + 1)[None, :]
    j = rank(n)
    made = np.exp(log_choose(i - 1, j - 1) + log_choose(K - i, n - j) - log_choose(np.full_like(n, K), n))
    return made / made.sum(1, keepdims=True)


# --- from which rounds --------------------------------------------------------------------------------------------


def competes(sample: Record, mode: str, newest: int) -> bool:
    """Whether a Sample is chosen from; newest: the round of the newest model.

        last   those of the newest round alone, as up to RLHF-V3, which forgot what earlier rounds had learned
        all    those of every round, as after V3

    A Sample without `round` is of no known round. Raises ValueError for another mode.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"expected one of {', '.join(POOL_MODES)}, got {mode}")
    return mode == "all" or sample.get("round") == newest


def best(rewards: Sequence[float], truncated: Sequence[bool] | None = None) -> int | None:
    """The index of the largest reward, the first of several; None of none. Truncated answers are not chosen."""
    chosen, most = None, -math.inf
    for i, reward in enumerate(rewards):
        if reward > most and not (truncated is not None and truncated[i]):
            chosen, most = i, reward
    return chosen
