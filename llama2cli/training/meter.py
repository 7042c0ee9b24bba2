"""What training costs while it runs: tokens/s, MFU, hours of the devices, tCO2. Nothing here enters a result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from llama2cli.nn import budget, ops

CPU_WATTS = 100.0  # assumed; --watts says it


def device_kind(device: torch.device) -> str | None:
    """The name under which `budget.GPUS` knows a device, None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    memory = torch.cuda.get_device_properties(device).total_memory
    found = [k for k in budget.GPUS if k.split("-")[0] in name]
    return min(found, key=lambda k: abs(budget.GPUS[k].memory - memory), default=None)


def peak_flops(device: torch.device, dtype: torch.dtype, stated: float | None) -> tuple[float, str]:
    """(FLOP/s, where the number is from): stated in TFLOP/s, the data sheet's in bf16, else measured now.

    Measured is the best of a few products of square matrices through the model's own linear operation.
    """
    if stated is not None:
        return stated * 1e12, "stated"
    kind = device_kind(device)
    if kind is not None and dtype == torch.bfloat16:
        return budget.GPUS[kind].peak, f"data sheet of {kind}"
    n, times = (1024, 5) if device.type == "cpu" else (8192, 10)
    x, w = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    with torch.no_grad():
        for _ in range(times):
            began = time.perf_counter()
            ops.linear(x, w)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best, "measured"


def power(device: torch.device, stated: float | None) -> float:
    """Watts of one device: stated, else the data sheet's, else 400 for a GPU (Llama 2, Table 2) and 100 for a CPU."""
    if stated is not None:
        return stated
    kind = device_kind(device)
    known = budget.GPUS[kind].watts if kind else None
    return known or (400.0 if device.type == "cuda" else CPU_WATTS)


class Meter:
    """A clock over the steps of a run, continued when the run is.

    flops: FLOPs to train on one token. peak: FLOP/s of one device. watts: of one device. devices: how many.
    earlier: the last timing record of the process before, {} at the start.
    """

    def __init__(self, *, flops: float, peak: float, watts: float, devices: int, earlier: Mapping[str, Any]) -> None:
        self.flops, self.peak, self.watts, self.devices = flops, peak, watts, devices
        self.before = float(earlier.get("seconds", 0.0))
        self.began = time.perf_counter()

    def record(self, step: int, tokens: int, seconds: float, items: int | None = None) -> dict[str, Any]:
        """A timing record. tokens, items (dialogues, pairs): of this step; seconds: that the step took."""
        rate = tokens / max(seconds, 1e-9)
        total = self.before + time.perf_counter() - self.began
        hours = total / 3600 * self.devices
        items_rate = {} if items is None else {"items_per_second": round(items / max(seconds, 1e-9), 2)}
        return {
            "step": step,
            "seconds": round(total, 4),
            "tokens_per_second": round(rate, 1),
            **items_rate,
            "mfu": round(budget.mfu(rate, self.flops, self.peak, self.devices), 4),
            "gpu_hours": round(hours, 6),
            "tco2": budget.co2_tonnes(hours, self.watts),
        }


def note(metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """The log line of a step, for a person."""
    loss = f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, norm {metrics['grad_norm']:.2f}"
    speed = f"{timing['tokens_per_second']:,.0f} tokens/s, MFU {timing['mfu']:.0%}"
    return f"{loss}, {speed}, {timing['gpu_hours']:.3g} GPU-hours, {timing['tco2']:.2g} tCO2"
