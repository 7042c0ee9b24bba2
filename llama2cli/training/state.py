"""What a step folder holds beside the model, in `trainer/`: all that the next step depends on.

    state.json               step, position in the data, best held-out loss, number of ranks, threads, kernels
    rank-00000.safetensors   each rank's moments of the optimizer, random state, and whatever a stage adds

The weights themselves are read back from the checkpoint; where that is rounded (--save-dtype), each rank keeps its part
in fp32 here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llama2cli.errors import DataError, Misuse
from llama2cli.nn import ops
from llama2cli.text.tensorfile import open_arrays, write_arrays
from llama2cli.training.dist import World
from llama2cli.training.run import to_json

FOLDER, STATE = "trainer", "state.json"


@dataclass
class State:
    """Where training stands; the same on every rank.

    step: the last step done. position: in the data, as its iterator gave it. best: the saved step with the lowest
    held-out loss, and that loss. extra: what a stage adds (JSON).
    """

    step: int = 0
    position: dict[str, Any] | None = None
    best: tuple[int, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class OnCpu(Mapping[str, np.ndarray]):
    """Tensors as arrays in host memory, each brought there when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return local(self.tensors[name]).cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rank_file(folder: Path, rank: int) -> Path:
    """The file of one rank in a step folder."""
    return folder / FOLDER / f"rank-{rank:05d}.safetensors"


def moments(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, weights: bool = False, prefix: str = ""
) -> dict[str, Tensor]:
    """The optimizer's tensors by name ("embed.exp_avg"), and the step that AdamW counts by parameter.

    weights: with the weights themselves. prefix: of the names, for a second model.
    """
    found: dict[str, Tensor] = {}
    for name, param in named.items():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{prefix}{name}.{key}"] = value
        if weights:
            found[f"{prefix}{name}.weight"] = param
    return found


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators."""
    found = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(device)
    return found


def save(
    folder: Path,
    state: State,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    weights: bool = False,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `trainer/` into a step folder that is not published yet; every rank calls it.

    named: the parameters that train. weights: keep fp32 weights too. extra: tensors that a stage adds.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = moments(named, optimizer, weights=weights) | random_state(world.device) | dict(extra or {})
    write_arrays(rank_file(folder, world.rank), OnCpu(tensors))
    machine = {"ranks": world.size, "threads": torch.get_num_threads(), "kernels": ops.choices()}
    if world.first:
        (folder / FOLDER / STATE).write_text(to_json(asdict(state) | machine))


class Machine(NamedTuple):
    """What a saved step was computed with: processes, threads of each, kernels."""

    ranks: int
    threads: int
    kernels: dict[str, Any]


def read(folder: Path) -> tuple[State, Machine]:
    """The state that a step folder holds. Raises DataError where the file is not what it should be."""
    path = folder / FOLDER / STATE
    try:
        content = json.loads(path.read_bytes())
        best = content["best"]
        state = State(content["step"], content["position"], tuple(best) if best else None, content["extra"])
        return state, Machine(content["ranks"], content["threads"], content["kernels"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"cannot be read as the state of a run ({type(e).__name__}: {e})", path) from None


def take_over(machine: Machine, world: World, place: object) -> None:
    """Compute as the saved step was computed: the same threads and kernels. Call it before the first operation.

    Raises Misuse where the run had another number of processes.
    """
    if machine.ranks != world.size:
        n = machine.ranks
        fix = f"resume it with torchrun --nproc-per-node {n}" if n > 1 else "resume it without torchrun"
        raise Misuse(f"the run has {n} processes, now there are {world.size}; {fix}, or --init from it", place)
    torch.set_num_threads(machine.threads)
    ops.restore(machine.kernels)


@torch.no_grad()
def restore(
    folder: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Tensor]:
    """Put the optimizer, the random state and, where they are there, fp32 weights back; return what else was saved.

    Raises DataError where the file does not belong to these parameters.
    """
    path = rank_file(folder, world.rank)
    arrays = open_arrays(path)
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
    random = {k: tensors.pop(k) for k in list(tensors) if k.startswith("random.")}
    torch.set_rng_state(random["random.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(random["random.cuda"], world.device)
    put_back(path, tensors, named, optimizer)
    return tensors


@torch.no_grad()
def put_back(
    path: Path,
    tensors: dict[str, Tensor],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    prefix: str = "",
) -> None:
    """Take the moments, and fp32 weights where they are there, of these parameters out of tensors of a rank's file.

    prefix: of the names, for a second model. Raises DataError where they do not fit.
    """
    for param_name, param in named.items():
        name = prefix + param_name
        own = {k.removeprefix(f"{name}."): tensors.pop(k) for k in list(tensors) if k.rpartition(".")[0] == name}
        weight = own.pop("weight", None)
        if weight is not None:
            check_shape(path, f"{name}.weight", weight, local(param))
            local(param).copy_(weight)
        if own:
            optimizer.state[param] = {k: placed(path, f"{name}.{k}", v, param) for k, v in own.items()}


def placed(path: Path, name: str, value: Tensor, param: nn.Parameter) -> Tensor:
    """A tensor of the optimizer where its parameter is: a part of a sharded tensor, or a number."""
    if value.ndim == 0:
        return value.to(param.device)
    check_shape(path, name, value, local(param))
    value = value.to(param.device)
    if hasattr(param, "device_mesh"):
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value,
            param.device_mesh,
            param.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    return value


def check_shape(path: Path, name: str, value: Tensor, like: Tensor) -> None:
    """Raise DataError where a tensor of the file has not the shape of its parameter."""
    if value.shape != like.shape:
        raise DataError(f"expected shape {list(like.shape)}, got {list(value.shape)}", path, name)
