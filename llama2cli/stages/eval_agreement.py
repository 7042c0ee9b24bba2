"""`llama2 eval agreement`: how far raters agree. Llama 2, sections 3.4.2 and A.4.6 (Gwet's AC1 and AC2).

Choices where the paper is silent:
1. AC2 has quadratic weights on a scale of numbers; other weights are a flag, and AC1 always stands beside it.
2. Without --scale the categories are those that occur, which is told: one that nobody used changes every coefficient
   but the percentage.
3. The mean of batches is the plain one: each batch counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.settings import Measuring, flag

if TYPE_CHECKING:
    from llama2cli.measure.judgements import Scale


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """How far raters agree: Gwet's AC1 and AC2, Fleiss' kappa, Krippendorff's alpha, and others.

    A judgement is {"item": ..., "rater": ..., "score": ...}; ratings that are missing are judgements that are not
    there. Items of two models, rounds, batches or tasks are different items. Each coefficient comes with its standard
    error and 95% interval (Gwet's variance, over items), of all items and by group, and as the mean over batches that
    the paper reports. Tables go to stderr, metric records to stdout.

    Example:
      llama2 eval agreement examples/data/judgements.jsonl --scale 1:5 -o metrics.jsonl
    """

    scale: str | None = flag(
        default=None,
        help="the categories: 1:5, or a list in its order, as safe,borderline,unsafe (default: those that occur)",
    )
    weights: list[str] = flag(
        default=[],
        metavar="WEIGHTS",
        help="of disagreement: identity, linear, quadratic, ordinal; repeatable "
        "(default: identity, and on numbers quadratic)",
    )
    by: list[str] = flag(
        default=[],
        metavar="FIELD",
        help="group by this field: model, round, batch, turn, category, attack, source, task; repeatable "
        "(default: model, batch and category, where there are any)",
    )


def run(settings: Settings) -> None:
    """Read judgements, gather them by item, measure, show and write."""
    from llama2cli.measure import agreement, flow, judgements
    from llama2cli.text.streams import read_records

    check(settings)
    by = settings.by or ["model", "batch", "category"]
    scale = judgements.parse_scale(settings.scale) if settings.scale is not None else None
    read = read_records(settings.files, "judgement", max_line=settings.max_line)
    watched = flow.watched(read, settings.files, "judgements")
    items = judgements.gather(watched, scale, judgements.group_fields(by))
    if scale is None:
        scale = judgements.observed_scale(items)
        if not scale.numeric and set(settings.weights) - {"identity"}:
            raise Misuse("of words only --scale can say the order, which these weights go by", "--weights")
        names = ", ".join(c if isinstance(c, str) else f"{c:g}" for c in scale.categories[:20])
        console.warn(f"the categories are those that occur: {names}; --scale names all that there are")
    if all(len(item.ratings) < 2 for item in items):
        raise DataError("no item has two ratings: agreement takes two raters", ", ".join(settings.files) or "stdin")
    found = agreement.report(items, scale, kinds(settings, scale), by)
    for name in settings.by:
        if name not in found.groups:
            raise DataError(f'no judgement has the field "{name}" to group by', ", ".join(settings.files) or "stdin")
    for (name, kind), a in found.total.items():
        if a.value is None:
            console.warn(f"{name} ({kind} weights) is not defined: all ratings are in one category")
    flow.deliver(settings, agreement.tables(found), agreement.records(found), settings.files)


def check(settings: Settings) -> None:
    """Raise Misuse for weights or fields that are not known, or named twice."""
    from llama2cli.measure import agreement, judgements

    for flag_, given, known in (
        ("--weights", settings.weights, agreement.WEIGHTS),
        ("--by", settings.by, judgements.FIELDS),
    ):
        for word in given:
            if word not in known:
                hint = did_you_mean(word, known)
                raise Misuse(f'expected one of {", ".join(known)}, got "{word}"{hint}', flag_)
            if given.count(word) > 1:
                raise Misuse(f'"{word}" is given twice', flag_)


def kinds(settings: Settings, scale: Scale) -> list[str]:
    """The weights that are asked for: identity first, for AC1."""
    if settings.weights:
        return ["identity", *(w for w in settings.weights if w != "identity")]
    return ["identity", "quadratic"] if scale.numeric and len(scale.categories) > 2 else ["identity"]
