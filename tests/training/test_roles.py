"""Several models in one run: an update against torch, a whole copy for sampling, value heads, models at rest."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama2cli.errors import Failure
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.rlhf import credit
from llama2cli.training import optim, roles, state
from llama2cli.training.answers import Answers, Read, Rows
from llama2cli.training.data import Batch
from llama2cli.training.dist import World
from llama2cli.training.optim import Schedule
from llama2cli.training.state import State

CONFIG = ModelConfig(48, 32, 64, 2, 4, 2, 64)
CPU = torch.device("cpu")
ONE = World(0, 1, CPU)
ANSWERS = Answers([[3, 4, 5], [6], [7, 8]], [[9, 10], [11, 12, 13, 2], [2]])


def model(seed: int = 0, **kind: bool) -> Llama:
    made = Llama(CONFIG, **kind)
    made.init_weights(seed, std=0.2)
    return made


def learner(made: Llama, schedule: Schedule) -> roles.Learner:
    optimizer = optim.adamw(made.named_parameters(), lr=schedule.peak)
    return roles.Learner(made, Read(made, credit.policy_sums(0.2)), optimizer, schedule)


def batch(**labels: Tensor) -> Batch:
    rows = Rows(8, 8, ONE)
    n = int(ANSWERS.starts[-1])
    given = {"old_logprobs": torch.full((n,), -4.0), "advantages": torch.linspace(-1, 2, n)} | labels
    return Batch(rows.labelled(ANSWERS, range(3), given), n, n, 3)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_an_update_is_a_step_of_torchs_adamw(clip: float) -> None:
    """On the mean over tokens, at the rate of the step, with the gradients clipped; and the gradients are gone."""
    ours, theirs = model(), model()
    who = learner(ours, Schedule(1e-2, 4, 10, 1.0))
    sums, norm = who.update(batch(), 5, 2, clip=clip, dtype=torch.float32, world=ONE)

    new = []
    for prompt, answer in zip(ANSWERS.prompts, ANSWERS.answers):
        logits = theirs.logits(theirs(torch.tensor([[*prompt, *answer]])))[0, len(prompt) - 1 : -1]
        new.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    r, a = torch.exp(torch.cat(new) + 4), torch.linspace(-1, 2, 7)
    loss = torch.max(-r * a, -r.clamp(0.8, 1.2) * a).sum()
    (loss / 7).backward()
    params = list(theirs.parameters())
    total = torch.nn.utils.clip_grad_norm_(params, clip or 1e9)
    groups = [{"params": [p for p in params if p.ndim == n], "weight_decay": 0.1 * (n == 2)} for n in (1, 2)]
    torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-5).step()  # half of the warm-up
    assert sums[0] == pytest.approx(loss.item(), rel=1e-5) and len(sums) == 5
    assert norm == pytest.approx(float(total), rel=1e-4)
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param, dict(theirs.named_parameters())[name], atol=2e-6, rtol=1e-5)
        assert param.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights(bad: float) -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    labels = {"advantages": torch.full((7,), bad)}
    with pytest.raises(Failure, match="stopped before the update"):
        learner(made, Schedule(1e-2, 0, 10)).update(batch(**labels), 5, 1, clip=1.0, dtype=torch.float32, world=ONE)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_whole_copy_for_sampling() -> None:
    """The model itself where it is whole and in the type already; else its weights rounded, apart from it."""
    made = model(value_head=True)
    assert roles.consolidated(made, torch.float32, ONE) is made
    for world, dtype in ((ONE, torch.bfloat16), (World(1, 2, CPU), torch.float32)):
        whole = roles.consolidated(made, dtype, world)
        assert whole is not made and whole.score is None
        named = dict(made.named_parameters())
        for name, param in whole.named_parameters():
            assert torch.equal(param, named[name].to(dtype)) and not param.requires_grad
            assert param.data_ptr() != named[name].data_ptr()
    tied = Llama(ModelConfig(48, 32, 64, 2, 4, 2, 64, tie_word_embeddings=True))
    tied.init_weights(0)
    assert roles.consolidated(tied, torch.bfloat16, ONE).head is None


class Moving(nn.Module):
    """Tells where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, where: object) -> Moving:  # type: ignore[override]
        self.sent.append(str(where))
        return self


def test_models_at_rest() -> None:
    """With offload they are sent to the device and back, also where the work fails; without it they stay."""
    a, b = Moving(), Moving()
    with roles.at_work([a, b], torch.device("cuda:1"), True):
        assert a.sent == b.sent == ["cuda:1"]
    assert a.sent == b.sent == ["cuda:1", "cpu"]
    with pytest.raises(KeyError), roles.at_work(iter([a]), torch.device("cuda:1"), True):
        raise KeyError
    assert a.sent[-1] == "cpu" and len(a.sent) == 4
    with roles.at_work([b], torch.device("cuda:1"), False):
        pass
    assert len(b.sent) == 2


def test_a_value_head_is_kept_beside_the_optimizer(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = model(value_head=True)
    assert made.score is not None
    (tmp_path / state.FOLDER).mkdir()
    roles.save_value_head(tmp_path, made, ONE)
    assert torch.equal(load_file(tmp_path / "trainer/value_head.safetensors")["score"], made.score)
    other = model(3, value_head=True)
    assert other.score is not None and not torch.equal(other.score, made.score)
    trunk = other.embed.clone()
    roles.load_value_head(tmp_path, other)
    assert torch.equal(other.score, made.score) and torch.equal(other.embed, trunk)


def test_two_optimizers_in_one_file(tmp_path: Path) -> None:
    """Names of the second model have its prefix; each finds its own moments and weights again, bit for bit."""
    first, second = model(), model(1, scorer=True)
    made = [learner(first, Schedule(1e-3, 0, 9)), learner(second, Schedule(1e-3, 0, 9))]
    for who in made:
        for param in who.model.parameters():
            param.grad = torch.randn_like(param)
        who.optimizer.step()
    one, two = made
    extra = state.moments(two.named, two.optimizer, weights=True, prefix="value.")
    state.save(tmp_path, State(3), one.named, one.optimizer, ONE, weights=True, extra=extra)
    fresh = [learner(model(5), Schedule(1e-3, 0, 9)), learner(model(6, scorer=True), Schedule(1e-3, 0, 9))]
    rest = state.restore(tmp_path, fresh[0].named, fresh[0].optimizer, ONE)
    assert rest and all(name.startswith("value.") for name in rest)
    state.put_back(tmp_path, rest, fresh[1].named, fresh[1].optimizer, "value.")
    assert not rest
    for old, new in zip(made, fresh):
        for name, param in old.named.items():
            again = new.named[name]
            assert torch.equal(param, again)
            before, after = old.optimizer.state[param], new.optimizer.state[again]
            assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(before[k], after[k]) for k in before)
