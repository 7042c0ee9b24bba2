"""The optimizer: schedule, decay, clipping, refusal of what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llama2cli.errors import Failure, Misuse
from llama2cli.training import optim


def test_the_schedule_by_hand() -> None:
    s = optim.Schedule(peak=1.0, warmup=4, steps=14)
    assert [s.lr(i) for i in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert s.lr(9) == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert s.lr(14) == pytest.approx(0.1)
    assert all(s.lr(i) > s.lr(i + 1) for i in range(4, 14))


def test_the_schedule_is_transformers() -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    param = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([param], lr=3e-4)
    clock = get_cosine_with_min_lr_schedule_with_warmup(theirs, 10, 100, min_lr_rate=0.1)
    ours = optim.Schedule(3e-4, 10, 100)
    for step in range(1, 101):
        theirs.step()
        clock.step()  # theirs counts from 0 and takes a first step at rate 0: after k calls it is our step k
        assert ours.lr(step) == pytest.approx(clock.get_last_lr()[0], rel=1e-9)


def test_warmup_is_the_papers_or_a_tenth() -> None:
    assert optim.warmup_steps(500_000, None) == 2000
    assert optim.warmup_steps(20_000, None) == 2000
    assert optim.warmup_steps(40, None) == 4
    assert optim.warmup_steps(1, None) == 1
    assert optim.warmup_steps(40, 0) == 0
    assert optim.Schedule(1.0, 0, 10).lr(1) < 1.0
    with pytest.raises(Misuse, match="the peak would never be reached"):
        optim.warmup_steps(40, 40)


def test_what_decays() -> None:
    model = nn.Module()
    for name, shape in (("embed", (4, 2)), ("out", (2, 2)), ("norm", (2,))):
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    for decay, wanted in (("matrices", {"embed", "out"}), ("linears", {"out"}), ("all", {"embed", "out", "norm"})):
        optimizer = optim.adamw(model.named_parameters(), lr=0.1, weight_decay=0.5, decay=decay)  # type: ignore[arg-type]
        for p in model.parameters():
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        optim.step(optimizer, list(model.parameters()), lr=0.1, loss=1.0)
        shrunk = {n for n, p in model.named_parameters() if not torch.equal(p, torch.ones_like(p))}
        assert shrunk == wanted
        assert all(torch.allclose(p, torch.tensor(1 - 0.1 * 0.5)) for n, p in model.named_parameters() if n in wanted)


def test_a_step_is_adamw_by_hand() -> None:
    """Two steps of the formulas of Loshchilov and Hutter, in Python floats."""
    p = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = optim.adamw([("w", p)], lr=0.01)
    w, m, v = 2.0, 0.0, 0.0
    for t, (g, lr) in enumerate([(0.5, 0.01), (-0.25, 0.02)], 1):
        p.grad = torch.tensor([[g]])
        norm = optim.step(optimizer, [p], lr=lr, loss=1.0)
        assert norm == pytest.approx(abs(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= lr * 0.1 * w
        w -= lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-5)
        assert p.item() == pytest.approx(w, rel=1e-6)
    assert p.grad is None


def test_clipping_scales_the_whole_gradient() -> None:
    a, b = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))
    sgd = torch.optim.SGD([a, b], lr=1.0)
    a.grad, b.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert optim.step(sgd, [a, b], lr=1.0, loss=1.0, clip=1.0) == 5.0
    assert (a.item(), b.item()) == pytest.approx((-0.6, -0.8), rel=1e-5)
    a.grad, b.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    optim.step(sgd, [a, b], lr=1.0, loss=1.0, clip=0.0)
    assert (a.item(), b.item()) == pytest.approx((-3.6, -4.8), rel=1e-5)


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_stops_before_the_update(loss: float, gradient: float) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = optim.adamw([("w", p)], lr=0.1)
    p.grad = torch.full((2, 2), gradient)
    with pytest.raises(Failure, match="stopped before the update"):
        optim.step(optimizer, [p], lr=0.1, loss=loss)
    assert torch.equal(p, torch.ones(2, 2)) and not optimizer.state
