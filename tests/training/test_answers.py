"""Answers as rows: every token is read exactly once, in any packing; what is read is what transformers computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import ranks

from llama2cli.nn import checkpoint
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.rlhf import credit
from llama2cli.training.answers import Answers, Read, Rows, blank, exact_kl
from llama2cli.training.dist import World

CONFIG = ModelConfig(48, 32, 64, 2, 4, 2, 64)
ONE = World(0, 1, torch.device("cpu"))
IDS = st.integers(0, CONFIG.vocab_size - 1)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Answers, list[int]]:
    """Answers, and which of them are chosen, in some order."""
    prompts, answers = ([draw(st.lists(IDS, min_size=1, max_size=n)) for _ in range(7)] for n in (9, 6))
    n = draw(st.integers(1, 7))
    chosen = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    return Answers(prompts[:n], answers[:n]), chosen


# --- rows ---------------------------------------------------------------------------------------------------------


@given(drawn(), st.integers(1, 40), st.integers(1, 80))
@settings(max_examples=150, deadline=None)
def test_every_token_is_read_once_where_it_is_decided(of: tuple[Answers, list[int]], width: int, budget: int) -> None:
    """Behind each place stand the prompt and the answer so far, in the place's own segment, and nothing else."""
    answers, chosen = of
    micros = answers.micro(chosen, width, budget)
    read: list[int] = []
    for args, numbers in micros:
        ids, segments, positions = (args[k] for k in ("ids_BT", "segments_BT", "positions_BT"))
        rows, wide = ids.shape
        assert rows == 1 or rows * wide <= budget
        for place, target, number in zip(args["places_N"].tolist(), args["targets_N"].tolist(), numbers.tolist()):
            i = next(i for i in range(len(answers)) if answers.starts[i] <= number < answers.starts[i + 1])
            k = number - int(answers.starts[i])
            assert i in chosen and target == answers.answers[i][k]
            row, at = divmod(place, wide)
            mine = (segments[row] == segments[row, at]) & (torch.arange(wide) <= at)
            assert ids[row][mine].tolist() == [*answers.prompts[i], *answers.answers[i][:k]]
            assert positions[row][mine].tolist() == list(range(int(mine.sum())))
        read += numbers.tolist()
    want = [n for i in chosen for n in range(int(answers.starts[i]), int(answers.starts[i + 1]))]
    assert sorted(read) == sorted(want)


@given(drawn())
@settings(max_examples=50, deadline=None)
def test_numbers_and_masks(of: tuple[Answers, list[int]]) -> None:
    answers, _ = of
    flat = torch.arange(int(answers.starts[-1])).float() + 1
    mask = answers.mask()
    laid = torch.zeros(mask.shape).masked_scatter(mask, flat)
    for i, answer in enumerate(answers.answers):
        start = int(answers.starts[i])
        assert laid[i].tolist() == [
            *(start + 1.0 + k for k in range(len(answer))),
            *[0.0] * (mask.shape[1] - len(answer)),
        ]
    assert torch.equal(laid[mask], flat)
    tokens = sum(len(p) + len(a) for p, a in zip(answers.prompts, answers.answers)) - len(answers)
    everything = answers.micro(range(len(answers)), 10**6, 10**6)
    assert sum(int((args["ids_BT"] >= 0).sum()) for args, _ in everything) >= tokens


def test_no_answers_at_all() -> None:
    nothing = Answers([], [])
    assert len(nothing) == 0 and nothing.micro([], 8, 8) == []
    assert nothing.mask().shape[0] == 0 and not nothing.mask().any()


@pytest.mark.parametrize("shares", [(3, 0), (1, 5), (2, 2), (0, 0)])
def test_ranks_have_as_many_micro_batches(monkeypatch: pytest.MonkeyPatch, shares: tuple[int, int]) -> None:
    """What one has too few of is blank."""

    def work(world: World) -> tuple[list[int], list[dict[str, Tensor]]]:
        n = shares[world.rank]
        mine = Answers([[5, 6]] * n, [[7, 8]] * n)
        rows = Rows(8, 4, world)  # one answer in a micro-batch
        labels = {"x": torch.arange(2 * n)}
        return [len(numbers) for _, numbers in rows.micro(mine, range(n))], rows.labelled(mine, range(n), labels)

    for n, (sizes, labelled) in zip(shares, ranks.simulate(monkeypatch, 2, work), strict=True):
        assert sizes == [2] * n + [0] * (max(shares) - n)
        assert sorted(x for args in labelled for x in args["x"].tolist()) == list(range(2 * n))


# --- what is read -------------------------------------------------------------------------------------------------


def model(seed: int = 0, **kind: Any) -> Llama:
    made = Llama(CONFIG, **kind)
    made.init_weights(seed, std=0.2)
    if made.score is not None:
        made.init_score(seed + 1)
    return made


def some(n: int = 9, seed: int = 0) -> Answers:
    """Answers of 1 to 8 tokens to prompts of 1 to 12."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (n,), generator=g).tolist()
    prompts = [torch.randint(0, 48, (1 + (5 * i) % 12,), generator=g).tolist() for i in range(n)]
    return Answers(prompts, [torch.randint(0, 48, (k,), generator=g).tolist() for k in sizes])


def in_transformers(folder: Path, made: Llama) -> Any:
    """The trunk and head of a model of ours, in fp64."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder.mkdir()
    checkpoint.save_model(folder, made, None)
    kind = AutoModelForSequenceClassification if made.scorer else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


def states(theirs: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Where the tokens of one answer are decided, from a row of its own."""
    return theirs.model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("width", "budget"), [(64, 1000), (20, 40), (1, 1)])
def test_log_probabilities_and_entropies_are_those_of_transformers(
    tmp_path: Path, heat: float, width: int, budget: int
) -> None:
    made, answers = model(value_head=True), some()
    theirs = in_transformers(tmp_path / "hf", made)
    found = Rows(width, budget, ONE).read(Read(made, temperature=heat), answers, torch.float32, k=3)
    want: list[Tensor] = []
    with torch.no_grad():
        for prompt, answer in zip(answers.prompts, answers.answers):
            hidden = states(theirs, list(prompt), list(answer))
            logits = theirs.lm_head(hidden) / heat
            p = torch.distributions.Categorical(logits=logits)
            assert made.score is not None
            want.append(torch.stack([p.log_prob(torch.tensor(answer)), p.entropy(), hidden @ made.score[0].double()]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.cat(want, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "budget"), [(64, 1000), (20, 40)])
def test_values_are_those_of_transformers(tmp_path: Path, width: int, budget: int) -> None:
    made, answers = model(scorer=True), some(seed=3)
    theirs = in_transformers(tmp_path / "hf", made)
    found = Rows(width, budget, ONE).read(Read(made), answers, torch.float32)
    with torch.no_grad():
        want = [theirs.score(states(theirs, list(p), list(a)))[:, 0] for p, a in zip(answers.prompts, answers.answers)]
    torch.testing.assert_close(found[0].double(), torch.cat(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heat", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_kl_is_that_of_torch(tmp_path: Path, heat: float, dtype: torch.dtype) -> None:
    """The reference may be of another type; it is 0 for a model beside itself."""
    ours, other, answers = model(), model(5).to(dtype), some(seed=4)
    p, q = in_transformers(tmp_path / "p", ours), in_transformers(tmp_path / "q", model(5))
    rows = Rows(30, 60, ONE)
    found = rows.read(exact_kl(Read(ours, temperature=heat), Read(other, temperature=heat)), answers, torch.float32)[0]
    want = []
    with torch.no_grad():
        for prompt, answer in zip(answers.prompts, answers.answers):
            a, b = (
                torch.distributions.Categorical(logits=m.lm_head(states(m, list(prompt), list(answer))) / heat)
                for m in (p, q)
            )
            want.append(torch.distributions.kl_divergence(a, b))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(found.double(), torch.cat(want), **near)
    same = rows.read(exact_kl(Read(ours), Read(ours)), answers, torch.float32)[0]
    assert same.abs().max() < 1e-6


def test_rows_that_no_piece_has_are_no_part_of_it() -> None:
    """With `pieces` 40 of 48 the probabilities are those of a model that has 40 rows."""
    made = model()
    assert made.head is not None
    answers = Answers([[1, 2, 3], [4]], [[5, 39], [0, 7, 9]])
    found = Rows(64, 64, ONE).read(Read(made, pieces=40), answers, torch.float32, k=2)
    with torch.no_grad():
        made.head[40:] = 0
        hidden = torch.cat(
            [made(torch.tensor([[*p, *a]]))[0, len(p) - 1 : -1] for p, a in zip(answers.prompts, answers.answers)]
        )
        p = torch.distributions.Categorical(logits=hidden @ made.head[:40].T)
    targets = torch.tensor([5, 39, 0, 7, 9])
    torch.testing.assert_close(found, torch.stack([p.log_prob(targets), p.entropy()]), atol=1e-5, rtol=1e-5)


def test_under_autocast_what_is_read_is_near_and_fp32() -> None:
    made, answers = model(value_head=True), some()
    rows = Rows(40, 80, ONE)
    exact, rough = (rows.read(Read(made), answers, d, k=3) for d in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.15, rtol=0.1)


# --- losses -------------------------------------------------------------------------------------------------------


def labels(answers: Answers) -> dict[str, Tensor]:
    n = int(answers.starts[-1])
    g = torch.Generator().manual_seed(1)
    return {
        "old_logprobs": -4 + torch.randn(n, generator=g),
        "advantages": torch.randn(n, generator=g),
        "old_values": torch.randn(n, generator=g),
        "returns": torch.randn(n, generator=g),
    }


def gradients(read: Read, micros: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    read.zero_grad()
    total = torch.stack([read(**args) for args in micros]).sum(0)
    total[0].backward()
    return total.detach(), {k: p.grad.clone() for k, p in read.model.named_parameters() if p.grad is not None}


def test_losses_do_not_depend_on_the_packing() -> None:
    """Sums and gradients of any micro-batches, with blank ones among them, are those of one."""
    answers, made = some(), model(value_head=True)
    read = Read(made, credit.joint_sums(0.2, 0.1, 0.3), temperature=1.3)
    given = labels(answers)

    def micros(width: int, budget: int) -> list[dict[str, Tensor]]:
        return Rows(width, budget, ONE).labelled(answers, range(len(answers)), given)

    want, gradient = gradients(read, micros(10**4, 10**4))
    empty = blank()[0] | {k: v[:0] for k, v in given.items()}
    for width, budget in ((30, 60), (1, 1), (25, 30)):
        found, other = gradients(read, [empty, *micros(width, budget), empty])
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        assert other.keys() == gradient.keys() == dict(made.named_parameters()).keys()
        for name in gradient:
            torch.testing.assert_close(other[name], gradient[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"value_head": True}, {"scorer": True}])
def test_a_blank_micro_batch_adds_nothing(kind: dict[str, bool]) -> None:
    """Its sums and gradients are 0, and each parameter has a gradient, as sharding wants it."""
    made = model(**kind)
    reduce = {
        (): credit.policy_sums(0.2),
        ("value_head",): credit.joint_sums(0.2, None, 0.1),
        ("scorer",): credit.value_sums(0.1),
    }[tuple(kind)]
    read = Read(made, reduce)
    names = ["old_values", "returns"] if "scorer" in kind else ["old_logprobs", "advantages"]
    names += ["old_values", "returns"] if "value_head" in kind else []
    args, numbers = blank()
    assert len(numbers) == 0
    total = read(**args, **{k: torch.zeros(0) for k in names})
    total[0].backward()
    assert total.tolist() == [0.0] * len(total)
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in made.parameters())
    assert Rows(8, 8, ONE).read(read, Answers([], []), torch.float32, k=2).shape == (2, 0)
