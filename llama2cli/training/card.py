"""Where a checkpoint comes from: `lineage.json`, all stages that led to it, and a README.md made from that.

No dates and no absolute paths: the same run writes the same card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2cli.errors import DataError
from llama2cli.provenance import fingerprint, portable
from llama2cli.training.run import to_json

LINEAGE, CARD = "lineage.json", "README.md"
Entry = dict[str, Any]


def lineage_of(folder: Path) -> list[Entry]:
    """The stages that led to a checkpoint; of one made elsewhere, its name and hash. Raises DataError."""
    path = folder / LINEAGE
    if not path.is_file():
        return [{"stage": "checkpoint", "name": folder.absolute().name, "sha256": fingerprint(folder)}]
    try:
        stages = json.loads(path.read_bytes())["stages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"cannot be read as the lineage of a checkpoint ({e})", path) from None
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
        raise DataError("cannot be read as the lineage of a checkpoint", path)
    return stages


def entry(stage: str, settings: Mapping[str, Any], resolved: Mapping[str, Any], provenance: Mapping[str, Any]) -> Entry:
    """What the lineage says of one stage, before training."""
    told = ("version", "command", "seed", "inputs")
    return {
        "stage": stage,
        **{k: provenance[k] for k in told},
        "settings": portable(dict(settings)),
        "resolved": portable(dict(resolved)),
    }


def files(
    stages: Sequence[Entry], metrics: Mapping[str, Any], description: str, task: str = "text-generation"
) -> dict[str, bytes]:
    """The files of a step folder that tell its origin.

    stages: all of the lineage, the last is the one that trained; metrics: the last that it logged. task: what the model
    is for, in the words of model hubs.
    """
    *before, last = stages
    told = [*before, {**last, "metrics": dict(metrics)}]
    return {LINEAGE: to_json({"stages": told}).encode(), CARD: card(told, description, task).encode()}


CARD_TEXT = """---
library_name: transformers
pipeline_tag: {task}
tags:
- llama-2
- llama2cli
---

# {title}

{description}

A Hugging Face folder: transformers, vLLM and llama.cpp's converter load it, and so does every `--init` or `--model`
of `llama2`. `trainer/` is what `--resume` needs; the model is whole without it. `manifest.json` has each file's sha256.

## Lineage

{lineage}
"""


def card(stages: Sequence[Entry], description: str, task: str) -> str:
    """The model card."""
    title = f"{stages[-1]['stage']}, step {stages[-1]['metrics']['step']:,}"
    lineage = "\n\n".join(f"{i}. {paragraph(stage)}" for i, stage in enumerate(stages, 1))
    return CARD_TEXT.format(task=task, title=title, description=description, lineage=lineage)


def paragraph(stage: Entry) -> str:
    """One stage of the lineage."""
    if "command" not in stage:
        return f"**{stage['stage']}** `{stage.get('name')}`, sha256 `{stage.get('sha256')}`"
    title = f"**{stage['stage']}**, llama2cli {stage['version']}, seed {stage['seed']}"
    inputs = [f"   - input `{name}`: sha256 `{digest}`" for name, digest in stage["inputs"].items()]
    numbers = [f"   - {name}: {value:.6g}" for name, value in flat(stage["metrics"]) if name != "step"]
    return "\n".join([title, "", f"   `{stage['command']}`", "", *inputs, *numbers])


def flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a metrics record with dotted names."""
    out: list[tuple[str, float]] = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            out += flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out.append((prefix + key, value))
    return out
