"""Small models for PPO: a policy whose answers end, two reward models and a judge; nothing trained, nothing random.

The file is imported by its path: `sys.path.insert(0, str(Path(__file__).parent))`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny

CONTEXT = 128
OFFSET = 0.4  # of rm-help
PATHS = ("policy", "rm_help", "rm_safe", "judge")


def prompt(i: int) -> dict[str, Any]:
    """Every third is tagged unsafe; some have a system message, some a second round."""
    messages = [{"role": "user", "content": f"what did {tiny.WORDS[i % 7]} see {i}?"}]
    if i % 4 == 0:
        messages.insert(0, {"role": "system", "content": "be kind"})
    if i % 5 == 2:
        messages += [{"role": "assistant", "content": "two wolf"}, {"role": "user", "content": "near the river"}]
    return {"messages": messages} | ({"unsafe": True} if i % 3 == 0 else {})


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def write(kit: Path, prompts: int = 13) -> Path:
    """tok.model; lm, rm-help (with a score_offset), rm-safe and judge; prompts.jsonl."""
    import torch

    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import read_config
    from llama2cli.nn.model import Llama
    from llama2cli.text.tokenizer import Tokenizer, train

    kit.mkdir(parents=True, exist_ok=True)
    (kit / "tok.model").write_bytes(train(tiny.documents(550), 300))
    tokenizer = Tokenizer.load(kit / "tok.model")
    shape = tiny.SHAPE | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    (kit / "model.json").write_text(json.dumps(shape))
    config = read_config(kit / "model.json")

    def keep(name: str, model: Llama, **more: Any) -> None:
        (kit / name).mkdir()
        checkpoint.save_model(kit / name, model, tokenizer, **more)

    policy = Llama(config)
    policy.init_weights(1, std=0.1)
    assert policy.head is not None
    with torch.no_grad():  # EOS is likely in some states
        ids = torch.randint(3, 300, (8, 60), generator=torch.Generator().manual_seed(0))
        mean = policy(ids).flatten(0, 1).mean(0)
        policy.head[2] = 3.5 * mean / (mean @ mean)
    keep("lm", policy)
    for seed, (name, size, more) in enumerate(
        (("rm-help", 1.0, {"score_offset": OFFSET}), ("rm-safe", 3.0, {}), ("judge", 1.0, {}))
    ):
        scorer = Llama(config, scorer=True)
        scorer.init_weights(10 + seed, std=0.1)
        assert scorer.score is not None
        scorer.score.data *= size
        keep(name, scorer, **more)
    write_lines(kit / "prompts.jsonl", [prompt(i) for i in range(prompts)])
    return kit


def given(kit: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short run; None takes one away."""
    found = {
        "policy": f"{kit}/lm",
        "rm_help": f"{kit}/rm-help",
        "rm_safe": f"{kit}/rm-safe",
        "prompts": [f"{kit}/prompts.jsonl"],
        "batch_size": 6,
        "mini_batch": 4,
        "max_new_tokens": 10,
        "steps": 2,
        "save_every": 1,
        "lr": 1e-3,
        "seed": 7,
    }
    return {k: v for k, v in (found | changes).items() if v is not None}


def line(settings: Mapping[str, Any]) -> list[str]:
    """The command line of settings."""
    out = ["ppo"]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            if one is False:
                out.append(f"--no-{flag[2:]}")
            else:
                out += [flag] if one is True else [flag, str(one)]
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
