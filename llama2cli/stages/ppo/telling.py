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


SHOWN = {  # metrics of a step: the head of their column
    "reward": "reward",
    "help": "help",
    "safe": "safe",
    "kl": "KL",
    "entropy": "entropy",
    "clip_fraction": "clipped",
    "explained_variance": "explained",
    "length": "tokens",
    "truncated": "cut",
}
HELD_OUT = {"reward": "held-out reward", "judge": "judge"}


def show_end(run: Run) -> None:
    """The curve of the run, about a dozen lines of it, and where its time went."""
    lines = run.read(METRICS)
    every = max(1, len(lines) // 12)
    shown = [m for m in lines if "heldout" in m or m["step"] % every == 0 or m is lines[-1]]
    columns = [("step", [f"{m['step']:,}" for m in shown])]
    columns += [(head, [number(m.get(name)) for m in shown]) for name, head in SHOWN.items()]
    columns += [(head, [number(m.get("heldout", {}).get(name)) for m in shown]) for name, head in HELD_OUT.items()]
    columns = [(head, cells) for head, cells in columns if any(cells)]
    console.table("", [head for head, _ in columns], zip(*(cells for _, cells in columns)))
    timing = run.read(TIMING)
    phases = {p: sum(t.get(f"{p}_seconds", 0.0) for t in timing) for p in ("rollout", "scoring", "update")}
    total = sum(phases.values()) or 1.0
    console.say("time: " + ", ".join(f"{phase} {s:.1f} s ({s / total:.0%})" for phase, s in phases.items()))
    alarms = sum(len(m.get("alarms", ())) for m in lines)
    if alarms:
        console.warn(f"{alarms} {'alarm' if alarms == 1 else 'alarms'}; metrics.jsonl has them by step")


def number(value: float | None) -> str:
    """For a cell; nothing where there is none."""
    return "" if value is None else f"{value:.3g}"
