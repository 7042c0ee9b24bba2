"""`llama2 pretrain`: a Llama from token folders, by the recipe of section 2.2.

Choices that the paper leaves open, beside those at the top of `training/data.py` and `training/optim.py`:
1. Without --steps or --epochs a run is one epoch of all its sources together.
2. "4M tokens" are 4 * 2^20: 1024 rows of 4096.
3. `best` is the saved step with the lowest held-out loss, a plain mean over the held-out sources.
4. Raising --steps on --resume is allowed: the rest of the run follows the schedule of a run of the new length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.nn import budget
from llama2cli.settings import Compute, flag

if TYPE_CHECKING:
    from llama2cli.nn.config import ModelConfig
    from llama2cli.text.tokenizer import Tokenizer
    from llama2cli.training.corpus import Corpus, Named
    from llama2cli.training.data import Batch, Position, Shape
    from llama2cli.training.dist import World
    from llama2cli.training.run import Run
    from llama2cli.training.signals import Stop
    from llama2cli.training.state import Machine, State


@dataclass(frozen=True, kw_only=True)
class Settings(Compute):
    """Pretrain a Llama on token folders (of `llama2 tokenize`), from scratch or from a checkpoint.

    The defaults are the paper's (section 2.2): AdamW, a cosine schedule to 10% of the peak, batches of 4M tokens.
    Sources are mixed by weight; --heldout gives their loss and bits per byte on text that is not trained on. Under
    torchrun the model is sharded over all processes. A killed or stopped run goes on with --resume, bit for bit.

    Prints one JSON record: {"checkpoint", "step", "loss", ...}.

    Example:
      llama2 pretrain --preset 1m --tokenizer tok.model --data books=tokens/books:3 --data web=tokens/web:1 \\
        --context 128 --batch-size 2048 --steps 300 --heldout 0.05 -o run --resume
    """

    files: list[str] = flag(
        positional=True, default=[], help="token folders; '-' reads {\"ids\"} lines from stdin", complete="file"
    )
    data: list[str] = flag(
        default=[], metavar="[NAME=]DIR[:WEIGHT]", help="a token folder and its weight in the mixture", complete="file"
    )
    out: str = flag("-o", metavar="DIR", help="the run folder", complete="file")
    preset: str | None = flag(
        default=None, metavar="SIZE", help="1m, 15m, 110m, 1b, 7b, 13b, 34b, 70b or a config.json"
    )
    init: str | None = flag(
        default=None, help="checkpoint to start from; a longer --context extends its own", complete="checkpoint"
    )
    tokenizer: str | None = flag(
        default=None, help="tokenizer.model, or a folder with one (default: the checkpoint's)", complete="file"
    )
    heldout: list[str] = flag(
        default=[],
        metavar="FRACTION|[NAME=]DIR",
        help="share of each source's documents, or token folders, that are not trained on but measured",
        complete="file",
    )
    eval_tokens: int | None = flag(
        default=None, low=1, help="held-out tokens that are measured of each source (default: all)"
    )
    context: int | None = flag(default=None, low=1, help="tokens in a row (default: the model's own, 4096 from 1b on)")
    batch_size: int = flag(default=4 << 20, low=1, help="tokens in an optimizer step, of all processes")
    micro_batch: int | None = flag(
        default=None, low=1, help="rows that a process runs at once (default: 4096 tokens of them, on CUDA 16384)"
    )
    steps: int | None = flag(default=None, low=1, help="optimizer steps (default: one epoch)")
    epochs: float | None = flag(default=None, low=0, help="the length of the run in passes over all tokens")
    lr: float | None = flag(default=None, low=0, help="peak learning rate (default: by size, 3e-4 for 7b)")
    warmup: int | None = flag(default=None, low=0, help="steps of warm-up (default: 2000, at most a tenth of the run)")
    weight_decay: float = flag(default=0.1, low=0, help="AdamW's")
    decay: Literal["matrices", "linears", "all"] = flag(
        default="matrices", help="what decays: matrices, those but the embedding, or the norms' gains too"
    )
    clip: float = flag(default=1.0, low=0, help="largest gradient norm; 0 does not clip")
    eval_every: int | None = flag(
        default=None, low=1, help="steps between held-out measurements (default: --save-every)"
    )
    save_every: int | None = flag(
        default=None, low=1, help="steps between saves (default: a tenth of the run, at most 1000)"
    )
    keep: int = flag(default=0, low=0, help="newest saved steps that stay, besides the best one; 0 keeps all")
    save_dtype: Literal["fp32", "bf16", "fp16"] = flag(default="fp32", help="type of the saved weights")
    activation_checkpointing: bool = flag(default=False, help="keep less for the backward pass and compute it again")
    compile: bool = flag(default=False, help="compile the layers (torch.compile)")
    kernels: Literal["auto", "plain"] = flag(
        default="auto", help="auto: what is equal and faster on this machine (chosen once); plain: torch's own"
    )
    peak: float | None = flag(
        default=None, low=0.001, help="TFLOP/s of a device, for MFU (default: the data sheet's, or measured)"
    )
    watts: float | None = flag(
        default=None, low=0, help="power of a device, for tCO2 (default: the data sheet's; CPU 100)"
    )
    resume: bool = flag(default=False, help="continue the run in --out; start it where nothing is saved yet")
    dry_run: bool = flag(default=False, help="print settings, memory, data and disk needed, and exit")


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.training import dist
    from llama2cli.training.signals import stop_requests

    check(settings)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        if settings.dry_run:
            return dry_run(job)
        return train(job, stop)


# --- 1. what is asked for ------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for settings that contradict each other."""
    if settings.dtype == "fp16":
        raise Misuse("fp16 is for inference only: its gradients underflow; take bf16 or fp32", "--dtype")
    if (settings.preset is None) == (settings.init is None):
        raise Misuse("give one of --preset SIZE (from scratch) and --init CHECKPOINT")
    if settings.steps is not None and settings.epochs is not None:
        raise Misuse("give one of --steps and --epochs")
    if settings.epochs == 0:
        raise Misuse("expected more than 0", "--epochs")
    if settings.eval_every is not None and not settings.heldout:
        raise Misuse("there is nothing to measure; give --heldout", "--eval-every")
    if settings.eval_tokens is not None and not settings.heldout:
        raise Misuse("there is nothing to measure; give --heldout", "--eval-tokens")


@dataclass(frozen=True)
class Job:
    """All that a run is made of, before any weight exists.

    resolved: what the settings came to, JSON. notes: what a person should know of that.
    """

    settings: Settings
    world: World
    tokenizer: Tokenizer
    config: ModelConfig
    init: Path | None
    named: list[Named]
    corpus: Corpus
    shape: Shape
    context: int
    steps: int
    resolved: dict[str, Any]
    notes: list[str]

    @property
    def streamed(self) -> bool:
        """Whether the data come from stdin."""
        return self.named[0].path == "-"


def prepare(settings: Settings, world: World) -> Job:
    """Open tokenizer and data, choose the model's shape and the length of the run. Reads no weights."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import learning_rate
    from llama2cli.text.folders import resolve_model
    from llama2cli.training import corpus as corpora
    from llama2cli.training.optim import warmup_steps

    # the model's shape
    init = resolve_model(settings.init) if settings.init else None
    tokenizer = open_tokenizer(settings, init)
    config = shape_of(settings, init, tokenizer)
    checkpoint.check_tokenizer(config, tokenizer, settings.init or settings.preset)
    context = settings.context or config.max_position_embeddings

    # the data
    named = corpora.parse_sources([*settings.files, *settings.data])
    streamed = named[0].path == corpora.STDIN
    heldout = corpora.parse_heldout(settings.heldout)
    if streamed:
        refuse_stream(settings, world, heldout)
    corpus = corpora.open_corpus([] if streamed else named, heldout, tokenizer, context)

    # the batch, and the length of the run
    shape = batch_shape(settings, world, context)
    an_epoch = sum(s.windows for s in corpus.mixed) / shape.rows
    steps = settings.steps or max(1, round((1.0 if settings.epochs is None else settings.epochs) * an_epoch))
    save_every = settings.save_every or max(1, min(1000, steps // 10))
    on_cuda = world.device.type == "cuda"
    resolved = {
        "seed": settings.seed,
        "context": context,
        "batch_size": shape.rows * context,
        "micro_batch": shape.micro,
        "processes": world.size,
        "steps": steps,
        "lr": learning_rate(config) if settings.lr is None else settings.lr,
        "warmup": warmup_steps(steps, settings.warmup),
        "weight_decay": settings.weight_decay,
        "decay": settings.decay,
        "clip": settings.clip,
        "eval_tokens": settings.eval_tokens,
        "eval_every": settings.eval_every or save_every,
        "save_every": save_every,
        "keep": settings.keep,
        "save_dtype": settings.save_dtype,
        "device": world.device.type,
        "dtype": ("bf16" if on_cuda else "fp32") if settings.dtype == "auto" else settings.dtype,
        "activation_checkpointing": settings.activation_checkpointing,
        "compile": settings.compile,
        "kernels": settings.kernels,
        **corpus.described,
        "tokenizer": tokenizer.sha256,
        "init": provenance.fingerprint(init) if init else None,
        "model": dataclasses.asdict(config),
    }
    notes = []
    if init is not None and config != checkpoint.load_config(init):
        notes.append(f"the context of {settings.init} is extended to {config.max_position_embeddings:,} positions")
    if resolved["batch_size"] != settings.batch_size:
        over = f" over {world.size} processes" if world.size > 1 else ""
        rounded = f"{resolved['batch_size']:,} tokens: {shape.rows:,} rows of {context:,}{over}"
        notes.append(f"--batch-size {settings.batch_size:,} is rounded to {rounded}")
    if 0 < an_epoch < 1:
        notes.append(f"one step reads the data {1 / an_epoch:,.1f} times; a smaller --batch-size gives more steps")
    return Job(settings, world, tokenizer, config, init, named, corpus, shape, context, steps, resolved, notes)


def open_tokenizer(settings: Settings, init: Path | None) -> Tokenizer:
    """The tokenizer that the data were made with and the model is saved with."""
    from llama2cli.text.tokenizer import Tokenizer

    if settings.tokenizer is None and init is None:
        raise Misuse("needed with --preset: the tokenizer.model that the data were made with", "--tokenizer")
    tokenizer = Tokenizer.load(settings.tokenizer or init or "")
    if settings.tokenizer is not None and init is not None and (init / "tokenizer.model").is_file():
        own = Tokenizer.load(init).sha256
        if own != tokenizer.sha256:
            raise DataError(f"is another tokenizer than that of --init {settings.init}", settings.tokenizer)
    return tokenizer


def shape_of(settings: Settings, init: Path | None, tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration: of the checkpoint, or a preset with the tokenizer's vocabulary."""
    from llama2cli.nn import checkpoint, config

    if init is not None:
        own = checkpoint.load_config(init)
        return dataclasses.replace(own, max_position_embeddings=max(own.max_position_embeddings, settings.context or 0))
    name = settings.preset or ""
    vocab = tokenizer.vocab_size if name in config.PRESETS else None
    return config.preset(name, vocab_size=vocab, context=settings.context)


def refuse_stream(settings: Settings, world: World, heldout: Any) -> None:
    """Raise Misuse for what cannot be done with data from stdin."""
    if world.size > 1:
        fix = "write a folder (llama2 tokenize -o DIR) and give that"
        raise Misuse(f"stdin reaches one process, and there are {world.size}; {fix}", "-")
    if settings.steps is None:
        raise Misuse("the length of stdin is not known before it ends; give --steps", "--steps")
    if isinstance(heldout, float):
        raise Misuse("nothing can be set apart from stdin; give a token folder", "--heldout")


def batch_shape(settings: Settings, world: World, context: int) -> Shape:
    """How many rows a step has, and how they are split over processes and micro-batches."""
    from llama2cli.training.data import Shape

    each = max(1, round(settings.batch_size / (context * world.size)))
    rows = each * world.size
    at_once = 16384 if world.device.type == "cuda" else 4096
    micro = min(each, settings.micro_batch or max(1, at_once // context))
    return Shape(rows, micro, world.rank, world.size)


# --- 2. what it would need ----------------------------------------------------------------------------------------


def save_bytes(job: Job) -> int:
    """Disk that one saved step takes: weights, two moments, the weights again where the saved ones are rounded."""
    size = 4 if job.settings.save_dtype == "fp32" else 2
    each = size + 8 + (0 if size == 4 else 4)
    return round(1.01 * each * budget.n_params(job.config)) + 3 * len(job.tokenizer.proto) + (1 << 20)


def dry_run(job: Job) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    compute_bytes = 4 if job.resolved["dtype"] == "fp32" else 2
    memory = budget.memory_per_gpu(
        job.config,
        tokens=job.shape.micro * job.context,
        gpus=job.world.size,
        checkpointing=job.settings.activation_checkpointing,
        compute_bytes=compute_bytes,
    )
    saves = -(-job.steps // job.resolved["save_every"])
    kept = min(saves, job.settings.keep + 1) if job.settings.keep else saves
    tokens = job.steps * job.resolved["batch_size"]
    plan = {
        "parameters": budget.n_params(job.config),
        "tokens": tokens,
        "flops": tokens * budget.train_flops_per_token(job.config, job.context),
        "memory": {k: round(v) for k, v in dataclasses.asdict(memory).items()} | {"total": round(memory.total)},
        "disk": {"step": save_bytes(job), "run": (kept + 1) * save_bytes(job)},
    }
    rows = [(k, v) for k, v in job.resolved.items() if not isinstance(v, (list, dict))]
    rows += [("parameters", f"{plan['parameters']:,}"), ("tokens", f"{tokens:,}")]
    rows += [("memory per device", f"{memory.total / 1e9:.3g} GB"), ("disk", f"{plan['disk']['run'] / 1e9:.3g} GB")]
    console.table("settings", ["", ""], rows)
    for note in job.notes:
        console.warn(note)
    data = []
    for source in job.corpus.mixed:
        stream, read = source.stream, job.steps * job.shape.rows * source.share / source.windows
        data.append(
            (source.name, f"{source.share:.3f}", f"{stream.n_tokens:,}", f"{stream.documents:,}", f"{read:.2f}")
        )
    console.table("data", ["source", "share", "tokens", "documents", "epochs"], data)
    return {"dry_run": True, "resolved": job.resolved, **plan}


# --- 3. training --------------------------------------------------------------------------------------------------


def train(job: Job, stop: Stop) -> dict[str, Any]:
    """Open the run folder, go on where it stands, train to the end."""
    from llama2cli.training import session
    from llama2cli.training.run import Run

    folder = Run(job.settings.out, resume=job.settings.resume, world=job.world)
    try:
        at, machine = session.resume(folder, job.resolved)
        if job.streamed and 0 < at.step < job.steps:
            fix = "tokenize to a folder (-o DIR) and start anew"
            raise Misuse(f"data from stdin cannot be continued in the middle; {fix}", "--resume")
        if at.step < job.steps:
            go(job, folder, at, machine, stop)
        return session.record(folder, ("step", "loss", "heldout_loss", "tokens"))
    finally:
        folder.close()


def go(job: Job, folder: Run, at: State, machine: Machine | None, stop: Stop) -> None:
    """Make the model, put back what was saved, train, save. machine: of the saved step, None for a fresh run."""
    from llama2cli.nn import checkpoint
    from llama2cli.training import card, heldout, meter, optim, session, state
    from llama2cli.training.build import build
    from llama2cli.training.data import epochs
    from llama2cli.training.fit import Plan, fit
    from llama2cli.training.run import TIMING

    settings, world, resolved = job.settings, job.world, job.resolved
    dtype = checkpoint.DTYPES[resolved["dtype"]]
    session.set_up(world, settings.seed, settings.kernels, machine, folder.folder)

    # model and optimizer
    model, loss = build(
        job.config,
        world,
        weights=folder.step_folder if at.step else job.init,
        seed=settings.seed,
        dtype=dtype,
        checkpointing=settings.activation_checkpointing,
        compile=settings.compile,
    )
    named = dict(model.named_parameters())
    schedule = optim.Schedule(resolved["lr"], resolved["warmup"], job.steps)
    optimizer = optim.adamw(named.items(), lr=schedule.peak, weight_decay=settings.weight_decay, decay=settings.decay)
    if at.step:
        state.restore(folder.step_folder, named, optimizer, world)

    # what is written
    origin = provenance.collect(settings, inputs(job))
    session.write_settings(folder, settings, resolved, origin)
    stages = card.lineage_of(job.init) if job.init else []
    stages.append(card.entry("pretrain", dataclasses.asdict(settings), resolved, origin))

    def save(aside: Path, metrics: Mapping[str, Any]) -> None:
        size = f"{budget.n_params(job.config):,} parameters, context {job.context:,}"
        files = card.files(stages, metrics, f"A Llama of {size}, after {metrics['tokens']:,} tokens of pretraining.")
        checkpoint.save_model(
            aside, model, job.tokenizer, save_dtype=settings.save_dtype, extra_files=files, writes=world.first
        )
        state.save(aside, at, named, optimizer, world, weights=settings.save_dtype != "fp32")

    # what is measured
    def measure(position: Position) -> dict[str, Any]:
        seen = position["row"] * job.context
        return {"tokens": seen} | ({} if job.streamed else {"epochs": epochs(job.corpus.mixed, position)})

    parts = [heldout.held_out(s, job.tokenizer, settings.eval_tokens) for s in job.corpus.heldout]
    peak, origin_of_peak = meter.peak_flops(world.device, dtype, settings.peak)
    for note in job.notes:
        console.warn(note)
    console.say(f"{budget.n_params(job.config):,} parameters, peak {peak / 1e12:.3g} TFLOP/s ({origin_of_peak})")

    # the loop
    fit(
        loss=loss,
        params=list(named.values()),
        optimizer=optimizer,
        batches=batches(job, at.position),
        plan=Plan(
            what="pretrain",
            schedule=schedule,
            save_every=resolved["save_every"],
            eval_every=resolved["eval_every"],
            keep=settings.keep,
            clip=settings.clip,
            dtype=dtype,
        ),
        state=at,
        run=folder,
        world=world,
        meter=meter.Meter(
            flops=budget.train_flops_per_token(job.config, job.context),
            peak=peak,
            watts=meter.power(world.device, settings.watts),
            devices=world.size,
            earlier=folder.last(TIMING),
        ),
        save=save,
        saved_bytes=save_bytes(job),
        measure=measure,
        evaluate=(lambda: heldout.measure(loss, parts, job.context, job.shape.micro, world, dtype)) if parts else None,
        stop=stop,
    )
    session.show_end(folder)


def batches(job: Job, position: Position | None) -> Iterator[tuple[Batch, Position]]:
    """The data from a position on."""
    from llama2cli.text.streams import read_records
    from llama2cli.training import data

    if not job.streamed:
        return data.batches(job.corpus.mixed, job.settings.seed, job.shape, position)

    def records() -> Iterator[dict[str, Any]]:
        for place, record in read_records(["-"], "ids"):
            largest = max(record["ids"], default=0)
            if largest >= job.tokenizer.vocab_size:
                raise DataError(f"id {largest} is outside the vocabulary of {job.tokenizer.vocab_size}", *place, "ids")
            yield record

    return data.streamed_batches(records(), job.context, job.shape)


def inputs(job: Job) -> list[str]:
    """The files and folders that the run reads."""
    from llama2cli.training import corpus

    held = corpus.parse_heldout(job.settings.heldout)
    paths = [n.path for n in job.named] + ([] if isinstance(held, float) else [n.path for n in held])
    return paths + [p for p in (job.settings.tokenizer, job.init and str(job.init)) if p]
