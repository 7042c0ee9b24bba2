"""The faster forms against the plain ones in fp64, and the checks that let them in."""

from __future__ import annotations

import math
import platform
import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llama2cli.nn import cpu, ops


def qkv(B: int, T: int, H: int, G: int, K: int) -> list[Tensor]:
    return [torch.randn(B, T, n, K, dtype=torch.double).requires_grad_() for n in (H, G, G)]


def segments_of(kind: str, B: int, T: int) -> Tensor | None:
    return {
        "none": None,
        "packed": torch.randint(0, 4, (B, T)).sort(1).values,  # texts one after the other
        "mixed": torch.randint(0, 3, (B, T)),  # ids that come back
        "alone": torch.arange(T).expand(B, T),  # each sees itself only
    }[kind]


def branches_of(kind: str, B: int, T: int) -> Tensor | None:
    return {
        "one text": None,
        "trees": torch.randint(0, 4, (B, T)).sort(1).values,  # the trunk, then the answers
        "mixed": torch.randint(-1, 3, (B, T)),  # trunk tokens that come back, a branch below 0
        "no trunk": torch.full((B, T), 7),
    }[kind]


def with_gradients(out: Tensor, leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad((out * direction).sum(), leaves)]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        ("none", "one text"),
        *((k, t) for k in ("packed", "mixed", "alone") for t in ("one text", "trees", "mixed", "no trunk")),
    ],
)
@pytest.mark.parametrize("shape", [(2, 7, 2, 2, 4), (3, 50, 4, 2, 6), (2, 33, 3, 1, 8), (1, 16, 1, 1, 2)])
def test_attention_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int, int], kind: str, tree: str, keep: bool
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 8)  # several blocks, the last one not full
    monkeypatch.setattr(cpu, "BLOCKS", 3)
    monkeypatch.setattr(cpu, "SAVE_BYTES", 1 << 30 if keep else 0)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1 << 13)  # several slices of heads
    monkeypatch.setattr(cpu, "ROW_SCORES", 2 * 4 * 24 * 50)  # and of rows: two of three, or one
    torch.manual_seed(0)
    leaves, segments, branches = qkv(*shape), segments_of(kind, *shape[:2]), branches_of(tree, *shape[:2])
    direction = torch.randn_like(leaves[0])
    got = with_gradients(cpu.attention(*leaves, segments, branches), leaves, direction)
    want = with_gradients(ops.plain_attention(*leaves, segments, branches), leaves, direction)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_attention_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 4)
    leaves, segments = qkv(1, 7, 2, 1, 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *x: cpu.attention(*x, segments), leaves)
    branches = torch.tensor([[0, 1, 2, 0, 0, 1, 2]])
    assert torch.autograd.gradcheck(lambda *x: cpu.attention(*x, segments, branches), leaves)


def test_recomputed_probabilities_are_the_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = [x.detach().float().requires_grad_() for x in qkv(2, 300, 4, 2, 16)]
    direction = torch.randn_like(leaves[0])
    kept = with_gradients(cpu.attention(*leaves, None), leaves, direction)
    monkeypatch.setattr(cpu, "SAVE_BYTES", 0)
    again = with_gradients(cpu.attention(*leaves, None), leaves, direction)
    for a, b in zip(kept, again):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("T", "rows"), [(1, 128), (1024, 128), (1025, 256), (4096, 512)])
def test_long_rows_have_larger_blocks(T: int, rows: int) -> None:
    assert cpu._block_rows(T) == rows


def test_long_rows_in_fp32_are_left_to_torch() -> None:
    torch.manual_seed(0)
    leaves = [x.detach().float().requires_grad_() for x in qkv(1, 1100, 2, 1, 4)]
    assert torch.equal(cpu.attention(*leaves, None), ops.plain_attention(*leaves, None))


def test_keys_before_a_block_s_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 32)
    first = [0] * 20 + [1] * 50 + [2] * 58  # texts begin at 0, 20, 70
    lows = cpu._first_keys(torch.tensor([first, [0] * 128]))
    assert lows.tolist() == [[0, 16, 16, 64], [0, 0, 0, 0]]
    q, segments = torch.zeros(4, 128, 2), torch.zeros(2, 128)
    together = cpu._parts(q, segments, None, lows, whole=True)
    assert [(part.z, part.lows) for part in together] == [(slice(0, 4), [0, 0, 0, 0])]
    monkeypatch.setattr(cpu, "ROW_SCORES", 1)
    apart = cpu._parts(q, segments, segments, lows, whole=True)
    assert [(part.z, part.lows) for part in apart] == [(slice(0, 2), [0, 16, 16, 64]), (slice(2, 4), [0, 0, 0, 0])]


@pytest.mark.parametrize(("T", "bounds"), [(200, (3, 3, 3, 2)), (2000, (2.5, 2.5, 1.6, 1.2))])
def test_bf16_attention_is_nearly_as_exact_as_torch_s(T: int, bounds: tuple[float, ...]) -> None:
    """Error against fp64 on the same rounded inputs, beside that of torch's kernel; long rows do not lose more."""
    torch.manual_seed(0)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in qkv(1, T, 2, 2, 32)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    direction = torch.randn_like(exact[0]).bfloat16()
    want = with_gradients(ops.plain_attention(*exact, None), exact, direction.double())
    ours = with_gradients(cpu.attention(*rounded, None), rounded, direction)
    torchs = with_gradients(ops.plain_attention(*rounded, None), rounded, direction)
    for a, b, truth, times in zip(ours, torchs, want, bounds):  # o, dq, dk, dv
        assert a.dtype == torch.bfloat16
        assert (a - truth).norm() < times * (b - truth).norm()


def test_bf16_attention_over_trees() -> None:
    torch.manual_seed(0)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in qkv(2, 300, 4, 2, 32)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    segments = torch.tensor([[0] * 120 + [1] * 180, [0] * 290 + [1] * 10])
    branches = torch.tensor([[0] * 40 + [1] * 50 + [2] * 30 + [0] * 20 + [1] * 60 + [2] * 100, [0] * 50 + [1] * 250])
    direction = torch.randn_like(exact[0]).bfloat16()
    want = with_gradients(ops.plain_attention(*exact, segments, branches), exact, direction.double())
    for form in (cpu.attention, ops.plain_attention):
        got = with_gradients(form(*rounded, segments, branches), rounded, direction)
        for a, truth in zip(got, want):
            assert a.dtype == torch.bfloat16 and (a - truth).norm() < 1e-2 * truth.norm()


def test_without_gradients_no_probabilities_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    parts = cpu._parts
    monkeypatch.setattr(cpu, "_parts", lambda *a, whole: [kept.append(whole), parts(*a, whole=whole)][1])
    leaves = qkv(1, 8, 2, 1, 4)
    with torch.no_grad():
        cpu.attention(*leaves, None)
    cpu.attention(*leaves, None)
    assert kept == [False, True]


def test_rms_norm_passes_gradcheck() -> None:
    x, weight = torch.randn(2, 3, 5, dtype=torch.double), torch.rand(5, dtype=torch.double)
    assert torch.allclose(cpu.rms_norm(x, weight, 1e-3), ops.plain_rms_norm(x, weight, 1e-3), rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, w: cpu.rms_norm(x, w, 1e-3), [x.requires_grad_(), weight.requires_grad_()]
    )


def test_rope_passes_gradcheck_and_keeps_layout() -> None:
    q, k = (torch.randn(2, 3, n, 4, dtype=torch.double).requires_grad_() for n in (2, 1))
    table = [x.double() for x in ops.rope_table(4, 100.0, 9)]
    positions = torch.tensor([[0, 1, 2], [8, 0, 5]])
    for chosen in (None, positions):
        for a, b in zip(cpu.rope(q, k, *table, chosen), ops.plain_rope(q, k, *table, chosen)):
            assert torch.allclose(a, b, rtol=1e-12)
            assert a.transpose(1, 2).is_contiguous()  # attention need not copy
    assert torch.autograd.gradcheck(lambda q, k: cpu.rope(q, k, *table, positions), [q, k])


def test_rope_rounds_once() -> None:
    """bf16 in and out, fp32 between: the best that bf16 can hold, position 4095 too."""
    q = torch.randn(1, 2, 1, 64).bfloat16()
    table, positions = ops.rope_table(64, 1e4, 4096), torch.tensor([[4095, 4094]])
    got, _ = cpu.rope(q, q, *table, positions)
    want, _ = ops.plain_rope(q.float(), q.float(), *table, positions)
    assert torch.equal(got, want.bfloat16())


# --- checks -------------------------------------------------------------------------------------------------------


def spend(milliseconds: float, result: Tensor) -> list[Tensor]:
    import time

    end = time.process_time() + milliseconds / 1e3
    while time.process_time() < end:
        pass
    return [result]


@pytest.mark.parametrize(
    ("fast", "plain", "taken"), [(0.2, 2.0, True), (2.0, 0.2, False), (1.0, 1.0, False), (0.9, 1.0, False)]
)
def test_faster_is_taken_and_a_tie_is_not(fast: float, plain: float, taken: bool) -> None:
    one = torch.ones(3)
    assert cpu.compare(lambda: spend(fast, one), lambda: spend(plain, one), tolerance=1e-6, share=0.75) is taken


@pytest.mark.parametrize("wrong", [1.001, math.nan, math.inf])
def test_what_is_not_equal_is_not_taken(wrong: float) -> None:
    got = torch.tensor([1.0, 1.0, wrong])
    assert not cpu.compare(lambda: [got], lambda: spend(2, torch.ones(3)), tolerance=1e-5, share=0.75)


def test_an_operator_that_is_missing_is_not_taken() -> None:
    def missing() -> list[Tensor]:
        raise RuntimeError("no such operator")

    assert not cpu.compare(missing, lambda: spend(1, torch.ones(1)), tolerance=1.0, share=2.0)


def test_rounding_to_bf16_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not cpu.exact.__wrapped__()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_is_kept() -> None:
    """Page faults of ten large tensors made and dropped, counted by the kernel of the system."""
    code = """
import resource, sys, torch
from llama2cli.nn import cpu
if sys.argv[1] == "keep":
    cpu.keep_memory()
def make(times):
    for _ in range(times): torch.empty(9 << 20).fill_(1)  # 36 MB: more than glibc would keep by itself
make(20)  # older glibc fragments at first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "return")
    }
    pages = 10 * (36 << 20) // resource.getpagesize()
    assert faults["keep"] < pages / 100 and faults["keep"] < faults["return"] / 10
