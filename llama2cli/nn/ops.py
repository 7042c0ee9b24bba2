"""The operations of the model, and the only place that chooses how each is computed.

The plain forms below (`plain_*`) are the specification: torch's own operators, on any device and dtype, in compiled
regions too. On a CPU some have a faster form in `nn.cpu`. `setup_process` checks each once, on this machine, and takes
it when it is equal within rounding and faster; `choices` gives what was taken, `restore` makes another process take the
same, so that a resumed run computes the same bytes. Before `setup_process`, after `force("plain")`, and with
LLAMA2_OPS=plain in the environment, the plain forms are used.

Letters of shapes: B rows, T positions, H query heads, G key/value heads, K head size, D width, F feed-forward width,
V vocabulary, N tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli.nn import cpu, loss

_mode: str = os.environ.get("LLAMA2_OPS", "auto")
_picks: dict[str, str] = {}  # "operation.dtype" -> "fast" or "plain"
_onednn = False  # are fp32 products sent to oneDNN at this moment
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


# --- plain forms --------------------------------------------------------------------------------------------------


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def plain_rope(
    q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor, positions_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    if positions_BT is None:
        cos, sin = cos[None, : q_BTHK.shape[1], None], sin[None, : q_BTHK.shape[1], None]
    else:
        cos, sin = cos[positions_BT][:, :, None], sin[positions_BT][:, :, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q_BTHK), rotate(k_BTGK)


def plain_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments_BT: Tensor | None, branches_BT: Tensor | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    repeat = q.shape[1] // k.shape[1]
    if segments_BT is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeat > 1).transpose(1, 2)
    # A mask needs B T T bytes, and keeps torch from its kernels for grouped heads: they are repeated instead, so that a
    # GPU takes the kernel that never holds the B H T T scores.
    T = q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if branches_BT is not None:
        key = branches_BT[:, None, :]
        seen = seen & ((key == 0) | (key == branches_BT[:, :, None]))
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)


# --- operations ---------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times weight [E, D] transposed: [..., E]."""
    if _onednn and not torch.is_grad_enabled() and _tiny(x, weight):
        with cpu.blas():  # it has less to set up: several times faster on a few rows
            return F.linear(x, weight)
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32; the result has x's dtype."""
    if _fast("rms_norm", x) and weight.dtype == x.dtype:
        return cpu.rms_norm(x, weight, eps)
    return plain_rms_norm(x, weight, eps)


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
    """Rotate queries and keys by their positions (default 0..T-1), in fp32; the results have q's and k's dtype.

    The halves of K are the two coordinates (the layout of Hugging Face folders). cos, sin: a `rope_table`.
    """
    if _fast("rope", q_BTHK) and q_BTHK.shape[1] > 1:
        return cpu.rope(q_BTHK, k_BTGK, cos, sin, positions_BT)
    return plain_rope(q_BTHK, k_BTGK, cos, sin, positions_BT)


def attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    *,
    segments_BT: Tensor | None = None,
    branches_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention, H/G query heads to a key head, scaled by 1/sqrt(K): [B, T, H, K].

    segments_BT: int ids; a query sees the keys of its own segment at or before it (packed texts; padding is a segment).
    branches_BT: int, with segments only; of these keys it sees those of branch 0, the trunk, and of its own branch
    (several answers to one prompt, which is computed once). Raises ValueError for branches without segments.
    """
    if branches_BT is not None and segments_BT is None:
        raise ValueError("branches are parts of segments: give both")
    if _fast("attention", q_BTHK) and q_BTHK.shape[1] > 1:
        return cpu.attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, branches_BT)
    return plain_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, branches_BT)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, scale_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of scale * -log softmax(hidden weight^T)[target], fp32 scalar; targets of -100 are left out.

    In chunks, with the gradient computed on the way: the logits are never held whole (see nn.loss).
    """
    if torch.compiler.is_compiling():
        return loss.reference(hidden_ND, weight_VD, targets_N, scale_N)
    return loss.linear_cross_entropy(hidden_ND, weight_VD, targets_N, scale_N)


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target], fp32 [N], 0 where the target is -100; in chunks, differentiable once.

    Probabilities are kept for the backward pass up to a bound, and computed again beyond (see nn.loss).
    """
    if torch.compiler.is_compiling():
        return loss.reference_tokens(hidden_ND, weight_VD, targets_N)[0]
    return loss.token_logprobs(hidden_ND, weight_VD, targets_N)


def token_logprobs_and_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, from the same pass, the entropy of each softmax in nats, fp32 [N], without a gradient."""
    if torch.compiler.is_compiling():
        return loss.reference_tokens(hidden_ND, weight_VD, targets_N)
    return loss.token_logprobs_and_entropy(hidden_ND, weight_VD, targets_N)


def token_kl(hidden_ND: Tensor, weight_VD: Tensor, other_hidden_NE: Tensor, other_weight_VE: Tensor) -> Tensor:
    """KL in nats of softmax(hidden weight^T) from the other model's, exact over V, fp32 [N]; in chunks, no gradient."""
    return loss.token_kl(hidden_ND, weight_VD, other_hidden_NE, other_weight_VE)


# --- choosing -----------------------------------------------------------------------------------------------------


def setup_process() -> None:
    """Settings that make heavy work on a CPU faster, and the checks that choose the forms (0.2 s); call it once.

    What `restore` has named is not checked again.
    """
    cpu.keep_memory()
    if _mode == "plain":
        return
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, dtype, tolerance, share, probe in _PROBES:
            key = f"{name}.{_NAMES[dtype]}"
            if key not in _picks:
                taken = cpu.compare(*probe(dtype), tolerance=tolerance, share=share)
                _picks[key] = "fast" if taken else "plain"
            _apply()


def choices() -> dict[str, Any]:
    """What was taken so far, JSON-able: `restore` of it makes another process compute the same."""
    return {"mode": _mode, "picks": dict(_picks)}


def restore(taken: dict[str, Any]) -> None:
    """Take what `choices()` named in an earlier process; nothing is timed again."""
    global _mode
    _mode = taken["mode"]
    _picks.clear()
    _picks.update(taken["picks"])
    _apply()


def force(mode: Literal["plain", "auto"]) -> None:
    """ "plain": the plain forms only. "auto": what `setup_process` has taken or will take."""
    global _mode
    if mode not in ("plain", "auto"):
        raise ValueError(f"expected plain or auto, got {mode!r}")
    _mode = mode
    _apply()


def _apply() -> None:
    global _onednn
    _onednn = (
        _mode == "auto" and _picks.get("matmul.fp32") == "fast" and cpu.exact()
    )  # it may come from another machine
    cpu.set_onednn(_onednn)


def _fast(name: str, x: Tensor) -> bool:
    if _mode == "plain" or not x.is_cpu or torch.compiler.is_compiling():
        return False
    return _picks.get(f"{name}.{_NAMES.get(x.dtype)}") == "fast"


def _tiny(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.shape[-1]
    if x.dtype != torch.float32 or not x.is_cpu or torch.compiler.is_compiling():
        return False
    return rows == 1 or rows * weight.numel() < 1 << 20


Pair = tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]  # the fast form and the plain one


def _with_gradients(form: Callable[..., Any], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """A call that gives the results of a form and the gradients of its inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def call() -> list[Tensor]:
        out = form(*leaves)
        out = list(out) if isinstance(out, tuple) else [out]
        # A scalar: torch.autograd imports sympy (half a second) to check gradients that are given to it.
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)]

    return call


def _probe_matmul(dtype: torch.dtype) -> Pair:
    x, weight = torch.randn(512, 256, dtype=dtype), torch.randn(512, 256, dtype=dtype)

    def product(on: bool) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            cpu.set_onednn(on)
            return [x @ weight.t()]

        return call

    return product(cpu.exact()), product(False)


def _probe_rms_norm(dtype: torch.dtype) -> Pair:
    x, weight = torch.randn(4096, 128, dtype=dtype), torch.randn(128, dtype=dtype)
    fast, plain = (_with_gradients(lambda x, w, f=f: f(x, w, 1e-5), x, weight) for f in (cpu.rms_norm, plain_rms_norm))
    return fast, plain


def _probe_rope(dtype: torch.dtype) -> Pair:
    q, k = torch.randn(4, 256, 4, 32, dtype=dtype), torch.randn(4, 256, 4, 32, dtype=dtype)
    table = rope_table(32, 10000.0, 256)
    fast, plain = (_with_gradients(lambda q, k, f=f: f(q, k, *table, None), q, k) for f in (cpu.rope, plain_rope))
    return fast, plain


def _probe_attention(dtype: torch.dtype) -> Pair:
    qkv = [torch.randn(2, 256, 4, 32, dtype=dtype) for _ in range(3)]
    fast, plain = (
        _with_gradients(lambda q, k, v, f=f: f(q, k, v, None), *qkv) for f in (cpu.attention, plain_attention)
    )
    return fast, plain


# Operation, dtype, tolerance, and the share of the plain form's time that the fast one must stay below: far from what
# it usually takes (0.3 to 0.7), so that noise does not change the choice from run to run. Products and attention must
# gain to be taken; the written backward passes, which also save memory, are left out only where they clearly lose.
_PROBES: list[tuple[str, torch.dtype, float, float, Callable[[torch.dtype], Pair]]] = [
    ("matmul", torch.float32, 1e-5, 0.75, _probe_matmul),  # first: the others compute with what it chooses
    ("rms_norm", torch.float32, 1e-5, 1.3, _probe_rms_norm),
    ("rope", torch.float32, 1e-5, 1.3, _probe_rope),
    ("rope", torch.bfloat16, 1e-2, 1.3, _probe_rope),
    ("attention", torch.float32, 1e-5, 0.75, _probe_attention),
    ("attention", torch.bfloat16, 3e-2, 0.75, _probe_attention),
]
