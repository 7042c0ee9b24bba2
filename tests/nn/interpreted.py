"""Run by test_ops.py in a process of its own: the model's operations by Triton kernels, in the interpreter.

Prints a JSON object: what each check found.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/tests"))
import conftest as _  # noqa: F401  the interpreter rounds as a GPU does

from llama2cli.nn import ops
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import KVCache, Llama

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=16,
)
ROWS = {
    "one text": (torch.arange(14).view(2, 7) % 40, None, None),
    "packed": (
        torch.arange(14).view(2, 7) * 3 % 40,
        torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2),
        torch.tensor([[0] * 3 + [1] * 4] * 2),
    ),
}


class Seen(TorchDispatchMode):
    """Counts the operators of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llama2_kernels":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def model(dtype: torch.dtype = torch.float32) -> Llama:
    made = Llama(CONFIG)
    made.init_weights(0, std=0.2)
    return made.to(dtype)


def pass_through(net: Llama, layout: str, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Hidden states, and the gradients of a sum of them with fixed weights (of a norm the plain sum says nothing)."""
    ids, positions, segments = ROWS[layout]
    out = (net if call is None else call)(ids, positions, segments)
    loss = (out.float() * torch.arange(out.numel()).cos().view_as(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [p for p in net.parameters() if p is not net.head])]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest distance, relative to the norm of what is wanted."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))


def by_head(hidden: Tensor, table: Tensor, targets: Tensor) -> list[Tensor]:
    """What the three operations on the head give, and the gradients of hidden states and head through two of them."""
    scale = torch.linspace(0.5, 1.5, len(targets))
    total = ops.linear_cross_entropy(hidden, table, targets, scale_N=scale)
    logprobs = ops.token_logprobs(hidden, table, targets)
    with torch.no_grad():
        others = ops.token_logprobs_and_entropy(hidden, table, targets)
    loss = total + (logprobs.exp() * scale).sum()
    return [total.detach(), logprobs.detach(), *others, *torch.autograd.grad(loss, [hidden, table])]


def check_head() -> dict[str, Any]:
    found: dict[str, Any] = {}
    targets = torch.arange(16) * 7 % 40
    targets[[2, 3, 11]] = -100
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        inputs = [torch.randn(n, 24).to(dtype).requires_grad_() for n in (16, 40)]
        ops.force("plain")
        want = by_head(*inputs, targets)
        ops.force("triton")
        got = by_head(*inputs, targets)
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(got, want))
        found[f"head, {name}"] = apart(got, want)
        if dtype == torch.float32:
            pieces = torch.compile(
                lambda h, t: (ops.linear_cross_entropy(h, t, targets), ops.token_logprobs(h, t, targets)),
                backend="aot_eager",
                fullgraph=True,
            )
            total, logprobs = pieces(*inputs)
            found["head, compiled"] = apart([logprobs.detach(), -total.detach()], [want[1], want[1].sum()])
    found["head, by"] = counted(lambda: by_head(*inputs, targets))
    with torch.no_grad():
        seen: list[int] = []
        real = ops._kernels
        assert real is not None
        ops._kernels = real._replace(
            linear_cross_entropy=lambda h, *rest: seen.append(len(h)) or real.linear_cross_entropy(h, *rest)
        )
        ops.linear_cross_entropy(*inputs, targets)
        ops._kernels = real
    found["head, tokens of the loss"] = seen[0]
    return found


def counted(work: Callable[[], object]) -> dict[str, int]:
    with Seen() as seen:
        work()
    return dict(seen.counts)


def keeping(graphs: list[torch.fx.Graph]) -> Callable[..., Any]:
    """A compiler that changes nothing, and keeps what it was given."""

    def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return aot_eager(module, inputs)

    return compiler


def check() -> dict[str, Any]:
    found: dict[str, Any] = {"choices": ops.choices()}
    for layout in ROWS:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            net = model(dtype)
            ops.force("plain")
            want = pass_through(net, layout)
            ops.force("triton")
            got = pass_through(net, layout)
            assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(got, want))
            found[f"{layout}, {name}"] = apart(got, want)
    net = model()
    found["triton"] = counted(lambda: pass_through(net, "one text"))

    direct = pass_through(net, "one text")
    net.checkpoint_layers = True
    again = pass_through(net, "one text")
    net.checkpoint_layers = False
    found["checkpointing"] = all(torch.equal(a, b) for a, b in zip(direct, again))

    gate_up = torch.randn(3, 8, requires_grad=True)
    (one,) = torch.autograd.grad(ops.swiglu(gate_up).sum(), gate_up)
    (two,) = torch.autograd.grad(checkpoint(ops.swiglu, gate_up, use_reentrant=False).sum(), gate_up)
    found["checkpointed operation"] = torch.equal(one, two)

    with torch.autocast("cpu", torch.bfloat16):
        got = pass_through(net, "one text")
        ops.force("plain")
        want = pass_through(net, "one text")
    found["autocast"] = apart(got, want)

    # Token by token with a cache, in inference mode.
    ops.force("triton")
    with torch.inference_mode():
        cache = KVCache(CONFIG, 2, 8, dtype=torch.float32, device="cpu")
        ids = ROWS["one text"][0]
        steps = torch.cat([net(ids[:, i : i + 1], cache=cache) for i in range(4)], 1)
    found["cache"] = apart([steps], [direct[0][:, :4]])

    # A compiled region: the kernels only where they are forced.
    for mode in ("triton", "auto"):
        torch._dynamo.reset()
        ops.force(mode)  # type: ignore[arg-type]
        if mode == "auto":
            ops.restore(ops.choices() | {"triton": True})
        graphs: list[torch.fx.Graph] = []
        compiled = torch.compile(net, backend=keeping(graphs), fullgraph=True)
        found[f"compiled, {mode}, apart"] = apart(pass_through(net, "one text", compiled), direct)
        found[f"compiled, {mode}"] = sum("llama2_kernels" in str(node.target) for g in graphs for node in g.nodes)
    found["auto on a CPU"] = counted(lambda: pass_through(net, "one text"))
    ops.force("plain")
    found["plain"] = counted(lambda: pass_through(net, "one text"))

    found |= check_head()
    found["disagreement"] = check_disagreement()
    ops.restore(json.loads(json.dumps(found["choices"])))
    ops.setup_process()
    found["restored"] = ops.choices() == found["choices"]
    found["after restore"] = counted(lambda: pass_through(net, "one text"))
    return found


def check_disagreement() -> list[str | None]:
    """What `disagreement` says of the kernels, of one that is 1% too large, of NaN, and of one that fails."""

    def fails(*args: object) -> Any:
        raise RuntimeError("no\nway")

    kernels = ops._load_kernels()
    assert kernels is not None
    broken = [
        kernels,
        kernels._replace(swiglu=lambda x: ops.plain_swiglu(x) * 1.01),
        kernels._replace(rms_norm=lambda x, w, eps: ops.plain_rms_norm(x, w, eps) * torch.nan),
        kernels._replace(token_logprobs=fails),
    ]
    return [ops.disagreement(which, torch.device("cpu")) for which in broken]


if __name__ == "__main__":
    torch.manual_seed(0)
    ops.setup_process()
    print(json.dumps(check()))
