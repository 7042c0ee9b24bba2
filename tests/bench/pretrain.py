"""A pretraining step, and the head with its loss, beside transformers' LlamaForCausalLM: speed, share of peak, memory.

    python tests/bench/pretrain.py [--what step,head] [--sizes 1m,15m] [--dtypes fp32,bf16] [--rounds 2] [--core 0]

step: forward, backward, clipping and AdamW on random rows (1m: 16 x 256 tokens, vocabulary 2048; 15m: 8 x 256, 32000).
Ours is `nn.model.Llama` in the loop of `llama2 pretrain`; theirs is eager, sdpa, fused AdamW, its own loss, with the
same weights, rows and targets; "loss" is that of the third step. "HF, malloc tuned" is the same with three environment
variables that keep glibc from returning memory. head: linear and cross-entropy of 8 x 1024 tokens at width 288 and
vocabulary 32000, gradients included; memory is the growth of the resident peak in the first call.

Each figure is the median of a process of its own, one thread on one core, in turns (A B C A B C ...); a ratio is
taken within a round, and the lowest round is told. --busy keeps another core busy with copies meanwhile, as it is on
a machine that is shared: both ways differ, HF as shipped the most, since it asks the system for memory at each
operation. Peak is the best product of 1024 x 1024 matrices by any library of torch, measured in the same process.
FLOPs per token: 6 x (non-embedding + head) + 6 x layers x width x 256.
Prints JSON lines, and tables (Markdown) on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = {"1m": (2048, 16), "15m": (32000, 8)}  # vocabulary, rows of 256 tokens
CONTEXT = 256
HEAD = (8 * 1024, 288, 32000)  # tokens, width, vocabulary
SIDES = ("ours", "HF", "HF, malloc tuned")
TUNED = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 256 << 20}
BARS = {  # ours over HF as shipped, over HF with malloc tuned
    ("1m", "fp32"): (1.6, 1.4),
    ("15m", "fp32"): (3.0, 2.0),
    ("1m", "bf16"): (1.6, None),
    ("15m", "bf16"): (2.4, None),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="step,head")
    parser.add_argument("--sizes", default="1m,15m")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8, help="of counted steps in a process")
    parser.add_argument("--core", default="0", help="core to pin to; empty: not pinned")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", choices=["auto", "plain"], default="auto", help="forms of our operations")
    parser.add_argument("--busy", default="", help="core that is kept busy, 1 for instance")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in a process of its own --------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], budget: float, least: int = 3) -> list[float]:
    """Times of calls until the budget is spent."""
    out: list[float] = []
    while len(out) < least or sum(out) < budget:
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out


def peak_gflops(dtype: str) -> float:
    """Best GFLOP/s of a square product by BLAS, oneDNN, and oneDNN with weights in its own layout."""
    import torch
    import torch.nn.functional as F

    from llama2cli.nn import cpu

    n = 1024
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    x, w = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
    matmul: Any = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    best = []
    with torch.no_grad():
        best += seconds_of(lambda: F.linear(x, w), 0.3)
        if cpu.exact():
            cpu.set_onednn(True)
            best += seconds_of(lambda: F.linear(x, w), 0.3)
        matmul.fp32_precision = before
        with contextlib.suppress(AttributeError, RuntimeError):
            packed = torch.ops.mkldnn._reorder_linear_weight(w, n)
            best += seconds_of(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), 0.3)
    return 2 * n**3 / min(best) / 1e9


def step_of_ours(size: str, dtype: str, kernels: Any) -> Callable[[], float]:
    import torch

    from llama2cli.nn import ops
    from llama2cli.nn.config import preset
    from llama2cli.nn.model import Llama
    from llama2cli.training import dist, fit, optim
    from llama2cli.training.data import Batch
    from llama2cli.training.objective import NextToken
    from llama2cli.training.signals import Stop

    ops.force(kernels)
    ops.setup_process()
    ids, targets = rows(size)
    model = Llama(preset(size, vocab_size=SHAPES[size][0], context=2048))
    model.init_weights(0)
    optimizer = optim.adamw(model.named_parameters(), lr=3e-4)
    params, world = list(model.parameters()), dist.World(0, 1, torch.device("cpu"))
    batch = Batch([{"ids_BT": ids, "targets_BT": targets}], ids.numel())
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16

    def step() -> float:
        total = fit.gradients(NextToken(model), batch, world, kind, Stop())
        loss = float(total) / batch.count
        optim.step(optimizer, params, lr=3e-4, loss=loss)
        return loss

    return step


def step_of_hf(size: str, dtype: str) -> Callable[[], float]:
    import torch
    from transformers import LlamaForCausalLM

    from llama2cli.nn.checkpoint import state_to_hf
    from llama2cli.nn.config import preset
    from llama2cli.nn.model import Llama
    from llama2cli.training import optim

    config = preset(size, vocab_size=SHAPES[size][0], context=2048)
    model = LlamaForCausalLM(hf_config(config))
    ours = Llama(config)
    ours.init_weights(0)
    model.load_state_dict({k: v.clone() for k, v in state_to_hf(ours.state_dict(), config).items()}, strict=False)
    del ours
    model.train()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == many], "weight_decay": 0.1 * many}
              for many in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=optim.BETAS, eps=optim.EPS, fused=True)
    ids, targets = rows(size)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def hf_config(config: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, max_position_embeddings=2048, rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie_word_embeddings, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def rows(size: str) -> tuple[Any, Any]:
    import torch

    vocab, count = SHAPES[size]
    ids = torch.randint(3, vocab, (count, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def flops_per_token(size: str) -> float:
    from llama2cli.nn.config import preset

    c = preset(size, vocab_size=SHAPES[size][0])
    d, f = c.hidden_size, c.intermediate_size
    layers = c.num_hidden_layers * (4 * d * d + 3 * d * f + 2 * d) + d
    return 6 * (layers + c.vocab_size * d) + 6 * c.num_hidden_layers * d * CONTEXT


def measure_step(task: dict[str, Any]) -> dict[str, Any]:
    size, dtype = task["size"], task["dtype"]
    ours = task["side"] == "ours"
    step = step_of_ours(size, dtype, task["kernels"]) if ours else step_of_hf(size, dtype)
    losses = [step() for _ in range(3)]
    times = seconds_of(step, task["seconds"])
    seconds = statistics.median(times)
    tokens = SHAPES[size][1] * CONTEXT
    gflops, peak = tokens * flops_per_token(size) / seconds / 1e9, peak_gflops(dtype)
    return {
        "tokens_s": tokens / seconds, "loss": losses[2], "gflops": gflops, "peak_gflops": peak,
        "share_of_peak": gflops / peak, "steps": len(times), "fastest_s": min(times), "slowest_s": max(times),
    }  # fmt: skip


def measure_head(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers.loss.loss_utils import ForCausalLMLoss

    from llama2cli.nn import ops

    ours = task["side"] == "ours"
    if ours:
        ops.force(task["kernels"])
        ops.setup_process()
    N, D, V = HEAD
    torch.manual_seed(0)
    hidden, weight = (torch.randn(N, D) * 0.5).requires_grad_(), (torch.randn(V, D) * 0.05).requires_grad_()
    targets, scale = torch.randint(0, V, (N,)), torch.full((N,), 1 / N)

    def call() -> float:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=task["dtype"] == "bf16"):
            if ours:
                loss = ops.linear_cross_entropy(hidden, weight, targets, scale_N=scale)
            else:
                logits = F.linear(hidden, weight)[None]
                loss = ForCausalLMLoss(logits, targets[None], vocab_size=V, shift_labels=targets[None])
        loss.backward()
        return float(loss.detach())

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mb("VmRSS")
    loss = call()
    peak = status_mb("VmHWM") - before
    seconds = statistics.median(seconds_of(call, task["seconds"] / 2, least=2))
    assert hidden.grad is not None and weight.grad is not None
    gradient = float(hidden.grad.double().norm() + weight.grad.double().norm())
    return {"peak_mb": peak, "seconds": seconds, "loss": loss, "gradient": gradient}


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


# --- in turns -----------------------------------------------------------------------------------------------------


def in_process(args: argparse.Namespace, **task: Any) -> dict[str, Any]:
    """One measurement in a fresh process, printed as a JSON line."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    env |= {k: str(v) for k, v in TUNED.items()} if "tuned" in task["side"] else {}
    task |= {"seconds": args.seconds, "core": args.core, "kernels": args.kernels}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(task)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    row = task | json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def lowest(top: list[dict[str, Any]], bottom: list[dict[str, Any]], ratio: Callable[[Any, Any], float]) -> float:
    return min(ratio(a, b) for a, b in zip(top, bottom))


def listed(rows: list[dict[str, Any]], key: str, form: str) -> str:
    return " / ".join(format(row[key], form) for row in rows)


def compare(args: argparse.Namespace, **task: Any) -> dict[str, list[dict[str, Any]]]:
    """Rounds of all sides in turns: rows by side."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            found[side].append(in_process(args, side=side, **task))
    return found


def step_table(args: argparse.Namespace) -> list[str]:
    head = "| size, dtype | side | tokens/s | share of peak | peak, GFLOP/s | loss of step 3 | ours over it (bar) |"
    out = ["", "Pretraining step", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for size in args.sizes.split(","):
        for dtype in args.dtypes.split(","):
            found = compare(args, what="step", size=size, dtype=dtype)
            for side, bar in zip(SIDES, (None, *BARS[size, dtype])):
                rows = found[side]
                ratio = lowest(found["ours"], rows, lambda a, b: a["tokens_s"] / b["tokens_s"])
                over = "" if side == "ours" else f"**{ratio:.2f}**" + (f" ({bar})" if bar else "")
                figures = [listed(rows, "tokens_s", ".0f"), listed(rows, "share_of_peak", ".0%")]
                figures += [listed(rows, "peak_gflops", ".0f"), f"{rows[0]['loss']:.5f}", over]
                out.append(f"| {size} {dtype} | {side} | {' | '.join(figures)} |")
    return out


def head_table(args: argparse.Namespace) -> list[str]:
    N, D, V = HEAD
    out = ["", f"Head and loss, {N} tokens, width {D}, vocabulary {V}", ""]
    out += ["| dtype | side | peak, MB | s | memory: ours of it (bar) | speed: ours over it (bar) | loss |"]
    out += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for dtype in args.dtypes.split(","):
        found = compare(args, what="head", dtype=dtype)
        for side in SIDES:
            rows = found[side]
            memory = 1 / lowest(rows, found["ours"], lambda a, b: a["peak_mb"] / b["peak_mb"])
            speed = lowest(rows, found["ours"], lambda a, b: a["seconds"] / b["seconds"])
            bars = (" (5%)", " (2)") if side == "HF" else ("", "")
            over = ["", ""] if side == "ours" else [f"**{memory:.1%}**{bars[0]}", f"**{speed:.2f}**{bars[1]}"]
            figures = [listed(rows, "peak_mb", ".0f"), listed(rows, "seconds", ".2f"), *over, f"{rows[0]['loss']:.5f}"]
            out.append(f"| {dtype} | {side} | {' | '.join(figures)} |")
    return out


def machine(args: argparse.Namespace) -> str:
    """Where and with what this was measured."""
    name = "unknown processor"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
        family = next(x for x in lines if x.startswith("cpu family")).split(":")[1].strip()
        name += f" (family {family})"
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
    return (
        f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, of which {args.threads} used; "
        f"Python {sys.version.split()[0]}, {versions}; load {os.getloadavg()[0]:.1f} at the start"
        + (f"; core {args.busy} busy with copies" if args.busy else "")
    )


@contextlib.contextmanager
def busy(core: str) -> Iterator[None]:
    """Meanwhile a process copies 64 MB to and fro on another core."""
    code = f"""
import os, numpy
os.sched_setaffinity(0, {{{core}}})
a, b = numpy.ones(1 << 23), numpy.ones(1 << 23)
while os.getppid() == {os.getpid()}: b[:] = a
"""
    process = subprocess.Popen([sys.executable, "-c", code]) if core else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    args = arguments()
    if args.worker:
        task = json.loads(args.worker)
        if task["core"] and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {int(c) for c in task["core"].split(",")})
        row = measure_step(task) if task["what"] == "step" else measure_head(task)
        print(json.dumps(row))
        return
    tables = [machine(args)]
    with busy(args.busy):
        tables += step_table(args) if "step" in args.what else []
        tables += head_table(args) if "head" in args.what else []
    print("\n".join(tables), file=sys.stderr)


if __name__ == "__main__":
    main()
