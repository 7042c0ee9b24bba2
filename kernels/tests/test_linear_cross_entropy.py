"""The head and its loss against torch's in fp64, for any gradient of the tokens, and with what surrounds it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama2_kernels import linear_cross_entropy as head
from llama2_kernels import registry
from llama2_kernels.linear_cross_entropy import (
    head_backward,
    head_forward,
    head_loss,
    linear_cross_entropy,
    reference_linear_cross_entropy,
    reference_token_logprobs_and_entropy,
    settings_for,
    token_logprobs,
    token_logprobs_and_entropy,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = [
    pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(1, 1, 1), (1, 8, 33), (7, 3, 2), (11, 16, 100), (13, 24, 128), (4, 9, 513), (6, 16, 1040)]
KINDS = pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and blocks even of a few tokens."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(head, "MIN_CHUNK", 5)
    monkeypatch.setattr(head, "BLOCK_LOGITS", 128 * 4)
    monkeypatch.setattr(head, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(head, "LOSS_TOKENS", 5)


@pytest.fixture
def whole_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    yield


# --- against fp64 -------------------------------------------------------------------------------------------------


def case(
    n: int, d: int, v: int, dtype: torch.dtype = FP32, device: str = "cpu", scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head, targets of which some are -100, and a gradient for each token."""
    hidden = torch.randn(n, d, dtype=FP64).to(device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(v, d, dtype=FP64) * scale / math.sqrt(d)).to(device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), device=device)
    targets[2::5] = -100
    return hidden, weight, targets, torch.randn(n, dtype=FP64 if dtype == FP64 else FP32, device=device)


def exactly(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and probabilities in fp64."""
    logits = hidden.double() @ weight.double().t()
    logprobs = logits.log_softmax(1)
    chosen = logprobs.gather(1, targets.long().clamp(min=0)[:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    return chosen.masked_fill(targets == -100, 0), entropy.masked_fill(targets == -100, 0), logprobs.detach().exp()


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.exp2(exact.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps / 2


def check(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, product: torch.dtype | None = None
) -> list[Tensor]:
    """Results and gradients within their roundings: of fp32 (fp64), of slopes to the product's dtype, at the end."""
    product = product or hidden.dtype
    h, w = (x.detach().to(product).double().requires_grad_() for x in (hidden, weight))
    want, entropy, p = exactly(h, w, targets)
    grads = torch.autograd.grad(want, [h, w], grad.double())
    got, got_entropy = token_logprobs_and_entropy(hidden, weight, targets)
    kind = FP64 if product == FP64 else FP32
    assert got.dtype == got_entropy.dtype == kind and not got_entropy.requires_grad
    eps = torch.finfo(kind).eps
    # An error of the logits, of so many products, is one of the results and, relatively, of the probabilities.
    h, w = h.detach(), w.detach()
    of_logits = 4 * eps * ((h.abs() @ w.abs().t()).amax(1) + 2)
    assert ((got - want).abs() <= 2 * of_logits).all()
    assert ((got_entropy - entropy).abs() <= 8 * of_logits * (1 + math.log(len(w)))).all() and (got_entropy >= 0).all()
    assert (got[targets == -100] == 0).all() and (got_entropy[targets == -100] == 0).all()
    assert torch.equal(token_logprobs(hidden, weight, targets), got)

    slopes = F.one_hot(targets.long().clamp(min=0), len(w)) - p
    size = grad.double().abs() * (targets != -100)
    off = torch.finfo(product).eps / 2 * slopes.abs() if product != kind else torch.zeros_like(slopes)
    # A sum of n terms in fp32 is off by about sqrt(n) roundings, each of the terms' size at most.
    off = (off + 4 * of_logits[:, None] * p + (4 + math.sqrt(len(w))) * eps * slopes.abs()) * size[:, None]
    # Below its normal range a type is off by half of its least number.
    off = off + torch.finfo(product).smallest_normal * torch.finfo(product).eps
    allowed = [off @ w.abs(), off.t() @ h.abs()]
    found = torch.autograd.grad(got, [hidden, weight], grad)
    total = linear_cross_entropy(hidden, weight, targets, -grad)
    assert total.dtype == kind and abs(total - (want * grad).sum()) <= (3 * of_logits * grad.abs()).sum()
    with_loss = torch.autograd.grad(total, [hidden, weight])
    for name, a, b, room, leaf in zip(
        ("hidden", "weight") * 2, (*found, *with_loss), grads * 2, allowed * 2, (hidden, weight) * 2
    ):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        apart = (a - b).abs() / (half_ulp(b.abs() + room, leaf.dtype) + room)
        worst = apart.max() if a.numel() else 0
        assert worst <= 1, f"the gradient of {name} is {worst:.2f} times as far off as allowed"
    return [got, got_entropy, *found]


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(device: str, guarded: None, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*case(*shape, dtype, device, scale=2.0))


@pytest.mark.parametrize("vocabulary", [32000, 32001])
def test_vocabularies_of_models(device: str, guarded: None, monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    """Odd ones too, whose rows begin at multiples of 16 all the same."""
    monkeypatch.setattr(head, "BLOCK_LOGITS", 1 << 16)
    for dtype in (BF16, FP32):
        check(*case(3, 8, vocabulary, dtype, device, scale=3.0))


@pytest.mark.slow
def test_a_vocabulary_of_128256(device: str, guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK_LOGITS", 1 << 17)
    check(*case(6, 16, 128256, BF16, device, scale=3.0))


def test_pieces_change_little(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece or many: forward the same bits where the products are; gradients within fp32's rounding."""
    inputs = case(23, 16, 300, FP32, device)
    many = check(*inputs)
    monkeypatch.undo()
    for a, b in zip(many, check(*inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e4])
def test_any_magnitude(device: str, scale: float) -> None:
    """To where exp leaves fp32 by far; flat and certain rows."""
    hidden, weight, targets, grad = case(9, 16, 200, FP32, device, scale)
    check(hidden, weight, targets, grad)
    certain = (hidden @ weight.t()).argmax(1)
    check(hidden, weight, certain, grad)


def test_large_logits_keep_their_differences(device: str) -> None:
    """Beside logits of 2^14 the log of a sum of 3 is lost in fp32, not the probabilities that differ by it."""
    weight = torch.tensor([[2.0**14], [2.0**14 - 1], [2.0**14 - 2]], device=device, requires_grad=True)
    hidden = torch.ones(3, 1, device=device, requires_grad=True)
    got = token_logprobs(hidden, weight, torch.arange(3, device=device))
    want = torch.tensor([0.0, -1.0, -2.0], dtype=FP64, device=device).log_softmax(0)
    assert torch.allclose(got.double(), want, rtol=1e-6)
    (slope,) = torch.autograd.grad(got[0], weight)
    assert torch.allclose(slope[:, 0].double(), torch.tensor([1.0, 0, 0], device=device) - want.exp(), atol=1e-6)


def test_bf16_logits_are_not_rounded(device: str) -> None:
    """Sums of products that bf16 does not hold: the result is fp32's, and the probabilities add up to 1."""
    hidden = torch.tensor([[16.0, 0.0625, 1.0]], device=device).bfloat16().repeat(4, 1)
    weight = torch.tensor([[1.0, 1, 0.5], [1, 0, 0.25], [1, -1, 0], [1, 0.5, 0.125]], device=device).bfloat16()
    got = token_logprobs(hidden, weight, torch.arange(4, device=device))
    want = (hidden[0].double() @ weight.double().t()).log_softmax(0)
    assert torch.allclose(got.double(), want, atol=2e-6) and abs(float(got.double().exp().sum()) - 1) < 1e-6


def test_by_hand(device: str) -> None:
    """Logits log 1, log 2, log 5 of 8: the gradient by a logit is one less p for the target, and -p elsewhere."""
    hidden = torch.ones(2, 1, device=device).requires_grad_()
    weight = torch.tensor([[1.0], [2.0], [5.0]], device=device).log().requires_grad_()
    got, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([2, 0], device=device))
    assert got.tolist() == pytest.approx([math.log(0.625), math.log(0.125)])
    assert entropy[0].item() == pytest.approx(math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8)
    (10 * got[0] + got[1]).backward()
    assert weight.grad is not None and hidden.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([-1.25 + 0.875, -2.5 - 0.25, 3.75 - 0.625])
    mean = (2 * math.log(2) + 5 * math.log(5)) / 8
    assert hidden.grad[:, 0].tolist() == pytest.approx([10 * (math.log(5) - mean), -mean], rel=1e-5)


def test_gradcheck(device: str) -> None:
    hidden, weight, targets, _ = case(5, 2, 7, FP64, device)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets), (hidden, weight), fast_mode=True)
    # (It goes through a loss twice, which `linear_cross_entropy` refuses: see `check` for that.)


@KINDS
def test_the_meaning_is_the_models(device: str, dtype: torch.dtype) -> None:
    """Of all that llama2cli computes from the head: its chunked form on a CPU, and what it states on all logits."""
    loss = pytest.importorskip("llama2cli.nn.loss")
    hidden, weight, targets, grad = case(17, 8, 70, dtype, device)
    scale = grad.abs().requires_grad_()
    leaves = [hidden, weight, scale]
    rough = {FP64: 1e-10, FP32: 1e-5}.get(dtype, 2e-2)

    def results(form: Callable[..., Tensor]) -> list[Tensor]:
        total = form(hidden, weight, targets, scale)
        return [total.detach(), *torch.autograd.grad(3 * total, leaves)]

    mine = results(linear_cross_entropy)
    for form in (loss.linear_cross_entropy, loss.reference, reference_linear_cross_entropy):
        for got, want in zip(mine, results(form), strict=True):
            assert got.dtype == want.dtype and (got - want).norm() <= rough * want.norm()
    assert (mine[3][targets == -100] == 0).all()
    pair = token_logprobs_and_entropy(hidden, weight, targets)
    for other in (loss.token_logprobs_and_entropy, loss.reference_tokens, reference_token_logprobs_and_entropy):
        for got, want in zip(pair, other(hidden, weight, targets), strict=True):
            assert got.dtype == want.dtype and torch.allclose(got, want, rtol=rough, atol=rough)
    without = linear_cross_entropy(hidden, weight, targets)
    assert torch.allclose(without, loss.linear_cross_entropy(hidden, weight, targets), rtol=rough)


# --- masks and odd cases ------------------------------------------------------------------------------------------


def test_tokens_without_a_target_do_nothing(device: str) -> None:
    """Whatever stands there: NaN of a hidden state or of a scale is not seen."""
    hidden, weight, targets, grad = case(13, 8, 40, FP32, device)
    out = targets == -100
    with torch.no_grad():
        hidden[out] = 3.0
    scale = grad.abs()
    scale[out] = math.nan
    total = linear_cross_entropy(hidden, weight, targets, scale)
    grads = torch.autograd.grad(total, [hidden, weight])
    kept = hidden.detach()[~out].requires_grad_()
    fewer = linear_cross_entropy(kept, weight, targets[~out], scale[~out])
    want = torch.autograd.grad(fewer, [kept, weight])
    assert torch.allclose(total, fewer) and torch.allclose(grads[1], want[1], atol=1e-6)
    assert (grads[0][out] == 0).all() and torch.allclose(grads[0][~out], want[0], atol=1e-6)
    got = token_logprobs(hidden, weight, torch.full_like(targets, -100))
    assert (got == 0).all()
    for d in torch.autograd.grad(got, [hidden, weight], torch.full_like(got, math.nan)):
        assert (d == 0).all()


def test_no_tokens(device: str) -> None:
    hidden, weight, targets, _ = case(0, 8, 40, FP32, device)
    got, entropy = token_logprobs_and_entropy(hidden, weight, targets)
    assert got.shape == entropy.shape == (0,)
    d_hidden, d_weight = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    assert d_hidden.shape == (0, 8) and (d_weight == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_row(device: str, value: float) -> None:
    hidden, weight, targets, _ = case(9, 4, 600, FP32, device)
    bad = hidden.detach().clone()
    bad[4, 1] = value
    for got, want in zip(
        token_logprobs_and_entropy(bad, weight, targets), reference_token_logprobs_and_entropy(bad, weight, targets)
    ):
        assert got.isfinite().tolist() == [i != 4 for i in range(9)] == want.isfinite().tolist()


def test_an_impossible_token(device: str) -> None:
    """A logit of -inf, one or 550 in a row: no probability, and no NaN elsewhere."""
    logits = torch.randn(5, 600, device=device)
    logits[0, 3] = logits[2, 550] = -math.inf
    logits[1, :550] = logits[3, 50:] = -math.inf
    targets = torch.tensor([3, 599, 0, 7, 9], device=device)
    top, log, logprob, entropy = torch.empty(4, 5, device=device)
    padded = F.pad(logits, (0, 8), value=math.nan)[:, :600]
    head._reduce(padded, targets, logprob, top, log, entropy)
    all_logprobs = logits.double().log_softmax(1)
    assert torch.allclose(logprob.double(), all_logprobs[range(5), targets], atol=1e-5)
    exact = torch.special.entr(all_logprobs.exp()).sum(1)
    assert torch.allclose(entropy.double(), exact, atol=1e-5)
    slopes = torch.empty(5, 608, device=device)[:, :600]
    head._differentiate(padded, slopes, targets, top, log, torch.ones(5, device=device), 0)
    want = F.one_hot(targets, 600) - all_logprobs.exp()
    assert torch.allclose(slopes[1:].double(), want[1:], atol=1e-6)


def test_a_target_outside_the_vocabulary_is_seen(device: str) -> None:
    """Without reading there, and without waiting for a device to say so."""
    hidden, weight, targets, _ = case(6, 8, 40, FP32, device)
    targets = targets.clamp(min=0)
    targets[1], targets[3] = 40, -1
    assert token_logprobs(hidden, weight, targets).isnan().tolist() == [i in (1, 3) for i in range(6)]


def test_targets_of_32_bits_and_any_layout(device: str) -> None:
    hidden, weight, targets, grad = case(8, 8, 40, BF16, device)
    want = check(hidden, weight, targets, grad)
    wide, tall = torch.randn(8, 20, device=device).bfloat16(), torch.randn(8, 40, device=device).bfloat16()
    wide[:, 3:11], tall[:] = hidden.detach(), weight.detach().t()
    pairs = torch.stack((targets.int(), targets.int()), 1)
    got = check(wide[:, 3:11].requires_grad_(), tall.t().requires_grad_(), pairs[:, 0], grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    (spread,) = torch.autograd.grad(token_logprobs(hidden, weight, targets).sum(), [hidden])  # a gradient of stride 0
    (dense,) = torch.autograd.grad(token_logprobs(hidden, weight, targets), [hidden], torch.ones(8, device=device))
    assert torch.equal(spread, dense)


def test_what_does_not_fit_is_refused(device: str) -> None:
    hidden, weight, targets, _ = case(6, 8, 40, FP32, device)
    for error, words, args in (
        (ValueError, r"hidden \(6, 8\) and weight \(40, 7\)", (hidden, weight[:, :7], targets)),
        (ValueError, "hidden has 3 axes", (hidden[None], weight, targets)),
        (ValueError, r"targets \(5,\) for 6 tokens", (hidden, weight, targets[:5])),
        (TypeError, r"targets are torch\.float32", (hidden, weight, targets.float())),
        (TypeError, r"weight is torch\.int64", (hidden, weight.long(), targets)),
        (ValueError, "do not fit", (hidden, weight[:0], targets)),
    ):
        with pytest.raises(error, match=words):
            token_logprobs(*args)


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_of_one_of_the_two(device: str, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """A frozen head costs no product of its own."""
    hidden, weight, targets, grad = case(11, 8, 300, FP32, device)
    both = torch.autograd.grad(token_logprobs(hidden, weight, targets), [hidden, weight], grad)
    leaf = (hidden, weight)[which]
    (weight, hidden)[which].requires_grad_(False)
    got = token_logprobs(hidden, weight, targets)
    products: list[int] = []
    real = head._product
    monkeypatch.setattr(head, "_product", lambda a, *rest, **named: products.append(len(a)) or real(a, *rest, **named))
    (found,) = torch.autograd.grad(got, [leaf], grad)
    blocks = 3 * 3  # of 4 tokens of 11 and of 128 columns of 300
    assert torch.equal(found, both[which]) and len(products) == 2 * blocks
    products.clear()
    (with_loss,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, -grad), [leaf])
    assert torch.allclose(with_loss, found, rtol=1e-4, atol=1e-5) and len(products) == 2 * 3  # chunks of 5 of 11


def test_without_gradients(device: str) -> None:
    hidden, weight, targets, _ = case(6, 8, 40, FP32, device)
    want = token_logprobs_and_entropy(hidden, weight, targets)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = token_logprobs_and_entropy(hidden, weight, targets)
            assert all(torch.equal(a, b) for a, b in zip(got, want)) and not got[0].requires_grad


def test_as_often_as_wanted(device: str) -> None:
    """Backward again and again, used in two places, after `no_grad` results: a ratio as PPO makes it."""
    hidden, weight, targets, grad = case(9, 8, 60, FP32, device)
    with torch.no_grad():
        old = token_logprobs(hidden, weight, targets) - 0.1
    new = token_logprobs(hidden, weight, targets)
    first = torch.autograd.grad(new, [hidden, weight], grad, retain_graph=True)
    again = torch.autograd.grad(new, [hidden, weight], grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    ratio = (new - old).exp()
    objective = torch.minimum(ratio * grad, ratio.clamp(0.9, 1.05) * grad).sum() + new.square().mean()
    got = torch.autograd.grad(objective, [hidden, weight])
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = exactly(h, w, targets)[0]
    ratio = (exact - old).exp()
    want = torch.autograd.grad(
        torch.minimum(ratio * grad, ratio.clamp(0.9, 1.05) * grad).sum() + exact.square().mean(), [h, w]
    )
    for a, b in zip(got, want):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (slope,) = torch.autograd.grad(
            token_logprobs(hidden, weight, targets).square().sum(), [hidden], create_graph=True
        )
        slope.sum().backward()


def test_a_second_pass_through_the_loss_is_refused(device: str) -> None:
    """The loss may be used twice; what its one pass gave is not changed by trying another."""
    hidden, weight, targets, _ = case(9, 8, 60, FP32, device)
    total = linear_cross_entropy(hidden, weight, targets)
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [weight])
    (got,) = torch.autograd.grad(2 * total + total * 0.5, [weight], retain_graph=True)
    assert torch.allclose(got, 2.5 * want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, [weight])


def test_of_a_tied_table(device: str) -> None:
    _, table, targets, grad = case(9, 8, 60, FP32, device)
    ids = torch.randint(0, 60, (9,), device=device)
    exact = table.detach().double().requires_grad_()
    x, y = F.embedding(ids, table), F.embedding(ids, exact)
    (want,) = torch.autograd.grad(exactly(y, exact, targets)[0], [exact], grad.double())
    for (got,) in (
        torch.autograd.grad(token_logprobs(x, table, targets), [table], grad, retain_graph=True),
        torch.autograd.grad(linear_cross_entropy(x, table, targets, -grad), [table]),
    ):
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


def test_accumulation_adds_up(device: str) -> None:
    hidden, weight, targets, _ = case(10, 3, 24, FP32, device)
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) / 10, [weight])
    for part in (slice(0, 4), slice(4, 10)):
        scale = torch.full((len(targets[part]),), 0.1, device=device)
        linear_cross_entropy(hidden[part], weight, targets[part], scale).backward()
    assert weight.grad is not None and torch.allclose(weight.grad, want, atol=1e-6)


def test_the_heads_gradient_is_summed_in_fp32(device: str) -> None:
    """Of 40 tokens in bf16, each a thousandth of the first: rounded on the way, nothing would be added."""
    n = 40
    hidden = torch.ones(n, 1, device=device).bfloat16()
    weight = torch.zeros(16, 1, device=device).bfloat16().requires_grad_()
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    grad = torch.full((n,), 2.0**-10, device=device)
    grad[0] = 1.0
    (got,) = torch.autograd.grad(token_logprobs(hidden, weight, targets), [weight], grad)
    (with_loss,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, -grad), [weight])
    for d in (got, with_loss):
        assert float(d[0, 0]) == pytest.approx((1 + (n - 1) / 1024) * 15 / 16, rel=2**-8)


def test_fp16_gradients_wait_for_the_scale_of_the_loss(device: str) -> None:
    """A mean over 2^20 tokens would leave nothing of fp16's slopes; scaled by 2^20 first, all of them."""
    hidden, weight, targets, _ = case(5, 8, 60, FP16, device)
    scale = torch.full((5,), 2.0**-20, device=device)
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [weight])
    (got,) = torch.autograd.grad(2**20 * linear_cross_entropy(hidden, weight, targets, scale), [weight])
    assert torch.equal(got, want) and got.abs().sum() > 0


def test_the_same_bits_each_time(device: str) -> None:
    inputs = case(21, 16, 300, BF16, device)

    def run() -> list[Tensor]:
        found = token_logprobs_and_entropy(*inputs[:3])
        return [*found, *torch.autograd.grad(found[0], inputs[:2], inputs[3])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- memory -------------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Bytes of each new tensor, and of those that live at once at most, as seen by the operators that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_the_logits_are_never_whole(device: str, whole_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the vocabulary of Llama 2, in the pieces of production: 128 MB of logits forward, 80 and 40 backward."""
    assert head.chunk_tokens(32000) * 32000 * 4 <= 128 << 20 and head.chunk_tokens(128256) == 256
    for n in (1, 100, 4096, 8192, 10000, 65536):
        for v in (32000, 32001, 128256):
            rows, columns = head.block_shape(n, v)
            assert rows * columns <= head.BLOCK_LOGITS and rows <= n and columns <= v
            assert rows >= min(n, 4096) and columns >= min(v, 2560)
    # What is asked for, with the work left out: nothing but the pieces and what is given back.
    monkeypatch.setattr(head, "_reduce", lambda *args: None)
    monkeypatch.setattr(head, "_differentiate", lambda *args: None)
    monkeypatch.setattr(head, "_product", lambda a, b, out, add=False: out)
    n, d, v = 16384, 64, 32000
    hidden, weight = torch.empty(n, d, dtype=BF16), torch.empty(v, d, dtype=BF16)
    targets, each = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    with Sizes() as seen:
        head_forward.launcher(hidden, weight, targets, BF16, True)
    assert 0 < seen.largest <= 128 << 20
    with Sizes() as seen:
        head_backward.launcher(each, hidden, weight, targets, each, each, BF16, True, True)
    assert 0 < seen.largest <= 80 << 20 < n * v * 2 // 10
    monkeypatch.setattr(torch, "sum", lambda *args, **named: None)
    with Sizes() as seen:
        head_loss.launcher(hidden, weight, targets, None, BF16, True, True)
    assert 0 < seen.largest <= 1536 * v * 4 < n * v * 4 // 10


# --- as an operator of torch --------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    for dtype in (FP32, BF16):
        hidden, weight, targets, grad = case(6, 4, 9, dtype, device)
        torch.library.opcheck(head_forward, (hidden, weight, targets, dtype, True), atol=1e-5, rtol=1e-2)
        if dtype == BF16:
            continue
        torch.library.opcheck(head_forward, (hidden, weight, targets, dtype, False), atol=1e-5, rtol=1e-2)
        for flags in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(head_loss, (hidden.detach(), weight.detach(), targets, grad, dtype, *flags))
        torch.library.opcheck(head_loss, (hidden.detach(), weight.detach(), targets, None, dtype, True, True))
        _, _, top, log = (x.detach() for x in head_forward(hidden, weight, targets, dtype, False))
        for needed in ((True, True), (True, False), (False, True)):
            leaves = hidden.detach(), weight.detach()
            torch.library.opcheck(head_backward, (grad, *leaves, targets, top, log, dtype, *needed))


def step(x: Tensor, w: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """A layer and the head, with ordinary operators around them."""
    hidden = torch.sin(x @ w) + x
    logprobs, entropy = token_logprobs_and_entropy(hidden, head_weight, targets)
    ratio = (logprobs - 0.1).exp() * (targets != -100)
    return linear_cross_entropy(hidden, head_weight, targets, ratio.detach()) - ratio.sum() + entropy.mean()


def step_inputs(device: str, n: int = 6) -> list[Tensor]:
    hidden, weight, targets, _ = case(n, 16, 70, FP32, device)
    w = torch.randn(16, 16, device=device).requires_grad_()
    return [hidden, w, weight, targets]


def results(form: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs[:3])]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 0.0) -> bool:
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (6, 19) if dynamic else (6,):
        inputs = step_inputs(device, n)
        assert same(results(compiled, inputs), results(step, inputs), 1e-4)
    if dynamic:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_under_autocast(device: str) -> None:
    torch._dynamo.reset()
    inputs = step_inputs(device)

    def cast(*x: Tensor) -> Tensor:
        with torch.autocast(device, BF16):
            return step(*x)

    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    assert same(results(compiled, inputs), results(cast, inputs), 2e-2)


@pytest.mark.slow
def test_compiled_by_inductor(device: str) -> None:
    torch._dynamo.reset()
    inputs = step_inputs(device)
    for form in (step, lambda *x: checkpoint(step, *x, use_reentrant=False)):
        compiled = torch.compile(form, fullgraph=True)
        assert same(results(compiled, inputs), results(step, inputs), 1e-4)


def test_checkpointing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, calls = step_inputs(device), []
    real = head._reduce
    monkeypatch.setattr(head, "_reduce", lambda *args: calls.append(1) or real(*args))
    want = results(step, inputs)
    chunks = len(calls)
    again = lambda *x: checkpoint(step, *x, use_reentrant=False)  # noqa: E731
    assert chunks == 2 * 2 and same(results(again, inputs), want) and len(calls) == 3 * chunks

    def save_ours(context: object, operator: object, *args: object, **named: object) -> CheckpointPolicy:
        ours = torch.ops.llama2_kernels.token_logprobs.default, torch.ops.llama2_kernels.linear_cross_entropy.default
        return CheckpointPolicy.MUST_SAVE if operator in ours else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(*x: Tensor) -> Tensor:
        return checkpoint(
            step, *x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_ours)
        )

    assert same(results(selective, inputs), want) and len(calls) == 4 * chunks  # kept, not computed again


@pytest.mark.parametrize("kind", [BF16, FP16], ids=str)
def test_under_autocast(device: str, kind: torch.dtype) -> None:
    """Products of 16 bits; the gradient of an fp32 head is summed in fp32 and never rounded."""
    hidden, weight, targets, grad = case(13, 16, 200, FP32, device)
    with torch.autocast(device, kind):
        got = check(hidden, weight, targets, grad, kind)
        assert got[0].dtype == got[1].dtype == got[2].dtype == got[3].dtype == FP32
        mixed = check(hidden.detach().to(kind).requires_grad_(), weight, targets, grad, kind)
    assert mixed[2].dtype == kind and torch.equal(mixed[3], got[3])
    assert (got[3] != got[3].to(kind)).float().mean() > 0.9


# --- in processes of their own ------------------------------------------------------------------------------------

SHARDED = Path(__file__).with_name("fsdp_linear_cross_entropy.py")


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    """Two processes, bf16 parameters, fp32 reduction: the gradients of one process with all tokens."""
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([sys.executable, str(SHARDED), store, str(rank)], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    told = [p.communicate(timeout=120) for p in ranks]
    assert [out.strip() for out, _ in told] == ["same"] * 2, told[0][1] + told[1][1]


STATIC = """
from llama2_kernels import linear_cross_entropy as head, registry, static
import torch
for arch in (80, 90):
    for case in head.static_cases():
        if case.model in ("7b", "128k"):
            (row,) = static.describe_all(case, arch)
            label = (case.op, case.model, arch, row)
            assert not row["faults"] and not row["stack"] and not row["spills"], label
            loads, stores = row["loads"], row["stores"]
            whole = row["registers"] <= 40 and row["occupancy"] >= 0.75
            code = static.compile_launch(case.launches[0], arch)
            if case.op == "gradient of logits":
                assert loads["128"] == 2 and stores == {"128": 1} and whole, label
                assert code.all["special"] <= 8 + 2, label  # an exponential a logit; a division by the number of tiles
            else:
                assert loads == {"128": 4} and row["in_loop"] and whole, label
                assert code.hot["special"] == 16 + 1 and not code.hot["barrier"], label
print("clean")
odd = torch.empty(64, 32016, device="meta")[:, :32001]
each, targets = torch.empty(64, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
(made,) = registry.record(head._reduce, odd, targets, each, each, each, None)
code = static.compile_launch(made, 80)
assert code.hot["load.128"] == 4 and not code.spills
assert {n for n in code.all if n.startswith("load.")} <= {"load.128", "load.64", "load.32"}
print("odd")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
with FakeTensorMode(shape_env=ShapeEnv()):
    h, w = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda") for n in (50, 32000))
    t = torch.empty(50, dtype=torch.int64, device="cuda")
    code = make_fx(head.token_logprobs, tracing_mode="symbolic")(h, w, t).code
assert code.count("llama2_kernels.token_logprobs") == 1 and "triton" not in code and "mm" not in code, code
print("whole")
"""


def test_machine_code(compiler_env: dict[str, str]) -> None:
    """For the A100 and the H200: no spills, 16 bytes an access, 17 exponentials for 16 logits, no barrier.

    For a compiler the operator is one, however many pieces it works in.
    """
    env = {**compiler_env, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STATIC], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["clean", "odd", "whole"], done.stderr


def test_settings() -> None:
    """A thread reads 16 bytes at a time, and four times as much in a step where the row is long enough."""
    for itemsize in (4, 8):
        for width in (1, 100, 4095, 4096, 32000, 128256):
            s = settings_for(width, itemsize)
            assert s.vector * itemsize == 16 and (s.columns <= width or s.columns == s.vector * 128)


def test_import_without_triton(compiler_env: dict[str, str]) -> None:
    code = "import sys; sys.modules['triton'] = None; import torch; "
    code += "from llama2_kernels import linear_cross_entropy as s; x, t = torch.eye(2), torch.tensor([0, -100]); "
    code += "print(s.reference_token_logprobs(x, x, t).tolist()[1]); s.token_logprobs(x, x, t)"
    done = subprocess.run([sys.executable, "-c", code], env=compiler_env, capture_output=True, text=True)
    assert float(done.stdout) == 0
    assert "RuntimeError" in done.stderr and "CUDA device" in done.stderr
