"""The output head and what is made of its logits, in chunks of tokens: those of a long batch are never held at once.

`linear_cross_entropy`, a sum, computes its gradient together with the loss, while the logits of a chunk are at hand:
one pass, nothing recomputed. What each token of `token_logprobs` is worth is known only in the backward pass:
probabilities are kept for it as far as KEEP_LOGITS goes, and computed again beyond.
Products run in the precision of autocast (or of `hidden`); the softmax, the results and the sum over chunks of the
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
SOFTMAX_LOGITS = 1 << 21  # logits of which a second form is held: in fp32 where the product is in bf16, for the entropy
KEEP_LOGITS = 1 << 26  # probabilities kept for a backward pass: 256 MB in fp32
LEAST = -1e4  # below the largest logit: of no probability, but a product with it is not nan as that with -inf
HEAD_ROWS = 4096  # rows of the head whose gradient is added at a time


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale_N: Tensor | None) -> Tensor:
    """What `linear_cross_entropy` computes, by torch's own operators on all logits at once."""
    logprobs = reference_tokens(hidden_ND, weight_VD, targets_N)[0]
    return -(logprobs if scale_N is None else logprobs * scale_N).sum()


def reference_tokens(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """What `token_logprobs_and_entropy` computes, by torch's own operators on all logits at once."""
    logits = F.linear(hidden_ND, weight_VD)
    logits = logits.to(_sum_dtype(logits.dtype))
    entropy = torch.special.entr(logits.detach().softmax(1)).sum(1)
    logprobs = -F.cross_entropy(logits, targets_N, reduction="none", ignore_index=IGNORE)
    return logprobs, entropy.masked_fill(targets_N == IGNORE, 0)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of scale * -log softmax(hidden weight^T)[target], a scalar; targets of -100 are left out.

    Differentiable once by hidden, weight and scale; the memory of the gradients is given to the first backward pass, a
    second one through the same loss raises RuntimeError.
    """
    dtype = _product_dtype(hidden_ND)
    hidden_ND, targets_N, scale_N = with_targets(hidden_ND, targets_N, scale_N)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, scale_N, dtype, torch.is_grad_enabled())


def with_targets(hidden_ND: Tensor, targets_N: Tensor, scale_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens that have a target: the others shall cost nothing."""
    valid = targets_N != IGNORE
    if valid.all():
        return hidden_ND, targets_N, scale_N
    rows = valid.nonzero().squeeze(1)
    scale_N = None if scale_N is None else scale_N.index_select(0, rows)
    return hidden_ND.index_select(0, rows), targets_N.index_select(0, rows), scale_N


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target] of each token, fp32 [N]; 0, without a gradient, where the target is -100.

    Differentiable once by hidden and weight, whatever the gradient of each token. The memory kept for that is given to
    the first backward pass; a second one through the same graph computes all again.
    """
    return _by_token(hidden_ND, weight_VD, targets_N, False)[0]


def token_logprobs_and_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each softmax in nats, fp32 [N], 0 where the target is -100.

    The entropy is to be looked at: no gradient passes through it.
    """
    return _by_token(hidden_ND, weight_VD, targets_N, True)


@torch.no_grad()
def token_kl(hidden_ND: Tensor, weight_VD: Tensor, other_hidden_NE: Tensor, other_weight_VE: Tensor) -> Tensor:
    """KL(p || q) in nats of p = softmax(hidden weight^T) from the other model's q, exact over all of V: fp32 [N].

    The models may differ in width and dtype. Not differentiable; 0 where the logits are equal, bit for bit.
    """
    dtypes = _product_dtype(hidden_ND), _product_dtype(other_hidden_NE)
    weights = weight_VD.to(dtypes[0]), other_weight_VE.to(dtypes[1])
    total = _sum_dtype(torch.promote_types(*dtypes))
    out_N = torch.empty(len(hidden_ND), dtype=total, device=hidden_ND.device)
    step = max(1, SOFTMAX_LOGITS // len(weight_VD))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for part in _chunks(len(out_N), weight_VD):
            p_CV, q_CV = (
                torch.mm(hidden[part].to(weight.dtype), weight.t())
                for hidden, weight in zip((hidden_ND, other_hidden_NE), weights)
            )
            for p, q, out in zip(p_CV.split(step), q_CV.split(step), out_N[part].split(step)):
                out.copy_(_kl(p.to(total).log_softmax(1), q.to(total).log_softmax(1)))
    return out_N


def _by_token(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    dtype, n = _product_dtype(hidden_ND), len(targets_N)
    valid = targets_N != IGNORE
    rows = None if valid.all() else valid.nonzero().squeeze(1)
    if rows is not None:  # tokens without a target cost nothing
        hidden_ND, targets_N = hidden_ND.index_select(0, rows), targets_N.index_select(0, rows)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(
            hidden_ND, weight_VD, targets_N, with_entropy, dtype, torch.is_grad_enabled()
        )
    if rows is not None:
        logprobs = logprobs.new_zeros(n).index_copy(0, rows, logprobs)
        entropy = entropy.new_zeros(n).index_copy(0, rows, entropy) if with_entropy else entropy
    return logprobs, entropy


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
        d_weight = _sum_of_chunks(weight, total, len(targets)) if by_weight else None
        logits = _logits(min(_chunk(weight), len(targets)), w_VD)
        for part in _chunks(len(targets), weight):
            h_CD, targets_C = hidden[part].to(dtype), targets[part]
            logits_CV = torch.matmul(h_CD, w_VD.t(), out=logits[: len(h_CD)])
            nll_N[part] = _softmax_(logits_CV, targets_C, total)
            scale_C = None if scale is None else scale[part]
            _gradient_(logits_CV, targets_C, h_CD, w_VD, scale_C, d_hidden, d_weight, part.start)
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


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        with_entropy: bool,
        dtype: torch.dtype,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        total, n = _sum_dtype(dtype), len(targets)
        w_VD = weight.to(dtype)
        logprobs_N = torch.empty(n, dtype=total, device=hidden.device)
        entropy_N = torch.empty(n if with_entropy else 0, dtype=total, device=hidden.device)
        kept_KV = _logits(_kept(n, weight) if training and any(ctx.needs_input_grad) else 0, w_VD)
        spare_CV = _logits(min(_chunk(weight), n - len(kept_KV)), w_VD)  # of the chunks that are not kept
        for part in _chunks(n, weight):
            p_CV = kept_KV[part] if part.start < len(kept_KV) else spare_CV[: part.stop - part.start]
            torch.matmul(hidden[part].to(dtype), w_VD.t(), out=p_CV)
            logprobs_N[part] = -_softmax_(p_CV, targets[part], total, entropy_N[part] if with_entropy else None)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.kept, ctx.dtype = kept_KV, dtype
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        total, n = _sum_dtype(ctx.dtype), len(targets)
        w_VD = weight.to(ctx.dtype)
        kept_KV, ctx.kept = ctx.kept, _logits(0, w_VD)  # they become the gradient: a second pass has none
        spare_CV = _logits(min(_chunk(weight), n - len(kept_KV)), w_VD)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = _sum_of_chunks(weight, total, n) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(n, weight):
                h_CD, targets_C = hidden[part].to(ctx.dtype), targets[part]
                if part.start < len(kept_KV):
                    p_CV = kept_KV[part]
                else:
                    p_CV = torch.matmul(h_CD, w_VD.t(), out=spare_CV[: len(h_CD)])
                    _softmax_(p_CV, targets_C, total)
                _gradient_(p_CV, targets_C, h_CD, w_VD, -grad_N[part], d_hidden, d_weight, part.start)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _gradient_(
    p_CV: Tensor,
    targets_C: Tensor,
    h_CD: Tensor,
    w_VD: Tensor,
    scale_C: Tensor | None,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    start: int,
) -> None:
    """The gradient of scale * -log p[target] of the chunk that begins at token `start`; takes the probabilities' place.

    Sets the chunk's tokens of d_hidden [N, D], and adds to d_weight [V, D] (sets it where start is 0).
    """
    if d_hidden is None and d_weight is None:
        return
    p_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    if d_hidden is not None:
        product = torch.mm(p_CV, w_VD)
        d_hidden[start : start + len(p_CV)] = product if scale_C is None else product * scale_C[:, None]
    if d_weight is not None:
        h_CD = h_CD if scale_C is None else (h_CD * scale_C[:, None]).to(h_CD.dtype)
        for v in range(0, len(w_VD), HEAD_ROWS):
            rows = slice(v, v + HEAD_ROWS)
            if p_CV.dtype == d_weight.dtype:
                d_weight[rows].addmm_(p_CV[:, rows].t(), h_CD, beta=min(start, 1))
            elif start:
                d_weight[rows] += torch.mm(p_CV[:, rows].t(), h_CD)
            else:
                d_weight[rows] = torch.mm(p_CV[:, rows].t(), h_CD)


def _softmax_(logits_CV: Tensor, targets_C: Tensor, total: torch.dtype, entropy_C: Tensor | None = None) -> Tensor:
    """Turn logits into probabilities in place; gives -log of the targets' probabilities, [C], and fills the entropy.

    The log of the sum of exponentials is the largest logit less the log of its probability, which is never small.
    """
    nll = []
    whole = logits_CV.dtype == total and entropy_C is None
    step = len(logits_CV) if whole else max(1, SOFTMAX_LOGITS // logits_CV.shape[1])
    for start in range(0, len(logits_CV), step):
        part, targets = logits_CV[start : start + step], targets_C[start : start + step]
        x = part.to(total)
        largest, chosen = x.amax(1), x.gather(1, targets[:, None])[:, 0]
        below = None if entropy_C is None else (x - largest[:, None]).clamp_(min=LEAST)
        torch.softmax(x, 1, out=x)
        log_sum = -x.amax(1).log()  # of the exponentials of logits less the largest
        nll.append(largest - chosen + log_sum)
        if entropy_C is not None and below is not None:
            entropy_C[start : start + step] = log_sum - below.mul_(x).sum(1)
        if x is not part:
            part.copy_(x)
    return torch.cat(nll)


def _kl(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """Sum of p (log p - log q) - p + q, [C]: no term is negative, so that rounding does not drown a small sum."""
    p_CV = log_p_CV.exp()
    apart = torch.where(p_CV == 0, 0, log_p_CV - log_q_CV)
    return (p_CV * apart - p_CV + log_q_CV.exp()).sum(1)


def _kept(n: int, weight_VD: Tensor) -> int:
    """How many of n tokens keep their probabilities: all, or whole chunks."""
    room, size = KEEP_LOGITS // len(weight_VD), _chunk(weight_VD)
    return n if n <= room else room // size * size


def _logits(n: int, weight_VD: Tensor) -> Tensor:
    """Memory for logits of n tokens. Given back and asked for anew at each chunk, it might lie elsewhere each time."""
    return torch.empty(n, len(weight_VD), dtype=weight_VD.dtype, device=weight_VD.device)


def _sum_of_chunks(weight_VD: Tensor, total: torch.dtype, n: int) -> Tensor:
    """Memory for the gradient of the head, which the first of the chunks of n tokens sets."""
    return (torch.empty_like if n else torch.zeros_like)(weight_VD, dtype=total)


def _chunks(n: int, weight_VD: Tensor) -> list[slice]:
    size = _chunk(weight_VD)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk(weight_VD: Tensor) -> int:
    """Tokens of a chunk, a multiple of 64."""
    return max(MIN_CHUNK, CHUNK_LOGITS // len(weight_VD) // 64 * 64)
