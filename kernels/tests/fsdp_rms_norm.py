"""One of two processes that train a model of two norms under FSDP2: `fsdp_rms_norm.py STORE RANK`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from llama2_kernels.rms_norm import add_rms_norm, rms_norm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.rand(24) + 0.5), nn.Parameter(torch.rand(24) + 0.5)
        self.linear = nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(rms_norm(x, self.first.to(x.dtype), 1e-5))
        y, h = add_rms_norm(y, x, self.second.to(x.dtype), 1e-5)
        return (y + h).float().square().mean()


def main(store: str, rank: int) -> None:
    torch.manual_seed(0)
    whole, sharded = Model(), Model()
    sharded.load_state_dict(whole.state_dict())
    x = torch.randn(8, 24).bfloat16()

    low = Model()
    low.load_state_dict(whole.state_dict())
    low.bfloat16()
    grads = [torch.zeros_like(p) for p in whole.parameters()]
    for half in x.chunk(2):  # each half's gradient in bf16, their mean in fp32
        for total, grad in zip(grads, torch.autograd.grad(low(half), list(low.parameters()))):
            total += grad.float() / 2

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    sharded(x.chunk(2)[rank]).backward()
    for (name, p), want, before in zip(sharded.named_parameters(), grads, whole.parameters()):
        assert p.grad is not None
        got = p.grad.full_tensor()
        assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-5, atol=1e-6), (name, got - want)
        assert torch.equal(p.full_tensor(), before)
    optimizer.step()
    for p, want, before in zip(sharded.parameters(), grads, whole.parameters()):
        assert torch.allclose(p.full_tensor(), before - 0.1 * want, atol=1e-6)
    print("same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
