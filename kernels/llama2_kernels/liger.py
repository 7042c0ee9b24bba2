"""Liger-Kernel's kernels for the same work, where that package is installed: others to compare with.

Liger-Kernel is Hsu et al. 2024, arXiv 2410.10989. `pip install liger-kernel`; nothing here needs it.
"""

# ruff: noqa: B023  (what is recorded is called at once)
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llama2_kernels import registry
from llama2_kernels.registry import Case, Launch

WIDTHS = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "70b": (8192, 28672, 64, 8)}  # D, F, heads
HEAD, VOCABULARY = 128, 32000


def version() -> str | None:
    """That of the installed package, None where there is none."""
    try:
        importlib.import_module("liger_kernel.ops")
        return importlib.metadata.version("liger-kernel")
    except ImportError:
        return None


# --- static report ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recorded(module: Any, name: str) -> Iterator[None]:
    kernel = getattr(module, name)
    setattr(module, name, registry._Recorder(kernel))
    try:
        yield
    finally:
        setattr(module, name, kernel)


def _record(file: str, kernel: str, call: Callable[[Any], object]) -> list[Launch]:
    """The launches of a kernel in what `call` does with Liger's module, with meta tensors."""
    module = importlib.import_module(f"liger_kernel.ops.{file}")
    with _recorded(module, kernel):
        return registry.record(lambda: call(module))


def _persistent(launches: list[Launch], tokens: int, sms: int) -> list[Launch]:
    """Its backward passes ask a CUDA device for its multiprocessors, and launch as many programs."""
    each = {"rows_per_program": -(-tokens // sms)}
    return [dataclasses.replace(x, grid=(sms,), arguments=x.arguments | each) for x in launches]


def static_cases(tokens: int, sms: int) -> list[Case]:
    """Its launches for the operators of this package, named as ours; with settings and hints of its own launchers."""
    cases = []

    def add(op: str, model: str, made: list[Launch], moved: float, least: float, elements: int, **more: Any) -> None:
        cases.append(Case(op, model, made, tokens, moved, least, elements=elements, **more))

    for model, (width, ffn, heads, kv_heads) in WIDTHS.items():
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
        w, rstd = x[0], torch.empty(tokens, dtype=torch.float32, device="meta")
        block, warps = _settings(width)
        norm, partial = (0.0, "llama"), 8 * width * sms / tokens

        made = _record("rms_norm", "_rms_norm_forward_kernel", lambda m: m.rms_norm_forward(x, w, 1e-5, *norm, None))
        add("rms_norm forward", model, made, 4 * width + 4, 4 * width, width)
        for needed in (True, False):
            rest = (block, warps, False, None, needed)
            made = _record(
                "rms_norm", "_rms_norm_backward_kernel", lambda m: m.rms_norm_backward(x, x, w, rstd, 0.0, 0, *rest)
            )
            name = "rms_norm backward" + ("" if needed else ", frozen weight")
            moved = 6 * width + 4 + partial * needed
            add(name, model, _persistent(made, tokens, sms), moved, 6 * width, width, per_sm=1)
        file = "fused_add_rms_norm"
        made = _record(
            file,
            "_fused_add_rms_norm_forward_kernel",
            lambda m: m.fused_add_rms_norm_forward(x, x, w, 1e-5, *norm),
        )
        add("add_rms_norm forward", model, made, 8 * width + 4, 8 * width, width)
        made = _record(
            file,
            "_fused_add_rms_norm_backward_kernel",
            lambda m: m.fused_add_rms_norm_backward(x, x, x, w, rstd, 0.0, 0, block, warps, 2, False),
        )
        moved = 8 * width + 4 + partial
        add("add_rms_norm backward", model, _persistent(made, tokens, sms), moved, 8 * width, width, per_sm=1)

        gate = torch.empty(tokens, ffn, dtype=torch.bfloat16, device="meta")
        both = torch.empty(tokens, 2 * ffn, dtype=torch.bfloat16, device="meta")
        for op, kernel, call, each in (
            ("swiglu forward", "fused_gate_up_forward", lambda m: m.swiglu_fused_gate_up_forward(both), 6),
            ("swiglu backward", "fused_gate_up_backward", lambda m: m.swiglu_fused_gate_up_backward(both, gate), 10),
            ("swiglu_pair forward", "forward", lambda m: m.swiglu_forward(gate, gate), 6),
            ("swiglu_pair backward", "backward", lambda m: m.swiglu_backward(gate, gate, gate), 10),
        ):
            made = _record("swiglu", f"_swiglu_{kernel}_kernel", call)
            add(op, model, made, each * ffn, each * ffn, ffn)

        T = min(tokens, 4096)
        q, k = (torch.empty(tokens // T, T, n, HEAD, dtype=x.dtype, device="meta") for n in (heads, kv_heads))
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # its layout
        table = torch.empty(1, T, HEAD, dtype=x.dtype, device="meta")
        for direction in ("forward", "backward"):
            made = _record("rope", "_triton_rope", lambda m: getattr(m, f"rope_{direction}")(q, k, table, table))
            moved = 4 * (heads + kv_heads) * HEAD
            add(f"rope {direction}", model, made, moved, moved, (heads + kv_heads) * HEAD)

        # One kernel gives loss and gradient, in place of logits in bf16; the loss alone where no gradient is wanted.
        for op, gradient in (("log-sum-exp", False), ("gradient of logits", True)):
            made = [_cross_entropy(tokens, gradient)]
            moved = (6 if gradient else 2) * VOCABULARY
            add(op, model, made, moved, (4 if gradient else 2) * VOCABULARY, VOCABULARY)
    return cases


def _cross_entropy(tokens: int, gradient: bool) -> Launch:
    """As its `fused_linear_cross_entropy_forward` launches it, which asks for values: meta tensors have none."""
    kernel = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
    logits = torch.empty(tokens, VOCABULARY, dtype=torch.bfloat16, device="meta")
    targets, loss = torch.empty(tokens, dtype=torch.int64, device="meta"), torch.empty(tokens, device="meta")
    given = dict(X_ptr=logits, X_stride=VOCABULARY, Y_ptr=targets, Y_stride=1, loss_ptr=loss, loss_stride=1)
    given |= dict(n_cols=VOCABULARY, n_non_ignore=tokens, sum_non_ignore_weight=tokens, weight_sum=0.0)
    given |= dict(ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="sum")
    given |= dict(BLOCK_SIZE=32768, HAS_GRADIENTS=gradient)
    # What is not asked for is None, 0 or False by its parameter's kind.
    for parameter in kernel.params:
        name = parameter.name
        given.setdefault(name, None if name.endswith("_ptr") or name == "softcap" else not name.isupper() and 0)
    return Launch(kernel, (tokens,), given, 32, 3)


def _settings(width: int) -> tuple[int, int]:
    return importlib.import_module("liger_kernel.ops.utils").calculate_settings(width)


# --- calls --------------------------------------------------------------------------------------------------------


def _function(path: str) -> Callable[..., Any]:
    """`apply` of one of its autograd functions, named below `liger_kernel.ops`."""
    file, _, name = f"liger_kernel.ops.{path}".rpartition(".")
    return getattr(importlib.import_module(file), name).apply


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Its RMSNorm in the convention of Llama, which rounds before the weight; not in place."""
    return _function("LigerRMSNormFunction")(x, weight, eps, 0.0, "llama", False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and the sum."""
    return _function("LigerFusedAddRMSNormFunction")(x, residual, weight, eps, 0.0, "llama", False)


def swiglu(gate_up: Tensor) -> Tensor:
    """Its operator for a fused projection."""
    return _function("swiglu.LigerFusedGateUpSiLUMulFunction")(gate_up)


def swiglu_pair(gate: Tensor, up: Tensor) -> Tensor:
    """Its operator for two tensors. The backward pass writes over them."""
    return _function("LigerSiLUMulFunction")(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K]; cos, sin [1, T, K], both halves alike, as Hugging Face keeps them. Writes over q and k."""
    q, k = _function("LigerRopeFunction")(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss, with the gradient of the weight summed in fp32."""
    args = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    return _function("LigerFusedLinearCrossEntropyFunction")(hidden, weight, targets, *args)[0]
