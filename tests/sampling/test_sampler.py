"""The sampler against the distribution that it draws from, transformers' warpers, and hand-worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.sampling.sampler import Policy, SampleParams, draw, keep_nucleus, search, uniforms


def policy(n: int, temperature: float = 1.0, top_p: float = 1.0) -> Policy:
    return Policy([SampleParams(1, temperature, top_p)] * n, "cpu")


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, 1)))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic over cells of at least 10 expected counts (the others are one cell), and its bound at 1e-6."""
    rare = expected < 10
    o = np.append(observed[~rare], observed[rare].sum())
    e = np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    k = len(e) - 1
    # Wilson-Hilferty: the cube root of a chi-square variable over its degrees of freedom is nearly normal
    bound = k * (1 - 2 / (9 * k) + 4.75 * math.sqrt(2 / (9 * k))) ** 3
    return float(((o - e) ** 2 / e).sum()), bound


@pytest.mark.parametrize("vocab", [3, 512, 4096, 4097, 5000])  # one block, several, and a last one that is not full
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_those_of_the_softmax(vocab, temperature):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    n, total, counts = 2000, 40_000, np.zeros(vocab)
    for i in range(total // n):
        drawn = draw(logits.expand(n, vocab), policy(n, temperature), uniform(n, i))
        counts += np.bincount(drawn.ids_N.numpy(), minlength=vocab)
    want = torch.softmax(logits.double() / temperature, -1).numpy() * total
    statistic, bound = chi_square(counts, want)
    assert statistic < bound


def test_the_chi_square_test_finds_a_wrong_temperature():
    logits = torch.randn(512, generator=torch.Generator().manual_seed(1)) * 2
    n = 20_000
    drawn = draw(logits.expand(n, 512), policy(n, 1.05), uniform(n))
    want = torch.softmax(logits.double(), -1).numpy() * n
    statistic, bound = chi_square(np.bincount(drawn.ids_N.numpy(), minlength=512), want)
    assert statistic > bound


def test_one_uniform_number_by_hand():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, want in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)]:
        ids, mass = search(p, torch.tensor([[u]], dtype=torch.float64))
        assert (int(ids), float(mass)) == (want, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 2**32), st.sampled_from([0.0, 1 - 2**-53, None]))
def test_a_token_without_probability_is_never_taken(vocab, seed, edge):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(4, vocab, generator=generator) ** 20
    p[torch.rand(4, vocab, generator=generator) < 0.9] = 0
    p[:2, : seed % vocab] = 0  # whole blocks without any
    p[:, seed % vocab] = 1e-30
    u = (
        torch.rand(4, 1, generator=generator, dtype=torch.float64)
        if edge is None
        else torch.full((4, 1), edge).double()
    )
    ids, _ = search(p, u)
    assert (p.gather(1, ids[:, None]) > 0).all()


@pytest.mark.parametrize("vocab", [40, 512, 5000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])  # a nucleus of nearly all, of some, of one or two
def test_nucleus_is_that_of_transformers(vocab, scale):
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(vocab)
    # spaced logits: no ties, and no running sum that falls on top_p within rounding
    logits = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(5)]).double() / vocab * scale
    for top_p in (0.05, 0.5, 0.9, 0.99):
        want = TopPLogitsWarper(top_p)(None, logits) > -math.inf
        got = keep_nucleus(torch.softmax(logits, -1).float(), torch.full((5, 1), top_p, dtype=torch.float64)) > 0
        assert (want.sum(-1) - got.sum(-1)).abs().max() <= vocab * 1e-3  # fp32 against fp64 at the border of flat ones
        assert (want != got).sum() <= 5 * vocab * 1e-3


def test_nucleus_by_hand_and_per_row():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(6, 4)
    top_p = torch.tensor([[0.0], [0.4], [0.6], [0.9], [0.96], [1.0]], dtype=torch.float64)
    assert (keep_nucleus(p, top_p) > 0).sum(-1).tolist() == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_stay_in_the_nucleus_with_its_frequencies(temperature):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 4
    p = torch.softmax(logits.double() / temperature, -1)
    best, order = p.sort(descending=True)
    kept = order[(best.cumsum(0) - best) < 0.8]
    want = torch.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    n = 50_000
    ids = [
        draw(logits.expand(1000, -1), policy(1000, temperature, 0.8), uniform(1000, i)).ids_N for i in range(n // 1000)
    ]
    counts = np.bincount(torch.cat(ids).numpy(), minlength=3000)
    assert counts[want.numpy() == 0].sum() == 0
    statistic, bound = chi_square(counts, want.numpy() * n)
    assert statistic < bound


def test_log_probabilities():
    logits = torch.randn(8, 700, generator=torch.Generator().manual_seed(3)) * 3
    params = [
        SampleParams(1, t, p) for t, p in [(1, 1), (0, 1), (0.5, 1), (2, 0.7), (1, 0.3), (0, 0.5), (1.3, 1), (1, 0)]
    ]
    drawn = draw(logits, Policy(params, "cpu"), uniform(8), logprobs=True)
    for i, p in enumerate(params):
        token = int(drawn.ids_N[i])
        plain = torch.log_softmax(logits[i].double(), -1)
        assert drawn.logprobs_N[i].item() == pytest.approx(plain[token].item(), abs=1e-5)
        if p.temperature == 0:
            assert token == int(logits[i].argmax()) and drawn.sampled_N[i] == 0
            continue
        q = torch.softmax(logits[i].double() / p.temperature, -1)
        best, order = q.sort(descending=True)
        n = max(1, int(((best.cumsum(0) - best) < p.top_p).sum()))
        assert token in order[:n]
        assert drawn.sampled_N[i].item() == pytest.approx((q[token] / q[order[:n]].sum()).log().item(), abs=1e-5)


def test_greedy_rows_alone_and_mixed():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(4))
    alone = draw(logits, policy(4, 0), uniform(4), logprobs=True)
    mixed = draw(logits, Policy([SampleParams(1, 0), SampleParams(1, 1.5)] * 2, "cpu"), uniform(4), logprobs=True)
    assert alone.ids_N.tolist() == logits.argmax(-1).tolist()
    assert mixed.ids_N[::2].tolist() == alone.ids_N[::2].tolist()
    assert mixed.logprobs_N[::2].tolist() == alone.logprobs_N[::2].tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-10, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(5)) * 50
    drawn = draw(logits, policy(4, temperature, 0.9), uniform(4), logprobs=True)
    assert drawn.sound_N.all() and drawn.sampled_N.isfinite().all()
    if temperature < 1:
        assert drawn.ids_N.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (1, 1), (0.7, 0.9)])
def test_a_row_that_is_not_finite_is_reported(bad, temperature, top_p):
    logits = torch.randn(3, 40)
    logits[1, 7] = bad
    drawn = draw(logits, policy(3, temperature, top_p), uniform(3))
    assert drawn.sound_N.tolist() == [True, False, True]


def test_the_uniform_numbers_depend_on_prompt_seed_and_index_alone():
    base = uniforms([1, 5, 9], seed=3, index=0, count=20)
    assert (uniforms([1, 5, 9], 3, 0, 50)[:20] == base).all()
    for other in (uniforms([1, 5], 3, 0, 20), uniforms([1, 5, 9], 4, 0, 20), uniforms([1, 5, 9], 3, 1, 20)):
        assert not (other == base).any()
    # seed, index and prompt are fields of their own: moving a number between them changes the stream
    assert not (uniforms([9], 3, 5, 20) == uniforms([5, 9], 3, 0, 20)).any()
    values = uniforms([1], 0, 0, 100_000)
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02
