"""The models of a run: those that learn, the reference, the reward models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2cli.nn import checkpoint, ops
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.rlhf import credit
from llama2cli.sampling.scoring import Scorer
from llama2cli.stages.ppo.job import Job
from llama2cli.training import optim, roles, state
from llama2cli.training.answers import Read
from llama2cli.training.build import build
from llama2cli.training.roles import Learner

VALUE = "value"  # in a step folder, and before the names of the value model's moments


@dataclass(eq=False)
class Roles:
    """All models of a run. value: None where the value is a head on the policy's trunk."""

    policy: Learner
    value: Learner | None
    reference: Read
    scorers: dict[str, Scorer]

    @property
    def judges(self) -> list[Llama]:
        """The reward models, each once."""
        return list({id(s.model): s.model for s in self.scorers.values()}.values())


def load(job: Job, step_folder: Path | None) -> Roles:
    """Make the models, and put back what a saved step has of them."""
    settings, resolved, world, start = job.settings, job.resolved, job.world, job.start
    clip, value_clip, heat = settings.clip_ratio, settings.value_clip, settings.temperature

    def learner(config: ModelConfig, weights: Path, lr: float, make: Callable[..., Read], **kind: bool) -> Learner:
        model, loss = build(
            config,
            world,
            objective=make,
            weights=weights,
            seed=settings.seed,
            dtype=checkpoint.DTYPES[resolved["dtype"]],
            checkpointing=settings.activation_checkpointing,
            compile=settings.compile,
            **kind,
        )
        named = model.named_parameters()
        optimizer = optim.adamw(named, lr=lr, weight_decay=settings.weight_decay, decay=settings.decay)
        schedule = optim.Schedule(lr, resolved["warmup"], resolved["steps"], settings.final_lr)
        return roles.Learner(model, loss, optimizer, schedule)

    trunk, pieces = job.value is None, start.tokenizer.vocab_size
    sums = credit.joint_sums(clip, value_clip, settings.value_weight) if trunk else credit.policy_sums(clip)
    policy = learner(
        start.config,
        step_folder or start.folder,
        resolved["lr"],
        lambda model: Read(model, sums, temperature=heat, pieces=pieces),
        value_head=trunk,
    )
    value = None
    if job.value is not None and job.value_config is not None:
        value = learner(
            job.value_config,
            step_folder / VALUE if step_folder else job.value,
            resolved["value_lr"],
            lambda model: Read(model, credit.value_sums(value_clip)),
            scorer=True,
        )
        if step_folder is None and settings.value_score == "zero":
            value.model.init_score(std=0.0)
    if step_folder is not None:
        rest = state.restore(step_folder, policy.named, policy.optimizer, world)
        if value is None:
            roles.load_value_head(step_folder, policy.model)
        else:
            place = state.rank_file(step_folder, world.rank)
            state.put_back(place, rest, value.named, value.optimizer, f"{VALUE}.")
    reference = checkpoint.load_model(
        start.folder, dtype=job.frozen_dtype, device="cpu" if settings.offload else world.device
    )
    reference.config = start.config  # whose context may be longer
    return Roles(policy, value, Read(reference, temperature=heat, pieces=pieces), load_scorers(job))


def load_scorers(job: Job) -> dict[str, Scorer]:
    """The reward models by what they give; a folder that is named twice is loaded once."""
    held: dict[Path, Scorer] = {}
    kernels = ops.choices()  # those of the run, which may be resumed on another machine; a scorer chooses for itself
    for folder in job.scorers.values():
        if folder not in held:
            held[folder] = Scorer.load(str(folder), device=job.world.device.type, dtype=job.frozen_dtype)
            if job.settings.offload:
                held[folder].model.to("cpu")
    ops.restore(kernels)
    return {name: held[folder] for name, folder in job.scorers.items()}


def at_work(job: Job, models: Sequence[Any]) -> AbstractContextManager[None]:
    """Have models that only read on the device for the time of a block."""
    return roles.at_work(models, job.world.device, job.settings.offload)
