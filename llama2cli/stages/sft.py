"""`llama2 sft`: supervised fine-tuning by the recipe of section 3.1.

Choices that the paper leaves open, beside those at the top of `training/examples.py`, `training/dialogues.py`:
1. What separates prompt and answer is the chat format of Meta's reference code (`text/chat.py`), not one special token.
2. Dialogues are packed, and each attends to itself only (--packing blocks). The paper concatenates (--packing concat).
3. A batch is 64 dialogues; of a concatenated set 64 rows of the context.
4. Warm-up is 3% of the steps, at least 5; the cosine ends at 10% of the peak.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from llama2cli import console
from llama2cli.errors import DataError
from llama2cli.settings import Training, flag
from llama2cli.text.chat import TEMPLATE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llama2cli.text.tokenizer import Tokenizer
    from llama2cli.training.corpus import Named
    from llama2cli.training.data import Position
    from llama2cli.training.dialogues import Dialogues, Report, Rows
    from llama2cli.training.dist import World
    from llama2cli.training.examples import Part
    from llama2cli.training.run import Run
    from llama2cli.training.session import Work
    from llama2cli.training.tuning import Start


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Fine-tune a Llama on dialogues: the answers are trained, with the space and the EOS that close them.

    The defaults are the paper's (section 3.1). Reads {"messages"} records, and the common public formats (Alpaca,
    ShareGPT, prompt and completion, OASST trees, ...). An assistant message with "weight": 0 is not trained. The mask
    report tells the trained and total tokens of each role, and what was cut; --show-mask shows them token by token.

    Prints one JSON record: {"checkpoint", "step", "loss", ...}.

    Example:
      llama2 sft --init run --data examples/data/chat.jsonl --context 128 --batch-size 8 --lr 1e-3 --heldout 0.1 \\
        -o sft --resume
    """

    files: list[str] = flag(positional=True, default=[], help="dialogues; '-' is stdin", complete="file")
    data: list[str] = flag(
        default=[],
        metavar="[NAME=]FILE[:WEIGHT]",
        help="dialogues, and how often an epoch reads them (1 when not given)",
        complete="file",
    )
    format: str = flag(default="auto", help="form of the records (auto: by their fields), as alpaca, sharegpt, oasst")
    init: str = flag(help="checkpoint to start from", complete="checkpoint")
    heldout: list[str] = flag(
        default=[],
        metavar="FRACTION|[NAME=]FILE",
        help="share of each source's prompts, or dialogues, that are not trained on but measured",
        complete="file",
    )
    context: int | None = flag(default=None, low=2, help="tokens in a row (default: the model's own)")
    packing: Literal["blocks", "concat", "none"] = flag(
        default="blocks",
        help="blocks: packed rows, each dialogue sees itself only; concat: all concatenated and cut; none: padded",
    )
    long: Literal["cut", "drop"] = flag(default="cut", help="dialogues longer than the context; both are counted")
    tags: Literal["escape", "refuse", "keep"] = flag(
        default="escape", help="what to do with tags of the chat format, as [INST], in contents"
    )
    batch_size: int = flag(default=64, low=1, help="dialogues in an optimizer step (rows with --packing concat)")
    epochs: float | None = flag(default=None, low=0, help="passes over the data (default: 2)")
    steps: int | None = flag(default=None, low=1, help="optimizer steps, instead of --epochs")
    lr: float = flag(default=2e-5, low=0, help="peak learning rate")
    warmup: int | None = flag(default=None, low=0, help="steps of warm-up (default: 3% of the run, at least 5)")
    show_mask: int = flag(
        default=0, low=0, metavar="N", help="show the first N dialogues with what is trained in them, and exit"
    )


EPOCHS = 2.0  # Llama 2, section 3.1; batch size, learning rate and decay are above


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.training import dist, session
    from llama2cli.training.signals import stop_requests

    session.check(settings, heldout=bool(settings.heldout), epochs=settings.epochs)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        if settings.show_mask:
            show_mask(job, settings.show_mask)
            return None
        job.report.show()
        if settings.dry_run:
            return dry_run(job)
        return session.train(job.work, stop, show=show_end)


# --- 1. what is asked for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run before any weight exists: the dialogues, what became of them, and the work that comes of it.

    epochs: how often it reads the data.
    """

    rows: Rows
    heldout: list[Part]
    report: Report
    epochs: float
    work: Work


def prepare(settings: Settings, world: World) -> Job:
    """Read and encode the dialogues, set apart what is held out, settle the length of the run. Reads no weights."""
    from llama2cli.nn import budget
    from llama2cli.training import dialogues, examples, session, tuning
    from llama2cli.training.objective import NextToken

    start = tuning.start_from(settings.init, settings.context)

    # the data
    named = examples.parse_sources([*settings.files, *settings.data], world.size)
    store, report = dialogues.Dialogues(), dialogues.Report()

    def read_more(sources: Sequence[Named]) -> list[Part]:
        return read(settings, sources, store, report, start)

    split = tuning.set_apart(settings.heldout, read_more(named), store.groups, read_more, "dialogues")
    examples.check_some(split.parts, "dialogue")
    order = examples.Order(split.parts, settings.seed)
    budgeted = session.tokens_at_once(settings, world)
    rows = dialogues.Rows(store, order, start.context, settings.packing, budgeted, world)

    # the length of the run
    length = tuning.length_of(settings, rows.count, settings.batch_size, settings.epochs or EPOCHS)
    resolved = {
        "packing": settings.packing,
        "long": settings.long,
        "tags": settings.tags,
        **tuning.resolve(
            settings,
            world,
            start,
            split,
            length,
            lr=settings.lr,
            batch_size=settings.batch_size,
            digest=lambda part: store.digest(part.index),
            eval_every=length.eval_every,
        ),
    }

    # what the loop is given
    def measure(position: Position) -> dict[str, Any]:
        first = {"masks": report.metrics()} if position["seen"] <= settings.batch_size else {}
        return {"epochs": examples.progress(rows.count, position), "seen": position["seen"], **first}

    def evaluate(loss: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        return dialogues.measure(loss, rows, split.heldout, dtype)

    size = f"{budget.n_params(start.config):,} parameters, context {start.context:,}"
    work = session.Work(
        stage="sft",
        settings=settings,
        world=world,
        resolved=resolved,
        config=start.config,
        tokenizer=start.tokenizer,
        init=start.folder,
        inputs=[*(n.path for n in named), *split.paths, str(start.folder)],
        notes=[*split.notes, *length.notes, *start.notes],
        mean_length=start.context if settings.packing == "concat" else len(store.ids.values) // len(store),
        objective=NextToken,
        batches=lambda at: rows.batches(settings.batch_size, length.total, at),
        measure=measure,
        evaluate=evaluate if split.heldout else None,
        describe=lambda metrics: f"A Llama of {size}, fine-tuned on dialogues ({metrics['epochs']:.2f} epochs).",
        told=("step", "loss", "heldout_loss", "epochs"),
        saved=lambda metrics: {"chat_template": TEMPLATE},
    )
    return Job(rows, split.heldout, report, length.epochs, work)


def read(settings: Settings, named: Sequence[Named], store: Dialogues, report: Report, start: Start) -> list[Part]:
    """Read files into the store: a part for each; what became of their dialogues is added to the report."""
    from llama2cli.text.formats import read_dialogues
    from llama2cli.training import dialogues, examples

    parts = []
    for source in named:
        before, context = len(store), start.context
        records = read_dialogues([source.path], format=settings.format)
        found = dialogues.add(store, start.tokenizer, records, context=context, tags=settings.tags, long=settings.long)
        if len(store) == before:
            raise DataError(f"holds no dialogue to train on{found.why_none(context)}", source.path)
        parts.append(examples.part(source, before, len(store)))
        report.add(found)
    return parts


# --- 2. before it trains ------------------------------------------------------------------------------------------


def dry_run(job: Job) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    from llama2cli.training import session

    rows, epochs = job.rows, job.epochs
    an_epoch = sum(len(rows.store.ids[int(i)]) * p.weight for p in rows.order.parts for i in p.index)
    plan = session.plan_resources(job.work, tokens_at_once=rows.budget, tokens=round(epochs * an_epoch))
    data = [(p.name, f"{len(p.index):,}", f"{p.weight:g}", f"{epochs * p.weight:.2f}") for p in rows.order.parts]
    data += [(f"{p.name} (held out)", f"{len(p.index):,}", "", "") for p in job.heldout]
    console.table("data", ["source", "dialogues", "weight", "epochs"], data)
    return plan | {"masks": job.report.metrics()}


def show_mask(job: Job, n: int) -> None:
    """The first dialogues token by token: coloured on a terminal, else a JSON line each."""
    import json

    store, tokenizer = job.rows.store, job.work.tokenizer
    for i in range(min(n, len(store)) if job.work.world.first else 0):
        ids, mask = store.ids[i].tolist(), store.masks[i].tolist()
        if sys.stdout.isatty():
            sys.stdout.write(coloured(tokenizer, ids, mask) + "\n\n")
        else:
            sys.stdout.write(json.dumps({"ids": ids, "trained": mask}) + "\n")


def coloured(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """The text of a dialogue, what is trained in green and underlined, the rest dim; what cannot be shown as <0x1B>."""
    out = []
    for trained, group in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        pieces = [tokenizer.id_to_bytes(i) or tokenizer.id_to_piece(i).encode() for i, _ in group]
        text = b"".join(pieces).decode(errors="backslashreplace")
        text = "".join("\\n\n" if c == "\n" else c if c.isprintable() else f"<0x{ord(c):02X}>" for c in text)
        out.append(f"\x1b[{'32;4' if trained else '2'}m{text}\x1b[0m")
    return "".join(out)


# --- 3. after -----------------------------------------------------------------------------------------------------


def show_end(run: Run) -> None:
    """The held-out curve, and each source's loss at its two ends."""
    from llama2cli.training.run import METRICS

    curve = [m for m in run.read(METRICS) if "heldout_loss" in m]
    rows = [
        (m["step"], f"{m.get('epochs', 0):.2f}", f"{m['loss']:.4f}" if "loss" in m else "", f"{m['heldout_loss']:.4f}")
        for m in curve
    ]
    if rows:
        first, last = curve[0], curve[-1]
        each = [
            (name, f"{after['tokens']:,}", f"{first['heldout'][name]['loss']:.4f}", f"{after['loss']:.4f}")
            for name, after in last["heldout"].items()
        ]
        by_source = ["held out", "tokens", f"loss, step {first['step']}", f"step {last['step']:,}"]
        console.tables([("", ["step", "epochs", "loss", "held-out loss"], rows), ("", by_source, each)])
