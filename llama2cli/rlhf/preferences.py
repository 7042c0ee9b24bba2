"""What a reward model learns from preferences (Llama 2, section 3.2.2 and appendix A.3): margins and losses.

N is a number of pairs, or of answers. Scores are logits; they are computed on in fp32 at least, whatever they come in.

What the paper leaves open, and is ours:
1. The auxiliary safety loss (A.3.4) has no formula in the paper: the binary cross-entropy of sigmoid(score) against
   safe. It ties the origin of the scores, which the ranking loss leaves free, to the threshold of section 3.2.3.
2. A pair without a rating has margin 0; so has one that is rated "negligibly better or unsure" under each of Table 27.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli.errors import Misuse, did_you_mean
from llama2cli.text.records import RATINGS

Margins = tuple[float, float, float, float]

MARGINS: dict[str, Margins] = {  # Table 27, in the order of RATINGS
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
}


def parse_margin(text: str) -> Margins:
    """The margins by rating, strongest first: a name of `MARGINS`, or four numbers as "1,2/3,1/3,0".

    Raises Misuse for an unknown name, another count, and what is no number or below 0.
    """
    if text in MARGINS:
        return MARGINS[text]
    expected = f"expected {', '.join(MARGINS)}, or four numbers from significantly to negligibly as 1,0.5,0.2,0"
    parts = text.split(",")
    if len(parts) == 1:
        raise Misuse(f'{expected}, got "{text}"{did_you_mean(text, MARGINS)}', "--margin")
    try:
        values = [float(Fraction(part.strip())) for part in parts]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise Misuse(f'{expected}, got "{text}"', "--margin") from None
    if len(values) != 4 or min(values) < 0:
        raise Misuse(f'{expected}, each at least 0, got "{text}"', "--margin")
    return values[0], values[1], values[2], values[3]


def margins_of(ratings: Sequence[str | None], table: Margins) -> list[float]:
    """The margin of each pair by its rating; 0 where it has none. Raises KeyError for another rating."""
    by_rating: dict[str | None, float] = {None: 0.0, **dict(zip(RATINGS, table))}
    return [by_rating[rating] for rating in ratings]


def ranking_loss(chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor | float = 0.0) -> Tensor:
    """[N] -log sigmoid(chosen - rejected - margin), in nats: section 3.2.2, equation 2. Without a margin, log 2 at 0.

    The same as softplus(margin - (chosen - rejected)).
    """
    gap_N = at_least_fp32(chosen_N) - at_least_fp32(rejected_N)
    return -F.logsigmoid(gap_N - margin_N)


def safety_loss(scores_N: Tensor, safe_N: Tensor) -> Tensor:
    """[N] the auxiliary loss, in nats: -log sigmoid(score) of a safe answer (1), -log sigmoid(-score) of an unsafe (0).

    The formula is ours: appendix A.3.4 says no more than that safe and unsafe are classified.
    """
    return binary_loss(scores_N, safe_N)


def binary_loss(scores_N: Tensor, labels_N: Tensor) -> Tensor:
    """[N] cross-entropy, in nats, of sigmoid(score) against labels of 0 or 1 (any type, or a probability)."""
    scores_N = at_least_fp32(scores_N)
    return F.binary_cross_entropy_with_logits(scores_N, labels_N.to(scores_N.dtype), reduction="none")


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 in fp32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
