"""The output head and cross-entropy in chunks of tokens, so that the logits of a long batch are never held at once.

The gradient is computed together with the loss, while the logits of a chunk are at hand: one pass, nothing recomputed.
Products run in the precision of autocast (or of `hidden`); the softmax, the loss and the sum over chunks of the
gradient of the head run in fp32 (fp64 for fp64).

Letters of shapes: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_LOGITS = 1 << 24  # logits of a chunk: 64 MB in fp32; 512 tokens at a vocabulary of 32000
MIN_CHUNK = 256  # a product with fewer tokens spends its time on rearranging the head
SOFTMAX_LOGITS = 1 << 21  # logits that are in fp32 at once where the product is in bf16
HEAD_ROWS = 4096  # rows of the head whose gradient is added at a time


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale_N: Tensor | None) -> Tensor:
    """What `linear_cross_entropy` computes, by torch's own operators on all logits at once."""
    logits = F.linear(hidden_ND, weight_VD)
    logits = logits.to(_sum_dtype(logits.dtype))
    nll = F.cross_entropy(logits, targets_N, reduction="none", ignore_index=IGNORE)
    return (nll if scale_N is None else nll * scale_N).sum()


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of scale * -log softmax(hidden weight^T)[target], a scalar; targets of -100 are left out.

    Differentiable once by hidden, weight and scale; the memory of the gradients is given to the first backward pass, a
    second one through the same loss raises RuntimeError.
    """
    dtype = _product_dtype(hidden_ND)
    valid = targets_N != IGNORE
    if not valid.all():  # tokens without a target cost nothing
        rows = valid.nonzero().squeeze(1)
        hidden_ND, targets_N = hidden_ND.index_select(0, rows), targets_N.index_select(0, rows)
        scale_N = None if scale_N is None else scale_N.index_select(0, rows)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, scale_N, dtype, torch.is_grad_enabled())


@torch.no_grad()
def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target] of each token, fp32 [N], 0 where the target is -100. Not differentiable."""
    dtype = _product_dtype(hidden_ND)
    total = _sum_dtype(dtype)
    weight = weight_VD.to(dtype)
    out = torch.zeros(len(targets_N), dtype=total, device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        rows = (targets_N != IGNORE).nonzero().squeeze(1)
        size = _chunk(weight)
        logits = torch.empty(min(size, len(rows)), len(weight), dtype=dtype, device=hidden_ND.device)
        for part in rows.split(size):
            logits_CV = torch.mm(hidden_ND[part].to(dtype), weight.t(), out=logits[: len(part)])
            out[part] = -_softmax_(logits_CV, targets_N[part], total)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        training: bool,
    ) -> Tensor:
        by_hidden, by_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        total = _sum_dtype(dtype)
        w_VD = weight.to(dtype)
        nll_N = torch.empty(len(targets), dtype=total, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if by_hidden else None
        d_weight = torch.empty_like(weight, dtype=total) if by_weight else None
        if d_weight is not None and not len(targets):
            d_weight.zero_()
        size = _chunk(weight)
        # One memory for the logits of all chunks: given back and asked for anew, it might lie elsewhere each time.
        logits = torch.empty(min(size, len(targets)), len(weight), dtype=dtype, device=hidden.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            h_CD, targets_C = hidden[part].to(dtype), targets[part]
            logits_CV = torch.matmul(h_CD, w_VD.t(), out=logits[: len(h_CD)])
            nll_N[part] = _softmax_(logits_CV, targets_C, total)
            if d_hidden is None and d_weight is None:
                continue
            logits_CV[torch.arange(len(targets_C), device=targets.device), targets_C] -= 1
            if d_hidden is not None:
                product = torch.mm(logits_CV, w_VD)
                d_hidden[part] = product if scale is None else product * scale[part, None]
            if d_weight is not None:
                h_CD = h_CD if scale is None else (h_CD * scale[part, None]).to(dtype)
                for v in range(0, len(w_VD), HEAD_ROWS):
                    rows = slice(v, v + HEAD_ROWS)
                    if dtype == total:
                        d_weight[rows].addmm_(logits_CV[:, rows].t(), h_CD, beta=min(start, 1))
                    elif start:
                        d_weight[rows] += torch.mm(logits_CV[:, rows].t(), h_CD)
                    else:
                        d_weight[rows] = torch.mm(logits_CV[:, rows].t(), h_CD)
        # Held by ctx rather than saved: the backward pass may give them away, and the head's need not be copied.
        ctx.held = [d_hidden, None if d_weight is None else d_weight.to(weight.dtype), nll_N]
        return (nll_N if scale is None else nll_N * scale).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.held is None:
            raise RuntimeError("linear_cross_entropy: a second backward pass through the same loss")
        (d_hidden, d_weight, nll_N), ctx.held = ctx.held, None
        if grad.device.type != "cpu" or grad != 1:  # on a GPU the comparison would wait for it
            for d in (d_hidden, d_weight):
                if d is not None:
                    d *= grad
        d_scale = nll_N * grad if ctx.needs_input_grad[3] else None
        return d_hidden, d_weight, None, d_scale, None, None


def _softmax_(logits_CV: Tensor, targets_C: Tensor, total: torch.dtype) -> Tensor:
    """Turn logits into probabilities in place; gives -log of the targets' probabilities, [C].

    The log of the sum of exponentials is the largest logit less the log of its probability, which is never small.
    """
    nll = []
    step = max(1, SOFTMAX_LOGITS // logits_CV.shape[1]) if logits_CV.dtype != total else len(logits_CV)
    for part, targets in zip(logits_CV.split(step), targets_C.split(step)):
        x = part.to(total)
        largest, chosen = x.amax(1), x.gather(1, targets[:, None])[:, 0]
        torch.softmax(x, 1, out=x)
        nll.append(largest - chosen - x.amax(1).log())
        if x is not part:
            part.copy_(x)
    return torch.cat(nll)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk(weight_VD: Tensor) -> int:
    """Tokens of a chunk, a multiple of 64."""
    return max(MIN_CHUNK, CHUNK_LOGITS // len(weight_VD) // 64 * 64)
