"""The losses of a reward model over a micro-batch: from scores and labels to the sums that training adds up.

P is a number of pairs, N one of scores. Of pairs the scores are those of the chosen and the rejected answer in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llama2cli.rlhf.preferences import binary_loss, ranking_loss, safety_loss


def tracked(objective: str, safety_weight: float) -> tuple[str, ...]:
    """Names of the sums behind the loss."""
    return ("accuracy", "ranking_loss", "safety_loss") if objective == "ranking" and safety_weight else ("accuracy",)


def reducer(objective: str, safety_weight: float) -> Callable[..., Tensor]:
    """The function from scores [N] and the labels by name to the sums of a micro-batch: the loss, and `tracked`.

    objective: "ranking" (labels `margins` [P] and `safe` [P, 2]) or "binary" (`labels` [N]). safety_weight: of the
    safety auxiliary loss of pairs.
    """

    def of_dialogues(scores_N: Tensor, labels: Tensor) -> Tensor:
        right = (scores_N > 0) == (labels > 0.5)
        return torch.stack([binary_loss(scores_N, labels).sum(), right.sum()])

    def of_pairs(scores_N: Tensor, margins: Tensor, safe: Tensor) -> Tensor:
        scores_P2 = scores_N.view(-1, 2)
        ranking, auxiliary = (losses.sum() for losses in pair_losses(scores_P2, margins, safe))
        right = right_pairs(scores_P2).sum()
        if not safety_weight:
            return torch.stack([ranking, right])
        return torch.stack([ranking + safety_weight * auxiliary, right, ranking.detach(), auxiliary.detach()])

    return of_pairs if objective == "ranking" else of_dialogues


def pair_losses(scores_P2: Tensor, margins_P: Tensor, safe_P2: Tensor) -> tuple[Tensor, Tensor]:
    """[P] the ranking loss, and [P] the safety auxiliary loss, summed over the answers that have a label.

    scores_P2: of the chosen and the rejected answer. safe_P2: 1 safe, 0 unsafe, -1 unknown.
    """
    auxiliary_P2 = safety_loss(scores_P2, safe_P2.clamp(min=0)) * (safe_P2 >= 0)
    return ranking_loss(scores_P2[:, 0], scores_P2[:, 1], margins_P), auxiliary_P2.sum(1)


def right_pairs(scores_P2: Tensor) -> Tensor:
    """[P] 1 where the chosen answer has the higher score, a half where the two are equal."""
    gap_P = scores_P2[:, 0] - scores_P2[:, 1]
    return (gap_P > 0).float() + 0.5 * (gap_P == 0)
