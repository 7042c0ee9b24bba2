"""The optimizer of the paper: AdamW, a cosine schedule, clipping, and the one step that every training stage takes.

Choices that the paper leaves open:
1. Weight decay falls on every matrix, the embedding and the head among them, and not on the gains of the norms: a gain
   that decays fights the scale that it is there to learn. `--decay linears` spares the embedding, `all` spares nothing.
2. The cosine ends at 10% of the peak with the last step; step 1 is the first of the warm-up.
3. Where a run is shorter than 20,000 steps, the default warm-up of 2000 steps becomes a tenth of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llama2cli.errors import Failure, Misuse

BETAS = (0.9, 0.95)  # Llama 2, section 2.2, as the next four
EPS = 1e-5
WEIGHT_DECAY = 0.1
CLIP = 1.0
WARMUP = 2000
FINAL = 0.1

Decay = Literal["matrices", "linears", "all"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then a cosine down to `final` times the peak.

    peak: the highest rate. warmup, steps: in optimizer steps. constant: stay at the peak after the warm-up.
    """

    peak: float
    warmup: int
    steps: int
    final: float = FINAL
    constant: bool = False

    def lr(self, step: int) -> float:
        """The rate of a step; steps count from 1 to `steps`."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.constant:
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


def warmup_steps(steps: int, wanted: int | None, *, tuning: bool = False) -> int:
    """Steps of warm-up: what was asked for, else 2000 (Llama 2, section 2.2) or a tenth of a shorter run.

    tuning: else 3% of the steps, at least 5, as the reward models' (section 3.2.2), but no more than half of a run.
    Raises Misuse where the warm-up that was asked for would never end.
    """
    if wanted is None and tuning:
        return min(max(5, round(0.03 * steps)), steps // 2)
    if wanted is None:
        return min(WARMUP, math.ceil(steps / 10))
    if wanted >= steps:
        raise Misuse(f"{wanted} steps of warm-up in a run of {steps}: the peak would never be reached", "--warmup")
    return wanted


def decayed(name: str, param: Tensor, decay: Decay) -> bool:
    """Whether weight decay falls on a parameter."""
    return decay == "all" or (param.ndim >= 2 and not (decay == "linears" and name.split(".")[-1] == "embed"))


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = WEIGHT_DECAY,
    decay: Decay = "matrices",
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
) -> torch.optim.AdamW:
    """AdamW with the paper's numbers, fused; the parameters that train are in two groups, with and without decay."""
    trained = [(n, p) for n, p in named if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decayed(n, p, decay)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if not decayed(n, p, decay)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def step(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], *, lr: float, loss: float, clip: float = CLIP
) -> float:
    """Clip the gradients, update the weights, clear the gradients; return the norm that the gradients had.

    loss: of the batch that made the gradients, the same number on every rank. clip: largest norm over all parameters
    and ranks, 0 for none. Raises Failure, with the weights untouched, where the loss or the norm is not finite.
    """
    if not math.isfinite(loss):
        raise Failure(f"the loss is {loss}: stopped before the update; the last checkpoint is good (try a lower --lr)")
    grads = [p.grad for p in params if p.grad is not None]
    total = nn.utils.get_total_norm(grads)
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    if not math.isfinite(norm):
        raise Failure(
            f"the gradient norm is {norm}: stopped before the update; the last checkpoint is good (try a lower --lr)"
        )
    if 0 < clip < norm:
        nn.utils.clip_grads_with_norm_(params, clip, torch.as_tensor(norm, device=params[0].device))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
