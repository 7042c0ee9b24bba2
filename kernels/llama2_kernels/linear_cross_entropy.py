"""The output head with its loss: log softmax(hidden weight^T)[target] of each token, its gradients, and the entropy.

The matrix products are cuBLAS's, of blocks of the logits; what is made of the logits is Triton's. Nothing of the size
tokens x vocabulary exists at any time.

Forward: the logits of a chunk of tokens, in fp32 also where the product is of 16 bits (rounded to bf16, a logit of 20
is off by up to 0.06), and one pass over them. Each thread keeps a largest logit of its own and rescales its sum once
for the 16 logits that it reads at a time: 1.06 exponentials a logit. Kept for the backward pass are two numbers a
token, the largest logit and the log of the sum of exponentials of all less it (their sum, in fp32, would lose what
distinguishes probabilities where logits are large).

Backward, for any gradient of the tokens: the logits of a block of the vocabulary again, which become their own gradient
(in place; beside them, in the dtype of the product, where that has 16 bits), and two more products. A block's part of
the head's gradient is thus summed over all tokens before it is rounded, once; the gradient of the hidden states is
summed over blocks in fp32. There are no atomics: on one device a result is the same bits each time.

What each token counts in `linear_cross_entropy` is known at once: there the gradient is made while the logits of a
chunk are at hand, three products in all instead of four, with the head's gradient summed over chunks in fp32.

Bytes for a logit, beside the products' own: 4 read forward; 4 read and 2 written backward (4 in fp32).
Letters of shapes: N tokens, D width, V vocabulary, C tokens of a chunk, W columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama2_kernels.registry import Case, jit, launch, on, op, record, tl

IGNORE = -100
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# --- launch constants ---------------------------------------------------------------------------------------------

CHUNK_LOGITS = 1 << 25  # forward: 128 MB in fp32; 1,024 tokens at a vocabulary of 32,000
MIN_CHUNK = 256  # tokens: products of fewer spend their time on reading the head
BLOCK_LOGITS = 20 << 20  # backward: 80 MB in fp32 and 40 in bf16
BLOCK_TOKENS = 8192  # of a block; its width is what the logits leave, and each block rereads the other gradient's sum
LOSS_TOKENS = (
    1536  # of a chunk where the gradient comes with the loss; each chunk rereads the sum of the head's gradient
)
PAD = 16  # columns that rows of logits begin at multiples of: 16-byte accesses whatever the vocabulary
TILE, TILE_WARPS = 2048, 8  # of the gradient: 8 logits a thread


@dataclass(frozen=True)
class Settings:
    """The step of a program over its row: `loads` of `vector` logits for each of 32 * warps threads."""

    vector: int
    loads: int
    warps: int

    @property
    def columns(self) -> int:
        return self.vector * self.loads * 32 * self.warps


def settings_for(width: int, itemsize: int = 4) -> Settings:
    """The launch constants of a vocabulary: what production and the static test compile."""
    vector = 16 // itemsize
    return Settings(vector, 4, 8) if width >= 1024 * vector else Settings(vector, 1, 4)


# --- kernels ------------------------------------------------------------------------------------------------------

LOG2E = 1.4426950408889634
LOWEST = -3.0e38  # where a largest logit begins: finite, for -inf less -inf is no number
FAR = -1.0e4  # below the largest: of no probability, but 0 times it is 0


@jit
def _update(x, top, total, below, ENTROPY: tl.constexpr):
    """Take logits x [loads, threads, vector] into what each thread holds: the largest, sum e^(x - largest), and the sum
    of these terms times (x - largest). The axes that are summed belong to one thread: nothing is exchanged.
    """
    new = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    away = top - new
    scale = tl.exp2(away * 1.4426950408889634)
    d = x - new[None, :, None]
    e = tl.exp2(d * 1.4426950408889634)
    if ENTROPY:
        moved = scale * (below + total * tl.maximum(away, -1.0e4))
        below = moved + tl.sum(tl.sum(e * tl.maximum(d, -1.0e4), 2), 0)
    total = total * scale + tl.sum(tl.sum(e, 2), 0)
    return new, total, below


@jit
def _log_sum_exp(
    L, T, LOGPROB, TOP, LOG, ENTROPY, stride,
    V: tl.constexpr, LOADS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program a row of logits. Rows without a target are not read, and are 0 in all; a target that is none gives NaN.

    The columns from V to the next multiple of 16 are read and not used: they are memory of the row.
    """
    STEP: tl.constexpr = LOADS * THREADS * VECTOR
    PADDED: tl.constexpr = (V + 15) // 16 * 16
    row = tl.program_id(0)
    target = tl.load(T + row)
    KIND: tl.constexpr = LOGPROB.dtype.element_ty
    logprob = tl.cast(0.0, KIND)
    top = tl.cast(0.0, KIND)
    log = tl.cast(0.0, KIND)
    entropy = tl.cast(0.0, KIND)
    if target != -100:
        first = L + tl.cast(row, tl.int64) * stride
        load = tl.arange(0, LOADS)[:, None, None]
        thread = tl.arange(0, THREADS)[None, :, None]
        at = (load * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
        tops = tl.full([THREADS], -3.0e38, KIND)
        totals = tl.zeros([THREADS], KIND)
        belows = tl.zeros([THREADS], KIND)
        for start in range(0, V - V % STEP, STEP):
            x = tl.load(first + start + at, eviction_policy="evict_first")
            tops, totals, belows = _update(x, tops, totals, belows, ENTROPY is not None)
        if V % STEP != 0:
            last = V - V % STEP + at
            x = tl.load(first + last, mask=last < PADDED, other=float("-inf"), eviction_policy="evict_first")
            if V != PADDED:
                x = tl.where(last < V, x, float("-inf"))
            tops, totals, belows = _update(x, tops, totals, belows, ENTROPY is not None)
        top = tl.max(tops, 0)
        away = tops - top
        scale = tl.exp2(away * 1.4426950408889634)
        total = tl.sum(totals * scale, 0)
        log = tl.log(total)
        if ENTROPY is not None:
            below = tl.sum(scale * (belows + totals * tl.maximum(away, -1.0e4)), 0)
            entropy = log - below / total
        there = (target >= 0) & (target < V)
        chosen = tl.load(first + target, mask=there, other=float("nan"))
        logprob = chosen - top - log
    tl.store(LOGPROB + row, logprob)
    tl.store(TOP + row, top)
    tl.store(LOG + row, log)
    if ENTROPY is not None:
        tl.store(ENTROPY + row, entropy)


@jit
def _gradient(L, G, T, TOP, LOG, GRAD, l_stride, g_stride, width, start, COLS: tl.constexpr):
    """G = GRAD times the gradient of log p[target] by the logits L of columns start to start + width; G may be L.

    width is rounded up to a multiple of 16: what then is read, and written, beyond the last column is not used.
    """
    tiles = (width + COLS - 1) // COLS
    pid = tl.program_id(0)
    row = pid // tiles
    at = pid % tiles * COLS + tl.arange(0, COLS)
    target = tl.load(T + row)
    there = target != -100
    top = tl.load(TOP + row)
    log = tl.load(LOG + row)
    grad = tl.where(there, tl.load(GRAD + row), 0.0)
    far = tl.cast(row, tl.int64)
    x = tl.load(L + far * l_stride + at, mask=at < tl.where(there, width, 0), other=0.0, eviction_policy="evict_first")
    p = tl.exp2((x - top) * 1.4426950408889634 - log * 1.4426950408889634)
    d = grad * (tl.where(at + start == target, 1.0, 0.0) - p)
    tl.store(G + far * g_stride + at, d.to(G.dtype.element_ty), mask=at < width)


def _reduce(logits: Tensor, targets: Tensor, logprob: Tensor, top: Tensor, log: Tensor, entropy: Tensor | None) -> None:
    """Launch the forward kernel on logits [C, V], rows of a buffer whose stride is a multiple of PAD."""
    s = settings_for(logits.shape[1], logits.element_size())
    assert logits.stride(0) >= _padded(logits.shape[1])
    with on(logits):
        launch(_log_sum_exp)[(logits.shape[0],)](
            logits, targets, logprob, top, log, entropy, logits.stride(0),
            V=logits.shape[1], LOADS=s.loads, THREADS=32 * s.warps, VECTOR=s.vector, num_warps=s.warps,
        )  # fmt: skip


def _differentiate(
    logits: Tensor, out: Tensor, targets: Tensor, top: Tensor, log: Tensor, grad: Tensor, start: int
) -> None:
    """Launch the backward kernel on logits [C, W] into out [C, W], both with strides of a multiple of PAD."""
    width = _padded(logits.shape[1])
    assert min(logits.stride(0), out.stride(0)) >= width
    with on(logits):
        launch(_gradient)[(logits.shape[0] * ((width + TILE - 1) // TILE),)](
            logits, out, targets, top, log, grad, logits.stride(0), out.stride(0), width, start,
            COLS=TILE, num_warps=TILE_WARPS,
        )  # fmt: skip


# --- operators ----------------------------------------------------------------------------------------------------


def _padded(width: int) -> int:
    return (width + PAD - 1) // PAD * PAD


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out += a b; a and b have one dtype, out it or fp32."""
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)  # on a CPU, where torch has no product with a wider result
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of which the forward pass holds the logits."""
    return max(MIN_CHUNK, CHUNK_LOGITS // vocabulary // 128 * 128)


def block_shape(tokens: int, vocabulary: int) -> tuple[int, int]:
    """Tokens x columns of which the backward pass holds the logits."""
    rows = max(1, tokens)
    if rows > BLOCK_TOKENS:  # evenly
        pieces = -(-rows // BLOCK_TOKENS)
        rows = min(BLOCK_TOKENS, -(-rows // pieces // 128) * 128)
    return rows, min(vocabulary, max(PAD, BLOCK_LOGITS // rows // 128 * 128))


def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, kind = hidden.shape[0], _sum_dtype(dtype)
    each = [hidden.new_empty((n,), dtype=kind) for _ in range(3)]
    return each[0], hidden.new_empty((n if with_entropy else 0,), dtype=kind), each[1], each[2]


@op("token_logprobs", _forward_fake, whole=True)
def head_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (none unless asked for), largest logits and logs of sums: [N] each."""
    out = _forward_fake(hidden, weight, targets, dtype, with_entropy)
    n, v = hidden.shape[0], weight.shape[0]
    size = chunk_tokens(v)
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(dtype)
        buffer = torch.empty((min(size, n), _padded(v)), dtype=_sum_dtype(dtype), device=hidden.device)
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            logits = _product(hidden[part].to(dtype), w.t(), buffer[: part.stop - start, :v])
            logprob, entropy, top, log = (x[part] for x in out)
            _reduce(logits, targets[part], logprob, top, log, entropy if with_entropy else None)
    return out


def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, top: Tensor, log: Tensor,
    dtype: torch.dtype, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


@op("token_logprobs_backward", _backward_fake, whole=True)
def head_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, top: Tensor, log: Tensor,
    dtype: torch.dtype, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden and weight, in their dtypes; an empty tensor for one that is not needed."""
    d_hidden, d_weight = _backward_fake(grad, hidden, weight, targets, top, log, dtype, need_hidden, need_weight)
    n, v, total, device = hidden.shape[0], weight.shape[0], _sum_dtype(dtype), hidden.device
    if n == 0:
        return d_hidden, d_weight.zero_()
    rows, columns = block_shape(n, v)
    sum_hidden = d_hidden
    if need_hidden and d_hidden.dtype != total:
        sum_hidden = torch.empty(hidden.shape, dtype=total, device=device)
    with torch.autocast(device.type, enabled=False):
        w_VD, h_ND, grad = weight.to(dtype), hidden.to(dtype), grad.contiguous()
        logits = torch.empty((rows, _padded(columns)), dtype=total, device=device)
        slopes = logits if dtype == total else torch.empty_like(logits, dtype=dtype)
        for first in range(0, v, columns):
            block = slice(first, min(first + columns, v))
            width = block.stop - first
            sum_weight = d_weight[block] if need_weight else d_weight
            if need_weight and d_weight.dtype != total:
                sum_weight = torch.empty(sum_weight.shape, dtype=total, device=device)
            for start in range(0, n, rows):
                part = slice(start, min(start + rows, n))
                h, x, g = h_ND[part], *(b[: part.stop - start, :width] for b in (logits, slopes))
                _product(h, w_VD[block].t(), x)
                _differentiate(x, g, targets[part], top[part], log[part], grad[part], first)
                if need_hidden:
                    _product(g, w_VD[block], sum_hidden[part], add=first > 0)
                if need_weight:
                    _product(g.t(), h, sum_weight, add=start > 0)
            if need_weight and d_weight.dtype != total:
                d_weight[block] = sum_weight
    if sum_hidden is not d_hidden:
        d_hidden.copy_(sum_hidden)
    return d_hidden, d_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.dtype, _ = inputs
    _, entropy, top, log = output
    ctx.mark_non_differentiable(entropy, top, log)
    ctx.save_for_backward(hidden, weight, targets, top, log)


def _by_inputs(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    found = head_backward(grad, *ctx.saved_tensors, ctx.dtype, *needed)
    return *(d if need else None for d, need in zip(found, needed)), None, None, None


head_forward.register_autograd(_by_inputs, setup_context=_keep)


def _loss_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None,
    dtype: torch.dtype, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind = _sum_dtype(dtype)
    d_hidden, d_weight = _backward_fake(
        hidden, hidden, weight, targets, hidden, hidden, dtype, need_hidden, need_weight
    )
    return hidden.new_empty((), dtype=kind), hidden.new_empty(hidden.shape[:1], dtype=kind), d_hidden, d_weight


@op("linear_cross_entropy", _loss_fake, whole=True)
def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None,
    dtype: torch.dtype, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the log-probabilities [N], and the loss's gradients by hidden and weight (empty where not needed)."""
    loss, logprobs, d_hidden, d_weight = _loss_fake(hidden, weight, targets, scale, dtype, need_hidden, need_weight)
    n, v, total, device = hidden.shape[0], weight.shape[0], _sum_dtype(dtype), hidden.device
    if n == 0:
        return loss.zero_(), logprobs, d_hidden, d_weight.zero_()
    size = min(LOSS_TOKENS, n)
    top, log = torch.empty((2, n), dtype=total, device=device)
    grad = torch.full((n,), -1.0, dtype=total, device=device) if scale is None else -scale.to(total).contiguous()
    sum_weight = d_weight
    if need_weight and d_weight.dtype != total:
        sum_weight = torch.empty(weight.shape, dtype=total, device=device)
    with torch.autocast(device.type, enabled=False):
        w = weight.to(dtype)
        logits = torch.empty((size, _padded(v)), dtype=total, device=device)
        slopes = logits if dtype == total else torch.empty_like(logits, dtype=dtype)
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            h, x, g = hidden[part].to(dtype), *(b[: part.stop - start, :v] for b in (logits, slopes))
            _product(h, w.t(), x)
            _reduce(x, targets[part], logprobs[part], top[part], log[part], None)
            _differentiate(x, g, targets[part], top[part], log[part], grad[part], 0)
            if need_hidden and d_hidden.dtype in (dtype, total):
                _product(g, w, d_hidden[part])
            elif need_hidden:
                d_hidden[part] = torch.mm(g, w)
            if need_weight:
                _product(g.t(), h, sum_weight, add=start > 0)
    if sum_weight is not d_weight:
        d_weight.copy_(sum_weight)
    torch.sum(logprobs * grad.masked_fill_(targets == IGNORE, 0), dim=0, out=loss)
    return loss, logprobs, d_hidden, d_weight


class _Loss(torch.autograd.Function):
    """`head_loss` in eager mode: its gradients are scaled where they lie, which no operator of torch may do."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, dtype: torch.dtype,
        needed: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        loss, *rest = head_loss(hidden, weight, targets, scale, dtype, *needed)
        ctx.save_for_backward(*rest)
        ctx.scale = None if scale is None else scale.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, *found = ctx.saved_tensors  # refused, by torch, when they have been changed by an earlier pass
        made = [d.mul_(grad) if need else None for d, need in zip(found, ctx.needs_input_grad)]
        d_scale = (-logprobs * grad).to(ctx.scale) if ctx.needs_input_grad[3] else None
        return *made, None, d_scale, None, None


# --- functions ----------------------------------------------------------------------------------------------------


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if x.dim() != 2:
            raise ValueError(f"{name} has {x.dim()} axes, expected 2")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets are {targets.dtype}, expected torch.int64 or torch.int32")
    if hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for {hidden.shape[0]} tokens")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}")


def _tokens(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, targets)
    logprobs, entropy, _, _ = head_forward(hidden, weight, targets.contiguous(), _product_dtype(hidden), with_entropy)
    return logprobs, entropy


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target] of hidden [N, D], weight [V, D] and targets [N]: [N] in fp32 (fp64 of fp64).

    0, without a gradient, where the target is -100; NaN where it is any other number that is no row of weight.
    Differentiable once by hidden and weight, whatever the gradient of each token. Products run in the dtype of
    autocast, or of hidden. Raises ValueError for shapes or devices, and TypeError for dtypes, that do not fit.
    """
    return _tokens(hidden, weight, targets, False)[0]


def token_logprobs_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and from the same pass the entropy of each softmax in nats, without a gradient: [N] both.

    The entropy, too, is 0 where the target is -100.
    """
    return _tokens(hidden, weight, targets, True)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sum over tokens of scale * -log softmax(hidden weight^T)[target], a scalar; targets of -100 are left out.

    scale [N], 1 where None, may have a gradient. Gradients are computed with the loss and given to the first backward
    pass: a second one through the same loss raises RuntimeError. Otherwise as `token_logprobs`, and computed by it in
    compiled regions and in fp16, whose range a gradient leaves that the upstream one has not scaled yet.
    """
    dtype, training = _product_dtype(hidden), torch.is_grad_enabled()
    needed = training and hidden.requires_grad, training and weight.requires_grad
    if any(needed) and dtype != torch.float16 and not torch.compiler.is_compiling():
        _check(hidden, weight, targets)
        if scale is not None and scale.shape != targets.shape:
            raise ValueError(f"scale {tuple(scale.shape)} for {targets.shape[0]} tokens")
        return _Loss.apply(hidden, weight, targets.contiguous(), scale, dtype, needed)
    logprobs = token_logprobs(hidden, weight, targets)
    if scale is not None:
        logprobs = logprobs * scale.masked_fill(targets == IGNORE, 0)
    return -logprobs.sum()


def reference_token_logprobs_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `token_logprobs_and_entropy` computes, in torch's own operators on all logits at once."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(_sum_dtype(logits.dtype))
    entropy = torch.special.entr(logits.detach().softmax(1)).sum(1)
    logprobs = -F.cross_entropy(logits, targets.long(), reduction="none", ignore_index=IGNORE)
    return logprobs, entropy.masked_fill(targets == IGNORE, 0)


def reference_token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `token_logprobs` computes, in torch's own operators on all logits at once."""
    return reference_token_logprobs_and_entropy(hidden, weight, targets)[0]


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None
) -> Tensor:
    """What `linear_cross_entropy` computes, in torch's own operators on all logits at once."""
    logprobs = reference_token_logprobs(hidden, weight, targets)
    return -(logprobs if scale is None else logprobs * scale.masked_fill(targets == IGNORE, 0)).sum()


# --- static report ------------------------------------------------------------------------------------------------

MODELS = {"7b": 32000, "13b": 32000, "70b": 32000, "128k": 128256}  # the last: a vocabulary as of Llama 3


def static_cases(tokens: int = 8192) -> list[Case]:
    """The kernels on the logits of as many tokens, for a product in bf16; in parts of that they are launched."""
    cases = []
    for model, width in MODELS.items():
        logits = torch.empty(tokens, _padded(width), device="meta")[:, :width]
        slopes = torch.empty_like(logits, dtype=torch.bfloat16)
        each = torch.empty(tokens, device="meta")
        targets = torch.empty(tokens, dtype=torch.int64, device="meta")
        turns = width // settings_for(width).columns
        for name, entropy in (("log-sum-exp", None), ("log-sum-exp, entropy", each)):
            made = record(_reduce, logits, targets, each, each, each, entropy)
            cases.append(Case(name, model, made, tokens, 4 * width, 4 * width, elements=width, turns=turns))
        made = record(_differentiate, logits, slopes, targets, each, each, each, 0)
        cases.append(Case("gradient of logits", model, made, tokens, 6 * width, 6 * width, elements=width))
    return cases
