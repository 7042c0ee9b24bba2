"""From scores to what tokens are trained on: by hand, by NumPy, by loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama2cli.rlhf import credit, ppo
from llama2cli.rlhf.credit import Terms
from llama2cli.rlhf.ppo import Moments


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_cut(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool)


# --- whitening ----------------------------------------------------------------------------------------------------


def test_whitening_by_hand() -> None:
    """2, 4, 4, 4, 5, 5, 7, 9: mean 5, deviation 2; the penalty and the bound come after it, the bound first."""
    x, cut = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9]), torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).bool()
    plain, _ = credit.whitened(x, cut, Terms(0.01), Moments())
    assert plain.tolist() == [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]
    punished, _ = credit.whitened(x, cut, Terms(0.01, cut_penalty=0.25), Moments())
    assert punished.tolist() == [-1.75, -0.5, -0.5, -0.5, 0, 0, 1, 1.75]
    both, _ = credit.whitened(x, cut, Terms(0.01, cut_penalty=0.25, reward_clip=1.0), Moments())
    assert both.tolist() == [-1.25, -0.5, -0.5, -0.5, 0, 0, 1, 0.75]
    kept, _ = credit.whitened(x, cut, Terms(0.01, shift_mean=False), Moments())
    assert kept.tolist() == [3.5, 4.5, 4.5, 4.5, 5, 5, 6, 7]
    raw, _ = credit.whitened(x, cut, Terms(0.01, whiten="none", cut_penalty=1.0, reward_clip=6.0), Moments())
    assert raw.tolist() == [1, 4, 4, 4, 5, 5, 6, 5]


@pytest.mark.parametrize("whiten", ["batch", "running", "none"])
def test_moments_go_on_whatever_is_whitened(whiten: Any) -> None:
    """After each batch they are those of all values so far; running statistics hold the batch itself already."""
    batches = [real(n, seed=n) * 3 + n for n in (4, 1, 7)]
    so_far, terms = Moments(), Terms(0.01, whiten=whiten)
    for k, x in enumerate(batches):
        found, so_far = credit.whitened(x, no_cut(len(x)), terms, so_far)
        everything = np.concatenate([b.numpy() for b in batches[: k + 1]])
        assert so_far.n == len(everything) and so_far.mean == pytest.approx(everything.mean())
        assert so_far.deviation == pytest.approx(everything.std(), rel=1e-9)
        over = {"batch": x.numpy(), "running": everything, "none": None}[whiten]
        if over is None:
            want = x.numpy()
        else:
            want = (x.numpy() - over.mean()) / over.std() if over.std() else np.zeros(len(x))
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-9, atol=1e-9)


def test_a_batch_of_equal_rewards_teaches_nothing() -> None:
    found, moments = credit.whitened(torch.full((5,), 3.2), no_cut(5), Terms(0.01), Moments())
    assert found.tolist() == [0] * 5 and moments.n == 5


def test_moments_survive_json() -> None:
    """As a resumed run reads them: the same numbers."""
    import json

    _, moments = credit.whitened(real(9) / 3, no_cut(9), Terms(0.01), Moments())
    assert Moments(*json.loads(json.dumps(list(moments)))) == moments


# --- KL and advantages --------------------------------------------------------------------------------------------


def test_the_kl_that_is_named_is_the_one_that_is_paid() -> None:
    p, q = -real(6).abs(), -real(6, seed=1).abs()
    for name in ("k1", "k2", "k3"):
        found = ppo.kl_estimate(p, q, name)
        d = (p - q).numpy()
        want = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[name]
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("per", ["token", "answer"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_advantages_by_the_double_sum(per: Any, gamma: float, lam: float) -> None:
    sizes = [3, 1, 5]
    mask = torch.arange(5) < torch.tensor(sizes)[:, None]
    rewards, kl, values = real(3), real(3, 5, seed=1), real(3, 5, seed=2)
    terms = Terms(0.3, per=per, gamma=gamma, lam=lam)
    found, returns = credit.advantages(rewards, kl, values, mask, terms)
    for i, n in enumerate(sizes):
        paid = 0.3 * kl[i, :n]
        earned = [0.0] * n if per == "answer" else (-paid).tolist()
        earned[-1] += float(rewards[i]) - (float(paid.sum()) if per == "answer" else 0)
        v = [*values[i, :n].tolist(), 0.0]
        delta = [earned[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert found[i, t].item() == pytest.approx(want, rel=1e-9)
            assert returns[i, t].item() == pytest.approx(want + v[t], rel=1e-9)
        assert found[i, n:].tolist() == returns[i, n:].tolist() == [0] * (5 - n)


def test_without_discount_the_first_return_is_all_that_is_earned() -> None:
    """gamma = lambda = 1: the return of the first token is reward less beta KL, however it is paid."""
    mask = torch.ones(4, 6, dtype=torch.bool)
    rewards, kl = real(4), real(4, 6, seed=1)
    for per in ("token", "answer"):
        terms = Terms(0.2, per=per, lam=1.0)  # type: ignore[arg-type]
        _, returns = credit.advantages(rewards, kl, real(4, 6, seed=2), mask, terms)
        torch.testing.assert_close(returns[:, 0], rewards - 0.2 * kl.sum(1))


# --- losses -------------------------------------------------------------------------------------------------------


def policy_by_tokens(new: list[float], old: list[float], entropy: list[float], A: list[float], clip: float) -> Any:
    total = dict.fromkeys(("loss", *credit.POLICY), 0.0)
    for p, q, h, a in zip(new, old, entropy, A):
        r = math.exp(p - q)
        total["loss"] += -min(r * a, min(max(r, 1 - clip), 1 + clip) * a)
        total["clip_fraction"] += (r > 1 + clip and a > 0) or (r < 1 - clip and a < 0)
        total["entropy"] += h
        total["kl_old"] += r - 1 - math.log(r)
        total["ratio_gap"] += abs(r - 1)
    return list(total.values())


def value_by_tokens(new: list[float], old: list[float], returns: list[float], clip: float | None) -> Any:
    loss, held = 0.0, 0
    for v, w, target in zip(new, old, returns):
        error = (v - target) ** 2
        if clip is not None:
            error = max(error, (w + min(max(v - w, -clip), clip) - target) ** 2)
            held += abs(v - w) > clip
        loss += error / 2
    return [loss, held]


def inputs() -> tuple[Tensor, ...]:
    """New and old log-probabilities, entropies, advantages; values, old values, returns: ratios beyond a clip too."""
    old = -real(60).abs() - 1
    new = old + 0.3 * real(60, seed=1)
    return new, old, real(60, seed=2).abs(), real(60, seed=3), real(60, seed=4), real(60, seed=5), real(60, seed=6)


@pytest.mark.parametrize("clip", [0.2, 0.02])
def test_policy_sums_by_tokens(clip: float) -> None:
    new, old, entropy, A, *_ = inputs()
    found = credit.policy_sums(clip)(new, entropy, old_logprobs=old, advantages=A)
    want = policy_by_tokens(*(x.tolist() for x in (new, old, entropy, A)), clip)
    assert found.tolist() == pytest.approx(want, rel=1e-9)
    assert 0 < want[1] < 60  # some are cut off, some are not


@pytest.mark.parametrize("clip", [None, 0.1, 1.0])
def test_value_sums_by_tokens(clip: float | None) -> None:
    *_, values, old, returns = inputs()
    found = credit.value_sums(clip)(values, old_values=old, returns=returns)
    assert found.tolist() == pytest.approx(value_by_tokens(*(x.tolist() for x in (values, old, returns)), clip))


def test_joint_sums_are_both() -> None:
    new, old, entropy, A, values, was, returns = inputs()
    labels = {"old_logprobs": old, "advantages": A, "old_values": was, "returns": returns}
    policy = credit.policy_sums(0.2)(new, entropy, old_logprobs=old, advantages=A)
    value = credit.value_sums(0.1)(values, old_values=was, returns=returns)
    before = dict(labels)
    found = credit.joint_sums(0.2, 0.1, 0.3)(new, entropy, values, **labels)
    assert labels == before
    want = [policy[0] + 0.3 * value[0], *policy[1:], policy[0], *value]
    assert found.tolist() == pytest.approx([float(x) for x in want], rel=1e-12)


def test_only_the_loss_has_a_gradient() -> None:
    """What is tracked beside it teaches nothing: the gradient is that of the loss, by finite differences."""
    new, old, entropy, A, values, was, returns = inputs()
    labels = {"old_logprobs": old, "advantages": A, "old_values": was, "returns": returns}
    p, v, h = (x.clone().requires_grad_() for x in (new, values, entropy))
    sums = credit.joint_sums(0.2, 0.1, 0.3)(p, h, v, **labels)
    sums[0].backward()
    assert h.grad is None or float(h.grad.abs().max()) == 0
    for x, name in ((p, "p"), (v, "v")):
        for i in range(0, 60, 7):
            step = torch.zeros(60, dtype=torch.float64)
            step[i] = 1e-6
            a, b = (
                credit.joint_sums(0.2, 0.1, 0.3)(
                    *((new + s, entropy, values) if name == "p" else (new, entropy, values + s)), **labels
                )[0]
                for s in (step, -step)
            )
            assert float(x.grad[i]) == pytest.approx(float(a - b) / 2e-6, abs=1e-5)  # type: ignore[index]


def test_at_ratio_1_the_loss_is_minus_the_mean_advantage() -> None:
    _, old, entropy, A, *_ = inputs()
    found = credit.policy_sums(0.2)(old, entropy, old_logprobs=old, advantages=A)
    assert found[0].item() == pytest.approx(-A.sum().item()) and found[[1, 3, 4]].tolist() == [0, 0, 0]


def test_explained_variance_of_parts_is_that_of_the_whole() -> None:
    values, returns = real(50), real(50, seed=1) + real(50)
    want = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
    assert ppo.explained(*ppo.spreads(values, returns)) == pytest.approx(want)
    parts = [ppo.spreads(values[a:b], returns[a:b]) for a, b in ((0, 20), (20, 20), (20, 50))]
    whole = [Moments(), Moments()]
    for part in parts:
        whole = [ppo.merged(a, b) for a, b in zip(whole, part)]
    assert ppo.explained(*whole) == pytest.approx(want)
    assert ppo.explained(*ppo.spreads(returns, returns)) == 1
    assert ppo.explained(*ppo.spreads(values, torch.ones(50))) == 0
