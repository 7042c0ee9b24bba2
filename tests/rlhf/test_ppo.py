"""The maths of PPO: numbers worked by hand, second derivations, enumeration, finite differences."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from llama2cli.rlhf import ppo
from llama2cli.rlhf.ppo import Moments


def real(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def runs(lengths: list[int], width: int, starts: list[int] | None = None) -> torch.Tensor:
    """A mask with one run of tokens per row."""
    places = torch.arange(width)
    starts = starts or [0] * len(lengths)
    return torch.stack([(places >= s) & (places < s + n) for s, n in zip(starts, lengths)])


MASK = runs([3, 1, 5, 4], 5)


# --- whitening ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 5), (1e4, -3e3), (1e-4, 0)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_whitened_has_mean_0_and_variance_1_over_what_it_covers(mask, scale, shift):
    x = real(4, 5) * scale + shift
    got = ppo.whiten(x, mask)
    covered = got if mask is None else got[mask]
    assert covered.mean().item() == pytest.approx(0, abs=1e-9)
    assert covered.var(correction=0).item() == pytest.approx(1, abs=1e-9)
    if mask is not None:
        assert got[~mask].tolist() == [0] * int((~mask).sum())
        worse = torch.where(mask, x, 1e9)  # padding has no part in it
        assert torch.equal(ppo.whiten(worse, mask), got)
    kept = ppo.whiten(x, mask, shift_mean=False)
    kept = kept if mask is None else kept[mask]
    assert kept.mean().item() == pytest.approx((x if mask is None else x[mask]).mean().item(), rel=1e-9, abs=1e-9)
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-9)
    assert torch.equal(got.flatten().argsort() if mask is None else covered.argsort(),
                       x.flatten().argsort() if mask is None else x[mask].argsort())  # fmt: skip


def test_whitening_by_hand():
    """1, 3: mean 2, deviation 1. 2, 4, 4, 4, 5, 5, 7, 9: mean 5, deviation 2."""
    assert ppo.whiten(torch.tensor([1.0, 3.0])).tolist() == [-1, 1]
    x = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9])
    assert ppo.whiten(x).tolist() == [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]
    assert ppo.whiten(x, shift_mean=False).tolist() == [3.5, 4.5, 4.5, 4.5, 5, 5, 6, 7]


def test_values_that_are_equal_stay_so():
    """Rounding is not blown up to variance 1, one value is no NaN, nothing is nothing."""
    noisy = 3.7 + 1e-7 * real(64).float()
    assert ppo.whiten(noisy).abs().max() == 0
    assert ppo.whiten(torch.tensor([5.0])).tolist() == [0]
    assert ppo.whiten(torch.tensor([5.0, 5.0]), shift_mean=False).tolist() == [5, 5]
    assert ppo.whiten(torch.tensor([1.0, 2.0]), torch.tensor([False, False])).tolist() == [0, 0]
    assert ppo.whiten(torch.tensor([1.0, 3.0], dtype=torch.bfloat16)).dtype == torch.float32


def test_moments_of_parts_are_those_of_the_whole():
    x = real(1000) * 3 + 100
    whole = ppo.moments(x)
    parts = Moments()
    for part in (x[:1], x[1:1], x[1:400], x[400:]):
        parts = ppo.merged(parts, ppo.moments(part))
    assert parts == pytest.approx(whole, rel=1e-12)
    assert whole.deviation == pytest.approx(x.std(correction=0).item(), rel=1e-12)
    torch.testing.assert_close(ppo.standardize(x, parts), ppo.whiten(x))
    assert ppo.merged(Moments(), Moments()) == Moments()
    # running: the second batch is measured by both, and is not centred on itself
    second = ppo.standardize(x[500:] + 10, ppo.merged(ppo.moments(x[:500]), ppo.moments(x[500:] + 10)))
    assert second.mean() > 0.3


# --- KL -----------------------------------------------------------------------------------------------------------


def expected(p: torch.Tensor, of: torch.Tensor) -> float:
    return (p * of).sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_estimators_against_the_exact_kl_by_enumeration(seed):
    """The mean of k1 and of k3 over the distribution is the KL; k2 is off by the third order of the distance."""
    logits, ref = real(7, seed=seed), real(7, seed=seed + 50)
    p, q = logits.softmax(0), ref.softmax(0)
    exact = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
    assert ppo.kl_exact(logits, ref).item() == pytest.approx(exact, rel=1e-12)
    estimates = {k: ppo.kl_estimate(p.log(), q.log(), k) for k in ppo.KL_ESTIMATORS}
    assert expected(p, estimates["k1"]) == pytest.approx(exact, rel=1e-12)
    assert expected(p, estimates["k3"]) == pytest.approx(exact, rel=1e-12)
    assert (estimates["k1"] < 0).any()
    assert (estimates["k2"] >= 0).all() and (estimates["k3"] >= 0).all()
    gaps = []
    for step in (0.1, 0.01):  # towards the reference: the error falls by 1000, the KL by 100
        near = (ref + step * (logits - ref)).softmax(0)
        kl = expected(near, near.log() - q.log())
        gaps.append(abs(expected(near, ppo.kl_estimate(near.log(), q.log(), "k2")) - kl))
    assert gaps[1] < gaps[0] / 500


def test_estimators_by_monte_carlo():
    logits, ref = real(12, seed=3), real(12, seed=4)
    n = 200_000
    drawn = torch.multinomial(logits.softmax(0), n, replacement=True, generator=torch.Generator().manual_seed(0))
    lp, lq = logits.log_softmax(0)[drawn], ref.log_softmax(0)[drawn]
    exact = ppo.kl_exact(logits, ref).item()
    for name in ("k1", "k3"):
        sample = ppo.kl_estimate(lp, lq, name)
        assert abs(sample.mean().item() - exact) < 4 * (sample.std() / math.sqrt(n)).item(), name


def test_estimators_by_hand():
    """d = log 2: k1 0.6931, k2 0.2402, k3 1/2 - 1 + log 2."""
    at, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    got = [ppo.kl_estimate(at, ref, k).item() for k in ("k1", "k2", "k3")]
    assert got == pytest.approx([math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5], rel=1e-6)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        ppo.kl_estimate(at, ref, "k4")


def test_the_gradient_of_the_mean_of_k2_is_that_of_the_kl():
    """Which k1's is not: taken as a loss at sampled tokens, the gradient of its mean is 0."""
    logits, ref = real(6, seed=1).requires_grad_(), real(6, seed=2)
    (true,) = torch.autograd.grad(ppo.kl_exact(logits, ref), logits)
    p = logits.softmax(0).detach()
    for name, want in (("k2", true), ("k1", torch.zeros(6, dtype=torch.float64))):
        loss = (p * ppo.kl_estimate(logits.log_softmax(0), ref.log_softmax(0), name)).sum()
        (got,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_kl_of_sequences_is_the_sum_over_their_tokens():
    """Every sequence of three tokens of three, by enumeration: sum over tokens of the expected KL there."""
    first, then = real(3, seed=1), real(3, 3, seed=2)  # the second and third token depend on the one before
    ref_first, ref_then = real(3, seed=3), real(3, 3, seed=4)
    total = by_tokens = 0.0
    for a, b, c in product(range(3), repeat=3):
        lp = first.log_softmax(0)[a] + then[a].log_softmax(0)[b] + then[b].log_softmax(0)[c]
        lq = ref_first.log_softmax(0)[a] + ref_then[a].log_softmax(0)[b] + ref_then[b].log_softmax(0)[c]
        logits, ref = torch.stack([first, then[a], then[b]]), torch.stack([ref_first, ref_then[a], ref_then[b]])
        total += lp.exp().item() * (lp - lq).item()
        by_tokens += lp.exp().item() * ppo.kl_exact(logits, ref).sum().item()
    assert by_tokens == pytest.approx(total, rel=1e-12)


def test_exact_kl_and_entropy_at_the_edges():
    uniform, never = torch.zeros(4), torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    assert ppo.entropy(uniform).item() == pytest.approx(math.log(4))
    assert ppo.entropy(never).item() == pytest.approx(math.log(2))
    assert ppo.kl_exact(never, uniform).item() == pytest.approx(math.log(2))
    assert ppo.kl_exact(uniform, never).item() == math.inf
    assert ppo.kl_exact(never, never).item() == 0
    logits = real(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(ppo.entropy, logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(ppo.entropy(logits), torch.special.entr(p).sum(-1))
    closed = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    assert torch.autograd.grad(ppo.entropy(closed), closed)[0].isfinite().all()


# --- rewards ------------------------------------------------------------------------------------------------------


def test_rewards_by_hand():
    """beta 0.5; two answers of three and one token. Per token: -beta k everywhere, the reward at the last."""
    mask = runs([3, 1], 4)
    kl = torch.tensor([[0.2, -0.4, 0.6, 9.0], [1.0, 9.0, 9.0, 9.0]])
    rewards = torch.tensor([2.0, -1.0])
    per_token = ppo.penalized(rewards, kl, mask, 0.5)
    torch.testing.assert_close(per_token, torch.tensor([[-0.1, 0.2, 1.7, 0], [-1.5, 0, 0, 0]]))
    per_answer = ppo.penalized(rewards, kl, mask, 0.5, "answer")
    torch.testing.assert_close(per_answer, torch.tensor([[0, 0, 1.8, 0], [-1.5, 0, 0, 0]]))


def test_both_penalties_have_the_same_sum():
    """And so the same advantage at the first token with gamma = lambda = 1."""
    mask = runs([3, 1, 5, 4], 6, starts=[0, 5, 1, 0])
    kl, rewards, values = real(4, 6), real(4, seed=1), real(4, 6, seed=2)
    both = [ppo.penalized(rewards, kl, mask, 0.3, per) for per in ("token", "answer")]
    want = rewards - 0.3 * torch.where(mask, kl, 0).sum(1)
    for got in both:
        torch.testing.assert_close(got.sum(1), want)
        assert got[~mask].abs().sum() == 0
    first = mask.long().argmax(1)
    ends = [ppo.gae(got, values, mask, 1, 1)[0][torch.arange(4), first] for got in both]
    torch.testing.assert_close(ends[0], ends[1])


def test_masks_that_are_no_answers():
    assert ppo.last_tokens(runs([3, 1, 5, 4], 6, starts=[0, 5, 1, 0])).tolist() == [2, 5, 5, 3]
    x = torch.zeros(2, 3)
    for row, what in (([False] * 3, "no token"), ([True, False, True], "holes")):
        mask = torch.tensor([[True, True, False], row])
        with pytest.raises(ValueError, match=f"answer 1 has {what}"):
            ppo.penalized(torch.zeros(2), x, mask, 0.1)
        with pytest.raises(ValueError, match=f"answer 1 has {what}"):
            ppo.gae(x, x, mask)


# --- advantages ---------------------------------------------------------------------------------------------------


def closed_form(rewards, values, n, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l} for one answer, as a product with a triangular matrix."""
    after = torch.cat([values[1:n], values.new_zeros(1)])
    delta = rewards[:n] + gamma * after - values[:n]
    powers = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    weights = torch.where(powers >= 0, (gamma * lam) ** powers.clamp(min=0).double(), 0.0)
    return weights @ delta


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (1, 1), (0.9, 0), (0.97, 0.5), (0, 0.5)])
def test_advantages_by_loop_and_by_closed_form(gamma, lam):
    lengths, starts = [3, 1, 6, 4, 2], [0, 0, 0, 2, 4]
    mask = runs(lengths, 6, starts)
    rewards, values = real(5, 6), real(5, 6, seed=1)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, (n, s) in enumerate(zip(lengths, starts)):
        want = closed_form(rewards[i, s:], values[i, s:], n, gamma, lam)
        torch.testing.assert_close(advantages[i, s : s + n], want)
        torch.testing.assert_close(returns[i, s : s + n], want + values[i, s : s + n])
    assert advantages[~mask].abs().sum() == 0 and returns[~mask].abs().sum() == 0
    worse = [torch.where(mask, x, 1e9) for x in (rewards, values)]
    assert torch.equal(ppo.gae(*worse, mask, gamma, lam)[0], advantages)


def test_advantages_at_the_ends_of_lambda():
    """lambda 1: what was earned from here on, less the value. lambda 0: one step."""
    mask = runs([4], 4)
    rewards, values = real(1, 4), real(1, 4, seed=1)
    earned = [sum(0.9 ** (k - t) * rewards[0, k].item() for k in range(t, 4)) for t in range(4)]
    assert ppo.gae(rewards, values, mask, 0.9, 1)[1][0].tolist() == pytest.approx(earned)
    step = [rewards[0, t].item() + 0.9 * ([*values[0].tolist(), 0][t + 1]) for t in range(4)]
    assert ppo.gae(rewards, values, mask, 0.9, 0)[1][0].tolist() == pytest.approx(step)


def test_advantages_by_hand():
    """r = 0, 0, 1; V = 0.5, 0.25, 0.5; gamma 1, lambda 0.5: deltas -0.25, 0.25, 0.5."""
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.25, 0.5]], requires_grad=True)
    advantages, returns = ppo.gae(rewards, values, runs([3], 3), 1, 0.5)
    assert advantages.tolist() == [[0.0, 0.5, 0.5]]
    assert returns.tolist() == [[0.5, 0.75, 1.0]]
    assert not advantages.requires_grad and not returns.requires_grad


# --- the policy ---------------------------------------------------------------------------------------------------


def test_ratio_1_gives_minus_the_mean_advantage():
    logprobs, advantages = -real(4, 5).abs(), real(4, 5, seed=1)
    loss = ppo.policy_loss(logprobs, logprobs, advantages, MASK)
    assert loss[MASK].mean().item() == pytest.approx(-advantages[MASK].mean().item(), rel=1e-12)
    assert loss[~MASK].abs().sum() == 0
    assert not ppo.clipped(logprobs, logprobs, advantages, MASK).any()


def test_gradient_at_ratio_1_is_that_of_the_policy_gradient():
    """-A grad log pi: the same as of -A log pi."""
    old, advantages = -real(4, 5).abs(), real(4, 5, seed=1)
    logprobs = old.clone().requires_grad_()
    (got,) = torch.autograd.grad(ppo.policy_loss(logprobs, old, advantages, MASK).sum(), logprobs)
    torch.testing.assert_close(got, torch.where(MASK, -advantages, 0.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # beyond the clip, where the advantage pushes it
        (1.5, -2.0, 3.0, True),  # beyond it on the other side: is brought back
        (0.5, 2.0, -1.0, True),
        (0.5, -2.0, 1.6, False),
        (0.9, -2.0, 1.8, True),
        (5.0, 0.0, 0.0, True),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, slope):
    """clip 0.2; slope: whether a gradient is left (of a zero advantage it is zero, and nothing is cut off)."""
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    mask, advantages = torch.tensor([[True]]), torch.tensor([[advantage]], dtype=torch.float64)
    got = ppo.policy_loss(new, old, advantages, mask)
    assert got.item() == pytest.approx(loss, rel=1e-12)
    (grad,) = torch.autograd.grad(got.sum(), new)
    assert grad.item() == pytest.approx(-ratio * advantage if slope else 0, rel=1e-12)
    assert ppo.clipped(new, old, advantages, mask).item() is not slope


def test_padding_gives_neither_loss_nor_gradient():
    """Whatever stands there: a ratio of e^900 would be infinite."""
    old = torch.where(MASK, -1.0, -900.0)
    new = torch.zeros(4, 5).requires_grad_()
    loss = ppo.policy_loss(new, old, torch.ones(4, 5), MASK)
    (grad,) = torch.autograd.grad(loss.sum(), new)
    assert loss.isfinite().all() and grad.isfinite().all()
    assert grad[~MASK].abs().sum() == 0 and (grad[MASK] == 0).all()  # e^1 is beyond the clip


def test_clip_fraction_is_a_share_of_tokens():
    old, advantages = -real(4, 5).abs(), real(4, 5, seed=1)
    new = old + 0.5 * real(4, 5, seed=2)
    cut = ppo.clipped(new, old, advantages, MASK)
    leaf = new.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ppo.policy_loss(leaf, old, advantages, MASK).sum(), leaf)
    assert torch.equal(cut, (grad == 0) & MASK) and 0 < cut.sum() < MASK.sum()
    assert cut[MASK].float().mean().item() == pytest.approx(cut.sum().item() / 13)


# --- the value ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.0, 0.0, 3.0, 0.5 * 2.8**2), (0.1, 0.0, 3.0, 0.5 * 2.9**2), (1.0, 0.0, -3.0, 8.0), (1.0, 0.0, 0.9, 0.5 * 0.49)],
)
def test_value_clipping_by_hand(value, old, target, loss):
    """clip 0.2: a value far from its old one counts as 0.2 from it, if that is the larger error."""
    v, o, r = (torch.tensor([[x]], dtype=torch.float64) for x in (value, old, target))
    mask = torch.tensor([[True]])
    assert ppo.value_loss(v, o, r, mask, 0.2).item() == pytest.approx(loss)
    assert ppo.value_loss(v, o, r, mask).item() == pytest.approx((value - target) ** 2 / 2)


def test_gradients_against_finite_differences():
    mask = MASK
    old, advantages, returns = -real(4, 5).abs(), real(4, 5, seed=1), real(4, 5, seed=2)
    new = (old + 0.3 * real(4, 5, seed=3)).requires_grad_()
    values = real(4, 5, seed=4).requires_grad_()
    checks = {
        "policy": (lambda x: ppo.policy_loss(x, old, advantages, mask), new),
        "value": (lambda x: ppo.value_loss(x, old, returns, mask), values),
        "value clipped": (lambda x: ppo.value_loss(x, old, returns, mask, 0.2), values),
        **{k: (lambda x, k=k: ppo.kl_estimate(x, old, k), new) for k in ppo.KL_ESTIMATORS},
        "exact": (lambda x: ppo.kl_exact(x, returns), values),
    }
    for name, (function, at) in checks.items():
        assert torch.autograd.gradcheck(function, at), name


# --- for the log --------------------------------------------------------------------------------------------------


def test_explained_variance():
    returns = real(4, 5)
    assert ppo.explained_variance(returns, returns, MASK) == 1
    assert ppo.explained_variance(torch.full_like(returns, 3), returns, MASK) == pytest.approx(0, abs=1e-12)
    assert ppo.explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert ppo.explained_variance(returns, torch.ones(4, 5), MASK) == 0
    noise = 0.5 * real(400, 500, seed=1)
    big = real(400, 500)
    everywhere = torch.ones_like(big, dtype=torch.bool)
    assert ppo.explained_variance(big + noise, big, everywhere) == pytest.approx(0.75, abs=0.01)


def test_beta_by_size():
    assert [ppo.beta(n) for n in (1e6, 6.7e9, 13e9, 34e9, 70e9)] == [0.01, 0.01, 0.01, 0.005, 0.005]


# --- all of it ----------------------------------------------------------------------------------------------------


def test_it_climbs_to_a_known_optimum():
    """A policy over four tokens with known rewards: the optimum is pi_0 exp(r / beta) / Z."""
    rewards, beta = torch.tensor([0.0, 1.0, 2.0, -1.0]), 1.0
    ref = torch.tensor([0.5, 0.0, -0.5, 0.0])
    optimum = (ref.log_softmax(0) + rewards / beta).softmax(0)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(512, 1, dtype=torch.bool)
    for _ in range(150):
        with torch.no_grad():
            ids = torch.multinomial(logits.softmax(0), 512, replacement=True, generator=generator)
            old = logits.log_softmax(0)[ids][:, None]
            kl = ppo.kl_estimate(old, ref.log_softmax(0)[ids][:, None])
            earned = ppo.penalized(rewards[ids], kl, mask, beta)
            advantages, _ = ppo.gae(earned, torch.zeros_like(earned), mask)
            advantages = ppo.whiten(advantages, mask)
        for _ in range(2):
            loss = ppo.policy_loss(logits.log_softmax(0)[ids][:, None], old, advantages, mask)
            optimizer.zero_grad()
            loss[mask].mean().backward()
            optimizer.step()
    assert ppo.kl_exact(logits, optimum.log()).item() < 0.01
    assert ppo.kl_exact(ref, optimum.log()).item() > 0.4
