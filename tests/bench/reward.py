"""A reward model's training beside TRL's RewardTrainer: the same pairs, weights, head and tokenizer, equal losses.

    python tests/bench/reward.py [--data short,long] [--dtypes fp32] [--rounds 2] [--core 0] [-o FILE.md]

Pairs are real ones of the folder of public data (beside the checkout, or in LLAMA2_SHARED): "short" is alpaca_eval's
binary pairs of at most 152 tokens an answer with its prompt, about 184 a pair; "long" hh_harmless with prompts of at
least 128 tokens, at most 512 an answer with its prompt. A step is 16 pairs, the model the 1m preset. TRL is given our
token ids. Both load one LlamaForSequenceClassification folder, whose head is large enough that the first loss says
something.

pairs/s is 16 over the time of a step. Ours lays the prompt of a pair once, with the two answers as branches behind it,
and packs pairs into rows; "two rows" is ours without that. TRL pads both answers, each with its prompt, to the longest
of the batch. "malloc tuned": three environment variables keep glibc from returning memory.

The losses are those of four steps over one batch of the same 16 pairs; they must agree. A ratio is taken within a
round, and the lowest round is told. Needs `pip install trl datasets accelerate`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beside_trl as peer
from beside_trl import Task

SIZE, PAIRS = "1m", 16
SIDES = ("ours", "ours, two rows", "TRL", "TRL, malloc tuned")
GUESS = {"short": 120.0, "long": 40.0}  # pairs/s of ours
LIMIT = {"short": 152, "long": 512}  # tokens of a prompt with an answer
PROMPT = {"short": 0, "long": 128}  # tokens of a prompt, at least
BAR = 2.5
Pair = tuple[list[dict[str, str]], str, str]


def pairs_of(data: str) -> Iterator[Pair]:
    """(prompt, chosen, rejected), as they are published."""
    if data == "short":
        for record in peer.records("alpaca_eval_graded/binary_pairs.jsonl.gz"):
            answers = record["output_1"], record["output_2"]
            if record["preference"] in (1, 2):
                yield (
                    [peer.turn("user", record["instruction"])],
                    *(answers if record["preference"] == 1 else answers[::-1]),
                )
        return
    for record in peer.records("hh_harmless/harmless.jsonl.gz"):
        one, two = transcript(record["chosen"]), transcript(record["rejected"])
        if one and two and one[:-1] == two[:-1]:
            yield one[:-1], one[-1]["content"], two[-1]["content"]


def transcript(text: str) -> list[dict[str, str]]:
    """The messages of a text with "Human:" and "Assistant:"; none where they are not in turn, or one is empty."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    messages = [
        peer.turn("user" if who == "Human" else "assistant", said) for who, said in zip(parts[::2], parts[1::2])
    ]
    roles = [m["role"] for m in messages]
    whole = roles == ["user", "assistant"] * (len(roles) // 2) and all(m["content"] for m in messages)
    return messages if whole else []


def prepare(work: Path, data: str) -> Task:
    """Files of one set: comparisons, their ids, and a batch of them by itself; the weights."""
    from llama2cli.nn.packing import common
    from llama2cli.text.chat import encode_prompt, encode_scored

    every = [p for p in pairs_of(data) if p[1].strip() and p[2].strip() and p[1].strip() != p[2].strip()]
    texts = (
        text for kind in ("short", "long") for m, *answers in pairs_of(kind) for text in (m[-1]["content"], *answers)
    )
    tokenizer = peer.tokenizer(work, SIZE, texts)
    fit = []
    for prompt, *answers in every:
        both = [encode_scored(tokenizer, [*prompt, peer.turn("assistant", a)]) for a in answers]
        asked = len(encode_prompt(tokenizer, prompt))
        if max(map(len, both)) <= LIMIT[data] and asked >= PROMPT[data]:
            fit.append((prompt, answers, both, asked))
    random.Random(0).shuffle(fit)
    for name, some in (("all", fit), ("batch", fit[:PAIRS])):
        told = ({"prompt": p, "chosen": [peer.turn("assistant", a)], "rejected": [peer.turn("assistant", b)]}
                for p, (a, b), _, _ in some)  # fmt: skip
        peer.write_lines(work / f"rm-{data}-{name}.jsonl", told)
        peer.write_lines(
            work / f"rm-{data}-{name}-ids.jsonl", ({"chosen_ids": c, "rejected_ids": r} for _, _, (c, r), _ in some)
        )
    tokens = sum(len(ids) for _, _, both, _ in fit for ids in both)
    shared = sum(common(both) for _, _, both, _ in fit)
    return {"data": data, "files": f"{work}/rm-{data}", "init": str(head(work, peer.weights(work, SIZE, tokenizer))),
            "n": len(fit), "each": tokens / len(fit), "prompt": statistics.mean(n for *_, n in fit),
            "share": 1 - shared / tokens}  # fmt: skip


def head(work: Path, base: Path) -> Path:
    """A reward model's folder, written by transformers: the trunk of the language model and a random head."""
    import torch
    from transformers import LlamaForSequenceClassification

    folder = work / f"reward-{SIZE}"
    if not folder.exists():
        model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight, std=0.2)
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        model.save_pretrained(folder)
    return folder


def of_ours(made: Task, dtype: str, side: str, args: argparse.Namespace, *, check: bool) -> list[dict[str, Any]]:
    """Steps of `llama2 rm-train`."""
    guess = args.seconds * GUESS[made["data"]] / PAIRS
    steps = peer.CHECKED if check else peer.SKIPPED["ours"] + max(8, round(guess))
    called = [
        "rm-train", f"{made['files']}-{'batch' if check else 'all'}.jsonl", "--init", made["init"],
        "--context", str(LIMIT[made["data"]]), "--batch-size", str(PAIRS), "--steps", str(steps),
        "--lr", str(peer.RATE), "--warmup", str(peer.warm_up(check)), "--margin", "none", "--dtype", dtype,
        "--save-every", str(steps), *(["--no-shared-prefix"] if "two rows" in side else []),
    ]  # fmt: skip
    return peer.ours(called, PAIRS, args)


def of_trl(made: Task, dtype: str, side: str, args: argparse.Namespace, *, check: bool) -> list[dict[str, Any]]:
    """Steps of RewardTrainer."""
    task = made | {"side": side, "dtype": dtype, "check": check, "batch": PAIRS, "seconds": args.seconds}
    task |= {"file": f"{made['files']}-{'batch' if check else 'all'}-ids.jsonl", "limit": LIMIT[made["data"]]}
    return peer.theirs(__file__, task | {"steps": peer.CHECKED if check else 200}, args)


def measure(task: Task, folder: str) -> Task:
    """In a process of its own: train with RewardTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_list(peer.read_lines(task["file"]))
    model = LlamaForSequenceClassification.from_pretrained(
        task["init"], dtype=torch.float32, attn_implementation="sdpa"
    )
    words = AutoTokenizer.from_pretrained(task["init"])
    words.pad_token_id = 0
    told = RewardConfig(max_length=task["limit"], **peer.common(task, folder))

    def count(inputs: Any) -> dict[str, int]:
        return {"tokens": int(inputs["attention_mask"].sum()), "places": inputs["input_ids"].numel()}

    return peer.clocked(RewardTrainer, count, task, model=model, args=told, train_dataset=data, processing_class=words)


def compare(made: Task, dtype: str, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one set of pairs."""
    sides = [s for s in SIDES if not args.sides or s in args.sides.split(";")]

    def one(side: str, *, check: bool) -> Task:
        steps = (of_ours if "ours" in side else of_trl)(made, dtype, side, args, check=check)
        row = {"what": "losses" if check else "speed", "data": made["data"], "dtype": dtype, "side": side}
        if check:
            return peer.told({**row, "losses": [step["loss"] for step in steps]})
        counted = steps[peer.SKIPPED["ours" if "ours" in side else "TRL"] :]
        return peer.told({**row, **peer.rates([PAIRS / step["seconds"] for step in counted], "pairs_s")})

    checked = {side: one(side, check=True)["losses"] for side in sides if "tuned" not in side}
    found: dict[str, list[Task]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            found[side].append(one(side, check=False))
    out = []
    for side in sides:
        rows = found[side]
        over = f"**{peer.lowest(found['ours'], rows, 'pairs_s'):.2f}**" if side != "ours" and "ours" in found else ""
        over += f" ({BAR:g})" if over and side == "TRL" else ""
        figures = [peer.listed(rows, "pairs_s", ".1f"), peer.listed(rows, "iqr", ".0%"), peer.listed(rows, "n", "d")]
        out.append([f"{made['data']} {dtype}", side, *figures, over, peer.losses(checked.get(side, []))])
    return out


def main() -> None:
    parser = peer.arguments(__doc__)
    parser.add_argument("--data", default="short,long")
    parser.set_defaults(dtypes="fp32")
    args = parser.parse_args()
    if args.worker:
        peer.as_worker(json.loads(args.worker), measure)
        return
    peer.pin(args)
    notes, rows = [peer.machine(args), ""], []
    with tempfile.TemporaryDirectory() as fresh:
        work = Path(args.work or fresh).absolute()
        work.mkdir(exist_ok=True, parents=True)
        for data in args.data.split(","):
            made = prepare(work, data)
            notes.append(
                f"* {data}: {made['n']:,} pairs of {made['each']:.0f} tokens (the prompt, of {made['prompt']:.0f}, "
                f"counted twice); with their common beginnings counted once, {made['share']:.0%} of that"
            )
            for dtype in args.dtypes.split(","):
                rows += compare(made, dtype, args)
    columns = ["pairs", "side", "pairs/s", "spread (IQR) of steps", "steps counted", "ours over it (bar)",
               "losses of four steps over one batch"]  # fmt: skip
    peer.report(args, "A reward model beside TRL's RewardTrainer", "\n".join(notes), peer.table(columns, rows))


if __name__ == "__main__":
    main()
