"""`llama2 rm-train`: a reward model by the recipe of section 3.2.2, or a classifier on the same head.

Choices that the paper leaves open, beside those at the top of `rlhf/preferences.py`, `rlhf/mixing.py` and
`training/examples.py`:
1. The scalar is read at the EOS behind the last answer.
2. The new head is drawn from normal(0, 1 / (D + 1)), the embedding's width D, as in Stiennon et al. 2020.
3. Margins are the small ones of Table 27 where every pair has a rating; which the paper's final model had is not said.
4. The safety auxiliary loss has weight 1 with --mix safety, else 0; it is summed over the two answers of a pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama2cli import console
from llama2cli.errors import DataError, Failure, Misuse, did_you_mean
from llama2cli.settings import Training, flag
from llama2cli.text.chat import TEMPLATE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from llama2cli.nn.config import ModelConfig
    from llama2cli.rlhf.preferences import Margins
    from llama2cli.text.records import Record
    from llama2cli.text.streams import Place
    from llama2cli.training.corpus import Named
    from llama2cli.training.data import Position
    from llama2cli.training.dist import World
    from llama2cli.training.examples import Part
    from llama2cli.training.run import Run
    from llama2cli.training.scored import Examples, Report, Rows
    from llama2cli.training.session import Work
    from llama2cli.training.tuning import Split, Start

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Train a reward model on comparisons: the language model's head gives way to one that yields a scalar.

    The defaults are the paper's (section 3.2.2). Reads {"prompt", "chosen", "rejected", "rating"?, "safety"?} records,
    and the common public forms (HH-RLHF, TRL, AlpacaEval, ...). --mix composes the data as the paper does for either of
    its two models, from sources named helpfulness, safety and open. --objective binary trains a classifier on labelled
    dialogues instead. Held-out accuracy is told by rating and safety bin, with intervals, over the epochs.

    Prints one JSON record: {"checkpoint", "step", "loss", ...}. The checkpoint is a LlamaForSequenceClassification.

    Example:
      llama2 rm-train --init run --data examples/data/preferences.jsonl --context 128 --batch-size 16 --lr 1e-3 \\
        --epochs 3 --heldout 0.2 -o rm --resume
    """

    files: list[str] = flag(positional=True, default=[], help="comparisons; '-' is stdin", complete="file")
    data: list[str] = flag(
        default=[],
        metavar="[NAME=]FILE[:WEIGHT]",
        help="comparisons, and how often an epoch reads them (1 when not given)",
        complete="file",
    )
    format: str = flag(default="auto", help="form of the records (auto: by their fields), as hh-rlhf, trl, alpaca-eval")
    init: str = flag(help="checkpoint to start from, a chat model or a reward model", complete="checkpoint")
    objective: Literal["ranking", "binary"] = flag(
        default="ranking", help='ranking: comparisons; binary: dialogues with "label": 0 or 1, cross-entropy'
    )
    margin: str | None = flag(
        default=None,
        metavar="none|small|large|A,B,C,D",
        help="margins by rating, from significantly to negligibly (default: small where there are ratings)",
    )
    default_rating: Literal["significantly", "better", "slightly", "negligibly"] | None = flag(
        default=None, help="rating of pairs without one"
    )
    safety_weight: float | None = flag(
        default=None, low=0, help="weight of the safety auxiliary loss (default: 1 with --mix safety, else 0)"
    )
    mix: Literal["none", "helpfulness", "safety"] = flag(
        default="none", help="the paper's mixture for either model; sources are named helpfulness, safety, open"
    )
    own_share: float | None = flag(
        default=None, low=0.01, high=1, help="share of the mix's own data (default: 0.5, safety 0.9; 1 is unmixed)"
    )
    without: list[str] = flag(
        default=[],
        metavar="helpfulness|safety|open",
        help="leave sources of this role out of training; they are still measured",
    )
    heldout: list[str] = flag(
        default=[],
        metavar="FRACTION|[NAME=]FILE",
        help="share of each source's prompts, or comparisons, that are not trained on but measured",
        complete="file",
    )
    heldout_per_batch: int | None = flag(
        default=None, low=1, help='comparisons of each weekly "batch" that are held out, by prompt (the paper: 1000)'
    )
    calibrate: bool = flag(
        default=False,
        help="fit the free origin of the scores to held-out safety labels; saved as score_offset in config.json",
    )
    context: int | None = flag(default=None, low=2, help="longest dialogue in tokens (default: the model's context)")
    long: Literal["drop", "cut"] = flag(default="drop", help="comparisons longer than the context; both are counted")
    tags: Literal["escape", "refuse", "keep"] = flag(
        default="escape", help="what to do with tags of the chat format, as [INST], in contents"
    )
    shared_prefix: bool = flag(
        rename="--shared-prefix/--no-shared-prefix", default=True, help="compute the prompt of a pair once, or twice"
    )
    batch_size: int = flag(default=512, low=1, help="pairs (dialogues) in an optimizer step")
    epochs: float | None = flag(default=None, low=0, help="passes over the data (default: 1)")
    steps: int | None = flag(default=None, low=1, help="optimizer steps, instead of --epochs")
    lr: float | None = flag(default=None, low=0, help="peak learning rate (default: 1e-5, 5e-6 for 70b)")
    warmup: int | None = flag(default=None, low=0, help="steps of warm-up (default: 3% of the run, at least 5)")
    eval_every: int | None = flag(
        default=None,
        low=1,
        help="steps between held-out measurements (default: a quarter of an epoch; --save-every with --calibrate)",
    )


EPOCHS = 1.0  # Llama 2, section 3.2.2, as the next; batch size, warm-up and decay are above
LARGE = 50e9  # parameters of a model that counts as the 70B one


def learning_rate(config: ModelConfig) -> float:
    """5e-6 for the 70B model, 1e-5 for the others."""
    from llama2cli.nn.budget import n_params

    return 5e-6 if n_params(config) > LARGE else 1e-5


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.training import dist, session
    from llama2cli.training.signals import stop_requests

    check(settings)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        job.report.show(job.what)
        if settings.dry_run:
            return dry_run(job)
        return session.train(job.work, stop, show=lambda folder: show_end(folder, job))


# --- 1. what is asked for ------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for settings that contradict each other, or that would do nothing."""
    from llama2cli.training import session

    measured = bool(settings.heldout) or settings.heldout_per_batch is not None
    session.check(settings, heldout=measured, epochs=settings.epochs)
    binary = settings.objective == "binary"
    useless = {
        "--margin": binary and settings.margin is not None,
        "--default-rating": binary and settings.default_rating is not None,
        "--safety-weight": binary and settings.safety_weight is not None,
        "--calibrate": binary and settings.calibrate,
        "--heldout-per-batch": binary and settings.heldout_per_batch is not None,
    }
    for name, wrong in useless.items():
        if wrong:
            raise Misuse("has no meaning with --objective binary", name)
    if settings.own_share is not None and settings.mix == "none":
        raise Misuse("is the share in a mixture; give --mix", "--own-share")
    if settings.calibrate and not measured:
        raise Misuse("wants held-out comparisons with safety labels; give --heldout", "--calibrate")
    if settings.heldout and settings.heldout_per_batch is not None:
        raise Misuse("give one of --heldout and --heldout-per-batch")


@dataclass(frozen=True)
class Job:
    """A run before any weight exists: the examples, what became of them, and the work that comes of it.

    what: "comparisons" or "dialogues". epochs: how often it reads the data.
    """

    what: str
    rows: Rows
    heldout: list[Part]
    report: Report
    epochs: float
    work: Work


def prepare(settings: Settings, world: World) -> Job:
    """Read and encode the data, set apart what is held out, mix the rest, settle the length of the run."""
    from llama2cli.nn import budget
    from llama2cli.rlhf.objectives import reducer, tracked
    from llama2cli.training import examples, scored, session, tuning

    start = tuning.start_from(settings.init, settings.context, None)

    # the data
    what = "comparisons" if settings.objective == "ranking" else "dialogues"
    named = examples.parse_sources([*settings.files, *settings.data], world.size)
    store, report = scored.Examples(), scored.Report()

    def read_more(sources: Sequence[Named]) -> list[Part]:
        return read(settings, sources, store, report, start)

    split = tuning.set_apart(settings.heldout, read_more(named), store.groups, read_more, what)
    if settings.heldout_per_batch is not None:
        weeks = [facts.get("batch") for facts in store.facts]
        kept, out = examples.split_batches(split.parts, store.groups, weeks, settings.heldout_per_batch)
        split = dataclasses.replace(split, parts=kept, heldout=out)
    parts, told = mixed(settings, split.parts, explicit=any(n.weight is not None for n in named))
    split = dataclasses.replace(split, parts=parts, notes=[*split.notes, *told])
    examples.check_some(parts, what[:-1])
    labels = labels_of(settings, store)
    safety_weight = weight_of_safety(settings, split, labels)
    order = examples.Order(parts, settings.seed)
    budgeted = session.tokens_at_once(settings, world)
    rows = scored.Rows(store, labels, order, start.context, budgeted, settings.shared_prefix, world)

    # the length of the run
    length = tuning.length_of(settings, order.count, settings.batch_size, settings.epochs or EPOCHS)
    resolved = {
        "objective": settings.objective,
        "margin": list(margins(settings, store)) if settings.objective == "ranking" else None,
        "safety_weight": safety_weight,
        "mix": settings.mix,
        "long": settings.long,
        "tags": settings.tags,
        "shared_prefix": settings.shared_prefix,
        "calibrate": settings.calibrate,
        **tuning.resolve(
            settings,
            world,
            start,
            split,
            length,
            lr=learning_rate(start.config) if settings.lr is None else settings.lr,
            batch_size=settings.batch_size,
            digest=rows.digest,
            eval_every=None if settings.calibrate else length.eval_every,
        ),
    }
    if settings.calibrate and resolved["save_every"] % resolved["eval_every"]:
        raise Misuse(f"each save ({resolved['save_every']}) wants a measurement before it", "--eval-every")

    # what the loop is given
    def objective(model: Any) -> nn.Module:
        return scored.Scored(model, reducer(settings.objective, safety_weight))

    def measure(position: Position) -> dict[str, Any]:
        return {"epochs": examples.progress(order.count, position), "seen": position["seen"]}

    def evaluate(loss: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        return held_out(settings, rows, split.heldout, safety_weight, loss, dtype)

    size = f"{budget.n_params(start.config, scorer=True):,} parameters, context {start.context:,}"
    kind = "A reward model" if settings.objective == "ranking" else "A classifier"
    work = session.Work(
        stage="rm-train",
        settings=settings,
        world=world,
        resolved=resolved,
        config=start.config,
        tokenizer=start.tokenizer,
        init=start.folder,
        inputs=[*(n.path for n in named), *split.paths, str(start.folder)],
        notes=[*split.notes, *length.notes, *start.notes],
        mean_length=len(store.ids.values) // len(store),
        objective=objective,
        batches=lambda at: rows.batches(settings.batch_size, length.total, at),
        measure=measure,
        evaluate=evaluate if split.heldout else None,
        describe=lambda metrics: f"{kind} of {size}, trained on {metrics['seen']:,} {what}.",
        told=("step", "loss", "accuracy", "heldout_loss", "heldout_accuracy", "epochs"),
        tracked=tracked(settings.objective, safety_weight),
        scorer=True,
        saved=lambda metrics: {"score_offset": offset_of(metrics, settings.calibrate), "chat_template": TEMPLATE},
    )
    return Job(what, rows, split.heldout, report, length.epochs, work)


def read(settings: Settings, named: Sequence[Named], store: Examples, report: Report, start: Start) -> list[Part]:
    """Read files into the store: a part for each; what became of their records is added to the report."""
    from llama2cli.training import examples

    parts = []
    for source in named:
        before = len(store)
        for record, prompt, whole, place in dialogues(settings, source):
            facts: dict[str, Any] = {"source": record.get("source", source.name), "place": place}
            facts |= {k: record[k] for k in ("rating", "safety", "batch", "label") if k in record}
            encode(settings, store, report, start, whole, examples.group_of(prompt), facts)
        if len(store) == before:
            what = "comparison" if settings.objective == "ranking" else "dialogue"
            raise DataError(f"holds no {what} to train on", source.path)
        parts.append(examples.part(source, before, len(store)))
    if settings.shared_prefix:
        report.shared = report.tokens - len(store.ids.values)
    return parts


def dialogues(settings: Settings, source: Named) -> Iterator[tuple[Record, Messages, list[Messages], Place]]:
    """(record, its prompt, the dialogues that are scored, its place) of a file: of a comparison two dialogues."""
    from llama2cli.text.formats import read_comparisons, read_labelled

    if settings.objective == "binary":
        for place, record in read_labelled([source.path], format=settings.format):
            yield record, record["messages"], [record["messages"]], place
        return
    rating = settings.default_rating
    for place, record in read_comparisons([source.path], format=settings.format, default_rating=rating):
        prompt = record["prompt"]
        yield record, prompt, [prompt + record["chosen"], prompt + record["rejected"]], place


def encode(
    settings: Settings,
    store: Examples,
    report: Report,
    start: Start,
    whole: list[Messages],
    group: int,
    facts: dict[str, Any],
) -> None:
    """Add one example to the store, or count why it is left out."""
    from llama2cli.text.chat import TAGS, encode_scored

    place = facts["place"]
    if settings.tags == "escape":
        report.tags += sum(len(TAGS.findall(m["content"])) for messages in whole for m in messages)
    sequences = [encode_scored(start.tokenizer, messages, tags=settings.tags, place=place) for messages in whole]
    if settings.long == "drop" and max(map(len, sequences)) > start.context:
        report.long += 1
        return
    report.cut += sum(len(s) > start.context for s in sequences)
    sequences = [s[: start.context] for s in sequences]
    if len(sequences) == 2 and sequences[0] == sequences[1]:
        report.same += 1
        return
    store.add(sequences, group, facts)
    report.examples += 1
    report.tokens += sum(map(len, sequences))


def mixed(settings: Settings, parts: list[Part], *, explicit: bool) -> tuple[list[Part], list[str]]:
    """The parts with the weights of the mix, without those that are left out; and what a person should know."""
    from llama2cli.rlhf import mixing

    for role in settings.without:
        if role not in mixing.ROLES:
            wanted = f"expected one of {', '.join(mixing.ROLES)}"
            raise Misuse(f'{wanted}, got "{role}"{did_you_mean(role, mixing.ROLES)}', "--without")
    notes = []
    if settings.without:
        unused = [role for role in settings.without if role not in map(mixing.role_of, (p.name for p in parts))]
        notes = [f"--without {role}: there are no such data" for role in unused]
        parts = [p for p in parts if mixing.role_of(p.name) not in settings.without]
        if not parts:
            raise Misuse("leaves nothing to train on", "--without")
    if settings.mix == "none":
        return parts, notes
    if explicit:
        raise Misuse("sets the weights of the sources; leave :WEIGHT out of --data", "--mix")
    chosen, more = mixing.weights(settings.mix, {p.name: len(p.index) for p in parts}, settings.own_share)
    weighted = [dataclasses.replace(p, weight=chosen[p.name]) for p in parts]
    return [p for p in weighted if p.amount], notes + more


def margins(settings: Settings, store: Examples) -> Margins:
    """The margins by rating: what was asked for, else small ones where there are ratings."""
    from llama2cli.rlhf.preferences import MARGINS, parse_margin

    if settings.margin is not None:
        return parse_margin(settings.margin)
    return MARGINS["small" if all("rating" in facts for facts in store.facts) else "none"]


def labels_of(settings: Settings, store: Examples) -> dict[str, np.ndarray]:
    """What the loss is told of each example, by name: margins [n] and safe [n, 2] (-1 unknown), or labels [n].

    Raises DataError where a margin was asked for and a pair has no rating.
    """
    import numpy as np

    from llama2cli.rlhf.preferences import margins_of
    from llama2cli.text.records import SAFETY_LABELS

    if settings.objective == "binary":
        return {"labels": np.array([facts["label"] for facts in store.facts], np.float32)}
    table = margins(settings, store)
    ratings = [facts.get("rating") for facts in store.facts]
    if any(table) and None in ratings:
        place = store.facts[ratings.index(None)]["place"]
        raise DataError("rating: is missing, and the margin depends on it (--default-rating, or --margin none)", *place)
    safe = [SAFETY_LABELS.get(facts.get("safety", ""), (-1, -1)) for facts in store.facts]
    return {
        "margins": np.array(margins_of(ratings, table), np.float32),
        "safe": np.array(safe, np.int64).reshape(-1, 2),
    }


def weight_of_safety(settings: Settings, split: Split, labels: Mapping[str, np.ndarray]) -> float:
    """The weight of the safety auxiliary loss. Raises Misuse where it, or --calibrate, lacks the labels it wants."""
    if settings.objective == "binary":
        return 0.0
    weight = 1.0 if settings.mix == "safety" else 0.0
    weight = weight if settings.safety_weight is None else settings.safety_weight
    if weight and not any((labels["safe"][p.index] >= 0).any() for p in split.parts):
        raise Misuse('no comparison that is trained on has a "safety" label to learn from', "--safety-weight")
    known = {int(y) for p in split.heldout for y in labels["safe"][p.index].flat}
    if settings.calibrate and not {0, 1} <= known:
        raise Misuse('wants held-out answers that are safe and some that are not (the "safety" field)', "--calibrate")
    return weight


# --- 2. what is measured ------------------------------------------------------------------------------------------


def held_out(
    settings: Settings, rows: Rows, apart: Sequence[Part], safety_weight: float, loss: nn.Module, dtype: torch.dtype
) -> dict[str, Any]:
    """Held-out metrics: the loss, and what `measure` makes of the scores. Raises Failure where one is not finite."""
    import numpy as np
    import torch

    chosen = [int(i) for part in apart for i in part.index]
    facts = [rows.store.facts[i] for i in chosen]
    scores = rows.scores(loss, chosen, dtype)
    if not np.isfinite(scores).all():
        raise Failure("held-out scores are not finite: stopped; the last checkpoint is good")
    labels = {name: torch.from_numpy(values[chosen]) for name, values in rows.labels.items()}
    if settings.objective == "binary":
        found = measure_dialogues(torch.from_numpy(scores[:, 0]), labels, facts)
    else:
        found = measure_pairs(torch.from_numpy(scores), labels, facts, safety_weight, settings.calibrate)
    return found | {"heldout_accuracy": found["heldout"]["accuracy"]["value"]}


def measure_dialogues(
    scores_N: Tensor, labels: Mapping[str, Tensor], facts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Held-out figures of a classifier."""
    from llama2cli.measure import classifier
    from llama2cli.rlhf.preferences import binary_loss

    result = classifier.evaluate(scores_N.tolist(), [f["label"] for f in facts], [f["source"] for f in facts])
    return {"heldout_loss": float(binary_loss(scores_N, labels["labels"]).mean()), "heldout": result}


def measure_pairs(
    scores_N2: Tensor,
    labels: Mapping[str, Tensor],
    facts: Sequence[Mapping[str, Any]],
    safety_weight: float,
    calibrate: bool,
) -> dict[str, Any]:
    """Held-out figures of a reward model, and the origin of its scores where it is to be fitted."""
    from llama2cli.measure import reward_model
    from llama2cli.rlhf.objectives import pair_losses

    ranking, auxiliary = pair_losses(scores_N2, labels["margins"], labels["safe"])
    found: dict[str, Any] = {"heldout_loss": float((ranking + safety_weight * auxiliary).mean())}
    if calibrate:
        known = labels["safe"] >= 0
        safe = [bool(y) for y in labels["safe"][known].tolist()]
        found["score_offset"] = reward_model.calibrate_offset(scores_N2[known].tolist(), safe)
    result = reward_model.evaluate(
        scores_N2[:, 0].tolist(),
        scores_N2[:, 1].tolist(),
        ratings=[f.get("rating") for f in facts],
        safety=[f.get("safety") for f in facts],
        batches=[f.get("batch") for f in facts],
        sources=[f["source"] for f in facts],
        offset=found.get("score_offset", 0.0),
    )
    return found | {"heldout": result}


def offset_of(metrics: Mapping[str, Any], calibrate: bool) -> float:
    """The calibrated origin that a step is saved with; one that is saved by a signal may not have been measured."""
    if calibrate and "score_offset" not in metrics:
        console.warn("saved without score_offset: this step was not measured; --resume goes on to one that is")
    return metrics.get("score_offset", 0.0)


def dry_run(job: Job) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    from llama2cli.training import session

    rows = job.rows
    an_epoch = sum(len(rows.store.ids[int(i)]) * p.weight for p in rows.order.parts for i in p.index)
    plan = session.plan_resources(job.work, tokens_at_once=rows.budget, tokens=round(job.epochs * an_epoch))
    data = [(p.name, f"{len(p.index):,}", f"{p.weight:.3g}", f"{p.amount:,}") for p in rows.order.parts]
    data += [(f"{p.name} (held out)", f"{len(p.index):,}", "", "") for p in job.heldout]
    console.table("data", ["source", job.what, "weight", "in an epoch"], data)
    return plan | {"data": {p.name: p.amount for p in rows.order.parts}}


def show_end(run: Run, job: Job) -> None:
    """The held-out curve by epoch, and the tables of the last measurement."""
    from llama2cli.measure import classifier, reward_model
    from llama2cli.measure.rates import interval, percent
    from llama2cli.training.run import METRICS

    curve = [m for m in run.read(METRICS) if "heldout" in m]
    if not curve:
        return
    rows = []
    for m in curve:
        trained = (f"{m['loss']:.4f}", f"{100 * m['accuracy']:.1f}") if "loss" in m else ("", "")
        right = m["heldout"]["accuracy"]
        held = f"{m['heldout_loss']:.4f}", percent(right), interval(right)
        rows.append((m["step"], f"{m.get('epochs', 0):.2f}", *trained, *held))
    columns = ["step", "epochs", "loss", "right %", "held-out loss", "held-out right %", "95% interval"]
    of = reward_model if job.work.settings.objective == "ranking" else classifier  # type: ignore[attr-defined]
    console.tables([("", columns, rows), *of.tables(curve[-1]["heldout"])])
    if "score_offset" in curve[-1]:
        console.say(f"score_offset {curve[-1]['score_offset']:.4f} is in config.json: score, rs-sample and ppo add it")
