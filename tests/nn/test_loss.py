"""Head and cross-entropy in chunks against torch's own, in fp64 where it matters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama2cli.nn import loss, ops


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even of a few tokens, and several pieces within each."""
    monkeypatch.setattr(loss, "MIN_CHUNK", 3)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(loss, "SOFTMAX_LOGITS", 20)
    monkeypatch.setattr(loss, "HEAD_ROWS", 4)
    torch.manual_seed(0)


def case(N: int, D: int, V: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D, dtype=dtype).requires_grad_(), torch.randn(V, D, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,)), torch.rand(N, dtype=dtype)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    nll = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")  # ignores -100 by default
    return (nll if scale is None else nll * scale).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 9), st.integers(1, 13), st.booleans(), st.integers(0, 3), st.integers(0, 99))
def test_loss_and_gradients_are_torch_s(N: int, D: int, V: int, scaled: bool, ignored: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets, scale = case(N, D, V)
    targets[torch.rand(N) < ignored / 3] = -100  # from none to all
    given_scale = scale if scaled else None
    got, want = (f(hidden, weight, targets, given_scale) for f in (loss.linear_cross_entropy, torchs))
    assert torch.allclose(got, want, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(3 * x, [hidden, weight]) for x in (got, want))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.allclose(loss.reference(hidden, weight, targets, given_scale), want, rtol=1e-12)


def test_gradients_by_finite_differences() -> None:
    """By hidden, weight and scale. (torch's gradcheck goes backward twice through one loss, which is refused.)"""
    hidden, weight, targets, scale = case(7, 3, 5)
    targets[2] = -100
    leaves = [hidden, weight, scale.requires_grad_()]
    grads = torch.autograd.grad(ops.linear_cross_entropy(*leaves[:2], targets, scale_N=scale), leaves)
    assert grads[2][2] == 0
    with torch.no_grad():
        for leaf, grad in zip(leaves, grads):
            direction = torch.randn_like(leaf)
            up, down = (
                ops.linear_cross_entropy(*[x + e * direction if x is leaf else x for x in leaves[:2]], targets,
                                         scale_N=scale + e * direction if scale is leaf else scale)
                for e in (1e-5, -1e-5)
            )  # fmt: skip
            assert float((up - down) / 2e-5) == pytest.approx(float((grad * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradient_of_one_of_the_two(which: str) -> None:
    hidden, weight, targets, _ = case(7, 3, 5)
    (weight if which == "hidden" else hidden).requires_grad_(False)
    leaf = hidden if which == "hidden" else weight
    got = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets), leaf)[0]
    assert torch.allclose(got, torch.autograd.grad(torchs(hidden, weight, targets, None), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("none", [False, True], ids=["", "no targets"])
def test_memory_that_held_nan(dtype: torch.dtype, none: bool) -> None:
    """Results do not depend on what memory held before, with either library of products."""
    hidden, weight, targets, scale = case(200, 64, 512, torch.float32)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    if none:
        targets.fill_(-100)

    def run() -> list[Tensor]:
        total = ops.linear_cross_entropy(*leaves, targets, scale_N=scale)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    first = run()
    for size in (512 * 64, 200 * 512, 200 * 64, 3 * 512):
        del [torch.full((size,), math.nan) for _ in range(8)][:]
    for a, b in zip(first, run()):
        assert torch.equal(a, b) and torch.isfinite(a).all()


def test_a_tied_table_gets_both_gradients() -> None:
    _, table, targets, _ = case(6, 4, 9)
    ids = torch.randint(0, 9, (6,))
    got = torch.autograd.grad(ops.linear_cross_entropy(F.embedding(ids, table), table, targets), table)[0]
    want = torch.autograd.grad(torchs(F.embedding(ids, table), table, targets, None), table)[0]
    assert torch.allclose(got, want)


def test_logits_of_any_size() -> None:
    """exp would overflow, or all of a row would vanish; a confident wrong answer has the loss that it should."""
    hidden = torch.tensor([[1.0], [1e4], [-1e4], [1e-30]])
    weight = torch.tensor([[0.0], [1.0], [2.0]])
    targets = torch.tensor([2, 0, 2, 1])
    got = loss.token_logprobs(hidden, weight, targets)
    want = torch.log_softmax((hidden @ weight.t()).double(), 1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(got.double(), want, rtol=1e-6)
    assert got[1] == -2e4
    weight.requires_grad_()
    total = ops.linear_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.item() == pytest.approx(-want.sum().item()) and weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_token_logprobs() -> None:
    hidden, weight, targets, _ = case(10, 4, 6, torch.float32)
    targets[3] = -100
    got = ops.token_logprobs(hidden, weight, targets)
    want = torch.log_softmax(hidden @ weight.t(), 1)[torch.arange(10), targets.clamp(min=0)]
    want[3] = 0
    assert got.dtype == torch.float32 and not got.requires_grad
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("how", ["autocast", "bf16 tensors"])
def test_bf16(how: str) -> None:
    """Products in bf16; loss, softmax and the sum of the head's gradient in fp32; gradients in the leaves' dtype."""
    hidden, weight, targets, scale = case(64, 32, 100, torch.float32)
    want = torchs(hidden, weight, targets, scale)
    exact = torch.autograd.grad(want, [hidden, weight])
    leaves = [hidden, weight]
    if how == "bf16 tensors":
        leaves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = ops.linear_cross_entropy(*leaves, targets, scale_N=scale)
        logprobs = ops.token_logprobs(*leaves, targets)
    assert got.dtype == torch.float32 and logprobs.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=5e-3)
    assert -(logprobs * scale).sum().item() == pytest.approx(got.item(), rel=1e-5)
    for a, b, leaf in zip(torch.autograd.grad(got, leaves), exact, leaves):
        assert a.dtype == leaf.dtype and (a - b).norm() < 0.02 * b.norm()


def test_bf16_softmax_is_not_rounded() -> None:
    """With logits that bf16 holds exactly, the loss has fp32's error: it does not pass through bf16 probabilities."""
    hidden, weight = torch.eye(8).bfloat16(), torch.randint(-8, 8, (50, 8)).bfloat16() / 4
    targets = torch.arange(8)
    got = ops.token_logprobs(hidden, weight, targets)
    want = torch.log_softmax((hidden.double() @ weight.double().t()), 1)[torch.arange(8), targets]
    assert torch.allclose(got.double(), want, rtol=2e-6)


def test_a_nan_is_not_hidden() -> None:
    hidden, weight, targets, _ = case(9, 4, 6)
    bad = hidden.detach().clone()
    bad[4, 1] = math.nan
    assert torch.isnan(ops.linear_cross_entropy(bad, weight, targets))
    assert torch.isnan(ops.token_logprobs(bad, weight, targets)).tolist() == [i == 4 for i in range(9)]


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = case(9, 4, 6)

    def no_product(*args: object) -> Tensor:
        raise AssertionError("a product of the backward pass")

    monkeypatch.setattr(torch, "mm", no_product)
    with torch.no_grad():
        got = ops.linear_cross_entropy(hidden, weight, targets)
    assert torch.allclose(got, torchs(hidden, weight, targets, None)) and not got.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets, _ = case(5, 3, 4)
    total = ops.linear_cross_entropy(hidden, weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        total.backward()


def test_accumulation_adds_up() -> None:
    """Two micro-batches, scaled by the tokens of both, give the gradient of one batch; no gradient is shared memory."""
    hidden, weight, targets, _ = case(10, 3, 4)
    want = torch.autograd.grad(torchs(hidden, weight, targets, None) / 10, weight)[0]
    for part in (slice(0, 4), slice(4, 10)):
        scale = torch.full((len(targets[part]),), 0.1, dtype=torch.double)
        ops.linear_cross_entropy(hidden[part], weight, targets[part], scale_N=scale).backward()
    assert weight.grad is not None and torch.allclose(weight.grad, want)


def test_in_a_compiled_region() -> None:
    hidden, weight, targets, _ = case(10, 3, 4)
    compiled = torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(hidden, weight, targets), torchs(hidden, weight, targets, None))


def test_large_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest product is a chunk's, of at most 64 MB in fp32 at the vocabulary of Llama 2."""
    monkeypatch.undo()
    assert loss._chunk(torch.empty(32000, 0)) == 512
    sizes: list[int] = []
    real = torch.matmul

    def matmul(x: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
        sizes.append(out.numel())
        return real(x, w, out=out)

    monkeypatch.setattr(torch, "matmul", matmul)
    hidden, weight, targets, _ = case(1100, 2, 32000, torch.float32)
    ops.linear_cross_entropy(hidden, weight, targets).backward()
    assert sizes == [512 * 32000, 512 * 32000, 76 * 32000]
