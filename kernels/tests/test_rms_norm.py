"""RMSNorm against torch's in fp64, in every layout and dtype, and together with what surrounds it in training."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama2_kernels import registry, rms_norm
from llama2_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_forward,
    reference_add_rms_norm,
    reference_rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    settings_for,
)
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed")

norm = rms_norm.rms_norm
EPS = 1e-5
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# --- against fp64 -------------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=FP64) * scale).to(device=device, dtype=dtype).requires_grad_()


def unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit of the last place of dtype at exact values."""
    info = torch.finfo(dtype)
    return torch.exp2(exact.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps


def close(name: str, got: Tensor, exact: Tensor, terms: Tensor | float) -> None:
    """The rounding to got's dtype, half a unit, and a little of the terms that were summed in fp32."""
    assert not got.isnan().any(), f"{name}: unwritten elements"
    slack = 16 * torch.finfo(FP64 if got.dtype == FP64 else FP32).eps
    allowed = 0.5 * unit(exact, got.dtype) + slack * (exact.abs() + terms)
    worst = ((got.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{name} is {worst:.2f} times as far off as allowed"


def check(x: Tensor, w: Tensor, residual: Tensor | None = None) -> None:
    """y, h and every gradient against fp64, with gradients arriving at y and at h."""
    if residual is None:
        y, inputs = norm(x, w, EPS), [x, w]
        h, dh = x, None
        grads_in, outs = [torch.randn_like(y)], [y]
    else:
        y, h = add_rms_norm(x, residual, w, EPS)
        assert torch.equal(h, x + residual) and h.dtype == y.dtype
        inputs, outs = [x, residual, w], [y, h]
        grads_in = [torch.randn_like(y), torch.randn_like(h)]
        dh = grads_in[1].double()
    got = torch.autograd.grad(outs, inputs, grads_in)
    assert all(g.dtype == i.dtype and g.shape == i.shape for g, i in zip(got, inputs))

    leaf, weight, dy = h.detach().double().requires_grad_(), w.detach().double().requires_grad_(), grads_in[0].double()
    eps = float(torch.tensor(EPS))  # a kernel takes it in fp32
    exact = F.rms_norm(leaf, (x.shape[-1],), weight, eps)
    dx, dw = torch.autograd.grad(exact, [leaf, weight], dy)
    dx = dx if dh is None else dx + dh
    with torch.no_grad():
        close("y", y, exact, 0.0)
        rstd = torch.rsqrt(leaf.square().mean(-1, keepdim=True) + eps)
        n, g = leaf * rstd, dy * weight
        terms = rstd * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True))
        terms = terms if dh is None else terms + dh.abs()
        for grad in got[:-1]:
            if grad.dtype == y.dtype:
                close("dx", grad, dx, terms)
            else:  # the gradient of the sum, rounded a second time
                assert torch.allclose(grad.double(), dx, rtol=0.01, atol=0.01)
        close("dw", got[-1], dw, (dy * n).abs().reshape(-1, x.shape[-1]).sum(0))


def slow(*values: object) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("width", [1, 5, 96, 100, *slow(2, 16, 31, 64, 257, 288, 1000, 1536)])
def test_any_width(device: str, guarded: None, width: int) -> None:
    for dtype in (BF16, FP16, FP32, FP64):
        w = numbers(width, dtype=dtype, device=device)
        for shape in [(width,), (2, 9, width)]:
            x = numbers(*shape, dtype=dtype, device=device, scale=3.0)
            check(x, w)
            check(x, w, numbers(*shape, dtype=dtype, device=device))


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer, wider programs sum the partial gradients: the interpreter takes a millisecond for each."""
    if registry.INTERPRET:
        monkeypatch.setattr(rms_norm, "SUM_COLUMNS", 1024)


@pytest.mark.parametrize("width", [5120, *slow(4096, 8192)])
def test_widths_of_the_models(device: str, guarded: None, few_programs: None, width: int) -> None:
    w = numbers(width, dtype=BF16, device=device)
    check(numbers(5, width, dtype=BF16, device=device), w)
    check(numbers(2, width, dtype=BF16, device=device), w, numbers(2, width, dtype=BF16, device=device))


@pytest.mark.parametrize("width", [8193, 20000, *slow(12288, 16385, 28672, 50001)])
def test_wide_rows(device: str, guarded: None, few_programs: None, width: int) -> None:
    """Beyond the registers of a program: forward above 16,384, backward above 8,192."""
    s = settings_for(width)
    assert s.wide_backward and s.wide_forward == (width > 16384)
    for dtype in (BF16, FP32):
        w = numbers(width, dtype=dtype, device=device)
        check(numbers(3, width, dtype=dtype, device=device), w)
        check(numbers(2, width, dtype=dtype, device=device), w, numbers(2, width, dtype=dtype, device=device))


@pytest.mark.parametrize("width", [64, 100, 9000])
@pytest.mark.parametrize("sms", [1, 2, 7])
def test_any_number_of_programs(
    device: str, guarded: None, few_programs: None, monkeypatch: pytest.MonkeyPatch, width: int, sms: int
) -> None:
    monkeypatch.setattr(rms_norm, "n_sms", lambda device: sms)
    monkeypatch.setattr(rms_norm, "ROWS_PER_PARTIAL", 2)
    for rows in (1, 3, 41 if width < 9000 else 11):
        check(numbers(rows, width, dtype=FP32, device=device), numbers(width, dtype=FP32, device=device))


def test_more_partial_rows_than_a_tile(device: str, guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "n_sms", lambda device: 20)
    monkeypatch.setattr(rms_norm, "ROWS_PER_PARTIAL", 1)
    check(numbers(150, 40, dtype=FP32, device=device), numbers(40, dtype=FP32, device=device))


@pytest.mark.parametrize(
    "kinds",
    [(BF16, BF16, FP32), (FP16, FP16, FP32), (BF16, FP32, FP32), (FP32, BF16, BF16), (FP32, FP32, BF16)],
    ids=str,
)
def test_mixed_dtypes(device: str, guarded: None, kinds: tuple[torch.dtype, ...]) -> None:
    """x, residual, weight: the residual stream or the weight in fp32 beside 16-bit activations."""
    x, residual = (numbers(4, 70, dtype=kind, device=device) for kind in kinds[:2])
    w = numbers(70, dtype=kinds[2], device=device)
    check(x, w)
    check(x, w, residual)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e15])
def test_any_magnitude(device: str, guarded: None, scale: float) -> None:
    """Where eps decides, and where squares are large."""
    for dtype in (BF16, FP32):
        check(numbers(3, 130, dtype=dtype, device=device, scale=scale), numbers(130, dtype=dtype, device=device))


def test_bf16_is_the_rounding_of_fp64(device: str, ulps: Callable[[Tensor, Tensor], float]) -> None:
    """The stated bound: half a unit of the last place, and a thousandth."""
    x, w = numbers(40, 1000, dtype=BF16, device=device), numbers(1000, dtype=BF16, device=device)
    exact = F.rms_norm(x.double(), (1000,), w.double(), EPS)
    assert ulps(norm(x, w, EPS), exact) <= 0.501
    got, _ = add_rms_norm(x, x, w, EPS)
    assert ulps(got, F.rms_norm((x + x).double(), (1000,), w.double(), EPS)) <= 0.501


def test_gradcheck(device: str) -> None:
    x, residual = (numbers(3, 5, dtype=FP64, device=device) for _ in range(2))
    w = numbers(5, dtype=FP64, device=device)
    assert torch.autograd.gradcheck(lambda x, w: norm(x, w, EPS), (x, w))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (x, residual, w))


def test_the_reference_is_the_models(device: str) -> None:
    """And the kernel is within a rounding of it, in the same order of operations."""
    ops = pytest.importorskip("llama2cli.nn.ops")
    x, w = numbers(6, 96, dtype=BF16, device=device), numbers(96, dtype=BF16, device=device)
    want = ops.plain_rms_norm(x, w, EPS)
    assert torch.equal(reference_rms_norm(x, w, EPS), want)
    assert (norm(x, w, EPS) != want).float().mean() < 0.01
    y, h = reference_add_rms_norm(x, x, w, EPS)
    assert torch.equal(h, x + x) and torch.equal(y, ops.plain_rms_norm(x + x, w, EPS))


# --- values that spread -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("width", [60, 96, 20000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_row(device: str, few_programs: None, width: int, value: float) -> None:
    x = torch.randn(4, width, device=device)
    x[1, width // 2], x[3, 0] = value, value
    w, grads = torch.rand(width, device=device), torch.randn(4, width, device=device)
    results = []
    for form in (norm, reference_rms_norm):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = form(*leaves, EPS)
        results.append([y, *torch.autograd.grad(y, leaves, grads)])
    for got, want in zip(*results):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert results[0][0][[0, 2]].isfinite().all() and results[0][1][[0, 2]].isfinite().all()


def test_zeros(device: str) -> None:
    x = torch.zeros(2, 10, device=device, requires_grad=True)
    w = torch.ones(10, device=device, requires_grad=True)
    y = norm(x, w, EPS)
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert not y.any() and not dw.any()
    assert torch.allclose(dx, torch.full_like(dx, EPS**-0.5))


# --- layouts ------------------------------------------------------------------------------------------------------


def layouts(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """[2, 3, 48] with anything but neighbours."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    return {
        "rows of a wider buffer": new(2, 3, 130)[..., 7:55],
        "every other row": new(2, 6, 48)[:, ::2],
        "axes swapped": new(3, 2, 48).transpose(0, 1),
        "columns first": new(48, 3, 2).permute(2, 1, 0),
        "every other column": new(2, 3, 96)[..., ::2],
        "one row for all": new(48).expand(2, 3, 48),
        "one value for all": new(1).expand(2, 3, 48),
    }


def test_layouts(device: str, guarded: None) -> None:
    w = torch.randn(96, device=device, dtype=BF16)[::2].requires_grad_()
    grads = layouts(device, BF16)
    for name, x in layouts(device, BF16).items():
        for dy in (grads[name], torch.randn(2, 3, 48, device=device).to(BF16)):
            leaf, plain = x.detach().requires_grad_(), x.contiguous().requires_grad_()
            res = grads[name].detach().requires_grad_()
            got, want = norm(leaf, w, EPS), norm(plain, w.contiguous(), EPS)
            assert got.is_contiguous() and torch.equal(got, want), name
            for g, v in zip(
                torch.autograd.grad(got, [leaf, w], dy), torch.autograd.grad(want, [plain, w], dy.contiguous())
            ):
                assert torch.equal(g, v), name
            sums = add_rms_norm(leaf, res, w, EPS)
            for g, v in zip(sums, add_rms_norm(plain, res.contiguous(), w, EPS)):
                assert torch.equal(g, v), name


def test_rows_of_a_wider_buffer_are_not_copied() -> None:
    fused = torch.empty(6, 130, device="meta")
    (made,) = registry.record(rms_norm_forward, fused[:, 16:64], fused[0, :48], EPS)
    assert made.arguments["x_stride"] == 130 and made.arguments["X"].storage_offset() == 16
    made = registry.record(rms_norm_backward, fused[:, :48], None, fused[:, 16:64], fused[0, :48], fused[:, 0], True)[0]
    assert made.arguments["dy_stride"] == 130 and made.arguments["x_stride"] == 130


@pytest.mark.parametrize("width", [64, *slow(20000)])
def test_rows_far_apart(device: str, few_programs: None, width: int) -> None:
    """Offsets beyond 2^31 of a stride below it. The memory between the rows is asked for and never touched."""
    far = 2**30 + 32
    try:
        buffer = torch.empty(2 * far + width, dtype=FP16, device=device)
    except RuntimeError:
        pytest.skip("no room for an address range of 4 GB")
    x, rows = buffer.as_strided((3, width), (far, 1)), torch.randn(3, width, device=device).half()
    for i in range(3):
        x[i] = rows[i]
    w = torch.randn(width, device=device)
    y, rstd = rms_norm_forward(x, w, EPS)
    want, _ = rms_norm_forward(rows, w, EPS)
    assert torch.equal(y, want)
    got = rms_norm_backward(x, x, x, w, rstd, True)
    assert all(torch.equal(a, b) for a, b in zip(got, rms_norm_backward(rows, rows, rows, w, rstd, True)))


def test_nothing_to_do(device: str) -> None:
    for shape in [(0, 8), (2, 0, 8)]:
        x = torch.empty(shape, device=device, requires_grad=True)
        w = torch.ones(8, device=device, requires_grad=True)
        dx, dw = torch.autograd.grad(norm(x, w, EPS).sum(), [x, w])
        assert dx.shape == shape and not dw.any()
        y, h = add_rms_norm(x, x, w, EPS)
        assert y.shape == h.shape == torch.Size(shape)


def test_what_does_not_fit_is_refused(device: str) -> None:
    x, w = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"weight for the last axis of x \(3, 8\), got \(4,\)"):
        norm(x, w[:4], EPS)
    with pytest.raises(ValueError, match="last axis"):
        norm(x[0, 0], w, EPS)
    with pytest.raises(ValueError, match=r"residual of x's shape \(3, 8\), got \(8,\)"):
        add_rms_norm(x, x[0], w, EPS)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        norm(x.long(), w, EPS)
    with pytest.raises(TypeError, match=r"weight is torch\.int32"):
        norm(x, w.int(), EPS)
    if device == "cuda":
        with pytest.raises(ValueError, match="weight is on cpu"):
            norm(x, w.cpu(), EPS)


# --- gradients that are not asked for -----------------------------------------------------------------------------


def launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a call launches."""
    names: list[str] = []

    def noted(kernel: object) -> object:
        names.append(kernel.fn.__name__)  # type: ignore[attr-defined]
        return registry.launch(kernel)

    with monkeypatch.context() as m:
        m.setattr(rms_norm, "launch", noted)
        call()
    return names


@pytest.mark.parametrize("width", [64, 9000])
def test_a_frozen_weight_costs_nothing(
    device: str, guarded: None, few_programs: None, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    x, w = numbers(5, width, dtype=FP32, device=device), numbers(width, dtype=FP32, device=device)
    dy = torch.randn(5, width, device=device)
    want, _ = torch.autograd.grad(norm(x, w, EPS), [x, w], dy)
    y = norm(x, w.detach(), EPS)
    got: list[Tensor] = []
    names = launches(lambda: got.extend(torch.autograd.grad(y, [x], dy)), monkeypatch)
    assert torch.equal(got[0], want)
    assert names == (["_backward"] if width == 64 else ["_backward_wide"])


def test_either_output_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = (numbers(3, 40, dtype=FP32, device=device) for _ in range(2))
    w, dy = numbers(40, dtype=FP32, device=device), torch.randn(3, 40, device=device)
    y, h = add_rms_norm(x, residual, w, EPS)
    h2 = h.detach().requires_grad_()
    want = torch.autograd.grad(norm(h2, w, EPS), [h2, w], dy)
    got = torch.autograd.grad(y, [x, residual, w], dy, retain_graph=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[0]) and torch.equal(got[2], want[1])
    only: list[Tensor | None] = []
    names = launches(lambda: only.extend(torch.autograd.grad(h, [x, residual, w], dy, allow_unused=True)), monkeypatch)
    assert names == [] and only[2] is None and torch.equal(only[0], dy) and torch.equal(only[1], dy)  # type: ignore[arg-type]


def test_gradients_accumulate_apart(device: str) -> None:
    """x and the residual get the same gradient: what one does with its own must not reach the other."""
    x, residual = (numbers(2, 8, dtype=FP32, device=device) for _ in range(2))
    w = numbers(8, dtype=FP32, device=device)
    add_rms_norm(x, residual, w, EPS)[0].square().sum().backward()
    before = residual.grad.clone()  # type: ignore[union-attr]
    x.grad.zero_()  # type: ignore[union-attr]
    assert torch.equal(residual.grad, before)  # type: ignore[arg-type]


def test_a_second_derivative_is_refused(device: str) -> None:
    x, w = numbers(2, 8, dtype=FP32, device=device), numbers(8, dtype=FP32, device=device)
    (dx,) = torch.autograd.grad(norm(x, w, EPS).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_the_same_bits_each_time(device: str) -> None:
    x, w = numbers(50, 96, dtype=BF16, device=device), numbers(96, dtype=BF16, device=device)
    dy = torch.randn(50, 96, device=device).to(BF16)
    first, again = (torch.autograd.grad(norm(x, w, EPS), [x, w], dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(norm(x, w, EPS), [x, w], dy)))


# --- as an operator of torch --------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    x, w = numbers(3, 40, dtype=FP32, device=device), numbers(40, dtype=FP32, device=device)
    low = numbers(3, 80, dtype=BF16, device=device)[:, ::2]
    torch.library.opcheck(rms_norm_forward, (x, w, EPS))
    torch.library.opcheck(rms_norm_forward, (low, w, EPS))
    torch.library.opcheck(add_rms_norm_forward, (x, x.detach().clone().requires_grad_(), w, EPS))
    torch.library.opcheck(add_rms_norm_forward, (x, low, w, EPS))
    rstd = torch.rand(3, device=device)
    x, w = x.detach(), w.detach()
    for dh, need in ((None, True), (None, False), (x.clone(), True)):
        torch.library.opcheck(rms_norm_backward, (x.clone(), dh, x, w, rstd, need))
    torch.library.opcheck(
        rms_norm_backward, (x.new_zeros(3, 9000), None, x.new_ones(3, 9000), w.new_ones(9000), rstd, True)
    )


def block(x: Tensor, residual: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Both operators, with ordinary ones around them."""
    y, h = add_rms_norm(torch.sin(x), residual, w, EPS)
    return norm(y * 2 + h, v, EPS).cos() + h


def block_inputs(device: str, rows: int = 6, dtype: torch.dtype = FP32) -> list[Tensor]:
    shapes = [(rows, 24), (rows, 24), (24,), (24,)]
    return [numbers(*shape, dtype=dtype, device=device) for shape in shapes]


def results(form: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 0.0) -> bool:
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 37) if dynamic else (6,):
        inputs = block_inputs(device, rows)
        assert same(results(compiled, inputs), results(block, inputs), 1e-5)


@pytest.mark.slow
def test_compiled_by_inductor(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for dtype, tolerance in ((FP32, 1e-5), (BF16, 0.1)):
        inputs = block_inputs(device, dtype=dtype)
        assert same(results(compiled, inputs), results(block, inputs), tolerance)
    both = torch.compile(lambda *x: checkpoint(block, *x, use_reentrant=False), fullgraph=True)
    inputs = block_inputs(device)
    assert same(results(both, inputs), results(block, inputs), 1e-5)


def test_checkpointing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block_inputs(device)
    want = results(block, inputs)
    got: list[Tensor] = []
    again = lambda *x: checkpoint(block, *x, use_reentrant=False)  # noqa: E731
    names = launches(lambda: got.extend(results(again, inputs)), monkeypatch)
    assert same(got, want) and names.count("_forward") == 4

    def save_norms(context: object, operator: object, *args: object, **named: object) -> CheckpointPolicy:
        ours = operator in (
            torch.ops.llama2_kernels.rms_norm_forward.default,
            torch.ops.llama2_kernels.add_rms_norm_forward.default,
        )
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(*x: Tensor) -> Tensor:
        return checkpoint(
            block, *x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_norms)
        )

    got.clear()
    names = launches(lambda: got.extend(results(selective, inputs)), monkeypatch)
    assert same(got, want) and names.count("_forward") == 2  # kept, not computed again


@pytest.mark.parametrize("kind", [BF16, FP16], ids=str)
def test_under_autocast(device: str, kind: torch.dtype) -> None:
    """Dtype in, dtype out: a 16-bit activation beside an fp32 weight is neither cast up nor down."""
    x, residual, w, _ = block_inputs(device)
    matrix = numbers(24, 24, dtype=FP32, device=device)
    with torch.autocast(device, kind):
        low = x @ matrix
        y = norm(low, w, EPS)
        assert low.dtype == y.dtype == kind
        z, h = add_rms_norm(y @ matrix, residual, w, EPS)
        assert z.dtype == h.dtype == FP32
        out = (z @ matrix).float().sum()
    grads = torch.autograd.grad(out, [x, residual, w, matrix])
    assert all(g.dtype == FP32 and g.isfinite().all() for g in grads)
    with torch.autocast(device, kind):
        want = torch.autograd.grad(
            (
                reference_add_rms_norm(reference_rms_norm(x @ matrix, w, EPS) @ matrix, residual, w, EPS)[0] @ matrix
            ).float().sum(),
            [x, residual, w, matrix],
        )  # fmt: skip
    for g, v in zip(grads, want):
        assert (g - v).norm() < 0.03 * v.norm()


def test_without_gradients(device: str) -> None:
    x, w = torch.randn(3, 24, device=device), torch.ones(24, device=device)
    want = norm(x, w, EPS)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(norm(x, w, EPS), want)


# --- in processes of their own ------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from llama2_kernels import rms_norm as r

def step(x, residual, w):
    a = r.rms_norm_forward.launcher(x, w, 1e-5)
    b = r.add_rms_norm_forward.launcher(x, residual, w, 1e-5)
    return *a, *b, *r.rms_norm_backward.launcher(b[0], b[1], x, w, b[2], True)

for symbolic in (False, True):
    for width in (64, 5120, 20000):
        env, rows, name = ShapeEnv(), 40, ConstantSource("rows")
        if symbolic:
            rows = env.create_symintnode(env.create_symbol(40, name), hint=40, source=name)
        with FakeTensorMode(shape_env=env):
            x, residual = (torch.empty(2, rows, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            w = torch.empty(width, device="cuda")
            code = make_fx(step, tracing_mode="symbolic")(x, residual, w).code
        assert code.count("triton_kernel_wrapper_mutation(") == (4 if width < 8192 else 5), code
        assert not env.replacements, "compiled for one number of rows"
known = torch._library.triton.get_triton_kernels_for_op("llama2_kernels::rms_norm_backward")
assert r._backward in known and r._sum in known
"""


@pytest.mark.slow
@pytest.mark.skipif(not registry.INTERPRET, reason="compiled here anyway")
def test_the_compiled_form_can_be_traced(compiler_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], env=compiler_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHARDED = Path(__file__).with_name("fsdp_rms_norm.py")


@pytest.mark.slow
def test_two_processes_share_the_parameters(tmp_path: Path) -> None:
    """FSDP2, bf16 parameters, gradients reduced in fp32: two halves of a batch against the whole in one process."""
    command = [sys.executable, str(SHARDED), str(tmp_path / "store")]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        assert "same" in out
