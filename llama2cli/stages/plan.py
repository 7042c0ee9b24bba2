"""`llama2 plan`: memory, time, GPU-hours and tCO2 of a pretraining run, before they are spent. Arithmetic; no torch.

Choices where the paper is silent:
1. The utilization (MFU) is 0.40: the hours of Table 2 imply 0.36 to 0.44 on the A100's peak.
2. Memory is that of our own training: FSDP2 over all GPUs, fp32 weights and moments, bf16 arithmetic, chunked loss.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2cli import console
from llama2cli.errors import Misuse, did_you_mean
from llama2cli.nn import budget
from llama2cli.settings import Base, flag

if TYPE_CHECKING:
    from llama2cli.nn.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """Memory, time, GPU-hours and tCO2 of a pretraining run, before you spend them.

    Sizes are 1m, 15m, 110m, 1b, 7b, 13b, 34b, 70b or a config.json; none means the paper's four. The table goes to
    stderr, one JSON record per size to stdout. With the paper's 2T tokens the prediction stands beside Table 2.
    Counts may be short: 512, 64K, 4M, 2T (powers of 1000), 4Mi (of 1024).

    Example:
      llama2 plan 7b 70b --gpu a100-80gb --gpus 1024 --tokens 2T --context 4096 --batch-size 4M
    """

    models: list[str] = flag(positional=True, default=[], metavar="SIZE", help="sizes, or paths of a config.json")
    preset: str | None = flag(default=None, metavar="SIZE", help="the same as a positional SIZE")
    out: str = flag("-o", default="-", help="where the records go; '-' is stdout", complete="file")
    gpu: str = flag(default="a100-80gb", metavar="KIND", help=f"{', '.join(budget.GPUS)}, or cpu (measured here)")
    gpus: int | None = flag(default=None, low=1, help="how many; 1024 (cpu: 1) when not given")
    tokens: str = flag(default="2T", metavar="COUNT", help="tokens to train on")  # Llama 2, section 2.1
    context: int | None = flag(default=None, low=1, help="tokens in a sequence; the model's own when not given")
    batch_size: str = flag(default="4Mi", metavar="COUNT", help="tokens in a step")  # Llama 2, section 2.2
    micro_batch: int = flag(default=1, low=1, help="sequences that one GPU holds at once")
    mfu: float = flag(default=budget.DEFAULT_MFU, low=0.001, high=1, help="share of the peak that is reached")
    peak: float | None = flag(default=None, low=0.001, help="TFLOP/s of one GPU, in place of the kind's")
    watts: float | None = flag(default=None, low=0, help="power of one GPU, in place of the kind's")
    memory: float | None = flag(default=None, low=0.001, help="GB of one GPU, in place of the kind's")
    json: bool = flag(default=False, help="only the records, no table")


def run(settings: Settings) -> None:
    """Plan each size: one record per size to `out`, one table for all to stderr."""
    from llama2cli.nn.config import preset
    from llama2cli.text.output import Output

    names = [*settings.models, *([settings.preset] if settings.preset else [])] or list(budget.TABLE_2)
    configs = {name: preset(name) for name in names}
    gpu = machine(settings)
    records = [plan(name, config, gpu, settings) for name, config in configs.items()]
    if not settings.json:
        show(records, settings)
    with Output(settings.out, key=repr(settings), resume=False) as out:
        for record in records:
            out.write(record)


UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_count(text: str, name: str) -> int:
    """A count that a person wrote: 512, 4_000_000, 64K, 1.5B, 2T, 4Mi, 2e12. Raises Misuse naming the flag."""
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([KMBGT]?i?)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise Misuse(f'expected a count such as 512, 64K, 4M or 2T, got "{text}"', name)
    value = float(re.sub("[_,]", "", match[1])) * UNITS[match[2].upper()]
    if value < 1 or value != round(value):
        raise Misuse(f'expected a whole number of at least 1, got "{text}"', name)
    return round(value)


def machine(settings: Settings) -> budget.GPU:
    """The GPU that is planned for: a kind of the table, with the numbers given by flags. Raises Misuse."""
    kind = settings.gpu.lower()
    if kind == "cpu":
        gpu = this_cpu(settings)
    elif kind in budget.GPUS:
        gpu = budget.GPUS[kind]
    else:
        known = [*budget.GPUS, "cpu"]
        hint = did_you_mean(kind, known)
        raise Misuse(
            f'no GPU "{settings.gpu}"{hint} (one of {", ".join(known)}; or --peak, --watts, --memory)', "--gpu"
        )
    return budget.GPU(
        peak=gpu.peak if settings.peak is None else settings.peak * 1e12,
        watts=gpu.watts if settings.watts is None else settings.watts,
        memory=gpu.memory if settings.memory is None else settings.memory * 1e9,
    )


def this_cpu(settings: Settings) -> budget.GPU:
    """This machine as a GPU: its memory, the peak that it reaches in fp32 now, the power that training assumes."""
    import os

    import torch

    from llama2cli.nn.choice import choose
    from llama2cli.training import meter

    choose()  # as training does: the peak is that of the operations it would use
    cpu = torch.device("cpu")
    peak, _ = meter.peak_flops(cpu, torch.float32, settings.peak)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return budget.GPU(peak=peak, watts=meter.power(cpu, settings.watts), memory=memory)


def plan(name: str, config: ModelConfig, gpu: budget.GPU, settings: Settings) -> dict[str, Any]:
    """The record of one size: what it is, what a step holds, what the run costs."""
    cpu = settings.gpu.lower() == "cpu"
    gpus = settings.gpus or (1 if cpu else 1024)
    context = settings.context or config.max_position_embeddings
    tokens, asked = parse_count(settings.tokens, "--tokens"), parse_count(settings.batch_size, "--batch-size")

    # 1. a step: whole micro-batches, as many on each GPU as come nearest to the batch that was asked for
    portion = settings.micro_batch * context * gpus
    accumulate = max(1, round(asked / portion))
    batch = accumulate * portion
    if not 0.8 <= batch / asked <= 1.25:
        console.warn(
            f"{name}: {gpus:,} GPUs with {settings.micro_batch * context:,} tokens each make a batch of"
            f" {batch:,} tokens, not {asked:,}; give fewer GPUs or another --batch-size"
        )

    # 2. memory: plain when that fits, else with activation checkpointing
    held: dict[str, Any] = dict(tokens=settings.micro_batch * context, compute_bytes=4 if cpu else 2)
    choices = {c: budget.memory_per_gpu(config, gpus=gpus, checkpointing=c, **held) for c in (False, True)}
    fewest = {c: budget.smallest_gpus(config, gpu.memory, checkpointing=c, **held) for c in (False, True)}
    checkpointing = choices[False].total > gpu.memory
    memory = choices[checkpointing]

    # 3. time, power and what they amount to
    flops = budget.train_flops_per_token(config, context)
    hours = budget.gpu_hours(tokens, flops, gpu.peak, settings.mfu)
    return {
        "model": name,
        "parameters": budget.n_params(config),
        "parts": budget.parameters(config)._asdict(),
        "tokens": tokens,
        "context": context,
        "batch_size": batch,
        "steps": -(-tokens // batch),
        "gpu": settings.gpu.lower(),
        "gpus": gpus,
        "micro_batch": settings.micro_batch,
        "accumulate": accumulate,
        "flops_per_token": flops,
        "flops": float(flops * tokens),
        "memory": {
            **{part: round(size) for part, size in dataclasses.asdict(memory).items()},
            "total": round(memory.total),
            "available": round(gpu.memory),
            "checkpointing": checkpointing,
        },
        "fits": memory.total <= gpu.memory,
        "fewest_gpus": {"plain": fewest[False], "checkpointing": fewest[True]},
        "peak": gpu.peak,
        "mfu": settings.mfu,
        "gpu_hours": hours,
        "days": hours / gpus / 24,
        "tco2": None if gpu.watts is None else budget.co2_tonnes(hours, gpu.watts),
        "table_2": beside_table_2(name, config, tokens, hours),
    }


def beside_table_2(name: str, config: ModelConfig, tokens: int, hours: float) -> dict[str, Any] | None:
    """The row of Table 2, the predicted hours over its hours, the MFU that its hours imply; None for other runs."""
    row = budget.TABLE_2.get(name)
    if row is None or tokens != budget.PAPER_TOKENS:
        return None
    flops = budget.train_flops_per_token(config, config.max_position_embeddings)
    return {
        "gpu_hours": row.gpu_hours,
        "ratio": hours / row.gpu_hours,
        "mfu": budget.implied_mfu(row.gpu_hours, tokens, flops, budget.GPUS["a100-80gb"].peak),
        "watts": row.watts,
        "tco2": cut(budget.co2_tonnes(row.gpu_hours, row.watts)),
    }


def cut(tonnes: float) -> float:
    """Two decimals, the rest cut off: how Table 2 is printed."""
    return math.floor(tonnes * 100) / 100


def short(number: float) -> str:
    """6.74B, 2T, 512."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def show(records: list[dict[str, Any]], settings: Settings) -> None:
    """The table for a person: a column per size."""

    def row(label: str, cell: Any) -> list[str]:
        return [label, *(cell(r) for r in records)]

    def gb(part: str) -> Any:
        return lambda r: f"{r['memory'][part] / 1e9:.3g}"

    def fits(r: dict[str, Any]) -> str:
        return "no" if not r["fits"] else "with checkpointing" if r["memory"]["checkpointing"] else "yes"

    def fewest(r: dict[str, Any]) -> str:
        counts = [n for n in r["fewest_gpus"].values() if n is not None]
        return f"{min(counts):,}" if counts else "none"

    first = records[0]
    rows = [
        row("parameters", lambda r: short(r["parameters"])),
        row("FLOPs per token", lambda r: f"{r['flops_per_token']:.3g}"),
        row("FLOPs", lambda r: f"{r['flops']:.3g}"),
        row("context", lambda r: f"{r['context']:,}"),
        row("batch, tokens", lambda r: f"{r['batch_size']:,}"),
        row("steps", lambda r: f"{r['steps']:,}"),
        row("weights, gradients, AdamW, GB", lambda r: f"{sharded(r) / 1e9:.3g}"),
        row("gathered layers, GB", gb("gathered")),
        row("activations, GB", gb("activations")),
        row("head and loss, GB", gb("head")),
        row(f"memory per GPU, of {first['memory']['available'] / 1e9:.0f} GB", gb("total")),
        row("fits", fits),
        row("fewest GPUs that fit", fewest),
        row("GPU-hours", lambda r: f"{r['gpu_hours']:,.0f}" if r["gpu_hours"] >= 10 else f"{r['gpu_hours']:.3g}"),
        row("days", lambda r: f"{r['days']:,.1f}" if r["days"] >= 1 else f"{r['days']:.3g}"),
        row(
            "tCO2eq",
            lambda r: "-" if r["tco2"] is None else f"{r['tco2']:,.3g}" if r["tco2"] < 1 else f"{r['tco2']:,.2f}",
        ),
    ]
    if any(r["table_2"] for r in records):

        def paper(cell: Any) -> Any:
            return lambda r: cell(r["table_2"]) if r["table_2"] else "-"

        rows += [
            row("Table 2: GPU-hours", paper(lambda t: f"{t['gpu_hours']:,}")),
            row("  predicted / Table 2", paper(lambda t: f"{t['ratio']:.2f}")),
            row("  MFU it implies", paper(lambda t: f"{t['mfu']:.3f}")),
            row("  tCO2eq of its hours", paper(lambda t: f"{t['tco2']:.2f}")),
        ]
    title = f"{short(first['tokens'])} tokens on {first['gpus']:,} x {first['gpu']} at {settings.mfu:.0%} of its peak"
    console.table(title, ["", *(r["model"] for r in records)], rows)


def sharded(record: dict[str, Any]) -> int:
    """Bytes of a record's weights, gradients and moments."""
    return sum(record["memory"][part] for part in ("parameters", "gradients", "optimizer"))
