"""Registration, launches and their record."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from llama2_kernels import registry
from llama2_kernels.registry import jit, launch, n_sms, on, op, record, tl
from torch import Tensor


@jit
def _scaled(X, Y, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * tl.cast(factor, tl.float32)).to(Y.dtype.element_ty), mask=at < n)


@op("test_scaled", lambda x, factor: x.new_empty(x.shape))
def scaled(x: Tensor, factor: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x):
        launch(_scaled)[((x.numel() + 63) // 64,)](x, y, x.numel(), factor, BLOCK=64, num_warps=2)
    return y


def test_an_operator(device: str) -> None:
    x = torch.randn(200, device=device)
    assert torch.equal(scaled(x, 3.0), x * 3.0)
    assert torch.equal(torch.ops.llama2_kernels.test_scaled(x, 3.0), x * 3.0)
    torch.library.opcheck(scaled, (x, 3.0))
    compiled = torch.compile(lambda x: scaled(x, 3.0) + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (200, 130):
        assert torch.equal(compiled(x[:n]), x[:n] * 3.0 + 1)


def test_a_record_runs_nothing() -> None:
    x = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    (made,) = record(scaled, x[8:], 2.0)
    assert made.kernel is _scaled and made.grid == (16,) and (made.warps, made.stages) == (2, 3)
    assert made.arguments["n"] == 992 and made.arguments["BLOCK"] == 64


@pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed")
def test_devices() -> None:
    assert n_sms(torch.device("meta")) == registry.UNKNOWN_SMS
    assert registry.available()
    if registry.INTERPRET:
        assert n_sms(torch.device("cpu")) == registry.INTERPRETED_SMS


COMPILED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
import sys; sys.path.insert(0, sys.argv[1])
import test_registry as t
from llama2_kernels import registry

assert not registry.INTERPRET
# What the launcher would specialise on: alignment, divisibility by 16, the integer 1.
x = torch.empty(1000, dtype=torch.bfloat16, device="meta")
types, constants, hints = registry.record(t.scaled, x[8:], 2.0)[0].signature()
assert types == {"X": "*bf16", "Y": "*bf16", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}, types
assert constants == {"BLOCK": 64} and set(hints) == {(0,), (1,), (2,)}, hints
types, constants, hints = registry.record(t.scaled, x[1:4], 2.0)[0].signature()
assert set(hints) == {(1,)}, hints
types, constants, hints = registry.record(t.scaled, x[:1], 2.0)[0].signature()
assert constants == {"BLOCK": 64, "n": 1}, constants

# A CPU tensor is refused by name, not by a crash in the launcher.
try:
    t.scaled(torch.randn(3), 2.0)
except RuntimeError as e:
    assert "CUDA device" in str(e), e
else:
    raise SystemExit("not refused")

# torch can follow the body on tensors that pretend to be on a device, and knows whose sources its cache depends on.
with FakeTensorMode():
    graph = make_fx(lambda x: t.scaled.launcher(x, 2.0))(torch.empty(1000, device="cuda"))
assert "triton_kernel_wrapper" in graph.code, graph.code
assert torch._library.triton.get_triton_kernels_for_op("llama2_kernels::test_scaled") == [t._scaled]

# A whole operator launches its kernel itself; one whose body is compiled, in torch's wrapper while it is traced.
def kind(x: torch.Tensor) -> torch.Tensor:
    kinds.append(type(registry.launch(t._scaled)))
    return x.clone()

kinds, fake = [], lambda x: x.new_empty(x.shape)
registry.op("test_whole", fake, whole=True)(kind)(torch.randn(2))
registry.op("test_open", fake)(kind)(torch.randn(2))
assert kinds == [type(t._scaled)] * 2, kinds
with FakeTensorMode():
    kind(torch.randn(2))
assert kinds[2] != type(t._scaled), kinds
"""

WITHOUT = """
import sys
sys.modules["triton"] = None
import llama2_kernels.registry as registry
assert not registry.HAS_TRITON and not registry.available()
import importlib, pkgutil, test_registry as t, torch, llama2_kernels
for module in pkgutil.iter_modules(llama2_kernels.__path__):
    importlib.import_module(f"llama2_kernels.{module.name}")
try:
    t.scaled(torch.randn(3), 2.0)
except RuntimeError as e:
    print(e)
"""


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    folder = str(__file__).rpartition("/")[0]
    env = env | {"PYTHONPATH": f"{folder}:{env.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True)


@pytest.mark.skipif(not registry.INTERPRET, reason="compiled here anyway")
def test_the_compiled_form_without_a_device(compiler_env: dict[str, str]) -> None:
    done = run(COMPILED, compiler_env)
    assert done.returncode == 0, done.stderr


def test_import_without_triton(compiler_env: dict[str, str]) -> None:
    done = run(WITHOUT, compiler_env)
    assert done.returncode == 0, done.stderr
    assert "CUDA device" in done.stdout
