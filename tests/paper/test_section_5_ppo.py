"""Llama 2, section 3.2.3, PPO as `llama2 ppo` does it: what one iteration of a small run consists of.

One test for each rule. Its numbers by default are in test_section_5_rlhf.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
import ppo_kit

from llama2cli.nn import ops
from llama2cli.rlhf.ppo import Moments
from llama2cli.stages import ppo
from llama2cli.stages.ppo import lesson, roles, rollout
from llama2cli.stages.ppo.job import Job, prepare
from llama2cli.training import optim
from llama2cli.training.dist import World
from llama2cli.training.signals import Stop

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ppo_kit.write(tmp_path_factory.mktemp("ppo") / "kit")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command takes the fast forms of this machine; other tests find what was there before."""
    monkeypatch.setenv("LLAMA2_DECODE", "plain")
    before = ops.choices()
    yield
    ops.restore(before)


def job(kit: Path, **changes: Any) -> Job:
    return prepare(ppo.Settings(**ppo_kit.given(kit, out="run", **changes)), ONE)


def answered(of: Job, made: roles.Roles, n: int, **how: Any) -> rollout.Rollout:
    chosen = [i % len(of.prompts.ids) for i in range(n)]
    return rollout.roll_out(of, made, chosen, range(n), {}, Stop(), **how)


def test_3_2_3_adamw_with_the_numbers_of_pretraining(kit: Path) -> None:
    """AdamW with beta 0.9 and 0.95, eps 1e-5, weight decay 0.1: policy and value model."""
    made = roles.load(job(kit), None)
    assert made.value is not None
    for who in (made.policy, made.value):
        assert isinstance(who.optimizer, torch.optim.AdamW)
        groups = who.optimizer.param_groups
        assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.95), 1e-5)}
        assert max(g["weight_decay"] for g in groups) == 0.1


def test_3_2_3_one_gradient_step_for_each_mini_batch(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is 8 mini-batches: 8 steps of the policy in an iteration, and as many of the value model."""
    of = job(kit, batch_size=16, mini_batch=2)
    made, steps, real = roles.load(of, None), [], optim.step

    def step(optimizer: Any, *a: Any, **k: Any) -> float:
        steps.append(optimizer)
        return real(optimizer, *a, **k)

    monkeypatch.setattr(optim, "step", step)
    found = answered(of, made, 16)
    lesson.update(of, made, found, lesson.credit_answers(of, found, Moments()), 1)
    assert made.value is not None
    assert [steps.count(who.optimizer) for who in (made.policy, made.value)] == [8, 8] and len(steps) == 16


def test_3_2_3_the_kl_is_to_the_original_policy(kit: Path) -> None:
    """Which stays what it was however the policy moves: 0 before the first step, not after it."""
    of = job(kit, batch_size=12, mini_batch=2, kl="exact")
    made = roles.load(of, None)
    before = {k: v.clone() for k, v in made.reference.model.state_dict().items()}
    first = answered(of, made, 12)
    assert first.kl_M.abs().max() < 1e-6
    lesson.update(of, made, first, lesson.credit_answers(of, first, Moments()), 1)
    assert (answered(of, made, 12).kl_M > 1e-4).float().mean() > 0.9
    assert all(torch.equal(v, before[k]) for k, v in made.reference.model.state_dict().items())


def test_3_2_3_safety_decides_where_it_is_asked_for(kit: Path) -> None:
    """Rs where the prompt is tagged or Rs < 0.15, Rh elsewhere; whitened over the batch, after the logit."""
    of = job(kit, batch_size=24, mini_batch=2)
    found = answered(of, roles.load(of, None), 24)
    table = found.table
    tags = [bool(of.prompts.records[i % 13].get("unsafe")) for i in range(24)]
    kinds = set()
    for tag, reward, h, s in zip(tags, *(table[k].tolist() for k in ("reward", "help", "safe"))):
        chosen = s if tag or s < 0.15 else h
        assert 1 / (1 + torch.tensor(-reward).exp()) == pytest.approx(chosen, abs=1e-6)
        kinds.add((tag, s < 0.15))
    assert kinds >= {(True, False), (False, True), (False, False)}  # each case is among them
    logits = (table["reward"] - table["reward"].mean()) / table["reward"].std(correction=0)
    plain = dataclasses.replace(of, terms=dataclasses.replace(of.terms, beta=0.0, lam=1.0))
    found.values_M.zero_()
    learned = lesson.credit_answers(plain, found, Moments())
    starts = torch.from_numpy(found.answers.starts[:-1])
    torch.testing.assert_close(learned.value["returns"][starts].double(), logits, atol=1e-5, rtol=1e-5)


def test_3_2_3_weights_are_brought_together_once_an_iteration(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the answers are sampled, however many these are; and what samples them is gone afterwards."""
    import gc
    import weakref

    of = job(kit, batch_size=12, mini_batch=2, rollout_rows=2, dtype="bf16")
    made, copies, real = roles.load(of, None), [], rollout.consolidated

    def consolidated(*a: Any) -> Any:
        copies.append(weakref.ref(whole := real(*a)))
        return whole

    monkeypatch.setattr(rollout, "consolidated", consolidated)
    answered(of, made, 12)
    gc.collect()
    assert len(copies) == 1 and copies[0]() is None
