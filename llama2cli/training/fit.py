"""One plain loop over optimizer steps: batches in, a run folder out.

A stage that does not fit writes its own `for` over `optim.step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama2cli import console
from llama2cli.errors import DataError, Interrupted
from llama2cli.training import dist, optim
from llama2cli.training.data import Batch, Position
from llama2cli.training.dist import World
from llama2cli.training.meter import Meter, note
from llama2cli.training.optim import Schedule
from llama2cli.training.run import Run
from llama2cli.training.signals import Stop
from llama2cli.training.state import State

Loss = Callable[..., Tensor]
HELD_OUT = "heldout_loss"  # the metric that `best` is chosen by


@dataclass(frozen=True)
class Plan:
    """How a run goes. what: the command, for the log. save_every, eval_every: in optimizer steps, and at the last.

    keep: how many newest saved steps stay, 0 for all. dtype: of the arithmetic (autocast); weights are fp32. tracked:
    names of the sums that the loss returns behind its own; each is divided by the batch's count and logged. eval_first:
    measure what is held out before the first step too, as step 0.
    """

    what: str
    schedule: Schedule
    save_every: int
    eval_every: int
    keep: int = 0
    clip: float = optim.CLIP
    dtype: torch.dtype = torch.float32
    tracked: tuple[str, ...] = ()
    eval_first: bool = False

    @property
    def steps(self) -> int:
        """The last step."""
        return self.schedule.steps


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Mixed precision for the time of a forward pass; nothing in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def moved(micro: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A micro-batch on the device."""
    return {k: v.to(device) for k, v in micro.items()}


def gradients(loss: Loss, batch: Batch, world: World, dtype: torch.dtype, stop: Stop, n: int = 1) -> Tensor | None:
    """Add up the gradients of (sum of losses) / count over micro-batches; return this rank's sums, fp64 [n].

    The first sum is the loss's, which is trained. None where a signal came: the step is given up, which a process
    alone may decide at any micro-batch.
    """
    total = torch.zeros(n, dtype=torch.float64, device=world.device)
    for micro in batch.micro:
        if stop.asked and world.size == 1:
            return None
        with autocast(world.device, dtype):
            part = loss(**moved(micro, world.device)).reshape(n)
        (part[0] / batch.count).backward()
        total += part.detach()
    return total


def fit(
    *,
    loss: Loss,
    params: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Batch, Position]],
    plan: Plan,
    state: State,
    run: Run,
    world: World,
    meter: Meter,
    save: Callable[[Path, Mapping[str, Any]], None],
    saved_bytes: int,
    measure: Callable[[Position], Mapping[str, Any]],
    evaluate: Callable[[], Mapping[str, Any]] | None,
    stop: Stop,
) -> State:
    """Train from `state` to the last step of the plan; return the state at the end.

    loss: the arguments of a micro-batch -> the sum of its losses, and the sums that the plan tracks. save: writes all
    that a step folder holds, about `saved_bytes`, into a folder aside, given the step's metrics; on every rank.
    measure: metrics of a step, from the data's position. evaluate: held-out metrics, HELD_OUT among them. Raises
    DataError for less than one batch, Failure where loss or gradient are not finite, and Interrupted, after saving,
    when a signal has asked to stop.
    """
    saved = state.step
    metrics: dict[str, Any] = {}

    def keep_step(metrics: Mapping[str, Any], *, candidate: bool) -> None:
        nonlocal saved
        held_out = metrics.get(HELD_OUT, math.inf) if candidate else math.inf
        best = held_out < (state.best[1] if state.best else math.inf)
        if best:
            state.best = (state.step, held_out)
        run.save(state.step, lambda aside: save(aside, metrics), needed=saved_bytes, best=best, keep=plan.keep)
        saved = state.step

    stopped = False
    stop.saving = True
    with console.Progress(plan.what, total=plan.steps, unit="steps") as bar:
        bar.start_at(state.step)
        if evaluate is not None and plan.eval_first and state.step == 0 and not stop.asked:
            metrics = {"step": 0, **evaluate()}
            run.log(metrics, {"step": 0})
            bar.say(f"before the first step: held-out loss {metrics[HELD_OUT]:.4f}")
        began = time.perf_counter()
        for batch, position in islice(batches, plan.steps - state.step):
            step, lr = state.step + 1, plan.schedule.lr(state.step + 1)
            mine = gradients(loss, batch, world, plan.dtype, stop, 1 + len(plan.tracked))
            if mine is None:
                stopped = True
                break
            total, *tracked, signals = dist.sums(world, [*mine.tolist(), float(stop.asked)])
            norm = optim.step(optimizer, params, lr=lr, loss=total / batch.count, clip=plan.clip)
            state.step, state.position, stopped = step, position, signals > 0
            seconds = time.perf_counter() - began
            metrics = {"step": step, "loss": total / batch.count, "lr": lr, "grad_norm": norm, **measure(position)}
            metrics |= {name: value / batch.count for name, value in zip(plan.tracked, tracked)}
            if evaluate is not None and due(step, plan.eval_every, plan.steps):
                metrics |= evaluate()
            timing = meter.record(step, batch.tokens or batch.count, seconds, batch.items)
            run.log(metrics, timing)
            if due(step, plan.save_every, plan.steps):
                keep_step(metrics, candidate=True)
            bar.advance(1, note(metrics, timing))
            if HELD_OUT in metrics:
                bar.say(f"step {step:,}: held-out loss {metrics[HELD_OUT]:.4f}")
            if stopped:
                break
            began = time.perf_counter()
    if not state.step and not stopped:
        raise DataError("the data ended before the first step: they do not fill one batch (a smaller --batch-size?)")
    if state.step < plan.steps and not stopped:
        done = f"{state.step:,} of {plan.steps:,} steps"
        console.warn(f"the data ended after {done}; the learning rate had not come to its end")
    if state.step > saved:  # stopped, or the data ended: a step that an uninterrupted run may not save is never `best`
        keep_step(metrics, candidate=False)
    if stopped and state.step < plan.steps:
        done = (
            f"saved step {state.step:,}; the same command with --resume goes on" if state.step else "no step was done"
        )
        raise Interrupted(f"stopped by a signal, {done}")
    return state


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step % every == 0 or step == last
