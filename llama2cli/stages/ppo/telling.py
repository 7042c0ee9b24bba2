"""What a person is told of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2cli import console
from llama2cli.rlhf.credit import Terms
from llama2cli.training.run import METRICS, TIMING, Run


def told_kl(terms: Terms) -> str:
    """ "k1, paid per token, beta 0.01"."""
    return f"{terms.estimator}, paid per {terms.per}, beta {terms.beta:g}"


def told_heldout(found: Mapping[str, float]) -> str:
    """ "held-out reward 0.412 (help 0.61, safe 0.93), KL 1.2, 83 tokens"."""
    models = ", ".join(f"{name} {found[name]:.3f}" for name in ("help", "safe", "judge") if name in found)
    return f"held-out reward {found['reward']:.3f} ({models}), KL {found['kl']:.2f}, {found['length']:.0f} tokens"


def note(metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """The log line of an iteration."""
    total = sum(seconds.values())
    phases = ", ".join(f"{phase} {s / total:.0%}" for phase, s in seconds.items())
    told = f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.3g}, {metrics['length']:.0f} tokens"
    return f"{told}, {total:.3g} s ({phases})"


def show_end(run: Run) -> None:
    """The curve of the run, and where its time went."""

    lines = run.read(METRICS)
    iterations = [m for m in lines if m["step"]]
    every = max(1, len(iterations) // 12)
    shown = [m for m in iterations if "heldout" in m or m["step"] % every == 0 or m is iterations[-1]]

    def cells(m: Mapping[str, Any]) -> tuple[str, ...]:
        held = m.get("heldout", {})
        values = [m.get(k) for k in ("reward", "help", "safe", "kl", "entropy", "clip_fraction", "explained_variance")]
        values += [m.get("length"), m.get("truncated"), held.get("reward"), held.get("judge")]
        return (f"{m['step']:,}", *("" if v is None else f"{v:.3g}" for v in values))

    columns = ["step", "reward", "help", "safe", "KL", "entropy", "clipped", "explained", "tokens", "cut"]
    console.table(
        "", [*columns, "held-out reward", "judge"], map(cells, [*lines[:1], *shown] if lines[0] not in shown else shown)
    )
    timing = run.read(TIMING)
    phases = {p: sum(t.get(f"{p}_seconds", 0.0) for t in timing) for p in ("rollout", "scoring", "update")}
    total = sum(phases.values()) or 1.0
    console.say("time: " + ", ".join(f"{phase} {s:.1f} s ({s / total:.0%})" for phase, s in phases.items()))
    alarms = sum(len(m.get("alarms", ())) for m in iterations)
    if alarms:
        console.warn(f"{alarms} alarms; metrics.jsonl has them by step")
