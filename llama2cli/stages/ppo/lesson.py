"""From scored answers to the update: advantages, and one optimizer step for each mini-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from llama2cli.nn import checkpoint
from llama2cli.rlhf import credit, ppo
from llama2cli.rlhf.ppo import Moments, merged
from llama2cli.stages.ppo.job import Job
from llama2cli.stages.ppo.roles import Roles
from llama2cli.stages.ppo.rollout import Rollout
from llama2cli.training import dist
from llama2cli.training.data import Batch
from llama2cli.training.dist import World
from llama2cli.training.examples import permutation
from llama2cli.training.order import mix

UPDATE = 0x50504F  # tells the shuffle of mini-batches from others


@dataclass(eq=False)
class Lesson:
    """What the tokens of this rank's answers are trained on, by the numbers of all tokens; and what is told of it."""

    policy: dict[str, Tensor]
    value: dict[str, Tensor]
    whitened: Moments
    told: dict[str, float]


def credit_answers(job: Job, rollout: Rollout, before: Moments) -> Lesson:
    """Whiten the rewards, pay the KL, and from these and the values the advantages. before: of earlier batches."""
    terms, values_M = job.terms, rollout.values_M
    rewards_N, whitened = credit.whitened(rollout.table["reward"], rollout.table["cut"].bool(), terms, before)
    mask_NT = rollout.answers.mask()

    def laid(x_M: Tensor) -> Tensor:
        return torch.zeros(mask_NT.shape).masked_scatter(mask_NT, x_M)

    mine_N = rewards_N[torch.tensor(rollout.mine, dtype=torch.long)]
    advantages_NT, returns_NT = credit.advantages(mine_N, laid(rollout.kl_M), laid(values_M), mask_NT, terms)
    advantages_M, returns_M = advantages_NT[mask_NT].float(), returns_NT[mask_NT].float()
    if terms.whiten_advantages:
        advantages_M = ppo.standardize(advantages_M, together(job.world, ppo.moments(advantages_M)))
    returns, left = (together(job.world, m) for m in ppo.spreads(values_M, returns_M))
    return Lesson(
        {"old_logprobs": rollout.logprobs_M, "advantages": advantages_M},
        {"old_values": values_M, "returns": returns_M},
        whitened,
        {"explained_variance": ppo.explained(returns, left), "return": returns.mean},
    )


def together(world: World, mine: Moments) -> Moments:
    """The moments of all ranks' values."""
    ranks = dist.side_by_side(world, list(mine))
    return reduce(merged, (Moments(int(n), mean, squares) for n, mean, squares in ranks))


def update(job: Job, roles: Roles, rollout: Rollout, lesson: Lesson, step: int) -> dict[str, float]:
    """One optimizer step for each mini-batch of each pass; means over tokens and steps of what the losses track."""
    settings, world, n = job.settings, job.world, len(rollout.table["reward"])
    how: Any = dict(clip=settings.clip, dtype=checkpoint.DTYPES[job.resolved["dtype"]], world=world)
    trunk = roles.value is None
    names = ["policy_loss", *credit.POLICY]
    if trunk:
        names = ["loss", *credit.POLICY, "policy_loss", "value_loss", *credit.VALUE]
    labels = lesson.policy | (lesson.value if trunk else {})
    totals: dict[str, float] = {}
    tokens, norms, value_norms, gap = 0, [], [], 0.0
    for turn in range(settings.ppo_epochs):
        order = permutation(n, mix(settings.seed, UPDATE, step, turn))
        for begin in range(0, n, settings.mini_batch):
            part = order[begin : begin + settings.mini_batch]
            here = [int(j) // world.size for j in part if j % world.size == world.rank]
            count = int(rollout.table["length"][part].sum())

            def batch(labels: Mapping[str, Tensor], here: list[int] = here, count: int = count) -> Batch:
                return Batch(job.rows.labelled(rollout.answers, here, labels), count, count, len(here))

            sums, norm = roles.policy.update(batch(labels), len(names), step, **how)
            norms.append(norm)
            found = dict(zip(names, sums))
            if roles.value is not None:
                own = ["value_loss", *credit.VALUE]
                sums, norm = roles.value.update(batch(lesson.value), len(own), step, **how)
                value_norms.append(norm)
                found |= zip(own, sums)
            gap = gap if tokens else found["ratio_gap"] / count
            tokens += count
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value
    means = {name: value / tokens for name, value in totals.items()} | {"ratio_gap": gap}
    means["grad_norm"] = sum(norms) / len(norms)
    return means | ({"value_grad_norm": sum(value_norms) / len(value_norms)} if value_norms else {})
