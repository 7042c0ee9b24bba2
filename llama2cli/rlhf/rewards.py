"""One reward out of two reward models (Llama 2, section 3.2.3): safety where it is in doubt, helpfulness elsewhere.

    Rc(g | p) = Rs(g | p)   if is_safety(p) or Rs(g | p) < 0.15
                Rh(g | p)   otherwise

Rs and Rh are sigmoids there, and what is trained on is logit(Rc). A score is that logit already, so the threshold is
applied to it: logit(sigmoid(x)) would lose the digits of every sure answer, and be infinite from about 17 on in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THRESHOLD = 0.15  # section 3.2.3: precision 0.89 and recall 0.55 on the paper's safety test set
LOGIT_THRESHOLD = math.log(THRESHOLD / (1 - THRESHOLD))  # -1.7346


def piecewise(help_logit_N: Tensor, safe_logit_N: Tensor, unsafe_N: Tensor) -> Tensor:
    """[N] the safety logit where the prompt is tagged unsafe or that logit is below logit(0.15), else the other one.

    unsafe_N: bool, the paper's is_safety(p). A safety logit that equals the threshold, rounded to its own type, is not
    below it. A safety logit that is NaN is not below either: scores are seen to be finite where they are made.
    """
    below_N = safe_logit_N < torch.tensor(LOGIT_THRESHOLD, dtype=safe_logit_N.dtype, device=safe_logit_N.device)
    return torch.where(unsafe_N.bool() | below_N, safe_logit_N, help_logit_N)
