"""Several processes as one: ranks, the few sums that they share, and sharding (FSDP2) applied to a model from outside.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process and nothing here communicates. Only
tensors travel (gloo on CPU, nccl on CUDA): torch's calls that send Python objects would unpickle them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llama2cli.errors import Failure, Interrupted, Misuse


@dataclass(frozen=True)
class World:
    """This process among all that train together. rank: from 0; size: how many; device: the one that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the run folder and speaks."""
        return self.rank == 0


def launched() -> int:
    """How many processes torchrun started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the other processes for the time of the block.

    device: auto (CUDA where there is one), cpu or cuda. Raises Misuse for CUDA where there is none, and Failure where
    another process of the group has gone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Misuse("torch sees no CUDA device; take --device cpu", "--device")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        repeatable()
    if launched() == 1:
        yield World(0, 1, torch.device(kind))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise Misuse(
                f"local rank {local} has no GPU of its own: {torch.cuda.device_count()} on this machine", "--device"
            )
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=where if kind == "cuda" else None)
    try:
        yield World(rank, launched(), where)
    except (Interrupted, Misuse) as e:  # the same on every rank: one of them says it
        if rank:
            raise SystemExit(e.exit_code) from None
        raise
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or any(s in str(e) for s in ("onnection", "gloo", "NCCL")):
            raise Failure(f"rank {rank}: another process of the group has gone; its line says why") from e
        raise
    finally:
        dist.destroy_process_group()


def repeatable() -> None:
    """Have CUDA add up in the same order every time: the same command gives the same bytes, and a resumed run too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def sums(here: World, values: Sequence[float]) -> list[float]:
    """Each value summed over ranks, in fp64; the same numbers on every rank."""
    if here.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=here.device)
    dist.all_reduce(total)
    return total.tolist()


def most(here: World, value: int) -> int:
    """The largest of the ranks' numbers; the same on every rank."""
    if here.size == 1:
        return value
    largest = torch.tensor(value, device=here.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def side_by_side(here: World, values: Sequence[float]) -> list[list[float]]:
    """The numbers of all ranks, by rank; each has as many. The same on every rank."""
    n = len(values)
    flat = [0.0] * (n * here.size)
    flat[n * here.rank : n * (here.rank + 1)] = values
    flat = sums(here, flat)
    return [flat[n * r : n * (r + 1)] for r in range(here.size)]


def barrier(here: World) -> None:
    """Wait until every rank is here."""
    if here.size > 1:
        dist.barrier()


def from_first(here: World, value: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's value on every rank. It travels as the bytes of its JSON."""
    if here.size == 1:
        return value
    data = json.dumps(value).encode()
    size = torch.tensor(len(data), device=here.device)
    dist.broadcast(size, 0)
    content = torch.zeros(int(size), dtype=torch.uint8, device=here.device)
    if here.first:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def shard(root: nn.Module, blocks: Iterable[nn.Module], here: World, *, dtype: torch.dtype = torch.float32) -> None:
    """Shard a model's parameters over all ranks (FSDP2): each block is gathered when it runs, the rest with the root.

    root: the module whose forward gives the loss, so that all weights are used inside of it. dtype: what the gathered
    weights are rounded to; gradients are summed in fp32. Gradients are added up, not averaged: a loss is a sum over
    tokens that was divided by the number of tokens of all ranks.
    """
    if here.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(here.device.type, (here.size,))
    rounded = None if dtype == torch.float32 else dtype
    # Inputs are not rounded: the residual stream is in the weights' type anyway, and the rest that a block or a loss is
    # called with (rotary tables, margins, advantages, old log-probabilities) is fp32 for a reason.
    policy = MixedPrecisionPolicy(
        param_dtype=rounded, reduce_dtype=torch.float32 if rounded else None, cast_forward_inputs=False
    )
    for module in [*blocks, root]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has neither averages nor scaled sums


def reshard(root: nn.Module) -> None:
    """Give gathered weights free after a forward pass that no backward pass follows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(root, FSDPModule):
        root.reshard()
