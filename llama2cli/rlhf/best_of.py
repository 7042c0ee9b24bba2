"""The best of K answers (Llama 2, section 3.2.3, "Rejection Sampling"): what more samples are worth, and which rounds'
answers are chosen from.

Fig. 7 shows the largest and the median reward of N samples for N = 1..100. Drawing N out of K samples anew for each N
would be noise; the mean over all ways to draw them is known exactly. Of the sorted rewards x_1 <= ... <= x_K, x_i is
the j-th smallest of N in C(i-1, j-1) C(K-i, N-j) of the C(K, N) ways.

Letters: K samples of a prompt, N of them; "..." prompts, or nothing.

What the paper leaves open:
1. The median of an even number is the mean of the two in the middle.
2. Intervals are over prompts, which are drawn independently: the mean and 1.96 standard errors on either side.
3. Of answers with the same reward the first is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

POOL_MODES = ("last", "all")
Z = 1.959964  # of the normal distribution, for 95%
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


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and squared deviations of each number of a row, over rows that came in batches (Chan et al. 1979)."""

    n: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def with_rows(self, rows: np.ndarray) -> Spread:
        """Of the rows [m, F] too."""
        m = len(rows)
        if not m:
            return self
        n, mean = self.n + m, rows.mean(0)
        gap = mean - self.mean
        squares = self.squares + np.square(rows - mean).sum(0) + gap * gap * self.n * m / n
        return Spread(n, self.mean + gap * m / n, squares)

    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(low, high) of each mean, 95%; None of fewer than two rows, which have no spread."""
        if self.n < 2:
            return None
        half = Z * np.sqrt(np.asarray(self.squares) / (self.n - 1) / self.n)
        return self.mean - half, self.mean + half

    def state(self) -> list[Any]:
        """As JSON holds it, every digit kept."""
        return [self.n, np.asarray(self.mean).tolist(), np.asarray(self.squares).tolist()]

    @classmethod
    def of_state(cls, state: Sequence[Any]) -> Spread:
        """From what `state` gave."""
        return cls(state[0], np.asarray(state[1]), np.asarray(state[2]))


CURVES = ("max", "median", "gain")  # by N, and then the mean, which does not depend on it


def curves(rewards: np.ndarray) -> np.ndarray:
    """[..., K] -> [..., 3 K + 1]: the largest, the median, and the largest less the median of N = 1..K; the mean.

    The third is what fine-tuning on the best answer can gain (Fig. 7).
    """
    rewards = np.asarray(rewards, np.float64)
    largest, median = expected_max(rewards), expected_median(rewards)
    return np.concatenate([largest, median, largest - median, rewards.mean(-1, keepdims=True)], -1)


# --- from which rounds --------------------------------------------------------------------------------------------


def pool(samples: Iterable[Record], mode: str, last: int) -> list[Record]:
    """The Samples that are chosen from, in their order; last: the newest round.

        last   those of the newest round alone, as up to RLHF-V3, which forgot what earlier rounds had learned
        all    those of every round, as after V3

    A Sample without `round` is of no known round. Raises ValueError for another mode.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"expected one of {', '.join(POOL_MODES)}, got {mode}")
    return [sample for sample in samples if mode == "all" or sample.get("round") == last]


def best(rewards: Sequence[float], truncated: Sequence[bool] | None = None) -> int | None:
    """The index of the largest reward, the first of several; None of none. Truncated answers are not chosen."""
    chosen, most = None, -math.inf
    for i, reward in enumerate(rewards):
        if reward > most and not (truncated is not None and truncated[i]):
            chosen, most = i, reward
    return chosen
