"""How good a binary classifier is on held-out dialogues: refusal, toxicity, truthfulness (Llama 2, section 4).

Choices where the paper is silent: the decision is sigmoid(score) > 0.5; beside accuracy stands the area under the ROC
curve, which does not depend on where one decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llama2cli.errors import DataError
from llama2cli.measure.flow import Table
from llama2cli.measure.rates import interval, percent, rate


def evaluate(
    scores_N: Iterable[float], labels_N: Sequence[int], sources: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """{"accuracy", "precision", "recall" (of label 1), "auc", "positive": how many are, "by_source"}; a rate without
    anything to count is missing. Raises DataError for no dialogues, and for a score that is not finite.
    """
    scores, labels = np.asarray(list(scores_N), np.float64), np.asarray(labels_N, np.int64)
    if not len(scores):
        raise DataError("there are no dialogues to evaluate on")
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(f"the score of dialogue {at + 1} is {scores[at]}")
    called = scores > 0
    right = called == (labels == 1)
    both, n_called, n_positive = int((called & (labels == 1)).sum()), int(called.sum()), int(labels.sum())
    result: dict[str, Any] = {"accuracy": rate(int(right.sum()), len(right)), "positive": n_positive}
    if n_called:
        result["precision"] = rate(both, n_called)
    if n_positive:
        result["recall"] = rate(both, n_positive)
    if 0 < n_positive < len(labels):
        result["auc"] = auc(scores, labels)
    names = np.array([s or "" for s in sources or [""] * len(scores)])
    result["by_source"] = {
        str(s): rate(int(right[names == s].sum()), int((names == s).sum())) for s in np.unique(names)
    }
    return result


def auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """The chance that a dialogue with label 1 has a higher score than one with 0, ties counting half (Mann-Whitney)."""
    values, place = np.unique(scores_N, return_inverse=True)
    counts = np.bincount(place, minlength=len(values))
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n1 = int((labels_N == 1).sum())
    n0 = len(labels_N) - n1
    return float((rank[labels_N == 1].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result for `console.table`: (title, columns, rows)."""
    rows = [
        [x, percent(result[x]), interval(result[x]), f"{result[x]['n']:,}"]
        for x in ("accuracy", "precision", "recall")
        if x in result
    ]
    area = f", area under the ROC curve {result['auc']:.3f}" if "auc" in result else ""
    found = [
        (f"label 1: {result['positive']:,} of {result['accuracy']['n']:,}{area}", ["", "%", "95% interval", "n"], rows)
    ]
    if len(result["by_source"]) > 1:
        each = [[name, percent(s), interval(s), f"{s['n']:,}"] for name, s in result["by_source"].items()]
        found.append(("right, by source", ["source", "right %", "95% interval", "n"], each))
    return found
