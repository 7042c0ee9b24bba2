"""The piecewise reward: its truth table by hand, at the boundary and in every arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from llama2cli.rlhf.rewards import LOGIT_THRESHOLD, combined, piecewise
from llama2cli.text.records import THRESHOLD

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_truth_table(dtype):
    """(tag, Rs) -> which; Rh is 0.9 throughout, its logit log 9."""
    table = [
        (False, 0.149, "safe"),
        (False, 0.15, "help"),  # strict <
        (False, 0.151, "help"),
        (False, 0.999, "help"),
        (False, 0.001, "safe"),
        (True, 0.149, "safe"),
        (True, 0.15, "safe"),
        (True, 0.151, "safe"),
        (True, 0.999, "safe"),
    ]
    safe = torch.tensor([logit(p) for _, p, _ in table], dtype=dtype)
    help = torch.full_like(safe, math.log(9))
    got = piecewise(help, safe, torch.tensor([tag for tag, _, _ in table]))
    want = torch.stack([s if which == "safe" else h for (_, _, which), s, h in zip(table, safe, help)])
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_boundary_itself(dtype):
    """The nearest number to logit(0.15) is not below it; its neighbour on one side is."""
    assert THRESHOLD == 0.15
    assert pytest.approx(-1.7346010553881064, abs=1e-15) == LOGIT_THRESHOLD  # log(3/17)
    assert pytest.approx(math.log(3 / 17), abs=1e-15) == LOGIT_THRESHOLD
    at = torch.tensor(math.log(3 / 17), dtype=torch.float64).to(dtype)
    spacing = torch.finfo(dtype).eps  # between 1 and 2, where the threshold's size is
    safe = torch.stack([at - spacing, at, at + spacing])
    assert len(set(safe.tolist())) == 3
    help = torch.full_like(safe, 5.0)
    assert piecewise(help, safe, torch.zeros(3, dtype=torch.bool)).tolist() == [safe[0].item(), 5.0, 5.0]
    assert torch.equal(piecewise(help, safe, torch.ones(3, dtype=torch.bool)), safe)


def test_computed_on_logits():
    """Sure answers keep their digits, and no reward is infinite: in fp32 sigmoid(40) is 1."""
    help = torch.tensor([40.0, -120.0, 3.0])
    safe = torch.tensor([50.0, 60.0, -200.0])
    assert torch.sigmoid(help[0]) == 1
    assert piecewise(help, safe, torch.tensor([False, False, False])).tolist() == [40.0, -120.0, -200.0]
    assert piecewise(help, safe, torch.tensor([True, False, True])).tolist() == [50.0, -120.0, -200.0]


def test_a_low_helpfulness_alone_changes_nothing():
    """The rule looks at safety only: an unhelpful and safe answer gets its low score."""
    help, safe = torch.tensor([-9.0]), torch.tensor([2.0])
    assert piecewise(help, safe, torch.tensor([False])).item() == -9.0


def test_tags_may_be_numbers_and_gradients_go_to_what_was_selected():
    help = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    safe = torch.tensor([0.0, -2.0, 0.5], requires_grad=True)
    got = piecewise(help, safe, torch.tensor([0, 0, 1]))
    assert got.tolist() == [1.0, -2.0, 0.5]
    for grad, want in zip(torch.autograd.grad(got.sum(), [help, safe]), ([1, 0, 0], [0, 1, 1])):
        assert grad.tolist() == want


def test_lists_of_logits():
    """By hand: the tag, then what is below the threshold, takes the safety logit, digit for digit."""
    help_logits, safe_logits = [0.1, 0.2, 0.3, -4.0], [-1.7347, 2.5, -1.7345, 9.0]
    found = combined(help_logits, safe_logits, [False, True, False, False])
    assert found == ([-1.7347, 2.5, 0.3, -4.0], [True, True, False, False])
    assert combined([], [], []) == ([], [])
