"""Faster ways through the model on a CPU: the same numbers as `nn.ops`' plain forms, up to rounding.

Nothing here is used unless a check found it equal and faster on this machine (`compare`, called by
`ops.setup_process`). What each is worth was measured with `tests/bench/pretrain.py`; on machines where it gains nothing
the check leaves it out.

* oneDNN instead of BLAS for fp32 matrix products. The BLAS in torch (MKL) keeps to AVX2 on processors of other makers;
  oneDNN, also in torch, uses AVX-512 there. Torch asks it for fp32 products only where "bf16" precision is allowed; on
  a processor with matrix tiles (AMX) oneDNN then does round to bf16, without them it computes in fp32. `exact` tells.
* Attention by batched products over blocks of query rows, keys beyond the block left out.
* Rotary embedding and RMSNorm with a written backward pass and fewer passes over memory.
* glibc told to keep freed memory: otherwise every large tensor is returned to the kernel and faulted in again.

Letters of shapes: B rows, T positions, H query heads, G key/value heads, R = H/G, K head size, Z = B H, N tokens,
D width.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # query rows of one product are a multiple of it
BLOCKS = 8  # and an eighth of long rows: each product rearranges all keys before it
LONG = 1024  # longer rows in fp32 are left to torch's kernel, which is faster there
SAVE_BYTES = 128 << 20  # probabilities of a call are kept for the backward pass up to this size, else computed again
BLOCK_BYTES = 32 << 20  # scores held at once where they are not kept
ROW_SCORES = 1 << 20  # packed rows are taken together up to this many scores: each begins its texts elsewhere


# --- process ------------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Have glibc keep freed memory in the process (thresholds of mmap and trim); does nothing elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        if not mallopt(m_mmap_threshold, 1 << 30):
            mallopt(m_mmap_threshold, 32 << 20)  # the most that older versions take
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 << 20)


def set_onednn(on: bool) -> None:
    """Send fp32 matrix products of this process to oneDNN, or to the BLAS that torch prefers."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else "ieee"  # type: ignore[attr-defined]


@contextlib.contextmanager
def blas() -> Iterator[None]:
    """Within, fp32 products go to the BLAS that torch prefers."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def exact() -> bool:
    """Do fp32 products by oneDNN have fp32's error here? (bf16's would be a thousand times larger.) Costs 20 ms, once.

    Leaves products with BLAS.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [((320, 288), (288, 384)), ((384, 320), (320, 96)), ((2, 64, 48), (2, 48, 64)), ((17, 513), (513, 33))]
    set_onednn(True)
    try:
        for left, right in shapes:
            a, b = torch.randn(left, generator=generator), torch.randn(right, generator=generator)
            for x, y in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
                truth = x.double() @ y.double()
                if (torch.matmul(x, y).double() - truth).norm() > 2e-6 * truth.norm():
                    return False
    finally:
        set_onednn(False)
    return True


# --- checks -------------------------------------------------------------------------------------------------------


def compare(
    fast: Callable[[], list[Tensor]], plain: Callable[[], list[Tensor]], *, tolerance: float, share: float
) -> bool:
    """Is `fast` equal to `plain` (relative to the norm of each result), in less than `share` of its time?

    The two alternate, the best time of each counts, and it is time of the processor, so that other work on the machine
    does not tip the choice; near the border there are more rounds.
    """
    try:
        for got, want in zip(fast(), plain(), strict=True):
            want = want.double()
            if not (got.double() - want).norm() <= tolerance * want.norm():
                return False
    except (RuntimeError, NotImplementedError):  # an operator that this build does not have
        return False
    best = [math.inf, math.inf]
    for rounds in range(40):
        if rounds >= 5 and not 0.67 * share < best[0] / best[1] < 1.5 * share:
            break
        for i, call in enumerate((fast, plain)):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best[0] < share * best[1]


# --- normalisation and rotary embedding ---------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        r_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        r_N1 = r_N1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight, r_N1)
        return torch.mul(x_ND, r_N1).mul_(weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight, r_N1 = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        gx_ND = grad_ND * x_ND
        along_N1 = gx_ND @ weight[:, None]
        along_N1 = along_N1.mul_(r_N1).mul_(r_N1).mul_(r_N1).div_(-x_ND.shape[1])
        dx = torch.mul(grad_ND, weight).mul_(r_N1).addcmul_(x_ND, along_N1)
        return dx.view(grad.shape), (r_N1.t() @ gx_ND)[0], None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ops.rms_norm, for fp32."""
    return _RMSNorm.apply(x, weight, eps)


def _rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x turned by sign * angle, [B, T, H, K] that lies in memory as [B, H, T, K]; cos, sin [1|B, T, K/2]."""
    B, T, H, K = x_BTHK.shape
    x = x_BTHK.transpose(1, 2)
    dtype = torch.promote_types(x.dtype, cos.dtype)
    if x.dtype != dtype:  # torch is slow where the types of a product differ
        x = torch.empty(B, H, T, K, dtype=dtype).copy_(x)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty(B, H, T, K, dtype=dtype)
    a, b = x[..., : K // 2], x[..., K // 2 :]
    torch.mul(a, cos, out=out[..., : K // 2]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., K // 2 :]).addcmul_(a, sin, value=sign)
    return out.to(x_BTHK.dtype).transpose(1, 2)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin, 1), _rotate(k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, sin, -1), _rotate(dk, cos, sin, -1), None, None


def rope(
    q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor, positions_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ops.rope; the results lie in memory as attention wants them, heads before positions."""
    if positions_BT is None:
        cos, sin = cos[None, : q_BTHK.shape[1]], sin[None, : q_BTHK.shape[1]]
    else:
        cos, sin = cos[positions_BT], sin[positions_BT]
    return _Rope.apply(q_BTHK, k_BTGK, cos, sin)


# --- attention ----------------------------------------------------------------------------------------------------


def _heads_first(x_BTHK: Tensor, repeat: int = 1) -> Tensor:
    """[B, T, G, K] as contiguous [B G repeat, T, K]."""
    B, T, G, K = x_BTHK.shape
    x = x_BTHK.transpose(1, 2)
    if repeat > 1:
        x = x[:, :, None].expand(B, G, repeat, T, K)
    return x.reshape(B * G * repeat, T, K)


def _block_rows(T: int) -> int:
    """Query rows of a block."""
    return BLOCK * max(1, math.ceil(T / (BLOCKS * BLOCK)))


def _first_keys(segments_BT: Tensor) -> Tensor:
    """For each row and block of queries the first key that one of them may see, down to a multiple of 16: [B, blocks].

    Branches are left out of it: a trunk is where its segment begins.
    """
    B, T = segments_BT.shape
    ids, order = segments_BT.sort(dim=1, stable=True)
    place = torch.arange(T).expand(B, T)
    begins = torch.ones(B, T, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(begins, place, 0).cummax(1).values  # in the sorted row, where an id's run begins
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, begin))
    lows = torch.stack([block.amin(1) for block in first.split(_block_rows(T), dim=1)], dim=1)
    return lows // 16 * 16


def _probabilities(q: Tensor, k: Tensor, i: int, end: int, lo: int, part: _Part) -> Tensor:
    """Softmax of the scores of query rows i..end on keys lo..end, for a part of the rows: [Z, rows, keys].

    q is scaled. Scores are masked by adding -inf: torch adds several times faster than it fills under a mask.
    """
    q, k, segments, branches = q[part.z], k[part.z], part.segments, part.branches
    scores = torch.bmm(q[:, i:end], k[:, lo:end].mT)
    rows = end - i
    causal = torch.full((rows, rows), -math.inf, dtype=q.dtype).triu_(1)
    scores[:, :, i - lo :] += causal
    if segments is not None:
        other = segments[:, i:end, None] != segments[:, None, lo:end]
        if branches is not None:
            key = branches[:, None, lo:end]
            other |= (key != branches[:, i:end, None]) & (key != 0)
        mask = torch.zeros(other.shape, dtype=q.dtype).masked_fill_(other, -math.inf)
        scores.view(len(segments), -1, rows, end - lo).add_(mask[:, None])
    return torch.softmax(scores, -1, out=scores)


class _Attention(torch.autograd.Function):
    """q, k, v: [Z, T, K] contiguous, q scaled. segments, branches: [B, T] or None. lows: [B, blocks], if segments."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        branches: Tensor | None,
        lows: Tensor | None,
        training: bool,
    ) -> Tensor:
        Z, T, _ = q.shape
        o = torch.empty_like(q)
        training = training and any(ctx.needs_input_grad[:3])
        step = _block_rows(T)
        keep = training and Z * T * (T + step) // 2 * q.element_size() <= SAVE_BYTES
        kept: list[Tensor] = []
        for part in _parts(q, segments, branches, lows, whole=keep):
            for i, lo in zip(range(0, T, step), part.lows):
                end = min(T, i + step)
                p = _probabilities(q, k, i, end, lo, part)
                torch.bmm(p, v[part.z, lo:end], out=o[part.z, i:end])
                if keep:
                    kept.append(p)
        if training:
            ctx.save_for_backward(q, k, v, o, segments, branches, lows, *kept)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, segments, branches, lows, *kept = ctx.saved_tensors
        T = q.shape[1]
        step = _block_rows(T)
        do = do.contiguous()
        along = (do * o).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), _zeros_sum(k), _zeros_sum(v)
        probabilities = iter(kept)
        for part in _parts(q, segments, branches, lows, whole=bool(kept)):
            z = part.z
            for i, lo in zip(range(0, T, step), part.lows):
                end = min(T, i + step)
                p = next(probabilities) if kept else _probabilities(q, k, i, end, lo, part)
                _add_product(dv[z, lo:end], p.mT, do[z, i:end])
                ds = torch.bmm(do[z, i:end], v[z, lo:end].mT)
                ds.sub_(along[z, i:end]).mul_(p)
                torch.bmm(ds, k[z, lo:end], out=dq[z, i:end])
                _add_product(dk[z, lo:end], ds.mT, q[z, i:end])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Part(NamedTuple):
    """Some of the rows: their slice of Z, their segments and branches, the first key of each block."""

    z: slice
    segments: Tensor | None
    branches: Tensor | None
    lows: list[int]


def _parts(
    q: Tensor, segments: Tensor | None, branches: Tensor | None, lows: Tensor | None, *, whole: bool
) -> list[_Part]:
    """All of Z, or slices of it whose block of scores is small; with segments slices of whole rows, smaller still."""
    Z, T, _ = q.shape
    step = _block_rows(T)
    scores = min(step, T) * T  # of a block at most
    if segments is None or lows is None:
        size = Z if whole else max(1, BLOCK_BYTES // (scores * q.element_size()))
        return [_Part(slice(z, z + size), None, None, [0] * math.ceil(T / step)) for z in range(0, Z, size)]
    B, heads = len(segments), Z // len(segments)
    size = max(1, ROW_SCORES // (heads * scores))
    parts = []
    for b in range(0, B, size):
        end = min(B, b + size)
        own = None if branches is None else branches[b:end]
        parts.append(_Part(slice(b * heads, end * heads), segments[b:end], own, lows[b:end].amin(0).tolist()))
    return parts


def _zeros_sum(x: Tensor) -> Tensor:
    """Where gradients of several blocks are added up: fp32 for bf16."""
    return torch.zeros(x.shape, dtype=torch.float32 if x.dtype == torch.bfloat16 else x.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments_BT: Tensor | None, branches_BT: Tensor | None = None
) -> Tensor:
    """As ops.attention: by blocks of query rows; for short rows the probabilities are kept for the backward pass."""
    if q_BTHK.dtype == torch.float32 and q_BTHK.shape[1] > LONG and segments_BT is None:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    B, T, H, K = q_BTHK.shape
    repeat = H // k_BTGK.shape[2]
    q = _heads_first(q_BTHK * (1 / math.sqrt(K)))
    k, v = _heads_first(k_BTGK, repeat), _heads_first(v_BTGK, repeat)
    lows = None if segments_BT is None else _first_keys(segments_BT)
    with torch.autocast("cpu", enabled=False):
        o = _Attention.apply(q, k, v, segments_BT, branches_BT, lows, torch.is_grad_enabled())
    return o.view(B, H, T, K).transpose(1, 2)
