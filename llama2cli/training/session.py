"""What every training stage does around its loop: open or continue a run folder, set the process up, tell the end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama2cli import console
from llama2cli.errors import Misuse
from llama2cli.nn import ops
from llama2cli.nn.choice import choose
from llama2cli.training import dist, state
from llama2cli.training.dist import World
from llama2cli.training.order import mix
from llama2cli.training.run import METRICS, SETTINGS, Run, check_same
from llama2cli.training.state import Machine, State

# What may differ when a run is resumed: it changes what is measured and kept, not the weights. --steps may grow (and
# with it the default warm-up); the number of processes has a check of its own.
FREE = frozenset({"eval_every", "save_every", "keep", "steps", "processes"})


def resume(run: Run, resolved: Mapping[str, Any], *, free: Iterable[str] = FREE) -> tuple[State, Machine | None]:
    """Where a run stands: its saved state, and what that was computed with; a fresh state where nothing is saved.

    resolved: what the settings came to, "steps" among them. Raises Misuse where they are not the run's own.
    """
    if not run.latest:
        return State(), None
    before, steps = (run.found or {})["resolved"], resolved["steps"]
    longer = before.get("steps") != steps
    check_same(before, resolved, run.folder / SETTINGS, {*free, *(["warmup"] if longer else [])})
    if steps < run.latest:
        raise Misuse(f"the run has done {run.latest:,} steps already, {steps:,} are fewer", run.folder, "--steps")
    at, machine = state.read(run.step_folder)
    run.set_best(at.best[0] if at.best else None)
    if run.latest < steps:
        console.say(f"{run.folder}: goes on after step {run.latest:,} of {steps:,}")
        if longer:
            told = f"from here on the learning rate is that of a run of {steps:,}"
            console.warn(f"--steps was {before.get('steps')}: {told}")
    return at, machine


def set_up(world: World, seed: int, kernels: str, machine: Machine | None, place: Path) -> None:
    """Seed, threads and kernels of this process, as those of the saved step; before the first operation on tensors."""
    torch.manual_seed(mix(seed, world.rank))
    if kernels == "plain":
        ops.force("plain")
    if machine is not None:
        state.take_over(machine, world, place)
        ops.setup_process()
    else:
        choose()
    ops.restore(dist.from_first(world, ops.choices()))


def write_settings(run: Run, settings: Any, resolved: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write settings.json, once `set_up` has chosen the kernels. settings: the stage's dataclass."""
    used = {"threads": torch.get_num_threads(), "kernels": ops.choices()}
    told = {"settings": relative(dataclasses.asdict(settings)), "resolved": dict(resolved)}
    run.write_settings(told | {"provenance": {**provenance, **used}})


def relative(value: Any) -> Any:
    """Settings with absolute paths made relative to here: no machine's paths, and `--config` can still follow them."""
    if isinstance(value, dict):
        return {k: relative(v) for k, v in value.items()}
    if isinstance(value, list):
        return [relative(v) for v in value]
    if isinstance(value, str):
        name, sep, path = value.partition("=") if "=/" in value else ("", "", value)
        return name + sep + os.path.relpath(path) if path.startswith("/") else value
    return value


def record(run: Run, keys: Iterable[str]) -> dict[str, Any]:
    """The record that the command prints: the checkpoint and some metrics of its step."""
    last = run.last(METRICS)
    return {"checkpoint": str(run.step_folder), **{k: last[k] for k in keys if k in last}}


def show_end(run: Run) -> None:
    """The last tables: how often each source was read, what each held-out source came to."""
    last = run.last(METRICS)
    if "epochs" in last:
        console.table("", ["source", "epochs"], [(k, f"{v:.3f}") for k, v in last["epochs"].items()])
    if "heldout" in last:
        rows = [(k, f"{v['loss']:.4f}", f"{v['bits_per_byte']:.4f}") for k, v in last["heldout"].items()]
        console.table("", ["held out", "loss", "bits per byte"], rows)
