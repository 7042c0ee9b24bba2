"""Scored dialogues per second: `Scorer` beside transformers' LlamaForSequenceClassification, the same weights and ids.

    python tests/bench/score.py [--sizes 1m,15m] [--rounds 3] [--core 0] [--cases pairs,samples,single]

Random weights and ids, fp32, one thread. pairs: two answers of 20 to 200 tokens to a prompt of 20 to 200; samples: 16
answers of 20 to 80 tokens to a conversation of 50 to 300; single: dialogues of 40 to 400 tokens. transformers computes
padded batches of 32, once in the order of the data and once sorted by length; ours takes the whole in the order of the
data. Each side runs in a process of its own, and they take turns; the figure is the best of the rounds. One JSON line
for each size and case, with the largest difference of scores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = ("ours", "padded", "padded_sorted")
COUNT = {"1m": 256, "15m": 96}
BATCH, CONTEXT = 32, 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1m,15m")
    parser.add_argument("--cases", default="pairs,samples,single")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", default="", help="core to pin to; not pinned when not given")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if a.side:
        print(json.dumps(measure(a)))
        return
    best: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    for _ in range(a.rounds):
        for side in SIDES:
            done = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, check=True)
            for case, found in json.loads(done.stdout).items():
                if found["rate"] > best[side].get(case, {"rate": 0})["rate"]:
                    best[side][case] = found
    for case in best["ours"]:
        size, shape = case.split(":")
        rates = {side: best[side][case]["rate"] for side in SIDES}
        pairs = zip(best["ours"][case]["scores"], best["padded"][case]["scores"])
        ratios = {f"ratio_{side}": round(rates["ours"] / rates[side], 2) for side in SIDES[1:]}
        worst = float(f"{max(abs(x - y) for x, y in pairs):.1g}")
        print(json.dumps(dict(what="score", size=size, case=shape, **rates, **ratios, largest_difference=worst)))


def dialogues(case: str, n: int) -> list[list[int]]:
    """Token ids of n dialogues."""
    r = random.Random(0)

    def some(low: int, high: int) -> list[int]:
        return [r.randrange(3, 2000) for _ in range(r.randint(low, high))]

    if case == "single":
        return [[1, *some(40, 400), 2] for _ in range(n)]
    k, prompt, answer = (2, (20, 200), (20, 200)) if case == "pairs" else (16, (50, 300), (20, 80))
    prompts = [[1, *some(*prompt)] for _ in range(n // k)]
    return [[*p, *some(*answer), 2] for p in prompts for _ in range(k)]


def measure(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One side's dialogues per second, the best of three runs after a warm-up, and its scores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if a.core:
        os.sched_setaffinity(0, {int(c) for c in a.core.split(",")})
    from dataclasses import replace

    import torch

    from llama2cli.nn.config import PRESETS
    from llama2cli.nn.model import Llama

    torch.set_num_threads(1)
    found = {}
    for size in a.sizes.split(","):
        model = Llama(replace(PRESETS[size], max_position_embeddings=CONTEXT), scorer=True)
        model.init_weights(seed=0)
        run = ours(model) if a.side == "ours" else theirs(model, in_order=a.side == "padded")
        for case in a.cases.split(","):
            data = dialogues(case, COUNT[size])
            run(data[:BATCH])
            rate, scores = 0.0, []
            for _ in range(3):
                began = time.perf_counter()
                scores = run(data)
                rate = max(rate, len(data) / (time.perf_counter() - began))
            found[f"{size}:{case}"] = {"rate": round(rate, 1), "scores": scores}
    return found


def ours(model: Any) -> Callable[[list[list[int]]], list[float]]:
    from llama2cli.nn import ops
    from llama2cli.sampling.scoring import Scorer

    ops.setup_process()
    return Scorer(model, None).score  # type: ignore[arg-type]


def theirs(model: Any, in_order: bool) -> Callable[[list[list[int]]], list[float]]:
    import torch
    import transformers

    from llama2cli.nn.checkpoint import state_to_hf
    from llama2cli.nn.config import SCORER, config_to_json

    config = transformers.LlamaConfig(**config_to_json(model.config, SCORER) | {"num_labels": 1, "pad_token_id": 0})
    hf = transformers.LlamaForSequenceClassification(config).eval()
    hf.load_state_dict(state_to_hf(model.state_dict(), model.config, scorer=True))

    def run(data: list[list[int]]) -> list[float]:
        order = range(len(data)) if in_order else sorted(range(len(data)), key=lambda i: len(data[i]))
        scores = [0.0] * len(data)
        for at in range(0, len(data), BATCH):
            part = list(order[at : at + BATCH])
            width = max(len(data[i]) for i in part)
            ids = torch.tensor([data[i] + [0] * (width - len(data[i])) for i in part])
            mask = torch.tensor([[1] * len(data[i]) + [0] * (width - len(data[i])) for i in part])
            with torch.inference_mode():
                found = hf(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
            for i, score in zip(part, found):
                scores[i] = score
        return scores

    return run


if __name__ == "__main__":
    main()
