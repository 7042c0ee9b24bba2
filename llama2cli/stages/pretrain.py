"""`llama2 pretrain`: a Llama from token folders, by the recipe of section 2.2.

Choices that the paper leaves open, beside those at the top of `training/data.py` and `training/optim.py`:
1. Without --steps or --epochs a run is one epoch of all its sources together.
2. "4M tokens" are 4 * 2^20: 1024 rows of 4096.
3. `best` is the saved step with the lowest held-out loss, a plain mean over the held-out sources.
4. Raising --steps on --resume is allowed: the rest of the run follows the schedule of a run of the new length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.nn import budget
from llama2cli.settings import Training, flag

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llama2cli.nn.config import ModelConfig
    from llama2cli.text.tokenizer import Tokenizer
    from llama2cli.training.corpus import Corpus, Named
    from llama2cli.training.data import Batch, Position, Shape
    from llama2cli.training.dist import World
    from llama2cli.training.run import Run
    from llama2cli.training.session import Work


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
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
        default=None, low=1, help="rows that a process runs at once, instead of --micro-tokens"
    )
    steps: int | None = flag(default=None, low=1, help="optimizer steps (default: one epoch)")
    epochs: float | None = flag(default=None, low=0, help="the length of the run in passes over all tokens")
    lr: float | None = flag(default=None, low=0, help="peak learning rate (default: by size, 3e-4 for 7b)")
    warmup: int | None = flag(default=None, low=0, help="steps of warm-up (default: 2000, at most a tenth of the run)")


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.training import dist, session
    from llama2cli.training.signals import stop_requests

    check(settings)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        if settings.dry_run:
            return dry_run(job)
        return session.train(job.work, stop, show=show_end)


# --- 1. what is asked for ------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for settings that contradict each other."""
    from llama2cli.training import session

    session.check(settings, heldout=bool(settings.heldout), epochs=settings.epochs)
    if (settings.preset is None) == (settings.init is None):
        raise Misuse("give one of --preset SIZE (from scratch) and --init CHECKPOINT")
    if settings.tokenizer is None and settings.init is None:
        raise Misuse("needed with --preset: the tokenizer.model that the data were made with", "--tokenizer")
    if settings.eval_tokens is not None and not settings.heldout:
        raise Misuse("there is nothing to measure; give --heldout", "--eval-tokens")


@dataclass(frozen=True)
class Job:
    """A run before any weight exists: what is read, how it is cut into steps, and the work that comes of it."""

    corpus: Corpus
    shape: Shape
    context: int
    work: Work


def prepare(settings: Settings, world: World) -> Job:
    """Open tokenizer and data, choose the model's shape and the length of the run. Reads no weights."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import learning_rate
    from llama2cli.text.folders import resolve_model
    from llama2cli.training import corpus as corpora
    from llama2cli.training import heldout, session
    from llama2cli.training.data import epochs
    from llama2cli.training.objective import NextToken
    from llama2cli.training.optim import warmup_steps

    # the model's shape
    init = resolve_model(settings.init) if settings.init else None
    tokenizer = session.open_tokenizer(settings.tokenizer, init)
    config = shape_of(settings, init, tokenizer)
    checkpoint.check_tokenizer(config, tokenizer, settings.init or settings.preset)
    context = settings.context or config.max_position_embeddings

    # the data
    named = corpora.parse_sources([*settings.files, *settings.data])
    streamed = named[0].path == corpora.STDIN
    held = corpora.parse_heldout(settings.heldout)
    if streamed:
        refuse_stream(settings, world, held)
    corpus = corpora.open_corpus([] if streamed else named, held, tokenizer, context)
    parts = [heldout.held_out(s, tokenizer, settings.eval_tokens) for s in corpus.heldout]

    # the batch, and the length of the run
    shape = batch_shape(settings, world, context)
    an_epoch = sum(s.windows for s in corpus.mixed) / shape.rows
    steps = settings.steps or max(1, round((1.0 if settings.epochs is None else settings.epochs) * an_epoch))
    resolved = {
        **session.resolve(
            settings,
            world,
            context=context,
            steps=steps,
            lr=learning_rate(config) if settings.lr is None else settings.lr,
            warmup=warmup_steps(steps, settings.warmup),
        ),
        "batch_size": shape.rows * context,
        "micro_batch": shape.micro,
        "eval_tokens": settings.eval_tokens,
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

    # what the loop is given
    def measure(position: Position) -> dict[str, Any]:
        seen = position["row"] * context
        return {"tokens": seen} | ({} if streamed else {"epochs": epochs(corpus.mixed, position)})

    def evaluate(loss: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        return heldout.measure(loss, parts, context, shape.micro, world, dtype)

    size = f"{budget.n_params(config):,} parameters, context {context:,}"
    work = session.Work(
        stage="pretrain",
        settings=settings,
        world=world,
        resolved=resolved,
        config=config,
        tokenizer=tokenizer,
        init=init,
        inputs=inputs(settings, named, held, init),
        notes=notes,
        mean_length=context,
        objective=NextToken,
        batches=lambda at: batches(settings, corpus, shape, context, at, tokenizer),
        measure=measure,
        evaluate=evaluate if parts else None,
        describe=lambda metrics: f"A Llama of {size}, after {metrics['tokens']:,} tokens of pretraining.",
        told=("step", "loss", "heldout_loss", "tokens"),
        eval_first=False,
        continues=not streamed,
    )
    return Job(corpus, shape, context, work)


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
    from llama2cli.training.session import tokens_at_once

    each = max(1, round(settings.batch_size / (context * world.size)))
    rows = each * world.size
    micro = min(each, settings.micro_batch or max(1, tokens_at_once(settings, world) // context))
    return Shape(rows, micro, world.rank, world.size)


def inputs(settings: Settings, named: list[Named], held: float | list[Named], init: Path | None) -> list[str]:
    """The files and folders that the run reads."""
    paths = [n.path for n in named] + ([] if isinstance(held, float) else [n.path for n in held])
    return paths + [p for p in (settings.tokenizer, init and str(init)) if p]


# --- 2. what it would need ----------------------------------------------------------------------------------------


def dry_run(job: Job) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    from llama2cli.training import session

    steps = job.work.resolved["steps"]
    tokens = steps * job.shape.rows * job.context
    plan = session.plan_resources(job.work, tokens_at_once=job.shape.micro * job.context, tokens=tokens)
    data = []
    for source in job.corpus.mixed:
        stream, read = source.stream, steps * job.shape.rows * source.share / source.windows
        data.append(
            (source.name, f"{source.share:.3f}", f"{stream.n_tokens:,}", f"{stream.documents:,}", f"{read:.2f}")
        )
    console.table("data", ["source", "share", "tokens", "documents", "epochs"], data)
    return plan


# --- 3. training --------------------------------------------------------------------------------------------------


def batches(
    settings: Settings, corpus: Corpus, shape: Shape, context: int, position: Position | None, tokenizer: Tokenizer
) -> Iterator[tuple[Batch, Position]]:
    """The data from a position on; of stdin where no source is open."""
    from llama2cli.text.streams import read_records
    from llama2cli.training import data

    if corpus.mixed:
        return data.batches(corpus.mixed, settings.seed, shape, position)

    def records() -> Iterator[dict[str, Any]]:
        for place, record in read_records(["-"], "ids"):
            largest = max(record["ids"], default=0)
            if largest >= tokenizer.vocab_size:
                raise DataError(f"id {largest} is outside the vocabulary of {tokenizer.vocab_size}", *place, "ids")
            yield record

    return data.streamed_batches(records(), context, shape)


def show_end(run: Run) -> None:
    """The last tables: how often each source was read, what each held-out source came to."""
    from llama2cli.training.run import METRICS

    last = run.last(METRICS)
    if "epochs" in last:
        console.table("", ["source", "epochs"], [(k, f"{v:.3f}") for k, v in last["epochs"].items()])
    if "heldout" in last:
        rows = [(k, f"{v['loss']:.4f}", f"{v['bits_per_byte']:.4f}") for k, v in last["heldout"].items()]
        console.table("", ["held out", "loss", "bits per byte"], rows)
