"""The operations against written-out mathematics and transformers' functions, and the switch between their forms."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama2cli.errors import Misuse
from llama2cli.nn import cpu, loss, ops

FAST = {f"{name}.{kind}": "fast" for name in ("rms_norm", "rope", "attention") for kind in ("fp32", "bf16")}


@pytest.fixture(autouse=True)
def unchanged_switch() -> Iterator[None]:
    before = ops.choices()
    torch.manual_seed(0)
    yield
    ops.restore(before)


@pytest.fixture(params=["plain", "fast"])
def form(request: pytest.FixtureRequest) -> str:
    """Each test with torch's own operators and with the faster forms, whatever this machine would choose."""
    matmul = {"matmul.fp32": "fast"} if cpu.exact() else {}
    ops.restore({"mode": "auto", "picks": FAST | matmul if request.param == "fast" else {}})
    return request.param


def written_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, branches: Tensor | None) -> Tensor:
    """Query by query, key by key, in fp64."""

    def sees(b: int, t: int, s: int) -> bool:
        same = segments is None or segments[b, s] == segments[b, t]
        return bool(same and (branches is None or branches[b, s] in (0, branches[b, t])))

    B, T, H, K = q.shape
    out = torch.zeros(B, T, H, K, dtype=torch.double)
    for b in range(B):
        for h in range(H):
            g = h * k.shape[2] // H
            for t in range(T):
                seen = [s for s in range(t + 1) if sees(b, t, s)]
                scores = torch.stack([q[b, t, h] @ k[b, s, g] for s in seen]) / math.sqrt(K)
                out[b, t, h] = scores.softmax(0) @ torch.stack([v[b, s, g] for s in seen])
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("layout", ["one text", "segments", "branches"])
def test_attention_is_the_written_out_sum(form: str, heads: tuple[int, int], layout: str) -> None:
    H, G = heads
    q, k, v = (torch.randn(2, 9, n, 4) for n in (H, G, G))
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 0, 5, 0, 5, 5, 0, 0, 5]])
    answers = torch.tensor([[0, 1, 2, 0, 3, 0, 0, 9, 1], [0, 0, 1, 1, 2, 1, 2, 1, 0]])
    segments, branches = ids if layout != "one text" else None, answers if layout == "branches" else None
    got = ops.attention(q, k, v, segments_BT=segments, branches_BT=branches)
    want = written_attention(q.double(), k.double(), v.double(), segments, branches)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_branches_without_segments(form: str) -> None:
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="give both"):
        ops.attention(q, q, q, branches_BT=torch.zeros(1, 3, dtype=torch.long))


def test_attention_of_one_token_is_its_value(form: str) -> None:
    v = torch.randn(2, 1, 2, 4)
    assert torch.equal(ops.attention(torch.randn(2, 1, 4, 4), torch.randn(2, 1, 2, 4), v), v.repeat_interleave(2, 2))


def test_rms_norm_is_that_of_transformers(form: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(3, 7, 48).requires_grad_()
    want, got = norm(x), ops.rms_norm(x, norm.weight, 1e-5)
    assert torch.allclose(got, want, atol=1e-6)
    for g, w in zip(*(torch.autograd.grad(y.square().sum(), [x, norm.weight]) for y in (got, want))):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-5)
    tiny = torch.full((1, 48), 1e-6)  # where eps decides
    assert torch.allclose(ops.rms_norm(tiny, norm.weight, 1e-5), tiny / math.sqrt(1e-5) * norm.weight, rtol=1e-4)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rope_is_that_of_transformers(form: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_theta": theta, "rope_type": "default"}
    )
    q, k = torch.randn(2, 11, 4, 8), torch.randn(2, 11, 2, 8)
    positions = torch.stack([torch.arange(11), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 900, 3999, 4095])])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want = [x.transpose(1, 2) for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    table = ops.rope_table(8, theta, 4096)
    for got, expected in zip(ops.rope(q, k, *table, positions), want):
        assert torch.allclose(got, expected, atol=1e-6)
    for got, expected in zip(ops.rope(q, k, *table), want):
        assert torch.allclose(got[0], expected[0], atol=1e-6)


def test_rope_turns_a_pair_by_the_angle(form: str) -> None:
    q = torch.zeros(1, 2, 1, 4)
    q[0, 1, 0] = torch.tensor([1.0, 2.0, 0.0, 0.0])  # coordinates i and i + K/2 are a pair
    got, _ = ops.rope(q, q, *ops.rope_table(4, 100.0, 2))
    want = [math.cos(1.0), 2 * math.cos(0.1), math.sin(1.0), 2 * math.sin(0.1)]
    assert torch.allclose(got[0, 1, 0], torch.tensor(want), atol=1e-6)


def test_swiglu_by_hand() -> None:
    got = ops.swiglu(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
    assert got[0].tolist() == pytest.approx([3 / (1 + math.exp(-1)), -1 / (1 + math.exp(2))])


@pytest.mark.parametrize("rows", [1, 3, 40, 700])
def test_linear_in_either_library(form: str, rows: int) -> None:
    x, w = torch.randn(rows, 64), torch.randn(48, 64)
    want = x.double() @ w.double().t()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(ops.linear(x, w).double(), want, atol=1e-4)
            assert torch.allclose(ops.linear(x, w.t().contiguous().t()).double(), want, atol=1e-4)


# --- where the operations must work -------------------------------------------------------------------------------


def block(qkv: Tensor, weight: Tensor, norm: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """All operations in a row: [B, T, 3 H K] -> [B, T, H K]."""
    B, T, _ = qkv.shape
    q, k, v = ops.rms_norm(qkv, norm, 1e-5).view(B, T, 6, 8).split(2, dim=2)
    o = ops.attention(*ops.rope(q, k, *table), v).reshape(B, T, 16)
    return ops.swiglu(ops.linear(o, weight))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 20, 48).requires_grad_(),
        torch.randn(32, 16).requires_grad_(),
        torch.rand(48).requires_grad_(),
    )


def test_checkpointing_changes_nothing(form: str) -> None:
    leaves, table = inputs(), ops.rope_table(8, 1e4, 20)
    direct = torch.autograd.grad(block(*leaves, table).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(block, *leaves, table, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, again))


def test_under_autocast(form: str) -> None:
    leaves, table = inputs(), ops.rope_table(8, 1e4, 20)
    exact = block(*leaves, table)
    want = torch.autograd.grad(exact.sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block(*leaves, table)
    got = torch.autograd.grad(rounded.sum(), leaves)
    assert rounded.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got)
    for a, b in zip((rounded, *got), (exact, *want)):
        assert (a - b).norm() < 0.03 * b.norm()


def test_compiled_regions_take_the_plain_forms(form: str) -> None:
    leaves, table = inputs(), ops.rope_table(8, 1e4, 20)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(*leaves, table), block(*leaves, table), atol=1e-5)


def test_the_same_bytes_whatever_memory_held(form: str) -> None:
    leaves, table = inputs(), ops.rope_table(8, 1e4, 20)

    def run() -> list[Tensor]:
        out = block(*leaves, table)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = run()
    for size in (1 << 20, 1 << 14, 1 << 10):  # freed memory full of NaN
        del [torch.full((size,), math.nan) for _ in range(8)][:]
    assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_inference_mode(form: str) -> None:
    leaves, table = inputs(), ops.rope_table(8, 1e4, 20)
    with torch.inference_mode():
        assert torch.allclose(block(*leaves, table), block(*leaves, table), atol=0)


# --- the switch ---------------------------------------------------------------------------------------------------


def nothing_is_timed(*args: object, **kwargs: object) -> bool:
    raise AssertionError("a form was timed")


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_choices_survive_json_and_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compare", lambda *a, **k: True)
    ops.restore({"mode": "auto", "picks": {}})
    ops.setup_process()
    taken = json.loads(json.dumps(ops.choices()))
    assert set(taken["picks"].values()) == {"fast"}
    ops.restore({"mode": "auto", "picks": {}})
    monkeypatch.setattr(cpu, "compare", nothing_is_timed)
    ops.restore(taken)
    ops.setup_process()
    assert ops.choices() == taken


@pytest.mark.parametrize("answer", [True, False])
def test_what_the_check_says_is_taken(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(cpu, "compare", lambda *a, **k: answer)
    ops.restore({"mode": "auto", "picks": {}})
    ops.setup_process()
    assert set(ops.choices()["picks"].values()) == {"fast" if answer else "plain"}
    assert precision() == ("bf16" if answer and cpu.exact() else "ieee")


def test_plain_uses_nothing_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.restore({"mode": "auto", "picks": FAST | {"matmul.fp32": "fast"}})
    for name in ("rms_norm", "rope", "attention"):
        monkeypatch.setattr(cpu, name, nothing_is_timed)
    ops.force("plain")
    ops.setup_process()
    assert precision() == "ieee"
    block(*inputs(), ops.rope_table(8, 1e4, 20)).sum().backward()
    ops.force("auto")
    assert precision() == ("bf16" if cpu.exact() else "ieee")
    with pytest.raises(AssertionError, match="timed"):
        block(*inputs(), ops.rope_table(8, 1e4, 20))


def test_oneDNN_is_refused_where_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with matrix tiles would compute in bf16: choices that come from another machine do not turn it on."""
    monkeypatch.setattr(cpu, "exact", lambda: False)
    ops.restore({"mode": "auto", "picks": {"matmul.fp32": "fast"}})
    assert precision() == "ieee"


def test_few_rows_leave_the_library_as_it_was() -> None:
    if not cpu.exact():
        pytest.skip("oneDNN does not compute in fp32 here")
    ops.restore({"mode": "auto", "picks": {"matmul.fp32": "fast"}})
    with torch.no_grad():
        ops.linear(torch.randn(1, 8), torch.randn(8, 8))
        assert precision() == "bf16"
        with cpu.blas():
            ops.linear(torch.randn(1, 8), torch.randn(8, 8))
            assert precision() == "ieee"
    assert precision() == "bf16"


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="auto, plain, triton"):
        ops.force("fast")  # type: ignore[arg-type]


def test_setup_in_a_process_of_its_own() -> None:
    """LLAMA2_OPS=plain is heard; otherwise the checks leave random numbers, autograd and modules as they were."""
    code = """
import json, sys, torch
from llama2cli.nn import ops
torch.manual_seed(1)
want = torch.Generator().manual_seed(1)
with torch.no_grad():
    ops.setup_process()
    assert not torch.is_grad_enabled()
assert torch.equal(torch.rand(3), torch.rand(3, generator=want))
assert "sympy" not in sys.modules
print(json.dumps([ops.choices(), torch.backends.mkldnn.matmul.fp32_precision]))
"""
    results = [json.loads(run("-c", code, LLAMA2_OPS=mode)) for mode in ("plain", "auto")]
    assert results[0][0] == {"mode": "plain", "picks": {}, "triton": False} and results[0][1] != "bf16"
    picks = results[1][0]["picks"]
    assert set(picks) == {"matmul.fp32", "rms_norm.fp32", "rope.fp32", "rope.bf16", "attention.fp32", "attention.bf16"}
    assert (results[1][1] == "bf16") == (picks["matmul.fp32"] == "fast")


def test_plain_attention_with_a_mask_is_sdpa_of_each_text() -> None:
    """Packed texts attend as if each stood alone."""
    q, k, v = (torch.randn(1, 12, n, 4) for n in (4, 2, 2))
    segments = torch.tensor([[0] * 5 + [1] * 7])
    packed = ops.plain_attention(q, k, v, segments)
    for part in (slice(0, 5), slice(5, 12)):
        q1, k1, v1 = (x[:, part].transpose(1, 2) for x in (q, k, v))
        alone = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True).transpose(1, 2)
        assert torch.allclose(packed[:, part], alone, atol=1e-6)


# --- Triton kernels -----------------------------------------------------------------------------------------------

KERNELS = Path(__file__).parents[2] / "kernels"
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def run(*args: object, **env: str) -> str:
    """A process of its own, without the interpreter unless `env` asks for it; its stdout."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LLAMA2_OPS")}
    path = os.pathsep.join(filter(None, (str(KERNELS), inherited.get("PYTHONPATH"))))  # where the install is older
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, env=inherited | {"PYTHONPATH": path} | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What interpreted.py finds."""
    return json.loads(run(Path(__file__).with_name("interpreted.py"), LLAMA2_OPS="triton", TRITON_INTERPRET="1"))


BY_TRITON = {"rms_norm_forward": 3, "rope": 2, "swiglu": 1, "rms_norm_backward": 3, "swiglu_backward": 1}


@needs_triton
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 2e-6), ("bf16", 0.03)])
@pytest.mark.parametrize("layout", ["one text", "packed"])
def test_a_model_by_kernels_is_the_plain_one(
    interpreted: dict[str, Any], layout: str, dtype: str, bound: float
) -> None:
    """Hidden states and every gradient; bf16: both forms round."""
    assert interpreted[f"{layout}, {dtype}"] < bound


@needs_triton
def test_where_kernels_are_taken(interpreted: dict[str, Any]) -> None:
    assert interpreted["choices"]["mode"] == "triton" and interpreted["choices"]["triton"] is True
    assert interpreted["triton"] == interpreted["after restore"] == BY_TRITON and interpreted["restored"]
    assert interpreted["plain"] == interpreted["auto on a CPU"] == {}
    assert (interpreted["compiled, triton"], interpreted["compiled, auto"]) == (5, 0)


@needs_triton
def test_kernels_are_held_against_the_plain_forms(interpreted: dict[str, Any]) -> None:
    """On a device that they were not tried on: none differs; one that does, or fails, is named."""
    nothing, large, nan, failed = interpreted["disagreement"]
    assert nothing is None
    assert "swiglu in fp32 differs" in large and "rms_norm in fp32 differs" in nan
    assert failed == "token_logprobs in fp32 failed here (RuntimeError: no way)"


@needs_triton
def test_the_head_by_kernels(interpreted: dict[str, Any]) -> None:
    """Losses, log-probabilities, entropies and gradients, of 16 tokens of which 3 have no target."""
    assert interpreted["head, fp32"] < 2e-6 and interpreted["head, bf16"] < 0.01
    assert interpreted["head, by"] == {"linear_cross_entropy": 1, "token_logprobs": 2, "token_logprobs_backward": 1}
    assert interpreted["head, tokens of the loss"] == 13
    assert interpreted["head, compiled"] < 2e-6


@needs_triton
def test_kernels_within_everything_else(interpreted: dict[str, Any]) -> None:
    assert interpreted["checkpointing"] and interpreted["checkpointed operation"]
    assert interpreted["autocast"] < 0.03
    for name in ("cache", "compiled, triton, apart", "compiled, auto, apart"):
        assert interpreted[name] < 2e-6, name


REFUSED = """
import json, sys
if sys.argv[1] == "absent":
    sys.modules["triton"] = None  # as where it is not installed
import torch
from llama2cli.errors import Misuse
from llama2cli.nn import ops

def refused(work):
    try:
        work()
    except Misuse as e:
        return str(e)
    raise SystemExit("not refused")

told = [refused(ops.setup_process)]
ops.restore({"mode": "auto", "picks": {}})
ops.setup_process()
assert ops.choices()["triton"] is False, ops.choices()
before = ops.choices()
told.append(refused(lambda: ops.force("triton")))
assert ops.choices() == before
ops.restore(before | {"triton": True})  # of a run that had them
x = torch.randn(2, 8)
assert torch.equal(ops.swiglu(x), ops.plain_swiglu(x))
print(json.dumps(told))
"""


@pytest.mark.parametrize("where", ["absent", pytest.param("no device", marks=needs_triton)])
def test_kernels_that_cannot_run(where: str) -> None:
    """Refused where they are asked for, left out where they are not, and replaced where a run had them."""
    if torch.cuda.is_available():
        pytest.skip("they can run here")
    told = json.loads(run("-c", REFUSED, where, LLAMA2_OPS="triton"))
    assert [line.split(":")[0] for line in told] == ["LLAMA2_OPS", "--kernels"]
    assert all("CUDA device" in line for line in told)


@pytest.mark.parametrize(("interpreted", "device"), [(True, "cuda"), (False, "cpu")])
def test_kernels_are_refused_on_another_device(monkeypatch: pytest.MonkeyPatch, interpreted: bool, device: str) -> None:
    head = loss.reference, loss.token_logprobs, loss.reference_tokens
    kernels = ops.Kernels(ops.plain_rms_norm, ops.plain_rope, ops.plain_swiglu, *head, interpreted)
    monkeypatch.setattr(ops, "_load_kernels", lambda: kernels)
    before = ops.choices()
    with pytest.raises(Misuse, match=f"^--kernels: triton: .*the device is {device}$"):
        ops.force("triton", torch.device(device))
    assert ops.choices() == before
    ops.force("triton", torch.device("cpu" if interpreted else "cuda"))
    assert ops.choices()["triton"] is True


def test_a_mode_that_is_none() -> None:
    code = """
from llama2cli.errors import Misuse
from llama2cli.nn import ops
try:
    ops.setup_process()
except Misuse as e:
    print(e)
"""
    assert run("-c", code, LLAMA2_OPS="fast") == "LLAMA2_OPS: expected one of auto, plain, triton, got 'fast'\n"


def test_kernels_of_a_run_that_are_missed_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "_load_kernels", lambda: None)
    ops.restore({"mode": "auto", "picks": {}, "triton": False})
    for _ in range(3):
        ops.restore({"mode": "auto", "picks": {}, "triton": True})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "torch's own operators compute instead" in err


@pytest.mark.gpu
def test_kernels_on_a_device() -> None:
    """Compiled, on the device: taken by default, and equal to the plain forms."""
    if not (torch.cuda.is_available() and HAS_TRITON):
        pytest.skip("no CUDA device, or no triton")
    ops.restore({"mode": "auto", "picks": {}})
    ops.setup_process()
    assert ops.choices()["triton"] is True
    qkv, weight, norm = leaves = [x.detach().cuda().requires_grad_() for x in inputs()]
    cos, sin = (t.cuda() for t in ops.rope_table(8, 1e4, 20))
    results = []
    modes: tuple[ops.Mode, ...] = ("triton", "plain")
    for mode in modes:
        ops.force(mode)
        out = block(qkv, weight, norm, (cos, sin))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
