"""Rotary positions against complex numbers in fp64, in every layout and dtype, and in the middle of training."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from llama2_kernels import registry
from llama2_kernels import rope as module
from llama2_kernels.rope import (
    MODELS,
    TILE,
    reference_rope,
    reference_rope_qkv,
    rope,
    rope_forward,
    rope_join,
    rope_qkv,
    rope_split,
    settings_for,
)
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = [
    pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # the interpreter's numpy
]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# --- against fp64 -------------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=FP64) * scale).to(device=device, dtype=dtype).requires_grad_()


def table(width: int, n: int, device: str, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(n, dtype=FP64), 10000.0 ** -(torch.arange(0, width, 2, dtype=FP64) / width))
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def packed(B: int, T: int, n: int, device: str) -> Tensor:
    """Positions of texts packed into rows: they restart, at other places in each row, and one text begins late."""
    rows = []
    for _ in range(B):
        ends = sorted({0, T, *torch.randint(0, T + 1, (3,)).tolist()})
        rows.append(torch.cat([torch.arange(e - s) for s, e in pairwise(ends)]))
    positions = torch.stack(rows)
    positions[-1] += n - 1 - int(positions.max())
    return positions.to(device)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, sign: int = 1) -> Tensor:
    """A pair of coordinates is a complex number, and turning it a product with another."""
    at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if positions is None else positions.long()
    turn = torch.complex(cos.double(), sign * sin.double())[at][:, :, None]
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).transpose(-1, -2)
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (out if interleaved else out.transpose(-1, -2)).flatten(-2)


def close(name: str, got: Tensor, exact: Tensor, x: Tensor) -> None:
    """The rounding to got's dtype, half a unit of the last place, and a little of the two products added up in fp32."""
    assert not got.isnan().any(), f"{name}: unwritten elements"
    info, narrow = torch.finfo(got.dtype), torch.finfo(FP64 if got.dtype == FP64 else FP32)
    unit = torch.exp2(exact.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps
    size = x.double().abs().amax(-1, keepdim=True)
    allowed = 0.5 * unit + 4 * narrow.eps * size + narrow.smallest_normal
    worst = ((got.double() - exact).abs() / allowed).max() if got.numel() else torch.zeros(())
    assert worst <= 1, f"{name} is {worst:.2f} times as far off as allowed"


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> None:
    """Both results and both gradients."""
    got = rope(q, k, cos, sin, positions, interleaved)
    grads = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in got]
    back = torch.autograd.grad(got, [q, k], grads)
    for name, x, y, dy, dx in zip("qk", (q, k), got, grads, back):
        assert y.dtype == x.dtype == dx.dtype and y.shape == x.shape == dx.shape and y.is_contiguous()
        x = x.detach()
        close(name, y.detach(), turned(x, cos, sin, positions, interleaved), x)
        close(f"gradient of {name}", dx, turned(dy, cos, sin, positions, interleaved, -1), dy)


HEADS = [(1, 1), (3, 3), (4, 2), (8, 1), (12, 4), (9, 3)]
WIDTHS = [2, 4, 6, 16, 48, 64, 80, 128, 256]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(device: str, guarded: None, width: int, interleaved: bool) -> None:
    turn = WIDTHS.index(width) + interleaved
    for i, dtype in enumerate((FP16, FP32) if turn % 2 else (BF16, FP64)):
        T = (1, 5, 8, 11)[(turn + i) % 4]
        q, k = numbers(2, T, 4, width, dtype=dtype, device=device), numbers(2, T, 2, width, dtype=dtype, device=device)
        cos, sin = table(width, 40, device, FP64 if dtype == FP64 else FP32)
        check(q, k, cos, sin, packed(2, T, 40, device) if i % 2 else None, interleaved)


@pytest.mark.parametrize("heads", HEADS)
def test_any_heads(device: str, guarded: None, heads: tuple[int, int]) -> None:
    cos, sin = table(16, 30, device)
    for B, T, interleaved in ((2, 11, False), (1, 5, True), (3, 1, True)):
        q, k = (numbers(B, T, n, 16, dtype=BF16, device=device) for n in heads)
        check(q, k, cos, sin, packed(B, T, 30, device), interleaved)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_heads_of_the_models(device: str, guarded: None, model: str, interleaved: bool) -> None:
    H, G, K = MODELS[model]
    q, k = numbers(1, 3, H, K, dtype=BF16, device=device), numbers(1, 3, G, K, dtype=BF16, device=device)
    check(q, k, *table(K, 4096, device), torch.tensor([[4095, 0, 77]], device=device), interleaved)


def test_tiles_fit_the_models() -> None:
    """Eight heads share what is read of the table, none idles; 16 elements a thread, two loads of 16 bytes in bf16."""
    for heads in MODELS.values():
        s = settings_for(*heads)
        assert (s.heads, s.tokens, s.half) == (8, 2, 64) and s.warps * 32 * 16 == TILE
    assert settings_for(8, 1, 128).heads == 2 and settings_for(12, 12, 128).heads == 4


@pytest.mark.parametrize("kinds", [(BF16, FP32, FP32), (FP32, BF16, FP32), (BF16, BF16, BF16), (FP16, FP64, FP64)])
def test_mixed_dtypes(device: str, guarded: None, kinds: tuple[torch.dtype, ...]) -> None:
    """Of q, k and the table."""
    q, k = (numbers(2, 5, n, 16, dtype=kind, device=device) for n, kind in zip((4, 2), kinds))
    check(q, k, *table(16, 9, device, kinds[2]), None, False)
    check(q, k, *table(16, 9, device, kinds[2]), packed(2, 5, 9, device).int(), True)


def test_bf16_is_the_rounding_of_fp64(device: str, ulps: Callable[[Tensor, Tensor], float]) -> None:
    """The stated bound: half a unit of the last place and a fiftieth, where the two products do not cancel."""
    q = numbers(1, 64, 8, 64, dtype=BF16, device=device).detach()
    cos, sin = table(64, 64, device)
    for interleaved in (False, True):
        got, _ = rope(q, q, cos, sin, None, interleaved)
        exact = turned(q, cos, sin, None, interleaved)
        whole = exact.abs() > q.double().abs().amax() * 2**-10
        assert whole.float().mean() > 0.98
        assert ulps(got[whole], exact[whole]) <= 0.52
        assert torch.equal(got[:, 0], q[:, 0])  # position 0 is left as it is, bit for bit


def test_gradcheck(device: str) -> None:
    """First and second derivatives."""
    q, k = numbers(1, 2, 2, 4, dtype=FP64, device=device), numbers(1, 2, 1, 4, dtype=FP64, device=device)
    qkv = numbers(1, 2, 4, 4, dtype=FP64, device=device)
    cos, sin = table(4, 5, device, FP64)
    positions = torch.tensor([[4, 1]], device=device)
    turn = lambda q, k: rope(q, k, cos, sin, positions, True)  # noqa: E731
    parts = lambda qkv: rope_qkv(qkv, 1, cos, sin, positions)  # noqa: E731
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(turn, (q, k), fast_mode=True) and check(parts, (qkv,), fast_mode=True)


def test_the_way_back(device: str) -> None:
    """Turned and turned back; lengths stay; scores depend on distances alone."""
    q, k = numbers(2, 9, 4, 32, dtype=FP64, device=device), numbers(2, 9, 4, 32, dtype=FP64, device=device)
    cos, sin = table(32, 200, device, FP64)
    for interleaved in (False, True):
        a, b = rope(q, k, cos, sin, None, interleaved)
        again = rope_forward(a, b, cos, sin, None, interleaved, True)
        assert torch.allclose(again[0], q) and torch.allclose(again[1], k)
        assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1))
        far = torch.arange(9, device=device).expand(2, 9) + 190
        c, d = rope(q, k, cos, sin, far, interleaved)
        assert torch.allclose(torch.einsum("bthk,bshk->bhts", a, b), torch.einsum("bthk,bshk->bhts", c, d))


def test_the_references_are_the_models(device: str) -> None:
    ops = pytest.importorskip("llama2cli.nn.ops")
    q, k = (torch.randn(2, 11, n, 8, device=device).bfloat16() for n in (4, 2))
    cos, sin = (x.to(device) for x in ops.rope_table(8, 10000.0, 64))
    for positions in (None, packed(2, 11, 64, device)):
        want = ops.plain_rope(q, k, cos, sin, positions)
        for a, b, c in zip(reference_rope(q, k, cos, sin, positions), want, rope(q, k, cos, sin, positions)):
            assert torch.equal(a, b) and (c != b).float().mean() < 0.01


def test_the_two_layouts_are_a_permutation_apart(device: str) -> None:
    """As a checkpoint in Meta's layout is brought into that of Hugging Face: even coordinates first, then odd ones."""
    q = torch.randn(2, 5, 4, 12, device=device)
    cos, sin = table(12, 5, device)
    order = torch.arange(12, device=device).view(6, 2).t().flatten()
    meta = rope(q, q, cos, sin, None, True)[0]
    assert torch.equal(rope(q[..., order], q, cos, sin)[0], meta[..., order])
    want = turned(q, cos, sin, None, True)
    assert torch.allclose(reference_rope(q, q, cos, sin, None, True)[0].double(), want, atol=1e-6)


# --- one projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 1), (12, 4)])
def test_a_fused_projection(device: str, guarded: None, heads: tuple[int, int]) -> None:
    """`rope_qkv` is `rope` of its parts; its gradient is theirs side by side."""
    H, G = heads
    for T, width, dtype, interleaved in ((1, 16, BF16, True), (5, 20, FP32, False), (6, 16, FP16, True)):
        qkv = numbers(2, T, H + 2 * G, width, dtype=dtype, device=device)
        cos, sin = table(width, 30, device)
        positions = packed(2, T, 30, device) if T > 1 else None
        q, k, v = rope_qkv(qkv, G, cos, sin, positions, interleaved)
        parts = [x.detach().requires_grad_() for x in qkv.split([H, G, G], dim=2)]
        want = rope(parts[0], parts[1], cos, sin, positions, interleaved)
        assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and torch.equal(v, parts[2])
        for a, b in zip(reference_rope_qkv(qkv, G, cos, sin, positions, interleaved), (q, k, v)):
            assert torch.allclose(a, b, rtol=0.01, atol=1e-6)
        # Gradients in attention's layout: heads before positions.
        dq, dk, dv = (torch.randn(2, x.shape[2], T, width, device=device).to(dtype).transpose(1, 2) for x in (q, k, v))
        (got,) = torch.autograd.grad([q, k, v], [qkv], [dq, dk, dv])
        assert got.is_contiguous()
        back = torch.autograd.grad(want, parts[:2], [dq, dk])
        assert torch.equal(got, torch.cat((*back, dv), dim=2))


def test_the_projection_is_set_free(device: str) -> None:
    """What `rope_qkv` gives and keeps shares no memory with its input."""
    kept: list[Tensor] = []
    qkv = numbers(1, 4, 6, 8, dtype=FP32, device=device)

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = rope_qkv(qkv, 2, *table(8, 4, device))
    memory = {x.untyped_storage().data_ptr() for x in (*out, *kept)}
    assert qkv.untyped_storage().data_ptr() not in memory and len({x.data_ptr() for x in out}) == 3


# --- values that spread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_nan_and_inf_stay_in_their_pair(device: str, value: float, interleaved: bool) -> None:
    q, k = torch.randn(2, 5, 4, 12, device=device), torch.randn(2, 5, 2, 12, device=device)
    q[0, 1, 2, 3], k[1, 4, 0, 10] = value, value
    cos, sin = table(12, 5, device)
    for got, want in zip(rope(q, k, cos, sin, None, interleaved), reference_rope(q, k, cos, sin, None, interleaved)):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert int((~got.isfinite()).sum()) == 2


def test_a_position_outside_the_table_is_nan(device: str) -> None:
    """Its memory is not read, and no neighbour suffers."""
    q = torch.randn(2, 3, 2, 8, device=device)
    cos, sin = table(8, 10, device)
    positions = torch.tensor([[0, 9, 10], [-1, 2**31, 3]], device=device)
    wrong = torch.tensor([[False, False, True], [True, True, False]], device=device)
    for interleaved in (False, True):
        for got in rope(q, q, cos, sin, positions, interleaved):
            assert torch.equal(got.isnan().all(-1).all(-1), wrong) and torch.equal(got.isnan().any(-1).any(-1), wrong)


# --- layouts ------------------------------------------------------------------------------------------------------


def layouts(device: str, n: int) -> dict[str, Tensor]:
    """[2, 6, n, 16] with anything but neighbours."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(BF16)

    return {
        "heads of a fused projection": new(2, 6, n + 5, 16)[:, :, 2 : n + 2],
        "heads before positions": new(2, n, 6, 16).transpose(1, 2),
        "positions before rows": new(6, 2, n, 16).transpose(0, 1),
        "every other position": new(2, 12, n, 16)[:, ::2],
        "a part of wider heads": new(2, 6, n, 21)[..., 3:19],
        "coordinates apart": new(2, 6, n, 32)[..., ::2],
        "coordinates first": new(16, n, 6, 2).permute(3, 2, 1, 0),
        "one head for all": new(2, 6, 1, 16).expand(2, 6, n, 16),
        "one value for all": new(1).expand(2, 6, n, 16),
    }


def test_layouts(device: str, guarded: None) -> None:
    cos, sin = table(16, 40, device)
    positions = packed(2, 12, 40, device)[:, ::2]
    for i, ((name, q), k) in enumerate(zip(layouts(device, 4).items(), reversed(layouts(device, 2).values()))):
        interleaved = i % 2 == 0
        inputs, plain = [[x.detach().requires_grad_() for x in (q, k)] for _ in range(2)]
        got = rope(inputs[0], inputs[1], cos, sin, positions, interleaved)
        a, b = (x.contiguous() for x in plain)
        want = rope(a, b, cos, sin, positions.contiguous(), interleaved)
        grads = [layouts(device, 4)[name], torch.randn(2, 6, 2, 16, device=device).to(BF16)]
        d_got = torch.autograd.grad(got, inputs, grads)
        d_want = torch.autograd.grad(want, plain, [g.contiguous() for g in grads])
        for a, b in zip((*got, *d_got), (*want, *d_want)):
            assert torch.equal(a, b), name
    wide = torch.randn(40, 20, device=device)
    q = torch.randn(2, 6, 4, 16, device=device)
    for cos, sin in ((wide[:, :8], wide[:, 8:16]), (wide[:, ::2][:, :8], wide.t()[:8].contiguous().t())):
        got, want = rope(q, q, cos, sin), rope(q, q, cos.contiguous(), sin.contiguous())
        assert torch.equal(got[0], want[0])
    one = torch.tensor([[3, 0, 1, 2, 9, 4]], device=device).expand(2, 6)
    assert torch.equal(rope(q, q, cos, sin, one)[0], rope(q, q, cos, sin, one.contiguous())[0])


def test_views_are_not_copied() -> None:
    qkv = torch.empty(2, 6, 16, 128, dtype=BF16, device="meta")
    q, k, _ = qkv.split([8, 4, 4], dim=2)
    cos = torch.empty(10, 64, device="meta")
    (made,) = registry.record(rope_forward, q, k, cos, cos, None, False, False)
    assert made.grid == (2 * 3, 2) and made.arguments["V"] is None and made.arguments["POS"] is None
    for name in "qk":
        assert [made.arguments[f"{name}_{axis}"] for axis in ("row", "token", "head")] == [6 * 2048, 2048, 128]
    assert made.arguments["K"].storage_offset() == 8 * 128
    grads = [torch.empty(2, n, 6, 128, dtype=BF16, device="meta").transpose(1, 2) for n in (8, 4, 4)]
    (made,) = registry.record(rope_join, *grads, cos, cos, None, False, True)
    assert [made.arguments[f"v_{axis}"] for axis in ("row", "token", "head")] == [4 * 6 * 128, 128, 6 * 128]
    assert made.grid == (2 * 4, 2) and made.arguments["OK"] is None


def test_more_rows_than_a_grid_has(device: str, guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = table(8, 9, device)
    qkv = numbers(5, 3, 6, 8, dtype=FP32, device=device)
    want = rope_qkv(qkv, 1, cos, sin), rope_qkv(qkv, 1, cos, sin, packed(5, 3, 9, device))
    torch.manual_seed(0)
    positions = None, packed(5, 3, 9, device)
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    for p in positions:
        q, k, _ = qkv.detach().split([4, 1, 1], dim=2)
        check(q.requires_grad_(), k.requires_grad_(), cos, sin, p, False)
    assert all(torch.equal(a, b) for a, b in zip(rope_qkv(qkv, 1, cos, sin), want[0]))


def test_positions_far_apart(device: str) -> None:
    """Offsets beyond 2^31 elements, of strides below, from row, token or head to the next. What lies between is memory
    that is asked for and never touched.
    """
    far = 2**30 + 32
    try:
        buffer = torch.empty(3 * far + 4096, dtype=FP16, device=device)
    except RuntimeError:
        pytest.skip("no room for an address range of 6 GB")
    cos, sin = table(16, 4, device)
    rows = torch.randn(4, 4, 4, 16, device=device).half()
    rest = cos, sin, None, False, False
    want, joined = rope(rows, rows, cos, sin)[0], rope_join(rows, rows, rows, *rest)
    for strides in ((far, 64, 16, 1), (256, far, 16, 1), (256, 64, far, 1)):
        x = buffer.as_strided((4, 4, 4, 16), strides)
        x.copy_(rows)
        assert all(torch.equal(got, want) for got in rope(x, x, cos, sin))
        assert torch.equal(rope_join(x, x, x, *rest), joined)


def test_nothing_to_do(device: str) -> None:
    cos, sin = table(8, 4, device)
    for B, T in ((0, 3), (2, 0)):
        q, k = torch.empty(B, T, 4, 8, device=device, requires_grad=True), torch.empty(B, T, 2, 8, device=device)
        a, b = rope(q, k, cos, sin)
        assert a.shape == q.shape and b.shape == k.shape
        assert torch.autograd.grad(a.sum(), [q])[0].shape == q.shape
    q, none = torch.randn(1, 3, 4, 8, device=device), torch.empty(1, 3, 0, 8, device=device)
    assert torch.equal(rope(q, none, cos, sin)[0], rope(q, q, cos, sin)[0])
    assert torch.equal(rope(none, q, cos, sin)[1], rope(q, q, cos, sin)[0])


def test_what_does_not_fit_is_refused(device: str) -> None:
    q, k = torch.randn(2, 5, 4, 8, device=device), torch.randn(2, 5, 2, 8, device=device)
    cos, sin = table(8, 9, device)
    at = torch.zeros(2, 5, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"an even width\], got q \(2, 5, 4, 8\), k \(2, 4, 2, 8\)"):
        rope(q, k[:, :4], cos, sin)
    with pytest.raises(ValueError, match="even width"):
        rope(q[..., :7], k[..., :7], cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match="even width"):
        rope(q[0], k[0], cos, sin)
    with pytest.raises(ValueError, match=r"cos \[positions, 4\], got \(9, 2\)"):
        rope(q, k, cos[:, :2], sin)
    with pytest.raises(ValueError, match=r"sin \[positions, 4\], got \(8, 4\)"):
        rope(q, k, cos, sin[:8])
    with pytest.raises(ValueError, match="5 positions, the table ends at 3"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"positions \(2, 5\), got \(5,\)"):
        rope(q, k, cos, sin, at[0])
    with pytest.raises(TypeError, match=r"positions are torch\.float32"):
        rope(q, k, cos, sin, at.float())
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        rope(q.long(), k, cos, sin)
    with pytest.raises(ValueError, match="sin wants a gradient"):
        rope(q, k, cos, sin.clone().requires_grad_())
    for heads in (0, 2, 3):
        with pytest.raises(ValueError, match=f"4 heads are not queries and twice {heads}"):
            rope_qkv(q, heads, cos, sin)
    if device == "cuda":
        with pytest.raises(ValueError, match="positions are on cpu"):
            rope(q, k, cos, sin, at.cpu())


# --- as an operator of torch --------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    qkv = numbers(2, 3, 8, 8, dtype=FP32, device=device)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([4, 2, 2], dim=2))
    cos, sin = table(8, 9, device)
    rest = cos, sin, packed(2, 3, 9, device), True, False
    torch.library.opcheck(
        rope_forward, (q, k.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, None, False, False)
    )
    torch.library.opcheck(rope_split, (qkv, 2, *rest))
    torch.library.opcheck(rope_join, (q, k, v, *rest))


def block(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Attention with a projection taken apart, then with it whole, and ordinary operators around them."""
    B, T, _ = x.shape
    for whole in (False, True):
        qkv = (torch.sin(x) @ w).view(B, T, 8, 8)
        if whole:
            q, k, u = rope_qkv(qkv, 2, cos, sin, positions)
        else:
            q, k, u = qkv.split([4, 2, 2], dim=2)
            q, k = rope(q, k, cos, sin, positions, interleaved=True)
        q, k, u = (y.transpose(1, 2) for y in (q, k, u))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, u, is_causal=True, enable_gqa=True)
        x = x + o.transpose(1, 2).reshape(B, T, 32) @ v
    return x


def block_inputs(device: str, T: int = 6, dtype: torch.dtype = FP32) -> list[Tensor]:
    leaves = [numbers(*shape, dtype=dtype, device=device, scale=0.3) for shape in [(2, T, 16), (16, 64), (32, 16)]]
    return [*leaves, *table(8, 40, device), packed(2, T, 40, device)]


def results(form: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs[:3])]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 0.0) -> bool:
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


def test_compiled_whole(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 17):
        inputs = block_inputs(device, T)
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


def launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many kernels a call launches."""
    made: list[object] = []

    def noted(kernel: object) -> object:
        made.append(kernel)
        return registry.launch(kernel)

    with monkeypatch.context() as m:
        m.setattr(module, "launch", noted)
        call()
    return len(made)


def test_checkpointing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block_inputs(device)
    want: list[Tensor] = []
    assert launches(lambda: want.extend(results(block, inputs)), monkeypatch) == 4  # each once forward, once back
    got: list[Tensor] = []
    again = lambda *x: checkpoint(block, *x, use_reentrant=False)  # noqa: E731
    assert launches(lambda: got.extend(results(again, inputs)), monkeypatch) == 6
    assert same(got, want)

    def save_ours(context: object, operator: object, *args: object, **named: object) -> CheckpointPolicy:
        ours = torch.ops.llama2_kernels.rope.default, torch.ops.llama2_kernels.rope_split.default
        return CheckpointPolicy.MUST_SAVE if operator in ours else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(*x: Tensor) -> Tensor:
        return checkpoint(
            block, *x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_ours)
        )

    got.clear()
    assert launches(lambda: got.extend(results(selective, inputs)), monkeypatch) == 4  # kept, not computed again
    assert same(got, want)


@pytest.mark.parametrize("kind", [BF16, FP16], ids=str)
def test_under_autocast(device: str, kind: torch.dtype) -> None:
    """Dtype in, dtype out: neither are queries and keys in 16 bits cast up, nor is the table in fp32 cast down."""
    inputs = block_inputs(device)
    cos, sin, positions = inputs[3:]
    with torch.autocast(device, kind):
        qkv = (inputs[0] @ inputs[1]).view(2, 6, 8, 8)
        assert qkv.dtype == kind
        got = rope(qkv, qkv, cos, sin, positions)
        assert all(x.dtype == kind for x in (*got, *rope_qkv(qkv, 2, cos, sin, positions)))
        out = block(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, rope(qkv, qkv, cos, sin, positions)))
    grads = torch.autograd.grad(out.float().square().sum(), inputs[:3])
    assert all(g.dtype == FP32 for g in grads)
    for g, v in zip(grads, results(block, inputs)[1:]):
        assert (g - v).norm() < 0.03 * v.norm()


def test_without_gradients(device: str) -> None:
    q, (cos, sin) = torch.randn(2, 3, 4, 8, device=device), table(8, 3, device)
    want = rope(q, q, cos, sin)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(rope(q, q, cos, sin)[0], want)


def test_one_of_the_two_alone(device: str) -> None:
    q, k = (numbers(2, 3, 2, 8, dtype=FP32, device=device) for _ in range(2))
    cos, sin = table(8, 3, device)
    dk = torch.autograd.grad(rope(q, k, cos, sin)[1].square().sum(), [q, k], materialize_grads=True)
    assert not dk[0].any()
    alone = torch.autograd.grad(rope(q.detach(), k, cos, sin)[1].square().sum(), [k])
    assert torch.equal(dk[1], alone[0])


# --- in processes of their own ------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from llama2_kernels import rope as r

def step(qkv, cos, sin, positions):
    q, k, v = qkv.split([4, 2, 2], dim=2)
    a = r.rope_forward.launcher(q, k, cos, sin, positions, False, False)
    b = r.rope_split.launcher(qkv, 2, cos, sin, positions, True, False)
    return *a, *b, r.rope_join.launcher(*b, cos, sin, positions, False, True)

for symbolic in (False, True):
    for width in (20, 128):
        env, T, name = ShapeEnv(), 40, ConstantSource("T")
        if symbolic:
            T = env.create_symintnode(env.create_symbol(40, name), hint=40, source=name)
        with FakeTensorMode(shape_env=env):
            qkv = torch.empty(3, T, 8, width, dtype=torch.bfloat16, device="cuda")
            cos, sin = (torch.empty(100, width // 2, device="cuda") for _ in range(2))
            positions = torch.empty(3, T, dtype=torch.long, device="cuda")
            code = make_fx(step, tracing_mode="symbolic")(qkv, cos, sin, positions).code
        assert code.count("triton_kernel_wrapper_mutation(") == 3 and "clone" not in code, code
        assert not env.replacements, "compiled for one number of tokens"
"""


@pytest.mark.slow
@pytest.mark.skipif(not registry.INTERPRET, reason="compiled here anyway")
def test_the_compiled_form_can_be_traced(compiler_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], env=compiler_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LAYER = Path(__file__).with_name("fsdp_layer.py")


@pytest.mark.slow
@pytest.mark.skipif(not registry.INTERPRET, reason="two processes on CPU tensors")
def test_two_processes_share_the_parameters(tmp_path: Path) -> None:
    """FSDP2, bf16 parameters, gradients reduced in fp32, layers checkpointed: RoPE and SwiGLU, both forms of each."""
    command = [sys.executable, str(LAYER), str(tmp_path / "store")]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        assert "same" in out
