"""What every training stage does around its loop: settle what the settings come to, open or continue a run folder, make
the model, train, save, tell the end. What differs from stage to stage is in its `Work`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.nn import budget, checkpoint, ops
from llama2cli.nn.choice import choose
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.settings import Training
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import card, dist, meter, optim, state
from llama2cli.training.build import build
from llama2cli.training.data import Batch, Position
from llama2cli.training.dist import World
from llama2cli.training.fit import Plan, fit
from llama2cli.training.order import mix
from llama2cli.training.run import METRICS, SETTINGS, TIMING, Run, check_same
from llama2cli.training.signals import Stop
from llama2cli.training.state import Machine, State

# What may differ when a run is resumed: it changes what is measured and kept, not the weights. --steps may grow (and
# with it the default warm-up); the number of processes has a check of its own.
FREE = frozenset({"eval_every", "save_every", "keep", "steps", "processes"})


@dataclass(frozen=True)
class Work:
    """A training run before any weight exists: all that differs between stages.

    stage: the command. resolved: what the settings came to, JSON (`resolve`, and the stage's own). init: the checkpoint
    to start from. inputs: files that are read. notes: what a person should know. mean_length: tokens that a token
    attends over, for the count of FLOPs. objective: makes the loss of a model. batches: the data from a position on.
    measure: metrics of a step, from the data's position. evaluate: held-out metrics of the loss, in a type of
    arithmetic. describe: a sentence for the model card, from the metrics. told: metrics that the command prints.
    tracked: names of the sums that the loss returns behind its own. scorer: the model has a scalar head. saved: what
    else `save_model` takes, from the metrics. eval_first: measure what is held out before the first step. continues:
    False where the data cannot be read again.
    """

    stage: str
    settings: Training
    world: World
    resolved: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer
    init: Path | None
    inputs: list[str]
    notes: list[str]
    mean_length: int
    objective: Callable[[Llama], nn.Module]
    batches: Callable[[Position | None], Iterator[tuple[Batch, Position]]]
    measure: Callable[[Position], Mapping[str, Any]]
    evaluate: Callable[[nn.Module, torch.dtype], Mapping[str, Any]] | None
    describe: Callable[[Mapping[str, Any]], str]
    told: Sequence[str]
    tracked: tuple[str, ...] = ()
    scorer: bool = False
    saved: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda metrics: {}
    eval_first: bool = True
    continues: bool = True

    @property
    def save_bytes(self) -> int:
        """Disk that one saved step takes: weights, two moments, the weights again where the saved ones are rounded."""
        size = 4 if self.settings.save_dtype == "fp32" else 2
        each = size + 8 + (0 if size == 4 else 4)
        return round(1.01 * each * budget.n_params(self.config)) + 3 * len(self.tokenizer.proto) + (1 << 20)


# --- before -------------------------------------------------------------------------------------------------------


def check(settings: Training, *, heldout: bool, epochs: float | None) -> None:
    """Raise Misuse for settings that contradict each other. heldout: whether there is anything to measure."""
    if settings.dtype == "fp16":
        raise Misuse("fp16 is for inference only: its gradients underflow; take bf16 or fp32", "--dtype")
    if settings.steps is not None and epochs is not None:
        raise Misuse("give one of --steps and --epochs")
    if epochs == 0:
        raise Misuse("expected more than 0", "--epochs")
    if settings.eval_every is not None and not heldout:
        raise Misuse("there is nothing to measure; give --heldout", "--eval-every")


def resolve(
    settings: Training, world: World, *, context: int, steps: int, lr: float, warmup: int, eval_every: int | None = None
) -> dict[str, Any]:
    """What the settings of every stage come to. eval_every: where it is not given, else --save-every."""
    save_every = settings.save_every or max(1, min(1000, steps // 10))
    on_cuda = world.device.type == "cuda"
    return {
        "seed": settings.seed,
        "context": context,
        "processes": world.size,
        "steps": steps,
        "lr": lr,
        "warmup": warmup,
        "final_lr": settings.final_lr,
        "weight_decay": settings.weight_decay,
        "decay": settings.decay,
        "clip": settings.clip,
        "eval_every": settings.eval_every or eval_every or save_every,
        "save_every": save_every,
        "keep": settings.keep,
        "save_dtype": settings.save_dtype,
        "device": world.device.type,
        "dtype": ("bf16" if on_cuda else "fp32") if settings.dtype == "auto" else settings.dtype,
        "activation_checkpointing": settings.activation_checkpointing,
        "compile": settings.compile,
        "kernels": settings.kernels,
    }


def tokens_at_once(settings: Training, world: World) -> int:
    """Tokens of a micro-batch."""
    return settings.micro_tokens or (16384 if world.device.type == "cuda" else 4096)


def open_tokenizer(path: str | None, init: Path | None) -> Tokenizer:
    """The tokenizer that the data are made with and the model is saved with: the stated one, else the checkpoint's.

    Raises DataError where the two differ.
    """
    tokenizer = Tokenizer.load(path or init or "")
    if path is not None and init is not None and (init / "tokenizer.model").is_file():
        if Tokenizer.load(init).sha256 != tokenizer.sha256:
            raise DataError(f"is another tokenizer than that of --init {init}", path)
    return tokenizer


def plan_resources(work: Work, *, tokens_at_once: int, tokens: int) -> dict[str, Any]:
    """What the run would need, shown to a person too. tokens_at_once: in a micro-batch; tokens: in the whole run."""
    memory = budget.memory_per_gpu(
        work.config,
        tokens=tokens_at_once,
        gpus=work.world.size,
        checkpointing=work.settings.activation_checkpointing,
        compute_bytes=4 if work.resolved["dtype"] == "fp32" else 2,
    )
    saves = -(-work.resolved["steps"] // work.resolved["save_every"])
    kept = min(saves, work.settings.keep + 1) if work.settings.keep else saves
    plan: dict[str, Any] = {
        "parameters": budget.n_params(work.config),
        "tokens": tokens,
        "flops": tokens * budget.train_flops_per_token(work.config, work.mean_length),
        "memory": {k: round(v) for k, v in dataclasses.asdict(memory).items()} | {"total": round(memory.total)},
        "disk": {"step": work.save_bytes, "run": (kept + 1) * work.save_bytes},
    }
    rows = [(k, v) for k, v in work.resolved.items() if not isinstance(v, (list, dict))]
    rows += [("parameters", f"{plan['parameters']:,}"), ("tokens", f"{tokens:,}")]
    rows += [("memory per device", f"{memory.total / 1e9:.3g} GB"), ("disk", f"{plan['disk']['run'] / 1e9:.3g} GB")]
    console.table("settings", ["", ""], rows)
    for note in work.notes:
        console.warn(note)
    return {"dry_run": True, "resolved": work.resolved, **plan}


# --- training -----------------------------------------------------------------------------------------------------


def train(work: Work, stop: Stop, *, show: Callable[[Run], None]) -> dict[str, Any]:
    """Open the run folder, go on where it stands, train to the end; the record that the command prints.

    show: the last tables. Raises what `Run`, `resume` and `fit` raise.
    """
    folder = Run(work.settings.out, resume=work.settings.resume, world=work.world)
    try:
        at, machine = resume(folder, work.resolved)
        if not work.continues and 0 < at.step < work.resolved["steps"]:
            fix = "tokenize to a folder (-o DIR) and start anew"
            raise Misuse(f"data from stdin cannot be continued in the middle; {fix}", "--resume")
        if at.step < work.resolved["steps"]:
            go(work, folder, at, machine, stop)
            show(folder)
        return record(folder, work.told)
    finally:
        folder.close()


def go(work: Work, folder: Run, at: State, machine: Machine | None, stop: Stop) -> None:
    """Make the model, put back what was saved, train, save. machine: of the saved step, None for a fresh run."""
    settings, world, resolved, evaluate = work.settings, work.world, work.resolved, work.evaluate
    dtype = checkpoint.DTYPES[resolved["dtype"]]
    set_up(world, settings.seed, settings.kernels, machine, folder.folder)

    # model and optimizer
    model, loss = build(
        work.config,
        world,
        objective=work.objective,
        scorer=work.scorer,
        weights=folder.step_folder if at.step else work.init,
        seed=settings.seed,
        dtype=dtype,
        checkpointing=settings.activation_checkpointing,
        compile=settings.compile,
    )
    named = dict(model.named_parameters())
    schedule = optim.Schedule(resolved["lr"], resolved["warmup"], resolved["steps"], settings.final_lr)
    optimizer = optim.adamw(named.items(), lr=schedule.peak, weight_decay=settings.weight_decay, decay=settings.decay)
    if at.step:
        state.restore(folder.step_folder, named, optimizer, world)

    # what is written
    origin = provenance.collect(settings, work.inputs)
    write_settings(folder, settings, resolved, origin)
    stages = card.lineage_of(work.init) if work.init else []
    stages.append(card.entry(work.stage, dataclasses.asdict(settings), resolved, origin))

    task = "text-classification" if work.scorer else "text-generation"

    def save(aside: Path, metrics: Mapping[str, Any]) -> None:
        checkpoint.save_model(
            aside,
            model,
            work.tokenizer,
            save_dtype=settings.save_dtype,
            extra_files=card.files(stages, metrics, work.describe(metrics), task),
            writes=world.first,
            **work.saved(metrics),
        )
        state.save(aside, at, named, optimizer, world, weights=settings.save_dtype != "fp32")

    # the loop
    peak, origin_of_peak = meter.peak_flops(world.device, dtype, settings.peak)
    for note in work.notes:
        console.warn(note)
    console.say(f"{budget.n_params(work.config):,} parameters, peak {peak / 1e12:.3g} TFLOP/s ({origin_of_peak})")
    fit(
        loss=loss,
        params=list(named.values()),
        optimizer=optimizer,
        batches=work.batches(at.position),
        plan=Plan(
            what=work.stage,
            schedule=schedule,
            save_every=resolved["save_every"],
            eval_every=resolved["eval_every"],
            keep=settings.keep,
            clip=settings.clip,
            dtype=dtype,
            tracked=work.tracked,
            eval_first=work.eval_first,
        ),
        state=at,
        run=folder,
        world=world,
        meter=meter.Meter(
            flops=budget.train_flops_per_token(work.config, work.mean_length),
            peak=peak,
            watts=meter.power(world.device, settings.watts),
            devices=world.size,
            earlier=folder.last(TIMING),
        ),
        save=save,
        saved_bytes=work.save_bytes,
        measure=work.measure,
        evaluate=None if evaluate is None else lambda: evaluate(loss, dtype),
        stop=stop,
    )


# --- the run folder -----------------------------------------------------------------------------------------------


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


def set_up(world: World, seed: int, kernels: ops.Mode, machine: Machine | None, place: Path) -> None:
    """Seed, threads and kernels of this process, as those of the saved step; before the first operation on tensors."""
    torch.manual_seed(mix(seed, world.rank))
    if kernels != "auto":
        ops.force(kernels, world.device)
    if machine is not None:
        state.take_over(machine, world, place)
        ops.setup_process()
    else:
        choose()
    ops.restore(dist.from_first(world, ops.choices()))


def write_settings(run: Run, settings: Any, resolved: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Write settings.json, once `set_up` has chosen the kernels. settings: the stage's dataclass."""
    used = {"threads": torch.get_num_threads(), "kernels": ops.choices()}
    told = {"settings": relative(dataclasses.asdict(settings)), "resolved": dict(resolved)}
    run.write_settings(told | {"provenance": {**origin, **used}})


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
