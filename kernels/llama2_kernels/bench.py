"""How fast the operators are on this GPU, beside others: `python -m llama2_kernels.bench`.

Rows: `eager`, the plain reference; `torch`, torch's own fused function where there is one; `compile`, the reference
under torch.compile; `liger`, Liger-Kernel where it is installed; `ours`. Each row's result is compared with the eager
one before it is timed.

Times are medians of CUDA events around one call, with the device kept busy before, so that the processor's time to
launch is not in them unless it is longer than the work. Inputs rotate through more memory than the L2 cache holds.
The share is of the bandwidth that a copy reaches in this process: the bytes that any kernel must move, over the time.
For the linear cross-entropy the products dominate, and the share is left out; its peak of memory is told instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2_kernels import liger, registry, rms_norm, rope, swiglu
from llama2_kernels import linear_cross_entropy as head

ROWS = ("eager", "torch", "compile", "liger", "ours")
EPS = 1e-5
SHAPES = {  # D, F, query heads, key heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "70b": (8192, 28672, 64, 8),
}
HEAD, VOCABULARY, CONTEXT = 128, 32000, 4096
CLOSE = 0.03  # largest distance from the eager result, relative to its norm: bf16 rounds both

Form = Callable[..., Any]
Clock = Callable[[Callable[[], object], Callable[[Any], object]], list[float]]  # prepare, work on it -> microseconds


@dataclass(frozen=True, eq=False)
class Work:
    """One operator at one shape."""

    op: str
    model: str
    make: Callable[[], tuple[Tensor, ...]]  # inputs, new ones at each call
    forms: dict[str, Form]
    forward_bytes: float | None  # that any kernel must move; None where it is not bound by them
    backward_bytes: float | None
    memory: bool = False
    wanted: tuple[int, ...] = field(default=(0,))  # inputs that get a gradient


def works(model: str, tokens: int, device: str, shape: tuple[int, int, int, int], vocabulary: int) -> Iterator[Work]:
    """The operators of a model; bf16."""
    D, ffn, heads, kv_heads = shape
    T = min(tokens, CONTEXT)

    def random(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, dtype=torch.bfloat16, device=device) * std).requires_grad_()

    def norms() -> tuple[Tensor, ...]:
        return random(tokens, D), random(D)

    forms: dict[str, Form] = {
        "eager": lambda x, w: rms_norm.reference_rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, (D,), w, EPS),
        "liger": lambda x, w: liger.rms_norm(x, w, EPS),
        "ours": lambda x, w: rms_norm.rms_norm(x, w, EPS),
    }
    yield Work("rms_norm", model, norms, forms, 4 * D * tokens, 6 * D * tokens, wanted=(0, 1))

    def with_torch(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return F.rms_norm(h, (D,), w, EPS), h

    forms = {
        "eager": lambda x, r, w: rms_norm.reference_add_rms_norm(x, r, w, EPS),
        "torch": with_torch,
        "liger": lambda x, r, w: liger.add_rms_norm(x, r, w, EPS),
        "ours": lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
    }
    three = lambda: (random(tokens, D), random(tokens, D), random(D))  # noqa: E731
    yield Work("add_rms_norm", model, three, forms, 8 * D * tokens, 8 * D * tokens, wanted=(0, 1, 2))

    def product(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    forms = {"eager": swiglu.reference_swiglu, "torch": product, "liger": liger.swiglu, "ours": swiglu.swiglu}
    yield Work("swiglu", model, lambda: (random(tokens, 2 * ffn),), forms, 6 * ffn * tokens, 10 * ffn * tokens)

    angle = torch.outer(torch.arange(T, device=device).float(), 1e4 ** (-torch.arange(0, 1, 2 / HEAD, device=device)))
    cos, sin = angle.cos(), angle.sin()
    wide = [torch.cat((x, x), -1)[None].bfloat16() for x in (cos, sin)]  # as Hugging Face keeps it
    forms = {
        "eager": lambda q, k: rope.reference_rope(q, k, cos, sin),
        "liger": lambda q, k: liger.rope(q, k, *wide),
        "ours": lambda q, k: rope.rope(q, k, cos, sin),
    }
    moved = 4 * (heads + kv_heads) * HEAD * tokens
    queries = lambda: (random(tokens // T, T, heads, HEAD), random(tokens // T, T, kv_heads, HEAD))  # noqa: E731
    yield Work("rope", model, queries, forms, moved, moved, wanted=(0, 1))

    targets = torch.arange(tokens, device=device) * 7919 % vocabulary
    forms = {
        "eager": lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum"),
        "torch": lambda h, w: F.cross_entropy(F.linear(h, w), targets, reduction="sum"),
        "liger": lambda h, w: liger.linear_cross_entropy(h, w, targets),
        "ours": lambda h, w: head.linear_cross_entropy(h, w, targets),
    }
    matrices = lambda: (random(tokens, D), random(vocabulary, D, std=0.02))  # noqa: E731
    yield Work("linear_cross_entropy", model, matrices, forms, None, None, memory=True, wanted=(0, 1))


# --- measuring ----------------------------------------------------------------------------------------------------


def cuda_clock(calls: int) -> Clock:
    """Microseconds of each of so many calls on the current CUDA device, after some that are not counted."""

    def clock(prepare: Callable[[], object], work: Callable[[Any], object]) -> list[float]:
        for _ in range(5):
            work(prepare())
        pairs = []
        for _ in range(calls):
            given = prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(500_000)  # a quarter of a millisecond, in which the processor gets ahead
            begin.record()
            work(given)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    return clock


def copy_bandwidth(clock: Clock, device: str, size: int = 1 << 30) -> float:
    """Bytes a second that a copy of so many bytes reads and writes."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / statistics.median(clock(lambda: None, lambda _: b.copy_(a))) * 1e6


def measure(
    work: Work, clock: Clock, bandwidth: float, cache: int, rows: Iterable[str] = ROWS
) -> Iterator[dict[str, Any]]:
    """A record for each row and pass; one with `left_out` for a row that cannot be had or does not agree."""
    sets = [work.make()]
    held = sum(x.nbytes for x in sets[0])
    sets += [work.make() for _ in range(max(1, math.ceil(4 * cache / held) - 1))]
    forms = dict(work.forms)
    forms["compile"] = torch.compile(forms["eager"], dynamic=False)
    want = passes(forms["eager"], work, sets[0])
    for row in rows:
        about = {"op": work.op, "model": work.model, "row": row}
        if row not in forms:
            continue
        if row == "liger" and liger.version() is None:
            yield about | {"left_out": "liger-kernel is not installed"}
            continue
        try:
            distance = max(apart(got, exact) for got, exact in zip(passes(forms[row], work, sets[0]), want))
        except Exception as e:  # others' code, on a device of the day: one row less, and it is said
            yield about | {"left_out": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
            continue
        if not distance < CLOSE:
            yield about | {"left_out": f"is {distance:.3g} from the eager result"}
            continue
        for name, times, moved in (
            ("forward", forward_times(forms[row], sets, clock), work.forward_bytes),
            ("backward", backward_times(forms[row], work, sets, clock), work.backward_bytes),
        ):
            us = statistics.median(times)
            low, high = (statistics.quantiles(times, n=10)[i] for i in (0, 8)) if len(times) > 1 else (us, us)
            made: dict[str, Any] = {"pass": name, "us": round(us, 1), "us_p10": round(low, 1), "us_p90": round(high, 1)}
            if moved is not None:
                rate = moved / us * 1e6
                made |= {"bytes": moved, "gb_per_s": round(rate / 1e9, 1), "share_of_copy": round(rate / bandwidth, 3)}
            if work.memory:
                made["peak_bytes"] = peak(forms[row], work, sets[0])
            yield about | made | {"distance": float(f"{distance:.3g}")}


def outputs(out: Any) -> list[Tensor]:
    """The results of a form as a list."""
    return list(out) if isinstance(out, (tuple, list)) else [out]


def gradients(work: Work, inputs: tuple[Tensor, ...], out: Any) -> tuple[Tensor, ...]:
    """The gradients of the inputs that want one, for gradients of the results that are all ones."""
    found = outputs(out)
    return torch.autograd.grad(found, [inputs[i] for i in work.wanted], [torch.ones_like(x) for x in found])


def passes(form: Form, work: Work, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients, of copies of the inputs: some write over them."""
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    out = form(*inputs)
    kept = [x.detach().clone() for x in outputs(out)]
    return [*kept, *gradients(work, inputs, out)]


def apart(got: Tensor, exact: Tensor) -> float:
    """The distance relative to the norm."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def forward_times(form: Form, sets: list[tuple[Tensor, ...]], clock: Clock) -> list[float]:
    """With the graph that a backward pass would need."""
    turn = itertools.cycle(sets)
    return clock(lambda: next(turn), lambda inputs: form(*inputs))


def backward_times(form: Form, work: Work, sets: list[tuple[Tensor, ...]], clock: Clock) -> list[float]:
    """The gradients of the results are there before."""
    turn = itertools.cycle(sets)

    def prepare() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = next(turn)
        found = outputs(form(*inputs))
        return found, [inputs[i] for i in work.wanted], [torch.ones_like(x) for x in found]

    return clock(prepare, lambda given: torch.autograd.grad(*given))


def peak(form: Form, work: Work, inputs: tuple[Tensor, ...]) -> int | None:
    """Bytes that forward and backward together need at most, beside inputs."""
    if not inputs[0].is_cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(work, inputs, form(*inputs))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- report -------------------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: a line for each operator, shape and pass, a column for each row."""
    timed = [r for r in records if "us" in r]
    rows = [row for row in ROWS if any(r["row"] == row for r in timed)]
    yield f"| operator | model | pass | {' | '.join(rows)} |"
    yield f"| --- | --- | --- |{' ---: |' * len(rows)}"
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for r in timed:
        cell = f"{r['us']:,.0f} us"
        if "share_of_copy" in r:
            cell += f", {r['share_of_copy']:.0%}"
        if r.get("peak_bytes") is not None:
            cell += f", {r['peak_bytes'] / 1e6:,.0f} MB"
        lines.setdefault((r["op"], r["model"], r["pass"]), {})[r["row"]] = cell
    for key, cells in lines.items():
        yield f"| {' | '.join(key)} | {' | '.join(cells.get(row, '') for row in rows)} |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llama2_kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a JSON object a line there too")
    parser.add_argument("--model", choices=list(SHAPES), action="append", help="default: all")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--tokens", type=int, default=8192, help="of a call (default: 8192)")
    parser.add_argument("--calls", type=int, default=50, help="that are timed (default: 50)")
    asked = parser.parse_args()
    if not torch.cuda.is_available() or not registry.HAS_TRITON or registry.INTERPRET:
        print("nothing can be measured: it takes a CUDA device, triton, and no TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    clock = cuda_clock(asked.calls)
    device = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth(clock, "cuda")
    records: list[dict[str, Any]] = [
        {
            "device": device.name,
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "l2_bytes": device.L2_cache_size,
            "tokens": asked.tokens,
            "torch": torch.__version__,
            "triton": registry.triton.__version__,
            "liger": liger.version(),
        }
    ]
    print(
        f"{device.name}, a copy: {bandwidth / 1e9:,.0f} GB/s, torch {torch.__version__}, {asked.tokens} tokens, bf16\n"
    )
    for model in asked.model or SHAPES:
        for work in works(model, asked.tokens, "cuda", SHAPES[model], VOCABULARY):
            if asked.only in work.op:
                for record in measure(work, clock, bandwidth, device.L2_cache_size):
                    records.append(record)
                    if "left_out" in record:
                        print(f"{work.op}, {model}, {record['row']}: {record['left_out']}", file=sys.stderr)
                torch.cuda.empty_cache()
    print("\n".join(table(records)))
    if asked.json:
        asked.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
