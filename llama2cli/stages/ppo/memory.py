"""What the models of a run hold in memory, by role, told before the first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from llama2cli import console
from llama2cli.errors import Misuse
from llama2cli.nn import budget, checkpoint
from llama2cli.nn.roles import Frozen, Held, ppo_memory
from llama2cli.sampling.engine import PREFILL_TOKENS, cache_bytes
from llama2cli.sampling.scoring import BATCH_TOKENS
from llama2cli.stages.ppo.job import Job
from llama2cli.training.dist import World


def of(job: Job) -> Held:
    """What the roles hold. Raises Misuse where the device has not as much, with the arithmetic."""
    settings, config, world = job.settings, job.start.config, job.world
    number = 4 if job.frozen_dtype == "fp32" else 2
    frozen = {"reference": Frozen(config, False, number)}
    for folder in dict.fromkeys(job.scorers.values()):
        role = " and ".join(name for name, other in job.scorers.items() if other == folder)
        frozen[f"reward model ({role})"] = Frozen(checkpoint.load_config(folder, None), True, number)
    longest = max((len(job.prompts.ids[i]) for i in range(len(job.prompts.ids))), default=0)
    size = min(job.start.context, longest + settings.max_new_tokens)
    compute = 4 if job.resolved["dtype"] == "fp32" else 2
    rows = min(settings.rollout_rows, settings.batch_size)
    held = ppo_memory(
        config,
        job.value_config,
        frozen,
        tokens=job.resolved["micro_tokens"],
        cache_bytes=min(cache_bytes(world.device), budget.kv_cache_bytes(config, rows * size, compute_bytes=compute)),
        prompt_tokens=min(PREFILL_TOKENS, rows * longest),
        scored_tokens=min(BATCH_TOKENS[world.device.type], -(-settings.batch_size // world.size) * size),
        gpus=world.size,
        compute_bytes=compute,
        offload=settings.offload and world.device.type != "cpu",
        checkpointing=settings.activation_checkpointing,
    )
    there = available(world)
    if held.peak > there and not settings.dry_run:
        roles = ", ".join(f"{name} {v / 1e9:.3g}" for name, v in held.roles.items())
        phase = max(held.phases, key=held.phases.__getitem__)
        away = "" if world.device.type == "cpu" else "--offload, "
        fix = f"try {away}--value head, --activation-checkpointing, fewer --micro-tokens, more processes"
        need = f"{phase} would hold {held.peak / 1e9:.3g} GB of {there / 1e9:.3g}"
        raise Misuse(f"does not fit a device: {need} (GB: {roles}); {fix}", job.settings.policy)
    return held


def available(world: World) -> float:
    """Bytes that this process may hold: the device's memory, or its share of what the machine has free."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / world.size
    return math.inf


def save_bytes(job: Job) -> int:
    """Disk that one saved step takes: as of other stages, for each model that trains."""
    number = 12 if job.settings.save_dtype == "fp32" else 14
    weights = budget.n_params(job.start.config)
    weights += 0 if job.value_config is None else budget.n_params(job.value_config, scorer=True)
    return round(1.01 * number * weights) + 6 * len(job.start.tokenizer.proto) + (1 << 20)


def show(job: Job, held: Held) -> None:
    """The roles and the worst moment of each phase, for a person."""
    rows = [(name, f"{v / 1e9:.3g}") for name, v in held.roles.items() if v]
    if job.value is None:
        rows.insert(1, ("value head", "on the policy's trunk"))
    rows += [(f"at once: {name}", f"{v / 1e9:.3g}") for name, v in held.phases.items()]
    console.table(f"memory of a device, of {available(job.world) / 1e9:.3g} GB", ["role", "GB"], rows)


def dry_run(job: Job, held: Held) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    rows = [(k, v) for k, v in job.resolved.items() if not isinstance(v, (list, dict))]
    console.table("settings", ["", ""], rows)
    data = [(p.name, f"{len(p.index):,}", f"{p.weight:g}") for p in job.order.parts]
    data += [("held out", f"{len(job.heldout):,}", "")] if job.heldout else []
    console.table("data", ["source", "prompts", "weight"], data)
    show(job, held)
    each, keep = save_bytes(job), job.settings.keep
    saves = -(-job.resolved["steps"] // job.resolved["save_every"])
    disk = {"step": each, "run": ((min(saves, keep + 1) if keep else saves) + 1) * each}
    console.say(f"disk: {disk['run'] / 1e9:.3g} GB")
    told = {"roles": held.roles, "phases": held.phases, "peak": held.peak}
    return {"dry_run": True, "resolved": job.resolved, "memory": told, "disk": disk}
