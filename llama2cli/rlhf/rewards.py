"""One reward out of two reward models (Llama 2, section 3.2.3): safety where it is in doubt, helpfulness elsewhere.

    Rc(g | p) = Rs(g | p)   if is_safety(p) or Rs(g | p) < 0.15
                Rh(g | p)   otherwise

Rs and Rh are sigmoids there, and what is trained on is logit(Rc). A score is that logit already, so the threshold is
applied to it: logit(sigmoid(x)) would lose the digits of every sure answer, and be infinite from about 17 on in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama2cli.text.records import THRESHOLD

LOGIT_THRESHOLD = math.log(THRESHOLD / (1 - THRESHOLD))  # -1.7346


def piecewise(help_logit_N: Tensor, safe_logit_N: Tensor, unsafe_N: Tensor) -> Tensor:
    """[N] the safety logit where the prompt is tagged unsafe or that logit is below logit(0.15), else the other one.

    unsafe_N: the paper's is_safety(p), bool or 0 and 1. Scores are finite: that is seen to where they are made.
    """
    return torch.where(by_safety(safe_logit_N, unsafe_N), safe_logit_N, help_logit_N)


def by_safety(safe_logit_N: Tensor, unsafe_N: Tensor) -> Tensor:
    """[N] bool: whether `piecewise` takes the safety logit. One that equals the threshold, rounded to its own type, is
    not below it."""
    below_N = safe_logit_N < torch.tensor(LOGIT_THRESHOLD, dtype=safe_logit_N.dtype, device=safe_logit_N.device)
    return unsafe_N.bool() | below_N


def combined(
    help_logits: Sequence[float], safe_logits: Sequence[float], unsafe: Sequence[bool]
) -> tuple[list[float], list[bool]]:
    """The reward of each answer by `piecewise`, in fp64, and whether it is the safety model's.

    unsafe: the tag of each one's prompt.
    """
    help_N, safe_N = (torch.tensor(x, dtype=torch.float64) for x in (help_logits, safe_logits))
    unsafe_N = torch.tensor(unsafe, dtype=torch.bool)
    return piecewise(help_N, safe_N, unsafe_N).tolist(), by_safety(safe_N, unsafe_N).tolist()
