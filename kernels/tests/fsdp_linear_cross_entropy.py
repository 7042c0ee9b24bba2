"""One of two processes that train a head on hidden states under FSDP2: `fsdp_linear_cross_entropy.py STORE RANK`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from llama2_kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24, bias=False)
        self.head = nn.Parameter(torch.randn(50, 24) * 0.3)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        hidden = self.linear(x)
        scale = torch.full(targets.shape, 0.5)
        return (
            linear_cross_entropy(hidden, self.head, targets, scale) - token_logprobs(hidden, self.head, targets).mean()
        )


def main(store: str, rank: int) -> None:
    torch.manual_seed(0)
    whole, sharded = Model(), Model()
    sharded.load_state_dict(whole.state_dict())
    x, targets = torch.randn(8, 24).bfloat16(), torch.randint(0, 50, (8,))
    targets[3] = -100

    low = Model()
    low.load_state_dict(whole.state_dict())
    low.bfloat16()
    grads = [torch.zeros_like(p) for p in whole.parameters()]
    for half in (slice(0, 4), slice(4, 8)):  # each half's gradient in bf16, their mean in fp32
        for total, grad in zip(grads, torch.autograd.grad(low(x[half], targets[half]), list(low.parameters()))):
            total += grad.float() / 2

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    part = slice(4 * rank, 4 * rank + 4)
    sharded(x[part], targets[part]).backward()
    for (name, p), want in zip(sharded.named_parameters(), grads):
        assert p.grad is not None
        got = p.grad.full_tensor()
        assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-5, atol=1e-6), (name, got - want)
    print("same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
