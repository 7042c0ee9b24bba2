"""The operations of the model, and the only place that chooses how each is computed.

The plain forms below (`plain_*`) are the specification: torch's own operators, on any device and dtype.

On a CPU some have a faster form in `nn.cpu`. `setup_process` checks each once, on this machine, and takes it when it is
equal within rounding and faster.
On a CUDA device RMSNorm, rotary embedding, SwiGLU and the head have Triton kernels (the package llama2_kernels), which
are taken where triton is installed and they are found there to be equal within rounding. A compiled region
(torch.compile) takes the plain forms of the first three instead: the compiler makes kernels of them together with what
stands around them. (Of the head it would hold all logits.)

`choices` gives what was taken, `restore` makes another process take the same, so that a resumed run computes the same
bytes. Before `setup_process`, after `force("plain")`, and with LLAMA2_OPS=plain in the environment, the plain forms are
used. `force("triton")` and LLAMA2_OPS=triton take the kernels in compiled regions too, and on a CPU in Triton's
interpreter (a process started with TRITON_INTERPRET=1; slow, for tests); where they cannot run they are refused.

Letters of shapes: B rows, T positions, H query heads, G key/value heads, K head size, D width, F feed-forward width,
V vocabulary, N tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli import console
from llama2cli.errors import Misuse
from llama2cli.nn import cpu, loss

Mode = Literal["auto", "plain", "triton"]
MODES: tuple[str, ...] = get_args(Mode)
VARIABLE = "LLAMA2_OPS"


class Kernels(NamedTuple):
    """The functions of llama2_kernels."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    token_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]
    token_logprobs_and_entropy: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    interpreted: bool  # by Triton's interpreter: on a CPU


_mode: str = os.environ.get(VARIABLE, "auto")
_picks: dict[str, str] = {}  # "operation.dtype" -> "fast" or "plain"
_triton: bool | None = None  # are the Triton kernels taken, on tensors that they can run on; None before it is decided
_kernels: Kernels | None = None  # those that are taken at this moment
_onednn = False  # are fp32 products sent to oneDNN at this moment
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


# --- plain forms --------------------------------------------------------------------------------------------------


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


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
    if _kernels is not None and _by_triton(x):
        return _kernels.rms_norm(x, weight, eps)
    if _fast("rms_norm", x) and weight.dtype == x.dtype:
        return cpu.rms_norm(x, weight, eps)
    return plain_rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2F] that holds gate, then up: [..., F]."""
    if _kernels is not None and _by_triton(gate_up):
        return _kernels.swiglu(gate_up)
    return plain_swiglu(gate_up)


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
    if _kernels is not None and _by_triton(q_BTHK):
        return _kernels.rope(q_BTHK, k_BTGK, cos, sin, positions_BT)
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
    if _kernels is not None and _by_triton(hidden_ND, compiled=True):
        if not torch.compiler.is_compiling():  # its shapes cannot follow from values
            hidden_ND, targets_N, scale_N = loss.with_targets(hidden_ND, targets_N, scale_N)
        return _kernels.linear_cross_entropy(hidden_ND, weight_VD, targets_N, scale_N)
    if torch.compiler.is_compiling():
        return loss.reference(hidden_ND, weight_VD, targets_N, scale_N)
    return loss.linear_cross_entropy(hidden_ND, weight_VD, targets_N, scale_N)


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target], fp32 [N], 0 where the target is -100; in chunks, differentiable once.

    Probabilities are kept for the backward pass up to a bound, and computed again beyond (see nn.loss); by Triton
    kernels always computed again.
    """
    if _kernels is not None and _by_triton(hidden_ND, compiled=True):
        return _kernels.token_logprobs(hidden_ND, weight_VD, targets_N)
    if torch.compiler.is_compiling():
        return loss.reference_tokens(hidden_ND, weight_VD, targets_N)[0]
    return loss.token_logprobs(hidden_ND, weight_VD, targets_N)


def token_logprobs_and_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, from the same pass, the entropy of each softmax in nats, fp32 [N], without a gradient."""
    if _kernels is not None and _by_triton(hidden_ND, compiled=True):
        return _kernels.token_logprobs_and_entropy(hidden_ND, weight_VD, targets_N)
    if torch.compiler.is_compiling():
        return loss.reference_tokens(hidden_ND, weight_VD, targets_N)
    return loss.token_logprobs_and_entropy(hidden_ND, weight_VD, targets_N)


def token_kl(hidden_ND: Tensor, weight_VD: Tensor, other_hidden_NE: Tensor, other_weight_VE: Tensor) -> Tensor:
    """KL in nats of softmax(hidden weight^T) from the other model's, exact over V, fp32 [N]; in chunks, no gradient."""
    return loss.token_kl(hidden_ND, weight_VD, other_hidden_NE, other_weight_VE)


# --- choosing -----------------------------------------------------------------------------------------------------


def setup_process() -> None:
    """Settings that make heavy work on a CPU faster, and the checks that choose the forms (0.2 s); call it once.

    What `restore` has named is not checked again. Raises Misuse where LLAMA2_OPS is no mode, or asks for kernels that
    cannot run here.
    """
    global _triton
    if _mode not in MODES:
        raise Misuse(f"expected one of {', '.join(MODES)}, got {_mode!r}", VARIABLE)
    cpu.keep_memory()
    if _triton is None:
        _require_kernels(VARIABLE)
        _triton = _mode == "triton" or (_mode == "auto" and torch.cuda.is_available() and _trusted())
        _apply()
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
    """What was taken so far, JSON-able: `restore` of it makes another process compute the same.

    triton: are the kernels taken where tensors are on a CUDA device; None where that is not decided yet.
    """
    return {"mode": _mode, "picks": dict(_picks), "triton": _triton}


def restore(taken: dict[str, Any]) -> None:
    """Take what `choices()` named in an earlier process; nothing is timed again.

    Kernels that cannot run in this process are not taken, which is told.
    """
    global _mode, _triton
    before, _triton = _triton, taken.get("triton")
    _mode = taken["mode"]
    _picks.clear()
    _picks.update(taken["picks"])
    _apply()
    if _triton and not before and _mode != "plain" and _kernels is None:
        console.warn("the run took Triton kernels, which cannot run here: torch's own operators compute instead")


def force(mode: Mode, device: torch.device | None = None) -> None:
    """ "plain": the plain forms only. "triton": the kernels. "auto": what `setup_process` has taken or will take.

    Raises Misuse where the kernels cannot run, or not on this device.
    """
    global _mode, _triton
    if mode not in MODES:
        raise ValueError(f"expected one of {', '.join(MODES)}, got {mode!r}")
    before, _mode, _triton = (_mode, _triton), mode, None if mode == "auto" else mode == "triton"
    try:
        _require_kernels("--kernels", device)
    except Misuse:
        _mode, _triton = before
        raise
    _apply()


def _require_kernels(place: str, device: torch.device | None = None) -> None:
    """Raise Misuse where mode triton was asked for and the kernels cannot run."""
    if _mode != "triton":
        return
    kernels = _load_kernels()
    if kernels is None:
        raise Misuse("triton: its kernels need a CUDA device, and the package triton; auto takes what there is", place)
    if device is not None and (device.type == "cpu") != kernels.interpreted:
        where = "with TRITON_INTERPRET=1 they run on a CPU" if kernels.interpreted else "its kernels need a CUDA device"
        raise Misuse(f"triton: {where}, the device is {device.type}", place)


def _trusted() -> bool:
    """Whether the kernels run on the CUDA device and give there what the plain forms give; told where they do not."""
    kernels = _load_kernels()
    odd = None if kernels is None else disagreement(kernels, torch.device("cuda"))
    if odd is not None:
        console.warn(f"Triton kernels are not taken: {odd}")
    return kernels is not None and odd is None


def disagreement(kernels: Kernels, device: torch.device) -> str | None:
    """Which kernel fails on a device, or differs from its plain form by more than rounding; None where none does.

    Results and gradients of each on small inputs, in fp32 and bf16, beside the largest number of the plain form.
    """
    generator = torch.Generator().manual_seed(0)
    cos, sin = (table.to(device) for table in rope_table(64, 10000.0, 8))
    targets = torch.tensor([1, 5, 95, 0, 7, loss.IGNORE], device=device)
    forms: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
        "rms_norm": (
            lambda x, w: kernels.rms_norm(x, w, 1e-5),
            lambda x, w: plain_rms_norm(x, w, 1e-5),
            [(6, 256), (256,)],
        ),
        "swiglu": (kernels.swiglu, plain_swiglu, [(6, 512)]),
        "rope": (
            lambda q, k: kernels.rope(q, k, cos, sin, None),
            lambda q, k: plain_rope(q, k, cos, sin, None),
            [(2, 8, 4, 64), (2, 8, 2, 64)],
        ),
        "linear_cross_entropy": (
            lambda h, w: kernels.linear_cross_entropy(h[:5], w, targets[:5], None),
            lambda h, w: loss.reference(h[:5], w, targets[:5], None),
            [(6, 64), (96, 64)],
        ),
        "token_logprobs": (
            lambda h, w: kernels.token_logprobs(h, w, targets),
            lambda h, w: loss.reference_tokens(h, w, targets)[0],
            [(6, 64), (96, 64)],
        ),
    }
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            for name, (kernel, plain, shapes) in forms.items():
                inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
                try:
                    ours, theirs = (_with_gradients(form, *inputs)() for form in (kernel, plain))
                    far = max(
                        float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())
                        for a, b in zip(ours, theirs, strict=True)
                    )
                except Exception as e:  # whatever a compiler or a driver says: there is another way to compute
                    return (
                        f"{name} in {_NAMES[dtype]} failed here ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
                    )
                if not far <= tolerance:
                    return f"{name} in {_NAMES[dtype]} differs from its plain form by {far:.2g}"
    return None


def _load_kernels() -> Kernels | None:
    """The kernels, None where they cannot run. Imported only where they might be wanted: triton takes 0.3 s."""
    try:
        from llama2_kernels import linear_cross_entropy as head
        from llama2_kernels import registry, rms_norm, rope, swiglu
    except ImportError:  # an installation without them
        return None
    if not registry.available():
        return None
    return Kernels(
        rms_norm.rms_norm,
        rope.rope,
        swiglu.swiglu,
        head.linear_cross_entropy,
        head.token_logprobs,
        head.token_logprobs_and_entropy,
        registry.INTERPRET,
    )


def _apply() -> None:
    global _kernels, _onednn
    _kernels = _load_kernels() if _triton and _mode != "plain" else None
    fast = _mode != "plain" and _picks.get("matmul.fp32") == "fast"
    _onednn = fast and cpu.exact()  # it may come from another machine
    cpu.set_onednn(_onednn)


def _by_triton(x: Tensor, *, compiled: bool = False) -> bool:
    """compiled: in a compiled region too, where they are not forced."""
    if _kernels is None or (torch.compiler.is_compiling() and _mode != "triton" and not compiled):
        return False
    return x.is_cuda or (x.is_cpu and _kernels.interpreted and _mode == "triton")


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
