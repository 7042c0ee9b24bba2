"""Supervised fine-tuning beside TRL's SFTTrainer with packing: the same dialogues, weights, tokenizer, trained tokens.

    python tests/bench/sft.py [--sizes 1m,15m] [--dtypes fp32,bf16] [--rounds 2] [--core 0] [-o FILE.md]

Dialogues: instruction_1100, alpaca_en_demo, roleplay and dolly_1k of the folder of public data (beside the checkout, or
in LLAMA2_SHARED), those of at most 256 tokens, so that neither side cuts one. TRL is given our token ids and our
loss mask as labels: its own default would train the prompts too. A step is about 16 (1m) or 8 (15m) rows of 256 tokens.

tokens/s counts the tokens of the dialogues that went through the model, prompts and answers, trained or not; padding is
not counted. Ours packs the dialogues of a batch into rows, attention stays within a dialogue; "concat" is `--packing
concat`, rows like those of "wrapped". TRL, "wrapped" (its
fastest): one stream of tokens cut at every 256th, dialogues see their neighbours and are cut. TRL, "bfd" (its default):
whole dialogues, all rows of a batch flattened to one, attention within a dialogue. "malloc tuned": three environment
variables keep glibc from returning memory.

The losses are those of four steps that each train one batch of the same dialogues: ours and TRL's (bfd) are the same
arithmetic, so they must agree; "wrapped" computes something else. A ratio is taken within a round, and the lowest round
is told. Needs `pip install trl datasets accelerate`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beside_trl as peer
from beside_trl import Task

CONTEXT = 256
ROWS = {"1m": 16, "15m": 8}
GUESS = {("1m", "fp32"): 16000, ("1m", "bf16"): 22000, ("15m", "fp32"): 2200, ("15m", "bf16"): 3400}  # tokens/s
WRAPPED = ("TRL wrapped", "TRL wrapped, malloc tuned")
ONCE = ("ours, concat", "TRL bfd", "TRL bfd, malloc tuned")  # in the first round only
SIDES = {"1m": ("ours", *WRAPPED, *ONCE), "15m": ("ours", *WRAPPED)}
BAR = 2.0
FILES = {
    "instruction_1100/instruction-data.json.gz": ("instruction", "input", "output"),
    "alpaca_en_demo/alpaca_en_demo.json.gz": ("instruction", "input", "output"),
    "roleplay/roleplay-instruct.json.gz": ("instruction", "input", "response"),
    "dolly_1k/dolly_1k.jsonl.gz": ("instruction", "context", "response"),
}


def dialogues() -> Iterator[list[dict[str, str]]]:
    """All dialogues of the files, as messages."""
    for name, (*asked, answer) in FILES.items():
        for record in peer.records(name):
            yield [peer.turn("user", *(record[k] for k in asked)), peer.turn("assistant", record[answer])]


def prepare(work: Path, size: str) -> Task:
    """Files of one size: dialogues, their ids, and a batch of them by itself; how many make a batch."""
    from llama2cli.text.chat import encode_dialogue

    every = list(dialogues())
    tokenizer = peer.tokenizer(work, size, (m["content"] for messages in every for m in messages))
    encoded = [(m, encode_dialogue(tokenizer, m)) for m in every]
    fit = [(m, e) for m, e in encoded if len(e.ids) <= CONTEXT and any(e.mask)]
    random.Random(0).shuffle(fit)
    mean = statistics.mean(len(e.ids) for _, e in fit)
    batch = round(ROWS[size] * CONTEXT / mean)
    for name, some in (("all", fit), ("batch", fit[:batch])):
        peer.write_lines(work / f"sft-{size}-{name}.jsonl", ({"messages": m} for m, _ in some))
        peer.write_lines(work / f"sft-{size}-{name}-ids.jsonl", ({"ids": e.ids, "mask": e.mask} for _, e in some))
    trained = sum(sum(e.mask) for _, e in fit) / sum(len(e.ids) for _, e in fit)
    init = str(peer.weights(work, size, tokenizer))
    return {"size": size, "files": f"{work}/sft-{size}", "init": init, "batch": batch, "n": len(fit), "mean": mean,
            "trained": trained}  # fmt: skip


def of_ours(made: Task, dtype: str, side: str, args: argparse.Namespace, *, check: bool) -> list[dict[str, Any]]:
    """Steps of `llama2 sft`."""
    concat = "concat" in side
    batch = ROWS[made["size"]] if concat else made["batch"]
    guess = args.seconds * GUESS[made["size"], dtype] / (ROWS[made["size"]] * CONTEXT)
    steps = peer.CHECKED if check else peer.SKIPPED["ours"] + max(4, round(guess))
    called = [
        "sft", f"{made['files']}-{'batch' if check else 'all'}.jsonl", "--init", made["init"],
        "--context", str(CONTEXT), "--batch-size", str(batch), "--packing", "concat" if concat else "blocks",
        "--steps", str(steps), "--lr", str(peer.RATE), "--warmup", str(peer.warm_up(check)), "--dtype", dtype,
        "--save-every", str(steps),
    ]  # fmt: skip
    return peer.ours(called, batch, args)


def of_trl(made: Task, dtype: str, side: str, args: argparse.Namespace, *, check: bool) -> list[dict[str, Any]]:
    """Steps of SFTTrainer."""
    task = made | {"side": side, "dtype": dtype, "packing": "wrapped" if "wrapped" in side else "bfd", "check": check}
    task |= {"file": f"{made['files']}-{'batch' if check else 'all'}-ids.jsonl", "seconds": args.seconds}
    task |= {"batch": 4096 if check else ROWS[made["size"]], "steps": peer.CHECKED if check else 200}
    return peer.theirs(__file__, task, args)


def measure(task: Task, folder: str) -> Task:
    """In a process of its own: train with SFTTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    lines = peer.read_lines(task["file"])
    labels = [[i if m else -100 for i, m in zip(line["ids"], line["mask"])] for line in lines]
    data = Dataset.from_dict({"input_ids": [line["ids"] for line in lines], "labels": labels})
    model = LlamaForCausalLM.from_pretrained(task["init"], dtype=torch.float32, attn_implementation="sdpa")
    told = SFTConfig(packing=True, packing_strategy=task["packing"], max_length=CONTEXT, **peer.common(task, folder))

    def count(inputs: Any) -> dict[str, int]:
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return {"tokens": tokens, "rows": len(inputs["input_ids"])}

    words = AutoTokenizer.from_pretrained(task["init"])
    return peer.clocked(SFTTrainer, count, task, model=model, args=told, train_dataset=data, processing_class=words)


def compare(made: Task, dtype: str, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one size and dtype."""
    sides = [s for s in SIDES[made["size"]] if not args.sides or s in args.sides.split(";")]

    def one(side: str, *, check: bool) -> Task:
        steps = (of_ours if "ours" in side else of_trl)(made, dtype, side, args, check=check)
        row = {"what": "losses" if check else "speed", "size": made["size"], "dtype": dtype, "side": side}
        if check:
            return peer.told({**row, "losses": [step["loss"] for step in steps]})
        counted = steps[peer.SKIPPED["ours" if "ours" in side else "TRL"] :]
        return peer.told({**row, **peer.rates([step["tokens"] / step["seconds"] for step in counted], "tokens_s")})

    checked = {side: one(side, check=True)["losses"] for side in ("ours", "TRL bfd") if not args.sides or side in sides}
    found: dict[str, list[Task]] = {side: [] for side in sides}
    for i in range(args.rounds):
        for side in sides:
            if i == 0 or side not in ONCE:
                found[side].append(one(side, check=False))
    out = []
    for side in sides:
        rows = found[side]
        over = f"**{peer.lowest(found['ours'], rows, 'tokens_s'):.2f}**" if side != "ours" and "ours" in found else ""
        over += f" ({BAR:g})" if over and side == "TRL wrapped" else ""
        figures = [peer.listed(rows, "tokens_s", ",.0f"), peer.listed(rows, "iqr", ".0%"), peer.listed(rows, "n", "d")]
        out.append([f"{made['size']} {dtype}", side, *figures, over, peer.losses(checked.get(side, []))])
    if "TRL bfd" in checked and "TRL bfd" not in sides:
        out.append([f"{made['size']} {dtype}", "TRL bfd", "", "", "", "", peer.losses(checked["TRL bfd"])])
    return out


def main() -> None:
    parser = peer.arguments(__doc__)
    parser.add_argument("--sizes", default="1m,15m")
    args = parser.parse_args()
    if args.worker:
        peer.as_worker(json.loads(args.worker), measure)
        return
    peer.pin(args)
    about = peer.machine(args)
    with tempfile.TemporaryDirectory() as fresh:
        work = Path(args.work or fresh).absolute()
        work.mkdir(exist_ok=True, parents=True)
        rows, notes = [], [about, ""]
        for size in args.sizes.split(","):
            made = prepare(work, size)
            notes.append(
                f"* {size}: {made['n']:,} dialogues of {made['mean']:.0f} tokens, {made['trained']:.0%} of them "
                f"trained; {made['batch']} dialogues a step for ours, {ROWS[size]} rows of {CONTEXT} for TRL"
            )
            for dtype in args.dtypes.split(","):
                rows += compare(made, dtype, args)
    columns = ["size, dtype", "side", "tokens/s", "spread (IQR) of steps", "steps counted", "ours over it (bar)",
               "losses of four steps over one batch"]  # fmt: skip
    peer.report(args, "Supervised fine-tuning beside TRL's SFTTrainer", "\n".join(notes), peer.table(columns, rows))


if __name__ == "__main__":
    main()
