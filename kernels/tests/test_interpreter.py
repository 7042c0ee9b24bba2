"""What the interpreter does with bf16, and that the tests correct it (see `rounding` in conftest.py)."""

from __future__ import annotations

import math

import pytest
import torch
from llama2_kernels import registry
from llama2_kernels.registry import jit, launch, on, tl
from torch import Tensor

pytestmark = pytest.mark.skipif(not registry.INTERPRET, reason="of the interpreter")


@jit
def _cast(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    with on(x):
        launch(_cast)[(1,)](x, y, N=x.numel())
    return y


def values() -> Tensor:
    """All kinds of fp32: every exponent, ties, just beside ties, subnormals, infinities, NaN."""
    bits = torch.arange(-(2**31), 2**31, 2**20 - 2**12 + 1, dtype=torch.int64)[:4094]
    ties = torch.arange(0, 1024, dtype=torch.int64) * 2**22 + 0x8000  # halfway between two bf16
    bits = torch.cat((bits[:2040], ties - 2**31, ties - 2**31 - 1))[:4088]
    some = bits.to(torch.int32).view(torch.float32)
    return torch.cat((some, torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3.4e38, math.inf, -math.inf, math.nan])))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_bf16_is_rounded_to_nearest() -> None:
    x = values()
    assert x.numel() == 4096
    assert same(cast(x, torch.bfloat16), x.bfloat16())
    low = x.bfloat16()
    assert same(cast(low, torch.float32), low.float())


def test_the_correction_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when triton's own conversion has become right: then `rounding` can go."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", interpreter._convert_float.unpatched)
    x = torch.rand(4096) + 1.0
    wrong = (cast(x, torch.bfloat16) != x.bfloat16()).float().mean()
    assert 0.4 < wrong < 0.6  # it truncates: half of all results are one unit low
