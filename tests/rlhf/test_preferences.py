"""Margins and losses of reward models, against numbers worked by hand and derivatives by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import Misuse
from llama2cli.rlhf.preferences import MARGINS, binary_loss, margins_of, parse_margin, ranking_loss, safety_loss
from llama2cli.text import records
from llama2cli.text.records import RATINGS, SAFETY_LABELS

SCORES = st.floats(-50, 50)


def doubles(*values: float) -> torch.Tensor:
    """An fp64 tensor that wants its gradient."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_ranking_loss_by_hand() -> None:
    """Equal scores cost log 2. A gap of log 3 is right with 3/4: log(4/3). With a margin as large as the gap, log 2."""
    gap = math.log(3)
    loss = ranking_loss(doubles(0, gap, gap, 0), doubles(0, 0, 0, gap), doubles(0, 0, gap, 0))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(2), math.log(4)], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranking_loss_far_out(dtype: torch.dtype) -> None:
    """Scores 100 apart give 0 or the whole gap and finite gradients, in fp32 whatever the scores come in."""
    chosen = torch.tensor([100.0, -100.0, 50.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-100.0, 100.0, 50.0], dtype=dtype)
    loss = ranking_loss(chosen, rejected, torch.tensor([3.0, 3.0, 3.0]))
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([0.0, 203.0, math.log1p(math.exp(3))], abs=1e-6)
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([0.0, -1.0, -1 / (1 + math.exp(-3))], abs=4e-3)


def test_bf16_scores_are_subtracted_in_fp32() -> None:
    """bf16 has no 100.5 + 0.0078: the difference of 64 and 0.0078125 would be rounded to 64."""
    chosen = torch.tensor([0.0078125], dtype=torch.bfloat16)
    rejected = torch.tensor([64.0], dtype=torch.bfloat16)
    assert ranking_loss(chosen, rejected).item() == 64 - 0.0078125


@settings(deadline=None)  # the first call of an operation loads it
@given(st.lists(st.tuples(SCORES, SCORES, st.floats(0, 3)), min_size=1, max_size=8))
def test_ranking_loss_is_a_softplus(rows: list[tuple[float, float, float]]) -> None:
    """-log sigmoid(c - r - m) = log(1 + exp(m - (c - r))), the other way to write it; also as one log-sum-exp."""
    c, r, m = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    loss = ranking_loss(c, r, m)
    torch.testing.assert_close(loss, F.softplus(m - (c - r), threshold=1000), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, torch.logaddexp(m - c + r, torch.zeros_like(m)), rtol=1e-12, atol=1e-12)


def test_gradients_in_fp64() -> None:
    """Autograd against finite differences; and the ranking loss pushes both scores with the same force."""
    c, r = doubles(0.3, -2.0, 30.0), doubles(0.1, 1.0, -1.0)
    m, labels = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0, 1, 1])
    assert torch.autograd.gradcheck(lambda a, b: ranking_loss(a, b, m), (c, r))
    assert torch.autograd.gradcheck(lambda a: safety_loss(a, labels), (c,))
    ranking_loss(c, r, m).sum().backward()
    assert c.grad is not None and r.grad is not None
    torch.testing.assert_close(c.grad, -r.grad)
    # d/dc = -sigmoid(m - (c - r)) = -1 / (1 + exp((c - r) - m))
    assert c.grad.tolist() == pytest.approx(
        [-1 / (1 + math.exp(0.2)), -1 / (1 + math.exp(-4)), -1 / (1 + math.exp(28))]
    )


def test_safety_loss_by_hand() -> None:
    """sigmoid(log 3) = 3/4: a safe answer costs log(4/3), an unsafe one log 4; labels of any type."""
    scores = torch.tensor([math.log(3), math.log(3), 0.0, 100.0, 100.0], dtype=torch.bfloat16)
    for labels in (torch.tensor([1, 0, 1, 1, 0]), torch.tensor([True, False, True, True, False])):
        loss = safety_loss(scores, labels)
        assert loss.dtype == torch.float32
        assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4), math.log(2), 0, 100], abs=5e-3)
        assert torch.equal(loss, binary_loss(scores, labels))


def test_margins_of_table_27() -> None:
    assert MARGINS == {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}
    assert margins_of(["slightly", None, "significantly", "negligibly"], MARGINS["large"]) == [1, 0, 3, 0]
    with pytest.raises(KeyError):
        margins_of(["much"], MARGINS["large"])


@pytest.mark.parametrize(
    "text, margins",
    [
        ("none", (0, 0, 0, 0)),
        ("large", (3, 2, 1, 0)),
        ("1,2/3,1/3,0", MARGINS["small"]),
        (" 1.5, 1e-1 ,0,0", (1.5, 0.1, 0, 0)),
    ],
)
def test_margins_are_named_or_given(text: str, margins: tuple[float, ...]) -> None:
    assert parse_margin(text) == margins


@pytest.mark.parametrize(
    "text", ["", "smal", "1", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,3,-1", "1,2,3,nan", "1,1/0,0,0"]
)
def test_other_margins_are_misuse(text: str) -> None:
    with pytest.raises(Misuse) as e:
        parse_margin(text)
    assert "--margin" in str(e.value) and "none, small, large" in str(e.value)
    assert ('did you mean "small"' in str(e.value)) == (text == "smal")


def test_names_are_those_of_the_records() -> None:
    """Every rating and every safety bin that a record may have is known, but the bin that is left out."""
    for rating in RATINGS:
        records.validate("comparison", comparison(rating=rating))
    for bin, (chosen, rejected) in SAFETY_LABELS.items():
        assert records.drop_reason(records.validate("comparison", comparison(safety=bin))) is None
        assert (chosen, rejected) == {"chosen_safe": (1, 0)}.get(bin, (int(bin == "both_safe"),) * 2)
    assert records.drop_reason(comparison(safety="rejected_safe"))


def comparison(**fields: str) -> dict[str, object]:
    """A comparison of two answers."""
    answer = [[{"role": "assistant", "content": text}] for text in "ab"]
    return {"prompt": [{"role": "user", "content": "q"}], "chosen": answer[0], "rejected": answer[1], **fields}
