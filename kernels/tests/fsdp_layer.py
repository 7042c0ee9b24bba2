"""One of two processes that train a layer of SwiGLU and RoPE under FSDP2: `fsdp_layer.py STORE RANK`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llama2_kernels.rope import rope, rope_qkv
from llama2_kernels.swiglu import swiglu, swiglu_pair
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

H, G, K, D = 4, 2, 8, 32


class Layer(nn.Module):
    """Attention and feed-forward; `whole` says which of the two forms of each operator."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.qkv, self.out = nn.Linear(D, (H + 2 * G) * K, bias=False), nn.Linear(H * K, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 96, bias=False), nn.Linear(48, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], H + 2 * G, K)
        if self.whole:
            q, k, v = rope_qkv(qkv, G, cos, sin)
        else:
            q, k, v = qkv.split([H, G, G], dim=2)
            q, k = rope(q, k, cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        y = self.gate_up(x)
        return x + self.down(swiglu(y) if self.whole else swiglu_pair(*y.chunk(2, -1)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(whole) for whole in (False, True))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[1]).float(), 100.0 ** -(torch.arange(0, K, 2) / K))
        for layer in self.layers:
            x = checkpoint(layer, x, angle.cos(), angle.sin(), use_reentrant=False)
        return x.float().square().mean()


def main(store: str, rank: int) -> None:
    torch.manual_seed(0)
    whole, sharded, low = Model(), Model(), Model()
    sharded.load_state_dict(whole.state_dict())
    low.load_state_dict(whole.state_dict())
    low.bfloat16()
    x = torch.randn(4, 5, D).bfloat16()
    wanted = [torch.zeros_like(p) for p in whole.parameters()]
    for half in x.chunk(2):  # each half's gradient in bf16, their mean in fp32
        for total, grad in zip(wanted, torch.autograd.grad(low(half), list(low.parameters()))):
            total += grad.float() / 2

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    # By default FSDP2 casts what a layer is called with to the parameters' dtype: a table given as an argument, too.
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    sharded(x.chunk(2)[rank]).backward()
    for (name, p), want in zip(sharded.named_parameters(), wanted):
        assert p.grad is not None
        got = p.grad.full_tensor()  # type: ignore[attr-defined]
        assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-5, atol=1e-6), (name, got - want)
    print("same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
