"""SwiGLU against torch's in fp64, in every layout and dtype, and together with what surrounds it in training."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from llama2_kernels import registry, swiglu
from llama2_kernels.swiglu import (
    MODELS,
    TILE,
    reference_swiglu,
    reference_swiglu_pair,
    settings_for,
    swiglu_backward,
    swiglu_forward,
    swiglu_pair,
    swiglu_pair_backward,
    swiglu_pair_forward,
)
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = [
    pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # the interpreter's numpy
]

fused = swiglu.swiglu
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# --- against fp64 -------------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=FP64) * scale).to(device=device, dtype=dtype).requires_grad_()


def close(name: str, got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """The rounding to got's dtype, half a unit of the last place, and a little of the terms added up in fp32."""
    assert not got.isnan().any(), f"{name}: unwritten elements"
    info, narrow = torch.finfo(got.dtype), torch.finfo(FP64 if got.dtype == FP64 else FP32)
    unit = torch.exp2(exact.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps
    allowed = 0.5 * unit + 8 * narrow.eps * (exact.abs() + terms) + narrow.smallest_normal
    worst = ((got.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{name} is {worst:.2f} times as far off as allowed"


def exact_results(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """y and the gradients of gate and up in fp64, and the sizes of the terms that they are sums of."""
    leaves = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    y = F.silu(leaves[0]) * leaves[1]
    grads = torch.autograd.grad(y, leaves, dy.double())
    g, u, dy = leaves[0].detach(), leaves[1].detach(), dy.double()
    s = torch.sigmoid(g)
    # An exponent of g / ln 2 has an error of its size times eps, which the exponential makes a relative one.
    sized = s * (1 + g.abs())
    terms = [(g * u).abs() * sized, (dy * u).abs() * sized * (1 + g.abs()), (dy * g).abs() * sized]
    return [y.detach(), *grads], terms


def check(gate_up: Tensor, pairs: bool = True) -> None:
    """`swiglu` of gate_up; then `swiglu_pair` of its halves, where they are and in other memory."""
    gate, up = gate_up.detach().chunk(2, -1)
    dy = torch.randn(gate.shape, device=gate.device).to(gate.dtype)
    exact, terms = exact_results(gate, up, dy)
    y = fused(gate_up)
    assert y.dtype == gate_up.dtype and y.is_contiguous()
    (grad,) = torch.autograd.grad(y, [gate_up], dy)
    assert grad.dtype == gate_up.dtype and grad.shape == gate_up.shape
    got = [y, *grad.chunk(2, -1)]
    for name, *rest in zip(("y", "gate's gradient", "up's gradient"), got, exact, terms):
        close(name, *rest)
    for halves in ((gate, up), (gate.clone(), up.clone())) if pairs else ():
        leaves = [x.requires_grad_() for x in halves]
        y = swiglu_pair(*leaves)
        assert all(torch.equal(a, b) for a, b in zip([y, *torch.autograd.grad(y, leaves, dy)], got))


WIDTHS = [1, 2, 8, 31, 100, 255, 257, 1000, 1026]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(device: str, guarded: None, width: int, dtype: torch.dtype) -> None:
    for shape in [(2 * width,), (1, 2 * width), (2, 9, 2 * width)]:
        check(numbers(*shape, dtype=dtype, device=device, scale=3.0), pairs=len(shape) == 3)


@pytest.mark.parametrize("width", [*MODELS.values(), 28673])
def test_widths_of_the_models(device: str, guarded: None, width: int) -> None:
    check(numbers(2, 2 * width, dtype=BF16, device=device, scale=2.0), pairs=False)


def test_tiles_fit_the_models() -> None:
    """The idle part of a row's last tile is below a sixteenth; a thread loads 16 bytes of bf16."""
    for width in (*MODELS.values(), 5504, 6912, 14336, 3584):
        s = settings_for(width)
        assert -width % s.columns * 16 <= width
    for width in range(1, 3000):
        s = settings_for(width)
        assert s.rows * s.columns == TILE == s.warps * 32 * 8 and (s.columns < 2 * width or width == 1)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-3, 30.0, 1e4, 1e18])
def test_any_magnitude(device: str, guarded: None, scale: float) -> None:
    """To where exp(-gate) leaves fp32, and far beyond."""
    for dtype in (BF16, FP32):
        gate_up = torch.randn(5, 200, dtype=FP64) * torch.tensor([scale] * 100 + [1.0] * 100)
        gate_up[:, :100] = gate_up[:, :100].where((gate_up[:, :100] + 90).abs() > 4, -80.0)  # see the next test
        check(gate_up.to(dtype).to(device).requires_grad_())


def test_where_the_exponential_ends(device: str) -> None:
    gate = torch.linspace(-130, -80, 501, device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate))).requires_grad_()
    y = fused(gate_up)
    (grad,) = torch.autograd.grad(y.sum(), [gate_up])
    exact = F.silu(gate.double())
    assert (y.double() - exact).abs().max() < 3e-37 and grad.abs().max() < 1e-30 and grad.isfinite().all()


def test_bf16_is_the_rounding_of_fp64(device: str, ulps: Callable[[Tensor, Tensor], float]) -> None:
    """The stated bounds: half a unit of the last place and a thousandth for y and up's gradient, of every bf16 gate.

    Where the gradient of silu crosses 0, at -1.28, its terms cancel: there half a unit of 2^-16.
    """
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    gate = bits[(bits.double().abs() < 80) & (bits.double().abs() > 1e-30)].to(device)
    up, dy = torch.randn(2, gate.numel(), device=device).to(BF16)
    gate_up = torch.stack((gate, up)).flatten().requires_grad_()
    y = fused(gate_up)
    d_gate, d_up = torch.autograd.grad(y, [gate_up], dy)[0].chunk(2)
    (want, want_gate, want_up), _ = exact_results(gate, up, dy)
    assert ulps(y, want) <= 0.501 and ulps(d_up, want_up) <= 0.501
    silu_slope = want_gate / (dy.double() * up.double())
    away = silu_slope.abs() > 2**-8
    assert ulps(d_gate[away], want_gate[away]) <= 0.502
    near = ~away & (gate.double() > -8)
    assert near.any()
    assert (((d_gate - want_gate) / (dy.double() * up.double()))[near].abs() <= 2**-17).all()


def test_gradcheck(device: str) -> None:
    gate_up = numbers(3, 10, dtype=FP64, device=device)
    assert torch.autograd.gradcheck(fused, (gate_up,))
    gate, up = numbers(3, 5, dtype=FP64, device=device), numbers(3, 5, dtype=FP64, device=device)
    assert torch.autograd.gradcheck(swiglu_pair, (gate, up))


def test_the_reference_is_the_models(device: str) -> None:
    """In fp32 to the last bits; in bf16 the model's rounds twice, the kernel's and its reference once."""
    ops = pytest.importorskip("llama2cli.nn.ops")
    x = torch.randn(40, 400, device=device)
    plain = getattr(ops, "plain_swiglu", ops.swiglu)
    assert torch.allclose(reference_swiglu(x), plain(x), rtol=1e-6)
    assert torch.allclose(fused(x), plain(x), rtol=1e-5, atol=1e-7)
    low = x.bfloat16()
    assert torch.allclose(fused(low), plain(low), rtol=2**-6, atol=1e-30)
    assert (fused(low) != reference_swiglu(low)).float().mean() < 0.001


@pytest.mark.parametrize("kinds", [(BF16, FP32), (FP32, BF16), (FP16, FP32), (BF16, FP16), (FP32, FP64)], ids=str)
def test_mixed_dtypes(device: str, guarded: None, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    gate, up = (numbers(4, 70, dtype=kind, device=device) for kind in kinds)
    y = swiglu_pair(gate, up)
    assert y.dtype == torch.promote_types(*kinds) == reference_swiglu_pair(gate, up).dtype
    dy = torch.randn_like(y)
    exact, terms = exact_results(gate, up, dy)
    got = [y, *torch.autograd.grad(y, [gate, up], dy)]
    assert [g.dtype for g in got[1:]] == list(kinds)
    for name, g, e, t in zip(("y", "gate", "up"), got, exact, terms):
        close(name, g, e, t)


# --- values that spread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_torchs(device: str, value: float) -> None:
    x, dy = torch.randn(5, 200, device=device), torch.randn(5, 100, device=device)
    x[0, 7], x[1, 170], x[2, 50], x[2, 150] = value, value, value, -value
    x[4, 3], x[4, 103] = value, 0.0
    dy[3, 11] = value
    results = []
    for form in (fused, reference_swiglu):
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf], dy)))
    for got, want in zip(*results):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert torch.equal(got.sign(), want.sign()) or bool(got.isnan().any())
    assert int((~results[0][0].isfinite()).sum()) <= 5  # they stay where they are


def test_overflow_of_fp16_is_infinite(device: str) -> None:
    x = torch.tensor([300.0, -200.0, 300.0, 300.0], dtype=FP16, device=device)
    assert fused(x).tolist() == [math.inf, 0.0]


# --- layouts ------------------------------------------------------------------------------------------------------


def layouts(device: str, width: int) -> dict[str, Tensor]:
    """[2, 6, width] with anything but neighbours."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(BF16)

    return {
        "rows of a wider buffer": new(2, 6, width + 30)[..., 7 : 7 + width],
        "every other row": new(2, 12, width)[:, ::2],
        "axes swapped": new(6, 2, width).transpose(0, 1),
        "columns first": new(width, 6, 2).permute(2, 1, 0),
        "every other column": new(2, 6, 2 * width)[..., ::2],
        "one row for all": new(width).expand(2, 6, width),
        "one value for all": new(1).expand(2, 6, width),
    }


def test_layouts(device: str, guarded: None) -> None:
    for name, x in layouts(device, 48).items():
        for dy in (layouts(device, 24)[name], torch.randn(2, 6, 24, device=device).to(BF16)):
            leaf, plain = x.detach().requires_grad_(), x.contiguous().requires_grad_()
            got, want = fused(leaf), fused(plain)
            assert got.is_contiguous() and torch.equal(got, want), name
            d_got, d_want = (torch.autograd.grad(*args) for args in ((got, [leaf], dy), (want, [plain], dy.clone())))
            assert torch.equal(d_got[0], d_want[0]), name
            gate, up = x.detach().requires_grad_(), layouts(device, 48)["axes swapped"].requires_grad_()
            got, want = swiglu_pair(gate, up), swiglu_pair(gate.contiguous(), up.contiguous())
            assert torch.equal(got, want), name


def test_halves_are_not_copied() -> None:
    wide = torch.empty(6, 130, dtype=BF16, device="meta")
    (made,) = registry.record(swiglu_forward, wide[:, 16:112])
    assert made.arguments["g_stride"] == 130 and made.arguments["U"] is None
    (made,) = registry.record(swiglu_pair_backward, wide[:, :48], wide[:, 48:96], wide[:, 82:])
    assert [made.arguments[n] for n in ("y_stride", "g_stride", "u_stride")] == [130] * 3
    assert made.arguments["G"].storage_offset() == 48


def test_rows_far_apart(device: str) -> None:
    """Offsets beyond 2^31 elements, of strides below. The memory between the rows is asked for and never touched."""
    far = 2**30 + 32
    try:
        buffer = torch.empty(3 * far + 128, dtype=FP16, device=device)
    except RuntimeError:
        pytest.skip("no room for an address range of 6 GB")
    x, rows = buffer.as_strided((4, 128), (far, 1)), torch.randn(4, 128, device=device).half()
    for i in range(4):
        x[i] = rows[i]
    assert torch.equal(swiglu_forward(x), swiglu_forward(rows))
    assert torch.equal(swiglu_backward(x[:, :64], x), swiglu_backward(rows[:, :64], rows))
    gate, up = x[:, :64], x[:, 64:]
    assert torch.equal(swiglu_pair_forward(gate, up), swiglu_forward(rows))


def test_programs_of_large_tensors_are_numbered_in_one_axis() -> None:
    """The other axes of a grid end at 65,535; 70b's projection of 2^17 tokens has more than 2^32 elements."""
    x = torch.empty(2**17, 57344, dtype=BF16, device="meta")
    (made,) = registry.record(swiglu_forward, x)
    assert made.grid == (2**17 * 14,)


def test_nothing_to_do(device: str) -> None:
    for shape in [(0, 8), (2, 0, 8), (3, 0)]:
        x = torch.empty(shape, device=device, requires_grad=True)
        y = fused(x)
        assert y.shape == (*shape[:-1], shape[-1] // 2)
        (dx,) = torch.autograd.grad(y.sum(), [x])
        assert dx.shape == shape
        assert swiglu_pair(x, x).shape == shape


def test_what_does_not_fit_is_refused(device: str) -> None:
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match="two halves, its last axis is 7"):
        fused(x[:, :7])
    with pytest.raises(ValueError, match="no axis"):
        fused(x[0, 0])
    with pytest.raises(TypeError, match=r"gate_up is torch\.int64"):
        fused(x.long())
    with pytest.raises(ValueError, match=r"gate \(3, 8\) and up \(3, 4\)"):
        swiglu_pair(x, x[:, :4])
    with pytest.raises(TypeError, match=r"up is torch\.int32"):
        swiglu_pair(x, x.int())
    if device == "cuda":
        with pytest.raises(ValueError, match="up on cpu"):
            swiglu_pair(x, x.cpu())


def test_a_second_derivative_is_refused(device: str) -> None:
    x = numbers(2, 8, dtype=FP32, device=device)
    (dx,) = torch.autograd.grad(fused(x).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_what_is_kept_is_the_input_unchanged(device: str) -> None:
    """A second backward pass gives the same bits: the first has written over nothing."""
    x, dy = numbers(20, 96, dtype=BF16, device=device), torch.randn(20, 48, device=device).to(BF16)
    before, kept = x.detach().clone(), []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = fused(x)
    assert [k.data_ptr() for k in kept] == [x.data_ptr()]
    first = torch.autograd.grad(y, [x], dy, retain_graph=True)
    again = torch.autograd.grad(y, [x], dy)
    assert torch.equal(first[0], again[0]) and torch.equal(x, before)


# --- as an operator of torch --------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    x = numbers(3, 40, dtype=FP32, device=device)
    low = numbers(3, 80, dtype=BF16, device=device)[:, ::2]
    torch.library.opcheck(swiglu_forward, (x,))
    torch.library.opcheck(swiglu_forward, (low,))
    torch.library.opcheck(swiglu_backward, (x.detach()[:, :20], x.detach()))
    torch.library.opcheck(swiglu_pair_forward, (x, low))
    torch.library.opcheck(swiglu_pair_backward, (x.detach(), x.detach(), low.detach()))


def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A feed-forward layer, and one with projections apart, with ordinary operators around them."""
    y = fused(torch.sin(x) @ w) @ v + x
    gate, up = (y.cos() @ w).chunk(2, -1)
    return swiglu_pair(gate, up) @ v + y


def block_inputs(device: str, rows: int = 6, dtype: torch.dtype = FP32) -> list[Tensor]:
    return [numbers(*shape, dtype=dtype, device=device, scale=0.5) for shape in [(rows, 16), (16, 48), (24, 16)]]


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
        assert same(results(compiled, inputs), results(block, inputs), 1e-4)


@pytest.mark.slow
def test_compiled_by_inductor(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for dtype, tolerance in ((FP32, 1e-5), (BF16, 0.03)):  # in bf16 Inductor rounds less often
        inputs = block_inputs(device, dtype=dtype)
        for got, want in zip(results(compiled, inputs), results(block, inputs)):
            assert (got - want).norm() < tolerance * want.norm()
    both = torch.compile(lambda *x: checkpoint(block, *x, use_reentrant=False), fullgraph=True)
    inputs = block_inputs(device)
    assert same(results(both, inputs), results(block, inputs), 1e-4)


def launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a call launches."""
    names: list[str] = []

    def noted(kernel: object) -> object:
        names.append(kernel.fn.__name__)  # type: ignore[attr-defined]
        return registry.launch(kernel)

    with monkeypatch.context() as m:
        m.setattr(swiglu, "launch", noted)
        call()
    return names


def test_checkpointing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block_inputs(device)
    want = results(block, inputs)
    got: list[Tensor] = []
    again = lambda *x: checkpoint(block, *x, use_reentrant=False)  # noqa: E731
    names = launches(lambda: got.extend(results(again, inputs)), monkeypatch)
    assert same(got, want) and sorted(names) == ["_backward"] * 2 + ["_forward"] * 4

    def save_ours(context: object, operator: object, *args: object, **named: object) -> CheckpointPolicy:
        ours = torch.ops.llama2_kernels.swiglu.default, torch.ops.llama2_kernels.swiglu_pair.default
        return CheckpointPolicy.MUST_SAVE if operator in ours else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(*x: Tensor) -> Tensor:
        return checkpoint(
            block, *x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_ours)
        )

    got.clear()
    names = launches(lambda: got.extend(results(selective, inputs)), monkeypatch)
    assert same(got, want) and names.count("_forward") == 2  # kept, not computed again


@pytest.mark.parametrize("kind", [BF16, FP16], ids=str)
def test_under_autocast(device: str, kind: torch.dtype) -> None:
    """Dtype in, dtype out: what a projection gives in 16 bits stays in 16 bits."""
    inputs = block_inputs(device)
    with torch.autocast(device, kind):
        low = inputs[0] @ inputs[1]
        assert low.dtype == fused(low).dtype == kind
        out = block(*inputs)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(g.dtype == FP32 for g in grads)
    with torch.autocast(device, kind), pytest.MonkeyPatch.context() as m:
        m.setitem(block.__globals__, "fused", reference_swiglu)
        m.setitem(block.__globals__, "swiglu_pair", reference_swiglu_pair)
        out = block(*inputs)
    for g, v in zip(grads, torch.autograd.grad(out.float().square().sum(), inputs)):
        assert (g - v).norm() < 0.02 * v.norm()


def test_without_gradients(device: str) -> None:
    x = torch.randn(3, 24, device=device)
    want = fused(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fused(x), want)


# --- in processes of their own ------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from llama2_kernels import swiglu as s

def step(x, dy):
    gate, up = x.chunk(2, -1)
    return (s.swiglu_forward.launcher(x), s.swiglu_backward.launcher(dy, x),
            s.swiglu_pair_forward.launcher(gate, up), *s.swiglu_pair_backward.launcher(dy, gate, up))

for symbolic in (False, True):
    for width in (63, 11008):
        env, rows, name = ShapeEnv(), 40, ConstantSource("rows")
        if symbolic:
            rows = env.create_symintnode(env.create_symbol(40, name), hint=40, source=name)
        with FakeTensorMode(shape_env=env):
            x, dy = (torch.empty(5, rows, n, dtype=torch.bfloat16, device="cuda") for n in (2 * width, width))
            code = make_fx(step, tracing_mode="symbolic")(x, dy).code
        assert code.count("triton_kernel_wrapper_mutation(") == 4 and "clone" not in code, code
        assert not env.replacements, "compiled for one number of rows"
"""


@pytest.mark.slow
@pytest.mark.skipif(not registry.INTERPRET, reason="compiled here anyway")
def test_the_compiled_form_can_be_traced(compiler_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], env=compiler_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
