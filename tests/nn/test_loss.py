"""Head and cross-entropy in chunks against torch's own, in fp64 where it matters."""

from __future__ import annotations

import math
from typing import Any

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
    monkeypatch.setattr(loss, "KEEP_LOGITS", 60)  # of some tokens, and not of others
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


def torchs_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    picked = F.linear(hidden, weight).log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(targets == -100, 0)


def torchs_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=F.linear(hidden, weight)).entropy()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 17), st.integers(1, 9), st.integers(1, 13), st.integers(0, 3), st.integers(0, 250))
def test_token_logprobs_and_gradients_are_torch_s(N: int, D: int, V: int, ignored: int, keep: int) -> None:
    """With any gradient of the tokens, some or all of them padded, all, some or no probabilities kept."""
    torch.manual_seed(keep)
    hidden, weight, targets, grad = case(N, D, V)
    targets[torch.rand(N) < ignored / 3] = -100
    grad -= 0.5
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss, "KEEP_LOGITS", keep)
        got, want = ops.token_logprobs(hidden, weight, targets), torchs_tokens(hidden, weight, targets)
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14) and (got[targets == -100] == 0).all()
        for a, b in zip(*(torch.autograd.grad(x, [hidden, weight], grad) for x in (got, want))):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    again, entropy = ops.token_logprobs_and_entropy(hidden, weight, targets)
    assert torch.equal(again, got) and not entropy.requires_grad
    exact = torchs_entropy(hidden, weight).masked_fill(targets == -100, 0) if N else entropy
    assert torch.allclose(entropy, exact, rtol=1e-10, atol=1e-12)
    for x, y in zip(loss.reference_tokens(hidden, weight, targets), (got, entropy)):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [0, 24, 1000])
def test_token_logprobs_by_gradcheck(monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """It goes backward through one graph again and again, and wants the same each time."""
    monkeypatch.setattr(loss, "KEEP_LOGITS", keep)
    hidden, weight, targets, _ = case(7, 3, 5)
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda h, w: ops.token_logprobs(h, w, targets), (hidden, weight))
    found = ops.token_logprobs(hidden, weight, targets)
    (slope,) = torch.autograd.grad(found.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_token_logprobs_by_hand() -> None:
    """Logits log 1, log 2, log 5 of 8: the gradient by the logits is one less p for the target, and -p elsewhere."""
    hidden = torch.eye(1, dtype=torch.double).repeat(2, 1).requires_grad_()
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.double).log().requires_grad_()
    got, entropy = ops.token_logprobs_and_entropy(hidden, weight, torch.tensor([2, 0]))
    assert torch.allclose(got, torch.tensor([0.625, 0.125], dtype=torch.double).log())
    assert entropy[0].item() == pytest.approx(math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8)
    (10 * got[0] + got[1]).backward()
    assert weight.grad is not None and hidden.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([-1.25 + 0.875, -2.5 - 0.25, 3.75 - 0.625])
    mean = (2 * math.log(2) + 5 * math.log(5)) / 8
    assert hidden.grad[:, 0].tolist() == pytest.approx([10 * (math.log(5) - mean), -mean])


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradient_of_token_logprobs_by_one_of_the_two(which: str) -> None:
    hidden, weight, targets, grad = case(7, 3, 5)
    (weight if which == "hidden" else hidden).requires_grad_(False)
    leaf = hidden if which == "hidden" else weight
    got, want = (torch.autograd.grad(f(hidden, weight, targets), leaf, grad)[0]
                 for f in (ops.token_logprobs, torchs_tokens))  # fmt: skip
    assert torch.allclose(got, want)


def test_token_logprobs_of_a_tied_table() -> None:
    _, table, targets, grad = case(6, 4, 9)
    ids = torch.randint(0, 9, (6,))
    got, want = (torch.autograd.grad(f(F.embedding(ids, table), table, targets), table, grad)[0]
                 for f in (ops.token_logprobs, torchs_tokens))  # fmt: skip
    assert torch.allclose(got, want)


@pytest.mark.parametrize("how", ["fp32", "autocast"])
def test_kept_or_computed_again_is_the_same(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The same bytes; so too where memory held NaN, and in a second pass, which finds nothing kept."""
    monkeypatch.setattr(loss, "MIN_CHUNK", 64)
    hidden, weight, targets, grad = case(200, 64, 512, torch.float32)
    targets[::7] = -100

    def run(keep: int, passes: int = 1) -> list[Tensor]:
        monkeypatch.setattr(loss, "KEEP_LOGITS", keep)
        del [torch.full((size,), math.nan) for size in (512 * 64, 512 * 128, 512 * 200, 200 * 64) for _ in range(4)][:]
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = ops.token_logprobs_and_entropy(hidden, weight, targets)
        for _ in range(passes):
            slopes = torch.autograd.grad(found[0], [hidden, weight], grad, retain_graph=True)
        return [*found, *slopes]

    first = run(1 << 20)
    assert all(torch.isfinite(x).all() for x in first) and first[2].abs().sum() > 0
    for other in (run(0), run(100 * 512), run(1 << 20, passes=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the vocabulary of Llama 2, 2048 tokens of 2500 keep probabilities; without gradients, none does."""
    monkeypatch.undo()
    sizes: list[int] = []
    real = torch.empty

    def empty(*shape: int, **named: Any) -> Tensor:
        sizes.append(math.prod(shape) if len(shape) == 2 else 0)
        return real(*shape, **named)

    monkeypatch.setattr(torch, "empty", empty)
    hidden, weight, targets, _ = case(2500, 2, 32000, torch.float32)
    with torch.no_grad():
        ops.token_logprobs(hidden, weight, targets)
    assert sum(sizes) == 512 * 32000
    sizes.clear()
    found = ops.token_logprobs(hidden, weight, targets)
    assert sum(sizes) == (2048 + 452) * 32000 and loss.KEEP_LOGITS >= 2048 * 32000
    assert found.grad_fn is not None and found.grad_fn.kept.shape == (2048, 32000)
    found.sum().backward(retain_graph=True)
    assert found.grad_fn.kept.numel() == 0


def test_entropy_of_any_logits() -> None:
    """Where exp would overflow, of a certain row, of a flat one, with a logit of -inf: never nan, never below 0."""
    weight = torch.tensor([[1e4, 0, -1e4], [0, 500.0, 0], [3, 3, 3], [-math.inf, 1, 1], [-2e4, -math.inf, 0]]).t()
    targets = torch.tensor([0, 0, 0, 0, 2])
    logprobs = torch.log_softmax(weight.t().double(), 1)
    found = []
    for row, target in zip(weight.t(), targets):
        found.append(ops.token_logprobs_and_entropy(torch.ones(1, 1), row[:, None], target[None]))
    entropy = torch.cat([e for _, e in found])
    assert torch.allclose(entropy, torch.tensor([0, 0, math.log(3), math.log(2), 0]), atol=1e-6)
    assert (entropy >= 0).all()
    assert torch.allclose(torch.cat([p for p, _ in found]).double(), logprobs[range(5), targets], atol=1e-4)


def test_token_kl_is_the_sum_over_the_vocabulary() -> None:
    """Against torch's distributions, for models of two widths; it is not symmetric; 0 of a model from itself."""
    hidden, weight, _, _ = case(11, 4, 9)
    other, table, _, _ = case(11, 6, 9)
    p, q = (torch.distributions.Categorical(logits=h @ w.t()) for h, w in ((hidden, weight), (other, table)))
    got = ops.token_kl(hidden, weight, other, table)
    assert torch.allclose(got, torch.distributions.kl_divergence(p, q)) and not got.requires_grad
    assert torch.allclose(ops.token_kl(other, table, hidden, weight), torch.distributions.kl_divergence(q, p))
    assert (ops.token_kl(hidden, weight, hidden, weight) == 0).all()
    assert len(ops.token_kl(hidden[:0], weight, other[:0], table)) == 0


def test_token_kl_by_hand() -> None:
    """p = 1/2, 1/2 from q = 1/4, 3/4; an impossible token costs nothing under p, and everything under q."""
    one = torch.ones(1, 1)

    def kl(p: list[float], q: list[float]) -> float:
        tables = (torch.tensor(x)[:, None].log() for x in (p, q))
        return ops.token_kl(one, next(tables), one, next(tables)).item()

    assert kl([1, 1], [1, 3]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl([1, 1, 0], [1, 1, 2]) == pytest.approx(math.log(2))
    assert kl([1, 1, 2], [1, 1, 0]) == math.inf
    assert kl([1, 0], [1, 0]) == 0
    assert kl([1, 1e-38], [1, 1e-38]) == 0


def test_a_small_kl_is_not_rounding() -> None:
    """fp32, a vocabulary of thousands, models that nearly agree, a large logit for all: within 1% of fp64's KL."""
    hidden, weight, _, _ = case(64, 16, 5000, torch.float32)
    with torch.no_grad():
        moved = weight + 1e-3 * torch.randn_like(weight)
        logits = [(F.linear(hidden, w) + 30).double().log_softmax(1) for w in (weight, moved)]  # of the same products
        want = (logits[0].exp() * (logits[0] - logits[1])).sum(1)
        got = ops.token_kl(F.pad(hidden, (0, 1), value=1), F.pad(weight, (0, 1), value=30),
                           F.pad(hidden, (0, 1), value=1), F.pad(moved, (0, 1), value=30))  # fmt: skip
    assert float(want.min()) > 1e-7 and float(want.max()) < 1e-4
    assert ((got - want).abs() < 0.01 * want + 2e-7).all() and (got > -2e-7).all()


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
        logprobs, entropy = ops.token_logprobs_and_entropy(*leaves, targets)
        kl = ops.token_kl(*leaves, hidden, weight)  # under autocast both in bf16
    assert entropy.dtype == kl.dtype == torch.float32 and (kl.abs() < 1e-3).all()
    assert (entropy - torchs_entropy(hidden, weight)).abs().mean() < 0.02
    assert got.dtype == torch.float32 and logprobs.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=5e-3)
    assert -(logprobs * scale).sum().item() == pytest.approx(got.item(), rel=1e-5)
    also = torch.autograd.grad(logprobs, leaves, -scale, retain_graph=True)
    for a, b, leaf in zip((*torch.autograd.grad(got, leaves), *also), exact * 2, leaves * 2):
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
    for found in (*ops.token_logprobs_and_entropy(bad, weight, targets), ops.token_kl(bad, weight, hidden, weight)):
        assert torch.isnan(found).tolist() == [i == 4 for i in range(9)]


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = case(9, 4, 6)

    def no_product(*args: object) -> Tensor:
        raise AssertionError("a product of the backward pass")

    monkeypatch.setattr(torch, "mm", no_product)
    with torch.no_grad():
        got = ops.linear_cross_entropy(hidden, weight, targets)
        tokens = ops.token_logprobs(hidden, weight, targets)
    assert torch.allclose(got, torchs(hidden, weight, targets, None)) and not got.requires_grad
    assert torch.allclose(tokens, torchs_tokens(hidden, weight, targets)) and not tokens.requires_grad


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
    compiled = torch.compile(ops.token_logprobs_and_entropy, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(hidden, weight, targets), loss.reference_tokens(hidden, weight, targets)):
        assert torch.allclose(got, want)


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
