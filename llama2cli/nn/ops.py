"""The operations of the model, plain form: what every faster path must equal.

Letters of shapes: B rows, T positions, H query heads, G key/value heads, K head size, D width, V vocabulary, N tokens.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_mode: str = os.environ.get("LLAMA2_OPS", "auto")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times weight [E, D] transposed: [..., E]."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32; the result has x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2F] that holds gate, then up: [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_table(head_dim: int, theta: float, n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [n, K/2], of position * theta^(-2i/K); the arithmetic is transformers' (all in fp32)."""
    frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    angle = torch.outer(torch.arange(n).float(), frequency)
    return angle.cos(), angle.sin()


def rope(
    q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor, positions_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (default 0..T-1); halves of K are the two coordinates (HF's layout)."""
    if positions_BT is None:
        cos, sin = cos[None, : q_BTHK.shape[1], None], sin[None, : q_BTHK.shape[1], None]
    else:
        cos, sin = cos[positions_BT][:, :, None], sin[positions_BT][:, :, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q_BTHK), rotate(k_BTGK)


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, *, segments_BT: Tensor | None = None) -> Tensor:
    """Causal attention with H/G query heads to a key head: [B, T, H, K]. With segments, a query sees its own only."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    gqa = q.shape[1] != k.shape[1]
    if segments_BT is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
    T = q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=gqa).transpose(1, 2)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, scale_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of scale * -log softmax(hidden weight^T)[target], fp32; target -100 is ignored."""
    nll = F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="none", ignore_index=-100)
    return (nll if scale_N is None else nll * scale_N).sum()


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target], fp32 [N]; 0 where the target is -100."""
    logits = F.linear(hidden_ND, weight_VD).float()
    return -F.cross_entropy(logits, targets_N, reduction="none", ignore_index=-100)


def choices() -> dict[str, Any]:
    """What was picked so far, JSON-able: `restore` of it makes another process take the same paths."""
    return {"mode": _mode}


def restore(picked: dict[str, Any]) -> None:
    """Take the paths that `choices()` named in an earlier process."""
    global _mode
    _mode = picked.get("mode", _mode)


def force(mode: Literal["plain", "auto"]) -> None:
    """ "plain": torch's own operators only. "auto": the faster of the equal ones, found by a check."""
    global _mode
    _mode = mode


def setup_process() -> None:
    """Settings of the process that make heavy work faster and change no number."""
