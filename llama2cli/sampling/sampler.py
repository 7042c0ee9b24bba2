"""Drawing tokens from logits: temperature, top-p, one uniform number per row.

The uniform numbers of an answer are a function of (seed, prompt, sample index) alone, and each token takes one. So an
answer does not depend on what else is in the batch, except through rounding: logits of one row differ by about 1e-6
between batch sizes, and between a prompt that was run whole and one that went on from a shared beginning (fp32). That
changes a greedy token only at a near-tie (a gap below 1e-4 between the two best), and a drawn one only where the
uniform number falls within that rounding of the border between two tokens.

Letters of shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # entries of the vocabulary that are summed before the search, where it is large
BELOW_ONE = 1 - 2.0**-50
LADDER = (64, 1024)  # how many of the best tokens are tried for the nucleus before a row is sorted whole


@dataclass(frozen=True)
class SampleParams:
    """How one answer is drawn. temperature 0 is greedy. `index` tells the samples of one prompt apart."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0


def uniforms(prompt: Sequence[int], seed: int, index: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, that depend on the prompt's ids, the seed and the sample index alone."""
    words = np.array([seed & (1 << 63) - 1, index, *prompt], dtype="<i8")
    key = int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class Policy:
    """The temperatures and nuclei of N rows as tensors, and what they allow to leave out."""

    def __init__(self, params: Sequence[SampleParams], device: torch.device | str) -> None:
        heat = [p.temperature for p in params]
        self.all_greedy = all(t == 0 for t in heat)
        self.any_greedy = any(t == 0 for t in heat)
        self.plain = all(t in (0, 1) for t in heat)
        self.nucleus = any(p.top_p < 1 and p.temperature > 0 for p in params)
        self.greedy_N = torch.tensor([t == 0 for t in heat], device=device)
        # a temperature below 1e-30 is one of 1e-30: its inverse still is a number in fp32
        self.inverse_N1 = torch.tensor([[1 / max(t, 1e-30) if t else 1.0] for t in heat], device=device)
        self.top_p_N1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Drawn:
    """ids_N; sound_N false where a row's logits are not finite; log-probabilities where they were asked for:
    logprobs_N at temperature 1, sampled_N under the distribution that was drawn from."""

    ids_N: Tensor
    sound_N: Tensor
    logprobs_N: Tensor | None = None
    sampled_N: Tensor | None = None


def draw(logits_NV: Tensor, policy: Policy, uniform_N1: Tensor, *, logprobs: bool = False) -> Drawn:
    """One token per row. logits fp32; uniform_N1 float64 in [0, 1)."""
    if policy.all_greedy:
        best_N, ids_N = logits_NV.max(-1)
        return Drawn(ids_N, best_N.isfinite(), *_greedy_logprobs(logits_NV, ids_N, logprobs))
    p_NV = torch.softmax(logits_NV if policy.plain else logits_NV * policy.inverse_N1, -1)
    if policy.nucleus:
        p_NV = keep_nucleus(p_NV, policy.top_p_N1)
    ids_N, mass_N = search(p_NV, uniform_N1)
    if policy.any_greedy:
        ids_N = torch.where(policy.greedy_N, logits_NV.argmax(-1), ids_N)
    if not logprobs:
        return Drawn(ids_N, mass_N > 0)
    taken_N = p_NV.gather(1, ids_N[:, None])[:, 0]
    sampled_N = (taken_N.double() / mass_N).log().float()
    if policy.any_greedy:
        sampled_N = torch.where(policy.greedy_N, 0.0, sampled_N)
    return Drawn(ids_N, mass_N > 0, logprobs_of(logits_NV, ids_N), sampled_N)


def _greedy_logprobs(logits_NV: Tensor, ids_N: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    return (logprobs_of(logits_NV, ids_N), torch.zeros_like(logits_NV[:, 0])) if wanted else (None, None)


def logprobs_of(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """log softmax(logits)[id], [N]."""
    return logits_NV.gather(1, ids_N[:, None])[:, 0] - torch.logsumexp(logits_NV, -1)


def keep_nucleus(p_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """Probabilities with those outside the nucleus set to 0: kept are the fewest of the largest that reach top_p.

    A token is kept where the tokens before it in descending order hold less than top_p (transformers' rule); tokens
    exactly as probable as the last one kept are kept too.
    """
    top_p_N1 = top_p_N1.expand(len(p_NV), 1)
    # Not by the ladder on a GPU: to see whether a rung was high enough is to wait for the device.
    threshold_N1 = (at_once if p_NV.is_cuda else climb)(p_NV, top_p_N1)
    return torch.where(p_NV >= threshold_N1, p_NV, 0.0)


def at_once(p_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """The smallest probability that each row's nucleus holds, [N, 1]; 0 at top_p 1. Reads nothing from the device."""
    last_N1, _ = last_kept(p_NV.sort(-1, descending=True).values, top_p_N1)
    return torch.where(top_p_N1 < 1, last_N1, 0.0)


def climb(p_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """The same from as few of the best as will do."""
    threshold_N1 = torch.zeros_like(p_NV[:, :1])
    rows = (top_p_N1[:, 0] < 1).nonzero()[:, 0]
    for k in (*LADDER, p_NV.shape[1]):
        whole = k >= p_NV.shape[1]
        rest = p_NV if len(rows) == len(p_NV) else p_NV[rows]
        best = rest.sort(-1, descending=True).values if whole else rest.topk(k).values
        threshold_N1[rows], kept = last_kept(best, top_p_N1[rows])
        rows = rows[(kept == k)[:, 0]]  # their nucleus may go on beyond these k
        if whole or not len(rows):
            break
    return threshold_N1


def last_kept(best_NK: Tensor, top_p_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Of probabilities in descending order the last that the nucleus holds, and how many it holds, [N, 1]."""
    before = best_NK.cumsum(-1, dtype=torch.float64) - best_NK
    kept = (before < top_p_N1).sum(-1, keepdim=True).clamp_(min=1)
    return best_NK.gather(1, kept - 1), kept


def search(p_NV: Tensor, uniform_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row at which the running sum of p passes uniform * (sum of p), and that sum (float64).

    p need not sum to 1. A token of probability 0 is never taken. Two levels: block sums first, then inside one block;
    a draw of one uniform number per row, where torch.multinomial draws one per entry.
    """
    N, V = p_NV.shape
    size = V if V <= 32 * BLOCK else BLOCK
    if V % size:
        p_NV = torch.nn.functional.pad(p_NV, (0, -V % size))
    blocks = p_NV.view(N, -1, size)
    sums = blocks.sum(-1).double().cumsum(-1)
    mass = sums[:, -1:]
    # just below the mass, whatever the rounding: the first sum above it has a probability of its own
    at = torch.minimum(uniform_N1 * mass, mass * BELOW_ONE)
    block = torch.searchsorted(sums, at, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(N, device=p_NV.device), block[:, 0]].double().cumsum(-1)
    at = torch.minimum(at - before, inside[:, -1:] * BELOW_ONE)
    place = torch.searchsorted(inside, at, right=True).clamp_(max=size - 1)
    return (block * size + place)[:, 0], mass[:, 0]
