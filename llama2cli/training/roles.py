"""Several models in one run: each that trains with its optimizer, and a whole copy of one for sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llama2cli.nn import checkpoint
from llama2cli.nn.model import Llama, fill
from llama2cli.text.tensorfile import open_arrays, write_arrays
from llama2cli.training import dist, optim
from llama2cli.training.data import Batch
from llama2cli.training.dist import World
from llama2cli.training.fit import gradients
from llama2cli.training.optim import Schedule
from llama2cli.training.signals import Stop
from llama2cli.training.state import FOLDER, OnCpu

VALUE_HEAD = "value_head.safetensors"


@dataclass(eq=False)
class Learner:
    """A model that trains. loss: the module around it whose forward is called."""

    model: Llama
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Its parameters."""
        return dict(self.model.named_parameters())

    def update(
        self, batch: Batch, n: int, step: int, *, clip: float, dtype: torch.dtype, world: World
    ) -> tuple[list[float], float]:
        """One optimizer step: the loss's n sums over all ranks, and the norm that the gradients had.

        step: the one that the schedule is asked about. Raises Failure where loss or gradients are not finite.
        """
        mine = gradients(self.loss, batch, world, dtype, Stop(), n)
        assert mine is not None
        sums = dist.sums(world, mine.tolist())
        params = list(self.model.parameters())
        norm = optim.step(self.optimizer, params, lr=self.schedule.lr(step), loss=sums[0] / batch.count, clip=clip)
        return sums, norm


@torch.no_grad()
def consolidated(model: Llama, dtype: torch.dtype, world: World) -> Llama:
    """The model whole on this rank's device, in a type, for sampling; itself where it is that already.

    FSDP is fit for one forward pass and some twenty times too slow for a token at a time, so the weights are brought
    together once before and given free afterwards (Llama 2, section 3.2.3).
    """
    if world.size == 1 and dtype == model.embed.dtype:
        return model
    with torch.device("meta"):
        whole = Llama(model.config)
    whole.to(dtype).to_empty(device=world.device)
    sources = dict(model.named_parameters())
    for name, param in whole.named_parameters():
        param.copy_(checkpoint.gather(sources[name].detach()))
        param.requires_grad_(False)
    return whole


@contextmanager
def at_work(models: Iterable[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Have models on the device for the time of the block; with offload they rest in host memory before and after."""
    models = list(models)
    for model in models if offload else ():
        model.to(device)
    try:
        yield
    finally:
        for model in models if offload else ():
            model.to("cpu")


def save_value_head(step_folder: Path, model: Llama, world: World) -> None:
    """Keep the value head of a shared trunk in `trainer/` of a step folder; every rank calls it."""
    assert model.score is not None
    whole = checkpoint.gather(model.score.detach())
    if world.first:
        write_arrays(step_folder / FOLDER / VALUE_HEAD, OnCpu({"score": whole}))


def load_value_head(step_folder: Path, model: Llama) -> None:
    """Put it back."""
    assert model.score is not None
    fill(model.score, torch.from_numpy(open_arrays(step_folder / FOLDER / VALUE_HEAD)["score"].copy()))
