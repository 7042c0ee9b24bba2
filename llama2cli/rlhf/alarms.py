"""Signs that a policy games its reward models, as sentences. Gao et al. 2022 is the study of it; thresholds are ours.

1. Answers become much longer or shorter than they were: length is what a reward model is fooled by first.
2. The policy is far from where it began: behind the bound the reward models judge what they have never seen.
3. On held-out prompts the reward rises while a judge that was not trained on likes the answers less.

And a sign that something is wrong with the run itself: the probabilities of sampling are not those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def length_drift(length: float, first: float, factor: float) -> str | None:
    """Whether the mean length of answers has left [first / factor, first * factor]; in tokens."""
    if length > factor * first or length * factor < first:
        return f"length drift: answers have {length:.0f} tokens in the mean, at the start they had {first:.0f}"
    return None


def far(kl: float, bound: float) -> str | None:
    """Whether the KL of a whole answer, in nats, is beyond its bound."""
    return (
        f"the policy is far from where it began: KL {kl:.3g} nats an answer, the bound is {bound:g}"
        if kl > bound
        else None
    )


def rounding(gap: float, bound: float) -> str | None:
    """Whether the ratio of a token's probability in training to that in sampling is farther from 1 than rounding."""
    if gap > bound:
        return f"sampling and training differ by {gap:.2g} in the probability of a token: try --old-logprobs recomputed"
    return None


def gamed(now: Mapping[str, Any], best: Mapping[str, Any]) -> str | None:
    """Whether the held-out reward is above what it was when the judge liked best, and the judge likes less.

    now, best: {"reward", "judge", "judge_error"} of a measurement; the judge's fall counts beyond two standard errors.
    """
    if now["reward"] > best["reward"] and now["judge"] < best["judge"] - 2 * now["judge_error"]:
        told = f"reward {best['reward']:.3g} -> {now['reward']:.3g}, judge {best['judge']:.3g} -> {now['judge']:.3g}"
        return f"on held-out prompts the reward rises and the judge turns away: {told}"
    return None
